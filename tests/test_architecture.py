"""The rows of the house: who may import whom, read from the source of every file."""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "titan_lite"
ROWS = (
    {"config"},
    {"models"},
    {"nn", "runtime", "planner"},
    {"parallel", "data", "optim", "metrics", "checkpoint"},
    {"training"},
    {"train", "launch", "cli", "dryrun", "regression", "tools"},
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS, start=1) for room in rooms}
# The command line hands over to other entry points, inside functions.
DISPATCHER = "cli"
TORCH_FREE = ("config", "models", "planner")
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def room_of(path: Path) -> str:
    """'config' for titan_lite/config/load.py, 'train' for titan_lite/train.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Absolute dotted names of everything imported, at the top or inside functions.

    `package` is that of the file, which relative imports start from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_rooms(source: str, package: str) -> set[str]:
    names = (name.split(".") for name in imported_modules(source, package))
    return {name[1] for name in names if name[0] == "titan_lite" and len(name) > 1} & ROW_OF.keys()


def violations(source: str, room: str, package: str = "titan_lite") -> list[str]:
    """One sentence per import that the rows forbid to a file of `room`."""
    broken = []
    for other in sorted(imported_rooms(source, package) - {room}):
        dispatches = room == DISPATCHER and ROW_OF[other] == ROW_OF[room]
        if ROW_OF[other] >= ROW_OF[room] and not dispatches:
            broken.append(f"{room} (row {ROW_OF[room]}) imports {other} (row {ROW_OF[other]})")
    modules = {f"{name}." for name in imported_modules(source, package)}
    if room in TORCH_FREE and any(name.startswith("torch.") for name in modules):
        broken.append(f"{room} imports torch")
    if room == "nn" and any(name.startswith("torch.distributed.") for name in modules):
        broken.append("nn imports torch.distributed")
    return broken


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE) + sorted(
        path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"
    )


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_rooms_of_lower_rows(path: Path) -> None:
    room = room_of(path)
    assert room in ROW_OF, f"{room} has no row; give it one, or move it into a room"
    package = ".".join(["titan_lite", *path.relative_to(PACKAGE).parent.parts])
    assert violations(path.read_text(encoding="utf-8"), room, package) == []


@pytest.mark.parametrize(
    ("source", "room", "violation"),
    [
        ("import titan_lite.training.trainer", "data", "data (row 4) imports training (row 5)"),
        ("from titan_lite import training", "data", "data (row 4) imports training (row 5)"),
        ("from titan_lite.optim.schedule import f", "data", "data (row 4) imports optim (row 4)"),
        ("def f():\n    import titan_lite.nn", "models", "models (row 2) imports nn (row 3)"),
        ("from ..nn import norm", "models", "models (row 2) imports nn (row 3)"),
        ("from .. import nn", "models", "models (row 2) imports nn (row 3)"),
        ("import titan_lite.train", "training", "training (row 5) imports train (row 6)"),
        ("from titan_lite import cli", "train", "train (row 6) imports cli (row 6)"),
        ("def f():\n    from torch import nn", "config", "config imports torch"),
        ("import torch.nn.functional as F", "planner", "planner imports torch"),
        ("import torch", "models", "models imports torch"),
        ("from torch import distributed", "nn", "nn imports torch.distributed"),
    ],
)
def test_a_planted_violation_is_caught(source: str, room: str, violation: str) -> None:
    assert violations(source, room, f"titan_lite.{room}") == [violation]


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("import torch\nfrom titan_lite.nn import norm", "parallel"),
        ("from titan_lite.config.load import f\nfrom . import schema", "config"),
        ("def f():\n    from titan_lite import train", "cli"),
        ("from titan_lite import __version__", "config"),
        ("import torchgen", "config"),
    ],
)
def test_what_the_rows_allow_is_not_a_violation(source: str, room: str) -> None:
    assert violations(source, room, f"titan_lite.{room}") == []


def import_graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Returns the imports between modules, including those in functions and for types."""
    return {
        name: files.keys()
        & set(imported_modules(path.read_text(encoding="utf-8"), name.rpartition(".")[0]))
        for name, path in files.items()
    }


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sources()}
    graph = import_graph(files)
    assert len(graph["titan_lite.cli"]) > 5
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' imports '.join(reversed(error.args[1]))}")


