"""The measuring machinery of benchmarks/, on runs of a tiny model."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    activation_checkpoint,
    attention,
    bare_loop,
    beside_torchtitan,
    ceilings,
    families,
    features,
    first_gpu,
    h200,
    idle,
    measure,
    moe,
    optimizer,
    step,
    torchtitan_side,
    trainer_overhead,
)
from benchmarks.bare_loop import OURS, THEIRS
from benchmarks.manifest import RESULTS
from benchmarks.workers import BenchmarkError, Group
from tests.distributed import GUARD
from tests.runs import TINY
from titan_lite.models.plan import make_plan
from titan_lite.models.registry import families as registered_families
from titan_lite.planner.counts import num_inactive_params, num_params
from titan_lite.training.tokenizer_checks import fitting_tokenizer

ROOT = Path(__file__).parent.parent
DEBUG = "train_configs/debug.toml"
# Keys that a benchmark sets itself, and a batch that is only valid for one process.
LEFT_OUT = ("--training.steps=", "--metrics.", "--training.global_batch_size=")
TINY_MODEL = [override for override in TINY if not override.startswith(LEFT_OUT)]
TINY_MODEL.append("--metrics.peak_tflops=1.0")
SHORT = ["--warmup=2", "--rounds=2", "--steps=1"]


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda file: file.stem)
def test_every_benchmark_has_a_help(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if 'if __name__ == "__main__":' not in file.read_text():
        return
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"benchmarks.{file.stem}").main(["--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks.{file.stem} [-h]")


def results_of(benchmark: Any, output: Path, *arguments: str) -> list[dict[str, Any]]:
    assert benchmark.main([*arguments, *SHORT, f"--output={output}", *TINY_MODEL]) == 0
    stored = json.loads(output.read_text())
    assert {"command", "device", "cores", "torch", "git_commit"} <= stored["manifest"].keys()
    results: list[dict[str, Any]] = stored["results"]
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("nproc", "setting", "applied"),
    [
        (1, "--b.activation_checkpoint.mode=full", {"checkpointed": 2}),
        (2, "--b.parallel.reshard_after_forward=never", {"FSDP module": 6}),
    ],
)
def test_two_sides_take_turns_and_are_compared_round_by_round(
    nproc: int, setting: str, applied: dict[str, int], tmp_path: Path
) -> None:
    output = tmp_path / "step.json"
    a, b = results_of(step, output, DEBUG, "--vs", DEBUG, setting, f"--nproc={nproc}", "--profile")
    own = setting.replace("--b.", "--")
    assert own in b["with"]
    assert own not in a["with"]
    assert b["applied"]["modules"].items() >= applied.items()
    for side in (a, b):
        assert side["processes"] == nproc
        low, high = side["seconds_per_step"]["range"]
        assert 0 < low <= side["seconds_per_step"]["median"] <= high
        # Two turns, and 8 samples of 64 tokens a step for each rank.
        assert side["wps"] == pytest.approx(512 * (1 / low + 1 / high) / 2, rel=0.01)
        assert side["mfu"] > 0
        assert side["peak_memory_gib"] > 0.1
        assert side["peak"]["source"] == "metrics.peak_tflops"
        assert side["kernels_per_step"] > 100
        assert side["idle_share"] < 1
    assert "over_first" not in a
    for key in ("seconds_per_step", "wps"):
        assert b["over_first"][key]["range"][0] > 0


def test_the_turns_of_others_do_not_count(tmp_path: Path) -> None:
    variant = measure.Variant("a", DEBUG, tuple(TINY_MODEL))
    with Group(1) as group:
        group.call(measure.start, DEBUG, variant.settings(str(tmp_path), 2), 2, 1)
        time.sleep(3)
        begin = time.perf_counter()
        (record,) = group.call(measure.take_turn)
        # A turn starts where the last one was logged, shortly before that one ended.
        assert 2 * record["seconds_per_step"] < time.perf_counter() - begin + 2


def test_ratios_are_of_the_same_round() -> None:
    first = [{"seconds_per_step": 1.0, "wps": 8.0}, {"seconds_per_step": 4.0, "wps": 2.0}]
    second = [{"seconds_per_step": 2.0, "wps": 4.0}, {"seconds_per_step": 6.0, "wps": 1.0}]
    actual = measure.ratios(second, first)
    assert actual["seconds_per_step"]["median"] == 1.75
    assert actual["seconds_per_step"]["range"] == [1.5, 2.0]
    assert actual["wps"]["range"] == [0.5, 0.5]
    assert measure.spread([4.0, 1.0, 2.0, 3.0, 9.0]) == {
        "median": 3.0,
        "quartiles": [2.0, 4.0],
        "range": [1.0, 9.0],
    }


def test_a_variant_alone_needs_no_second_side(tmp_path: Path) -> None:
    (result,) = results_of(step, tmp_path / "step.json", DEBUG)
    assert result["applied"]["modules"]["FSDP module"] == 6
    assert "idle_share" not in result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--b.parallel.tp=2"], "--b.parallel.tp=2 is for side b, which --vs CONFIG adds"),
        (["--training.steps=3"], "a: training.steps is set by the benchmark itself"),
        (["--vs", DEBUG, "--b.training.stpes=3"], "b: titan-lite: 1 problem in the configuration"),
        (["--vs", DEBUG, "--b.training.stpes=3"], 'did you mean "training.steps"?'),
        (["--vs", "no.toml"], "b: titan-lite: 1 problem in the configuration\n  no.toml: no such"),
        (["--a.parallel.tp=3"], "a: titan-lite: "),
        # An error that only the Trainer can find.
        (["--float8.recipe=rowwise"], "a: titan-lite: 1 problem in the configuration\n  float8.r"),
    ],
)
def test_wrong_use_is_one_answer_that_names_the_side(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert step.main([DEBUG, *arguments]) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_counts_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main([DEBUG, "--rounds=0"])
    assert "expected an integer greater than 0, got '0'" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BenchmarkError, match="2 processes need 2 GPUs, and there are 1; with CUDA"):
        Group(2)


def test_a_process_that_fails_or_dies_is_named() -> None:
    with Group(1) as group:
        with pytest.raises(RuntimeError, match=r"(?s)process 0: Traceback.*invalid literal"):
            group.call(int, "many")
        assert group.call(int, "1") == [1]
        with pytest.raises(RuntimeError, match="process 0 ended with exit code 3"):
            group.call(os._exit, 3)


def test_overlapping_kernels_are_counted_once() -> None:
    assert idle.covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0
    result = {"kernel_seconds_per_step": 0.3, "seconds_per_step": {"median": 0.4}}
    assert idle.with_idle_share(result)["idle_share"] == 0.25


@pytest.mark.distributed
def test_recomputing_all_blocks_takes_less_activation_memory(tmp_path: Path) -> None:
    modes = ("--modes", "none", "full")
    none, full = results_of(activation_checkpoint, tmp_path / "modes.json", DEBUG, *modes)
    assert full["variant"] == "full"
    assert full["activation_mib"] < 0.8 * none["activation_mib"]
    assert full["activation_memory"] == "peak"
    assert full["over_first"]["seconds_per_step"]["median"] > 0


@pytest.mark.distributed
@pytest.mark.parametrize("loss", [[], ["--same-loss"]], ids=["torch", "same"])
def test_the_bare_fully_shard_loop_trains_the_same_model(loss: list[str], tmp_path: Path) -> None:
    arguments = ("--nproc=2", "--dtypes", "float32", *loss)
    (result,) = results_of(trainer_overhead, tmp_path / "overhead.json", DEBUG, *arguments)
    assert result["bare_loop"] == "fully_shard"
    assert result["largest_relative_loss_difference"] < 1e-5
    assert result["trainer_over_bare_loop"]["median"] > 0


def test_the_chunked_loss_of_one_process_has_no_autocast(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert trainer_overhead.main(["--same-loss"]) == 2
    assert "--same-loss is for --nproc 2 or more" in capsys.readouterr().err


def test_every_variant_of_the_gpu_suite_is_a_valid_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(h200, "is_available", lambda name: True)
    chosen = h200.variants([], [])
    assert len(chosen) == sum(map(len, h200.SUITE.values()))
    for variant in chosen:
        plan = make_plan(variant.config, variant.settings("outputs", 2), variant.nproc)
        fitting_tokenizer(plan.config.data, plan)


def test_variants_whose_gpus_or_packages_are_missing_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(h200, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(h200, "find_spec", lambda name: None if name == "flash_attn" else name)
    names = {variant.name.partition(", ")[2] for variant in h200.variants(["1b"], [])}
    missing = {"compile, flash4", "compile, 2 GPUs", "compile, 2 GPUs, fsdp_symm_mem"}
    assert h200.SUITE["llama3_1b"].keys() - names == missing
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [variant.nproc for variant in h200.variants(["2 GPUs"], [])] == [2, 2]


@pytest.mark.distributed
@pytest.mark.slow
def test_the_gpu_suite_goes_on_after_a_variant_that_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "h200.json"
    arguments = ["--only", "8b, compile, rowwise", "8b, compile, once", f"--output={output}"]
    eager = ["--compile.enable=false", "--model.vocab_size=2048"]
    assert h200.main([*arguments, *SHORT, *TINY_MODEL, *eager]) == 1
    refused, measured = json.loads(output.read_text())["results"]
    assert "requires CUDA compute capability" in refused["failed"]
    assert measured["variant"] == "llama3_8b, compile, once more"
    assert measured["applied"]["modules"]["selectively checkpointed"] == 2
    assert measured["kernels_per_step"] > 100
    table = capsys.readouterr().out
    assert "| llama3_8b, compile, once more | 0." in table
    assert "| llama3_8b, compile, rowwise |   " in table


def test_wps_of_the_gpu_suite_are_over_the_compiled_model_in_bfloat16() -> None:
    results = [
        {"variant": "m, eager", "wps": 50.0},
        {"variant": "m, compile", "wps": 100.0},
        {"variant": "m, compile, tensorwise", "failed": "no"},
        {"variant": "n, eager", "wps": 70.0},
    ]
    ratios = [result["wps_over_compile"] for result in h200.with_ratios(results)]
    assert ratios == [0.5, 1.0, None, None]


def test_the_gpu_suite_begins_nothing_after_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 100.0])
    monkeypatch.setattr(h200.time, "monotonic", lambda: next(clock))
    arguments = ["--only", "1b, eager", "--limit=99", f"--output={tmp_path / 'h200.json'}"]
    assert h200.main(arguments) == 1
    assert "| llama3_1b, eager | no time was left |" in capsys.readouterr().out


def test_the_gpu_suite_needs_a_word_that_a_name_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert h200.main(["--only", "2b"]) == 2
    assert capsys.readouterr().err == "--only 2b: no variant has such a name\n"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gpt", "float32"), ("gpt", "bfloat16"), ("bert", "float32"), ("megatron_bert", "bfloat16")],
)
def test_the_bare_loop_trains_our_model_and_transformers_alike(name: str, dtype: str) -> None:
    pytest.importorskip("transformers")
    losses = {}
    for side in (OURS, THEIRS):
        bare_loop.start(side, name, families.preset(name), dtype, (2, 32))
        losses[side] = [bare_loop.take_turn(2)[1] for _ in range(2)]
    assert losses[OURS] == pytest.approx(losses[THEIRS], rel=families.AGREE[dtype])
    assert losses[OURS][0] != losses[OURS][1]


class OfLoss:
    """A group whose process reports one second and this loss for every turn."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def call(self, *_: object) -> list[tuple[float, float]]:
        return [(1.0, self.loss)]


