"""Every command in README and docs works as printed.

A block of commands is run here, with a small model and small files instead of a reader's own;
or it stands below a comment, <!-- not run: REASON -->, and its configurations are only checked.
So are README's table of commands and the examples in the help texts. Of commands in sentences, the
options are checked: a benchmark takes minutes of a quiet machine.
"""

import contextlib
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed import Workers
from tests.runs import TINY
from titan_lite import cli
from titan_lite.data.assets import bundled_asset
from titan_lite.models.plan import make_plan
from titan_lite.regression.golden import Case
from titan_lite.runtime.distributed import Process
from titan_lite.training.open_run import open_run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (.*?) -->\n)?^( *)```(\w*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL
)
PROGRAMS = ("./run_train.sh", "./run_tests.sh", "titan-lite", "sbatch", "pytest")
# A reader's own names: what stands for them here.
PLACEHOLDERS = {"CONFIG": "run.toml", "DIR": "outputs/checkpoint", "step-1000": "step-1"}
GPUS_PER_NODE = 8
SHORT = ("--training.steps=1", "--training.seq_len=64", "--metrics.peak_tflops=1.0")


@dataclass(frozen=True)
class Command:
    """A line of a block, in words; not_run: the reason, "" where it is run."""

    page: str
    variables: Mapping[str, str]
    words: tuple[str, ...]
    not_run: str

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands_of(page: str, text: str) -> list[Command]:
    actual = []
    for not_run, _, kind, body in BLOCK.findall(text):
        for line in body.replace("\\\n", " ").splitlines():
            if kind not in ("bash", "console", "") or (kind == "" and "[" in line):
                continue  # Another language, or a synopsis.
            words = (
                shlex.split(line, comments=True) if line[:1].isalnum() or line[:1] == "." else []
            )
            variables = {}
            while words and (match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
                variables[match[1]] = match[2]
                del words[0]
            if kind == "bash" or (words and words[0] in PROGRAMS):
                assert not words or words[0] in PROGRAMS, f"{page}: nothing here runs {line!r}"
                if words:
                    actual.append(Command(page, variables, tuple(words), not_run))
    return actual


COMMANDS = [
    command
    for page in PAGES
    for command in commands_of(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))
]


def test_there_are_commands_and_each_reason_says_something() -> None:
    assert len(COMMANDS) > 30
    assert all(len(command.not_run) > 10 for command in COMMANDS if command.not_run)
    assert sum(bool(command.not_run) for command in COMMANDS) == 3


@pytest.mark.parametrize(
    ("text", "words", "not_run"),
    [
        ("```bash\nNGPU=2 ./run_train.sh --a.b=1  # why\n```", ("./run_train.sh", "--a.b=1"), ""),
        ("```\ntitan-lite config \\\n  x.toml\n```", ("titan-lite", "config", "x.toml"), ""),
        ("<!-- not run: slow -->\n```bash\npytest x\n```", ("pytest", "x"), "slow"),
    ],
)
def test_commands_are_found_in_blocks(text: str, words: tuple[str, ...], not_run: str) -> None:
    (command,) = commands_of("page", text)
    assert (command.words, command.not_run) == (words, not_run)


def _train(folder: Path, config: str, *overrides: str) -> int:
    """Trains in every process of the group, from `folder`; returns the last step."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        plan = make_plan(config, overrides, Process.from_environment().world_size)
        trainer = open_run(plan)
        trainer.train()
        trainer.close()
        return trainer.state.step
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, workers: Mapping[int, Workers]) -> Path:
    """Creates the small files that a reader of the commands would have in the folder."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("assets", "train_configs", "scripts", "run_train.sh", "run_tests.sh", "tests"):
        (folder / name).symlink_to(ROOT / name)
    keys = [override.removeprefix("--") for override in (*TINY, *SHORT, "--data.num_streams=8")]
    # The last one of a key wins; words want quotes.
    values = {key: value for key, _, value in (text.partition("=") for text in keys)}
    values |= {"training.param_dtype": '"float32"', "training.local_batch_size": "4"}
    text = "".join(f"{key} = {value}\n" for key, value in values.items())
    for name in ("run.toml", "my.toml", "my_run.toml"):
        (folder / name).write_text(text)
    (folder / "my.toml").write_text(f'{text}data.dataset_path = "books/*.jsonl"\n')
    (folder / "books").mkdir()
    lines = [json.dumps({"text": f"Book {number}. {'Words. ' * 40}"}) for number in range(9)]
    (folder / "books/a.jsonl").write_text("\n".join(lines))
    (folder / "llama3").mkdir()
    shutil.copy(bundled_asset("tokenizer/tokenizer.model"), folder / "llama3")
    saving = ("--checkpoint.enable=true", "--checkpoint.last_save_hf=true")
    assert workers[1].run(_train, folder, "run.toml", *saving) == [1]
    shutil.copytree(folder / "outputs/checkpoint/hf", folder / "Llama-3.1-8B")
    for name in ("base", "change"):
        (folder / "outputs" / name).mkdir()
        for file in ("run.json", "metrics.jsonl"):
            shutil.copy(folder / "outputs" / file, folder / "outputs" / name)
    return folder


