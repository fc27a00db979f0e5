"""Context parallelism: each rank has a part of each sequence; attention communicates.

All other modules work token by token, given the tokens' positions.

Shape suffixes: R ranks, B batch, N query heads, K key/value heads, S this rank's tokens, H head
dim.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_lite.nn.attention import Attention
from titan_lite.nn.document_attention import attend_in_documents
from titan_lite.nn.token_context import TokenContext
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel.attention_kernel import MergedKernel
from titan_lite.parallel.context_attention import sharded_attention
from titan_lite.runtime.collectives import all_gather_tensor_autograd, all_to_all_single_autograd

Method = Literal["ring", "all_gather", "ulysses"]


def local_positions(method: Method, seq_len: int, rank: int, size: int) -> Tensor:
    """Returns the positions in the sequence of a rank's tokens, in the rank's order.

    Contiguous for "ulysses", whose ranks all attend over the whole sequence. Otherwise a chunk from
    the start and one from the end, because later tokens attend to more, so that ranks have equal
    work.
    """
    if method == "ulysses":
        return torch.arange(seq_len).chunk(size)[rank]
    chunks = torch.arange(seq_len).tensor_split(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def check_cp(method: Method, device: torch.device, param_dtype: str) -> None:
    """Raises ValueError if the device has no attention kernel that returns its log-sum-exp."""
    if method != "ulysses" and device.type == "cuda" and param_dtype == "float32":
        raise ValueError(
            f'parallel.cp_method = "{method}" requires flash attention, which does not support '
            'training.param_dtype = "float32" on CUDA; set training.param_dtype = "bfloat16", or '
            'parallel.cp_method = "ulysses"'
        )


def apply_cp(
    model: Transformer,
    group: dist.ProcessGroup,
    method: Method,
    kernel: Callable[[int], MergedKernel],
) -> None:
    """Replaces the inner attention of every block, in place, by one over the ranks of `group`.

    kernel: head size -> kernel; not used by "ulysses".
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.inner_attention = (
                UlyssesAttention(module.inner_attention, group)
                if method == "ulysses"
                else ShardedAttention(method, group, kernel(module.head_size))
            )


def context_parallel(attention: Attention) -> tuple[Method, int] | None:
    """Returns method and number of ranks of a module's attention; None: not context parallel."""
    inner = attention.inner_attention
    if isinstance(inner, ShardedAttention | UlyssesAttention):
        return inner.method, inner.degree
    return None


class ShardedAttention(nn.Module):
    """Attention of this rank's queries to the keys of all ranks."""

    def __init__(self, method: Method, group: dist.ProcessGroup, kernel: MergedKernel) -> None:
        super().__init__()
        self.method = method
        self.kernel = kernel
        self.degree = group.size()
        self.group_name = group.group_name

    def forward(
        self, q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, context: TokenContext
    ) -> Tensor:
        if context.mask is not None:
            assert self.method == "all_gather"
            k_BKTH, v_BKTH = self._gather(torch.stack((k_BKSH, v_BKSH))).unbind()
            return attend_in_documents(q_BNSH, k_BKTH, v_BKTH, context.mask)
        out_BNSH: Tensor
        out_BNSH, _ = sharded_attention(
            q_BNSH, k_BKSH, v_BKSH, self.method, self.kernel, self.group_name
        )
        return out_BNSH

    def _gather(self, kv_2BKSH: Tensor) -> Tensor:
        """Gathers the keys and values of whole sequences, in order, from head and tail chunks."""
        kv_R2BKSH = all_gather_tensor_autograd(kv_2BKSH.unsqueeze(0), 0, self.group_name)
        heads, tails = kv_R2BKSH.chunk(2, dim=-2)
        return torch.cat((*heads.unbind(), *tails.flip(0).unbind()), dim=-2)


class UlyssesAttention(nn.Module):
    """Attention of some heads on each rank, over the whole sequence (arXiv:2309.14509)."""

    method: Method = "ulysses"

    def __init__(self, inner_attention: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.inner_attention = inner_attention
        self.degree = group.size()
        self.group_name = group.group_name

    def forward(
        self, q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, context: TokenContext
    ) -> Tensor:
        R = self.degree
        # Key/value heads are repeated so that their number is a multiple of the ranks.
        repeats = R // math.gcd(k_BKSH.shape[1], R)
        if repeats > 1:
            k_BKSH, v_BKSH = (t.repeat_interleave(repeats, dim=1) for t in (k_BKSH, v_BKSH))
        # One exchange for all three: each rank's heads of q, k and v side by side.
        parts = zip(*(tensor.chunk(R, dim=1) for tensor in (q_BNSH, k_BKSH, v_BKSH)), strict=True)
        heads = self._exchange([torch.cat(part, dim=1) for part in parts])
        sizes = [tensor.shape[1] // R for tensor in (q_BNSH, k_BKSH, v_BKSH)]
        q, k, v = torch.cat(heads, dim=2).split(sizes, dim=1)
        out = self.inner_attention(q, k, v, context)
        return torch.cat(self._exchange(out.chunk(R, dim=2)), dim=1)

    def _exchange(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Sends part i to rank i; returns what each rank sent here."""
        sent = torch.stack(tuple(parts))
        return all_to_all_single_autograd(sent, None, None, self.group_name).unbind()
