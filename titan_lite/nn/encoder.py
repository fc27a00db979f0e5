"""The encoder of pairs of texts, with BERT's two heads.

Shape suffixes: B batch, S sequence, D model width, V vocabulary, 2 the classes of a pair.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from titan_lite.models.args import EncoderArgs
from titan_lite.nn.block import Block, ParallelBlock, PostNormBlock
from titan_lite.nn.feed_forward import build_gelu
from titan_lite.nn.init import ENCODER_RULES
from titan_lite.nn.norm import NORMS
from titan_lite.nn.output_head import HeadLoss, OutputHead
from titan_lite.nn.token_context import NO_CONTEXT, TokenContext
from titan_lite.nn.transformer import Transformer

PairLoss = Callable[[Tensor], Tensor]
"""pair_logits_B2 -> whatever the loss returns."""


class Transform(nn.Module):
    """The transform of the masked-LM head: norm(gelu(dense x)), before the output projection."""

    def __init__(self, args: EncoderArgs) -> None:
        super().__init__()
        self.dense = nn.Linear(args.dim, args.dim)
        self.gelu = build_gelu(args)
        self.norm = NORMS[args.norm](args.dim, eps=args.norm_eps)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD: Tensor = self.norm(self.gelu(self.dense(x_BSD)))
        return out_BSD


class PairHead(nn.Module):
    """Classifies from a sample's first token whether its second text follows the first."""

    def __init__(self, args: EncoderArgs) -> None:
        super().__init__()
        self.pooler = nn.Linear(args.dim, args.dim)
        self.classifier = nn.Linear(args.dim, 2)

    def forward(self, x_BSD: Tensor, pair_loss: PairLoss) -> Tensor:
        """Returns pair_loss(pair_logits_B2)."""
        return pair_loss(self.classifier(self.pooler(x_BSD[:, 0]).tanh()))


class Encoder(Transformer):
    """Embeddings, blocks in which every token sees all others, transform, output and pair heads."""

    first = ("tok_embeddings", "pos_embeddings", "type_embeddings", "embedding_norm")
    last = ("norm", "transform", "output", "pair_head")
    per_sample = ("pair_head",)
    # Both heads read the output of the last block or norm.
    inseparable = ("transform", "output", "pair_head")
    init_rules = ENCODER_RULES
    type_embeddings: nn.Embedding | None
    embedding_norm: nn.Module | None
    norm: nn.Module | None
    transform: Transform | None
    pair_head: PairHead | None

    def __init__(self, args: EncoderArgs) -> None:
        super().__init__(args)
        norm = NORMS[args.norm]
        self.type_embeddings = nn.Embedding(args.num_token_types, args.dim)
        self.embedding_norm = norm(args.dim, eps=args.norm_eps) if args.post_norm else None
        block = ParallelBlock if args.parallel_residual else Block
        self.layers = self.make_layers(PostNormBlock if args.post_norm else block, args)
        self.norm = None if args.post_norm else norm(args.dim, eps=args.norm_eps)
        self.transform = Transform(args)
        self.output = OutputHead(args.dim, args.vocab_size, bias=True)
        self.pair_head = PairHead(args)
        self.tie()

    def forward(
        self,
        tokens_BS: Tensor,
        head_loss: HeadLoss | None = None,
        context: TokenContext = NO_CONTEXT,
        pair_loss: PairLoss | None = None,
    ) -> Tensor:
        """Returns logits (B, S, V), or the sum of the two losses, a scalar.

        head_loss is called with (hidden_BSD, output_weight_VD, output_bias_V), and pair_loss, if
        given, with (pair_logits_B2). For the stages of a pipeline see Decoder.
        """
        x_BSD = self.embed(tokens_BS, context)
        if self.type_embeddings is not None:
            types_BS = context.token_types_BS
            types_BS = torch.zeros_like(tokens_BS) if types_BS is None else types_BS
            x_BSD = x_BSD + self.type_embeddings(types_BS)
        x_BSD = self.embedding_norm(x_BSD) if self.embedding_norm is not None else x_BSD
        if self.tok_embeddings is not None:
            x_BSD = self.embedding_dropout(x_BSD, context.dropout_keys_BS)
        x_BSD = self.run_blocks(x_BSD, context)
        x_BSD = self.norm(x_BSD) if self.norm is not None else x_BSD
        if self.transform is None or self.output is None or self.pair_head is None:
            return x_BSD
        out: Tensor = self.output(self.transform(x_BSD), head_loss)
        # By keyword, because tensor parallel gathers the positional arguments.
        return out if pair_loss is None else out + self.pair_head(x_BSD, pair_loss=pair_loss)
