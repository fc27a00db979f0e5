"""Golden curves: those of this repository still hold, and only `accept` changes one."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed import Workers
from tests.regression.folders import write_run
from tests.runs import slow_but
from titan_lite import cli
from titan_lite.models.plan import make_plan
from titan_lite.regression import commands
from titan_lite.regression.compare import compare
from titan_lite.regression.curves import CurveError, read_curve
from titan_lite.regression.golden import Case
from titan_lite.regression.run_training import run_training
from titan_lite.runtime.distributed import Process
from titan_lite.training.open_run import open_run

FOLDER = Path(__file__).parent.parent / "golden"
CASES = {path.stem: Case(path) for path in sorted(FOLDER.glob("*.toml"))}
ON_CPU = [name for name, case in CASES.items() if case.file.device == "cpu"]
QUICK = ("llama_one", "llama_tp2", "gpt_neox_dp2")
LOSS, NORM = [8.0, 7.5, 7.0], [0.5, 0.6, 0.7]


def train(case: Case, folder: Path) -> None:
    """In a process of a group, without a launcher's start."""
    overrides = ["--metrics.log_freq=1", "--metrics.enable_tensorboard=false", *case.overrides]
    plan = make_plan(
        case.config,
        [*overrides, f"--job.dump_folder={folder}"],
        Process.from_environment().world_size,
    )
    trainer = open_run(plan)
    try:
        trainer.train()
    finally:
        trainer.close()


@pytest.mark.distributed
@pytest.mark.parametrize("name", slow_but(QUICK, ON_CPU))
def test_the_golden_curve_holds(name: str, workers: dict[int, Workers], tmp_path: Path) -> None:
    case = CASES[name]
    workers[case.file.nproc].run(train, case, tmp_path)
    comparison = case.check(tmp_path)
    assert comparison.first_outside is None, f"{comparison.verdict()}\n{comparison.table()}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(CASES.keys() - set(ON_CPU)))
def test_the_golden_curve_of_this_kind_of_gpu_holds(
    name: str, gpu_workers: dict[int, Workers], tmp_path: Path
) -> None:
    case = CASES[name]
    if torch.cuda.device_count() < case.file.nproc:
        pytest.skip(f"needs {case.file.nproc} CUDA devices")
    if not case.golden(torch.cuda.get_device_name()).exists():
        pytest.skip(f"no golden curve of {torch.cuda.get_device_name()} was accepted yet")
    gpu_workers[case.file.nproc].run(train, case, tmp_path)
    comparison = case.check(tmp_path)
    assert comparison.first_outside is None, f"{comparison.verdict()}\n{comparison.table()}"


def test_goldens_of_one_precision_are_one_curve_whatever_the_layout() -> None:
    curves = [read_curve(CASES[name].golden("")) for name in ON_CPU if name.startswith("llama")]
    in_float32 = [curve for curve in curves if curve.dtype == "float32"]
    assert len(in_float32) > 3
    for a, b in itertools.pairwise(in_float32):
        assert compare(a, b, "layout").first_outside is None


def test_the_cases_hold_several_families_and_layouts() -> None:
    cases = [CASES[name].file for name in ON_CPU]
    families = {case.overrides.get("model", {}).get("name", "llama") for case in cases}
    assert families >= {"llama", "qwen3", "gpt_neox", "gpt", "internlm"}
    assert {case.nproc for case in cases} >= {1, 2}
    assert sum(case.overrides.get("parallel", {}).get("tp", 1) == 2 for case in cases) >= 2


def test_a_manifest_says_what_the_golden_was_made_with_and_how_far_it_holds() -> None:
    for name in ON_CPU:
        manifest = json.loads(CASES[name].golden("").read_text())["manifest"]
        assert manifest["versions"]["torch"]
        assert manifest["environment"]["cpu_capability"]
        assert manifest["dtype"] in ("float32", "bfloat16")
        assert manifest["tolerance"]["grad_norm"] > 0
        assert manifest["why"]
        assert "dump_folder" not in manifest["config"].get("job", {})


CASE = """
config = "run.toml"
nproc = 1
tier = "layout"
why = "a test"
[overrides]
training.steps = 3
training.param_dtype = "float32"
"""


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A case whose run is what stands in the folder `next`."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("[training]\nseq_len = 32\n")
    Path("case.toml").write_text(CASE)

    def run_training(config: Path, overrides: tuple[str, ...], *args: object, on_cpu: bool) -> None:
        assert overrides == ("--training.steps=3", '--training.param_dtype="float32"')
        assert on_cpu
        Path(f"trained-{config.stem}").touch()
        shutil.copytree("next", args[1])

    monkeypatch.setattr(commands, "run_training", run_training)
    write_run(Path("next"), LOSS, NORM)
    return Path("case.toml")


def change(loss: list[float], norm: list[float], *overrides: str) -> None:
    shutil.rmtree("next")
    write_run(Path("next"), loss, norm, *overrides)