def test_models_are_timed_only_where_their_first_losses_agree() -> None:
    options = SimpleNamespace(batch=8, seq_len=4, warmup=1, rounds=1, steps=2)
    sides: Any = {OURS: OfLoss(8.0), THEIRS: OfLoss(8.00004)}
    timed = families.race(sides, "bert", "float32", options)
    assert timed["tokens_per_second"] == {OURS: 64.0, THEIRS: 64.0}
    sides[THEIRS].loss = 8.001
    with pytest.raises(BenchmarkError, match=r"titan_lite 8\.0 and transformers 8\.001$"):
        families.race(sides, "bert", "float32", options)


def test_the_dense_side_has_as_many_active_parameters_but_the_routers() -> None:
    overrides = ("--model.num_layers=2", "--model.num_experts=16", "--training.seq_len=64")
    args = moe.moe_args(overrides)
    settings = moe.dense(args, overrides)
    assert "--training.seq_len=64" in settings
    other = make_plan(moe.CONFIG, list(settings), 1).args
    routers = args.num_layers * args.num_experts * args.dim
    assert num_params(other) == num_params(args) - num_inactive_params(args) - routers


def test_experts_in_a_loop_give_what_grouped_products_give() -> None:
    options = SimpleNamespace(batch=2, seq_len=8, warmup=1, rounds=2, steps=1)
    args = moe.moe_args(["--model.dim=16", "--model.ffn_dim=32", "--model.head_dim=8"])
    actual = moe.race_products(args, "float32", options)
    assert actual["rows"] == 2 * 8 * args.top_k
    assert actual["over_loop"]["range"][0] > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mixture_of_experts_is_compared_with_what_it_replaces(tmp_path: Path) -> None:
    output = tmp_path / "moe.json"
    sizes = ("--dtypes=float32", "--batch=2", "--seq-len=64", "--model.num_layers=2")
    peak = "--metrics.peak_tflops=1.0"
    assert moe.main([*sizes, *SHORT, f"--output={output}", peak]) == 0
    results = json.loads(output.read_text())["results"]
    kinds = ["step", "step", "ep", "ep", "grouped", "transformers"]
    assert [result["comparison"] for result in results] == kinds
    names = [result["variant"] for result in results[:4]]
    assert names == ["dense", "experts", "ep 1", "ep 2"]
    for result in (results[1], results[3]):
        assert result["over_first"]["seconds_per_step"]["median"] > 0
    assert results[3]["applied"]["modules"]["experts over 2 ranks"] == 2
    assert results[-1]["largest_relative_loss_difference"] < 1e-5


