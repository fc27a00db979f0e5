"""The inputs of tokens other than their ids or hidden states.

Shape suffixes: B batch, S sequence.
"""

from typing import NamedTuple

from torch import Tensor

from titan_lite.nn.document_attention import DocumentMask
from titan_lite.nn.dropout import hash32


class TokenContext(NamedTuple):
    """Side inputs of the tokens that a model is called with, for all its modules.

    positions_S: where in the sequence the tokens are, (B, S) where rows differ; None: at 0 to
    S - 1. mask: what they see, as in nn.document_attention.DocumentMask; None: all of the past, or
    of the row without causality. dropout_keys_BS: as nn.dropout.token_keys gives them; None:
    nothing is dropped. token_types_BS: which text of a pair they are of; None: all of the first.
    """

    positions_S: Tensor | None = None
    mask: DocumentMask | None = None
    dropout_keys_BS: Tensor | None = None
    token_types_BS: Tensor | None = None

    def of_block(self, index: int) -> "TokenContext":
        """Returns the same with the block's own dropout keys."""
        if self.dropout_keys_BS is None:
            return self
        return self._replace(dropout_keys_BS=hash32(self.dropout_keys_BS ^ (index + 1)))


NO_CONTEXT = TokenContext()
