"""Attention inside documents: as if each were alone."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from titan_lite.config.schema import Data
from titan_lite.data.loader import Batch
from titan_lite.data.packing import join_documents, to_row
from titan_lite.models.llama import LLAMA
from titan_lite.nn import documents
from titan_lite.nn.build import build
from titan_lite.nn.decoder import Decoder
from titan_lite.nn.documents import (
    DocumentMask,
    attend_in_documents,
    dense_mask,
    document_spans,
    has_kernel,
)
from titan_lite.parallel.context import local_positions

ARGS = dataclasses.replace(LLAMA.flavors["debug"], dim=64, ffn_dim=128, num_layers=2)
# Rows of 32 tokens: documents of 1 to 25, some of which a row cuts.
LENGTHS = [[7, 1, 20, 4], [25, 7], [3, 9, 9, 11]]
B, S = len(LENGTHS), sum(LENGTHS[0])
NUMBERS_BS = torch.tensor([np.repeat(range(len(row)), row).tolist() for row in LENGTHS])


def dense(queries_Q: Tensor | None = None) -> Tensor:
    return dense_mask(
        NUMBERS_BS, torch.arange(S) if queries_Q is None else queries_Q, torch.float32
    )


def _packed(packing: str) -> Batch:
    """One sample that begins and ends inside a document."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, ARGS.vocab_size, size) for size in (9, 0, 17, 5, 12)]
    tokens = join_documents([text.astype(np.uint32) for text in texts], 1, 2)
    return Batch.of([to_row(tokens[start : start + 41], 40, _section(packing)) for start in (4, 6)])


def _section(packing: str) -> Data:
    return Data(packing=packing, packing_block=10)


def _gradients(model: Decoder) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("packing", ["document", "fixed"])
def test_a_packed_batch_gives_the_logits_and_gradients_of_each_part_alone(packing: str) -> None:
    torch.manual_seed(0)
    model, batch = build(LLAMA, ARGS), _packed(packing)
    assert batch.positions is not None
    assert batch.documents is not None
    mask = dense_mask(batch.documents, torch.arange(40), torch.float32)
    logits = model(batch.inputs, positions_S=batch.positions, mask=mask)
    cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum").backward()
    packed, alone, parts = _gradients(model), [], 0
    for inputs, labels, numbers in zip(batch.inputs, batch.labels, batch.documents, strict=True):
        for number in numbers.unique():
            part = numbers == number
            out = model(inputs[None, part])[0]
            cross_entropy(out, labels[part], reduction="sum").backward()
            alone.append(out)
            parts += 1
    assert parts >= 8
    torch.testing.assert_close(logits.flatten(0, 1), torch.cat(alone), rtol=1e-6, atol=2e-6)
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-5, atol=2e-5, msg=name)
    without = model(batch.inputs, positions_S=batch.positions)
    assert not torch.allclose(without, logits, atol=1e-2)


def test_positions_may_differ_between_rows() -> None:
    rope = build(LLAMA, ARGS).rope
    x = torch.randn(2, 5, 4, ARGS.head_dim)
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
    rows = [rope(row[None], places) for row, places in zip(x, positions, strict=True)]
    assert torch.equal(rope(x, positions), torch.cat(rows))


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, max_q: int, max_k: int,
    *, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What torch's varlen_attn says that it does, in a loop over documents."""
    assert window_size == (-1, 0)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert q_starts.dtype == k_starts.dtype == torch.int32
    assert (int(q_starts[-1]), int(k_starts[-1])) == (len(q), len(k))
    outs = []
    for at, to, k_at, k_to in zip(q_starts, q_starts[1:], k_starts, k_starts[1:], strict=False):
        num_q, num_k = int(to - at), int(k_to - k_at)
        assert num_q <= max_q
        assert num_k <= max_k
        # The kernel's causal mask is aligned to the last query and the last key.
        sees = torch.ones(num_q, num_k, dtype=torch.bool).tril(num_k - num_q)
        part, *kv = (t.transpose(0, 1) for t in (q[at:to], k[k_at:k_to], v[k_at:k_to]))
        out = scaled_dot_product_attention(part, *kv, attn_mask=sees, enable_gqa=enable_gqa)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def _attend(mask: DocumentMask, queries_Q: Tensor) -> list[Tensor]:
    """Output and gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, S, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    whole = [tensor.requires_grad_() for tensor in (q[:, :, queries_Q], k, v)]
    out = attend_in_documents(*whole, mask)
    return [out, *torch.autograd.grad(out, whole, torch.randn(out.shape))]


@pytest.mark.parametrize("rank", [None, 0, 1, 3])
def test_spans_say_what_the_dense_mask_says(
    rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "varlen_attn", _varlen)
    queries = torch.arange(S) if rank is None else local_positions("all_gather", S, rank, size=4)
    spans = document_spans(NUMBERS_BS, queries)
    # The last rank's head and tail lie side by side.
    assert len(spans) == (1 if rank in (None, 3) else 2)
    torch.testing.assert_close(_attend(spans, queries), _attend(dense(queries), queries))


def test_a_dense_mask_lets_a_token_see_its_document_up_to_itself() -> None:
    mask = dense().squeeze(1) == 0
    for row, lengths in zip(mask, LENGTHS, strict=True):
        blocks = [torch.ones(size, size, dtype=torch.bool).tril() for size in lengths]
        assert torch.equal(row, torch.block_diag(*blocks).bool())


def test_gpus_take_spans_in_16_bits() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert has_kernel(cuda, torch.bfloat16)
    assert not has_kernel(cuda, torch.float32)
    assert not has_kernel(cpu, torch.bfloat16)


def test_the_kernel_of_gpus_is_called_as_it_is_declared() -> None:
    queries = local_positions("all_gather", S, 0, size=4)
    spans = document_spans(NUMBERS_BS, queries)
    # Not of a GPU: autograd refuses fake tensors of one that is not there.
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (
            torch.empty(B, size, heads, 16, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for size, heads in ((len(queries), 4), (S, 2), (S, 2))
        )
        out = attend_in_documents(q, k, v, spans)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape
    assert [grad.shape for grad in grads] == [t.shape for t in (q, k, v)]
