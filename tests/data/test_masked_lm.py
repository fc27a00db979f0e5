"""Samples of masked language models: what is hidden, what belongs together, and every resume."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.jobs import TOKENIZER, in_parts, loaders, rows_of
from titan_lite.config.schema import Data, MaskedLM
from titan_lite.data.masked_lm import FOLLOWS, MAX_EMPTY_BLOCKS, OTHER, MaskedPairs
from titan_lite.data.packing import IGNORED, join_documents
from titan_lite.data.tokenizer_files import load_tokenizer

CLS, SEP, MASK, PAD = (
    TOKENIZER.bos_id,
    TOKENIZER.eos_id,
    TOKENIZER.mask_id,
    TOKENIZER.pad_id,
)
SEQ_LEN = 128


def batch_of(section, count=600, seq_len=SEQ_LEN, data=None):
    """Samples of the bundled corpus."""
    data = data or Data(num_streams=4, prefetch=1)
    rows = MaskedPairs(section, seq_len, TOKENIZER)
    (loader,) = loaders(data, batch=count, seq_len=seq_len, rows=rows)
    batch = next(loader)
    loader.close()
    return batch


@pytest.fixture(scope="module", params=[False, True], ids=["tokens", "words"])
def batch(request):
    return batch_of(MaskedLM(whole_word_masking=request.param))


def original(batch):
    """The tokens before they were hidden."""
    return torch.where(batch.labels == IGNORED, batch.inputs, batch.labels)


def parts_of(batch, row):
    """Tokens of the two parts of a sample, its special tokens checked and taken off."""
    content = original(batch)[row][batch.documents[row] == 0].tolist()
    types = batch.token_types[row][: len(content)].tolist()
    first, second = content[: types.index(1)], content[types.index(1) :]
    assert (first[0], first[-1], second[-1]) == (CLS, SEP, SEP)
    assert types == [0] * len(first) + [1] * len(second)
    return first[1:-1], second[:-1]


def test_15_of_100_tokens_are_predicted_of_which_80_are_masked_and_10_replaced(batch):
    is_text = batch.documents == 0
    is_label = batch.labels != IGNORED
    text = is_text.sum() - 3 * len(batch.inputs)
    assert is_label.sum() / text == pytest.approx(0.15, abs=0.003)
    masked = batch.inputs[is_label] == MASK
    kept = batch.inputs[is_label] == batch.labels[is_label]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.02)
    # Any other token of text can replace a token.
    replaced = batch.inputs[is_label][~masked & ~kept]
    assert len(replaced.unique()) > 400
    assert replaced.max() < CLS
    # Nothing else is changed, and every sample has something to predict.
    assert not (batch.inputs == MASK)[~is_label].any()
    assert is_label.any(1).all()


def test_special_tokens_are_never_predicted_and_padding_is_a_document_of_its_own(batch):
    assert batch.labels.max() < CLS
    padding = batch.documents == 1
    assert (batch.inputs[padding] == PAD).all()
    assert (batch.labels[padding] == IGNORED).all()
    assert not batch.token_types[padding].any()
    assert (batch.documents.diff() >= 0).all()
    for row in range(50):
        parts_of(batch, row)


def test_whole_words_are_hidden_or_none_of_their_tokens():
    batch = batch_of(MaskedLM(whole_word_masking=True, mask_prob=0.3), count=100)
    several = 0
    for row in range(100):
        first, second = parts_of(batch, row)
        hidden = (batch.labels[row] != IGNORED).tolist()
        for part, start in ((first, 1), (second, len(first) + 2)):
            starts = [0, *(i for i in range(1, len(part)) if TOKENIZER.starts_word[part[i]])]
            for begin, end in itertools.pairwise([*starts, len(part)]):
                word = set(hidden[start + begin : start + end])
                assert len(word) == 1
                several += end - begin > 1 and word == {True}
    assert several > 200


def test_a_script_without_spaces_is_hidden_in_the_same_share(tmp_path):
    text = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u53bb\u516c\u56ed" * 40
    (tmp_path / "zh.jsonl").write_text("".join(f'{{"text": "{text[i:]}"}}\n' for i in range(8)))
    data = Data(dataset_path=str(tmp_path / "zh.jsonl"), num_streams=2)
    batch = batch_of(MaskedLM(whole_word_masking=True, next_sentence=False), 40, data=data)
    share = (batch.labels != IGNORED).sum() / (batch.documents == 0).sum()
    assert share == pytest.approx(0.15, abs=0.02)


def test_one_in_ten_samples_is_short_and_of_any_length():
    none, every = (batch_of(MaskedLM(short_seq_prob=p)) for p in (0.0, 1.0))
    lengths = {name: (b.documents == 0).sum(1) for name, b in (("none", none), ("every", every))}
    # Shorter samples are ends of documents, or come from short ones.
    assert (lengths["none"] == SEQ_LEN).float().mean() > 0.85
    assert lengths["every"].float().mean() == pytest.approx(SEQ_LEN / 2, abs=6)
    assert {5, 6, 7} & set(lengths["every"].tolist())
    full = {p: (batch_of(MaskedLM(short_seq_prob=p)).documents == 0).all(1) for p in (0.0, 0.1)}
    difference = full[0.0].float().mean() - full[0.1].float().mean()
    assert difference == pytest.approx(0.1, abs=0.04)


def test_half_of_the_second_parts_do_not_follow_and_lengths_do_not_tell_which(batch):
    follows = batch.pair_labels == FOLLOWS
    assert follows.float().mean() == pytest.approx(0.5, abs=0.05)
    assert set(batch.pair_labels.tolist()) == {FOLLOWS, OTHER}
    for what in (batch.token_types.sum(1).float(), (batch.documents == 0).sum(1).float()):
        assert what[follows].mean() == pytest.approx(what[~follows].mean().item(), rel=0.1)


DOCUMENT = st.integers(1, 40)


def documents_of(lengths):
    """A block whose tokens encode their document and place: 100 x document + place."""
    docs = [np.arange(100 * d, 100 * d + n, dtype=np.uint32) for d, n in enumerate(lengths, 1)]
    return join_documents(docs, CLS, SEP)


def pairs_of(blocks, offset=0, item=0, section=None, seq_len=16):
    maker = MaskedPairs(section or MaskedLM(), seq_len, TOKENIZER)
    for make, mark, place in maker.rows(blocks, offset, key=(7, 3), item=item):
        yield make(), mark, place


@given(st.lists(st.lists(DOCUMENT, min_size=1, max_size=6), min_size=1, max_size=4))
@settings(max_examples=30)
def test_what_follows_follows_what_does_not_is_of_another_document_and_nothing_is_lost(blocks):
    seen = {}
    for row, mark, _ in pairs_of([(n, documents_of(d)) for n, d in enumerate(blocks)]):
        tokens = np.where(row.labels == IGNORED, row.inputs, row.labels)
        second = row.token_types == 1
        a = tokens[(row.documents == 0) & ~second][1:-1].tolist()
        b = tokens[second][:-1].tolist()
        assert a == list(range(a[0], a[0] + len(a)))
        assert b == list(range(b[0], b[0] + len(b)))
        used = seen.setdefault(mark, [])
        if row.pair_labels == FOLLOWS:
            assert b[0] == a[-1] + 1
            used += a + b
        elif len(blocks[mark]) == 1:
            # There is no other document: the parts have changed places.
            assert a[0] == b[-1] + 1
            used += b + a
        else:
            assert a[0] // 100 != b[0] // 100
            used += a
    for mark, lengths in enumerate(blocks):
        every = [t for t in documents_of(lengths)[:, 0].tolist() if t < CLS]
        used = seen.get(mark, [])
        # Each once and in order, except the last one of a document that is alone.
        ends = {100 * d + n - 1 for d, n in enumerate(lengths, 1)}
        assert [t for t in every if t in set(used) or t not in ends] == used


@given(
    st.lists(st.lists(DOCUMENT, min_size=1, max_size=6), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=20)
def test_going_on_from_the_place_after_a_sample_gives_the_samples_that_follow(blocks, pairs):
    section = MaskedLM(next_sentence=pairs)
    blocks = [(n, documents_of(d)) for n, d in enumerate(blocks)]
    samples = list(pairs_of(blocks, section=section))
    for done, (_, mark, place) in enumerate(samples, start=1):
        rest = pairs_of(blocks[mark:], place, done, section)
        for got, expected in itertools.zip_longest(rest, samples[done:]):
            assert got[1:] == expected[1:]
            for name, array in vars(expected[0]).items():
                assert np.array_equal(getattr(got[0], name), array)


def test_without_next_sentence_a_sample_is_one_part_whose_pair_is_not_counted():
    batch = batch_of(MaskedLM(next_sentence=False, short_seq_prob=0.0), count=50)
    assert (batch.pair_labels == IGNORED).all()
    assert not batch.token_types.any()
    tokens = original(batch)
    full = (batch.documents == 0).all(1)
    assert (tokens[:, 0] == CLS).all()
    assert (tokens[full][:, -1] == SEP).all()
    assert not (tokens[full][:, 1:-1] >= CLS).any()


def layout(section):
    """Returns rows of short samples made according to `section`."""
    return {"seed": 5, "seq_len": 24, "rows": MaskedPairs(section, 24, TOKENIZER)}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "all.jsonl"
    texts = [f"{i} " + "all that most maddens " * (i % 5) for i in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Data(dataset_path=str(path), num_streams=2, shuffle_buffer=8)


@pytest.fixture(scope="module")
def expected(documents):
    return in_parts(documents, [(1, 160)], rows_of, **layout(MaskedLM()))[0]


@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4), st.integers(0, 12))
@settings(max_examples=8)
def test_samples_are_the_same_at_every_degree_and_after_every_resume(
    documents, expected, degrees, steps
):
    parts = [(degree, steps) for degree in degrees]
    actual, _ = in_parts(documents, parts, rows_of, **layout(MaskedLM()))
    assert actual == expected[: len(actual)]


def test_the_next_epoch_hides_other_tokens(expected):
    texts = {}
    for row in expected:
        both = zip(row["inputs"], row["labels"], strict=True)
        tokens = [token if label == IGNORED else label for token, label in both]
        texts.setdefault(tuple(tokens[1:5]), []).append(row["labels"])
    again = [labels for labels in texts.values() if len(labels) > 1]
    assert len(again) > 5
    assert any(labels[0] != labels[1] for labels in again)


def test_another_masking_cannot_resume_the_samples(documents):
    _, state = in_parts(documents, [(1, 2)], rows_of, **layout(MaskedLM()))
    with pytest.raises(ValueError, match=r"masked_lm\.mask_prob was 0\.15 and is 0\.2"):
        loaders(documents, state=state, **layout(MaskedLM(mask_prob=0.2)))


def test_another_token_for_what_is_masked_cannot_resume_the_samples(documents, monkeypatch):
    _, state = in_parts(documents, [(1, 2)], rows_of, **layout(MaskedLM()))
    monkeypatch.setattr(TOKENIZER, "mask_id", MASK + 1)
    with pytest.raises(ValueError, match=f"mask_id was {MASK} and is {MASK + 1}"):
        loaders(documents, state=state, **layout(MaskedLM()))


def test_a_tokenizer_without_a_mask_is_refused(monkeypatch):
    tokenizer = load_tokenizer()
    monkeypatch.setattr(tokenizer, "mask_id", None)
    with pytest.raises(
        ValueError, match=r"^data\.tokenizer_path: this tokenizer has no mask token"
    ):
        MaskedPairs(MaskedLM(), 16, tokenizer)


def test_documents_that_are_all_too_short_end_the_run():
    blocks = [(n, documents_of([1, 1])) for n in range(MAX_EMPTY_BLOCKS)]
    with pytest.raises(ValueError, match="documents in 100 shuffle buffers in a row has"):
        list(pairs_of(blocks))
    # One that is long enough among them does not.
    assert list(pairs_of([*blocks[:-1], (99, documents_of([1, 2])), *blocks[:9]]))
