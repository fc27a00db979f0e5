"""Next-token cross-entropy, summed over the valid tokens, without ever holding the whole logits.

Shape suffixes: N tokens, n tokens of a chunk, D model width, V vocabulary (this rank's part of it).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default


def cross_entropy_sum(
    hidden: Tensor, weight_VD: Tensor, labels: Tensor, *, num_chunks: int, vocab_size: int
) -> Tensor:
    """Sum over the valid tokens of the cross-entropy of hidden @ weight.T, as a float32 scalar.

    hidden: (..., D), labels: (...), equal leading dims; a label of -100 is not counted. Rows of
    the weight from `vocab_size` on are padding. The tokens are cut into `num_chunks`; each chunk's
    logits (float32, N / num_chunks x V) live only while its loss and gradients are computed, all
    in the forward pass. A DTensor weight, split over the vocabulary, gives the same loss on each
    of its ranks: two all-reduces of n numbers a chunk (arXiv:1909.08053, section 3).
    """
    group, first_row = None, 0
    if isinstance(weight_VD, DTensor):
        mesh = weight_VD.device_mesh
        group = mesh.get_group()
        weight_VD = weight_VD.to_local()
        first_row = mesh.get_local_rank() * len(weight_VD)
        assert isinstance(hidden, DTensor)
        # A rank's part of the vocabulary gives a part of the sum that is this gradient.
        hidden = hidden.to_local(grad_placements=[Partial()])
    return _ChunkedLinearCrossEntropy.apply(
        hidden.flatten(0, -2),
        weight_VD,
        labels.flatten(),
        num_chunks,
        vocab_size - first_row,
        first_row,
        group,
    )


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        num_chunks: int,
        num_rows: int,
        first_row: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        need_grad = any(ctx.needs_input_grad)
        dtype = weight_VD.dtype
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        # All chunks share these buffers: fresh ones would cost the CPU more than the arithmetic.
        rows = -(-len(hidden_ND) // num_chunks)
        logits = weight_VD.new_empty(rows, len(weight_VD))
        log_probs = torch.empty_like(logits, dtype=torch.float32)
        if need_grad:
            grad_hidden_ND = torch.empty_like(hidden_ND)
            if num_chunks > 1:
                # float32, since bfloat16 sums over chunks would lose the small terms.
                grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for hidden_nD, labels_n, grad_hidden_nD in zip(
            hidden_ND.split(rows),
            labels_N.split(rows),
            (grad_hidden_ND if need_grad else hidden_ND).split(rows),
            strict=True,
        ):
            n = len(labels_n)
            logits_nV = torch.mm(hidden_nD, weight_VD.T, out=logits[:n])
            logits_nV[:, max(num_rows, 0) :] = -torch.inf
            log_probs_nV = _log_softmax(logits_nV, log_probs[:n], group)
            valid_n1 = (labels_n != IGNORE_INDEX).unsqueeze(1)
            target_n1 = labels_n.unsqueeze(1) - first_row
            here_n1 = valid_n1 & (target_n1 >= 0) & (target_n1 < len(weight_VD))
            target_n1 = target_n1.clamp(0, len(weight_VD) - 1)
            loss -= log_probs_nV.gather(1, target_n1).masked_fill(~here_n1, 0).sum()
            if need_grad:
                # d loss / d logits = softmax - one_hot, zero where the label is not counted.
                probs_nV = log_probs_nV.exp_()
                probs_nV.scatter_add_(1, target_n1, -here_n1.to(torch.float32))
                grad_nV = torch.mul(probs_nV, valid_n1, out=logits_nV)
                torch.mm(grad_nV, weight_VD, out=grad_hidden_nD)
                if num_chunks == 1:
                    grad_weight_VD = grad_nV.T @ hidden_nD
                elif dtype == torch.float32:
                    grad_weight_VD.addmm_(grad_nV.T, hidden_nD)
                else:
                    grad_weight_VD += grad_nV.T @ hidden_nD
        if group is not None:
            dist.all_reduce(loss, group=group)
        if need_grad:
            ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        # In place: these two are the largest gradients of the model, and used once.
        return grad_hidden_ND.mul_(grad_loss), grad_weight_VD.mul_(grad_loss), *(None,) * 5


def _log_softmax(logits_nV: Tensor, out_nV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """float32 log-softmax over the whole vocabulary, this rank's columns of it, into out_nV."""
    if group is None:
        return torch.log_softmax(logits_nV, 1, torch.float32, out=out_nV)
    out_nV.copy_(logits_nV)
    max_n1 = out_nV.amax(1, keepdim=True)
    dist.all_reduce(max_n1, op=dist.ReduceOp.MAX, group=group)
    sum_n1 = out_nV.sub_(max_n1).exp().sum(1, keepdim=True)
    dist.all_reduce(sum_n1, group=group)
    return out_nV.sub_(sum_n1.log_())
