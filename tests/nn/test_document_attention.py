"""Attention inside documents: as if each were alone."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from titan_lite.config.schema import Data
from titan_lite.data.loader import Batch
from titan_lite.data.packing import join_documents, to_row
from titan_lite.models.llama import LLAMA
from titan_lite.nn import document_attention
from titan_lite.nn.build_model import build_model
from titan_lite.nn.decoder import Decoder
from titan_lite.nn.document_attention import (
    DocumentMask,
    attend_in_documents,
    dense_mask,
    document_spans,
    has_kernel,
)
from titan_lite.nn.token_context import TokenContext
from titan_lite.parallel.context import local_positions

ARGS = dataclasses.replace(LLAMA.flavors["debug"], dim=64, ffn_dim=128, num_layers=2)
# Rows of 32 tokens: documents of 1 to 25, some of which a row cuts.
LENGTHS = [[7, 1, 20, 4], [25, 7], [3, 9, 9, 11]]
B, S = len(LENGTHS), sum(LENGTHS[0])
NUMBERS_BS = torch.tensor([np.repeat(range(len(row)), row).tolist() for row in LENGTHS])


def dense(numbers_BS: Tensor, queries_Q: Tensor) -> Tensor:
    return dense_mask(numbers_BS, queries_Q, torch.float32)


def _packed(packing: str) -> Batch:
    """One sample that starts and ends inside a document."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, ARGS.vocab_size, size) for size in (9, 0, 17, 5, 12)]
    tokens = join_documents([text.astype(np.uint32) for text in texts], 1, 2)
    return Batch.of([to_row(tokens[start : start + 41], 40, _section(packing)) for start in (4, 6)])


def _section(packing: str) -> Data:
    return Data(packing=packing, packing_block=10)


def _gradients(model: Decoder) -> dict[str, Tensor]:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


