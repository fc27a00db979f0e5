"""The planner's memory against the dry run's, measured by dry_runs.py."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from titan_lite.config.activation_checkpoint import CHECKPOINT_MODES, SavedOp
from titan_lite.config.optimizers import EIGHT_BITS, OPTIMIZERS
from titan_lite.config.schedules import SCHEDULES
from titan_lite.models.plan import make_plan
from titan_lite.planner.cluster import find_cluster
from titan_lite.planner.counts import block_matrices, num_block_params
from titan_lite.planner.job import Job
from titan_lite.planner.kernels import Rates
from titan_lite.planner.memory import kept_elements, memory, peak, room
from titan_lite.planner.read import read_job
from titan_lite.planner.step_time import StepModel

FOLDER = Path(__file__).parent
PRESETS = FOLDER.parent.parent / "train_configs"
H100 = find_cluster("h100")


def cases(kind: str) -> list[dict[str, Any]]:
    actual: list[dict[str, Any]] = json.loads((FOLDER / f"dry_runs_{kind}.json").read_text())
    return actual


def compare(case: dict[str, Any]) -> tuple[float, float, float]:
    """The place's predicted peak, the whole job's, and the share of memory that it may take."""
    path = PRESETS / f"{case['config']}.toml" if case["config"] else None
    overrides = [*case["overrides"], "--data.tokenizer_path="]
    plan = make_plan(path, overrides, case["world_size"], with_files=False)
    job = read_job(plan)
    return memory(job)[case["place"]].bytes, peak(job).bytes, room(job)


def test_the_presets_memory_is_that_of_the_dry_run() -> None:
    errors = {
        f"{case['config']}, place {case['place']}": compare(case)[0] / case["peak"] - 1
        for case in cases("presets")
    }
    assert len(errors) >= 55
    sizes = list(map(abs, errors.values()))
    assert sum(sizes) / len(sizes) < 0.01, errors
    assert max(sizes) < 0.05, errors


def test_memory_of_random_layouts_is_not_far_below_that_of_the_dry_run() -> None:
    """Without pipelines, with them, and with schedules that split backward.

    Small buffers count in these models, and context parallel's gathers are not counted.
    """
    errors: dict[tuple[bool, bool], list[float]] = {}
    for case in cases("random"):
        keys = dict(override[2:].split("=") for override in case["overrides"])
        is_pipeline = keys["parallel.pp"] != "1"
        splits = is_pipeline and SCHEDULES[keys["parallel.pp_schedule"]].splits_backward
        error = compare(case)[0] / case["peak"] - 1
        errors.setdefault((is_pipeline, splits), []).append(error)
    for kind, mean, least in (
        ((False, False), 0.035, -0.1),
        ((True, False), 0.09, -0.25),
        ((True, True), 1.0, -0.15),
    ):
        sizes = list(map(abs, errors[kind]))
        assert len(sizes) >= 15
        assert sum(sizes) / len(sizes) < mean
        assert min(errors[kind]) > least


def test_random_layouts_are_of_all_kinds() -> None:
    """Schedules, checkpointing modes, optimizers, float8, experts, and every axis of the mesh."""
    seen = {override[2:] for case in cases("random") for override in case["overrides"]}
    pipelines = [case for case in cases("random") if "--parallel.pp=1" not in case["overrides"]]
    schedules = {override for case in pipelines for override in case["overrides"]}
    # The one drawn with DualPipeV has fewer blocks than stages.
    names = set(SCHEDULES) - {"DualPipeV"}
    assert {f"--parallel.pp_schedule={name}" for name in names} <= schedules
    for key, values in (
        ("activation_checkpoint.mode", CHECKPOINT_MODES.variants),
        ("optimizer.name", OPTIMIZERS.variants),
        ("optimizer.state_dtype", ("float32", "bfloat16", *EIGHT_BITS)),
        ("float8.recipe", ("none", "tensorwise", "rowwise")),
        ("ema.enable", ("true", "false")),
        *((f"parallel.{axis}", ("2",)) for axis in ("tp", "cp", "pp", "ep", "dp_replicate")),
    ):
        assert {f"{key}={value}" for value in values} <= seen
    assert len({str(case["overrides"]) for case in cases("random")}) >= 190


def test_memory_of_random_layouts_of_experts_is_that_of_the_dry_run() -> None:
    sizes = [abs(compare(case)[0] / case["peak"] - 1) for case in cases("experts")]
    assert len(sizes) >= 44
    assert sum(sizes) / len(sizes) < 0.02
    assert sorted(sizes)[len(sizes) * 9 // 10 - 1] < 0.05
    assert max(sizes) < 0.12


def saved_cases() -> Iterator[tuple[Job, Job, dict[str, Any], dict[str, Any]]]:
    """Jobs that save one kind of operations and none, with the same step otherwise."""
    nothing: dict[tuple[str, ...], tuple[Job, dict[str, Any]]] = {}
    for case in cases("saved"):
        plan = make_plan(None, [*case["overrides"], "--data.tokenizer_path="], 2, with_files=False)
        job = read_job(plan)
        layout = tuple(case["overrides"][:-1])
        if job.saved == ("max",):
            nothing[layout] = job, case
        else:
            yield job, nothing[layout][0], case, nothing[layout][1]


def test_memory_of_what_selective_op_saves_is_that_of_the_dry_run() -> None:
    names = set()
    for job, without, case, base in saved_cases():
        elements = sum(
            kept_elements(one, job.args.of_block(index), "selective_op") * sign
            for index in range(job.args.num_layers)
            for one, sign in ((job, 1), (without, -1))
        )
        saved = (case["peak"] - base["peak"]) / (job.width * job.local_tokens)
        assert elements == pytest.approx(saved, rel=0.001, abs=0.5), case["overrides"]
        names |= set(job.saved) if saved else set()
    assert names == {*get_args(SavedOp)} - {"max"}


def test_flops_that_selective_op_does_not_repeat_are_those_of_the_dry_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flops(_: Rates, M: float, K: float, N: float, float8: bool = False, groups: int = 1) -> Any:
        return 2 * groups * M * K * N

    def attention(_: Rates, job: Job) -> tuple[float, float]:
        args = job.args
        width = args.num_heads * args.head_size / job.tp
        return 4 * job.local_tokens * job.span * width, 0.0

    monkeypatch.setattr(Rates, "matmul", flops)
    monkeypatch.setattr(Rates, "attention", attention)
    saving = 0
    for job, without, case, base in saved_cases():
        again = [
            sum(sum(StepModel(H100, blocks).block(blocks).again[:2]) for blocks in one)
            for one in (all_blocks(without), all_blocks(job))
        ]
        assert again[0] - again[1] == pytest.approx(base["flops"] - case["flops"], rel=1e-6), case
        saving += again[0] > again[1]
    assert saving > 10


def all_blocks(job: Job) -> list[Job]:
    """The job as if all blocks were like each of them."""
    blocks = [job.args.of_block(index) for index in range(job.args.num_layers)]
    return [dataclasses.replace(job, args=args) for args in blocks]


def test_saved_sums_and_exchanges_are_not_repeated() -> None:
    def again(tp: float, ep: float, *saves: str) -> tuple[float, float]:
        sizes = (f"--parallel.tp={tp}", f"--parallel.ep={ep}", "--model.num_layers=8")
        names = str(list(saves)).replace("'", '"')
        job = job_of(
            "qwen3_30b_a3b",
            *sizes,
            "--activation_checkpoint.mode=selective_op",
            f"--activation_checkpoint.save={names}",
        )
        return StepModel(H100, job).block(job).again[3::2]  # type: ignore[return-value]

    assert again(2, 1, "attention")[0] == pytest.approx(1.5 * again(2, 1, "reduce_scatter")[0])
    assert again(1, 8, "attention")[1] > again(1, 8, "all_to_all")[1] == 0


@pytest.mark.parametrize("kind", ["presets", "random", "experts"])
def test_a_job_is_said_to_fit_only_where_the_dry_run_fits(kind: str) -> None:
    """On a device that is just large enough to be called so."""
    for case in cases(kind):
        _, whole, share = compare(case)
        assert case["peak"] <= whole / share, case


def test_a_pipeline_is_as_large_as_its_largest_place() -> None:
    plan = make_plan(PRESETS / "llama2_70b_tp4_pp8.toml", [], 32, with_files=False)
    job = read_job(plan)
    places = memory(job)
    assert len(places) == 8
    assert peak(job).bytes == max(place.bytes for place in places) == places[0].bytes
    # The dry run of the whole preset: 67.7 GiB.
    assert places[0].bytes / 2**30 == pytest.approx(67.7, rel=0.06)
    assert places[-1].bytes < 0.65 * places[0].bytes


def test_a_stage_without_a_block_has_the_memory_of_its_embedding() -> None:
    stages = (
        '[["tok_embeddings"], ["layers.0", "layers.1", "layers.2", "layers.3", "norm", "output"]]'
    )
    overrides = ["--parallel.pp=2", "--training.global_batch_size=16"]
    overrides += ["--parallel.pp_split=explicit", f"--parallel.pp_stage_modules={stages}"]
    plan = make_plan(PRESETS / "debug.toml", overrides, 2, with_files=False)
    first, last = (place.bytes / 2**20 for place in memory(read_job(plan)))
    # The dry runs: 18.6 and 267 MiB.
    assert first == pytest.approx(18.6, rel=0.25)
    assert last == pytest.approx(267, rel=0.01)


def test_llama_3_70b_needs_more_than_one_node() -> None:
    plan = make_plan(
        PRESETS / "llama3_70b.toml",
        ["--data.tokenizer_path=", "--parallel.tp=1", "--parallel.dp_shard=8"],
        8,
        with_files=False,
    )
    job = read_job(plan)
    assert peak(job).bytes > find_cluster("h100").memory


def job_of(preset: str, *overrides: str) -> Job:
    overrides = ("--data.tokenizer_path=", *overrides)
    plan = make_plan(PRESETS / f"{preset}.toml", overrides, 8, with_files=False)
    return read_job(plan)


def job_with(optimizer: str, *more: str) -> Job:
    return job_of("llama3_8b", f"--optimizer.name={optimizer}", *more)


@pytest.mark.parametrize(
    ("optimizer", "setting", "bytes_of_other", "bytes_of_matrix"),
    [
        ("AdamW", "--ema.enable=true", 12, 12),
        ("AdamW", "--optimizer.state_dtype=bfloat16", 4, 4),
        ("AdamW", "--optimizer.state_dtype=int8", 2 + 8 / 256, 2 + 8 / 256),
        ("Muon", "--ema.enable=true", 12, 8),
        ("Muon", "--optimizer.state_dtype=bfloat16", 4, 4),
    ],
)
def test_an_average_of_the_weights_and_rounded_moments_are_counted(
    optimizer: str, setting: str, bytes_of_other: float, bytes_of_matrix: float
) -> None:
    job = job_with(optimizer, setting)
    matrices = num_block_params(job.args)
    parts = peak(job).parts
    others = parts["parameters"] * 8 / 4 - matrices
    expected = bytes_of_other * others + bytes_of_matrix * matrices
    assert parts["optimizer"] * 8 == pytest.approx(expected)


def test_muon_keeps_12_bytes_for_a_parameter_of_a_matrix_and_adamw_16() -> None:
    adamw, muon = (job_with(name) for name in ("AdamW", "Muon"))
    saved = peak(adamw).parts["optimizer"] - peak(muon).parts["optimizer"]
    assert saved == 4 * num_block_params(muon.args) / 8
    # Without the vocabulary: 666e12 FLOPs of 5 steps (arXiv:2502.16982 has the formula).
    products = [5 * (4 * m * m * n + 2 * m**3) for m, n in block_matrices(muon.args)]
    assert sum(products) * muon.args.num_layers == pytest.approx(666e12, rel=0.01)
    model = StepModel(find_cluster("h100"), muon)
    longer = model.predict(muon).parts["optimizer"] / model.predict(adamw).parts["optimizer"]
    assert longer > 2
