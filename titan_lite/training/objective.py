"""Training objectives: how documents become samples, and losses besides that of tokens.

The loss of labelled tokens is common to all, and so is its mean over those of the global batch.
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
from titan_lite.data.packing import IGNORED, Packing, Rows
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.training.loss import pair_cross_entropy_sum


class Objective(Protocol):
    """Data and loss that belong together.

    has_pairs: whether samples have two parts and a label for both. has_padding: whether some of a
    batch's tokens are none. labelled_share: of the tokens, those whose label counts. num_sums:
    numbers that `arguments` adds up over a step.
    """

    has_pairs: bool
    has_padding: bool
    labelled_share: float
    num_sums: int

    def __init__(self, config: Config) -> None: ...

    def rows(self, tokenizer: Tokenizer) -> Rows:
        """How documents become rows; ValueError where the tokenizer cannot be used."""

    def num_tokens(self, batch: Batch) -> Tensor:
        """Its tokens but padding, an int64 scalar."""

    def arguments(
        self, batch: Batch, factor: Tensor, sums: Tensor, to_device: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """Returns arguments for the model, besides tokens, positions, mask and the head's loss.

        factor: of what is summed over pairs. sums: what is found is added to it.
        """

    def metrics(self, loss: Tensor, sums: Tensor, num_pairs: Tensor) -> dict[str, float]:
        """For a log record, from a step's loss and sums; the host waits for them."""

    def validation(self, sums: Tensor, held_out: HeldOut) -> dict[str, float]:
        """For a log record: of all losses, and of `sums` after them, the sums over the held-out."""


class CausalLM:
    """The next token, from those before it."""

    has_pairs = False
    labelled_share = 1.0  # but for a sample's last one
    num_sums = 0

    def __init__(self, config: Config) -> None:
        self._config = config
        self.has_padding = config.data.packing == "none"

    def rows(self, tokenizer: Tokenizer) -> Rows:
        return Packing(self._config.data, self._config.training.seq_len)

    def num_tokens(self, batch: Batch) -> Tensor:
        return (batch.labels != IGNORED).sum()

    def arguments(
        self, batch: Batch, factor: Tensor, sums: Tensor, to_device: Callable[[Tensor], Tensor]
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
    """Hidden tokens, from all others, and whether a sample's second part follows its first.

    The loss is the mean over hidden tokens of the global batch and the mean over its pairs, added.
    """

    has_pairs = True
    has_padding = True
    num_sums = 2  # of the losses of pairs, and of the pairs that were told right

    def __init__(self, config: Config) -> None:
        self._config = config
        self.labelled_share = config.masked_lm.mask_prob

    def rows(self, tokenizer: Tokenizer) -> Rows:
        return MaskedPairs(self._config.masked_lm, self._config.training.seq_len, tokenizer)

    def num_tokens(self, batch: Batch) -> Tensor:
        if batch.documents is None:  # A dry run's, where there is no telling.
            return torch.tensor(batch.inputs.numel())
        return (batch.documents == 0).sum()

    def arguments(
        self, batch: Batch, factor: Tensor, sums: Tensor, to_device: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        assert batch.token_types is not None
        assert batch.pair_labels is not None
        labels = to_device(batch.pair_labels)
        loss = partial(pair_cross_entropy_sum, labels=labels, factor=factor, found=sums)
        return {"token_types_BS": to_device(batch.token_types), "pair_loss": loss}

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
        found = {"validation/loss": masked, "validation/perplexity": _exp(masked)}
        if held_out.num_pairs:
            pair_loss = pair_nats / held_out.num_pairs
            found |= {
                "validation/loss": masked + pair_loss,
                "validation/masked_lm_loss": masked,
                "validation/next_sentence_loss": pair_loss,
                "validation/next_sentence_accuracy": right / held_out.num_pairs,
            }
        return found


OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
}
"""By Family.objective."""


def _exp(nats: float) -> float:
    # In torch, for what is too large is infinite, and no error.
    return torch.tensor(nats, dtype=torch.float64).exp().item()
