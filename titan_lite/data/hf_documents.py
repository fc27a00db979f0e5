"""The files next to a Hugging Face model's weights: config.json and the tokenizer's.

A tokenizer becomes a tokenizer.json that gives a text the same ids as in training, after the BOS
that starts a document. No EOS follows, since generation continues a text.
"""

import json
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from titan_lite.data.hf_tokenizer import BYTE_LETTERS, HFTokenizer
from titan_lite.data.special_tokens import FILE_NAMES as COMPANIONS
from titan_lite.data.tiktoken_tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    TiktokenTokenizer,
)
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.models.args import DecoderArgs
from titan_lite.models.hf_config import HFConfig, hf_config_from_args

# Keys of a tokenizer_config.json that are kept. Others would make transformers change
# tokenizer.json.
_KEPT = (
    "unk_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "chat_template",
    "padding_side",
    "truncation_side",
)


def hf_documents(
    args: DecoderArgs, hf: HFConfig, tokenizer: Tokenizer | None, *, dtype: str
) -> dict[str, dict[str, Any] | bytes]:
    """Returns JSON documents, or contents, by file name; without a tokenizer, only config.json.

    dtype: of the weights, as torch spells it. There is no tokenizer.json if `tokenizers` cannot
    represent a sentencepiece model; `export_report` reports that.
    """
    if tokenizer is None:
        return {"config.json": hf_config_from_args(args, hf, dtype=dtype)}
    eos_id, pad_id = tokenizer.eos_id, tokenizer.pad_id
    config = hf_config_from_args(
        args,
        hf,
        dtype=dtype,
        bos_id=tokenizer.bos_id,
        eos_id=eos_id,
        # An EOS used as padding is not declared as padding, since the model is trained on it.
        pad_id=None if pad_id == eos_id else pad_id,
    )
    documents: dict[str, dict[str, Any] | bytes] = {"config.json": config}
    if "tokenizer.model" in tokenizer.files:
        documents["tokenizer.model"] = tokenizer.files["tokenizer.model"]
    try:
        document = _tokenizer_json(tokenizer)
    except ValueError:
        return documents
    backend = Backend.from_str(json.dumps(document))
    _add_bos_template(document, backend, tokenizer, of_pairs=not args.causal)
    return {
        **documents,
        "tokenizer.json": document,
        "tokenizer_config.json": _config(tokenizer, args, backend.id_to_token),
    }


def _config(tokenizer: Tokenizer, args: DecoderArgs, name_of: Any) -> dict[str, Any]:
    """Returns a tokenizer_config.json with a class that leaves tokenizer.json unchanged."""
    original: dict[str, Any] = {}
    for name in reversed(COMPANIONS):
        original |= json.loads(tokenizer.files.get(name, b"{}"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: original[key] for key in _KEPT if original.get(key) is not None},
        "bos_token": name_of(tokenizer.bos_id),
        "eos_token": name_of(tokenizer.eos_id),
        "pad_token": name_of(tokenizer.pad_id),
        "clean_up_tokenization_spaces": False,
        "model_max_length": args.max_seq_len,
    }
    if not args.causal:
        # The format of samples made by masked_lm.py.
        config |= {
            "cls_token": name_of(tokenizer.bos_id),
            "sep_token": name_of(tokenizer.eos_id),
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        }
        if tokenizer.mask_id is not None:
            config["mask_token"] = name_of(tokenizer.mask_id)
    return config


def _add_bos_template(
    document: dict[str, Any], backend: Backend, tokenizer: Tokenizer, *, of_pairs: bool
) -> None:
    """Adds a template to a tokenizer.json that puts [BOS] before a text, unless it has one.

    of_pairs: adds [BOS] A [EOS] and [BOS] A [EOS] B [EOS], with types; otherwise only [BOS] A.
    """
    text = backend.encode("a", add_special_tokens=False).ids
    after = [tokenizer.eos_id] * of_pairs
    one, two = (backend.encode("a", pair).ids for pair in (None, "a"))
    expected = [tokenizer.bos_id, *text, *after]
    if one == expected and (not of_pairs or two == [*expected, *text, *after]):
        return
    bos, eos = map(backend.id_to_token, (tokenizer.bos_id, tokenizer.eos_id))
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    single, second = (
        [{"Sequence": {"id": name, "type_id": i}}]
        + [{"SpecialToken": {"id": eos, "type_id": i}}] * of_pairs
        for i, name in enumerate("AB")
    )
    template = {
        "type": "TemplateProcessing",
        "single": [first, *single],
        "pair": [first, *single, *second],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in ((bos, tokenizer.bos_id), (eos, tokenizer.eos_id))
        },
    }
    earlier = document.get("post_processor") or {}
    # Byte-level processors correct the offsets of tokens.
    kept = [
        part for part in earlier.get("processors", [earlier]) if part.get("type") == "ByteLevel"
    ]
    document["post_processor"] = template
    if kept:
        document["post_processor"] = {"type": "Sequence", "processors": [*kept, template]}


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns a tokenizer.json with the tokenizer's ids; ValueError if there is no such file."""
    if isinstance(tokenizer, HFTokenizer):
        content: str | bytes = tokenizer.files["tokenizer.json"]
    elif isinstance(tokenizer, TiktokenTokenizer):
        content = _tiktoken_backend(tokenizer).to_str()
    else:
        from titan_lite.data.sentencepiece_json import sentencepiece_backend

        content = sentencepiece_backend(tokenizer.files["tokenizer.model"]).to_str()
    document: dict[str, Any] = json.loads(content)
    return document | {"truncation": None, "padding": None}


def _tiktoken_backend(tokenizer: TiktokenTokenizer) -> Backend:
    """Returns the same byte-level BPE of `tokenizers`; special tokens in a text are special."""
    vocabulary = {_spell(token): rank for token, rank in tokenizer.ranks.items()}
    # ignore_merges: text that is a token becomes that token, as in tiktoken.
    backend = Backend(models.BPE(vocabulary, _merges(tokenizer.ranks), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return backend


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Returns all pairs of tokens whose text is a token, by its rank, as tiktoken merges them."""
    splits = ((token[:i], token[i:]) for token in ranks for i in range(1, len(token)))
    return [
        (_spell(left), _spell(right)) for left, right in splits if left in ranks and right in ranks
    ]


def _spell(token: bytes) -> str:
    return "".join(BYTE_LETTERS[byte] for byte in token)
