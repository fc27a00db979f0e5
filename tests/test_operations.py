"""Operations of an eager step, counted so that none creep back: each is a kernel to launch.

The bounds are what torchtitan 0.2.2 takes for the same model on a CPU, in bfloat16.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import Workers
from tests.runs import build_trainer
from titan_lite.config.schema import Model
from titan_lite.models.registry import resolve
from titan_lite.nn.build_model import build_model
from titan_lite.nn.token_context import NO_CONTEXT

VIEWS = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "expand"),
    *("narrow", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t"),
    *("transpose", "unbind", "unsqueeze", "view"),
}
SIZES = {"dim": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4}


class CountOperations(TorchDispatchMode):
    """Counts operations on plain tensors that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        name = op.overloadpacket.__name__
        self.names[name] += name not in VIEWS
        return op(*args, **(kwargs or {}))


def test_the_forward_of_a_block_takes_at_most_34_operations() -> None:
    model = build_model(*resolve(Model(**SIZES)))
    block = model.get_submodule("layers.0").bfloat16()
    with CountOperations() as counted:
        block(torch.randn(2, 256, 256, dtype=torch.bfloat16), NO_CONTEXT)
    assert counted.names.total() <= 34, counted.names


def _count_step(folder: Path) -> Counter[str]:
    trainer = build_trainer(
        folder,
        *(f"--model.{key}={value}" for key, value in SIZES.items()),
        "--training.seq_len=256",
        "--training.local_batch_size=2",
        "--training.global_batch_size=-1",
        "--training.param_dtype=bfloat16",
        "--metrics.log_freq=10",
    )
    # The first ones initialise FSDP2 and the optimizer, and log.
    trainer.train_step(1)
    trainer.train_step(2)
    with CountOperations() as counted:
        trainer.train_step(3)
    trainer.close()
    return counted.names


@pytest.mark.distributed
def test_a_step_takes_at_most_731_operations(workers: dict[int, Workers], tmp_path: Path) -> None:
    for names in workers[2].run(_count_step, tmp_path):
        assert names.total() <= 731, names