def test_imports_inside_functions_and_for_types_count(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from p.b import g")
    (tmp_path / "b.py").write_text("if TYPE_CHECKING:\n    from p import a")
    graph = import_graph({"p.a": tmp_path / "a.py", "p.b": tmp_path / "b.py"})
    assert graph == {"p.a": {"p.b"}, "p.b": {"p.a"}}


def test_no_file_is_a_drawer_for_everything() -> None:
    folders = [ROOT / name for name in ("titan_lite", "tests", "scripts", "benchmarks")]
    names = [
        path for folder in folders for path in folder.rglob("*") if "__pycache__" not in str(path)
    ]
    assert [str(path) for path in names if path.stem in FORBIDDEN_NAMES] == []


@pytest.mark.parametrize("room", [*TORCH_FREE, "cli"])
def test_a_torch_free_room_loads_without_torch(room: str) -> None:
    files = sorted((PACKAGE / room).glob("*.py")) if room != "cli" else [PACKAGE / "cli.py"]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    program = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_the_trainer_loads_without_the_compiler() -> None:
    """dynamo and inductor take as long to import as a third of torch."""
    program = (
        "import sys, titan_lite.train, titan_lite.training.open_run\n"
        "print({'torch._dynamo', 'torch._inductor'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


TORCH = ("torch", "torchao")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_names(source: str) -> set[str]:
    """Private names that the file itself defines: functions, classes, variables, attributes."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return set(filter(is_private, names))


def private_names(source: str, defined: set[str]) -> set[str]:
    """Private names of torch in a file: in imports, as attributes, as strings given to getattr.

    An attribute of a variable counts unless it is one of those `defined` in the package.
    """
    names: set[str] = set()
    modules: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{node.module or '.'}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                path = base + alias.name
                parts = path.split(".")
                modules[alias.asname or (alias.name if base else parts[0])] = path
                names |= {part for part in parts if parts[0] in TORCH and is_private(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            owner, name = node.args[0], str(node.args[1].value)
        else:
            continue
        if not is_private(name):
            continue
        while isinstance(owner, ast.Attribute):
            owner = owner.value
        root = owner.id if isinstance(owner, ast.Name) else ""
        package = modules.get(root, "").split(".")[0]
        if package in TORCH or (package in ("", "titan_lite") and name not in defined):
            names.add(name)
    return names


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._inductor.config as c", {"_inductor"}),
        ("from torch.utils._pytree import tree_leaves", {"_pytree"}),
        ("def f():\n    from torch.x import _y as z", {"_y"}),
        ("from torch.distributed import distributed_c10d as c\nc._world.pg_map", {"_world"}),
        ("import torch\ntorch.ops.aten._scaled_mm.default", {"_scaled_mm"}),
        ("import torch\ngetattr(torch.cuda, '_snapshot', None)", {"_snapshot"}),
        ("def f(stage):\n    stage._inference_mode = 1", {"_inference_mode"}),
        ("import os, sys\nos._exit(sys._getframe(1))", set()),
        ("def f(x):\n    x._ours = x.__dict__", set()),
    ],
)
def test_private_names_of_torch_are_seen(source: str, names: set[str]) -> None:
    assert private_names(source, {"_ours"}) == names


def test_each_private_name_of_torch_is_known_to_one_file() -> None:
    """A name that torch renames is then changed in one file only."""
    texts = {path: path.read_text(encoding="utf-8") for path in sources()}
    defined = set().union(*map(defined_names, texts.values()))
    files: dict[str, list[str]] = {}
    for path, text in texts.items():
        for name in private_names(text, defined):
            files.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert len(files) > 30
    assert {name: where for name, where in files.items() if len(where) > 1} == {}


WHOLE = {"Plan", "Config", "LoadedConfig"}
# Others get the sections and values that they read. Rules between sections are in config/ and
# models/, which see them all.
MAY_TAKE_THE_WHOLE = {
    "cli": {"_preflight", "_rendered", "_warn_of_missing_files"},
    "dryrun/summary": {"summarize_dry_run", "_facts"},
    "dryrun/run": {"dry_run", "dry_runs", "left_out", "_eager", "_quiet_dry_run"},
    "training/meta_model": {
        "check_model_and_device",
        "build_whole_model",
        "build_checked_model",
        "pipeline_stages",
        "count_flops",
        "check_device",
        "check_float8",
        "open_hf_weights",
    },
    "metrics/build_meter": {"build_meter"},
    "training/objective": {"__init__"},
    "parallel/parallel_model": {"build_parallel"},
    "training/preflight": {
        "preflight",
        "check_contents",
        "check_same_model",
        "lock_folders",
        "check_locks",
        "_check_export",
        "_locked_folders",
        "_warn_of_unused_keys",
    },
    "training/prediction": {"__init__"},
    "training/resuming": {"log_changes", "changed_settings"},
    "training/setup": {"build_training"},
    "training/inputs": {"ModelInputs"},
    "planner/predict": {"advice", "_changes", "fitting_settings"},
    "planner/read": {"read_job", "is_legal"},
    "planner/search": {"search", "candidates"},
    "tools/tokenize_data": {"write"},
    "training/export": {"export_hf"},
    "training/open_run": {"open_run", "_join", "_agree", "_load", "_log_run", "_write_run_file"},
    "training/run_data": {"__init__"},
    "training/step_monitor": {"__init__"},
    "training/tokenizer_checks": {"fitting_tokenizer"},
    "training/trainer": {"Trainer", "advise_on_memory"},
}


def takes_the_whole(source: str) -> set[str]:
    """Functions with a parameter, and dataclasses with a field, that is a whole plan or config."""
    takers = set()
    for node in ast.walk(ast.parse(source)):
        arguments: list[ast.arg | ast.AnnAssign] = []
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        elif isinstance(node, ast.ClassDef):
            arguments = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        for argument in arguments:
            types = ast.walk(argument.annotation) if argument.annotation else ()
            if WHOLE & {name.id for name in types if isinstance(name, ast.Name)}:
                takers.add(node.name)
    return takers


def test_a_parameter_that_is_a_whole_plan_is_seen() -> None:
    source = "def a(plan: Plan): ...\ndef b(*, c: Config | None): ...\ndef c(dims: Dims): ..."
    assert takes_the_whole(f"{source}\nclass D:\n    plan: Plan") == {"a", "b", "D"}


def test_only_these_functions_take_a_whole_plan_or_configuration() -> None:
    functions = {
        str(path.relative_to(PACKAGE).with_suffix("")): takes_the_whole(path.read_text())
        for path in sources()
        if room_of(path) not in ("config", "models")
    }
    assert {file: names for file, names in functions.items() if names} == MAY_TAKE_THE_WHOLE


# Lines of code of each room: neither blank, comment nor docstring. Raising one is a decision to
# explain in the commit message.
BUDGET = {
    "data": 3077,
    "parallel": 2068,
    "config": 2102,
    "training": 1903,
    "tools": 2080,
    "checkpoint": 1564,
    "models": 1837,
    "planner": 1292,
    "regression": 1199,
    "runtime": 1195,
    "nn": 905,
    "dryrun": 864,
    "metrics": 769,
    "optim": 712,
    "cli": 321,
    "launch": 310,
    "train": 141,
}
LAYOUT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count_code_lines(source: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_blank_lines_comments_and_docstrings_are_no_code() -> None:
    source = (
        '"""Doc,\n\nmore."""\n\n# comment\nx = (\n    1,  # one\n)\n\n\ndef f():\n    """Doc."""\n'
    )
    assert count_code_lines(source) == 4


def test_each_room_stays_within_its_budget() -> None:
    lines: Counter[str] = Counter()
    for path in sources():
        lines[room_of(path)] += count_code_lines(path.read_text())
    del lines["__init__"]
    assert lines.keys() == BUDGET.keys()
    assert {room: count for room, count in lines.items() if count > BUDGET[room]} == {}
