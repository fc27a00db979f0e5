"""Packing: every token once, in order, whatever the documents and blocks."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_lite.config.schema import Data
from titan_lite.data.packing import IGNORED, cut_documents, join_documents, pack, to_row

BOS, EOS = 1000, 1001
documents = st.lists(
    st.lists(st.integers(0, 999), max_size=20).map(lambda d: np.array(d, np.uint32)), max_size=12
)
token_blocks = st.lists(
    st.lists(st.integers(0, 999), max_size=20).map(lambda d: np.array(d, np.uint32)), max_size=12
)
seq_lens = st.integers(1, 9)


@given(documents)
def test_each_document_stands_whole_between_bos_and_eos(docs):
    tokens, indices = join_documents(docs, BOS, EOS).T.tolist()
    assert tokens == [token for doc in docs for token in (BOS, *doc.tolist(), EOS)]
    assert indices == [index for doc in docs for index in range(len(doc) + 2)]


@given(token_blocks, seq_lens)
def test_samples_overlap_by_one_and_conserve_every_token(blocks, seq_len):
    samples = [sample for sample, _, _ in pack(enumerate(blocks), seq_len)]
    every = [token for block in blocks for token in block.tolist()]
    rebuilt = every[:1] + [token for sample in samples for token in sample[1:].tolist()]
    assert rebuilt == every[: max(1, len(samples) * seq_len + 1)]
    assert all(len(sample) == seq_len + 1 for sample in samples)
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(samples))
    assert len(samples) == max(0, len(every) - 1) // seq_len


@given(token_blocks, seq_lens)
def test_packing_again_from_the_place_after_a_sample_gives_the_samples_that_follow(blocks, seq_len):
    samples = list(pack(enumerate(blocks), seq_len))
    for done, (_, block, offset) in enumerate(samples, start=1):
        rest = pack(list(enumerate(blocks))[block:], seq_len, offset)
        again = [(sample.tolist(), mark, at) for sample, mark, at in rest]
        assert again == [(sample.tolist(), mark, at) for sample, mark, at in samples[done:]]


@given(token_blocks, seq_lens)
def test_a_place_lies_inside_its_block(blocks, seq_len):
    for _, block, offset in pack(enumerate(blocks), seq_len):
        assert 0 <= offset < len(blocks[block])


document_blocks = st.lists(documents, max_size=4).map(
    lambda blocks: [join_documents(docs, BOS, EOS) for docs in blocks]
)


@given(document_blocks, seq_lens)
def test_cut_documents_are_whole_documents_that_overlap_by_one_token_where_cut(blocks, seq_len):
    joined = [pair for block in blocks for pair in block.tolist()]
    starts = [place for place, (_, index) in enumerate(joined) if index == 0]
    expected = [
        joined[at : min(end, at + seq_len + 1)]
        for start, end in itertools.pairwise([*starts, len(joined)])
        for at in range(start, end - 1, seq_len)
    ]
    samples = [sample.tolist() for sample, _, _ in cut_documents(enumerate(blocks), seq_len)]
    assert samples == expected


@given(document_blocks, seq_lens)
def test_cutting_again_from_the_place_after_a_sample_gives_the_samples_that_follow(blocks, seq_len):
    samples = list(cut_documents(enumerate(blocks), seq_len))
    for done, (_, block, offset) in enumerate(samples, start=1):
        rest = cut_documents(list(enumerate(blocks))[block:], seq_len, offset)
        expected = [sample.tolist() for sample, _, _ in samples[done:]]
        assert [sample.tolist() for sample, _, _ in rest] == expected


# The end of a document of 6 tokens, a whole one of 4, the beginning of one more.
TOKENS = [13, 14, 15, EOS, BOS, 21, 22, EOS, BOS]
INDICES = [2, 3, 4, 5, 0, 1, 2, 3, 0]
X = IGNORED


@pytest.mark.parametrize(
    ("packing", "labels", "positions", "documents"),
    [
        ("concat", [14, 15, EOS, BOS, 21, 22, EOS, BOS], None, None),
        (
            "document",
            [14, 15, EOS, X, 21, 22, EOS, X],
            [0, 1, 2, 3, 0, 1, 2, 3],
            [0, 0, 0, 0, 1, 1, 1, 1],
        ),
        (
            "fixed",
            [14, 15, EOS, BOS, 21, 22, EOS, BOS],
            [0, 1, 0, 1, 0, 1, 0, 1],
            [0, 0, 1, 1, 2, 2, 3, 3],
        ),
    ],
)
def test_labels_positions_and_documents_of_a_sample(packing, labels, positions, documents):
    sample = np.array([TOKENS, INDICES], np.uint32).T
    row = to_row(sample, 8, Data(packing=packing, packing_block=2))
    assert row.inputs.tolist() == TOKENS[:-1]
    assert row.labels.tolist() == labels
    for array, expected in ((row.positions, positions), (row.documents, documents)):
        assert array is None if expected is None else array.tolist() == expected


def test_a_short_document_is_padded_and_its_padding_not_counted():
    (sample,) = (s for s, _, _ in cut_documents([(0, join_documents([[7, 8]], BOS, EOS))], 6))
    row = to_row(sample, 6, Data(packing="none"))
    assert row.inputs.tolist() == [BOS, 7, 8, EOS, EOS, EOS]
    assert row.labels.tolist() == [7, 8, EOS, X, X, X]
    assert row.positions is row.documents is None
