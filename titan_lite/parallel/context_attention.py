"""Causal attention over a sequence that is sharded over the ranks of a group, as one operator.

Rank r has two of 2R chunks, the head chunk r and the tail chunk 2R - 1 - r, so that all ranks have
equal work. Attention to another rank's keys is one call without a mask. For an earlier rank, all
queries attend to its head chunk and none to its tail chunk. For a later rank, the queries of the
tail chunk attend to all its keys, and those of the head chunk to none (arXiv:2310.01889,
2310.03294). The results are merged by their log-sum-exp, in float32. There is no S x S mask.

It is an operator of torch.library, so that the compiler does not split it, and so that activation
checkpointing can keep its result without repeating the communication.

Shape suffixes: R ranks, B batch, N query heads, K key/value heads, S this rank's tokens, T any
number of them, H head dim; kv_2BKSH is keys and values stacked.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from titan_lite.parallel.attention_ops import (
    CPU_FLASH,
    CPU_FLASH_BACKWARD,
    CUDNN,
    CUDNN_BACKWARD,
    FLASH,
    FLASH_BACKWARD,
)
from titan_lite.runtime.collectives import all_gather_single, group_by_name, reduce_scatter_single

# The queries that attend to a piece, its keys and values, and True if attention is causal.
Piece = tuple[slice, Tensor, bool]


@torch.library.custom_op("titan_lite::sharded_attention", mutates_args=())
def sharded_attention(
    q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, method: str, kernel: str, group_name: str
) -> tuple[Tensor, Tensor]:
    """This rank's rows of softmax(q k / sqrt(H)) v, and their log-sum-exp (B, N, S) in float32.

    method "ring": keys and values move around the ring during attention to those already received.
    "all_gather": all are gathered at once, during attention to this rank's own. kernel: "flash" or
    "cudnn".
    """
    group = group_by_name(group_name)  # type: ignore[arg-type]
    pieces = PIECES[method](torch.stack((k_BKSH, v_BKSH)), group)
    # This rank's own keys come first; every query attends to some of them.
    _, kv_2BKTH, is_causal = next(pieces)
    out_BNSH, lse_BNS = _attend(q_BNSH, kv_2BKTH, is_causal, kernel)
    out_BNSH, lse_BNS = out_BNSH.float(), lse_BNS.contiguous()
    for rows, kv_2BKTH, is_causal in pieces:
        piece_out, piece_lse = _attend(q_BNSH[:, :, rows], kv_2BKTH, is_causal, kernel)
        lse = lse_BNS[:, :, rows]
        weight = torch.sigmoid(piece_lse - lse).unsqueeze(-1)
        out_BNSH[:, :, rows].lerp_(piece_out.float(), weight)
        lse.copy_(torch.logaddexp(lse, piece_lse))
    return _token_major(out_BNSH, q_BNSH.dtype), lse_BNS


@torch.library.custom_op("titan_lite::sharded_attention_backward", mutates_args=())
def sharded_attention_backward(
    grad_BNSH: Tensor,
    q_BNSH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    out_BNSH: Tensor,
    lse_BNS: Tensor,
    method: str,
    kernel: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; those of k and v are summed over ranks in float32.

    Keys and values are communicated again, because keeping them would need memory for the whole
    sequence.
    """
    group = group_by_name(group_name)  # type: ignore[arg-type]
    pieces = PIECES[method](torch.stack((k_BKSH, v_BKSH)), group)
    grad_q_BNSH = torch.zeros_like(q_BNSH, dtype=torch.float32)

    def grads() -> Iterator[list[Tensor]]:
        for rows, kv_2BKTH, is_causal in pieces:
            grad_q, *grad_kv = _attend_backward(
                grad_BNSH[:, :, rows],
                q_BNSH[:, :, rows],
                kv_2BKTH,
                out_BNSH[:, :, rows],
                # Some kernels assume that it is contiguous.
                lse_BNS[:, :, rows].contiguous(),
                is_causal,
                kernel,
            )
            grad_q_BNSH[:, :, rows] += grad_q
            yield grad_kv

    grad_k_BKSH, grad_v_BKSH = SUMS[method](
        grads(), k_BKSH.new_zeros(2, *k_BKSH.shape, dtype=torch.float32), group
    )
    return (
        _token_major(grad_q_BNSH, q_BNSH.dtype),
        _token_major(grad_k_BKSH, k_BKSH.dtype),
        _token_major(grad_v_BKSH, v_BKSH.dtype),
    )


