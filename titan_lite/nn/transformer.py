"""Base class of decoder and encoder, on which parallelism, initialization and checkpoints rely.

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
    """Embeddings, blocks, and an output projection that may be tied to the token embedding.

    A pipeline stage is such a model with some blocks deleted from `layers`, and some children of
    `first` and `last` set to None.
    """

    first: tuple[str, ...] = ("tok_embeddings", "pos_embeddings")
    """The children before the blocks."""
    last: tuple[str, ...] = ("norm", "output")
    """The children after the blocks."""
    per_sample: tuple[str, ...] = ()
    """Children in `last` that see one token of a sample, and that a forward may leave out."""
    inseparable: tuple[str, ...] = ()
    """Children in `last` that must all be in the last pipeline stage."""
    init_rules: tuple[InitRule, ...]
    vocab_parameters: tuple[str, ...] = ("tok_embeddings.weight", "output.weight", "output.bias")
    """Parameters with a row for each token, and rows for padding."""
    tok_embeddings: nn.Embedding | None
    pos_embeddings: nn.Embedding | None
    layers: nn.ModuleDict
    output: OutputHead | None

    def __init__(self, args: DecoderArgs) -> None:
        """Makes the embeddings; the subclass makes the other children, in order."""
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
        """Makes the blocks; in a ModuleDict, so that those of a pipeline stage keep their names."""
        return nn.ModuleDict(
            {str(index): block(args.of_block(index), self.rope) for index in range(args.num_layers)}
        )

    @property
    def ends(self) -> list[str]:
        """The children of `first` and `last` that this model has, in order."""
        return [name for name in (*self.first, *self.last) if getattr(self, name) is not None]

    @property
    def num_parameters(self) -> int:
        """Number of parameters without the vocabulary's padding; a tied one counts once."""
        return sum(
            self.without_padding(name, parameter).numel()
            for name, parameter in self.named_parameters()
        )

    def without_padding(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a view of a parameter, by its name, without the vocabulary's padding."""
        return tensor[: self.vocab_size] if name in self.vocab_parameters else tensor

    def active(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a view of a parameter with the part that one token uses: only its experts."""
        if tensor.ndim == 3 and self.top_k:
            return tensor[: self.top_k]
        return self.without_padding(name, tensor)

    def embed(self, tokens_BS: Tensor, context: TokenContext) -> Tensor:
        """Returns embeddings (B, S, D) of tokens, plus those of learned positions.

        In a pipeline stage without tok_embeddings, returns the input: the previous stage's hidden
        states.
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
            # A block has no number, so that equal ones share a compiled graph.
            x_BSD = block(x_BSD, context.of_block(int(name)))
        return x_BSD

    def tie(self) -> None:
        """Ties the head's weight to the embedding again, if it is tied and both are here."""
        if self.tied_head and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fills one whole parameter in place, by its name in this model."""
        if name in self.vocab_parameters:
            # Drawn without padding, so that the values do not depend on it.
            tensor[self.vocab_size :] = 0
            tensor = self.without_padding(name, tensor)
        if self.tied_head and name in ("tok_embeddings.weight", "pos_embeddings.weight"):
            # Like GPT-2 and Qwen. With std 1, logits would have std sqrt(D). With the head's std,
            # the embedding dominates the stream, and the largest logit is that of the input token.
            linear(tensor, generator, 0)
            return
        fill(self.init_rules, name, tensor, generator)

    def init_buffers(self, device: torch.device | str) -> None:
        """Computes the buffers again on `device`, as is necessary after a meta build."""
        for module in self.modules():
            # A model that was merged from pipeline stages has several rotary embeddings.
            if isinstance(module, RotaryEmbedding | Router | Balance):
                module.init_buffers(device)