def test_the_page_of_families_lists_every_flavor_and_the_speeds_that_are_kept() -> None:
    page = families.PAGE.read_text()
    again = families.put(page, "flavors", families.flavors_table())
    if (results := RESULTS / families.SPEED).exists():
        actual = json.loads(results.read_text())["results"]
        again = families.put(again, "speed", families.speed_table(actual))
    assert page == again, "python -m benchmarks.families curves --write"


def test_a_point_of_a_curve_is_the_mean_of_some_records_and_of_hidden_tokens_alone() -> None:
    records = [{"step": n, "loss": n / 2} for n in range(1, 6)]
    assert families.points(records, 2) == {"steps": [2, 4], "loss": [0.75, 1.75]}
    pairs = {"masked_lm_loss": 6.0, "next_sentence_accuracy": 0.5}
    assert families.points([record | pairs for record in records], 5) == {
        "steps": [5],
        "loss": [6.0],
        "next_sentence_accuracy": [0.5],
    }


def test_curves_are_drawn_with_labels_apart(tmp_path: Path) -> None:
    curve = {"steps": [1, 50, 100], "loss": [8.0, 6.0, 4.6]}
    families.draw({"llama": curve, "bert": curve}, tmp_path / "picture.png")
    assert 0 < (tmp_path / "picture.png").stat().st_size < 150_000
    assert families.apart({"a": 1.0, "b": 1.0, "c": 5.0}, gap=0.5) == pytest.approx(
        {"a": 0.833, "b": 1.333, "c": 4.833}, abs=1e-3
    )


