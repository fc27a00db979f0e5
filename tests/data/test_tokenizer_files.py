"""Tokenizers of Hugging Face and of sentencepiece, trained here on a part of the corpus."""

import io
import itertools
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import (
    Tokenizer as Backend,
)
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from titan_lite import cli
from titan_lite.config.schema import Data, Validation
from titan_lite.data.assets import ASSETS
from titan_lite.data.held_out import read_held_out
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizer_files import load_tokenizer


def read_texts(split: str) -> list[str]:
    lines = (ASSETS / "corpus" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


TEXTS = read_texts("validation")
TRAINED_ON = TEXTS[:12]
# Letters, bytes and spaces that the training text has nowhere.
STRANGE = [
    "  two  spaces\n\n\ttab ",
    "na\u00efve \u2603 \U0001f40b",
    "\u4e00\u4e8c\u4e09",
    "a    b",
    "x\u0000y",
]


def byte_level(*, prefix: bool = False) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TRAINED_ON, trainer)
    if not prefix:
        # As GPT-NeoX's runs of spaces: in the vocabulary, not special.
        backend.add_tokens(["    "])
    return backend


def metaspace() -> Backend:
    """A converted tokenizer like that of Llama 2."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, show_progress=False, max_token_length=8
    )
    backend.train_from_iterator([text[:2000].split() for text in TRAINED_ON], trainer)
    document = json.loads(backend.to_str())
    document["added_tokens"] = document["added_tokens"][:3]
    return Backend.from_str(json.dumps(document))


def unigram() -> Backend:
    """A tokenizer like that of T5."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator([text[:3000] for text in TEXTS[:6]], trainer)
    return backend


def word_piece() -> Backend:
    """A tokenizer like that of BERT."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(16)
    backend.enable_padding(pad_id=0, pad_token="[PAD]", length=16)
    return backend


def words() -> Backend:
    """A BPE of letters, without a token for what it does not know."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator([text[:2000] for text in TRAINED_ON], trainer)
    return backend


def pieces(**settings: Any) -> bytes:
    """A sentencepiece model that keeps a text as it is."""
    keeping = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return default_pieces(byte_fallback=True, **keeping, **settings)


