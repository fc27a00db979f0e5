"""Mixing: shares that hold in every window, the same samples for every degree, exact resume."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.jobs import in_parts, loaders, run, take
from titan_lite.config.schema import Data, DataSource
from titan_lite.data.mixture import Mixture
from titan_lite.data.tokenizer_files import load_tokenizer

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)
big = st.integers(0, 10**9)


@given(weights, st.integers(0, 200), st.integers(0, 1000), st.integers(1, 70))
def test_counts_are_those_of_counting(
    shares: list[float], num_samples: int, start: int, stride: int
) -> None:
    mixture = Mixture(shares)
    drawn = [mixture.source(start + i * stride) for i in range(num_samples)]
    for source in range(len(shares)):
        counted = mixture.count(source, num_samples, start=start, stride=stride)
        assert counted == drawn.count(source)


@settings(max_examples=300)
@given(weights, big, st.integers(1, 10**9))
def test_each_window_has_the_shares_but_for_a_few_samples(
    shares: list[float], start: int, length: int
) -> None:
    mixture = Mixture(shares)
    for source, share in enumerate(shares):
        expected = length * share / sum(shares)
        counted = mixture.count(source, length, start=start)
        assert abs(counted - expected) < 1.2 + 0.25 * math.log2(length)


@given(weights, big, st.sampled_from([1, 7, 8, 64, 1000]))
def test_each_stream_has_the_shares_too(shares: list[float], start: int, stride: int) -> None:
    mixture = Mixture(shares)
    for source, share in enumerate(shares):
        counted = mixture.count(source, 10**6, start=start, stride=stride)
        assert counted == pytest.approx(10**6 * share / sum(shares), abs=40)


@given(weights, st.sampled_from([2.0, 0.25, 1024.0]))
def test_weights_are_relative(shares: list[float], factor: float) -> None:
    scaled = Mixture([share * factor for share in shares])
    assert [scaled.source(g) for g in range(99)] == [Mixture(shares).source(g) for g in range(99)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Words of one letter each, of three sources; the last has another field."""
    folder = tmp_path_factory.mktemp("mixed")
    sources = []
    for name, weight, field in (("a", 3, "text"), ("b", 2, "text"), ("c", 1, "content")):
        path = folder / f"{name}.jsonl"
        texts = (f" {name}" * (5 + i % 7) for i in range(12))
        path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
        sources.append(
            DataSource(name=name, weight=weight, dataset_path=str(path), text_field=field)
        )
    return Data(sources=sources, num_streams=4, shuffle_buffer=8)


def _letters(samples: list[list[int]]) -> list[str]:
    """The only letter of each sample."""
    tokenizer = load_tokenizer()
    texts = [tokenizer.decode(t for t in sample if t < tokenizer.bos_id) for sample in samples]
    actual = [{*text} - {" "} for text in texts]
    assert all(len(letters) == 1 for letters in actual)
    return [letters.pop() for letters in actual]


@pytest.fixture(scope="module")
def whole(mixed: Data) -> list[list[int]]:
    """The first samples, read by one rank."""
    return run(mixed, 36)


@pytest.mark.parametrize("degree", [2, 3])
def test_samples_are_of_the_sources_that_the_mixture_says_for_every_degree(
    mixed: Data, whole: list[list[int]], degree: int
) -> None:
    assert run(mixed, 36 // degree, degree=degree) == whole
    assert _letters(whole) == ["abc"[Mixture([3, 2, 1]).source(g)] for g in range(36)]


def test_batches_say_which_source_their_rows_are_from(mixed: Data) -> None:
    (loader,) = loaders(mixed, batch=6)
    batch = next(loader)
    assert batch.sources is not None
    assert batch.sources.tolist() == [Mixture([3, 2, 1]).source(g) for g in range(6)]
    loader.close()


def test_each_stream_of_a_source_is_read_as_in_a_run_of_this_source_alone(
    mixed: Data, whole: list[list[int]]
) -> None:
    mixture = Mixture([3, 2, 1])
    for number, source in enumerate(mixed.sources):
        alone = mixed.model_copy(update={**source.model_dump(), "sources": []})
        samples = run(alone, 36)
        for v in range(4):
            local = [whole[g] for g in range(v, 36, 4) if mixture.source(g) == number]
            assert local == samples[v::4][: len(local)]


def test_resuming_at_another_degree_continues_the_mixture(
    mixed: Data, whole: list[list[int]]
) -> None:
    samples, _ = in_parts(mixed, [(3, 6), (2, 9)])
    assert samples == whole


def test_epochs_are_counted_for_each_source(mixed: Data) -> None:
    (loader,) = loaders(mixed)
    assert loader.epochs() == [[0] * 4] * 3
    take([loader], 120)
    a, b, c = (sum(epochs) / 4 for epochs in loader.epochs())
    # Sources of one size: what is drawn three times as often ends three times as often.
    assert a == pytest.approx(3 * c, rel=0.4)
    assert a > b > c > 0
    loader.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"weight": 4.0}, "data.sources was"), ({"name": "z"}, "data.sources was")],
)
def test_another_mixture_does_not_continue_a_run(
    mixed: Data, change: dict[str, Any], named: str
) -> None:
    _, state = in_parts(mixed, [(1, 4)])
    first = mixed.sources[0].model_copy(update=change)
    with pytest.raises(ValueError, match=named):
        loaders(mixed.model_copy(update={"sources": [first, *mixed.sources[1:]]}), state=state)


def test_a_source_that_cannot_be_found_is_named(tmp_path: Path) -> None:
    source = DataSource(name="web", weight=1, dataset_path=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r'^data.sources.web.dataset_path: ".*" matches no file'):
        loaders(Data(sources=[source]))


def test_the_field_of_a_source_that_no_document_has_is_named_by_its_own_key(mixed: Data) -> None:
    last = mixed.sources[-1].model_copy(update={"text_field": "contents"})
    wrong = mixed.model_copy(update={"sources": [*mixed.sources[:-1], last]})
    expected = (
        r'^data\.sources\.c\.text_field: .*: no field "contents".* set text_field = "content"'
    )
    with pytest.raises(ValueError, match=expected):
        run(wrong, 12)