def _launched(command: Command) -> tuple[str, int, list[str]]:
    """Configuration, world size and overrides of run_train.sh, also under sbatch."""
    words = list(command.words)
    nodes = int(command.variables.get("NNODES", 1))
    if words[0] == "sbatch":
        nodes = int(words.pop(1).removeprefix("--nodes="))
        assert (ROOT / words.pop(1)).is_file()
    config = command.variables.get("CONFIG_FILE", "train_configs/debug.toml")
    if words[1:] and words[1].endswith(".toml"):
        config = words.pop(1)
    is_small = Path(config).name.startswith(("debug", "my"))
    per_node = int(command.variables.get("NGPU", 2 if is_small else GPUS_PER_NODE))
    return config, nodes * per_node, words[1:]


def _run(command: Command, folder: Path, workers: Mapping[int, Workers]) -> None:
    words = [PLACEHOLDERS.get(word, word) for word in command.words]
    words = [word.replace("step-1000", "step-1") for word in words]
    match words:
        case ["./run_tests.sh"]:
            assert os.access(ROOT / "run_tests.sh", os.X_OK)  # Runs this test.
        case ["./run_train.sh" | "sbatch", *_]:
            config, world_size, overrides = _launched(command)
            argv = ["config", config, "--quiet", "--world-size", str(world_size), "--", *overrides]
            assert cli.main(argv) == 0
            # tests/test_launcher.py runs the script itself.
            if overrides and world_size <= 4:
                # Not a folder in which an earlier command has saved a checkpoint.
                target = tempfile.mkdtemp(dir=folder)
                short = (*overrides, *SHORT, f"--job.dump_folder={target}")
                assert workers[world_size].run(_train, folder, config, *short)[0] == 1
        case ["titan-lite", "train", config, *overrides]:
            assert workers[1].run(_train, folder, config, *overrides) == [1]
        case ["titan-lite", "tokenize", *rest] if "--verify" not in rest:
            assert cli.main(["tokenize", *rest, "--processes", "1"]) == 0
        case ["titan-lite", *argv]:
            assert cli.main(argv) == 0
        case _:
            pytest.fail(f"no way to run {command}")


@pytest.mark.distributed
def test_every_command_of_the_pages_works(
    folder: Path,
    workers: Mapping[int, Workers],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    failed = {}
    for command in COMMANDS:
        if command.not_run:
            continue
        try:
            _run(command, folder, workers)
        # All that fail are named together.
        except (Exception, SystemExit) as error:
            failed[str(command)] = f"{error!r:.600} {capsys.readouterr().err}"
    assert failed == {}


GUIDES = sorted((ROOT / "docs/how_to").glob("*.md"))


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_ends_with_a_command_that_is_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (last,) = commands_of("page", text[text.rindex("```bash") :])
    assert text.endswith("\n```\n")
    assert last.not_run == ""


def test_the_index_lists_every_page() -> None:
    docs = ROOT / "docs"
    linked = set(re.findall(r"\]\((\w[\w/]*\.md)\)", (docs / "README.md").read_text()))
    pages = {str(page.relative_to(docs)) for page in docs.rglob("*.md")}
    assert linked == pages - {"README.md"}


def test_an_export_generates_text_as_its_guide_shows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    text = (ROOT / "docs/how_to/export_and_evaluate.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(program.replace("exported_model", "outputs/checkpoint/hf"), {})
    assert "Call me" in capsys.readouterr().out


def test_a_preset_on_another_number_of_nodes_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    line = "NNODES=4 RDZV_ENDPOINT=node0:29500 ./run_train.sh train_configs/llama3_70b.toml"
    (command,) = commands_of("page", f"```bash\n{line}\n```")
    with pytest.raises(AssertionError):
        _run(command, ROOT, {})
    assert "the world size (32)" in capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.not_run], ids=str)