@sharded_attention.register_fake
def _(q_BNSH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_BNS = q_BNSH.new_empty(q_BNSH.shape[:3], dtype=torch.float32)
    return _token_major(q_BNSH, q_BNSH.dtype), lse_BNS


@sharded_attention_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_token_major(tensor, tensor.dtype) for tensor in inputs[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, ctx.method, ctx.kernel, ctx.group_name = inputs
    ctx.save_for_backward(*qkv, *output)


def _backward(ctx: Any, grad_BNSH: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    settings = ctx.method, ctx.kernel, ctx.group_name
    return *sharded_attention_backward(grad_BNSH, *ctx.saved_tensors, *settings), None, None, None


sharded_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.titan_lite.sharded_attention)
def _flops(q: list[int], k: list[int], _v: Any, *settings: str, **_: Any) -> int:
    """Counts two matmuls with all keys, as torch does: the mask is not subtracted."""
    group = group_by_name(settings[-1])  # type: ignore[arg-type]
    return 4 * math.prod(q) * k[2] * group.size()


@register_flop_formula(torch.ops.titan_lite.sharded_attention_backward)
def _backward_flops(_grad: Any, q: list[int], k: list[int], v: Any, *args: Any, **_: Any) -> int:
    """Counts five matmuls; forward has two."""
    return _flops(q, k, v, args[-1]) * 5 // 2


def _ring(kv_2BKSH: Tensor, group: dist.ProcessGroup) -> Iterator[Piece]:
    """Yields the keys and values of each rank, and forwards them before they are used."""
    rank, size = group.rank(), group.size()
    S = kv_2BKSH.shape[-2]
    for step in range(size):
        if step < size - 1:
            receive = _pass_on(kv_2BKSH, group)
        source = (rank - step) % size
        if source == rank:
            # Local causality is correct, because the head chunk precedes the tail chunk.
            yield slice(None), kv_2BKSH, True
        elif source < rank:
            yield slice(None), kv_2BKSH[..., : S // 2, :], False
        else:
            yield slice(S // 2, None), kv_2BKSH, False
        if step < size - 1:
            kv_2BKSH = receive()


def _sum_along_ring(
    grads: Iterator[list[Tensor]], sum_2BKSH: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Sums gradients around the ring, one step after their keys; a last step returns them."""
    receive = None
    for grad_kv in grads:
        if receive is not None:
            sum_2BKSH = receive()
        for sum_BKSH, grad_BKTH in zip(sum_2BKSH, grad_kv, strict=True):
            sum_BKSH[..., : grad_BKTH.shape[-2], :] += grad_BKTH
        receive = _pass_on(sum_2BKSH, group)
    assert receive is not None
    return receive()


def _pass_on(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Starts sending to the next rank; returns a function that receives from the previous one."""
    rank, size = group.rank(), group.size()
    received = torch.empty_like(tensor)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
        ]
    )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait


def _gathered(kv_2BKSH: Tensor, group: dist.ProcessGroup) -> Iterator[Piece]:
    """Yields this rank's keys, then those of all earlier ranks, then of all later ranks."""
    kv_R2BKSH = kv_2BKSH.new_empty(group.size(), *kv_2BKSH.shape)
    work = all_gather_single(kv_R2BKSH.flatten(0, 1), kv_2BKSH, group=group, async_op=True)
    yield slice(None), kv_2BKSH, True
    work.wait()
    for rows, others in _others(kv_R2BKSH, group.rank()):
        yield rows, others.movedim(0, -3).flatten(-3, -2), False


def _sum_scattered(
    grads: Iterator[list[Tensor]], sum_2BKSH: Tensor, group: dist.ProcessGroup
) -> Tensor:
    sums_R2BKSH = sum_2BKSH.new_zeros(group.size(), *sum_2BKSH.shape)
    own, others = sums_R2BKSH[group.rank()], _others(sums_R2BKSH, group.rank())
    for part_BKSH, grad_BKSH in zip(own, next(grads), strict=True):
        part_BKSH.copy_(grad_BKSH)
    for (_, parts_R2BKTH), grad_kv in zip(others, grads, strict=True):
        for parts_RBKTH, grad in zip(parts_R2BKTH.unbind(1), grad_kv, strict=True):
            parts_RBKTH.copy_(grad.unflatten(-2, (len(parts_RBKTH), -1)).movedim(-3, 0))
    reduce_scatter_single(sum_2BKSH, sums_R2BKSH.flatten(0, 1), group=group)
    return sum_2BKSH


def _others(shards_R2BKSH: Tensor, rank: int) -> list[tuple[slice, Tensor]]:
    """Returns non-empty views of other ranks' keys with the rows of queries that attend to them."""
    half = shards_R2BKSH.shape[-2] // 2
    views = (
        (slice(None), shards_R2BKSH[:rank, ..., :half, :]),
        (slice(half, None), shards_R2BKSH[rank + 1 :]),
    )
    return [(rows, view) for rows, view in views if len(view) > 0]


PIECES = {"ring": _ring, "all_gather": _gathered}
SUMS = {"ring": _sum_along_ring, "all_gather": _sum_scattered}


def _attend(
    q_BNSH: Tensor, kv_2BKTH: Tensor, is_causal: bool, kernel: str
) -> tuple[Tensor, Tensor]:
    k_BKTH, v_BKTH = kv_2BKTH
    if kernel == "cudnn":
        # Without a bias, and with the log-sum-exp.
        out_BNSH, lse_BNS1, *_ = CUDNN(q_BNSH, k_BKTH, v_BKTH, None, True, is_causal=is_causal)
        return out_BNSH, lse_BNS1.squeeze(-1)
    flash = CPU_FLASH if q_BNSH.device.type == "cpu" else FLASH
    out_BNSH, lse_BNS, *_ = flash(q_BNSH, k_BKTH, v_BKTH, is_causal=is_causal)
    return out_BNSH, lse_BNS


def _attend_backward(
    grad_BNSH: Tensor,
    q_BNSH: Tensor,
    kv_2BKTH: Tensor,
    out_BNSH: Tensor,
    lse_BNS: Tensor,
    is_causal: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of one piece, from the output and log-sum-exp over all keys."""
    k_BKTH, v_BKTH = kv_2BKTH
    saved = (grad_BNSH, q_BNSH, k_BKTH, v_BKTH, out_BNSH)
    # No sequences of different lengths. The random state below is unused: there is no dropout.
    lengths = (None, None, q_BNSH.shape[2], k_BKTH.shape[2])
    if kernel == "cudnn":
        state = [q_BNSH.new_empty((), dtype=torch.int64) for _ in range(2)]
        return CUDNN_BACKWARD(*saved, lse_BNS.unsqueeze(-1), *state, None, *lengths, 0.0, is_causal)
    if q_BNSH.device.type == "cpu":
        return CPU_FLASH_BACKWARD(*saved, lse_BNS, 0.0, is_causal)
    state = [q_BNSH.new_empty(size, dtype=torch.uint64) for size in ((2,), ())]
    return FLASH_BACKWARD(*saved, lse_BNS, *lengths, 0.0, is_causal, *state)


def _token_major(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies to (B, heads, S, H) with the memory layout (B, S, heads, H) of the projections."""
    by_token = tensor.transpose(1, 2)
    copy = torch.empty(by_token.shape, dtype=dtype, device=tensor.device)
    return copy.copy_(by_token).transpose(1, 2)
