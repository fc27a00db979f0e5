"""Muon: updates matrices by their orthogonalized momentum, the same in every layout.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon; the adjusted learning rate is
Moonlight's (arXiv:2502.16982). Parts of a matrix cannot be orthogonalized separately: one rank
gathers the whole matrix and orthogonalizes it, and the matrices are distributed over the ranks.
"""

import fnmatch
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_lite.config.optimizers import Muon as Section
from titan_lite.config.problems import SettingError
from titan_lite.models.roles import MATRIX_KINDS
from titan_lite.optim.muon_exchange import Exchange, Matrix, Transfer, assign_owners, boxes
from titan_lite.optim.nonfinite import DeviceGuardedOptimizer, step_if
from titan_lite.optim.optimizer import OptimizerContext, Parameter, adam, torch_groups, with_state
from titan_lite.runtime.shards import to_local

# The smallest norm that a matrix is divided by, as in torch.optim.Muon.
EPS = 1e-7
# Parameters whose rows belong to attention heads.
HEADS = "*.attention.w[qkv].weight"


def build_muon(
    section: Section, parameters: Sequence[Parameter], context: OptimizerContext
) -> torch.optim.Optimizer:
    """Builds one optimizer, with its state: Muon for the matrices, and AdamW for the rest."""
    matrices: list[Parameter] = []
    rest: list[Parameter] = []
    for p in parameters:
        is_matrix = p.algorithm == "muon" or (not p.algorithm and p.kind in MATRIX_KINDS)
        (matrices if is_matrix else rest).append(p)
        if is_matrix and p.tensor.ndim < 2:
            raise SettingError(
                "optimizer.groups",
                f'algorithm "muon" requires matrices, but {p.name} has {p.tensor.ndim} dim: '
                'set algorithm = "adamw" for it',
            )
    ns_dtype = section.ns_dtype
    if ns_dtype == "auto":
        ns_dtype = "float32" if context.param_dtype == torch.float32 else "bfloat16"
    muon = Muon(
        torch_groups(matrices),
        {p.tensor: p.name for p in matrices},
        section,
        ns_dtype=getattr(torch, ns_dtype),
        head_size=context.args.head_size if section.per_head else None,
        ranks=context.ranks,
        adamw=adam(section, rest) if rest else None,
    )
    return with_state(muon)


def orthogonalize(matrices: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """Orthogonalizes matrices (..., rows, columns) by Newton-Schulz: singular values near 1."""
    a, b, c = coefficients
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).reshape(-1, *sorted(matrices.shape[-2:]))
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


def lr_factor(shape: Sequence[int], adjust_lr: str) -> float:
    """Returns the factor of the learning rate for matrices (..., rows, columns)."""
    rows, columns = shape[-2:]
    if adjust_lr == "original":
        return math.sqrt(max(1, rows / columns))
    # The root mean square of an update is then 0.2, close to AdamW's.
    return 0.2 * math.sqrt(max(rows, columns))


def by_block(name: str) -> str:
    """Returns a parameter's block: "layers.3" of "layers.3.attention.wq.weight"."""
    return ".".join(name.split(".")[:2])


@dataclass(frozen=True)
class Entry:
    """A parameter with the index of its group, whose settings change from step to step."""

    parameter: Tensor
    group: int
    shape: torch.Size


