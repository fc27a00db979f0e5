"""The dry run reports what a real run of the same configuration does."""

import json
import math
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.pool import Pool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed import GUARD, PRELOADED, Workers
from tests.runs import TINY, splits_backward
from titan_lite import cli
from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import load_config
from titan_lite.dryrun import run
from titan_lite.models.plan import make_plan
from titan_lite.nn.build_model import build_model
from titan_lite.planner.hardware import DEVICES, find_by_short_name

TRAIN_CONFIGS = Path(__file__).parent.parent / "train_configs"
PRESETS = {path.stem: path for path in sorted(TRAIN_CONFIGS.glob("*.toml"))}
# In a real run of several steps, one that is not logged is measured.
STEP = ("--metrics.log_freq=10", "--training.param_dtype=bfloat16", "--training.seq_len=256")
SHARE = "--training.local_batch_size=4"
# FSDP units inside blocks are gathered and freed across them.
RUN_AS_A_WHOLE = "tp 2 of latent attention and experts"
LAYOUTS = {
    "fsdp 2 of experts": (2, (SHARE, "--model.name=qwen3_moe")),
    RUN_AS_A_WHOLE: (2, ("--parallel.tp=2", "--model.name=deepseek_v3")),
    "fsdp 2": (2, (SHARE,)),
    "tp 2": (2, ("--parallel.tp=2",)),
    "gpt, whole activations": (
        2,
        ("--model.name=gpt", "--parallel.tp=2", "--parallel.sequence_parallel=false"),
    ),
    "full checkpointing": (2, (SHARE, "--activation_checkpoint.mode=full")),
    "pp 2": (2, ("--parallel.pp=2", "--training.local_batch_size=2")),
    "ring of cp 2": (2, ("--parallel.cp=2",)),
    "fsdp 2, moments in int8": (2, (SHARE, "--optimizer.state_dtype=int8")),
    "fsdp 2, values read by the host": (2, (SHARE, "--optimizer.implementation=foreach")),
    "fsdp 2, optimizer of a plugin": (
        2,
        (
            SHARE,
            "--job.plugins=['tests.optim.torch_plugin']",
            "--optimizer.name=torch",
            "--optimizer.kind=NAdam",
        ),
    ),
    "fsdp 2 x tp 2, Muon": (4, (SHARE, "--parallel.tp=2", "--optimizer.name=Muon")),
}

# Layouts and presets of the developer's run.
QUICK = {
    *("fsdp 2, values read by the host", "fsdp 2, optimizer of a plugin"),
    *("fsdp 2 x tp 2", "pp 2", "ring of cp 2"),
    *("fsdp 2 x tp 2, full checkpointing", "pp 2, selective checkpointing"),
    *("debug", "debug_bert", "llama3_8b", "llama3_8b_cp8_256k", "llama2_70b_tp4_pp8"),
    "mixtral_8x22b",
}


