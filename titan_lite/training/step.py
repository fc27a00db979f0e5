"""One optimizer step: forward and backward, the global gradient norm, clipping, the update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from titan_lite.config.schema import Parallel
from titan_lite.data.loader import Batch
from titan_lite.nn.transformer import Transformer
from titan_lite.optim.ema import WeightAverage
from titan_lite.optim.nonfinite import NonFiniteGuard
from titan_lite.optim.optimizer import set_lr
from titan_lite.parallel.float8 import refresh_scales
from titan_lite.parallel.fsdp import free_gathered, set_gradient_sync
from titan_lite.parallel.gradients import GradNorm, clipped_norm
from titan_lite.parallel.mesh import Meshes
from titan_lite.parallel.pipeline import Pipeline, add_tied_gradients
from titan_lite.runtime.progress import Progress
from titan_lite.training.balancing import Balancer
from titan_lite.training.inputs import LossTerms, ModelInputs

StepHook = Callable[[int, Tensor], None]
"""Called on every rank with a step's number, and whether it was applied: a bool on the device."""


@dataclass(frozen=True)
class Counts:
    """Counts of the global batch: int64 tensors on the device, the same on all ranks.

    source_labelled: tokens with a label (not -100), one element per entry of data.sources, or one
    in total. num_pairs: pairs with a label. num_tokens: tokens as the objective counts them.
    num_stopping: ranks that have received a stop signal.
    """

    source_labelled: Tensor
    num_pairs: Tensor
    num_tokens: Tensor
    num_stopping: Tensor


@dataclass(frozen=True)
class StepResult:
    """Tensors on the device, which the host reads later.

    All except source_losses are the same on all ranks.
    loss: mean over the global batch. sums: the objective's sums besides the token loss.
    grad_norm: global, before clipping. is_finite: a bool, True if loss and norm are finite.
    source_losses: one element per entry of data.sources, its loss summed over this rank's tokens.
    """

    loss: Tensor
    sums: Tensor
    grad_norm: Tensor
    is_finite: Tensor
    counts: Counts
    source_losses: Tensor | None


