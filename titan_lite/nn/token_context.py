"""Inputs per token other than ids or hidden states.

Shape suffixes: B batch, S sequence.
"""

from typing import NamedTuple

from torch import Tensor

from titan_lite.nn.document_attention import DocumentMask
from titan_lite.nn.dropout import hash32


class TokenContext(NamedTuple):
    """Side inputs of a model's tokens, for all its modules.

    positions_S: position ids; (B, S) if rows differ; None: 0 to S - 1. mask: attention mask, see
    nn.document_attention.DocumentMask; None: attend to all earlier tokens, or to the whole row
    without causality. dropout_keys_BS: result of nn.dropout.token_keys; None: no dropout.
    token_types_BS: 0 or 1, the text of a pair; None: all 0.
    """

    positions_S: Tensor | None = None
    mask: DocumentMask | None = None
    dropout_keys_BS: Tensor | None = None
    token_types_BS: Tensor | None = None

    def of_block(self, index: int) -> "TokenContext":
        """Returns the context with the dropout keys of a block."""
        if self.dropout_keys_BS is None:
            return self
        return self._replace(dropout_keys_BS=hash32(self.dropout_keys_BS ^ (index + 1)))


NO_CONTEXT = TokenContext()
