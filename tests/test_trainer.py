"""The files and logs of a run."""

import json
import logging
from collections.abc import Iterator, Mapping
from datetime import timedelta
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import distributed_c10d

from tests.distributed import Workers
from tests.runs import Clock, build_trainer, read_metrics, train, whole
from titan_lite.config.load import ConfigError
from titan_lite.training.open_run import open_run

FEW_STEPS = "--training.steps=3"


def test_the_run_file_says_what_ran(one_process: Workers, tmp_path: Path) -> None:
    settings = ("--activation_checkpoint.mode=full", "--model.num_layers=3", "--job.cluster=h100")
    one_process.run(train, tmp_path, FEW_STEPS, *settings)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["versions"]["torch"] == torch.__version__
    assert run["mesh"] == dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"), 1)
    assert len(run["applied"]["modules"]["checkpointed"]) == 3
    assert len(run["applied"]["modules"]["FSDP module"]) == 3 + 4
    assert run["parameters"] == 2 * 2048 * 64 + 64 + 3 * (
        2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    )
    assert run["peak"] == {"tflops": 1.0, "source": "metrics.peak_tflops"}
    assert "6 *" in run["flops_per_token"]["formula"]
    assert "document masks remove are counted" in run["flops_per_token"]["formula"]
    assert run["flops_per_token"]["hardware"] > run["flops_per_token"]["model"]
    assert run["config"]["training"]["steps"] == 3
    assert run["prediction"]["cluster"] == "h100"
    seconds = [record["seconds_per_step"] for record in read_metrics(tmp_path)[1:]]
    assert run["prediction"]["measured"]["seconds_per_step"] == pytest.approx(sum(seconds) / 2)


def test_records_count_tokens_and_mark_the_warm_up(one_process: Workers, tmp_path: Path) -> None:
    records = one_process.run(
        train, tmp_path, FEW_STEPS, "--training.local_batch_size=2", "--metrics.log_freq=2"
    )[0]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["tokens"] for record in records] == [8 * 64, 2 * 8 * 64, 3 * 8 * 64]
    assert [record.get("warmup", False) for record in records] == [True, False, False]
    for key in ("wps", "samples_per_second", "tflops", "mfu", "mfu_causal", "memory_gib"):
        assert records[-1][key] > 0
    assert "hfu" not in records[-1]


def test_tensorboard_holds_the_records_of_the_json_lines(
    one_process: Workers, tmp_path: Path
) -> None:
    records = one_process.run(train, tmp_path, FEW_STEPS, "--metrics.enable_tensorboard=true")[0]
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [record["loss"] for record in records]
    )


def test_gradients_are_clipped_only_when_asked(one_process: Workers, tmp_path: Path) -> None:
    def norms(name: str, *overrides: str) -> list[float]:
        records = one_process.run(train, tmp_path / name, FEW_STEPS, *overrides)[0]
        return [record["grad_norm"] for record in records]

    free, clipped = norms("free", "--training.max_norm=0.0"), norms("a", "--training.max_norm=1e-9")
    assert free[0] == clipped[0], "the norm is that before clipping"
    assert free[1:] != clipped[1:]
    assert norms("b", "--training.max_norm=1e9") == free


def test_profiling_writes_a_trace_of_the_last_steps_of_each_period(
    one_process: Workers, tmp_path: Path
) -> None:
    settings = ("--profiling.enable_profiling=true", "--profiling.profile_freq=4")
    one_process.run(train, tmp_path, "--training.steps=9", *settings)
    traces = sorted((tmp_path / "profile" / "traces").glob("*/*.json.gz"))
    assert [str(trace.relative_to(tmp_path / "profile/traces")) for trace in traces] == [
        "step-4/rank0.json.gz",
        "step-8/rank0.json.gz",
    ]


def test_a_memory_snapshot_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory snapshots require a CUDA device"):
        build_trainer(tmp_path, "--profiling.enable_memory_snapshot=true")


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer has 2,048 tokens, more than .* of 1,000"):
        build_trainer(tmp_path, "--model.vocab_size=1000")


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'data\.split .*: must be "train" or'):
        build_trainer(tmp_path, "--data.split=test")


def test_deterministic_mode_turns_deterministic_algorithms_on(
    one_process: Workers, tmp_path: Path
) -> None:
    assert one_process.run(_is_deterministic, tmp_path, "--training.deterministic=true") == [True]
    assert one_process.run(_is_deterministic, tmp_path) == [False]


def _is_deterministic(folder: Path, *overrides: str) -> bool:
    train(folder, "--training.steps=1", *overrides)
    return torch.are_deterministic_algorithms_enabled()


def test_other_seeds_give_other_weights_and_data(one_process: Workers, tmp_path: Path) -> None:
    def losses(name: str, *overrides: str) -> list[float]:
        one_process.run(train, tmp_path / name, FEW_STEPS, *overrides)
        return [record["loss"] for record in read_metrics(tmp_path / name)]

    assert losses("a") == losses("b")
    assert losses("a") != losses("c", "--training.seed=1")


