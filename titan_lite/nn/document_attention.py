"""Attention within documents.

Shape suffixes: B batch, S sequence, Q the queries' part of it, N query heads, K key/value heads,
H head dim, T all tokens of the batch in one row, D documents of the batch, and one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Queries or keys of one block of the kernel; a document takes at least one block.
TILE = 128


class Spans(NamedTuple):
    """Contiguous queries of each row, and where in the batch each document starts.

    Queries [query_starts_D[d], query_starts_D[d + 1]) of document d attend to its keys from
    key_starts_D[d] up to their own position; without causality, to all its keys, and then the
    queries must be whole rows. int32, as the kernel requires. max_queries, max_keys: upper bounds
    for one document; the kernel launches blocks for this many.
    """

    num_queries: int
    max_queries: int
    max_keys: int
    query_starts_D: Tensor
    key_starts_D: Tensor


DocumentMask = Tensor | tuple[Spans, ...]
"""Attention mask: (B, 1, Q, S), 0 or -inf, added to the scores; or spans of all queries."""


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True if a kernel supports spans; otherwise a dense mask of Q x S is needed."""
    return device.type == "cuda" and dtype != torch.float32


def dense_mask(
    documents_BS: Tensor, queries_Q: Tensor, dtype: torch.dtype, *, causal: bool = True
) -> Tensor:
    """Builds the mask from the document numbers of whole rows, for queries at these indices."""
    sees_BQS = documents_BS[:, queries_Q, None] == documents_BS[:, None]
    if causal:
        positions_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
        sees_BQS &= queries_Q[:, None] >= positions_S
    # Not boolean: SDPA would convert it in every layer, and keep each result for backward.
    mask_BQS = torch.zeros(sees_BQS.shape, dtype=dtype, device=documents_BS.device)
    return mask_BQS.masked_fill_(~sees_BQS, -torch.inf).unsqueeze(1)


def document_spans(documents_BS: Tensor, queries_Q: Tensor) -> tuple[Spans, ...]:
    """Builds the spans, on the host: one for each contiguous range of queries."""
    jumps = (queries_Q.diff() != 1).nonzero().flatten() + 1
    runs = queries_Q.tensor_split(jumps.tolist())
    return tuple(_spans(documents_BS, int(run[0]), len(run)) for run in runs)


def _spans(documents_BS: Tensor, first: int, count: int) -> Spans:
    """Spans of the queries [first, first + count) of each row; other documents have only keys."""
    B, S = documents_BS.shape
    starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    starts_BS[:, 1:] = documents_BS.diff() != 0
    # No query attends to keys after the last query of a row: they are a separate document.
    starts_BS[:, first + count :][:, :1] = True
    row_D, key_D = starts_BS.nonzero(as_tuple=True)
    query_starts_D = row_D * count + (key_D - first).clamp(0, count)
    key_starts_D = row_D * S + key_D
    query_starts_D = _closed(query_starts_D, B * count)
    key_starts_D = _closed(key_starts_D, B * S)
    return Spans(
        count, _longest(query_starts_D), _longest(key_starts_D), query_starts_D, key_starts_D
    )


def _longest(starts_D: Tensor) -> int:
    """Length of the longest document, rounded up to a power of two to limit recompilation."""
    longest = max(TILE, int(starts_D.diff().max()))
    return 2 ** (longest - 1).bit_length()


def _closed(starts_D: Tensor, end: int) -> Tensor:
    return torch.cat((starts_D, torch.tensor([end]))).to(torch.int32)


def attend_in_documents(
    q_BNQH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: DocumentMask,
    *,
    causal: bool = True,
) -> Tensor:
    """softmax(q k / sqrt(H)) v with the mask. causal: the same as for the mask."""
    has_gqa = q_BNQH.shape[1] != k_BKSH.shape[1]
    if isinstance(mask, Tensor):
        return scaled_dot_product_attention(
            q_BNQH, k_BKSH, v_BKSH, attn_mask=mask, enable_gqa=has_gqa
        )
    from titan_lite.nn import varlen

    settings: dict[str, Any] = {"enable_gqa": True} if has_gqa and varlen.TAKES_GQA else {}
    k_TKH, v_TKH = _in_one_row(k_BKSH), _in_one_row(v_BKSH)
    outs = []
    for part_BNQH, spans in zip(q_BNQH.split([s.num_queries for s in mask], 2), mask, strict=True):
        out_TNH: Any = varlen.varlen_attn(
            _in_one_row(part_BNQH),
            k_TKH,
            v_TKH,
            spans.query_starts_D,
            spans.key_starts_D,
            spans.max_queries,
            spans.max_keys,
            # If a document has more keys than queries, the last key belongs to the last query.
            window_size=(-1, 0 if causal else -1),
            **settings,
        )
        outs.append(out_TNH.unflatten(0, (len(q_BNQH), -1)).transpose(1, 2))
    return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]


def _in_one_row(heads_BNSH: Tensor) -> Tensor:
    """Returns (B, N, S, H) as (B x S, N, H), a view of the projection's result."""
    return heads_BNSH.transpose(1, 2).flatten(0, 1)