def test_ceilings_are_rates_of_the_sizes_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert ceilings.main(["--size=64", "--copy-mb=1", "--seconds=0.01"]) == 0
    rates = json.loads(capsys.readouterr().out)["results"]
    assert (rates["matmul_size"], rates["copy_mb"]) == (64, 1)
    assert min(rates.values()) > 0


def test_attention_kernels_are_timed_and_those_that_cannot_run_reported(tmp_path: Path) -> None:
    output = tmp_path / "attention.json"
    sizes = ["--seq-len=64", "--heads", "4", "2", "--head-dim=16", "--documents", "1", "4"]
    assert attention.main([*sizes, f"--output={output}"]) == 0
    results = {result["case"]: result for result in json.loads(output.read_text())["results"]}
    assert results.keys() == {
        "default",
        "flash",
        "cuDNN",
        "varlen, 1 documents, longest 64",
        "varlen, 4 documents, longest 64",
        "varlen, 4 documents, longest 32",
    }
    assert results["flash"]["ms"] > 0
    assert "flash" in results["flash"]["longest_kernel"]
    assert "No viable backend" in results["cuDNN"]["failed"]


def test_documents_of_the_attention_benchmark_fill_the_sequence() -> None:
    starts = attention.document_starts(1000, 20)
    assert (len(starts), starts[0], starts[-1]) == (21, 0, 1000)
    assert starts == sorted(set(starts)) == attention.document_starts(1000, 20)