def default_pieces(**settings: Any) -> bytes:
    """Trains a sentencepiece model with its default options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TRAINED_ON for line in text.splitlines() if line),
        model_writer=model,
        **{"vocab_size": 600, "minloglevel": 2, "num_threads": 1, **settings},
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made: dict[str, bytes] = {
        "byte_level": byte_level().to_str().encode(),
        "byte_level_prefix": byte_level(prefix=True).to_str().encode(),
        "metaspace": metaspace().to_str().encode(),
        "unigram": unigram().to_str().encode(),
        "word_piece": word_piece().to_str().encode(),
        "pieces": pieces(model_type="bpe"),
        "pieces_unigram": pieces(model_type="unigram", pad_id=3),
        "pieces_plain": pieces(model_type="bpe", add_dummy_prefix=False, bos_id=-1),
    }
    paths = {}
    for name, content in made.items():
        (folder / name).mkdir()
        file = "tokenizer.model" if name.startswith("pieces") else "tokenizer.json"
        paths[name] = folder / name / file
        paths[name].write_bytes(content)
    return paths


@pytest.fixture(scope="module")
def tokenizers(files: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(file) for name, file in files.items()}


LOSSLESS = (
    "byte_level",
    "byte_level_prefix",
    "metaspace",
    "pieces",
    "pieces_unigram",
    "pieces_plain",
)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_bytes_of_tokens_add_up_to_those_of_the_text(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.prefix_bytes == (kind not in ("byte_level", "pieces_plain"))
    for text in [*TEXTS, *STRANGE[kind == "byte_level_prefix" :]]:
        document = np.array(tokenizer.encode(text, bos=True, eos=True))
        assert tokenizer.num_bytes(document[1:], document[:-1]) == len(text.encode())
        # A part that starts inside the document has no prefix.
        spelt = tokenizer.num_bytes(document[4:], document[3:-1])
        assert spelt == tokenizer.bytes_per_token[document[4:]].sum()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_text_round_trips(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for text in [*TEXTS[::5], *STRANGE[1:3]]:
        assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)).lstrip(" ") == text


def test_bits_per_byte_divide_by_the_bytes_of_the_text(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["pieces"]
    held_out = read_held_out(
        Validation(steps=5),
        Data(),
        seq_len=64,
        local_batch_size=1,
        global_batch_size=2,
        batch_rank=0,
        batch_degree=1,
        tokenizer=tokenizer,
    )
    first = tokenizer.encode(TEXTS[0], bos=True, eos=True)
    assert len(first) > 5 * 2 * 64
    assert held_out.num_bytes == len(tokenizer.decode(first[1 : 5 * 2 * 64 + 1]).encode())


def test_an_unknown_token_spells_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["unigram"]
    text = TEXTS[0][:2000]
    for known, unknown in ((text, ""), (text, "\U0001f40b"), (text + " ", "\u4e00")):
        document = np.array(tokenizer.encode(known + unknown, bos=True, eos=True))
        assert tokenizer.num_bytes(document[1:], document[:-1]) == len(known.encode())


def test_a_word_piece_spells_its_letters_and_no_space(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["word_piece"]
    for text in TEXTS:
        document = np.array(tokenizer.encode(text, bos=True, eos=True))
        letters = "".join(text.lower().split())
        assert tokenizer.num_bytes(document[1:], document[:-1]) == len(letters.encode())


def test_which_tokens_begin_a_word(tokenizers: dict[str, Tokenizer]) -> None:
    text = "the white whales, unbelievably"
    for name in ("byte_level", "pieces", "word_piece"):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode(text, bos=True, eos=True)
        begun = [i for i, token in enumerate(ids) if tokenizer.starts_word[token]]
        words = [tokenizer.decode(ids[i:j]) for i, j in itertools.pairwise(begun)]
        joined = [word.strip().replace(" ##", "").replace("##", "") for word in words[1:]]
        first = 1 if name == "byte_level" else 0  # "the", without a space, continues the BOS.
        expected = ["the", "white", "whales", ",", "unbelievably"][first:]
        assert joined == expected, name
    assert all(tokenizers[name].starts_word[t.bos_id] for name, t in tokenizers.items())


def test_the_template_padding_and_truncation_of_a_file_are_not_applied(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["word_piece"]
    tokens = tokenizer.encode(TEXTS[0], bos=True, eos=True)
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    assert len(tokens) > 100
    assert len(tokenizer.encode("whale", bos=True, eos=True)) < 16
    assert not {0, 2, 3} & set(tokens[1:-1])


def test_special_tokens_are_found_by_their_usual_spellings(
    tokenizers: dict[str, Tokenizer],
) -> None:
    actual = {name: (t.bos_id, t.eos_id, t.pad_id, t.mask_id) for name, t in tokenizers.items()}
    assert actual["word_piece"] == (2, 3, 0, 4)
    assert actual["byte_level"] == (0, 0, 0, None)
    assert actual["metaspace"] == (1, 2, 2, None)
    assert actual["unigram"] == (1, 1, 0, None)
    assert actual["pieces"] == (1, 2, 2, None)
    assert actual["pieces_unigram"] == (1, 2, 3, None)
    assert actual["pieces_plain"] == (2, 2, 2, None)  # No BOS: the EOS stands for it.


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("tokenizer_config.json", {"bos_token": None, "pad_token": {"content": "<|pad|>"}}),
        ("special_tokens_map.json", {"pad_token": "<|pad|>", "mask_token": "!"}),
    ],
)
def test_files_beside_it_name_the_special_tokens(
    files: dict[str, Path], tmp_path: Path, name: str, named: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(files["byte_level"].read_bytes())
    (tmp_path / name).write_text(json.dumps(named))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, 1)
    assert (tokenizer.mask_id is None) == ("mask_token" not in named)


def test_a_masked_language_model_is_refused_a_tokenizer_without_a_mask_before_any_process(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--model.name=bert", "--model.vocab_size=768", "--training.seq_len=128"]
    path = files["byte_level"]
    settings += ["--quiet", "--preflight"]
    assert cli.main(["config", *settings, f"--data.tokenizer_path={path}"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "this tokenizer has no mask token, which a masked language model requires" in message
    assert 'tokenizer_config.json next to it, {"mask_token": "..."}' in message


def test_the_spelling_of_a_special_token_inside_a_document_is_ordinary_text(
    tokenizers: dict[str, Tokenizer],
) -> None:
    for name, tokenizer in tokenizers.items():
        text = "a <|endoftext|> [SEP] </s> b"
        tokens = tokenizer.encode(text, bos=False, eos=False)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokens), name


@pytest.mark.parametrize("kind", ["byte_level", "pieces", "word_piece"])
def test_threads_do_not_change_the_tokens(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    one, three = (tokenizers[kind].encode_documents(TEXTS[:8], threads=n) for n in (1, 3))
    assert [tokens.tolist() for tokens in one] == [tokens.tolist() for tokens in three]
    assert all(tokens.dtype == np.uint32 for tokens in one)


@pytest.mark.parametrize("kind", ["byte_level", "pieces"])
def test_a_lone_surrogate_becomes_the_replacement_character(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokens = tokenizers[kind].encode("a\ud800b", bos=False, eos=False)
    assert tokenizers[kind].decode(tokens).strip() == "a\ufffdb"


def test_the_same_ids_have_the_same_fingerprint(files: dict[str, Path], tmp_path: Path) -> None:
    document = json.loads(files["byte_level"].read_bytes())
    reordered = dict(reversed(document.items())) | {"truncation": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(reordered, indent=4))
    same = load_tokenizer(tmp_path / "tokenizer.json")
    assert same.fingerprint == load_tokenizer(files["byte_level"]).fingerprint
    fingerprints = {load_tokenizer(file).fingerprint for file in files.values()}
    assert len(fingerprints) == len(files)


def refused(file: Path) -> str:
    with pytest.raises(ValueError, match=r"^data\.tokenizer_path: ") as error:
        load_tokenizer(file)
    assert str(file) in str(error.value) or str(file.parent) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a tokenizer.json of Hugging Face: EOF while parsing"),
        ("{}", "is not a tokenizer.json of Hugging Face: Model missing"),
        ("[1]", "is not a tokenizer.json of Hugging Face: invalid type: sequence"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "out of vocabulary"),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "no tokens"),
        (
            '{"version": "1.0", "model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": '
            '"[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}',
            "is not a tokenizer.json of Hugging Face: WordPiece error: Missing [UNK] token",
        ),
        (
            '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
            "has no token for the end of a document: name it in a tokenizer_config.json next to "
            'it, {"eos_token": "..."}',
        ),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    assert message in refused(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"eos_token": "<eot>"}', "eos_token is '<eot>', which is not a token of tokenizer.json"),
        ("{", "tokenizer_config.json is not JSON: "),
        ("[]", "tokenizer_config.json is not a JSON object"),
    ],
)
def test_a_file_beside_a_tokenizer_that_cannot_be_used_is_named(
    files: dict[str, Path], tmp_path: Path, config: str, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(files["byte_level"].read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert message in refused(tmp_path / "tokenizer.json")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a regular file"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_bytes_that_are_no_tokenizer_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    binary = tmp_path / "tokenizer.json"
    binary.write_bytes(pickle.dumps({"model": 1}))
    assert "is not UTF-8" in refused(binary)
    cut = tmp_path / "tokenizer.model"
    cut.write_bytes(files["pieces"].read_bytes()[:3000])
    assert "is a damaged or truncated sentencepiece model" in refused(cut)
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty")
    assert message.endswith("has neither tokenizer.json nor tokenizer.model")


def test_without_sentencepiece_its_models_name_the_extra(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    message = refused(files["pieces"])
    assert message.endswith("is a sentencepiece model: pip install sentencepiece to read it")


@pytest.mark.parametrize(
    ("made", "lost"),
    [
        (default_pieces, "newlines, tabs, runs of spaces"),
        (lambda: default_pieces(remove_extra_whitespaces=False), "newlines, tabs"),
        (lambda: default_pieces(user_defined_symbols=["\n"]), "tabs, runs of spaces"),
        # Neither is in the vocabulary, and there are no bytes.
        (lambda: default_pieces(normalization_rule_name="identity"), "newlines, tabs, runs of"),
        (lambda: pieces(model_type="bpe"), ""),
        (lambda: unigram().to_str().encode(), "tabs"),
        (lambda: byte_level(prefix=True).to_str().encode(), ""),
        (lambda: word_piece().to_str().encode(), ""),
        (lambda: words().to_str().encode(), "newlines, tabs, runs of spaces, characters without a"),
    ],
)
def test_white_space_that_a_tokenizer_drops_is_warned_about_once(
    made: Any, lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokenizer.file"
    file.write_bytes(made())
    for _ in range(2):
        load_tokenizer(file)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(lost)
    if lost:
        assert messages[0].startswith(f"data.tokenizer_path: tokenizer {file} removes {lost}")
        assert 'normalization_rule_name="identity", remove_extra_whitespaces=False' in messages[0]
