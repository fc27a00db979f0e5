"""Converts a sentencepiece model to a tokenizer.json with the same ids in Hugging Face's libraries.

The converters of transformers give other ids: a text that starts with a space gets no prefix, and a
normalizer is applied to several characters at once.
"""

import functools
import re
import unicodedata
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from titan_lite.data.tokenizer import SPACE

# Separates characters that are normalized one by one; no rule applies to it.
_MARK = "\ue000"
# Normalizers of `tokenizers` that may cover most of a model's rules; the rest become replacements.
_SEQUENCES: tuple[list[str], ...] = ([], ["NFKC"], ["NFKC", "Lowercase"])
_FEW_REPLACEMENTS, _MOST_REPLACEMENTS = 100, 400
# First of the private characters that protect results from these normalizers.
_KEPT = 0xF0000

# The generated module declares its names when it is imported.
_ModelProto: Any = sentencepiece_model_pb2.__dict__["ModelProto"]
_TrainerSpec: Any = sentencepiece_model_pb2.__dict__["TrainerSpec"]
_Piece = _ModelProto.SentencePiece


def sentencepiece_backend(content: bytes) -> Tokenizer:
    """Returns a tokenizer of `tokenizers` with the same ids as the model.

    Raises ValueError, with the reason, if `tokenizers` cannot represent the model.
    """
    proto = _ModelProto.FromString(content)
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type == _TrainerSpec.WORD:
        raise ValueError("it is a whole-word model")
    if trainer.treat_whitespace_as_suffix:
        raise ValueError("it sets treat_whitespace_as_suffix")
    if any(piece.type == _Piece.UNUSED for piece in proto.pieces):
        raise ValueError("it has pieces of type UNUSED")
    is_unigram = trainer.model_type == _TrainerSpec.UNIGRAM
    backend = Tokenizer(_unigram(proto) if is_unigram else _bpe(proto))
    backend.normalizer = normalizers.Sequence(_normalizers(content, spec))
    if splits := _splits(proto):
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, *[decoders.Strip(" ", 1, 0)] * spec.add_dummy_prefix]
    )
    control = [piece.piece for piece in proto.pieces if piece.type == _Piece.CONTROL]
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    return backend


def _normalizers(content: bytes, spec: Any) -> list[Any]:
    """Returns normalizers in sentencepiece's order: characters, white space, prefix, space mark."""
    prefix = [normalizers.Prepend(" ")] * spec.add_dummy_prefix
    rules = _rules(SentencePieceProcessor(model_proto=content), spec)
    if spec.remove_extra_whitespaces:
        squeezed = [
            normalizers.Replace(Regex(pattern), content)
            for pattern, content in ((r"\A +", ""), ("  +", " "), (rf"[ {SPACE}]+\z", ""))
        ]
        # Text of only spaces becomes empty, and gets no prefix.
        steps = [*rules, *squeezed, *prefix]
    else:
        steps = [*prefix, *rules]
    return [*steps, normalizers.Replace(" ", SPACE)] if spec.escape_whitespaces else steps


def _rules(model: SentencePieceProcessor, spec: Any) -> list[Any]:
    """Returns normalizers for the model's replacements of single characters.

    They differ from sentencepiece for combining characters in an unusual order, which `tokenizers`
    composes.
    """
    if not spec.precompiled_charsmap:
        return []
    joined = _MARK.join(["", *_characters(), ""])
    normalized = model.normalize(joined)
    # Normalizing the space mark may give a space, which would be removed here.
    marked, plain = map(model.normalize, (SPACE + "a", "a"))
    keeps_mark = spec.remove_extra_whitespaces and marked != plain
    if spec.escape_whitespaces:
        normalized = normalized.replace(SPACE, " ")
    wanted = normalized.split(_MARK)[1:-1]
    candidates: list[tuple[list[str], dict[str, list[str]]]] = []
    for kinds in _SEQUENCES:
        sequence = normalizers.Sequence([getattr(normalizers, kind)() for kind in kinds])
        given = sequence.normalize_str(joined).split(_MARK)[1:-1]
        others: dict[str, list[str]] = {}
        for character, expected, actual in zip(_characters(), wanted, given, strict=True):
            if expected != actual and not (keeps_mark and character == SPACE):
                others.setdefault(expected, []).append(character)
        candidates.append((kinds, others))
        if len(others) <= _FEW_REPLACEMENTS:
            break
    kinds, others = min(candidates, key=lambda candidate: len(candidate[1]))
    if len(others) > _MOST_REPLACEMENTS:
        raise ValueError(f"{len(others):,} rules of its normalizer have no equivalent there")
    sequence = normalizers.Sequence([getattr(normalizers, kind)() for kind in kinds])
    before, after = [], []
    for number, (content, characters) in enumerate(others.items()):
        if sequence.normalize_str(content) != content:
            # Protects the rule's result from the normalizers that follow.
            content, kept = chr(_KEPT + number), content
            after.append(normalizers.Replace(content, kept))
        before.append(
            # Searching a plain string is several times as fast as a pattern.
            normalizers.Replace(characters[0], content)
            if len(characters) == 1
            else normalizers.Replace(Regex(f"[{''.join(map(re.escape, characters))}]"), content)
        )
    return [*before, *(getattr(normalizers, kind)() for kind in kinds), *after]


