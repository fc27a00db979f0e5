"""Mixture of Experts: a router chooses feed-forwards for each token; no token is dropped.

Shape suffixes: B batch, S sequence, D model width, H expert width, T = B x S tokens, E experts,
K experts of a token, R = T x K rows, one for each expert of each token, G groups of experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

from titan_lite.models.args import MoEArgs
from titan_lite.nn.balance import TINY, Balance
from titan_lite.nn.grouped_matmul import grouped_matmul


class Router(nn.Module):
    """Chooses the experts of each token, and their weights, in float32."""

    def __init__(self, args: MoEArgs) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(args.num_experts, args.dim))
        # Tensor parallel sums gradients from each rank's tokens here.
        self.copy = nn.Identity()
        self.top_k = args.top_k
        self.score = args.score
        self.groups, self.kept_groups = args.groups, args.kept_groups
        self.route_norm, self.route_scale = args.route_norm, args.route_scale
        self.balance = Balance(args)
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(args.num_experts) if args.route_bias else None)

    def init_buffers(self, device: torch.device | str) -> None:
        """Sets the bias to zero on `device`; must be called again after a meta build."""
        if self.bias is not None:
            self.bias = torch.zeros(self.bias.shape, device=device)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weights (T, K) and the numbers (T, K) of the experts, best first."""
        logits_TE = linear(x_BSD.flatten(0, 1).float(), self.copy(self.weight).float())
        scores_TE = logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
        chosen_TK = self._choose(logits_TE.detach(), scores_TE.detach())
        weights_TK = scores_TE.gather(1, chosen_TK)
        if self.route_norm:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
        weights_TK = weights_TK * self.route_scale
        weights_TK = self.balance(weights_TK, logits_TE, scores_TE, chosen_TK, len(x_BSD))
        return weights_TK, chosen_TK

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """Chooses experts; the first of several with equal scores, on every device."""
        if self.bias is not None:
            scores_TE = scores_TE + self.bias
        elif self.groups == 1:
            # Fewer logits than scores are equal.
            scores_TE = logits_TE
        if self.groups > 1:
            scores_TGx = scores_TE.unflatten(1, (self.groups, -1))
            sums_TG = scores_TGx.topk(2).values.sum(-1)
            dropped = sums_TG.sort(descending=True, stable=True).indices[:, self.kept_groups :]
            is_dropped_TG = torch.zeros_like(sums_TG, dtype=torch.bool).scatter(1, dropped, True)
            scores_TE = scores_TGx.masked_fill(is_dropped_TG[..., None], -torch.inf).flatten(1)
        ranked_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
        return ranked_TE.indices[:, : self.top_k]


class GroupedSwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) of each row, with the weights of its expert."""

    def forward(
        self, x_RD: Tensor, ends_E: Tensor, w1_EHD: Tensor, w2_EDH: Tensor, w3_EHD: Tensor
    ) -> Tensor:
        """ends_E: int32, the index after each expert's last row."""
        gate_RH = silu(grouped_matmul(x_RD, w1_EHD, ends_E))
        h_RH = gate_RH * grouped_matmul(x_RD, w3_EHD, ends_E)
        return grouped_matmul(h_RH, w2_EDH, ends_E)


class Experts(nn.Module):
    """The weights of a block's experts around `compute`.

    `compute` has no weights; expert parallel replaces it.
    """

    def __init__(self, args: MoEArgs) -> None:
        super().__init__()
        E, D, H = args.num_experts, args.dim, args.ffn_dim
        self.w1 = nn.Parameter(torch.empty(E, H, D))
        self.w2 = nn.Parameter(torch.empty(E, D, H))
        self.w3 = nn.Parameter(torch.empty(E, H, D))
        self.compute: nn.Module = GroupedSwiGLU()

    def forward(self, x_RD: Tensor, groups: Any) -> Tensor:
        """groups: assigns rows to experts, in the form that `compute` takes."""
        out_RD: Tensor = self.compute(x_RD, groups, self.w1, self.w2, self.w3)
        return out_RD


class MoE(nn.Module):
    """Sums the outputs of each token's experts, by the router's weights, and of the shared ones.

    shared: one feed-forward for all shared experts, which every token uses.
    """

    def __init__(self, args: MoEArgs, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.num_experts = args.num_experts
        self.router = Router(args)
        # Expert parallel exchanges the numbers of rows here, while the device continues.
        self.exchange: nn.Module = nn.Identity()
        self.experts = Experts(args)
        self.shared = shared

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        weights_TK, chosen_TK = self.router(x_BSD)
        sorted_R, order_R = chosen_TK.flatten().sort(stable=True)
        places_TK = order_R.argsort().view_as(chosen_TK)
        numbers_E = torch.arange(self.num_experts, device=x_TD.device)
        ends_E = torch.searchsorted(sorted_R, numbers_E, right=True, out_int32=True)
        groups = self.exchange(ends_E)
        x_RD = Take.apply(x_TD, order_R // chosen_TK.shape[1], places_TK)
        shared_BSD = None if self.shared is None else self.shared(x_BSD)
        out_RD = self.experts(x_RD, groups)
        out_TKD = Take.apply(out_RD, places_TK, order_R) * weights_TK.unsqueeze(-1)
        out_BSD = out_TKD.sum(1).type_as(x_BSD).view_as(x_BSD)
        return out_BSD if shared_BSD is None else out_BSD + shared_BSD


class Take(torch.autograd.Function):
    """x[rows]; its backward sums gathered rows in a fixed order, so it is deterministic.

    places: for each row of x, its indices in the flattened output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        taken = grad.flatten(0, -2)[places]
        return (taken.sum(1) if places.ndim > 1 else taken), None, None
