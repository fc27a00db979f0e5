"""Packing: every token once, in order, whatever the documents and blocks."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from titan_lite.data.packing import join_documents, pack

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
    tokens = join_documents(docs, BOS, EOS).tolist()
    expected = [token for doc in docs for token in (BOS, *doc.tolist(), EOS)]
    assert tokens == expected


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
