"""titan-lite compare, from the arguments to the exit code, on run folders made for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.regression.folders import facts, segments, write_run
from titan_lite import cli
from titan_lite.regression import commands
from titan_lite.regression.curves import CurveError, read_curve

LOSS = [8.0, 7.5, 7.0, 6.5, 6.25]
NORM = [0.5, 0.6, 0.7, 0.6, 0.5]
FILE = "metrics.jsonl"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    write_run(Path("a"), LOSS, NORM)


def changed(values: list, step: int, value: float | str) -> list:
    return [value if index == step else old for index, old in enumerate(values, start=1)]


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = cli.main(["compare", *argv])
    captured = capsys.readouterr()
    return code, (captured.out + captured.err).splitlines()


def test_equal_runs_are_within_the_bitwise_tier(capsys) -> None:
    write_run(Path("b"), LOSS, NORM, "--training.gc_freq=7")
    code, lines = run("a", "b", "--tier=bitwise", capsys=capsys)
    assert code == 0
    assert lines[0] == "within: 5 steps agree, tier bitwise (every digit)"
    # Other differences are reported.
    assert lines[-1] == "training.gc_freq: 50 and 7"


def test_one_digit_is_outside_bitwise_and_within_layout(capsys) -> None:
    write_run(Path("b"), changed(LOSS, 4, 6.500001), NORM)
    code, lines = run("a", "b", "--tier=bitwise", capsys=capsys)
    assert code == 1
    assert lines[0] == (
        "OUTSIDE: loss leaves the band of tier bitwise at step 4: 6.5 and 6.500001, 1.5e-07 apart "
        "where 0 is allowed"
    )
    code, lines = run("a", "b", capsys=capsys)
    assert code == 0
    assert lines[0].startswith("within: 5 steps agree, tier layout (float32: loss 1e-05")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_layout_tier_allows_what_it_states_for_the_precision(dtype: str, capsys) -> None:
    override = f"--training.param_dtype={dtype}"
    write_run(Path("x"), LOSS, NORM, override)
    write_run(Path("y"), changed(LOSS, 3, 7.0 * 1.001), NORM, override)
    code, lines = run("x", "y", capsys=capsys)
    assert code == (1 if dtype == "float32" else 0)
    loss = lines[2].split()
    assert loss[:4] == [
        "loss",
        "1.0e-03",
        "3",
        {"float32": "1.0e-05", "bfloat16": "1.0e-02"}[dtype],
    ]


def test_the_gradient_norm_alone_is_enough(capsys) -> None:
    write_run(Path("b"), LOSS, [2 * norm for norm in NORM])
    code, lines = run("a", "b", capsys=capsys)
    assert code == 1
    assert "grad_norm leaves the band of tier layout at step 1: 0.5 and 1" in lines[0]
    assert lines[3].split() == ["grad_norm", "1.0e+00", "1", "1.0e-04", "step", "1"]


def test_a_loss_that_is_not_finite_is_outside_unless_every_digit_agrees(capsys) -> None:
    for name in ("x", "y"):
        write_run(Path(name), changed(LOSS, 5, "nan"), NORM)
    assert run("x", "y", "--tier=bitwise", capsys=capsys)[0] == 0
    code, lines = run("x", "y", "--json=found.json", capsys=capsys)
    assert code == 1
    assert "at step 5: nan and nan, nan apart" in lines[0]
    actual = json.loads(Path("found.json").read_text())
    assert actual["quantities"]["loss"]["largest_deviation"] == "nan"
    assert run("a", "x", "--tier=bitwise", capsys=capsys)[0] == 1


def test_a_step_that_float16_skipped_in_both_runs_is_no_difference(capsys) -> None:
    override = "--training.param_dtype=float16"
    for name, norm in (("x", "inf"), ("y", "nan"), ("z", 0.5)):
        write_run(Path(name), LOSS, changed(NORM, 1, norm), override)
    assert run("x", "y", capsys=capsys)[0] == 0
    code, lines = run("x", "z", capsys=capsys)
    assert code == 1
    assert "grad_norm leaves the band of tier layout at step 1: inf and 0.5" in lines[0]


def test_json_holds_what_was_found(capsys) -> None:
    write_run(Path("b"), LOSS, changed(NORM, 2, 0.61), "--training.gc_freq=7")
    run("a", "b", "--json=found.json", capsys=capsys)
    actual = json.loads(Path("found.json").read_text())
    norm = actual["quantities"].pop("grad_norm")
    assert norm.pop("largest_deviation") == pytest.approx(0.01 / 0.6)
    assert norm == {
        "at_step": 2,
        "allowed_there": 1e-4,
        "steps_outside": 1,
        "first_step_outside": 2,
    }
    assert actual["quantities"].keys() == {"loss", "lr", "tokens"}
    assert {key: actual[key] for key in actual if key != "quantities"} == {
        "verdict": "outside",
        "tier": "layout",
        "a": "a",
        "b": "b",
        "dtypes": ["float32", "float32"],
        "steps": 5,
        "first_step": 1,
        "last_step": 5,
        "first_outside": {"quantity": "grad_norm", "step": 2},
        "different_settings": {"training.gc_freq": [50, 7]},
    }


def test_the_picture_needs_the_extra_and_says_so(monkeypatch, capsys) -> None:
    # Both: another test may have imported the latter, which is then found without the former.
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    code, lines = run("a", "a", "--plot=curves.png", capsys=capsys)
    assert code == 2
    assert "pip install matplotlib" in lines[0]


def test_a_picture_of_no_kind_is_a_mistake(capsys) -> None:
    pytest.importorskip("matplotlib")
    code, lines = run("a", "a", "--plot=curves.xyz", capsys=capsys)
    assert code == 2
    assert "curves.xyz: matplotlib does not support this format; use .png" in lines[0]


def test_the_picture_is_a_png(capsys) -> None:
    pytest.importorskip("matplotlib")
    write_run(Path("b"), LOSS, changed(NORM, 2, 0.61))
    assert run("a", "b", "--plot=curves.png", capsys=capsys)[0] == 1
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")


def test_other_data_is_a_mistake_that_names_the_keys(capsys) -> None:
    write_run(Path("b"), LOSS, NORM, "--data.shuffle=false", "--training.local_batch_size=2")
    code, lines = run("a", "b", capsys=capsys)
    assert code == 2
    assert lines == [
        "titan-lite compare: the runs saw different data: data.shuffle is true and false; "
        "training.global_batch_size is 1 and 2"
    ]


def test_the_same_global_batch_in_another_layout_is_the_same_data(capsys) -> None:
    mesh = dict.fromkeys(("pp", "cp", "tp", "dp_shard"), 1) | {"dp_replicate": 2}
    write_run(Path("x"), LOSS, NORM, "--training.local_batch_size=2")
    write_run(Path("y"), LOSS, NORM, mesh=mesh)
    assert run("x", "y", capsys=capsys)[0] == 0


def test_settings_that_a_resume_changed_are_compared_part_by_part(capsys) -> None:
    for key, name in (("training.global_batch_size", "b"), ("optimizer.lr", "c")):
        parts = segments((0, f"--{key}=4"), (3, f"--{key}=8"))
        write_run(Path(name), LOSS, NORM, f"--{key}=8", segments=parts)
        write_run(Path(f"{name}{name}"), LOSS, NORM, f"--{key}=8")
    code, lines = run("b", "bb", capsys=capsys)
    assert code == 2
    assert "training.global_batch_size is 4, then 8 from step 4 and 8" in lines[0]
    assert run("b", "b", capsys=capsys)[0] == 0
    code, lines = run("c", "cc", "--json=found.json", capsys=capsys)
    assert (code, lines[-1]) == (0, "optimizer.lr: 4.0, then 8.0 from step 4 and 8.0")
    actual = json.loads(Path("found.json").read_text())["different_settings"]
    assert actual == {"optimizer.lr": ["4.0, then 8.0 from step 4", 8.0]}
    Path("c/run.json").write_text(json.dumps(facts(segments=[{"config": {}}])))
    assert "c/run.json: a segment has no config and mesh" in run("c", "c", capsys=capsys)[1][0]


def test_the_coarsest_part_of_a_resumed_run_decides_about_its_precision() -> None:
    key = "--training.param_dtype"
    parts = segments((0, f"{key}=bfloat16"), (3, f"{key}=float32"))
    assert read_curve(write_run(Path("b"), LOSS, NORM, segments=parts)).dtype == "bfloat16"


def test_a_file_of_the_same_name_in_another_folder_is_the_same_data(capsys) -> None:
    for name, path in (("x", "/data/text.jsonl"), ("y", "/mnt/text.jsonl"), ("z", "/mnt/b.jsonl")):
        write_run(Path(name), LOSS, NORM, f"--data.dataset_path={path}")
    assert run("x", "y", capsys=capsys)[0] == 0
    assert run("y", "z", capsys=capsys)[0] == 2


def test_an_older_run_without_a_key_of_today_had_its_default(capsys) -> None:
    old = facts()["config"]
    del old["data"]["shuffle_buffer"]
    write_run(Path("b"), LOSS, NORM, config=old)
    assert run("a", "b", capsys=capsys)[0] == 0


def test_only_the_statistical_tier_compares_seeds_and_precisions(capsys) -> None:
    write_run(Path("b"), LOSS, NORM, "--training.seed=1")
    code, lines = run("a", "b", capsys=capsys)
    assert code == 2
    assert (
        "training.seed is 0 and 1; --tier statistical compares runs of different seeds" in lines[0]
    )
    write_run(Path("c"), LOSS, NORM, "--training.param_dtype=bfloat16")
    code, lines = run("a", "c", capsys=capsys)
    assert code == 2
    assert "compute in float32 and bfloat16: --tier statistical" in lines[0]
    code, lines = run("a", "c", "--tier=statistical", capsys=capsys)
    assert code == 2
    assert "at least 100 logged steps, and these are 5" in lines[0]


def test_the_statistical_tier_compares_smoothed_curves_and_every_learning_rate(capsys) -> None:
    seeds = json.loads((Path(__file__).parent / "seeds.json").read_text())
    for seed in (0, 1):
        values = [seeds[name][seed] for name in ("loss", "grad_norm")]
        write_run(Path(f"seed{seed}"), *values, f"--training.seed={seed}")
    code, lines = run("seed0", "seed1", "--tier=statistical", capsys=capsys)
    assert code == 0
    assert lines[0] == "within: 300 steps agree, tier statistical (false alarms: 1%)"
    records = [json.loads(line) for line in Path("seed1/metrics.jsonl").read_text().splitlines()]
    records[9]["lr"] *= 1.001
    records[250]["loss"] = "inf"
    Path("seed1/metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    code, lines = run("seed0", "seed1", "--tier=statistical", capsys=capsys)
    assert code == 1
    assert "lr leaves the band of tier statistical at step 10" in lines[0]
    assert lines[2].split()[-2:] == ["step", "251"]


def test_float8_or_a_coarse_reduction_has_a_precision_of_its_own() -> None:
    for name, override in (
        ("float8", "--float8.recipe=rowwise"),
        ("bfloat16", "--training.reduce_dtype=bfloat16"),
    ):
        assert read_curve(write_run(Path(name), LOSS, NORM, override)).dtype == name


def spoil_loss(value: object) -> None:
    record = {"step": 1, "loss": value, "grad_norm": 1, "lr": 1, "tokens": 1}
    Path("b/metrics.jsonl").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: Path("b/run.json").unlink(), "b: not a run folder, it has no run.json"),
        (lambda: Path("b/run.json").write_text("{"), "b/run.json is not JSON"),
        (lambda: Path("b/run.json").write_text("{}"), "b/run.json has no config and mesh"),
        (lambda: Path("b/run.json").write_text("[]"), "b/run.json has no config and mesh"),
        (
            lambda: Path("b/run.json").write_text('{"config": {"data": 1}, "mesh": {}}'),
            "b/run.json has no config and mesh",
        ),
        (lambda: Path("b/metrics.jsonl").write_text("[1]"), "line 1 is not a record of a step"),
        (lambda: Path("b/metrics.jsonl").write_bytes(b"\xff"), "b/metrics.jsonl: not UTF-8 text"),
        (lambda: spoil_loss(None), "b: loss of step 1 is not a number: None"),
        (lambda: spoil_loss("high"), "b: loss of step 1 is not a number: 'high'"),
        (lambda: Path("b/metrics.jsonl").write_text(""), "b: no step was logged"),
        (
            lambda: Path("b/metrics.jsonl").write_text('{"step": 1, "loss": 8, "lr": 1}'),
            "b: no grad_norm in the record of step 1",
        ),
        (
            lambda: Path("b/metrics.jsonl").write_text('{"step": 1, "lo'),
            "b/metrics.jsonl: line 1 is not JSON",
        ),
        (
            lambda: Path("b/metrics.jsonl").write_text(2 * Path("a/metrics.jsonl").read_text()),
            "b: steps must increase, but step 1 follows step 5",
        ),
        (
            lambda: write_run(Path("c"), LOSS[:3]).rename("d").joinpath(FILE).replace("b/" + FILE),
            "different steps: a 5 from 1 to 5 (metrics.log_freq 1), b 3 from 1 to 3",
        ),
    ],
)
def test_a_run_that_cannot_be_compared_is_a_mistake(spoil, message: str, capsys) -> None:
    write_run(Path("b"), LOSS, NORM)
    spoil()
    code, lines = run("a", "b", capsys=capsys)
    assert code == 2
    assert message in lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("a",), "expected two runs to compare, got 1: a"),
        (("a", "aa"), 'aa: no such run folder or golden file; did you mean "a"?'),
        (("a", "a/metrics.jsonl"), "a/metrics.jsonl: neither a golden file nor a run folder"),
        (
            ("a", "a", "--training.steps=3"),
            "--training.steps=3 requires a TOML configuration: neither a nor a is one",
        ),
        (
            ("run.toml", "a", "--b.nproc=2"),
            "--b.nproc=2 requires a TOML configuration: a is not one",
        ),
        (("run.toml", "a", "--nproc=none"), "expected a number of processes, got 'none'"),
        (("run.toml", "a", "--training.stebs=3"), "did you mean"),
        (("run.toml", "a", "--nproc=3", "--parallel.tp=2"), "the world size (3) must be"),
        (("run.toml", "a", "--keep=."), "--keep: a exists already"),
        (("a", "a", "--keep=k"), "--keep requires a TOML configuration to train: neither"),
        (("a", "run.toml", "--nproc", "2"), "a, run.toml, 2; write options as --name=value"),
        (
            ("a", "run.toml", "--b.job.dump_folder=x"),
            "--b.job.dump_folder=x cannot be set; use --keep",
        ),
        (("a", "run.toml", "--b.training.steps=7"), "steps: a at 5 and run.toml at 7"),
        (("a", "run.toml", "--b.data.shuffle=false"), "data.shuffle is true and false"),
        (("a", "run.toml", "--json=no/found.json"), "--json: no is not a writable folder"),
        (("a", "run.toml", "--json=."), "--json: . is a folder"),
    ],
)
def test_a_mistake_on_the_command_line_is_answered_before_any_run(
    argv: tuple[str, ...], message: str, capsys, monkeypatch
) -> None:
    Path("run.toml").write_text("[training]\nsteps = 5\n")
    monkeypatch.setattr(commands, "run_training", lambda *_: pytest.fail("a run was started"))
    code, lines = run(*argv, capsys=capsys)
    assert code == 2
    assert message in "\n".join(lines)


def test_two_long_runs_are_compared_without_torch() -> None:
    loss = [6 + 1 / step for step in range(1, 10_001)]
    for name in ("x", "y"):
        write_run(Path(name), loss)
    program = (
        "import sys; from titan_lite import cli\n"
        "code = cli.main(['compare', 'x', 'y', '--tier', 'statistical', '--json', 'found.json'])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.distributed
def test_a_toml_file_is_trained_on_the_spot_in_processes_of_its_own(capfd) -> None:
    golden = Path(__file__).parent.parent / "golden"
    argv = (
        str(golden / "llama_one.golden.json"),
        str(golden / "configs" / "llama.toml"),
        "--b.nproc=2",
        "--b.training.local_batch_size=4",
        "--keep=runs",
    )
    code, lines = run(*argv, capsys=capfd)
    assert code == 0
    assert lines[0].startswith("within: 20 steps agree, tier layout")
    assert "training.local_batch_size: 8 and 4" in lines
    # The run's own output is shown.
    assert any("step 20/20" in line for line in lines)
    assert json.loads(Path("runs/b/run.json").read_text())["mesh"]["dp_shard"] == 2


def test_what_is_trained_on_the_spot_logs_as_often_as_the_run_that_is_there(
    monkeypatch, capsys
) -> None:
    every_second = "--metrics.log_freq=2"
    write_run(Path("x"), LOSS, NORM, every_second)
    Path("run.toml").write_text("[training]\nsteps = 5\nparam_dtype = 'float32'\n")

    def run_training(config: Path, overrides: list[str], nproc: int, folder: Path) -> None:
        assert overrides == [every_second, "--training.gc_freq=7"]
        write_run(folder, LOSS, NORM, *overrides)

    monkeypatch.setattr(commands, "run_training", run_training)
    assert run("x", "run.toml", "--b.training.gc_freq=7", capsys=capsys)[0] == 0


def test_a_run_that_fails_is_a_mistake_and_the_run_says_why(capfd) -> None:
    Path("empty.jsonl").touch()
    Path("run.toml").write_text("[training]\nsteps = 5\n")
    argv = ["compare", "run.toml", "run.toml", "--data.dataset_path=empty.jsonl"]
    assert cli.main(argv) == 2
    error = capfd.readouterr().err
    assert "the run of run.toml ended with exit code" in error
    assert "data.dataset_path" in error


def test_mistakes_are_values_to_catch() -> None:
    with pytest.raises(CurveError, match="no such run folder"):
        read_curve(Path("nowhere/at/all"))
