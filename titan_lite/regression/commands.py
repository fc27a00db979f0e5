"""The commands `titan-lite compare`, `golden` and `report`."""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan_lite.config.arguments import UsageError, command_parser
from titan_lite.config.stored import setting
from titan_lite.config.units import format_scaled
from titan_lite.models.plan import make_plan
from titan_lite.regression.compare import TIERS, Comparison, Tier, compare
from titan_lite.regression.curves import (
    Curve,
    CurveError,
    check_same_data,
    data_settings,
    differing_settings,
    read_curve,
    words,
)
from titan_lite.regression.golden import Case
from titan_lite.regression.plot import check_plot, plot
from titan_lite.regression.report import MAX_RUNS, read_run, report
from titan_lite.regression.run_training import run_training
from titan_lite.runtime.writing import writing

WITHIN, OUTSIDE, USAGE_ERROR = 0, 1, 2

COMPARE = """
A and B are run folders, golden files, or TOML files. TOML files are trained first. Their options:
  --section.key=value     overrides a key in both; --a.section.key=value in A, --b. ... in B
  --nproc=N               processes of each; --a.nproc=N of A, --b.nproc=N of B
                          (default: the product of the parallel degrees)
tiers:
  bitwise      every digit is the same
  layout       each step within a relative tolerance, which depends on the precision (default)
  statistical  the smoothed curves differ by no more than their noise explains
exit code: 0 within the tolerance, 1 outside it, 2 for a usage error
"""

GOLDEN = """
A case is a TOML file:
  config = "debug.toml"   TOML file to train, relative to the case
  nproc = 2               processes
  device = "cpu"          or "cuda", with a golden curve for each kind of device
  tier = "layout"         tier of titan-lite compare
  why = "..."             reason why the tolerance is not stricter
  [tolerance]             replaces the tier's, for example loss = 1e-6, grad_norm = 1e-5
  [overrides]             keys to override, for example training.steps = 20
Its golden curve is next to it, as NAME.golden.json.
exit code: 0 within the tolerance (or skipped, because a case needs more GPUs than there are),
  1 outside it, 2 for a usage error
"""


@dataclass(frozen=True)
class _Side:
    """One of the two things compared."""

    path: Path
    overrides: tuple[str, ...]
    nproc: int | None

    @property
    def is_config(self) -> bool:
        return self.path.suffix == ".toml"

    def planned(self) -> "_Planned":
        """Resolves the configuration; raises ConfigError if it cannot run."""
        plan = make_plan(self.path, self.overrides, self.nproc or None)
        data = data_settings(plan.config.model_dump(), asdict(plan.dims))
        return _Planned(self, plan.dims.world_size, data, plan.config.training.steps)


@dataclass(frozen=True)
class _Planned:
    """A run that is not trained yet."""

    side: _Side
    nproc: int
    data: Mapping[str, Any]
    last_step: int

    def train(self, folder: Path, defaults: Sequence[str]) -> Curve:
        """Trains into a folder, and reads the curve.

        defaults: overrides, which the side's own overrides replace.
        """
        run_training(self.side.path, [*defaults, *self.side.overrides], self.nproc, folder)
        return read_curve(folder)