@pytest.fixture(scope="module")
def fresh() -> Iterator[Pool]:
    """Processes that each serve one dry run: torch remembers the groups of an earlier world."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield pool


def _dry(
    path: Path | None,
    world_size: int,
    rank: int,
    overrides: tuple[str, ...],
    *,
    repeats: bool = True,
) -> Any:
    from titan_lite.dryrun.run import dry_run

    plan = make_plan(path, overrides, world_size)
    return dry_run(plan, rank, on_gpu=path is not None, repeats=repeats)


def _real(folder: Path, overrides: tuple[str, ...]) -> Any:
    from titan_lite.dryrun.measure import measure_step, recorder
    from titan_lite.runtime.distributed import Process
    from titan_lite.training.open_run import open_run

    settings = [*overrides, f"--job.dump_folder={folder}"]
    plan = make_plan(None, settings, Process.from_environment().world_size)
    with recorder(plan.dims) as record:
        trainer = open_run(plan)
        # Logged, and with what is set up only once.
        trainer.train_step(1)
        measured = measure_step(trainer.built, lambda: trainer.train_step(2), record)
        trainer.close()
    return measured


def parameters(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, those that are not in QUICK marked slow."""
    return [
        pytest.param(
            name,
            marks=[
                *[pytest.mark.slow] * (name not in QUICK),
                *[splits_backward] * ("is split" in name),
            ],
        )
        for name in names
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", parameters(LAYOUTS))
def test_memory_flops_and_collectives_are_those_of_a_real_run(
    layout: str, workers: dict[int, Workers], fresh: Pool, tmp_path: Path
) -> None:
    world_size, settings = LAYOUTS[layout]
    overrides = (*TINY, *STEP, *settings)
    real = workers[world_size].run(_real, tmp_path, overrides)
    for rank in (0, world_size - 1):
        arguments = None, world_size, rank, overrides
        dry = fresh.apply(_dry, arguments, {"repeats": layout != RUN_AS_A_WHOLE}).measured
        assert dry.collectives == real[rank].collectives
        assert any(collective.count > 1 for collective in dry.collectives)
        assert dry.flops == real[rank].flops > 0
        assert dry.held == real[rank].held
        assert dry.peak.bytes == pytest.approx(real[rank].peak.bytes, rel=0.05)


# World size, blocks, and four micro-batches for each rank.
REPEATED = {
    "fsdp 2 x tp 2, full checkpointing": (
        4,
        6,
        8,
        ("--parallel.tp=2", "--activation_checkpoint.mode=full"),
    ),
    "replicas, some blocks checkpointed": (
        2,
        11,
        8,
        (
            "--parallel.dp_replicate=2",
            "--activation_checkpoint.mode=first_k",
            "--activation_checkpoint.first_k=5",
            "--parallel.reshard_after_forward=always",
        ),
    ),
    "pp 2, selective checkpointing": (
        2,
        11,
        4,
        ("--parallel.pp=2", "--activation_checkpoint.mode=selective_op"),
    ),
    "interleaved stages": (
        2,
        20,
        4,
        (
            "--parallel.pp=2",
            "--parallel.pp_schedule=Interleaved1F1B",
            "--parallel.pp_stages_per_rank=2",
        ),
    ),
    "experts": (2, 6, 8, ("--model.name=qwen3_moe",)),
    "ring of cp 2": (2, 6, 4, ("--parallel.cp=2",)),
    "float8 all-gathers": (
        2,
        6,
        8,
        (
            "--float8.recipe=tensorwise",
            "--float8.fsdp_all_gather=true",
            "--float8.emulate=true",
        ),
    ),
    "gpt with dropout": (
        1,
        6,
        4,
        ("--model.name=gpt", "--model.hidden_dropout=0.1", "--model.attention_dropout=0.1"),
    ),
    "a backward that is split": (
        2,
        5,
        4,
        ("--parallel.pp=2", "--parallel.pp_schedule=ZBVZeroBubble"),
    ),
}


@pytest.mark.parametrize("layout", parameters(REPEATED))
def test_blocks_that_are_repeated_give_the_numbers_of_blocks_that_are_run(
    layout: str, fresh: Pool
) -> None:
    world_size, blocks, batch, settings = REPEATED[layout]
    sizes = (f"--model.num_layers={blocks}", f"--training.global_batch_size={batch}")
    overrides = (*TINY, *STEP, *sizes, "--training.local_batch_size=1", *settings)
    repeated, run = (
        fresh.apply(_dry, (None, world_size, world_size - 1, overrides), {"repeats": repeats})
        for repeats in (True, False)
    )
    assert repeated == run


def test_flops_of_attention_count_every_query_head() -> None:
    """torch 2.11's formulas refuse fewer heads of keys and values."""
    from titan_lite.dryrun.torch_private import flops
    from titan_lite.parallel.attention_ops import CPU_FLASH, CPU_FLASH_BACKWARD

    query = torch.empty(2, 8, 16, 4, device="meta")
    key = torch.empty(2, 2, 16, 4, device="meta")
    causal = {"is_causal": True}
    forward = flops(CPU_FLASH.default, (query, key, key), causal, (query, None))
    assert forward == 4 * query.numel() * 16
    saved = (query, query, key, key, query, None, 0.0, True)
    assert flops(CPU_FLASH_BACKWARD.default, saved, {}, (query, key, key)) == forward * 5 // 2


@pytest.mark.parametrize(("fuses", "bytes_per_element"), [(True, 1), (False, 8)])
@pytest.mark.parametrize("rowwise", [False, True])
def test_a_compiled_cast_to_float8_allocates_its_result_alone(
    fuses: bool, bytes_per_element: int, rowwise: bool
) -> None:
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    from titan_lite.dryrun.recorder import Recorder

    scaling = {}
    if rowwise:
        scaling = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1}
    x = torch.randn(64, 1024, dtype=torch.bfloat16)
    with Recorder(lambda _: "", fuses_float8_casts=fuses) as record:
        cast = hp_tensor_to_float8_dynamic(x, torch.float8_e4m3fn, LinearMMConfig(), **scaling)
    assert cast._data.dtype == torch.float8_e4m3fn
    peak = record.peak().bytes
    if fuses:
        assert peak == x.numel()
    else:
        assert peak >= bytes_per_element * x.numel()