class Muon(DeviceGuardedOptimizer):
    """Muon for the matrices, or stacks of matrices, of `groups`; `adamw` for other parameters.

    names: of the matrices. head_size: rows of a head of queries, keys and values, if each head is
    a separate matrix. ranks: the group of ranks that shard the matrices; None: not sharded.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        names: Mapping[Tensor, str],
        section: Section,
        *,
        ns_dtype: torch.dtype = torch.float32,
        head_size: int | None = None,
        ranks: dist.ProcessGroup | None = None,
        adamw: torch.optim.Optimizer | None = None,
    ) -> None:
        others = [] if adamw is None else adamw.param_groups
        super().__init__([*groups, *others], {"lr": section.lr})
        self.section, self.ns_dtype, self.adamw = section, ns_dtype, adamw
        self.num_groups = len(groups)
        named: dict[str, Entry] = {}
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                name, shape = names[parameter], parameter.shape
                if head_size is not None and fnmatch.fnmatchcase(name, HEADS):
                    shape = torch.Size((shape[0] // head_size, head_size, *shape[1:]))
                named[name] = Entry(parameter, number, shape)
        self.local, self.buckets = self._plan(named, ranks)

    def _plan(
        self, named: dict[str, Entry], group: dist.ProcessGroup | None
    ) -> tuple[list[Entry], list[tuple[list[Entry], Exchange]]]:
        """Returns the parameters that are whole on this rank, and the sharded ones by block."""
        rank, num_ranks = 0, 1
        if group is not None:
            rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        parts = {name: boxes(entry.parameter, rank, num_ranks) for name, entry in named.items()}
        split = [
            name
            for name, entry in named.items()
            if num_ranks > 1 and not _is_whole(entry.parameter, parts[name])
        ]
        local = [entry for name, entry in named.items() if name not in split]
        owners = assign_owners([named[name].shape for name in split], num_ranks)
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
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Runs one step; a non-finite step computes and communicates, but changes nothing."""
        if self.adamw is not None:
            # Loading a checkpoint replaces these objects.
            self.adamw.param_groups = self.param_groups[self.num_groups :]
            self.adamw.state = self.state
            if self.is_finite is None:
                self.adamw.step()
            else:
                step_if(self.adamw, self.is_finite, self.divisor)
        for entry in self.local:
            self._apply(entry, self._orthogonalize(self._direction(entry), entry))
        # A bucket's shards are sent while the previous bucket is orthogonalized.
        pending: tuple[list[Entry], Exchange, Transfer] | None = None
        for entries, exchange in self.buckets:
            shards = [self._direction(entry) for entry in entries]
            following = entries, exchange, exchange.gather(shards)
            if pending is not None:
                self._finish(*pending)
            pending = following
        if pending is not None:
            self._finish(*pending)

    def _finish(self, entries: list[Entry], exchange: Exchange, transfer: Transfer) -> None:
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
            self._apply(entry, update)

    def _direction(self, entry: Entry) -> Tensor:
        """Updates the momentum of this rank's part, and returns the update to orthogonalize."""
        parameter = entry.parameter
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = to_local(state["momentum_buffer"])
        # A parameter without a gradient is updated by its momentum.
        gradient = torch.zeros_like(average)
        if parameter.grad is not None:
            gradient = to_local(parameter.grad)
        if self.divisor is not None:
            gradient = gradient / self.divisor
        momentum = self.section.momentum
        self.assign(average, average.lerp(gradient, 1 - momentum))
        return gradient.lerp(average, momentum) if self.section.nesterov else average

    def _orthogonalize(self, whole: Tensor, entry: Entry) -> Tensor:
        # A stack may have only this rank's experts.
        stack = whole.view(entry.shape) if entry.shape != entry.parameter.shape else whole
        section = self.section
        result = orthogonalize(stack.to(self.ns_dtype), section.ns_coefficients, section.ns_steps)
        return result.view_as(whole)

    def _apply(self, entry: Entry, update: Tensor) -> None:
        settings = self.param_groups[entry.group]
        lr, parameter = settings["lr"], to_local(entry.parameter)
        decayed = parameter * (1 - lr * settings["weight_decay"])
        adjusted = lr * lr_factor(entry.shape, self.section.adjust_lr)
        stepped = decayed.add_(update.to(parameter), alpha=-adjusted)
        self.assign(parameter, stepped)


def _is_whole(parameter: Tensor, parts: Sequence[tuple[slice, ...]]) -> bool:
    """Returns whether the ranks split a stack only between its matrices."""
    sides = [slice(0, size) for size in parameter.shape[-2:]]
    return parameter.ndim > 2 and all(list(part[-2:]) == sides for part in parts)