def compare_command(argv: Sequence[str]) -> int:
    """Runs `titan-lite compare`; returns its exit code."""
    parser = command_parser(
        "compare",
        "Compares loss, gradient norm, learning rate and tokens of two runs at every "
        "step that they logged.",
        "titan-lite compare outputs/base outputs/change --tier layout",
        "titan-lite compare outputs/base outputs/change --tier bitwise --json comparison.json "
        "--plot comparison.png",
        notes=COMPARE,
        usage="%(prog)s A B [--tier TIER] [--json FILE] [--plot FILE] [--keep FOLDER] "
        "[--[a.|b.]nproc=N] [--[a.|b.]section.key=value ...]",
    )
    parser.add_argument("--tier", choices=TIERS, default="layout", help="how close they must be")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw curves, difference and band (a PNG)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the runs of TOML files there, as a and b"
    )
    options, rest = parser.parse_known_args(argv)
    try:
        sides = _sides(rest)
        _check_output("--json", options.json)
        _check_output("--plot", options.plot)
        if options.plot:
            check_plot(options.plot)
        a, b = _curves(sides, options.keep, options.tier)
        comparison = compare(a, b, options.tier)
    except CurveError as error:
        print(f"titan-lite compare: {error}", file=sys.stderr)
        return USAGE_ERROR
    if options.json:
        with writing(options.json):
            options.json.write_text(json.dumps(comparison.report(), indent=2) + "\n")
    if options.plot:
        with writing(options.plot):
            plot(comparison, options.plot)
    show(comparison)
    return OUTSIDE if comparison.first_outside else WITHIN


def show(comparison: Comparison) -> None:
    """Prints the verdict, the table, and the settings that differ."""
    print(comparison.verdict())
    print(comparison.table())
    for key, (a, b) in differing_settings(comparison.a, comparison.b).items():
        print(f"{key}: {words(a)} and {words(b)}")


def _sides(rest: Sequence[str]) -> tuple[_Side, _Side]:
    paths = [Path(argument) for argument in rest if not argument.startswith("-")]
    if len(paths) != 2:
        names = f": {', '.join(map(str, paths))}" if paths else ""
        hint = "; write options as --name=value" if len(paths) > 2 else ""
        raise CurveError(f"expected two runs to compare, got {len(paths)}{names}{hint}")
    given: tuple[list[str], list[str]] = ([], [])
    for argument in rest:
        if "job.dump_folder=" in argument:
            raise CurveError(f"{argument} cannot be set; use --keep FOLDER to keep the runs")
        if argument.startswith("-"):
            # "--a." or "--b." is for one side, anything else for both.
            side = {"--a.": 0, "--b.": 1}.get(argument[:4])
            meant = (0, 1) if side is None else (side,)
            if not any(paths[index].suffix == ".toml" for index in meant):
                names = " nor ".join(str(paths[index]) for index in meant)
                is_not = f"{names} is not" if len(meant) == 1 else f"neither {names} is"
                raise CurveError(f"{argument} requires a TOML configuration: {is_not} one")
            for index in meant:
                given[index].append(argument if side is None else f"--{argument[4:]}")
    return _side(paths[0], given[0]), _side(paths[1], given[1])


def _side(path: Path, arguments: Sequence[str]) -> _Side:
    overrides = [a for a in arguments if not a.startswith("--nproc=")]
    sizes = [a.removeprefix("--nproc=") for a in arguments if a.startswith("--nproc=")]
    if not sizes:
        return _Side(path, tuple(overrides), None)
    if not (sizes[-1].isdecimal() and int(sizes[-1])):
        raise UsageError(f"--nproc: expected a number of processes, got {sizes[-1]!r}")
    return _Side(path, tuple(overrides), int(sizes[-1]))


def _curves(sides: tuple[_Side, _Side], keep: Path | None, tier: Tier) -> list[Curve]:
    """Reads the existing curves, then trains the others; errors are reported before any run."""
    if keep and not any(side.is_config for side in sides):
        raise CurveError("--keep requires a TOML configuration to train: neither run is one")
    curves = [side.planned() if side.is_config else read_curve(side.path) for side in sides]
    check_same_data(*(one.data for one in curves), other_seeds=tier == "statistical")
    existing = [one for one in curves if isinstance(one, Curve)]
    if len(existing) < 2 and curves[0].last_step != curves[1].last_step:
        ends = " and ".join(
            f"{s.path} at {f.last_step}" for s, f in zip(sides, curves, strict=True)
        )
        raise CurveError(f"the runs would end at different steps: {ends}")
    # Log as often as the existing run.
    frequencies = [setting(curve.facts["config"], "metrics.log_freq") for curve in existing]
    defaults = [f"--metrics.log_freq={frequency}" for frequency in frequencies]
    with tempfile.TemporaryDirectory(prefix="titan-lite-") as temporary:
        folders = [(keep or Path(temporary)) / name for name in "ab"]
        for folder, one in zip(folders, curves, strict=True):
            if isinstance(one, _Planned) and folder.exists():
                raise CurveError(f"--keep: {folder} exists already")
        return [
            one if isinstance(one, Curve) else one.train(folder, defaults)
            for folder, one in zip(folders, curves, strict=True)
        ]


