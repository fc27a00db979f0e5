"""Every data-parallel layout trains the model that one process trains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import Workers
from tests.runs import train, train_and_gather

# float32 sums in another order differ by some 1e-7; 20 steps of training let that grow.
RELATIVE_TOLERANCE = 1e-5
# AdamW divides by gradients that are nearly zero, which magnifies their rounding.
TENSOR_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(one_process: Workers, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return one_process.run(train_and_gather, tmp_path_factory.mktemp("reference"))[0]


@pytest.fixture(scope="module")
def masked_reference(one_process: Workers, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return one_process.run(_train_masked, tmp_path_factory.mktemp("masked"), ())[0]


def _train_masked(folder: Path, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    return train(folder, *overrides, mask_labels=True)


def assert_same_curves(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in got] == list(range(1, 21))
    for key in ("loss", "grad_norm", "lr", "tokens"):
        np.testing.assert_allclose(
            [record[key] for record in got],
            [record[key] for record in expected],
            rtol=RELATIVE_TOLERANCE,
            err_msg=key,
        )


def assert_same_run(got: Any, reference: Any) -> None:
    """Of what `train_and_gather` returns: loss and norm of each step, gradients, weights."""
    records, tensors = got
    expected_records, expected_tensors = reference
    assert_same_curves(records, expected_records)
    for name, expected in expected_tensors["initial weights"].items():
        np.testing.assert_array_equal(tensors["initial weights"][name], expected, err_msg=name)
    for moment in ("gradients of step 1", "gradients of step 5", "final weights"):
        for name, expected in expected_tensors[moment].items():
            # Relative to the tensor's largest element: the smallest are sums that nearly cancel.
            np.testing.assert_allclose(
                tensors[moment][name],
                expected,
                rtol=0,
                atol=TENSOR_TOLERANCE * np.abs(expected).max(),
                err_msg=f"{moment}: {name}",
            )


TP2 = "parallel.tp=2"
LAYOUTS = {
    "tp 2": (2, [TP2]),
    "tp 2 without sequence parallel": (2, [TP2, "parallel.sequence_parallel=false"]),
    "tp 4, accumulation": (4, ["parallel.tp=4", "training.local_batch_size=4"]),
    "fsdp 2 x tp 2, full checkpointing": (
        4,
        [TP2, "training.local_batch_size=4", "activation_checkpoint.mode=full"],
    ),
    "hsdp 2x1 x tp 2, gradients synchronised once": (
        4,
        [
            TP2,
            "training.local_batch_size=1",
            "parallel.dp_replicate=2",
            "parallel.gradient_sync=last_micro_batch",
        ],
    ),
    "hsdp 2x2 x tp 2": (8, [TP2, "training.local_batch_size=2", "parallel.dp_replicate=2"]),
    "1 process, accumulation": (1, ["training.local_batch_size=2"]),
    "fsdp 2": (2, ["training.local_batch_size=4"]),
    "fsdp 2, accumulation": (2, ["training.local_batch_size=1"]),
    "hsdp 2x1": (2, ["training.local_batch_size=4", "parallel.dp_replicate=2"]),
    "fsdp 4": (4, ["training.local_batch_size=2"]),
    "fsdp 4, accumulation": (4, ["training.local_batch_size=1"]),
    "hsdp 2x2": (4, ["training.local_batch_size=2", "parallel.dp_replicate=2"]),
    "hsdp 2x2, accumulation": (4, ["training.local_batch_size=1", "parallel.dp_replicate=2"]),
    "fsdp 4, reshard always": (
        4,
        ["training.local_batch_size=2", "parallel.reshard_after_forward=always"],
    ),
    "fsdp 4, reshard never": (
        4,
        ["training.local_batch_size=2", "parallel.reshard_after_forward=never"],
    ),
    "fsdp 4, reshard to 2": (
        4,
        ["training.local_batch_size=2", "parallel.reshard_after_forward=2"],
    ),
    "fsdp 4, zero 1": (
        4,
        [
            "training.local_batch_size=1",
            "parallel.reshard_after_forward=never",
            "parallel.gradient_sync=last_micro_batch",
        ],
    ),
    "fsdp 2, cpu offload": (2, ["training.local_batch_size=4", "parallel.cpu_offload=true"]),
    "fsdp 2, full checkpointing, loss in one chunk": (
        2,
        [
            "training.local_batch_size=4",
            "activation_checkpoint.mode=full",
            "training.loss_chunks=1",
        ],
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_norm_gradients_and_weights_equal_one_process(
    layout: str, workers: dict[int, Workers], reference: Any, tmp_path: Path
) -> None:
    world_size, settings = LAYOUTS[layout]
    overrides = [f"--{setting}" for setting in settings]
    assert_same_run(workers[world_size].run(train_and_gather, tmp_path, *overrides)[0], reference)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, ["training.local_batch_size=4"]),
        (2, ["training.local_batch_size=2", "parallel.dp_replicate=2"]),
        (4, ["training.local_batch_size=1", "parallel.dp_replicate=2"]),
        (4, ["training.local_batch_size=2", TP2]),
    ],
)
def test_uneven_valid_tokens_per_rank_weigh_the_same_as_in_one_process(
    world_size: int,
    settings: list[str],
    workers: dict[int, Workers],
    masked_reference: Any,
    tmp_path: Path,
) -> None:
    overrides = tuple(f"--{setting}" for setting in settings)
    records = workers[world_size].run(_train_masked, tmp_path, overrides)[0]
    assert_same_curves(records, masked_reference)


@pytest.mark.distributed
def test_a_vocabulary_that_tp_does_not_divide_is_padded_with_rows_that_stay_zero(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    size = "--model.vocab_size=2049"
    expected_records, expected = workers[1].run(train_and_gather, tmp_path / "one", size)[0]
    records, tensors = workers[2].run(train_and_gather, tmp_path / "tp", size, f"--{TP2}")[0]
    assert_same_curves(records, expected_records)
    for name in ("tok_embeddings.weight", "output.weight"):
        assert expected["final weights"][name].shape[0] == 2049
        assert tensors["final weights"][name].shape[0] == 2050
        assert not tensors["final weights"][name][2049:].any()
