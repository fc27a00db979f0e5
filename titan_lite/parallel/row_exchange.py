"""Exchanges rows between the ranks of experts, by operators that a compiled block can contain.

The number of received rows is known only at run time. To the compiler it is a size without a value,
so that one graph serves every number.

Shape suffixes: P ranks, L experts of this rank, R rows before the exchange, X after it, D width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_lite.runtime.collectives import group_by_name
from titan_lite.runtime.readback import Readback

_pending: dict[int, Readback] = {}
"""Unfinished copies to the host, by the address of their numbers."""


@torch.library.custom_op("titan_lite::start_row_counts", mutates_args=())
def start_row_counts(leaving_PL: Tensor, arriving_PL: Tensor) -> Tensor:
    """Returns (2, P) on the host: the rows sent to and received from each rank.

    The numbers are valid after `num_arriving`, which waits for them.
    """
    readback = Readback(torch.stack((leaving_PL.sum(1), arriving_PL.sum(1))))
    _pending[readback.copy.data_ptr()] = readback
    return readback.copy


@torch.library.custom_op("titan_lite::num_arriving", mutates_args=())
def num_arriving(rows_2P: Tensor) -> int:
    """Waits for the numbers of rows, and returns how many this rank receives."""
    readback = _pending.pop(rows_2P.data_ptr(), None)
    if readback is not None:
        readback.read()
    return sum(rows_2P[1].tolist())


@torch.library.custom_op("titan_lite::all_to_all_rows", mutates_args=())
def all_to_all_rows(
    x_RD: Tensor, rows_2P: Tensor, back: bool, arriving: int, group_name: str
) -> Tensor:
    """Returns (X, D): `arriving` rows in order of ranks. `back`: returns rows to their ranks."""
    sent, received = rows_2P.flip(0).tolist() if back else rows_2P.tolist()
    out_XD = x_RD.new_empty(arriving, x_RD.shape[1])
    group = group_by_name(group_name)  # type: ignore[arg-type]
    dist.all_to_all_single(out_XD, x_RD.contiguous(), received, sent, group=group)
    return out_XD


@start_row_counts.register_fake
def _(leaving_PL: Tensor, arriving_PL: Tensor) -> Tensor:
    return arriving_PL.new_empty(2, arriving_PL.shape[0], device="cpu")


@num_arriving.register_fake
def _(rows_2P: Tensor) -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


@all_to_all_rows.register_fake
def _(x_RD: Tensor, rows_2P: Tensor, back: bool, arriving: int, group_name: str) -> Tensor:
    return x_RD.new_empty(arriving, x_RD.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RD, rows_2P, ctx.back, _, ctx.group_name = inputs
    ctx.num_rows = x_RD.shape[0]
    ctx.save_for_backward(rows_2P)


def _backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None, None, None, None]:
    (rows_2P,) = ctx.saved_tensors
    grad_RD = all_to_all_rows(grad_XD, rows_2P, not ctx.back, ctx.num_rows, ctx.group_name)
    return grad_RD, None, None, None, None


all_to_all_rows.register_autograd(_backward, setup_context=_save)