def test_the_dry_run_of_a_compiled_float8_run_has_no_casts_in_float32(fresh: Pool) -> None:
    full = ("--activation_checkpoint.mode=full", "--model.ffn_dim=1024")
    float8 = (*TINY, *STEP, *full, "--float8.recipe=tensorwise", "--float8.emulate=false")
    eager, compiled = (
        fresh.apply(_dry, (None, 1, 0, (*float8, f"--compile.enable={value}"))).measured
        for value in ("false", "true")
    )
    # 8 samples of 256 tokens, the input of the second projection of the feed-forward.
    assert eager.peak.bytes - compiled.peak.bytes >= 4 * 8 * 256 * 1024
    assert compiled.flops == eager.flops


def test_memory_that_fsdp_frees_is_seen_after_an_operation_with_a_body() -> None:
    """The recorder is entered again for the body of ring attention, and continues afterwards."""
    from titan_lite.dryrun.recorder import Recorder

    recorder = Recorder(lambda group: "")
    with recorder:
        with recorder:
            pass
        gathered = torch.empty(1024, dtype=torch.uint8)
        gathered.untyped_storage().resize_(0)
        start = recorder.now()
        later = torch.empty(512, dtype=torch.uint8)
        assert recorder.peak(start).bytes == later.nbytes


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_a_step_that_does_not_fit_names_settings_that_would(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from titan_lite.dryrun import summary

    size = 2**40
    rank = SimpleNamespace(parameters=1, measured=SimpleNamespace(peak=SimpleNamespace(bytes=size)))
    monkeypatch.setattr(summary, "dry_runs", lambda plan, ranks: [rank])
    monkeypatch.setattr(summary, "_rank", lambda rank, device: [])
    small = {"llama": ("llama3_8b", 8), "mixtral": ("8x7b", 32)}
    flavor, world_size = small[model]
    names = (f"--model.name={model}", f"--model.flavor={flavor}", "--training.seq_len=8192")
    overrides = [*names, NO_FILE, "--training.local_batch_size=8"]
    plan = make_plan(None, overrides, world_size, with_files=False)
    device = find_by_short_name("h100")
    assert device is not None
    assert "\nWould fit\n  --" in summary.summarize_dry_run(plan, [0], device, as_json=False)
    rank.measured.peak.bytes = 2**30
    assert "Would fit" not in summary.summarize_dry_run(plan, [0], device, as_json=False)


@pytest.mark.parametrize("name", parameters(PRESETS))
def test_a_preset_is_dry_run_at_its_world_size(name: str, fresh: Pool) -> None:
    """With fewer layers and micro-batches, of the same width."""
    path = PRESETS[name]
    parallel = load_config(path, [NO_FILE]).config.parallel
    degrees = [getattr(parallel, axis) for axis in ParallelDims.AXES]
    text = next(line for line in path.read_text().splitlines() if "# Processes: " in line)
    world_size = int(text.rpartition(" ")[2])
    assert world_size % abs(math.prod(degrees)) == 0
    small = (NO_FILE, f"--model.num_layers={max(2, parallel.num_stages)}")
    if "first_k = " in path.read_text():
        small += ("--activation_checkpoint.first_k=1",)
    if path.stem != "debug":
        batch = world_size // (parallel.tp * parallel.cp * parallel.pp)
        local = load_config(path, [NO_FILE]).config.training.local_batch_size
        small += (f"--training.global_batch_size={local * batch * parallel.pp}",)
    # Blocks that exchange rows of experts are not repeated.
    repeats = {"repeats": parallel.ep == 1}
    rank = fresh.apply(_dry, (path, world_size, world_size - 1, small), repeats)
    assert rank.place["pp"] == parallel.pp - 1
    assert rank.measured.peak.bytes > 4 * rank.measured.held["parameters"]
    # Recomputation and attention's backward add less than a half.
    # The formula counts all of attention, as flash attention's operators do; of a ring only what a
    # causal mask keeps is computed.
    least = 0.5 if rank.place["cp"] else 1
    formula = rank.formula_flops
    if "attention's weights" in rank.applied and parallel.tp == 1:
        # No fused backward repeats a forward: what is left are the products of matrices, and those
        # of the pair's head, which is small and not in the formula.
        formula -= 6 * _tokens_of_a_rank(path) * _num_in_vectors(path, world_size, small)
        assert rank.measured.flops == pytest.approx(formula, rel=1e-4)
    assert least <= rank.measured.flops / formula < 1.5
    axes = {collective.axis for collective in rank.measured.collectives}
    assert {axis for axis in ("tp", "pp", "cp") if getattr(parallel, axis) > 1} <= axes | {"cp"}


NO_FILE = '--data.tokenizer_path=""'


def _tokens_of_a_rank(path: Path) -> int:
    """In one micro-batch."""
    training = load_config(path, [NO_FILE]).config.training
    return training.local_batch_size * training.seq_len


def _num_in_vectors(path: Path, world_size: int, overrides: Sequence[str]) -> int:
    """Numbers in norms and biases, which the formula counts as if they multiplied."""
    plan = make_plan(path, overrides, world_size)
    with torch.device("meta"):
        model = build_model(plan.family, plan.args)
    return sum(p.numel() for p in model.parameters() if p.ndim == 1)


def test_the_command_prints_memory_against_the_device_and_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        "[compile]\nenable = true\n[data]\ntokenizer_path = 'not/there'\npacking = 'document'\n"
        "[validation]\nenable = true\ndataset_path = 'not/there'\n"
        "[[data.sources]]\nname = 'a'\nweight = 1.0\ndataset_path = 'not/there'\n"
    )
    assert cli.main(["dryrun", str(config), "--world-size=2", "--device=h200", *TINY[:3]]) == 0
    text = capsys.readouterr().out
    assert "on 2 x H200 SXM" in text
    assert re.search(r"peak memory       [\d.]+ MiB of 141 GiB\n", text)
    assert re.search(
        r"FLOPs a step      [\d.]+ [MG]FLOP, [\d.]+ times the formula's [\d.]+ [MG]FLOP", text
    )
    assert re.search(r"\d  +[\d.]+ [KM]iB  reduce-scatter over dp_shard", text)
    assert "DOES NOT FIT" not in text
    assert "approximated      compile.enable: the step runs eagerly" in text
    assert 'data.packing "document": attention is counted over whole samples' in text
    assert "validation.enable: validation, which has no backward, is not counted" in text
    assert not (tmp_path / "outputs").exists()