def test_a_short_run_that_fails_or_hangs_is_reported_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **settings: Any) -> SimpleNamespace:
        folder = command[command.index("--training.steps=30") + 2].partition("=")[2]
        settings["stdout"].write("the last line\n")
        if "--compile.enable=true" in command:
            raise subprocess.TimeoutExpired(command, settings["timeout"])
        (Path(folder) / "metrics.jsonl").write_text('{"loss": 8.0}\n{"loss": 6.5}\n')
        return SimpleNamespace(returncode=int("--data.packing=document" in command))

    monkeypatch.setattr(features, "subprocess", SimpleNamespace(**vars(subprocess) | {"run": run}))
    output = tmp_path / "features.json"
    only = ["--only", "plain", "compile", "documents", "--each=7"]
    assert features.main([*only, f"--output={output}"]) == 1
    plain, compiled, documents = json.loads(output.read_text())["results"]
    assert (plain["first_loss"], plain["last_loss"]) == (8.0, 6.5)
    assert (compiled["failed"], compiled["log"]) == ("no end after 7 s", ["the last line"])
    assert documents["failed"] == "exit code 1"


@pytest.mark.parametrize("name", features.FEATURES)
def test_every_short_run_is_a_valid_configuration(name: str) -> None:
    config, *settings = features.FEATURES[name]
    assert make_plan(config, settings, 1).dims.batch == 1


