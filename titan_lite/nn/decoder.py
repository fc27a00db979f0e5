"""The decoder-only transformer.

Shape suffixes: B batch, S sequence, D model width, V vocabulary.
"""

from torch import Tensor, nn

from titan_lite.models.args import DecoderArgs
from titan_lite.nn.block import Block, ParallelBlock
from titan_lite.nn.document_attention import DocumentMask
from titan_lite.nn.init import DECODER_RULES
from titan_lite.nn.norm import NORMS
from titan_lite.nn.output_head import HeadLoss, OutputHead
from titan_lite.nn.transformer import Transformer


class Decoder(Transformer):
    """Embeddings, blocks, norm and output head."""

    init_rules = DECODER_RULES
    norm: nn.Module | None

    def __init__(self, args: DecoderArgs) -> None:
        super().__init__(args)
        self.layers = self.make_layers(ParallelBlock if args.parallel_residual else Block, args)
        self.norm = NORMS[args.norm](args.dim, eps=args.norm_eps)
        self.output = OutputHead(args.dim, args.vocab_size, bias=False)
        self.tie()

    def forward(
        self,
        tokens_BS: Tensor,
        head_loss: HeadLoss | None = None,
        positions_S: Tensor | None = None,
        mask: DocumentMask | None = None,
        dropout_keys_BS: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, S, V), or what head_loss(hidden_BSD, output_weight_VD) returns.

        positions_S: where in the sequence the tokens are, (B, S) where rows differ; None: at 0 to
        S - 1. mask: what they see of the past, as in nn.document_attention.DocumentMask; None: all.
        dropout_keys_BS: of the tokens, as nn.dropout.token_keys gives them; None: nothing is
        dropped.

        Without tok_embeddings the input is the previous stage's hidden states (B, S, D); without
        output the result is this stage's.
        """
        x_BSD = self.embed(tokens_BS, positions_S)
        if self.tok_embeddings is not None:
            x_BSD = self.embedding_dropout(x_BSD, dropout_keys_BS)
        x_BSD = self.run_blocks(x_BSD, positions_S, mask, dropout_keys_BS)
        x_BSD = self.norm(x_BSD) if self.norm is not None else x_BSD
        return self.output(x_BSD, head_loss) if self.output is not None else x_BSD