def _check_output(option: str, path: Path | None) -> None:
    """Raises CurveError if an output file cannot be written; called before any run."""
    if path is None:
        return
    if path.is_dir():
        raise CurveError(f"{option}: {path} is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CurveError(f"{option}: {path.parent} is not a writable folder")


def golden_command(argv: Sequence[str]) -> int:
    """Runs `titan-lite golden`; returns its exit code, the worst of its cases."""
    parser = command_parser(
        "golden",
        "Trains each case. run: compares its curve with the golden curve. "
        "accept: replaces the golden curve.",
        "titan-lite golden run case.toml",
        "titan-lite golden accept case.toml",
        notes=GOLDEN,
    )
    parser.add_argument("action", choices=("run", "accept"))
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE", help="a case's TOML file")
    options = parser.parse_args(argv)
    codes = []
    for path in options.cases:
        try:
            codes.append(_golden(Case(path), options.action))
        except CurveError as error:
            print(f"titan-lite golden: {error}", file=sys.stderr)
            codes.append(USAGE_ERROR)
    return max(codes)


def _golden(case: Case, action: str) -> int:
    file = case.file
    if file.device == "cuda" and (reason := _missing_devices(file.nproc)):
        if action == "accept":
            raise CurveError(f"{case.path}: {reason}")
        print(f"{case.path}: skipped, {reason}")
        return WITHIN
    if action == "run" and file.device == "cpu":
        case.accepted("")
    _Side(case.config, case.overrides, file.nproc).planned()
    with tempfile.TemporaryDirectory(prefix="titan-lite-") as temporary:
        folder = Path(temporary) / case.path.stem
        run_training(case.config, case.overrides, file.nproc, folder, on_cpu=file.device == "cpu")
        if action == "accept":
            golden, changed = case.accept(folder)
            if changed is not None:
                show(changed)
            print(f"{golden}: {'changed' if changed and changed.first_outside else 'written'}")
            return WITHIN
        comparison = case.check(folder)
    print(f"{case.path}: ", end="")
    show(comparison)
    return OUTSIDE if comparison.first_outside else WITHIN


def _missing_devices(needed: int) -> str:
    import torch

    available = torch.cuda.device_count()
    return f"it requires {needed} CUDA devices, got {available}" if available < needed else ""


def report_command(argv: Sequence[str]) -> int:
    """Runs `titan-lite report`; returns its exit code."""
    parser = command_parser(
        "report",
        "Writes one self-contained HTML page about one or several runs: curves, "
        "speeds, memory, stalls, settings, applied features, the environment.",
        "titan-lite report outputs/base outputs/change -o page.html",
        "titan-lite report outputs/base",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="file to write (default: report.html)",
    )
    options = parser.parse_args(argv)
    if len(options.runs) > MAX_RUNS:
        parser.error(f"at most {MAX_RUNS} runs fit on one page, got {len(options.runs)}")
    try:
        _check_output("--output", options.output)
        page = report([read_run(folder) for folder in options.runs])
    except CurveError as error:
        print(f"titan-lite report: {error}", file=sys.stderr)
        return USAGE_ERROR
    with writing(options.output):
        options.output.write_text(page, encoding="utf-8")
    print(f"{options.output}: {format_scaled(options.output.stat().st_size, 'B')}")
    return WITHIN
