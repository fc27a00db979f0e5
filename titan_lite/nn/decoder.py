"""The decoder-only transformer.

Shape suffixes: B batch, S sequence, D model width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from titan_lite.models.args import DecoderArgs
from titan_lite.nn.block import Block, ParallelBlock
from titan_lite.nn.documents import DocumentMask
from titan_lite.nn.init import DECODER_RULES, InitRule, fill
from titan_lite.nn.norm import NORMS
from titan_lite.nn.output_head import HeadLoss, OutputHead
from titan_lite.nn.rope import NoRotation, RotaryEmbedding


class Decoder(nn.Module):
    """Embeddings, blocks, norm and output head.

    Children may be removed: a pipeline stage is this model with some blocks deleted from `layers`
    and some of `first` and `last` set to None.
    """

    first = ("tok_embeddings", "pos_embeddings")
    """The children before the blocks; they look up and multiply nothing."""
    last = ("norm", "output")
    """The children after the blocks."""
    init_rules: tuple[InitRule, ...] = DECODER_RULES
    vocab_parameters: tuple[str, ...] = ("tok_embeddings.weight", "output.weight")
    """Those with a row for each token, and some for padding."""
    tok_embeddings: nn.Embedding | None
    pos_embeddings: nn.Embedding | None
    norm: nn.Module | None
    output: OutputHead | None

    def __init__(self, args: DecoderArgs) -> None:
        super().__init__()
        self.vocab_size = args.vocab_size
        self.fp32_residual = args.fp32_residual
        self.tied_head = args.tied_head
        self.tok_embeddings = nn.Embedding(args.padded_vocab_size, args.dim)
        learned = args.positions == "learned"
        self.pos_embeddings = nn.Embedding(args.max_seq_len, args.dim) if learned else None
        self.rope = NoRotation() if learned else RotaryEmbedding(args)
        block = ParallelBlock if args.parallel_residual else Block
        # A ModuleDict keeps the names of the blocks that a pipeline stage keeps.
        self.layers = nn.ModuleDict(
            {str(index): block(args, self.rope) for index in range(args.num_layers)}
        )
        self.norm = NORMS[args.norm](args.dim, eps=args.norm_eps)
        self.output = OutputHead(args.dim, args.padded_vocab_size, bias=False)
        self.tie()

    @property
    def ends(self) -> list[str]:
        """The children of `first` and `last` that this model has, in order."""
        return [name for name in (*self.first, *self.last) if getattr(self, name) is not None]

    def forward(
        self,
        tokens_BS: Tensor,
        head_loss: HeadLoss | None = None,
        positions_S: Tensor | None = None,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        """Logits (B, S, V), or what head_loss(hidden_BSD, output_weight_VD) returns.

        positions_S: where in the sequence the tokens are, (B, S) where rows differ; None: at 0 to
        S - 1. mask: what they see of the past, as nn.documents.document_mask says; None: all.

        Without tok_embeddings the input is the previous stage's hidden states (B, S, D); without
        output the result is this stage's.
        """
        x_BSD = self.tok_embeddings(tokens_BS) if self.tok_embeddings is not None else tokens_BS
        if self.pos_embeddings is not None:
            every_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
            x_BSD = x_BSD + self.pos_embeddings(every_S if positions_S is None else positions_S)
        for block in self.layers.values():
            x_BSD = block(x_BSD, positions_S=positions_S, mask=mask)
        x_BSD = self.norm(x_BSD) if self.norm is not None else x_BSD
        return self.output(x_BSD, head_loss) if self.output is not None else x_BSD

    def tie(self) -> None:
        """Makes the head's weight the embedding's again where it should be, and both are here."""
        if self.tied_head and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fills one whole parameter in place, by its name in this model."""
        if name in self.vocab_parameters:
            # Drawn without its padding, for the values not to depend on it.
            tensor[self.vocab_size :] = 0
            tensor = tensor[: self.vocab_size]
        if self.tied_head and name in ("tok_embeddings.weight", "pos_embeddings.weight"):
            # An embedding of std 1 would give logits of std sqrt(D), and drown positions of less.
            name = "output.weight"
        fill(self.init_rules, name, tensor, generator)

    def init_buffers(self, device: torch.device | str) -> None:
        """Computes the buffers anew on `device`, as is needed after a meta build."""
        for module in self.modules():
            # Several where this model was joined from pipeline stages.
            if isinstance(module, RotaryEmbedding):
                module.init_buffers(device)
