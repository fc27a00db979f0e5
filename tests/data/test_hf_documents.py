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
def local() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def reference(local: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return opened(local, tmp_path_factory.mktemp("tokenizer"))


def opened(tokenizer: Tokenizer, folder: Path, family: Family = LLAMA) -> Any:
    assert family.hf_config is not None
    documents = hf_documents(family.flavors["debug"], family.hf_config, tokenizer, dtype="float32")
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_real_text_has_the_same_tokens(local: Tokenizer, reference: Any) -> None:
    lines = (ASSETS / "corpus" / "validation.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    for text, tokens in zip(
        texts, reference(texts, add_special_tokens=False).input_ids, strict=True
    ):
        assert tokens == local.encode(text, bos=False, eos=False)
        assert reference.decode(tokens) == text


@given(st.text(max_size=100).filter(lambda text: not any(map(text.count, SPECIAL_TOKENS))))
def test_any_text_but_special_tokens_has_the_same_tokens(
    local: Tokenizer, reference: Any, text: str
) -> None:
    assert reference.encode(text, add_special_tokens=False) == local.encode(
        text, bos=False, eos=False
    )


def test_a_text_begins_as_documents_do_in_training(local: Tokenizer, reference: Any) -> None:
    assert reference("whale").input_ids == local.encode("whale", bos=True, eos=False)
    assert (reference.bos_token_id, reference.eos_token_id) == (local.bos_id, local.eos_id)
    assert reference.decode(reference("whale").input_ids, skip_special_tokens=True) == "whale"
    assert len(reference) == local.vocab_size
    assert reference.model_max_length == 2048


def test_a_piece_that_is_a_token_needs_no_merges(tmp_path: Path) -> None:
    """Adds tokens that no pair of other tokens makes, as in Llama 3's tokenizer."""
    tokenizer = TiktokenTokenizer({bytes([value]): value for value in range(256)} | {b"xyz": 256})
    reference = opened(tokenizer, tmp_path)
    for text, expected in (("xyz", [256]), ("axyz", [*b"axyz"])):
        assert reference.encode(text, add_special_tokens=False) == expected
        assert tokenizer.encode(text, bos=False, eos=False) == expected


def test_an_encoders_tokenizer_makes_pairs_as_in_training_pads_and_masks(
    local: Tokenizer, tmp_path: Path
) -> None:
    reference = opened(local, tmp_path, MEGATRON_BERT)
    cls, sep, pad = local.bos_id, local.eos_id, local.pad_id
    first, second = (local.encode(text, bos=False, eos=False) for text in ("whale", "the sea"))
    batch = reference(["whale", "whale"], ["the sea", "the sea the sea"], padding=True)
    pair = [cls, *first, sep, *second, sep]
    more = len(batch.input_ids[1]) - len(pair)
    assert batch.input_ids[0] == pair + [pad] * more
    types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert batch.token_type_ids[0] == types + [0] * more
    assert reference("whale").input_ids == [cls, *first, sep]
    assert reference.mask_token_id == local.mask_id


@pytest.mark.parametrize("has_padding", [True, False])
def test_only_padding_has_an_embedding_without_gradient(
    has_padding: bool, local: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token 0 is padding, as transformers assumes for BERT without a pad_token_id."""
    if not has_padding:
        monkeypatch.setattr(local, "pad_id", local.eos_id)
    args = replace(MEGATRON_BERT.flavors["debug"], dim=32, num_layers=1, ffn_dim=32)
    assert MEGATRON_BERT.hf_config is not None
    for tokenizer in (None, local):
        documents = hf_documents(args, MEGATRON_BERT.hf_config, tokenizer, dtype="float32")
        config = transformers.MegatronBertConfig(**documents["config.json"])
        embedding = transformers.MegatronBertModel(config).get_input_embeddings()
        padding = local.pad_id if tokenizer and has_padding else None
        assert embedding.padding_idx == padding
