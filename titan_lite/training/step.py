"""One optimizer step: forward and backward, the global gradient norm, clipping, the update."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from titan_lite.config.schema import Config
from titan_lite.data.loader import Batch
from titan_lite.data.packing import IGNORED
from titan_lite.models.args import DecoderArgs
from titan_lite.nn.document_attention import DocumentMask, dense_mask, document_spans, has_kernel
from titan_lite.nn.dropout import token_keys
from titan_lite.nn.token_context import TokenContext
from titan_lite.optim.ema import WeightAverage
from titan_lite.optim.nonfinite import NonFiniteGuard
from titan_lite.optim.optimizer import set_lr
from titan_lite.parallel.float8 import refresh_scales
from titan_lite.parallel.fsdp import free_gathered, set_gradient_sync
from titan_lite.parallel.gradients import GradNorm, clipped_norm
from titan_lite.parallel.parallel_model import ParallelModel
from titan_lite.parallel.pipeline import add_tied_gradients
from titan_lite.runtime.progress import Progress
from titan_lite.training.balancing import Balancer
from titan_lite.training.loss import cross_entropy_sum
from titan_lite.training.objective import Objective

T = TypeVar("T", bound=Tensor | None)
StepHook = Callable[[int, Tensor], None]
"""Called on every rank with a step's number, and whether it was applied: a bool on the device."""


@dataclass(frozen=True)
class StepResult:
    """Tensors on the device, which the host reads later.

    All except source_losses are the same on all ranks.
    loss: mean over the global batch. sums: the objective's other sums over it. grad_norm: global,
    before clipping. is_finite: a bool, True if loss and norm are finite. num_stopping: number of
    ranks that have received a stop signal.
    Counts of the global batch, int64: num_labelled, tokens with a label (not -100); num_pairs,
    pairs with a label; num_tokens, tokens as the objective counts them.
    One element per entry of data.sources: source_labelled, its part of num_labelled;
    source_losses, its loss summed over this rank's tokens.
    """

    loss: Tensor
    sums: Tensor
    grad_norm: Tensor
    num_labelled: Tensor
    num_pairs: Tensor
    num_tokens: Tensor
    is_finite: Tensor
    num_stopping: Tensor
    source_labelled: Tensor | None = None
    source_losses: Tensor | None = None


