"""Cross-entropy summed over the labelled tokens, computed in chunks of the logits.

Shape suffixes: N tokens, n tokens of a chunk, M labelled tokens, B pairs, 2 classes of a
pair, D model width, V vocabulary (this rank's part of it), P ranks whose logits are gathered.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional

from titan_lite.config.schema import auto_loss_chunks
from titan_lite.data.packing import IGNORED
from titan_lite.runtime.collectives import all_gather_single, traceable_all_reduce

# Device types whose matmul can add a product of 16-bit matrices to a float32 sum.
ACCUMULATING_DEVICES = ("cuda",)


def cross_entropy_sum(
    hidden: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    *,
    labels: Tensor,
    num_chunks: int | str,
    vocab_size: int,
    labelled_indices: Tensor | None = None,
    factor: Tensor | None = None,
    loss_parallel: bool = True,
    compile: bool = False,
    source_ids: Tensor | None = None,
    source_losses: Tensor | None = None,
) -> Tensor:
    """Returns the cross-entropy of hidden @ weight.T + bias, summed over tokens: a float32 scalar.

    hidden: (..., D). labels: (...), the same leading dims; -100: the token has no label.
    weight_VD: rows with index `vocab_size` or higher are padding. It may be a DTensor split over
    the vocabulary; then all ranks of its mesh return the same loss.
    num_chunks: the tokens are cut into this many chunks ("auto": see training.loss_chunks). The
    logits of a chunk (N / num_chunks x V, in the weight's dtype; without `compile` also in float32)
    exist only while its loss and its gradients are computed, both in the forward pass.
    labelled_indices: int64 (M,), indices of flattened tokens; only these are computed. The chunk
    size stays as for all tokens, so there are fewer chunks.
    factor: a scalar that multiplies the sum. The gradients of the logits are multiplied by it in
    float32.
    loss_parallel: for a DTensor weight, True runs two all-reduces of n numbers per chunk
    (arXiv:1909.08053, section 3), False one all-gather of the chunk's logits.
    compile: compiles the operations between a chunk's matmuls into one graph.
    source_ids: int64, in the labels' shape: the data source of each token. source_losses: float32,
    one element per source, to which its summed loss is added, without `factor`. With a split
    vocabulary, only the losses of labels in this rank's part are added.
    """
    tp_group, first_row = None, 0
    if isinstance(weight_VD, DTensor):
        mesh = weight_VD.device_mesh
        tp_group = mesh.get_group()
        weight_VD = weight_VD.to_local()
        bias_V = bias_V.to_local() if isinstance(bias_V, DTensor) else bias_V
        first_row = mesh.get_local_rank() * len(weight_VD)
        assert isinstance(hidden, DTensor)
        # Each rank computes the part of the gradient that comes from its part of the vocabulary.
        hidden = hidden.to_local(grad_placements=[Partial()])
    if not torch.is_grad_enabled():
        # ctx.needs_input_grad is True under no_grad, too, unless the tensors are detached.
        hidden, weight_VD = hidden.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    hidden_ND, labels_N = hidden.flatten(0, -2), labels.flatten()
    source_ids_N = None if source_ids is None else source_ids.flatten()
    if isinstance(num_chunks, str):
        num_chunks = auto_loss_chunks(len(hidden_ND) * len(weight_VD) * 4)
    chunk_size = math.ceil(len(hidden_ND) / num_chunks)
    if labelled_indices is not None:
        hidden_ND, labels_N = hidden_ND[labelled_indices], labels_N[labelled_indices]
        source_ids_N = None if source_ids_N is None else source_ids_N[labelled_indices]
    return _ChunkedLinearCrossEntropy.apply(
        hidden_ND,
        weight_VD,
        bias_V,
        labels_N,
        torch.ones((), device=hidden.device) if factor is None else factor,
        chunk_size,
        vocab_size - first_row,
        first_row,
        tp_group,
        loss_parallel,
        _compiled(any_size=labelled_indices is not None) if compile else None,
        source_ids_N,
        source_losses,
    )


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        factor: Tensor,
        chunk_size: int,
        first_pad_row: int,
        first_row: int,
        tp_group: dist.ProcessGroup | None,
        loss_parallel: bool,
        logits_to_gradients: Callable[..., Tensor] | None,
        source_ids_N: Tensor | None,
        source_losses: Tensor | None,
    ) -> Tensor:
        need_grad = any(ctx.needs_input_grad)
        dtype, V = weight_VD.dtype, len(weight_VD)
        # For each token: the row of its label in this rank's part of the weight; 1.0 if this part
        # has that row, else 0.0; the factor of its loss.
        is_labelled_N = labels_N != IGNORED
        is_here_N, target_N = is_labelled_N, labels_N
        if tp_group is not None:
            target_N = labels_N - first_row
            is_here_N = is_labelled_N & (target_N >= 0) & (target_N < V)
        per_token_N1 = (
            target_N.clamp(0, V - 1).unsqueeze(1),
            is_here_N.to(torch.float32).unsqueeze(1),
            (is_labelled_N * factor).unsqueeze(1),
        )
        # All chunks share these buffers: on a CPU, allocating costs more than the arithmetic.
        logits = weight_VD.new_empty(min(chunk_size, len(hidden_ND)), V)
        if logits_to_gradients is None:
            log_probs = torch.empty_like(logits, dtype=torch.float32)
            logits_to_gradients = functools.partial(_logits_to_gradients, log_probs)
        if need_grad:
            grad_hidden_ND = torch.empty_like(hidden_ND)
            # float32, since sums over chunks in bfloat16 would lose small terms.
            if chunk_size < len(hidden_ND):
                grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
            grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        label_log_probs = []
        for hidden_nD, grad_hidden_nD, *per_token_n1 in zip(
            hidden_ND.split(chunk_size),
            (grad_hidden_ND if need_grad else hidden_ND).split(chunk_size),
            *(tensor_N1.split(chunk_size) for tensor_N1 in per_token_N1),
            strict=True,
        ):
            out_nV = logits[: len(hidden_nD)]
            if bias_V is None:
                logits_nV = torch.mm(hidden_nD, weight_VD.T, out=out_nV)
            else:
                logits_nV = torch.addmm(bias_V, hidden_nD, weight_VD.T, out=out_nV)
            # Overwrites logits_nV with the gradients of the logits.
            label_log_probs.append(
                logits_to_gradients(
                    logits_nV, *per_token_n1, first_pad_row, tp_group, loss_parallel
                )
            )
            if need_grad:
                grad_nV = logits_nV
                # Writes into grad_hidden_ND, of which grad_hidden_nD is a view.
                torch.mm(grad_nV, weight_VD, out=grad_hidden_nD)
                if grad_bias_V is not None:
                    grad_bias_V += grad_nV.sum(0, dtype=torch.float32)
                if chunk_size >= len(hidden_ND):
                    grad_weight_VD = grad_nV.T @ hidden_nD
                else:
                    _add_matmul(grad_weight_VD, grad_nV.T, hidden_nD)
        # torch.where, not a product with is_here_N: a label in another rank's part was clamped to a
        # row of this part. If that row is padding, its log-probability is -inf, and 0 * -inf = NaN.
        log_probs_N = torch.where(is_here_N, torch.cat(label_log_probs).squeeze(1), 0)
        loss = log_probs_N.sum() * -factor
        if source_ids_N is not None and source_losses is not None:
            source_losses.index_add_(0, source_ids_N, log_probs_N, alpha=-1)
        if tp_group is not None:
            dist.all_reduce(loss, group=tp_group)
        if need_grad:
            grad_bias_V = None if grad_bias_V is None else grad_bias_V.to(dtype)
            ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(dtype), grad_bias_V)
            ctx.is_scaled = False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        # Multiplied in place, because these are the largest gradients of the model. Some pipeline
        # schedules call backward twice; the second call must not multiply them again.
        if not ctx.is_scaled:
            for grad in filter(lambda grad: grad is not None, grads):
                grad.data.mul_(grad_loss)  # .data, or autograd would reject the second backward.
            ctx.is_scaled = True
        return *grads, *(None,) * 10


def _add_matmul(sum_VD: Tensor, a_Vn: Tensor, b_nD: Tensor) -> None:
    """Adds a @ b to a float32 sum, inside the matmul where torch supports it."""
    if a_Vn.dtype == torch.float32:
        sum_VD.addmm_(a_Vn, b_nD)
    elif sum_VD.device.type in ACCUMULATING_DEVICES:
        torch.addmm(sum_VD, a_Vn, b_nD, out_dtype=torch.float32, out=sum_VD)
    else:
        sum_VD += a_Vn @ b_nD


def _logits_to_gradients(
    log_probs: Tensor,
    logits_nV: Tensor,
    target_n1: Tensor,
    is_here_n1: Tensor,
    factor_n1: Tensor,
    first_pad_row: int,
    tp_group: dist.ProcessGroup | None,
    loss_parallel: bool,
) -> Tensor:
    """Overwrites a chunk's logits with their gradients; returns its targets' log-probabilities.

    The result is (n, 1). log_probs: a buffer. target: the label's row among this rank's rows;
    arbitrary where is_here is 0. is_here: 1.0 where the label is one of this rank's rows, else 0.0.
    factor: of each token's loss. first_pad_row: index of the first padding row in this
    rank's part; 0 or negative if the whole part is padding.
    """
    log_probs_nV = log_probs[: len(logits_nV)]
    if first_pad_row < logits_nV.shape[1]:
        logits_nV[:, max(first_pad_row, 0) :] = -torch.inf
    if tp_group is None:
        torch.log_softmax(logits_nV, 1, torch.float32, out=log_probs_nV)
    else:
        log_probs_nV.copy_(logits_nV)
        max_n1, sum_n1 = _max_and_sum(log_probs_nV, tp_group, loss_parallel)
        log_probs_nV.sub_(max_n1).sub_(sum_n1.log())
    label_log_probs_n1 = log_probs_nV.gather(1, target_n1)
    # d loss / d logits = factor * (softmax - one_hot).
    probs_nV = log_probs_nV.exp_().scatter_add_(1, target_n1, -is_here_n1)
    torch.mul(probs_nV, factor_n1, out=logits_nV)
    return label_log_probs_n1


def _max_and_sum(
    logits_nV: Tensor, tp_group: dist.ProcessGroup | None, loss_parallel: bool
) -> tuple[Tensor, Tensor]:
    """Returns the largest logit m and the sum of exp(logit - m), over the whole vocabulary."""
    parts_PnV = logits_nV.unsqueeze(0)
    if tp_group is not None and not loss_parallel:
        parts_PnV = logits_nV.new_empty(tp_group.size(), *logits_nV.shape)
        all_gather_single(parts_PnV.flatten(0, 1), logits_nV, tp_group)
        tp_group = None
    max_n1 = parts_PnV.amax((0, 2)).unsqueeze(1)
    if tp_group is not None:
        max_n1 = traceable_all_reduce(max_n1, "max", tp_group)
    sum_n1 = (parts_PnV - max_n1).exp().sum((0, 2)).unsqueeze(1)
    if tp_group is not None:
        sum_n1 = traceable_all_reduce(sum_n1, "sum", tp_group)
    return max_n1, sum_n1


@functools.cache
def _compiled(any_size: bool) -> Callable[..., Tensor]:
    # With static shapes, a shorter last chunk compiles a second graph. Shapes are dynamic only with
    # labelled_indices: their number, and so the size of the last chunk, differs between
    # micro-batches.
    return torch.compile(_logits_to_gradients_in_one_graph, fullgraph=True, dynamic=any_size)


def _logits_to_gradients_in_one_graph(
    logits_nV: Tensor,
    target_n1: Tensor,
    is_here_n1: Tensor,
    factor_n1: Tensor,
    first_pad_row: int,
    tp_group: dist.ProcessGroup | None,
    loss_parallel: bool,
) -> Tensor:
    """`_logits_to_gradients` for the compiler, which fuses it: no float32 logits are stored."""
    column_V = torch.arange(logits_nV.shape[1], device=logits_nV.device)
    is_target_nV = column_V == target_n1
    wide_nV = logits_nV.float().masked_fill(column_V >= first_pad_row, -torch.inf)
    max_n1, sum_n1 = _max_and_sum(wide_nV, tp_group, loss_parallel)
    log_probs_nV = wide_nV - max_n1 - sum_n1.log()
    label_log_probs_n1 = log_probs_nV.masked_fill(~is_target_nV, 0).sum(1, keepdim=True)
    logits_nV.copy_((log_probs_nV.exp() - is_target_nV * is_here_n1) * factor_n1)
    return label_log_probs_n1


def pair_cross_entropy_sum(
    logits_B2: Tensor, *, labels: Tensor, factor: Tensor, sums: Tensor
) -> Tensor:
    """Returns the cross-entropy summed over pairs, times `factor`, as a float32 scalar.

    labels: (B,), -100: the pair has no label. sums: (2,), float32 or float64. Adds the sum without
    `factor` to sums[0], and the number of correctly classified pairs to sums[1].
    """
    loss = functional.cross_entropy(
        logits_B2.float(), labels, ignore_index=IGNORED, reduction="sum"
    )
    sums += torch.stack([loss.detach(), (logits_B2.argmax(1) == labels).sum()])
    return loss * factor
