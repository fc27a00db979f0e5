"""Muon: matrices step along their orthogonalized momentum, the same in every layout.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon; the adjusted learning rate is
Moonlight's (arXiv:2502.16982). Half of a matrix orthogonalized is not half of the orthogonalized
matrix: one rank works on the whole of it, another rank on the next.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_lite.optim.muon_exchange import Exchange, Matrix, Transfer, assign_owners, boxes

AdjustLR = Literal["match_rms_adamw", "original"]
# As torch.optim.Muon's: what a norm is divided by at least.
EPS = 1e-7
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrices: Tensor, coefficients: Sequence[float] = COEFFICIENTS, steps: int = 5
) -> Tensor:
    """Returns each of (..., rows, columns) with singular values near 1, by Newton-Schulz."""
    a, b, c = coefficients
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).reshape(-1, *sorted(matrices.shape[-2:]))
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


def lr_factor(shape: Sequence[int], adjust_lr: AdjustLR) -> float:
    """Returns the factor of the learning rate for matrices (..., rows, columns)."""
    rows, columns = shape[-2:]
    if adjust_lr == "original":
        return math.sqrt(max(1, rows / columns))
    # An update's root mean square is then 0.2, about that of AdamW's.
    return 0.2 * math.sqrt(max(rows, columns))


def by_block(name: str) -> str:
    """Returns a parameter's block: "layers.3" of "layers.3.attention.wq.weight"."""
    return ".".join(name.split(".")[:2])


@dataclass(frozen=True)
class Entry:
    """A parameter; its group's settings change, and are looked up in each step."""

    parameter: Tensor
    group: int
    shape: torch.Size


class Muon(torch.optim.Optimizer):
    """Steps matrices, or stacks of them, given as groups of named parameters.

    group: the ranks that have parts of every parameter; None: this rank has all of them.
    num_heads: of parameters whose rows are orthogonalized head by head, by name.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr: AdjustLR = "match_rms_adamw",
        ns_dtype: torch.dtype = torch.float32,
        ns_coefficients: Sequence[float] = COEFFICIENTS,
        ns_steps: int = 5,
        num_heads: Mapping[str, int] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.momentum, self.nesterov, self.adjust_lr = momentum, nesterov, adjust_lr
        self.ns_dtype, self.ns_coefficients, self.ns_steps = ns_dtype, ns_coefficients, ns_steps
        named: dict[str, Entry] = {}
        for number, settings in enumerate(self.param_groups):
            for name, parameter in zip(settings["param_names"], settings["params"], strict=True):
                heads = (num_heads or {}).get(name)
                shape = parameter.shape
                stack = (heads, shape[0] // heads, *shape[1:]) if heads else shape
                named[name] = Entry(parameter, number, torch.Size(stack))
                # Now and not later: ranks whose experts got no gradient have it as well.
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.local, self.buckets = self._plan(named, group)

    def _plan(
        self, named: dict[str, Entry], group: dist.ProcessGroup | None
    ) -> tuple[list[Entry], list[tuple[list[Entry], Exchange]]]:
        """Returns the parameters that need no exchange, and the others, block by block."""
        ranks = dist.get_process_group_ranks(group) if group is not None else [0]
        parts = {name: boxes(entry.parameter, ranks) for name, entry in named.items()}
        split = [
            name
            for name, entry in named.items()
            if len(ranks) > 1 and not _is_whole(entry.parameter, parts[name])
        ]
        local = [entry for name, entry in named.items() if name not in split]
        owners = assign_owners([named[name].shape for name in split], len(ranks))
        blocks: dict[str, list[tuple[Entry, Matrix]]] = defaultdict(list)
        for name, owner in zip(split, owners, strict=True):
            entry = named[name]
            matrix = Matrix(entry.parameter.shape, owner, parts[name])
            blocks[by_block(name)].append((entry, matrix))
        buckets = []
        for block in blocks.values():
            entries, matrices = zip(*block, strict=True)
            assert group is not None
            assert isinstance(entries[0].parameter, DTensor)
            device = torch.device(entries[0].parameter.device_mesh.device_type)
            buckets.append((list(entries), Exchange(matrices, group, self.ns_dtype, device)))
        return local, buckets

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        is_finite: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Divides gradients by `grad_scale` and steps, where `is_finite`; both scalars.

        The host does not wait: a step that is not finite computes, and leaves all as it was.
        """
        for entry in self.local:
            update = self._orthogonalize(self._direction(entry, is_finite, grad_scale), entry)
            self._apply(entry, update, is_finite)
        # A bucket's shards travel while the one before is worked on.
        pending: tuple[list[Entry], Exchange, Transfer] | None = None
        for entries, exchange in self.buckets:
            shards = [self._direction(entry, is_finite, grad_scale) for entry in entries]
            following = entries, exchange, exchange.gather(shards)
            if pending is not None:
                self._finish(*pending, is_finite)
            pending = following
        if pending is not None:
            self._finish(*pending, is_finite)

    def _finish(
        self,
        entries: list[Entry],
        exchange: Exchange,
        transfer: Transfer,
        is_finite: Tensor | None,
    ) -> None:
        owned = [
            entry
            for entry, matrix in zip(entries, exchange.matrices, strict=True)
            if matrix.owner == exchange.rank
        ]
        wholes = [
            self._orthogonalize(whole, entry)
            for whole, entry in zip(exchange.assemble(transfer), owned, strict=True)
        ]
        for entry, update in zip(entries, exchange.scatter(wholes), strict=True):
            self._apply(entry, update, is_finite)

    def _direction(
        self, entry: Entry, is_finite: Tensor | None, grad_scale: Tensor | None
    ) -> Tensor:
        """Updates the momentum of this rank's part, and returns what is to be orthogonalized."""
        parameter = entry.parameter
        average = _local(self.state[parameter]["momentum_buffer"])
        # A parameter without a gradient moves by its momentum.
        gradient = torch.zeros_like(average)
        if parameter.grad is not None:
            gradient = _local(parameter.grad)
        if grad_scale is not None:
            gradient = gradient / grad_scale
        _assign(average, average.lerp(gradient, 1 - self.momentum), is_finite)
        return gradient.lerp(average, self.momentum) if self.nesterov else average

    def _orthogonalize(self, whole: Tensor, entry: Entry) -> Tensor:
        # A stack of experts may be a part of all of them.
        stack = whole.view(entry.shape) if entry.shape != entry.parameter.shape else whole
        result = orthogonalize(stack.to(self.ns_dtype), self.ns_coefficients, self.ns_steps)
        return result.view_as(whole)

    def _apply(self, entry: Entry, update: Tensor, is_finite: Tensor | None) -> None:
        settings = self.param_groups[entry.group]
        lr, parameter = settings["lr"], _local(entry.parameter)
        decayed = parameter * (1 - lr * settings["weight_decay"])
        adjusted = lr * lr_factor(entry.shape, self.adjust_lr)
        stepped = decayed.add_(update.to(parameter), alpha=-adjusted)
        _assign(parameter, stepped, is_finite)


def _is_whole(parameter: Tensor, parts: Sequence[tuple[slice, ...]]) -> bool:
    """Returns whether every rank has whole matrices of a stack."""
    sides = [slice(0, size) for size in parameter.shape[-2:]]
    return parameter.ndim > 2 and all(list(part[-2:]) == sides for part in parts)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _assign(target: Tensor, value: Tensor, is_finite: Tensor | None) -> None:
    target.copy_(value if is_finite is None else torch.where(is_finite, value, target))