def test_a_note_states_that_gathered_keys_and_values_are_not_counted() -> None:
    settings = ["--parallel.cp=2", "--data.packing=document"]
    for method, is_noted in (("all_gather", True), ("ulysses", False)):
        config = load_config(None, [*settings, f"--parallel.cp_method={method}"]).config
        (note,) = run.left_out(config)
        words = "the gathered keys and values, kept for backward, are not counted"
        assert (words in note) == is_noted


def test_a_step_that_does_not_fit_is_reported_for_each_end_of_the_pipeline_as_json(
    capfd: pytest.CaptureFixture[str],
) -> None:
    big = ["--training.seq_len=65536", "--model.max_seq_len=65536", "--model.dim=8192"]
    layout = ["--parallel.pp=2", "--training.global_batch_size=2", "--model.num_layers=2"]
    assert cli.main(["dryrun", "--json", "--device=v100_sxm2_16gb", *big, *layout]) == 0
    out, err = capfd.readouterr()
    facts = json.loads(out)
    assert err.startswith("Dry run of ranks 0, 1 of 2\n"), "at once"
    for phase in ("building the model", "optimizer state", "optimizer"):
        assert f"rank 0 (1 of 2): {phase}\n" in err
        assert f"rank 1 (2 of 2): {phase}\n" in err
    assert len(err.splitlines()) < 12
    assert facts["memory_bytes"] == 16 * 2**30
    assert [(rank["rank"], rank["stages"], rank["fits"]) for rank in facts["ranks"]] == [
        (0, [0], False),
        (1, [1], False),
    ]


