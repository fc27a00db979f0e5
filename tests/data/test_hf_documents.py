"""Our tokenizer, as Hugging Face transformers opens it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_lite.data.assets import ASSETS
from titan_lite.data.hf_documents import hf_documents
from titan_lite.data.tiktoken_tokenizer import SPECIAL_TOKENS, TiktokenTokenizer
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.models.bert import MEGATRON_BERT
from titan_lite.models.family import Family
from titan_lite.models.llama import LLAMA

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def theirs(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return opened(ours, tmp_path_factory.mktemp("tokenizer"))


def opened(tokenizer: Tokenizer, folder: Path, family: Family = LLAMA) -> Any:
    assert family.hf_config is not None
    documents = hf_documents(family.flavors["debug"], family.hf_config, tokenizer, dtype="float32")
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_real_text_has_the_same_tokens(ours: Tokenizer, theirs: Any) -> None:
    lines = (ASSETS / "corpus" / "validation.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    for text, tokens in zip(texts, theirs(texts, add_special_tokens=False).input_ids, strict=True):
        assert tokens == ours.encode(text, bos=False, eos=False)
        assert theirs.decode(tokens) == text


@given(st.text(max_size=100).filter(lambda text: not any(map(text.count, SPECIAL_TOKENS))))
def test_any_text_but_special_tokens_has_the_same_tokens(
    ours: Tokenizer, theirs: Any, text: str
) -> None:
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, bos=False, eos=False)


def test_a_text_begins_as_documents_do_in_training(ours: Tokenizer, theirs: Any) -> None:
    assert theirs("whale").input_ids == ours.encode("whale", bos=True, eos=False)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.decode(theirs("whale").input_ids, skip_special_tokens=True) == "whale"
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == 2048


def test_a_piece_that_is_a_token_needs_no_merges(tmp_path: Path) -> None:
    """As some of Llama 3's, which no pair of other tokens makes."""
    tokenizer = TiktokenTokenizer({bytes([value]): value for value in range(256)} | {b"xyz": 256})
    theirs = opened(tokenizer, tmp_path)
    for text, expected in (("xyz", [256]), ("axyz", [*b"axyz"])):
        assert theirs.encode(text, add_special_tokens=False) == expected
        assert tokenizer.encode(text, bos=False, eos=False) == expected


def test_an_encoders_tokenizer_makes_pairs_as_in_training_pads_and_masks(
    ours: Tokenizer, tmp_path: Path
) -> None:
    theirs = opened(ours, tmp_path, MEGATRON_BERT)
    cls, sep, pad = ours.bos_id, ours.eos_id, ours.pad_id
    first, second = (ours.encode(text, bos=False, eos=False) for text in ("whale", "the sea"))
    batch = theirs(["whale", "whale"], ["the sea", "the sea the sea"], padding=True)
    pair = [cls, *first, sep, *second, sep]
    more = len(batch.input_ids[1]) - len(pair)
    assert batch.input_ids[0] == pair + [pad] * more
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert batch.token_type_ids[0] == types + [0] * more
    assert theirs("whale").input_ids == [cls, *first, sep]
    assert theirs.mask_token_id == ours.mask_id


@pytest.mark.parametrize("has_padding", [True, False])
def test_only_padding_has_an_embedding_without_gradient(
    has_padding: bool, ours: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As BERT's token 0 has in transformers where config.json does not say."""
    if not has_padding:
        monkeypatch.setattr(ours, "pad_id", ours.eos_id)
    args = replace(MEGATRON_BERT.flavors["debug"], dim=32, num_layers=1, ffn_dim=32)
    assert MEGATRON_BERT.hf_config is not None
    for tokenizer in (None, ours):
        documents = hf_documents(args, MEGATRON_BERT.hf_config, tokenizer, dtype="float32")
        config = transformers.MegatronBertConfig(**documents["config.json"])
        embedding = transformers.MegatronBertModel(config).get_input_embeddings()
        padding = ours.pad_id if tokenizer and has_padding else None
        assert embedding.padding_idx == padding
