"""Training objectives: how samples are built, and losses in addition to the token loss.

The loss of every objective includes the mean over the labelled tokens of the global batch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_lite.config.schema import Config
from titan_lite.data.held_out import HeldOut
from titan_lite.data.loader import Batch
from titan_lite.data.masked_lm import MaskedPairs
from titan_lite.data.packing import IGNORED, Packing, RowMaker
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.training.loss import pair_cross_entropy_sum

ToDevice = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """The data and the loss of one training objective.

    has_pairs: samples have two parts, and one label for the pair. has_padding: a batch may have
    padding tokens. num_sums: number of sums over micro-batches in addition to the token loss, such
    as the summed losses of pairs.
    """

    has_pairs: bool
    has_padding: bool
    num_sums: int

    def __init__(self, config: Config) -> None: ...

    def row_maker(self, tokenizer: Tokenizer) -> RowMaker:
        """Returns the builder of this objective's samples from documents.

        ValueError if the tokenizer lacks a token that the objective requires.
        """

    def num_tokens(self, batch: Batch) -> Tensor:
        """Returns the number of labelled (causal) or unpadded (masked) tokens, an int64 scalar."""

    def arguments(
        self, batch: Batch, pair_factor: Tensor, sums: Tensor, to_device: ToDevice
    ) -> dict[str, Any]:
        """Returns the model's arguments other than tokens, context and the head's loss.

        pair_factor: multiplies each pair's loss. sums: (num_sums,); the forward pass adds to it.
        """

    def metrics(self, loss: Tensor, sums: Tensor, num_pairs: Tensor) -> dict[str, float]:
        """Returns a step's metrics for its log record; waits for the device."""

    def validation(self, sums: Tensor, held_out: HeldOut) -> dict[str, float]:
        """Returns a validation's metrics for the log record.

        sums: the loss summed over the held-out documents, then the objective's own sums.
        """


class CausalLM:
    """Prediction of the next token."""

    has_pairs = False
    num_sums = 0

    def __init__(self, config: Config) -> None:
        self._config = config
        self.has_padding = config.data.packing == "none"

    def row_maker(self, tokenizer: Tokenizer) -> RowMaker:
        return Packing(self._config.data, self._config.training.seq_len)

    def num_tokens(self, batch: Batch) -> Tensor:
        return (batch.labels != IGNORED).sum()

    def arguments(
        self, batch: Batch, pair_factor: Tensor, sums: Tensor, to_device: ToDevice
    ) -> dict[str, Any]:
        return {}

    def metrics(self, loss: Tensor, sums: Tensor, num_pairs: Tensor) -> dict[str, float]:
        return {}

    def validation(self, sums: Tensor, held_out: HeldOut) -> dict[str, float]:
        (nats,) = sums.tolist()
        loss = nats / held_out.num_tokens
        return {
            "validation/loss": loss,
            "validation/perplexity": _exp(loss),
            "validation/bits_per_byte": nats / math.log(2) / held_out.num_bytes,
        }


class MaskedLM:
    """Prediction of masked tokens, and next-sentence prediction for a sample's two parts.

    The loss is the mean over masked tokens of the global batch plus the mean over its pairs.
    """

    has_pairs = True
    has_padding = True
    num_sums = 2  # the summed loss of pairs, and the number of pairs classified correctly

    def __init__(self, config: Config) -> None:
        self._config = config

    def row_maker(self, tokenizer: Tokenizer) -> RowMaker:
        return MaskedPairs(self._config.masked_lm, self._config.training.seq_len, tokenizer)

    def num_tokens(self, batch: Batch) -> Tensor:
        assert batch.num_tokens is not None
        return batch.num_tokens.sum()

    def arguments(
        self, batch: Batch, pair_factor: Tensor, sums: Tensor, to_device: ToDevice
    ) -> dict[str, Any]:
        assert batch.pair_labels is not None
        labels = to_device(batch.pair_labels)
        loss = partial(pair_cross_entropy_sum, labels=labels, factor=pair_factor, sums=sums)
        return {"pair_loss": loss}

    def metrics(self, loss: Tensor, sums: Tensor, num_pairs: Tensor) -> dict[str, float]:
        if not self._config.masked_lm.next_sentence:
            return {}
        pair_loss, accuracy = (sums / num_pairs).tolist()
        return {
            "masked_lm_loss": loss.item() - pair_loss,
            "next_sentence_loss": pair_loss,
            "next_sentence_accuracy": accuracy,
        }

    def validation(self, sums: Tensor, held_out: HeldOut) -> dict[str, float]:
        nats, pair_nats, right = sums.tolist()
        masked = (nats - pair_nats) / held_out.num_tokens
        metrics = {"validation/loss": masked, "validation/perplexity": _exp(masked)}
        if held_out.num_pairs:
            pair_loss = pair_nats / held_out.num_pairs
            metrics |= {
                "validation/loss": masked + pair_loss,
                "validation/masked_lm_loss": masked,
                "validation/next_sentence_loss": pair_loss,
                "validation/next_sentence_accuracy": right / held_out.num_pairs,
            }
        return metrics


OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
}
"""Objective classes; the keys are the values of `Family.objective`."""


def _exp(nats: float) -> float:
    # torch returns Inf where math.exp raises OverflowError.
    return torch.tensor(nats, dtype=torch.float64).exp().item()
