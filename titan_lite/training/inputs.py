"""Inputs of the model: turns this rank's micro-batches into arguments on the device."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from titan_lite.config.schema import Config
from titan_lite.data.loader import Batch
from titan_lite.data.packing import IGNORED
from titan_lite.models.args import DecoderArgs
from titan_lite.nn.document_attention import DocumentMask, dense_mask, document_spans, has_kernel
from titan_lite.nn.dropout import token_keys
from titan_lite.nn.token_context import TokenContext
from titan_lite.training.loss import cross_entropy_sum
from titan_lite.training.objective import Objective

T = TypeVar("T", bound=Tensor | None)


@dataclass(frozen=True)
class LossTerms:
    """The parts of the loss of one step or evaluation.

    token_factor, pair_factor: scalars that multiply the loss of each token and of each pair.
    sums: the objective's sums besides the token loss, such as the summed losses of pairs.
    source_losses: for each entry of data.sources, the loss summed over this rank's tokens, without
    token_factor. The forward passes add to sums and source_losses.
    """

    token_factor: Tensor
    pair_factor: Tensor
    sums: Tensor
    source_losses: Tensor | None


def labelled_indices(batch: Batch) -> Tensor:
    """Returns the indices of labelled tokens in the flattened batch.

    Computed on the host. On a GPU, the host would have to wait for the number of indices, because
    it is the result's shape.
    """
    return (batch.labels != IGNORED).flatten().nonzero().squeeze(1)


@dataclass(eq=False)
class ModelInputs:
    """Prepares this rank's inputs.

    local_indices: the indices of this rank's tokens in each sequence. find_labelled: returns the
    indices of labelled tokens. A dry run, whose labels have no values, passes its own function.
    """

    config: Config
    args: DecoderArgs
    objective: Objective
    device: torch.device
    local_indices: Tensor
    find_labelled: Callable[[Batch], Tensor]

    def __post_init__(self) -> None:
        self.num_sources = len(self.config.data.sources)
        self.splits_sequences = self.config.parallel.cp > 1

    def split_for_cp(self, batch: Batch) -> Batch:
        """Returns the batch with this context parallel rank's part of inputs and labels.

        `_context` splits the other tensors.
        """
        if not self.splits_sequences:
            return batch
        inputs, labels = batch.inputs[:, self.local_indices], batch.labels[:, self.local_indices]
        return dataclasses.replace(batch, inputs=inputs, labels=labels)

    def count(self, batch: Batch) -> Tensor:
        """Returns int64 counts, on the host, of a micro-batch.

        Labelled tokens (one element per source, or one if there are no sources), labelled pairs,
        and tokens as the objective counts them.
        """
        labelled_B = (batch.labels != IGNORED).sum(1)
        if batch.sources is None:
            labelled = labelled_B.sum(0, keepdim=True)
        else:
            labelled = labelled_B.new_zeros(self.num_sources)
            labelled.index_add_(0, batch.sources, labelled_B)
        num_pairs = torch.tensor(0)
        if batch.pair_labels is not None:
            num_pairs = (batch.pair_labels != IGNORED).sum()
        others = torch.stack([num_pairs, self.objective.num_tokens(batch)])
        return torch.cat([labelled, others])

    def loss_terms(self, factors: Tensor, dtype: torch.dtype = torch.float32) -> LossTerms:
        """Returns the loss terms of a step or evaluation before its first forward pass.

        factors: (2,), those of tokens and pairs. dtype: of the sums.
        """
        token_factor, pair_factor = factors
        sums = torch.zeros(self.objective.num_sums, dtype=dtype, device=self.device)
        source_losses = None
        if self.num_sources:
            source_losses = torch.zeros(self.num_sources, device=self.device)
        return LossTerms(token_factor, pair_factor, sums, source_losses)

    def arguments(self, batch: Batch, terms: LossTerms) -> tuple[Tensor, dict[str, Any]]:
        """Returns the model's arguments for a micro-batch, on the device: inputs and keywords.

        batch: as `split_for_cp` returns it.
        """
        config, labelled = self.config, None
        if config.training.loss_positions == "labelled":
            labelled = self.to_device(self.find_labelled(batch))
        head_loss = partial(
            cross_entropy_sum,
            labels=self.to_device(batch.labels),
            labelled_indices=labelled,
            num_chunks=config.training.loss_chunks,
            vocab_size=self.args.vocab_size,
            factor=terms.token_factor,
            loss_parallel=config.parallel.loss_parallel,
            compile=config.compile.covers("loss"),
        )
        if batch.sources is not None:
            source_ids = self.to_device(batch.sources).unsqueeze(1).expand_as(batch.labels)
            head_loss = partial(head_loss, source_ids=source_ids, source_losses=terms.source_losses)
        kwargs = {"head_loss": head_loss, "context": self._context(batch)}
        kwargs |= self.objective.arguments(batch, terms.pair_factor, terms.sums, self.to_device)
        return self.to_device(batch.inputs), kwargs

    def _context(self, batch: Batch) -> TokenContext:
        """Returns the side inputs of this rank's tokens, split for context parallel."""
        indices, positions, keys = self.local_indices, batch.positions, None
        if self.splits_sequences:
            # With data.packing = "document" or "fixed", batches have position ids; otherwise the
            # positions are the indices.
            positions = indices if positions is None else positions[:, indices]
        # Nothing is dropped in an evaluation, which has no gradients.
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