FORMS: dict[str, dict[str, Any]] = {
    "one after the other": {},
    "parallel residual": {"parallel_residual": True},
    "learned positions": {"positions": "learned"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packing", ["document", "fixed"])
def test_a_packed_batch_gives_the_logits_and_gradients_of_each_part_alone(
    packing: str, form: str
) -> None:
    torch.manual_seed(0)
    model, batch = build_model(LLAMA, replace(ARGS, **FORMS[form])), _packed(packing)
    assert batch.positions is not None
    assert batch.documents is not None
    mask = dense_mask(batch.documents, torch.arange(40), torch.float32)
    logits = model(batch.inputs, context=TokenContext(batch.positions, mask))
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
    without = model(batch.inputs, context=TokenContext(batch.positions))
    assert not torch.allclose(without, logits, atol=1e-2)


def test_positions_may_differ_between_rows() -> None:
    rope = build_model(LLAMA, ARGS).rope
    q, k = torch.randn(2, 5, 4, ARGS.head_size), torch.randn(2, 5, 2, ARGS.head_size)
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
    together = rope(q, k, positions)
    for row in range(2):
        alone = rope(q[row, None], k[row, None], positions[row])
        assert all(torch.equal(a[row, None], b) for a, b in zip(together, alone, strict=True))


def _parts(starts: list[Tensor]) -> list[tuple[slice, slice]]:
    """Queries and keys of each document."""
    assert all(tensor.dtype == torch.int32 for tensor in starts)
    queries, keys = ([slice(*pair) for pair in itertools.pairwise(t.tolist())] for t in starts)
    return list(zip(queries, keys, strict=True))


def _weights(q_nNH: Tensor, k_mKH: Tensor, is_causal: bool) -> Tensor:
    """Softmax of the scores, (N, n, m); the last query belongs to the last key, as in flash."""
    k_mNH = k_mKH.repeat_interleave(q_nNH.shape[1] // k_mKH.shape[1], dim=1)
    scores_Nnm = torch.einsum("nNH,mNH->Nnm", q_nNH, k_mNH) / q_nNH.shape[-1] ** 0.5
    n, m = scores_Nnm.shape[1:]
    hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
    return scores_Nnm.masked_fill(hidden & is_causal, -torch.inf).softmax(-1)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *rest: Any, **_: Any
) -> tuple[Tensor, ...]:
    max_q, max_k, dropout, is_causal, _debug = rest
    assert (int(q_starts[-1]), int(k_starts[-1])) == (len(q), len(k))
    assert q_starts.diff().max() <= max_q
    assert k_starts.diff().max() <= max_k
    assert dropout == 0.0
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out, lse = torch.empty_like(q), q.new_zeros(q.shape[1], len(q))
    for i, j in _parts([q_starts, k_starts]):
        out[i] = torch.einsum("Nnm,mNH->nNH", _weights(q[i], k[j], is_causal), v[j])
    return out, lse, lse[:0], lse[:0], lse[:0]


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _out: Tensor, _lse: Tensor, *rest: Any, **_: Any
) -> tuple[Tensor, ...]:
    repeats = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    grads = [torch.zeros_like(t) for t in (q, wide_k, wide_v)]
    for i, j in _parts(list(rest[:2])):
        weights = _weights(q[i], k[j], rest[5])
        of_weights = torch.einsum("nNH,mNH->Nnm", grad[i], wide_v[j])
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        of_scores /= q.shape[-1] ** 0.5
        grads[0][i] = torch.einsum("Nnm,mNH->nNH", of_scores, wide_k[j])
        grads[1][j] = torch.einsum("Nnm,nNH->mNH", of_scores, q[i])
        grads[2][j] = torch.einsum("Nnm,nNH->mNH", weights, grad[i])
    return grads[0], *(t.unflatten(1, (-1, repeats)).sum(2) for t in grads[1:])


@pytest.fixture
def flash_on_cpu() -> Iterator[None]:
    """The kernels of GPUs, by their description, for torch to call on a CPU."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _flash_forward, "CPU")
    library.impl("_flash_attention_backward", _flash_backward, "CPU")
    yield
    library._destroy()


def _attend(mask: DocumentMask, queries_Q: Tensor, *, causal: bool = True) -> list[Tensor]:
    """Output and gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, S, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    whole = [tensor.requires_grad_() for tensor in (q[:, :, queries_Q], k, v)]
    out = attend_in_documents(*whole, mask, causal=causal)
    return [out, *torch.autograd.grad(out, whole, torch.randn(out.shape))]


def test_spans_and_the_dense_mask_say_the_same_where_all_of_a_document_is_seen(
    flash_on_cpu: None,
) -> None:
    queries = torch.arange(S)
    mask = dense_mask(NUMBERS_BS, queries, torch.float32, causal=False)
    for row, lengths in zip(mask.squeeze(1) == 0, LENGTHS, strict=True):
        assert torch.equal(row, torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool())
    spans = document_spans(NUMBERS_BS, queries)
    torch.testing.assert_close(
        _attend(spans, queries, causal=False), _attend(mask, queries, causal=False)
    )


@pytest.mark.parametrize("rank", [None, 0, 1, 3])
def test_spans_match_the_dense_mask(rank: int | None, flash_on_cpu: None) -> None:
    queries = torch.arange(S) if rank is None else local_positions("all_gather", S, rank, size=4)
    spans = document_spans(NUMBERS_BS, queries)
    # The last rank's head and tail lie side by side.
    assert len(spans) == (1 if rank in (None, 3) else 2)
    torch.testing.assert_close(
        _attend(spans, queries), _attend(dense(NUMBERS_BS, queries), queries)
    )


@pytest.mark.parametrize(
    ("lengths", "longest"), [([32], 128), ([128, 256], 256), ([100, 257], 512), ([1000, 24], 1024)]
)
def test_the_kernel_is_told_the_longest_document_rounded_up_to_a_power_of_two(
    lengths: list[int], longest: int
) -> None:
    numbers_BS = torch.tensor([np.repeat(range(len(lengths)), lengths).tolist()])
    (spans,) = document_spans(numbers_BS, torch.arange(sum(lengths)))
    assert (spans.max_queries, spans.max_keys) == (longest, longest)
    # In the last rank's part, a document has only the queries of that part.
    (spans,) = document_spans(numbers_BS, torch.arange(sum(lengths))[-16:])
    assert (spans.max_queries, spans.max_keys) == (128, longest)


def test_compiled_blocks_take_documents_of_any_number_and_length_in_two_graphs(
    flash_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The longest documents below are of 32, 2 and 8 tokens.
    monkeypatch.setattr(document_attention, "TILE", 1)
    graphs = []

    def counting_backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.manual_seed(0)
    model = build_model(LLAMA, ARGS)
    torch._dynamo.reset()
    for block in model.layers.values():
        block.compile(fullgraph=True, backend=counting_backend)
    queries = torch.arange(S)
    for numbers_BS in (NUMBERS_BS, (queries // 2).expand(B, S), (queries // 7).expand(B, S)):
        results = []
        tokens = torch.randint(ARGS.vocab_size, (B, S))
        for mask in (document_spans(numbers_BS, queries), dense(numbers_BS, queries)):
            logits = model(tokens, context=TokenContext(mask=mask))
            logits.square().sum().backward()
            results.append([logits, *_gradients(model).values()])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    # With spans two, the second for any number of them; with a dense mask one.
    assert len(graphs) == 3


def test_a_dense_mask_lets_a_token_see_its_document_up_to_itself() -> None:
    mask = dense(NUMBERS_BS, torch.arange(S)).squeeze(1) == 0
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