@dataclass(kw_only=True, eq=False)
class TrainStep:
    """One optimizer step over micro-batches; collective.

    The host waits for the device only in blocks with experts if parallel.ep > 1, if parameters are
    offloaded to the CPU, and with optimizers for which `step_if` waits.

    pipeline: runs the stages; None if `model` itself is called. max_norm: the gradient norm to clip
    to; 0 does not clip.
    """

    inputs: ModelInputs
    model: Transformer
    pipeline: Pipeline | None
    meshes: Meshes
    parallel: Parallel
    optimizer: torch.optim.Optimizer
    guard: NonFiniteGuard
    max_norm: float
    progress: Progress
    average: WeightAverage | None
    balancer: Balancer | None
    has_float8_all_gather: bool
    step_hooks: list[StepHook] = field(init=False)

    def __post_init__(self) -> None:
        self.step_hooks = [lambda *_: self.refresh_float8_scales()]
        self.step_hooks += [part.update for part in (self.average, self.balancer) if part]

    def __call__(self, batches: Sequence[Batch], lr: float, *, stop: bool = False) -> StepResult:
        """Runs one step.

        batches: this rank's micro-batches, whole sequences on the host. lr: this step's learning
        rate. stop: True if this rank has received a stop signal; the result has the number of such
        ranks.
        """
        self.progress.enter("forward")
        micro_batches = [self.inputs.split_for_cp(batch) for batch in batches]
        counts = self._count(micro_batches, stop)
        loss_scale = self.guard.scale
        if loss_scale is not None:
            loss_scale = loss_scale.to(self.inputs.device)
        terms = self._loss_terms(counts, loss_scale)
        if self.balancer is not None:
            self.balancer.start_step(loss_scale)
        local_loss = self.forward_backward(micro_batches, terms)
        if loss_scale is not None:
            local_loss /= loss_scale
        self.progress.enter("optimizer")
        loss_and_sums = self._sum_over_ranks(local_loss, terms)
        loss, sums = loss_and_sums[0], loss_and_sums[1:]
        norm = self._norm(loss_scale)
        is_finite = self.guard.is_finite(loss, norm.total)
        self._update(norm, lr, is_finite)
        return StepResult(loss, sums, norm.total, is_finite, counts, terms.source_losses)

    def _count(self, micro_batches: Sequence[Batch], stop: bool) -> Counts:
        """Counts the global batch and the ranks that have received a stop signal; collective."""
        counted = torch.stack([self.inputs.count(batch) for batch in micro_batches]).sum(0)
        counts = self.inputs.to_device(torch.cat([counted, torch.tensor([int(stop)])]))
        dist.all_reduce(counts)
        # The all-reduce is over all ranks. The tensor and pipeline parallel ranks of a batch all
        # count the same tokens: divide by their number. The last count, of stopping ranks, is not
        # divided: each rank counts once.
        counts[:-1] //= dist.get_world_size() // dist.get_world_size(self.meshes.loss)
        return Counts(counts[:-3], *counts[-3:])

    def _loss_terms(self, counts: Counts, loss_scale: Tensor | None) -> LossTerms:
        """Returns this step's loss terms.

        The factors are loss_scale / labelled tokens and loss_scale / labelled pairs of the global
        batch. So each token has the same weight, in whatever micro-batch or rank it is.
        """
        divisors = torch.stack((counts.source_labelled.sum(), counts.num_pairs)).clamp(min=1)
        factors = divisors.to(torch.float32).reciprocal()
        return self.inputs.loss_terms(factors if loss_scale is None else factors * loss_scale)

    def forward_backward(self, micro_batches: Sequence[Batch], terms: LossTerms) -> Tensor:
        """Adds up the gradients of all micro-batches; returns this rank's part of the loss."""
        loss = torch.zeros((), device=self.inputs.device)
        if self.pipeline is not None:
            at_once = self.pipeline.num_micro_batches
            for first in range(0, len(micro_batches), at_once):
                batches = micro_batches[first : first + at_once]
                calls = [self.inputs.arguments(batch, terms) for batch in batches]
                for micro_loss in self.pipeline.step(calls):
                    loss += micro_loss
            return loss
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            set_gradient_sync(self.model, self.meshes, self.parallel, last=last)
            inputs, kwargs = self.inputs.arguments(batch, terms)
            self.progress.enter("forward")
            micro_loss = self.model(inputs, **kwargs)
            self.progress.enter("backward")
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def _sum_over_ranks(self, loss: Tensor, terms: LossTerms) -> Tensor:
        """Returns the loss, then the objective's sums, each summed over all ranks; collective."""
        loss_and_sums = torch.cat([loss.unsqueeze(0), terms.sums])
        dist.all_reduce(loss_and_sums, group=self.meshes.loss)
        if self.meshes.pp is not None:
            # Only ranks with the last stage compute a loss; the others have 0.
            dist.all_reduce(loss_and_sums, group=self.meshes.pp)
        return loss_and_sums

    def _norm(self, loss_scale: Tensor | None) -> GradNorm:
        """Returns the global gradient norm, and the divisor that clips and unscales gradients."""
        pp_group, tied = self.meshes.pp, None
        if pp_group is not None and self.model.tied_head:
            add_tied_gradients(self.model, pp_group)
            # Both copies now have the same gradient; the norm counts the first stage's only.
            if self.model.output is not None:
                tied = self.model.get_parameter("output.weight")
        return clipped_norm(
            self.model.named_parameters(),
            self.max_norm,
            loss_scale=loss_scale,
            pp_group=pp_group,
            tied=tied,
        )

    def _update(self, norm: GradNorm, lr: float, is_finite: Tensor) -> None:
        """Updates the weights from the clipped gradients, calls the hooks, frees the gradients."""
        set_lr(self.optimizer, lr)
        is_applied = self.guard.step(
            self.optimizer,
            is_finite=is_finite,
            divisor=norm.divisor,
            norms=norm.parts,
            owners=norm.owners,
        )
        for hook in self.step_hooks:
            hook(self.progress.step, is_applied)
        self.optimizer.zero_grad()

    def refresh_float8_scales(self) -> None:
        """Recomputes the float8 scales after the weights have changed."""
        if self.has_float8_all_gather:
            refresh_scales(self.model)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Returns the sums of `_evaluate`, with the averaged weights if ema.validation is true."""
        if self.average is None or not self.average.section.validation:
            return self._evaluate(batches)
        with self.average.swapped():
            self.refresh_float8_scales()
            sums = self._evaluate(batches)
        self.refresh_float8_scales()
        return sums

    def _evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Returns the loss summed over all ranks' micro-batches, then the objective's sums.

        Float64, (1 + num_sums,); collective.
        """
        device = self.inputs.device
        terms = self.inputs.loss_terms(torch.ones(2, device=device), torch.float64)
        at_once = 1 if self.pipeline is None else self.pipeline.num_micro_batches
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for first in range(0, len(batches), at_once):
            self.progress.enter("validation")
            micro_batches = map(self.inputs.split_for_cp, batches[first : first + at_once])
            calls = [self.inputs.arguments(batch, terms) for batch in micro_batches]
            if self.pipeline is not None:
                losses = self.pipeline.evaluate(calls)
            else:
                losses = [self.model(inputs, **kwargs) for inputs, kwargs in calls]
            for micro_loss in losses:
                loss += micro_loss
        free_gathered(self.model)
        return self._sum_over_ranks(loss, terms)
