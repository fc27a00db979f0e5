"""Base of decoder and encoder: all that parallelism, initialisation and checkpoints rely on.

Shape suffixes: B batch, S sequence, D model width.
"""

import torch
from torch import Tensor, nn

from titan_lite.models.args import DecoderArgs, MoEArgs
from titan_lite.nn.balance import Balance
from titan_lite.nn.block import Block
from titan_lite.nn.dropout import build_dropout
from titan_lite.nn.init import InitRule, fill, linear
from titan_lite.nn.moe import Router
from titan_lite.nn.output_head import OutputHead
from titan_lite.nn.rope import NoRotation, RotaryEmbedding
from titan_lite.nn.token_context import TokenContext


class Transformer(nn.Module):
    """Embeddings, blocks, and an output projection that may be tied to the embedding of tokens.

    Children may be removed: a pipeline stage is such a model with some blocks deleted from `layers`
    and some of `first` and `last` set to None.
    """

    first: tuple[str, ...] = ("tok_embeddings", "pos_embeddings")
    """The children before the blocks."""
    last: tuple[str, ...] = ("norm", "output")
    """The children after the blocks."""
    per_sample: tuple[str, ...] = ()
    """Those of `last` that see one token of a sample, and that a forward may leave out."""
    inseparable: tuple[str, ...] = ()
    """Those of `last` that are all of one pipeline stage, the last."""
    init_rules: tuple[InitRule, ...]
    vocab_parameters: tuple[str, ...] = ("tok_embeddings.weight", "output.weight", "output.bias")
    """Those with a row for each token, and some for padding."""
    tok_embeddings: nn.Embedding | None
    pos_embeddings: nn.Embedding | None
    layers: nn.ModuleDict
    output: OutputHead | None

    def __init__(self, args: DecoderArgs) -> None:
        """Makes what comes before the blocks; the rest, in order, is the subclass's."""
        super().__init__()
        self.vocab_size = args.vocab_size
        self.fp32_residual = args.fp32_residual
        self.tied_head = args.tied_head
        self.top_k = args.top_k if isinstance(args, MoEArgs) else 0
        self.tok_embeddings = nn.Embedding(args.padded_vocab_size, args.dim)
        learned = args.positions == "learned"
        self.pos_embeddings = nn.Embedding(args.max_seq_len, args.dim) if learned else None
        self.rope = NoRotation() if learned else RotaryEmbedding(args)
        self.embedding_dropout = build_dropout(args.hidden_dropout, salt=0)

    def make_layers(self, block: type[Block], args: DecoderArgs) -> nn.ModuleDict:
        """The blocks; a ModuleDict keeps the names of those that a pipeline stage keeps."""
        return nn.ModuleDict(
            {str(index): block(args.of_block(index), self.rope) for index in range(args.num_layers)}
        )

    @property
    def ends(self) -> list[str]:
        """The children of `first` and `last` that this model has, in order."""
        return [name for name in (*self.first, *self.last) if getattr(self, name) is not None]

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters, each counted once, without the padding of a vocabulary."""
        return sum(
            self.without_padding(name, parameter).numel()
            for name, parameter in self.named_parameters()
        )

    def without_padding(self, name: str, tensor: Tensor) -> Tensor:
        """A view of a parameter, by its name, without the rows that pad the vocabulary."""
        return tensor[: self.vocab_size] if name in self.vocab_parameters else tensor

    def active(self, name: str, tensor: Tensor) -> Tensor:
        """A view of a parameter, by its name, of what multiplies a token: its experts alone."""
        if tensor.ndim == 3 and self.top_k:
            return tensor[: self.top_k]
        return self.without_padding(name, tensor)

    def embed(self, tokens_BS: Tensor, context: TokenContext) -> Tensor:
        """Embeddings (B, S, D) of tokens, and of positions where those are learned.

        Without tok_embeddings the input is the previous stage's hidden states already.
        """
        x_BSD = self.tok_embeddings(tokens_BS) if self.tok_embeddings is not None else tokens_BS
        if self.pos_embeddings is not None:
            positions_S = context.positions_S
            if positions_S is None:
                positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
            x_BSD = x_BSD + self.pos_embeddings(positions_S)
        return x_BSD

    def run_blocks(self, x_BSD: Tensor, context: TokenContext) -> Tensor:
        """Returns the output of the last block."""
        for name, block in self.layers.items():
            # A block knows no number, for equal ones to share a compiled graph.
            x_BSD = block(x_BSD, context.of_block(int(name)))
        return x_BSD

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
            tensor = self.without_padding(name, tensor)
        if self.tied_head and name in ("tok_embeddings.weight", "pos_embeddings.weight"):
            # As GPT-2's and Qwen's: of std 1 logits would have std sqrt(D); of the head's own std
            # the stream is little but the embedding, whose largest logit is the token's own.
            linear(tensor, generator, 0)
            return
        fill(self.init_rules, name, tensor, generator)

    def init_buffers(self, device: torch.device | str) -> None:
        """Computes the buffers again on `device`, as is needed after a meta build."""
        for module in self.modules():
            # Several where this model was joined from pipeline stages.
            if isinstance(module, RotaryEmbedding | Router | Balance):
                module.init_buffers(device)