def test_bfloat16_computes_close_to_float32_but_not_the_same(
    one_process: Workers, tmp_path: Path
) -> None:
    def losses(name: str, dtype: str) -> list[float]:
        records = one_process.run(train, tmp_path / name, f"--training.param_dtype={dtype}")[0]
        return [record["loss"] for record in records]

    full, half = losses("a", "float32"), losses("b", "bfloat16")
    assert half != full
    assert half == pytest.approx(full, rel=2e-3)


def test_a_type_that_the_processor_emulates_is_warned_about_once(
    workers: Mapping[int, Workers], tmp_path: Path
) -> None:
    first, second = workers[2].run(_slow_type_warnings, tmp_path)
    assert second == []
    assert first == [
        'training.param_dtype = "bfloat16" is slow on this processor, for which torch has no '
        'matrix products of this type; set training.param_dtype = "float32"'
    ]


def _slow_type_warnings(folder: Path) -> list[str]:
    """Returns the warnings of a run in bfloat16 and of one in float32, on such a processor."""
    handler = BufferingHandler(1_000)
    logger = logging.getLogger(open_run.__module__)
    logger.addHandler(handler)
    try:
        with mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", return_value=False):
            for dtype in ("bfloat16", "float32"):
                settings = (f"--training.param_dtype={dtype}", "--training.local_batch_size=4")
                build_trainer(folder / dtype, *settings).close()
    finally:
        logger.removeHandler(handler)
    return [record.getMessage() for record in handler.buffer if record.levelno == logging.WARNING]


def _timeouts(folder: Path) -> tuple[set[timedelta], set[timedelta]]:
    """Timeouts of all process groups before and after the first step."""

    def current() -> set[timedelta]:
        groups = distributed_c10d._world.pg_map
        return {g._get_backend(torch.device("cpu")).options._timeout for g in groups}

    trainer = build_trainer(
        folder,
        "--training.steps=1",
        "--comm.init_timeout_seconds=77",
        "--comm.train_timeout_seconds=55",
    )
    before = current()
    trainer.train()
    trainer.close()
    return before, current()


def test_timeouts_shorten_after_the_first_step_in_every_group(
    one_process: Workers, tmp_path: Path
) -> None:
    before, after = one_process.run(_timeouts, tmp_path)[0]
    assert before == {timedelta(seconds=77)}
    assert after == {timedelta(seconds=55)}


def _spied(folder: Path) -> dict[str, Any]:
    """Loss and meter while data and saving take time."""
    from titan_lite.training import inputs as module

    trainer = build_trainer(
        folder, FEW_STEPS, "--training.loss_chunks=3", "--checkpoint.enable=true"
    )
    seen: dict[str, Any] = {}
    loss, batches, save = module.cross_entropy_sum, trainer.data.batches, trainer.save
    clock = Clock(trainer)

    def spying_loss(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return loss(*args, **kwargs)

    def slow_batches() -> Iterator[Any]:
        for batch in batches:
            clock.now += 0.5
            yield batch

    def slow_save() -> None:
        clock.now += 2
        save()

    module.cross_entropy_sum = spying_loss
    trainer.data.batches = slow_batches()
    trainer.save = slow_save  # type: ignore[method-assign]
    trainer.checkpoints.should_save = lambda step, last: step == 2  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        module.cross_entropy_sum = loss
        trainer.close()
    return {"num_chunks": seen["num_chunks"], "records": read_metrics(folder)}


def test_waiting_for_data_is_measured_and_saving_is_left_out_of_the_speed(
    one_process: Workers, tmp_path: Path
) -> None:
    seen = one_process.run(_spied, tmp_path)[0]
    assert seen["num_chunks"] == 3
    last = seen["records"][-1]
    # 0.5 s of each step is waited for, the 2 s of saving are in none.
    assert last["seconds_per_step"] == pytest.approx(0.5)
    assert last["data_wait"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("settings", "attended"),
    [((), 64), (("--data.packing=fixed", "--data.packing_block=16"), 16)],
)
def test_flops_are_those_of_the_model_without_its_embedding(
    settings: tuple[str, ...], attended: int, one_process: Workers, tmp_path: Path
) -> None:
    one_process.run(train, tmp_path, "--training.steps=1", *settings)
    run = json.loads((tmp_path / "run.json").read_text())
    non_embedding = run["parameters"] - 2048 * 64
    assert run["flops_per_token"]["model"] == 6 * non_embedding + 12 * 2 * 64 * attended
    assert run["stages"][0]["flops"] == run["flops_per_token"]["model"]


def _weights_and_draw(folder: Path, seed: int) -> tuple[Any, float]:
    trainer = build_trainer(folder, f"--training.seed={seed}")
    trainer.close()
    return whole(trainer.built.model)["output.weight"], torch.rand(()).item()


def test_the_seed_decides_weights_and_generators(one_process: Workers, tmp_path: Path) -> None:
    first, second, again = (
        one_process.run(_weights_and_draw, tmp_path / str(i), seed)[0]
        for i, seed in enumerate((1, 2, 1))
    )
    assert (first[0] == again[0]).all()
    assert first[1] == again[1]
    assert (first[0] != second[0]).mean() > 0.99
    assert first[1] != second[1]


def test_documents_that_cannot_be_read_are_answered_before_the_first_step(
    one_process: Workers, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"ConfigError(.|\n)*data.text_field +\(comm"):
        one_process.run(train, tmp_path, "--data.text_field=txt")
