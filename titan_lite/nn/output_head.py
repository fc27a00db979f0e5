"""The output projection, which can compute the loss while its weight is gathered.

Shape suffixes: B batch, S sequence, D model width, V vocabulary, padded.
"""

from collections.abc import Callable

from torch import Tensor, nn

from titan_lite.models.args import pad_vocab_size

HeadLoss = Callable[..., Tensor]
"""(hidden_BSD, output_weight_VD[, output_bias_V]) -> the loss."""


class OutputHead(nn.Linear):
    """A Linear whose forward can pass its input and parameters to a loss instead of multiplying."""

    def __init__(self, dim: int, vocab_size: int, *, bias: bool) -> None:
        super().__init__(dim, pad_vocab_size(vocab_size), bias=bias)
        self.vocab_size = vocab_size

    def forward(self, x_BSD: Tensor, head_loss: HeadLoss | None = None) -> Tensor:
        """Returns logits (B, S, vocab_size), or head_loss(x_BSD, weight_VD[, bias_V]).

        The loss gets the weight that FSDP has gathered for this forward, and can compute logits in
        chunks.
        """
        if head_loss is None:
            return super().forward(x_BSD)[..., : self.vocab_size]
        bias = () if self.bias is None else (self.bias,)
        return head_loss(x_BSD, self.weight, *bias)
