"""Tokenizer: tiktoken files, special tokens of Llama 3, agreement with the trained BPE."""

import base64
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_lite.data.assets import ASSETS
from titan_lite.data.tiktoken_tokenizer import SPECIAL_TOKENS
from titan_lite.data.tokenizer_files import load_tokenizer

BYTES = [base64.b64encode(bytes([value])) + b" %d" % value for value in range(256)]


@pytest.fixture(scope="module")
def bundled():
    return load_tokenizer()


@pytest.fixture(scope="module")
def train_tokenizer():
    path = ASSETS.parent / "scripts" / "train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(train_tokenizer):
    return {
        s: train_tokenizer.read_texts(ASSETS / f"corpus/{s}.jsonl") for s in ("train", "validation")
    }


def test_the_bundled_vocabulary_is_2048_with_bos_and_eos_after_the_ranks(bundled):
    assert (bundled.vocab_size, bundled.bos_id, bundled.eos_id) == (2048, 1792, 1793)
    assert len(set(SPECIAL_TOKENS)) == 256


def test_validation_text_round_trips(bundled, corpus):
    for text in corpus["validation"]:
        assert bundled.decode(bundled.encode(text, bos=False, eos=False)) == text


@given(st.text(max_size=200))
def test_any_text_round_trips(text):
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text


def test_training_again_gives_the_committed_file(train_tokenizer, corpus):
    committed = (ASSETS / "tokenizer" / "tokenizer.model").read_bytes()
    for _ in range(2):
        assert train_tokenizer.tiktoken_lines(train_tokenizer.train(corpus["train"])) == committed


def test_tokens_equal_the_segmentation_of_the_trained_tokenizer(train_tokenizer, corpus, bundled):
    trained = train_tokenizer.train(corpus["train"])
    for text in corpus["validation"]:
        assert bundled.encode(text, bos=False, eos=False) == trained.encode(text).ids


def test_the_unigram_entropy_of_even_tokens_is_the_logarithm_of_their_number(train_tokenizer):
    assert train_tokenizer.unigram_entropy([3, 5, 3, 5]) == pytest.approx(0.6931, abs=1e-4)


def test_bos_and_eos_are_added_only_on_request(bundled):
    plain = bundled.encode("whale", bos=False, eos=False)
    assert bundled.encode("whale", bos=True, eos=True) == [1792, *plain, 1793]
    assert bundled.encode("whale", bos=True, eos=False) == [1792, *plain]
    assert bundled.decode([1792, *plain, 1793]) == "<|begin_of_text|>whale<|end_of_text|>"


def test_the_spelling_of_a_special_token_inside_a_document_is_ordinary_text(bundled):
    tokens = bundled.encode("a <|end_of_text|> b", bos=False, eos=False)
    assert max(tokens) < bundled.bos_id
    assert bundled.decode(tokens) == "a <|end_of_text|> b"


def test_threads_do_not_change_the_tokens(bundled, corpus):
    texts = corpus["validation"][:8]
    one, three = (bundled.encode_documents(texts, threads=n) for n in (1, 3))
    assert [tokens.tolist() for tokens in one] == [tokens.tolist() for tokens in three]
    assert [bundled.encode(t, bos=False, eos=False) for t in texts] == [t.tolist() for t in one]


def test_a_document_that_overruns_the_regex_engine_is_still_tokenized(bundled):
    text = "start" + " " * 1_200_000 + "end"
    assert bundled.decode(bundled.encode(text, bos=False, eos=False)) == text


def test_a_lone_surrogate_becomes_the_replacement_character(bundled):
    assert bundled.decode(bundled.encode("a\ud800b", bos=False, eos=False)) == "a\ufffdb"


@pytest.mark.parametrize(
    ("line", "actual"),
    [(b"??? 256", "??? 256"), (b"YWI= x", "YWI= x"), (b"YWI=", "YWI="), (b"YWI= 300", "YWI= 300")],
)
def test_a_malformed_line_is_named_with_its_file(tmp_path, line, actual):
    path = tmp_path / "broken.model"
    path.write_bytes(b"\n".join([*BYTES, line]) + b"\n")
    with pytest.raises(ValueError, match=r"broken\.model, line 257: expected .* rank 256") as error:
        load_tokenizer(path)
    assert repr(actual) in str(error.value)


def test_a_token_that_stands_twice_is_named(tmp_path):
    path = tmp_path / "twice.model"
    path.write_bytes(b"\n".join([*BYTES, b"YQ== 256"]))
    with pytest.raises(ValueError, match=r"twice\.model, line 257: expected a base64 token that"):
        load_tokenizer(path)


def test_a_file_without_every_single_byte_is_refused(tmp_path):
    path = tmp_path / "short.model"
    path.write_bytes(b"\n".join(BYTES[:200]))
    with pytest.raises(ValueError, match=r"short\.model: 56 of the 256 single bytes.*first is 200"):
        load_tokenizer(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer_path: .*nowhere\.model does not exist"):
        load_tokenizer(tmp_path / "nowhere.model")


def test_missing_bundled_files_name_the_place_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("titan_lite.data.assets.ASSETS", tmp_path / "assets")
    with pytest.raises(ValueError, match=r"assets/tokenizer/tokenizer\.model does not exist"):
        load_tokenizer()


def test_metas_llama_3_file_gives_metas_tokens():
    package = importlib.util.find_spec("llama_models")
    if package is None or package.origin is None:
        pytest.skip("the llama-models package, which carries Meta's file, is not installed")
    llama = load_tokenizer(Path(package.origin).parent / "llama3" / "tokenizer.model")
    assert (llama.vocab_size, llama.bos_id, llama.eos_id) == (128_256, 128_000, 128_001)
    assert llama.encode("Hello world", bos=True, eos=False) == [128_000, 9906, 1917]
    # From llama_models' own tests.
    sentence = [128_000, 2028, 374, 264, 1296, 11914, 13, 128_001]
    assert llama.encode("This is a test sentence.", bos=True, eos=True) == sentence
    header = llama.decode([128_006, 882, 128_007, 271])
    assert header == "<|start_header_id|>user<|end_header_id|>\n\n"