@functools.cache
def _characters() -> list[str]:
    """Returns all assigned characters of Unicode."""
    every = map(chr, range(1, 0x110000))
    return [c for c in every if unicodedata.category(c) not in ("Cn", "Co", "Cs")]


def _splits(proto: Any) -> list[pre_tokenizers.Split]:
    """Returns the splits of a text that are made before it is tokenized."""
    own = [p.piece for p in proto.pieces if p.type == _Piece.USER_DEFINED]
    splits = []
    if own:
        # sentencepiece takes the longest match.
        longest_first = sorted(own, key=len, reverse=True)
        splits.append(_isolate("|".join(map(re.escape, longest_first))))
    if proto.trainer_spec.model_type == _TrainerSpec.UNIGRAM:
        # The Unigram of `tokenizers` matches special tokens in a text, sentencepiece does not: cuts
        # their names.
        kinds = (_Piece.CONTROL, _Piece.UNKNOWN, _Piece.BYTE)
        names = [p.piece for p in proto.pieces if p.type in kinds and len(p.piece) > 1]
        normal = [p.piece for p in proto.pieces if p.type == _Piece.NORMAL]
        splits.append(_isolate("|".join(_cut(name, normal) for name in names)))
    return splits


def _cut(name: str, pieces: list[str]) -> str:
    """Returns a pattern for a place in a token's name that no piece and no unknown spans."""
    text = "\n".join(pieces)
    places = [
        i
        for i in range(1, len(name))
        if name[i - 1 : i + 1] not in text and (name[i - 1] in text or name[i] in text)
    ]
    place = places[0] if places else 1
    return f"(?<={re.escape(name[:place])})(?={re.escape(name[place:])})"


def _bpe(proto: Any) -> models.BPE:
    """Returns a BPE that merges any two pieces whose text is a piece, by its score."""
    pieces = list(proto.pieces)
    scores = {p.piece: p.score for p in pieces if p.type == _Piece.NORMAL}
    merges = []
    if proto.trainer_spec.model_type == _TrainerSpec.BPE:
        merges = [
            (-score, (piece[:i], piece[i:]))
            for piece, score in scores.items()
            for i in range(1, len(piece))
            if piece[:i] in scores and piece[i:] in scores
        ]
    return models.BPE(
        {p.piece: number for number, p in enumerate(pieces)},
        [pair for _, pair in sorted(merges, key=lambda merge: merge[0])],
        unk_token=_unknown(proto)[1],
        fuse_unk=True,
        byte_fallback=_has_bytes(proto),
        # A user's symbol, split off before, becomes the token of that name.
        ignore_merges=any(p.type == _Piece.USER_DEFINED for p in pieces),
    )


def _unigram(proto: Any) -> models.Unigram:
    """Returns a Unigram in which user's symbols have the best score, special ones the worst."""
    least = min(p.score for p in proto.pieces if p.type == _Piece.NORMAL)
    scores = {_Piece.USER_DEFINED: 0.0}
    vocabulary = [
        (p.piece, p.score if p.type == _Piece.NORMAL else scores.get(p.type, least))
        for p in proto.pieces
    ]
    return models.Unigram(vocabulary, _unknown(proto)[0], _has_bytes(proto))


def _unknown(proto: Any) -> tuple[int, str]:
    return next((n, p.piece) for n, p in enumerate(proto.pieces) if p.type == _Piece.UNKNOWN)


def _has_bytes(proto: Any) -> bool:
    return any(piece.type == _Piece.BYTE for piece in proto.pieces)


def _isolate(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), "isolated")