def test_what_is_not_run_is_checked(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    match command.words:
        case ["titan-lite", "dryrun", config, *_]:
            assert cli.main(["config", config, "--quiet"]) == 0
        case ["titan-lite", "compare", _, _, *overrides]:
            for side in ([], [word for word in overrides if word.startswith("--b.")]):
                keys = [word for word in overrides if not word.startswith("--b.")]
                keys += [word.replace("--b.", "--") for word in side if "nproc" not in word]
                assert cli.main(["config", "--quiet", "--world-size=4", *keys]) == 0
        case ["pytest", path, option, page]:
            assert Path(path).is_file()
            assert Path(page).is_file()
            assert f'"{option}"' in Path("tests/conftest.py").read_text()
        case _:
            pytest.fail(f"no way to check {command}")


# README's table of commands: what stands for its names.
TABLE = {
    "train CONFIG": "train run.toml",
    "config CONFIG": "config run.toml",
    "dryrun CONFIG": "dryrun run.toml",
    "plan CONFIG": "plan run.toml",
    "plan search CONFIG": "plan search run.toml --world-size 2",
    "compare A B": "compare outputs/base outputs/change",
    "golden run CASE": "golden run case.toml",
    "golden accept CASE": "golden accept case.toml",
    "report RUN ... -o page.html": "report outputs/base outputs/change -o page.html",
    "tokenize CONFIG --output DIR": "tokenize run.toml --output tokens_of_table",
    "checkpoint ls DIR": "checkpoint ls outputs/checkpoint",
    "checkpoint verify DIR": "checkpoint verify outputs/checkpoint",
    "convert hf-to-dcp A B": "convert hf-to-dcp Llama-3.1-8B imported",
    "convert dcp-to-hf A B": "convert dcp-to-hf outputs/checkpoint/step-1 exported",
}


def commands_of_table(text: str) -> list[str]:
    """The commands of a table's first column, one for each of "a|b"."""
    commands = []
    for cell in re.findall(r"^\| `titan-lite (.*?)` \|", text, re.MULTILINE):
        choices = [word.split(r"\|") for word in cell.split()]
        commands += [" ".join(words) for words in itertools.product(*choices)]
    return commands


@pytest.mark.distributed
def test_the_commands_of_the_readmes_table_work(
    folder: Path,
    workers: Mapping[int, Workers],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    commands = commands_of_table((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(commands) == sorted(TABLE)
    monkeypatch.chdir(folder)
    (folder / "case.toml").write_text('config = "run.toml"\nnproc = 1\ntier = "layout"\nwhy = ""\n')
    failed = {}
    # A curve is accepted before it is compared.
    for command in sorted(commands, key=lambda command: command != "golden accept CASE"):
        words = ("titan-lite", *TABLE[command].split())
        try:
            _run(Command("README.md", {}, words, ""), folder, workers)
        except (Exception, SystemExit) as error:
            failed[command] = f"{error!r:.600} {capfd.readouterr().err}"
    assert failed == {}


HELPS = [
    *(["titan-lite", name, "--help"] for name in ("train", "config", "tokenize", "dryrun")),
    ["titan-lite", "plan", "--help"],
    *(
        ["titan-lite", "plan", form, "--help"]
        for form in ("search", "scaling", "calibrate", "recalibrate", "validate")
    ),
    *(["titan-lite", name, "--help"] for name in ("checkpoint", "compare", "golden", "report")),
    ["titan-lite", "convert", "--help"],
    *(["titan-lite", "convert", name, "--help"] for name in ("hf-to-dcp", "dcp-to-hf")),
    ["titan-lite", "--help"],
    ["./run_train.sh", "--help"],
]


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every help text, by its command."""
    texts = {}
    for words in HELPS:
        command = words if words[0] != "titan-lite" else [sys.executable, "-m", "titan_lite.cli"]
        command = [*command, *words[1:]] if words[0] == "titan-lite" else command
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        texts[" ".join(words[:-1])] = result.stdout
    return texts


def test_the_helps_of_all_commands_are_looked_at(helps: dict[str, str]) -> None:
    listed = re.findall(r"^  ([a-z]+) +\S", helps["titan-lite"].split("commands:")[1], re.MULTILINE)
    assert {words[1] for words in HELPS if len(words) > 2} == {*listed}


def examples_of(text: str) -> list[str]:
    """Indented lines that are a whole command, or overrides of one."""
    lines = re.findall(r"^  +((?:\./run_train\.sh|titan-lite|--[\w.]+=).*)$", text, re.MULTILINE)
    return [line for line in lines if "  " not in line]


def test_a_help_fits_on_a_screen_and_has_two_examples(helps: dict[str, str]) -> None:
    for command, text in helps.items():
        assert len(text.splitlines()) <= 40, command
        shown = [line for line in examples_of(text) if not line.startswith("--")]
        assert len(shown) == 2, command


def test_the_examples_of_the_helps_work(
    helps: dict[str, str],
    folder: Path,
    workers: Mapping[int, Workers],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    # The tests above run the commands of the pages and of README's table.
    are_run = {command.words for command in COMMANDS}
    are_run |= {("titan-lite", *words.split()) for words in TABLE.values()}
    for line in sorted({line for text in helps.values() for line in examples_of(text)}):
        (command,) = commands_of("help", f"```bash\n{line}\n```") if line[0] != "-" else (None,)
        if command is None:
            assert cli.main(["config", "--quiet", *shlex.split(line)]) == 0, line
        # tests/planner runs these: the one needs minutes, the other a run longer than its warm-up.
        elif command.words not in are_run and not {"calibrate", "recalibrate"} & {*command.words}:
            _run(command, folder, workers)


def test_the_case_in_the_help_of_golden_is_one(helps: dict[str, str], tmp_path: Path) -> None:
    lines = helps["titan-lite golden"].split("A case is a TOML file:\n")[1].splitlines()
    shutil.copy(ROOT / "train_configs/debug.toml", tmp_path)
    text = ""
    for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("  "))]:
        if table := re.match(r"  (\[\w+\]) .*?for example (.*)", line):
            text += "\n".join([table[1], *table[2].split(", "), ""])
        else:
            text += re.sub(r"  +.*", "", line.strip()) + "\n"
    (tmp_path / "case.toml").write_text(text)
    case = Case(tmp_path / "case.toml")
    assert case.file.overrides == {"training": {"steps": 20}}
    assert case.file.tolerance is not None


BENCHMARK = re.compile(r"`python -m\s+benchmarks\.([^`]+)`")


def test_benchmarks_inside_sentences_have_the_options_they_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [*PAGES, ROOT / "benchmarks/README.md"]
    commands = {text for page in pages for text in BENCHMARK.findall(page.read_text())}
    assert len(commands) > 10
    for command in sorted(commands):
        name, *words = shlex.split(command)
        places = [word for word in words if not word.startswith("-")][:1]
        monkeypatch.setattr(sys, "argv", [name, *places, "--help"])
        with contextlib.suppress(SystemExit):
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        text = capsys.readouterr().out
        assert text.startswith("usage: "), command
        for option in words:
            if option.startswith("--") and "." not in option:
                assert option.partition("=")[0] in text, command


def test_commands_inside_sentences_name_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[str, str] = {}
    for page in PAGES:
        for name, rest in re.findall(r"`titan-lite ([a-z]+)([^`]*)`", page.read_text()):
            if name not in helps:
                directions = ["hf-to-dcp", "dcp-to-hf"] if name == "convert" else [""]
                for direction in directions:
                    with contextlib.suppress(SystemExit):
                        cli.main([name, *filter(None, [direction]), "--help"])
                helps[name] = capsys.readouterr().out
            for option in re.findall(r"--[a-z-]+(?![\w.-])", rest):
                assert option in helps[name], f"{page.name}: titan-lite {name} {option}"
