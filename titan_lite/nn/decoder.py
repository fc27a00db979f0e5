"""The decoder-only transformer.

Shape suffixes: B batch, S sequence, D model width, V vocabulary.
"""

from torch import Tensor, nn

from titan_lite.models.args import DecoderArgs
from titan_lite.nn.block import Block, ParallelBlock
from titan_lite.nn.init import DECODER_RULES
from titan_lite.nn.norm import NORMS
from titan_lite.nn.output_head import HeadLoss, OutputHead
from titan_lite.nn.token_context import NO_CONTEXT, TokenContext
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
        context: TokenContext = NO_CONTEXT,
    ) -> Tensor:
        """Returns logits (B, S, V), or the result of head_loss(hidden_BSD, output_weight_VD).

        In a pipeline stage without tok_embeddings, the input is the previous stage's hidden states
        (B, S, D). In a stage without output, the result is this stage's hidden states.
        """
        x_BSD = self.embed(tokens_BS, context)
        if self.tok_embeddings is not None:
            x_BSD = self.embedding_dropout(x_BSD, context.dropout_keys_BS)
        x_BSD = self.run_blocks(x_BSD, context)
        x_BSD = self.norm(x_BSD) if self.norm is not None else x_BSD
        return self.output(x_BSD, head_loss) if self.output is not None else x_BSD
