"""Expert parallelism: each rank has some of the experts, and applies them to the rows of all ranks.

Shape suffixes: R rows of this rank's tokens, ordered by expert; E experts, L of them on this rank;
P ranks; X rows that this rank's experts receive from all ranks; D model width.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from titan_lite.nn.balance import SequenceBalanceLoss
from titan_lite.nn.moe import Experts, MoE, Take
from titan_lite.nn.transformer import Transformer
from titan_lite.runtime.collectives import all_to_all_single_autograd, traceable_all_reduce
from titan_lite.runtime.readback import Readback


def apply_ep(model: Transformer, mesh: DeviceMesh) -> None:
    """Distributes the experts of each block over the ranks of `mesh`, by their numbers."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.exchange = RowExchange(mesh.get_group())
        if isinstance(module, Experts):
            for name, weight in list(module.named_parameters()):
                shard = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(shard))
            module.compute = ExpertParallel(module.compute, mesh.get_group())


class RowExchange(nn.Module):
    """Exchanges the numbers of rows between ranks, and starts their copy to the host."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.degree = group.size()
        self.group_name = group.group_name

    def forward(self, ends_E: Tensor) -> tuple[Tensor, Readback]:
        """Returns the rows for each of this rank's experts from each rank, (P, L), and the rows
        sent to and received from each rank."""
        counts_PL = ends_E.diff(prepend=ends_E.new_zeros(1)).view(self.degree, -1)
        arriving_PL = all_to_all_single_autograd(counts_PL, None, None, self.group_name)
        rows = torch.stack((counts_PL.sum(1), arriving_PL.sum(1)))
        return arriving_PL, Readback(rows)


class ExpertParallel(nn.Module):
    """Sends each row to the rank that has its expert, and the results back: two all-to-alls.

    An expert's rows are ordered by rank, then by token. The host waits once per forward for the
    numbers of rows.
    """

    def __init__(self, compute: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.compute = compute
        self.degree = group.size()
        self.group_name = group.group_name

    def forward(self, x_RD: Tensor, groups: tuple[Tensor, Readback], *weights: Tensor) -> Tensor:
        """groups: the result of RowExchange."""
        arriving_PL, rows = groups
        sent, received = self.row_counts(rows, x_RD.shape[0])
        x_XD = self._exchange(x_RD, received, sent)
        expert_X = torch.arange(arriving_PL.shape[1], device=x_XD.device).repeat(self.degree)
        expert_X = expert_X.repeat_interleave(arriving_PL.flatten(), output_size=x_XD.shape[0])
        order_X = expert_X.argsort(stable=True)
        back_X = order_X.argsort()
        ends_L = arriving_PL.sum(0).cumsum(0).to(torch.int32)
        own = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
        out_XD = self.compute(Take.apply(x_XD, order_X, back_X), ends_L, *own)
        return self._exchange(Take.apply(out_XD, back_X, order_X), sent, received)

    def row_counts(self, rows: Readback, num_rows: int) -> tuple[list[int], list[int]]:
        """Returns the rows that this rank sends to, and receives from, each rank."""
        sent, received = rows.read()
        return sent, received

    def _exchange(self, rows: Tensor, arriving: list[int], leaving: list[int]) -> Tensor:
        return all_to_all_single_autograd(rows, arriving, leaving, self.group_name)


def apply_whole_counts(model: Transformer, groups: Sequence[dist.ProcessGroup]) -> None:
    """Makes balancing losses over sequences use counts of all ranks in `groups`."""
    for module in model.modules():
        if isinstance(module, SequenceBalanceLoss):
            module.whole = WholeCounts(groups)


class WholeCounts(nn.Module):
    """Sums counts over ranks."""

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, counts_BE: Tensor) -> Tensor:
        for group in self.groups:
            counts_BE = traceable_all_reduce(counts_BE, "sum", group)
        return counts_BE


def expert_parallel(module: nn.Module) -> int | None:
    """Returns the number of ranks of a module's experts; None: not expert parallel."""
    compute = module.compute if isinstance(module, Experts) else None
    return compute.degree if isinstance(compute, ExpertParallel) else None


def assume_balance(model: nn.Module) -> None:
    """Assigns every rank the same number of rows, for dry runs, which have no routing."""
    for module in model.modules():
        if isinstance(module, ExpertParallel):
            module.row_counts = partial(_balanced, module.degree)  # type: ignore[method-assign]


def _balanced(degree: int, _rows: Readback, num_rows: int) -> tuple[list[int], list[int]]:
    each = [num_rows // degree + (rank < num_rows % degree) for rank in range(degree)]
    return each, each
