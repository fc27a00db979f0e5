"""Expert load: counts tokens per expert over the global batch, and updates the router biases.

Counts are integers, so they and everything computed from them are the same in every layout.
Shape suffixes: L blocks, E experts, R ranks of ep.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_lite.models.args import MoEArgs
from titan_lite.nn.balance import relative_load
from titan_lite.nn.moe import Router
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel.mesh import Meshes
from titan_lite.runtime.distributed import all_reduce


class Balancer:
    """Counts the tokens of each expert in a step, and updates the routers' biases and loads.

    model: this rank's blocks. num_tokens: tokens in the global batch. counts_LE: int64, tokens per
    block and expert in the last applied step; zeros for dense blocks.
    """

    def __init__(
        self,
        model: Transformer,
        args: MoEArgs,
        meshes: Meshes,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        self.meshes, self.num_tokens, self.bias_rate = meshes, num_tokens, args.bias_rate
        self.device = device
        self.dense_layers = args.dense_layers
        self.routers: dict[int, Router] = {
            int(name): module
            for name, block in model.layers.items()
            for module in block.modules()
            if isinstance(module, Router)
        }
        shape = args.num_layers, args.num_experts
        self.counts_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        self.loss_scale: Tensor | None = None
        self.loss_L = torch.zeros(args.num_layers, device=device)

    def start_step(self, loss_scale: Tensor | None) -> None:
        """Sets each token's weight in the balancing loss, and clears the last step's counts.

        loss_scale: factor of the losses in float16 training, or None.
        """
        self.loss_scale = loss_scale
        for router in self.routers.values():
            balance = router.balance
            balance.clear()
            balance.token_weight.fill_(1 / self.num_tokens)
            if loss_scale is not None:
                balance.token_weight.mul_(loss_scale)

    @torch.no_grad()
    def update(self, _step: int, is_applied: Tensor) -> None:
        """Sums counts over ranks; updates biases and loads if the step was applied; collective."""
        counts_LE = torch.zeros_like(self.counts_LE)
        loss_L = torch.zeros_like(self.loss_L)
        for layer, router in self.routers.items():
            counts_LE[layer] = router.balance.counts_E
            loss_L[layer] = router.balance.loss
        if self.loss_scale is not None:
            loss_L /= self.loss_scale
        for tensor in (counts_LE, loss_L):
            dist.all_reduce(tensor, group=self.meshes.stage)
            if self.meshes.pp is not None:
                dist.all_reduce(tensor, group=self.meshes.pp)
        self.loss_L = loss_L
        is_applied = is_applied.to(self.device)
        self.counts_LE = torch.where(is_applied, counts_LE, self.counts_LE)
        self._set_loads()
        # The sign of mean - count. Both are multiplied by the number of experts, to be integers.
        sign_LE = (counts_LE.sum(1, keepdim=True) - counts_LE * counts_LE.shape[1]).sign()
        for layer, router in self.routers.items():
            if router.bias is not None:
                router.bias += torch.where(is_applied, self.bias_rate * sign_LE[layer], 0.0)

    def _set_loads(self) -> None:
        for layer, router in self.routers.items():
            router.balance.previous_load_E.copy_(relative_load(self.counts_LE[layer]))

    def metrics(self) -> dict[str, Any]:
        """Returns metrics, overall and per block with experts; collective.

        The counts are those of the last applied step.
        """
        counts_LE = self.counts_LE[self.dense_layers :].double()
        load_LE = counts_LE / counts_LE.mean(1, keepdim=True).clamp(min=1)
        shares_LE = load_LE / counts_LE.shape[1]
        entropy_L = torch.special.entr(shares_LE).sum(1) / torch.log(
            torch.tensor(counts_LE.shape[1], dtype=torch.float64)
        )
        load_max_L = load_LE.amax(1)
        unused_L = (counts_LE == 0).sum(1)
        biases = [r.bias.abs().max() for r in self.routers.values() if r.bias is not None]
        overall: dict[str, Any] = {
            "moe/load_max": load_max_L.max().item(),
            "moe/unused_experts": unused_L.sum().item(),
            "moe/entropy": entropy_L.mean().item(),
            "moe/balance_loss": self.loss_L.sum().item(),
        }
        if (ranks := self.meshes.ep) is not None:
            load_LR = load_LE.view(len(load_LE), ranks.size(), -1).mean(2)
            overall["moe/rank_load_max"] = load_LR.max().item()
        if self.bias_rate:
            largest = torch.stack(biases).max() if biases else torch.zeros((), device=self.device)
            overall["moe/max_bias"] = all_reduce(largest, "max").item()
        per_layer = {"load_max": load_max_L, "unused_experts": unused_L, "entropy": entropy_L}
        per_layer["balance_loss"] = self.loss_L[self.dense_layers :]
        return overall | {f"moe/{name}_per_layer": t.tolist() for name, t in per_layer.items()}

    def state_dict(self) -> list[list[int]]:
        """Returns the counts, which are the same on all ranks."""
        counts: list[list[int]] = self.counts_LE.tolist()
        return counts

    def load_state_dict(self, state: list[list[int]]) -> None:
        """Restores the counts of a checkpoint."""
        self.counts_LE.copy_(torch.tensor(state))
        self._set_loads()
