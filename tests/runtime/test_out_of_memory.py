"""Out of memory: reported with numbers and remedies, and raised."""

import logging
import re
from pathlib import Path

import pytest
import torch

from tests.distributed import Workers
from tests.runs import build_trainer
from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import load_config
from titan_lite.config.memory_advice import memory_advice
from titan_lite.models.plan import make_plan


def _out_of_memory(folder: Path, *overrides: str) -> str:
    """Returns the log of a step that runs out of memory; the error must be raised."""
    trainer = build_trainer(folder, *overrides)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titan_lite.training.trainer").addHandler(handler)

    def forward(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")

    trainer.built.model.forward = forward  # type: ignore[assignment, method-assign]
    try:
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()
    finally:
        logging.getLogger("titan_lite.training.trainer").removeHandler(handler)
        trainer.close()
    return records[-1]


def test_out_of_memory_is_told_with_the_cheapest_ways_out_and_raised(
    one_process: Workers, tmp_path: Path
) -> None:
    (message,) = one_process.run(_out_of_memory, tmp_path, "--training.loss_chunks=2")
    assert message.startswith("Out of memory on cpu for a request of 2.50 GiB.")
    keys = [line.split(" = ")[0].strip() for line in message.splitlines()[2:]]
    assert keys == [
        "training.loss_chunks",
        "activation_checkpoint.mode",
        "training.local_batch_size",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["parallel.dp_replicate=2", "parallel.gradient_sync=last_micro_batch"],
            ["parallel.gradient_sync", "parallel.dp_replicate", "activation_checkpoint.mode"],
        ),
        (
            ["parallel.tp=2", "parallel.sequence_parallel=false", "training.seq_len=8192"],
            ["parallel.sequence_parallel", "activation_checkpoint.mode", "parallel.reshard_after"],
        ),
        (
            ["activation_checkpoint.mode=full", "parallel.reshard_after_forward=always"],
            ["more devices", "parallel.cpu_offload", "a smaller training.seq_len"],
        ),
    ],
)
def test_advice_on_memory_is_what_this_run_does_not_do_yet(
    overrides: list[str], expected: list[str]
) -> None:
    loaded = load_config(None, [f"--{override}" for override in overrides])
    advice = memory_advice(loaded.config, ParallelDims.resolve(loaded.config.parallel, 8))
    for line, start in zip(advice, expected, strict=True):
        assert line.startswith(start)


def test_advice_on_a_known_device_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_lite.training import trainer

    plan = make_plan(None, ["--model.flavor=llama3_8b", "--training.local_batch_size=8"], 8)
    device = torch.device("cpu")
    monkeypatch.setattr(trainer, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    advice = trainer.advise_on_memory(plan, device)
    assert advice
    for line in advice:
        assert re.fullmatch(r"--.*: [\d.]+ of 80 GiB, predicted", line)
    monkeypatch.setattr(trainer, "device_name", lambda device: "a processor")
    fixed = trainer.advise_on_memory(plan, device)
    assert fixed == memory_advice(plan.config, plan.dims)


def _out_of_memory_on_gpu(folder: Path) -> tuple[str, str]:
    trainer = build_trainer(folder)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("titan_lite.training.trainer").addHandler(handler)
    trainer.built.model.register_forward_pre_hook(lambda *_: torch.empty(1 << 50, device="cuda"))
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    logging.getLogger("titan_lite.training.trainer").removeHandler(handler)
    trainer.close()
    return messages[-1], str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_without_memory_is_told_with_its_numbers(
    gpu_workers: dict[int, Workers], tmp_path: Path
) -> None:
    ((message, _),) = gpu_workers[1].run(_out_of_memory_on_gpu, tmp_path)
    assert message.startswith("Out of memory on cuda:0 for a request of 1048576.00 GiB.")
    for label in ("allocated ", "reserved ", "free on the device ", "total "):
        assert f"  {label}" in message
