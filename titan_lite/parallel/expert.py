"""Expert parallelism: each rank has some of the experts, and applies them to the rows of all ranks.

Shape suffixes: R rows of this rank's tokens, ordered by expert; E experts, L of them on this rank;
P ranks; X rows that this rank's experts receive from all ranks; D model width.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from titan_lite.nn.balance import SequenceBalanceLoss
from titan_lite.nn.moe import Experts, MoE, Take
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel.row_exchange import all_to_all_rows, num_arriving, start_row_counts
from titan_lite.parallel.tensor import distribute_parameters
from titan_lite.runtime.collectives import all_to_all_single_autograd, traceable_all_reduce
from titan_lite.runtime.shards import to_local


def apply_ep(model: Transformer, mesh: DeviceMesh) -> None:
    """Distributes the experts of each block over the ranks of `mesh`, by their numbers."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.exchange = RowExchange(mesh.get_group())
        if isinstance(module, Experts):
            distribute_parameters(module, mesh, Shard(0))
            module.compute = ExpertParallel(module.compute, mesh.get_group())


class RowExchange(nn.Module):
    """Exchanges the numbers of rows between ranks, and starts their copy to the host."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.degree = group.size()
        self.group_name = group.group_name

    def forward(self, ends_E: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows for each of this rank's experts from each rank, (P, L), and on the host
        the rows sent to and received from each rank, (2, P)."""
        counts_PL = ends_E.diff(prepend=ends_E.new_zeros(1)).view(self.degree, -1)
        arriving_PL = all_to_all_single_autograd(counts_PL, None, None, self.group_name)
        return arriving_PL, start_row_counts(counts_PL, arriving_PL)


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

    def forward(self, x_RD: Tensor, groups: tuple[Tensor, Tensor], *weights: Tensor) -> Tensor:
        """groups: the result of RowExchange."""
        arriving_PL, rows_2P = groups
        num_rows = x_RD.shape[0]
        received = self.num_received(rows_2P, num_rows)
        x_XD = all_to_all_rows(x_RD, rows_2P, False, received, self.group_name)
        expert_X = torch.arange(arriving_PL.shape[1], device=x_XD.device).repeat(self.degree)
        expert_X = expert_X.repeat_interleave(arriving_PL.flatten(), output_size=received)
        order_X = expert_X.argsort(stable=True)
        back_X = order_X.argsort()
        ends_L = arriving_PL.sum(0).cumsum(0).to(torch.int32)
        own = [to_local(weight) for weight in weights]
        out_XD = self.compute(Take.apply(x_XD, order_X, back_X), ends_L, *own)
        out_XD = Take.apply(out_XD, back_X, order_X)
        return all_to_all_rows(out_XD, rows_2P, True, num_rows, self.group_name)

    def num_received(self, rows_2P: Tensor, num_rows: int) -> int:
        """Returns how many rows this rank receives; `num_rows`: how many it sends."""
        return num_arriving(rows_2P)


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
            module.num_received = _balanced  # type: ignore[assignment, method-assign]


def _balanced(_: Tensor, num_rows: int) -> int:
    return num_rows