def test_what_only_the_built_model_refuses_is_answered_as_in_a_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    stages = '--parallel.pp_stage_modules=[["norm"],["output"]]'
    layout = ["--parallel.pp=2", "--training.global_batch_size=2", "--parallel.pp_split=explicit"]
    assert cli.main(["dryrun", "--rank=0", *layout, stages]) == 2
    error = capfd.readouterr().err
    assert "parallel.pp_stage_modules (command line): must list each of these modules once" in error
    assert "Traceback" not in error


class Unequal:
    """Finds that blocks do not stand for each other, unless all of them are run."""

    def __call__(self, _plan: Any, place: tuple[int, int, int], *, repeats: bool) -> Any:
        if repeats:
            raise run.NotRepeatableError("two passes differ")
        return place


def test_a_model_whose_blocks_do_different_things_is_run_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "_quiet_dry_run", Unequal())
    places: Any = run.dry_runs(make_plan(None, [NO_FILE], 2), [1])
    assert places == [(1, 1, 1)]


def test_blocks_that_cannot_be_repeated_do_not_end_the_worker_of_a_pool(fresh: Pool) -> None:
    world_size, settings = LAYOUTS[RUN_AS_A_WHOLE]
    dry = fresh.apply_async(_dry, (None, world_size, 0, (*TINY, *STEP, *settings)))
    with pytest.raises(run.NotRepeatableError):
        dry.get(GUARD)


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os.abort, ()


def test_a_process_that_is_killed_is_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_quiet_dry_run", Deadly())
    assert cli.main(["dryrun", "--rank=1", "--world-size=2"]) == 2
    message = "the process of rank 1 was killed (possibly by the kernel's out-of-memory killer)"
    assert message in capsys.readouterr().err


def test_an_unknown_device_or_rank_is_a_mistake_to_answer_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["dryrun", "--device=h1000"]) == 2
    assert "no such device: 'h1000'; did you mean \"H100" in capsys.readouterr().err
    assert cli.main(["dryrun", "--device=none"]) == 2
    assert "no such device: 'none'; the devices are V100 SXM2 16GB, " in capsys.readouterr().err
    assert cli.main(["dryrun", "--rank=2", "--world-size=2"]) == 2
    message = 'titan-lite: --rank: expected "all-stages", or a rank below the world size (2, see '
    assert message in capsys.readouterr().err


def test_every_device_is_found_by_its_name_in_small_letters() -> None:
    for device in DEVICES:
        assert find_by_short_name(device.name.lower()) is device
    h100 = find_by_short_name("h100")
    assert h100 is not None
    assert h100.name == "H100 SXM 80GB"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_is_what_cuda_allocates(fresh: Pool, tmp_path: Path) -> None:
    from tests.runs import build_trainer

    size = ("--model.dim=1024", "--model.num_layers=8", "--model.ffn_dim=4096")
    overrides = (*TINY, *STEP, *size, "--training.seq_len=1024")
    trainer = build_trainer(tmp_path, *overrides[len(TINY) :])
    trainer.train_step(1)
    torch.cuda.reset_peak_memory_stats()
    trainer.train_step(2)
    real = torch.cuda.max_memory_allocated()
    trainer.close()
    dry = fresh.apply(_dry_on_gpu, (overrides,))
    assert dry.measured.peak.bytes == pytest.approx(real, rel=0.05)


def _dry_on_gpu(overrides: tuple[str, ...]) -> Any:
    from titan_lite.dryrun.run import dry_run

    return dry_run(make_plan(None, overrides, 1), 0)