def write_stages(folder: Path) -> None:
    """Results as the stages of scripts/first_gpu.sh leave them."""
    speed = {"wps": 50_000.0, "mfu": 70.0, "idle_share": 0.1, "kernels_per_step": 900.0}
    speed |= {"peak_memory_gib": 80.0}
    results: dict[str, Any] = {
        "ceilings": {
            "matmul_tflops": 780.0,
            "sustained_matmul_tflops": 600.0,
            "copy_tbytes_per_s": 4.2,
        },
        "attention": [
            {"case": "flash", "tflops": 300.0},
            {"case": "cuDNN", "tflops": 480.0},
            {"case": "varlen", "failed": "not there"},
        ],
        "features": [{"feature": "compile", "failed": "exit code 1", "log": []}],
        "1b": [
            {"variant": "llama3_1b, compile", "wps_over_compile": 1.0, **speed},
            {"variant": "llama3_1b, compile, rowwise", "wps_over_compile": 1.1, **speed},
            {"variant": "llama3_1b, compile, flash2", "wps_over_compile": 0.95, **speed},
            {"variant": "llama3_1b, eager", "failed": "no time was left"},
        ],
        "torchtitan": [
            {"dtype": "bfloat16", "mode": "compile", "seconds_over_torchtitan": {"median": 0.95}}
        ],
    }
    for stage, actual in results.items():
        (folder / f"{stage}.json").write_text(json.dumps({"results": actual}))
    cases = '<testcase name="test_a"><failure/></testcase><testcase name="test_b"/>'
    (folder / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    codes = {"ceilings": 0, "attention": 0, "features": 1, "tests": 1, "first": 2, "1b": 124}
    lines = [
        f"{stage}\t{code}\t30" for stage, code in ({"1b": 1} | codes | {"torchtitan": 0}).items()
    ]
    (folder / "stages.tsv").write_text("\n".join(lines) + "\n")


def test_the_table_of_the_first_hour_has_predictions_next_to_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stages(tmp_path)
    assert first_gpu.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text()
    for line in (
        "| ceilings | matmul_tflops | 770 to 800 | 780 | as predicted |",
        "| ceilings | sustained_matmul_tflops | 690 to 800 | 600 | below |",
        "| attention | cuDNN over flash | 1.5 to 1.7 | 1.6 | as predicted |",
        "| attention | varlen: TFLOP/s |  | not there |  |",
        "| features | compile |  | exit code 1 |  |",
        "| tests | test_a |  | failure |  |",
        "| tests | test_b |  | passed |  |",
        "| first | stage, 30 s |  | exit code 2 |  |",
        "| 1b | stage, 30 s |  | time limit |  |",
        "| 1b | compile: tokens/s | 48,000 to 58,000 | 50,000 | as predicted |",
        "| 1b | compile: MFU % | 52 to 62 | 70 | above |",
        "| 1b | compile: no kernel ran, % | 0 to 3 | 10 | above |",
        "| 1b | compile, rowwise: over compile | 1.05 to 1.2 | 1.1 | as predicted |",
        "| 1b | compile, flash2: over compile | 0.85 to 0.9 | 0.95 | above |",
        "| 1b | eager |  | no time was left |  |",
        "| torchtitan | bfloat16, compile: step time | 0.9 to 1 | 0.95 | as predicted |",
    ):
        assert line in printed.splitlines()
    summary = json.loads((tmp_path / "summary.json").read_text())
    predicted = {row["what"]: row["predicted"] for row in summary["results"]}
    assert predicted["matmul_tflops"] == [770, 800]
    assert {"device", "driver", "cuda", "torch", "git_commit"} <= summary["manifest"].keys()


def first_hour(folder: Path, *stages: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scripts/first_gpu.sh", *stages],
        env={**os.environ, "OUTPUT": str(folder), "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=GUARD,
    )


@pytest.mark.slow
def test_the_first_hour_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    done = first_hour(tmp_path, "ceilings", REHEARSE="1")
    assert done.returncode == 0, done.stderr
    assert "| ceilings | matmul_tflops | 770 to 800 |" in done.stdout
    assert json.loads((tmp_path / "ceilings.json").read_text())["results"]["matmul_size"] == 128


STAND_IN = """#!/usr/bin/env bash
# In python's place: -m MODULE ... --output FILE
echo "$2" >>"$CALLS"
[ "$2" != benchmarks.first_gpu ] || { echo "the table" >"$3/table.md"; exit; }
while [ $# -gt 0 ] && [ "$1" != --output ]; do shift; done
[ $# = 0 ] || echo "$RESULT" >"$2"
exit "$CODE"
"""


def test_a_stage_of_the_first_hour_that_failed_is_run_again_and_loses_nothing(
    tmp_path: Path,
) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls, results = tmp_path / "calls", tmp_path / "results"
    stand_in = {"PYTHON": str(python), "CALLS": str(calls)}
    first = first_hour(results, "attention", **stand_in, RESULT="first", CODE="3")
    assert (first.returncode, first.stdout) == (1, "the table\n")
    assert "attention: exit code 3" in first.stderr
    again = first_hour(results, "attention", "1b", **stand_in, RESULT="second", CODE="0")
    assert again.returncode == 0
    assert (results / "attention.before.json").read_text() == "first\n"
    assert (results / "attention.json").read_text() == "second\n"
    last = first_hour(results, "attention", "1b", **stand_in, RESULT="third", CODE="0")
    assert "attention: done before" in last.stderr
    assert (results / "1b.json").read_text() == "second\n"
    stages = [name for name in calls.read_text().split() if name != "benchmarks.first_gpu"]
    assert stages == ["benchmarks.attention", "benchmarks.attention", "benchmarks.h200"]
    codes = [line.split("\t")[:2] for line in (results / "stages.tsv").read_text().splitlines()]
    assert codes == [["attention", "3"], ["attention", "0"], ["1b", "0"]]


def test_rounds_of_two_libraries_are_compared_one_by_one() -> None:
    ranks = [
        {"seconds": 1.0, "cpu_seconds": 0.5, "memory_gib": 2.0},
        {"seconds": 3.0, "cpu_seconds": 0.7, "memory_gib": 1.0},
    ]
    local = beside_torchtitan.over_ranks(ranks)
    assert local == {"seconds": 3.0, "cpu_seconds": 1.2, "memory_gib": 2.0}
    reference = {"seconds": 2.0, "cpu_seconds": 2.4, "memory_gib": 4.0}
    rounds = [
        {"titan_lite": local, "torchtitan": reference},
        {"torchtitan": local, "titan_lite": local},
    ]
    actual = beside_torchtitan.compared(rounds, steps=2)
    assert actual["seconds_over_torchtitan"]["range"] == [1.0, 1.5]
    assert actual["cpu_seconds_over_torchtitan"]["median"] == 0.75
    assert actual["torchtitan"]["seconds_per_step"]["range"] == [1.0, 1.5]
    assert actual["peak_memory_over_torchtitan"] == 0.5


@pytest.mark.parametrize("flavor", ["debug", "llama3_8b", "llama2_7b", "llama3.1_405b"])
def test_torchtitan_is_given_the_model_of_a_flavor(flavor: str) -> None:
    args = registered_families()["llama"].flavors[flavor]
    reference = torchtitan_side.their_args(SimpleNamespace, args)  # type: ignore[arg-type]
    # As torchtitan/models/llama3/model/model.py computes it, before it rounds up to multiple_of.
    hidden = int(reference.ffn_dim_multiplier * int(2 * 4 * args.dim / 3))
    assert (hidden, reference.multiple_of) == (args.ffn_dim, 1)
    assert (reference.n_heads, reference.n_kv_heads) == (args.num_heads, args.num_kv_heads)


def test_a_torchtitan_that_cannot_be_installed_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(beside_torchtitan.subprocess, "run", lambda *_, **__: failed)
    packages = tmp_path / "packages"
    assert beside_torchtitan.main([f"--packages={packages}"]) == 2
    assert f"torchtitan could not be installed into {packages}\n" in capsys.readouterr().err


def test_the_page_of_optimizers_has_the_results_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [f"{optimizer.RESULTS}/optimizer_{name}.json" for name in ("cost", "curves")]
    cost, curves = (json.loads(Path(file).read_text())["results"] for file in kept)
    page = optimizer.PAGE.read_text()
    for name, text in (("cost", optimizer.cost_table(cost)), ("curves", optimizer.table(curves))):
        assert text in page, name
    monkeypatch.setattr(optimizer, "PAGE", tmp_path / "optimizers.md")
    assert optimizer.main(["draw"]) == 0
    assert 0 < (tmp_path / "optimizers.png").stat().st_size < 150_000


def test_the_best_learning_rate_is_that_of_the_lowest_last_losses(tmp_path: Path) -> None:
    for rate in optimizer.RATES:
        for seed in optimizer.SEEDS:
            folder = tmp_path / "AdamW" / f"{rate:g}" / str(seed)
            folder.mkdir(parents=True)
            losses = [8 - 5 * step / optimizer.STEPS for step in range(optimizer.STEPS)]
            records = [{"loss": loss + abs(rate - 8e-3) + seed / 10} for loss in losses]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    # Nothing is left to train.
    curves = optimizer.Curves(tmp_path, None)  # type: ignore[arg-type]
    best, final = curves.best("AdamW")
    assert best == 8e-3
    assert final["0.008"] == pytest.approx(8 - 5 * 0.945 + 0.2)
