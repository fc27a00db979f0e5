"""Losses that spread tokens over experts, and counts of each expert's tokens.

A block's loss is not added to the loss of the model. An autograd function on the router's weights
adds its gradient (as in arXiv:2408.15664 and Megatron-LM) and counts the tokens, both in backward.
Backward runs once for each token, even with recomputation, and never in validation.

Shape suffixes: B sequences, T tokens, E experts, K experts of a token.
"""

from typing import Any

import torch
from torch import Tensor, nn

from titan_lite.models.args import MoEArgs


class NoBalanceLoss(nn.Module):
    """A loss of zero."""

    def forward(self, shares_TE: Tensor, counts_BE: Tensor, previous_load_E: Tensor) -> Tensor:
        return shares_TE.new_zeros(())


class SequenceBalanceLoss(nn.Module):
    """Sum over tokens and experts of a score's share, times its expert's load in the sequence.

    Source: arXiv:2412.19437, equations 17 to 20. `whole` returns counts of whole sequences if ranks
    have parts of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole: nn.Module = nn.Identity()

    def forward(self, shares_TE: Tensor, counts_BE: Tensor, previous_load_E: Tensor) -> Tensor:
        shares_BE = shares_TE.unflatten(0, (len(counts_BE), -1)).sum(1)
        return (shares_BE * relative_load(self.whole(counts_BE))).sum()


class LaggedBalanceLoss(nn.Module):
    """The same with the loads in the previous step's global batch (after arXiv:2501.11873)."""

    def forward(self, shares_TE: Tensor, counts_BE: Tensor, previous_load_E: Tensor) -> Tensor:
        return (shares_TE * previous_load_E).sum()


TINY = 1e-20
"""Added to sums of scores, because all sigmoids may be zero."""

LOSSES: dict[str, type[nn.Module]] = {
    "none": NoBalanceLoss,
    "sequence": SequenceBalanceLoss,
    "global_lagged": LaggedBalanceLoss,
}
"""Classes by the value of model.balance_loss."""


def relative_load(counts_E: Tensor) -> Tensor:
    """Tokens of each expert over their mean, in float32; zeros if there are no tokens."""
    mean = counts_E.sum(-1, keepdim=True).clamp(min=1) / counts_E.shape[-1]
    return (counts_E / mean).float()


class Balance(nn.Module):
    """Adds the balancing losses' gradients to a block's router, and counts tokens.

    counts_E: this device's tokens of each expert, int64. loss: their summed losses. Both accumulate
    until `clear`. previous_load_E: relative loads in the previous step. token_weight: factor of
    each token's loss.
    """

    counts_E: Tensor
    loss: Tensor
    previous_load_E: Tensor
    token_weight: Tensor

    def __init__(self, args: MoEArgs) -> None:
        super().__init__()
        self.num_experts = args.num_experts
        self.coeff = args.balance_coeff
        self.z_coeff = args.z_loss_coeff
        self.balance_loss = LOSSES[args.balance_loss]()
        self.init_buffers(None)

    def init_buffers(self, device: torch.device | str | None) -> None:
        """Sets the buffers to zeros on `device`; must be called again after a meta build."""
        E = self.num_experts
        buffers = {
            "counts_E": torch.zeros(E, dtype=torch.int64, device=device),
            "loss": torch.zeros((), device=device),
            "previous_load_E": torch.zeros(E, device=device),
            "token_weight": torch.zeros((), device=device),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def clear(self) -> None:
        """Resets counts and loss."""
        self.counts_E.zero_()
        self.loss.zero_()

    def forward(
        self,
        weights_TK: Tensor,
        logits_TE: Tensor,
        scores_TE: Tensor,
        chosen_TK: Tensor,
        num_sequences: int,
    ) -> Tensor:
        """Returns the weights unchanged."""
        is_chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
        counts_BE = is_chosen_TE.unflatten(0, (num_sequences, -1)).sum(1)
        shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + TINY)
        loss = self.coeff * self.balance_loss(shares_TE, counts_BE, self.previous_load_E)
        loss = loss + self.z_coeff * logits_TE.logsumexp(-1).square().sum()
        added = _AddLoss.apply(
            weights_TK, loss * self.token_weight, counts_BE.sum(0), self.loss, self.counts_E
        )
        result: Tensor = added
        return result


class _AddLoss(torch.autograd.Function):
    """Returns the weights; in backward, adds up the loss and gives it a gradient of one."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, loss: Tensor, counts: Tensor, sum_: Tensor, total: Tensor
    ) -> Tensor:
        ctx.save_for_backward(loss, counts)
        # Not by save_for_backward, whose tensors must not change before backward.
        ctx.sums = sum_, total
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        loss, counts = ctx.saved_tensors
        sum_, total = ctx.sums
        sum_.add_(loss)
        total.add_(counts)
        return grad, torch.ones_like(loss), None, None, None