def test_accept_writes_a_golden_that_run_holds_to(case: Path, capsys) -> None:
    assert cli.main(["golden", "run", "case.toml"]) == 2
    assert "no golden curve yet; titan-lite golden accept case.toml" in capsys.readouterr().err
    assert not list(Path().glob("trained-*")), "reported before it is trained"
    assert cli.main(["golden", "accept", "case.toml"]) == 0
    assert cli.main(["golden", "run", "case.toml"]) == 0
    assert "case.toml: within: 3 steps agree" in capsys.readouterr().out
    change(LOSS, [0.5, 0.6, 0.71])
    assert cli.main(["golden", "run", "case.toml"]) == 1
    assert "case.toml: OUTSIDE: grad_norm leaves the band" in capsys.readouterr().out


def test_a_case_may_allow_less_than_its_tier(case: Path, capsys) -> None:
    cli.main(["golden", "accept", "case.toml"])
    change(LOSS, [0.5, 0.6, 0.70001])
    assert cli.main(["golden", "run", "case.toml"]) == 0
    case.write_text(CASE + "[tolerance]\nloss = 1e-7\ngrad_norm = 1e-6\n")
    assert cli.main(["golden", "run", "case.toml"]) == 1
    assert "1.4e-05 apart where 1.0e-06 is allowed" in capsys.readouterr().out


def test_accept_prints_what_changes(case: Path, capsys) -> None:
    cli.main(["golden", "accept", "case.toml"])
    change(LOSS, [0.5, 0.6, 0.71])
    capsys.readouterr()
    assert cli.main(["golden", "accept", "case.toml"]) == 0
    out = capsys.readouterr().out
    assert "OUTSIDE: grad_norm leaves the band of tier layout at step 3: 0.7 and 0.71" in out
    assert out.endswith("case.golden.json: changed\n")
    assert cli.main(["golden", "run", "case.toml"]) == 0


def test_accept_takes_a_case_whose_data_changed_and_says_so(case: Path, capsys) -> None:
    cli.main(["golden", "accept", "case.toml"])
    change(LOSS, NORM, "--data.shuffle=false")
    assert cli.main(["golden", "run", "case.toml"]) == 2
    assert cli.main(["golden", "accept", "case.toml"]) == 0
    assert "data.shuffle is true and false" in capsys.readouterr().err
    assert cli.main(["golden", "run", "case.toml"]) == 0


def test_a_golden_edited_by_hand_is_refused(case: Path, capsys) -> None:
    cli.main(["golden", "accept", "case.toml"])
    golden = Path("case.golden.json")
    golden.write_text(golden.read_text().replace("7.5", "7.6"))
    assert cli.main(["golden", "run", "case.toml"]) == 2
    assert "only titan-lite golden accept" in capsys.readouterr().err


def test_a_golden_is_a_side_of_compare_and_a_diff_by_steps(case: Path) -> None:
    cli.main(["golden", "accept", "case.toml"])
    assert cli.main(["compare", "case.golden.json", "next", "--tier=bitwise"]) == 0
    lines = Path("case.golden.json").read_text().splitlines()
    assert sum('{"step": ' in line for line in lines) == 3


def test_a_case_without_its_device_is_skipped_and_cannot_be_accepted(case: Path, capsys) -> None:
    case.write_text('device = "cuda"\n' + CASE.replace("nproc = 1", "nproc = 99"))
    assert cli.main(["golden", "run", "case.toml"]) == 0
    assert "case.toml: skipped, it requires 99 CUDA devices, got" in capsys.readouterr().out
    assert cli.main(["golden", "accept", "case.toml"]) == 2


def test_each_kind_of_gpu_has_a_golden_of_its_own() -> None:
    assert CASES["llama_cuda"].golden("NVIDIA H200").name == "llama_cuda.nvidia-h200.golden.json"


def test_the_worst_of_several_cases_is_the_exit_code(case: Path) -> None:
    cli.main(["golden", "accept", "case.toml"])
    assert cli.main(["golden", "run", "nowhere.toml", "case.toml"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nproc = ", "not valid TOML"),
        ('config = "a"', "not a golden case: nproc: Field required; tier"),
        (CASE.replace('"layout"', '"loose"'), "tier: Input should be 'bitwise', 'layout' or"),
        ("nprocs = 1\n" + CASE, "nprocs: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_with_a_case_is_said(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "case.toml").write_text(text)
    with pytest.raises(CurveError, match=r"case\.toml: ") as caught:
        Case(tmp_path / "case.toml")
    assert message in str(caught.value)
    with pytest.raises(CurveError, match="cannot be read"):
        Case(tmp_path)
    with pytest.raises(CurveError, match="no such case; did you mean"):
        Case(tmp_path / "cases.toml")


def test_a_run_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing configuration ends the launcher with code 2; the module would end it with 1."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CurveError, match=r"absent\.toml ended with exit code 2"):
        run_training(Path("absent.toml"), [], 1, tmp_path / "run", on_cpu=True)


def test_a_case_that_is_not_utf8_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "case.toml").write_bytes(b'why = "\xff"')
    with pytest.raises(CurveError, match=r"case\.toml: not UTF-8 text"):
        Case(tmp_path / "case.toml")