@dataclass(kw_only=True, eq=False)
class TrainStep:
    """One optimizer step over micro-batches; collective. The host never waits for the device."""

    config: Config
    parallel_model: InitVar[ParallelModel]
    optimizer: torch.optim.Optimizer
    guard: NonFiniteGuard
    objective: Objective
    args: DecoderArgs
    device: torch.device
    progress: Progress
    average: WeightAverage | None
    balancer: Balancer | None

    def __post_init__(self, parallel_model: ParallelModel) -> None:
        self.model = parallel_model.model
        self.pipeline = parallel_model.pipeline
        self.meshes = parallel_model.meshes
        self.local_indices = parallel_model.local_indices
        self.has_float8_all_gather = parallel_model.applied.count("float8 all-gather") > 0
        self.step_hooks: list[StepHook] = [lambda *_: self.refresh_float8_scales()]
        if self.average is not None:
            self.step_hooks.append(self.average.update)
        if self.balancer is not None:
            self.step_hooks.append(self.balancer.update)
        self.num_sources = len(self.config.data.sources)
        # State of one step or evaluation, set at its start: `_model_arguments` passes it to the
        # forward passes, which add to the losses and sums in place.
        self.source_losses: Tensor | None = None
        self.pair_factor = torch.ones((), device=self.device)
        self.sums = self._zeros(torch.float32)

    def __call__(self, batches: Sequence[Batch], lr: float, *, stop: bool = False) -> StepResult:
        """Runs one step.

        batches: this rank's micro-batches, whole sequences on the host. lr: this step's learning
        rate. stop: True if this rank has received a stop signal; the result has the number of such
        ranks.
        """
        self.progress.enter("forward")
        micro_batches = [self.split_for_cp(batch) for batch in batches]
        source_labelled, other_counts = self._global_counts(micro_batches, stop)
        num_pairs, num_tokens, num_stopping = other_counts
        # Every labelled token of the global batch has the same weight: the sum over micro-batches
        # and ranks is divided by their number.
        num_labelled = source_labelled.sum()
        if self.num_sources:
            self.source_losses = torch.zeros(self.num_sources, device=self.device)
        divisors = torch.stack((num_labelled, num_pairs)).clamp(min=1)
        token_factor, self.pair_factor = divisors.to(torch.float32).reciprocal()
        self.sums = self._zeros(torch.float32)
        loss_scale = self.guard.scale
        if loss_scale is not None:
            loss_scale = loss_scale.to(self.device)
            token_factor = token_factor * loss_scale
            self.pair_factor = self.pair_factor * loss_scale
        if self.balancer is not None:
            self.balancer.start_step(loss_scale)
        local_loss = self.forward_backward(micro_batches, token_factor)
        if loss_scale is not None:
            local_loss /= loss_scale
        self.progress.enter("optimizer")
        loss_and_sums = self._sum_over_ranks(torch.cat([local_loss.unsqueeze(0), self.sums]))
        loss, sums = loss_and_sums[0], loss_and_sums[1:]
        norm = self._norm(loss_scale)
        set_lr(self.optimizer, lr)
        is_finite = self.guard.is_finite(loss, norm.total)
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
        return StepResult(
            loss=loss,
            sums=sums,
            grad_norm=norm.total,
            num_labelled=num_labelled,
            num_pairs=num_pairs,
            num_tokens=num_tokens,
            is_finite=is_finite,
            num_stopping=num_stopping,
            source_labelled=source_labelled if self.num_sources else None,
            source_losses=self.source_losses,
        )

    def refresh_float8_scales(self) -> None:
        """Recomputes the float8 scales after the weights have changed."""
        if self.has_float8_all_gather:
            refresh_scales(self.model)

    def _global_counts(self, micro_batches: Sequence[Batch], stop: bool) -> tuple[Tensor, Tensor]:
        """Returns labelled tokens per source, and (pairs, tokens, stopping ranks); collective."""
        counted = [
            torch.cat([self._count_labelled(batch), self._count_pairs_and_tokens(batch)])
            for batch in micro_batches
        ]
        counts = torch.cat([torch.stack(counted).sum(0), torch.tensor([int(stop)])])
        counts = self.to_device(counts)
        dist.all_reduce(counts)
        # The all-reduce is over all ranks, so each token is counted once per tensor and pipeline
        # rank: divide. The last count, of stopping ranks, is not divided: each rank counts once.
        counts[:-1] //= dist.get_world_size() // dist.get_world_size(self.meshes.loss)
        return counts[:-3], counts[-3:]

    def _count_pairs_and_tokens(self, batch: Batch) -> Tensor:
        """Returns two counts: labelled pairs, and tokens as the objective counts them."""
        num_pairs = torch.tensor(0)
        if batch.pair_labels is not None:
            num_pairs = (batch.pair_labels != IGNORED).sum()
        return torch.stack([num_pairs, self.objective.num_tokens(batch)])

    def _count_labelled(self, batch: Batch) -> Tensor:
        """Returns the number of labelled tokens, per source if there are sources."""
        labelled_B = (batch.labels != IGNORED).sum(1)
        if batch.sources is None:
            return labelled_B.sum(0, keepdim=True)
        return labelled_B.new_zeros(self.num_sources).index_add_(0, batch.sources, labelled_B)

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Sums the parts of all ranks in place; collective."""
        dist.all_reduce(sums, group=self.meshes.loss)
        if self.meshes.pp is not None:
            # Only ranks with the last stage compute a loss; the others have 0.
            dist.all_reduce(sums, group=self.meshes.pp)
        return sums

    def forward_backward(self, micro_batches: Sequence[Batch], token_factor: Tensor) -> Tensor:
        """Adds up the gradients of all micro-batches; returns this rank's part of the loss.

        token_factor: multiplies each token's loss.
        """
        loss = torch.zeros((), device=self.device)
        if self.pipeline is not None:
            at_once = self.pipeline.num_micro_batches
            for first in range(0, len(micro_batches), at_once):
                batches = micro_batches[first : first + at_once]
                calls = [self._model_arguments(batch, token_factor) for batch in batches]
                for micro_loss in self.pipeline.step(calls):
                    loss += micro_loss
            return loss
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            set_gradient_sync(self.model, self.meshes, self.config.parallel, last=last)
            inputs, kwargs = self._model_arguments(batch, token_factor)
            self.progress.enter("forward")
            micro_loss = self.model(inputs, **kwargs)
            self.progress.enter("backward")
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Returns the sums of `_evaluate`, with the averaged weights if ema.validation is true."""
        if self.average is None or not self.config.ema.validation:
            return self._evaluate(batches)
        with self.average.swapped():
            self.refresh_float8_scales()
            sums = self._evaluate(batches)
        self.refresh_float8_scales()
        return sums

    def _evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Returns the loss summed over all ranks' micro-batches, then the objective's sums.

        Float64, (1 + num_sums,); collective. Does not affect the next step.
        """
        token_factor = self.pair_factor = torch.ones((), device=self.device)
        self.sums = self._zeros(torch.float64)
        at_once = 1 if self.pipeline is None else self.pipeline.num_micro_batches
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for first in range(0, len(batches), at_once):
            self.progress.enter("validation")
            micro_batches = map(self.split_for_cp, batches[first : first + at_once])
            calls = [self._model_arguments(batch, token_factor) for batch in micro_batches]
            if self.pipeline is not None:
                losses = self.pipeline.evaluate(calls)
            else:
                losses = [self.model(inputs, **kwargs) for inputs, kwargs in calls]
            for micro_loss in losses:
                loss += micro_loss
        free_gathered(self.model)
        return self._sum_over_ranks(torch.cat([loss.unsqueeze(0), self.sums]))

    def _model_arguments(self, batch: Batch, token_factor: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Returns the model's arguments for a micro-batch, on the device: inputs and keywords."""
        config, labelled_indices = self.config, None
        if config.training.loss_positions == "labelled":
            labelled_indices = self.to_device(self.labelled_indices(batch))
        head_loss = partial(
            cross_entropy_sum,
            labels=self.to_device(batch.labels),
            labelled_indices=labelled_indices,
            num_chunks=config.training.loss_chunks,
            vocab_size=self.args.vocab_size,
            factor=token_factor,
            loss_parallel=config.parallel.loss_parallel,
            compile=config.compile.covers("loss"),
        )
        if batch.sources is not None:
            source_ids = self.to_device(batch.sources).unsqueeze(1).expand_as(batch.labels)
            head_loss = partial(head_loss, source_ids=source_ids, source_losses=self.source_losses)
        kwargs = {"head_loss": head_loss, "context": self._context(batch)}
        kwargs |= self.objective.arguments(batch, self.pair_factor, self.sums, self.to_device)
        return self.to_device(batch.inputs), kwargs

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.objective.num_sums, dtype=dtype, device=self.device)

    def labelled_indices(self, batch: Batch) -> Tensor:
        """Returns the indices of labelled tokens in the flattened batch.

        Computed on the host: their number is a shape, for which a GPU would have to be waited for.
        """
        return (batch.labels != IGNORED).flatten().nonzero().squeeze(1)

    def split_for_cp(self, batch: Batch) -> Batch:
        """Returns the batch with this context parallel rank's part of inputs and labels.

        `_context` splits the other tensors.
        """
        if self.meshes.cp is None:
            return batch
        inputs, labels = batch.inputs[:, self.local_indices], batch.labels[:, self.local_indices]
        return dataclasses.replace(batch, inputs=inputs, labels=labels)

    def _context(self, batch: Batch) -> TokenContext:
        """Returns the side inputs of this rank's tokens, split for context parallel."""
        indices, positions, keys = self.local_indices, batch.positions, None
        if self.meshes.cp is not None:
            # A batch with attention inside documents or blocks has position ids; otherwise the
            # positions are the indices.
            positions = indices if positions is None else positions[:, indices]
        # Nothing is dropped in `evaluate`, which has no gradients.
        if self.args.has_dropout and torch.is_grad_enabled():
            assert batch.samples is not None
            keys = token_keys(self.config.training.seed, batch.samples, indices)
        return TokenContext(
            positions_S=self.to_device(positions),
            mask=self._mask(batch, indices),
            dropout_keys_BS=self.to_device(keys),
            token_types_BS=self.to_device(batch.token_types),
        )

    def _mask(self, batch: Batch, queries: Tensor) -> DocumentMask | None:
        """Returns the attention mask of the micro-batch, for all layers and these queries."""
        if batch.documents is None:
            return None
        config = self.config
        if config.parallel.cp_method == "ulysses":
            # Attention is computed over whole sequences.
            queries = torch.arange(batch.documents.shape[1])
        dtype = getattr(torch, config.training.param_dtype)
        takes_spans = has_kernel(self.device, dtype) and config.attention.kernel != "math"
        if self.args.attention_dropout or not takes_spans:
            documents, queries = self.to_device(batch.documents), self.to_device(queries)
            return dense_mask(documents, queries, dtype, causal=self.args.causal)
        return tuple(
            spans._replace(
                query_starts_D=self.to_device(spans.query_starts_D),
                key_starts_D=self.to_device(spans.key_starts_D),
            )
            for spans in document_spans(batch.documents, queries)
        )

    def to_device(self, tensor: T) -> T:
        """Copies a host tensor to the device, from pinned memory: the host does not wait."""
        if tensor is None or self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)  # type: ignore[return-value]

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
            self.config.training.max_norm,
            loss_scale=loss_scale,
            pp_group=pp_group,
            tied=tied,
        )
