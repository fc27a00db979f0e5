"""What lies beside the weights of a Hugging Face model: config.json and the tokenizer's files.

A tokenizer that was read from such files is written as it was; tiktoken's becomes a tokenizer.json.
"""

from typing import Any

from titan_lite.data.hf_tokenizer import BYTE_LETTERS
from titan_lite.data.tiktoken_tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    TiktokenTokenizer,
)
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.models.args import DecoderArgs
from titan_lite.models.hf_config import HFConfig, hf_config_from_args

_BOS, _EOS, _PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"


def hf_documents(
    args: DecoderArgs, hf: HFConfig, tokenizer: Tokenizer | None, *, dtype: str
) -> dict[str, dict[str, Any] | bytes]:
    """JSON documents, or contents, by file name; without a tokenizer, config.json alone.

    dtype: of the weights, as torch spells it.
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
        # An EOS that stands in for padding is a token that learns.
        pad_id=None if pad_id == eos_id else pad_id,
    )
    if not isinstance(tokenizer, TiktokenTokenizer):
        return {"config.json": config, **tokenizer.files}
    return {
        "config.json": config,
        "tokenizer.json": _tokenizer_json(tokenizer, of_pairs=not args.causal),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _BOS,
            "eos_token": _EOS,
            "pad_token": _PAD,
            **({} if args.causal else _names_of_pairs(tokenizer)),
            "clean_up_tokenization_spaces": False,
            "model_max_length": args.max_seq_len,
        },
    }


def _names_of_pairs(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    """For an encoder, of what masked_lm.py makes samples of."""
    assert tokenizer.mask_id is not None
    return {
        "cls_token": _BOS,
        "sep_token": _EOS,
        "mask_token": SPECIAL_TOKENS[tokenizer.mask_id - len(tokenizer.ranks)],
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }


def _tokenizer_json(tokenizer: TiktokenTokenizer, *, of_pairs: bool) -> dict[str, Any]:
    """Byte-level BPE that gives our tokens, after BOS; special tokens in a text are special.

    of_pairs: [BOS] A [EOS], or [BOS] A [EOS] B [EOS], with types; otherwise BOS alone is put there.
    """
    bos = {"SpecialToken": {"id": _BOS, "type_id": 0}}
    text, pair = (
        [{"Sequence": {"id": name, "type_id": i}}]
        + [{"SpecialToken": {"id": _EOS, "type_id": i}}] * of_pairs
        for i, name in enumerate("AB")
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLIT_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(tokenizer.ranks) + number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, byte_level | {"use_regex": False}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, *text],
            "pair": [bos, *text, *pair],
            "special_tokens": {
                token: {"id": token, "ids": [number], "tokens": [token]}
                for token, number in ((_BOS, tokenizer.bos_id), (_EOS, tokenizer.eos_id))
            },
        },
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # A piece that is a token is that token, as in tiktoken.
            "ignore_merges": True,
            "vocab": {_spell(token): rank for token, rank in tokenizer.ranks.items()},
            "merges": _merges(tokenizer.ranks),
        },
    }


def _merges(ranks: dict[bytes, int]) -> list[str]:
    """Pairs of tokens that make a token, by its rank: tiktoken merges any such pair."""
    splits = ((token[:i], token[i:]) for token in ranks for i in range(1, len(token)))
    return [
        f"{_spell(left)} {_spell(right)}"
        for left, right in splits
        if left in ranks and right in ranks
    ]


def _spell(token: bytes) -> str:
    return "".join(BYTE_LETTERS[byte] for byte in token)
