"""Exported tokenizers give the ids of training in transformers, for every kind of file and text."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_tokenizer_files import (
    TEXTS,
    byte_level,
    default_pieces,
    metaspace,
    pieces,
    read_texts,
    unigram,
    word_piece,
)
from tests.distributed import Workers
from tests.runs import TINY, slow_but, train_and_gather
from titan_lite import cli
from titan_lite.config.schema import Data, DataSource
from titan_lite.data.export_check import NUM_LINES, ExportReport, corpus_texts, export_report
from titan_lite.data.hf_documents import hf_documents
from titan_lite.data.probes import PROBES
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.models.bert import BERT
from titan_lite.models.family import Family
from titan_lite.models.llama import LLAMA

transformers = pytest.importorskip("transformers")

LINES = [line for text in TEXTS for line in text.splitlines(keepends=True)]
# Texts that have been tokenized differently: space where few texts have any, characters that
# normalizers join, drop or replace, and what tokens are called.
HARD = (
    *(" " * 1000, "a" + " " * 1000 + "b", "\n" * 500, "\t" * 30 + "x", " \n \t \r\n x "),
    *("\r\n\r\n a", "\u00a0\u00a0a", "\u3000a\u3000", "a\u200b\u200bb", "\ufeffa", "a\u2028b"),
    *("\u0301", "\u0301a", " \u0301", "\u3000\u0301", "\u00a0\u0301a", "\u00b4x", "a\u00a8b"),
    *("cafe\u0301", "\uff45\u0301", "\uff76\uff9e", "\u0958 \u0915\u093c", "\u2126 \u212b"),
    *(
        "\u0130I\u0131",
        "STRASSE stra\u00dfe",
        "\u03a3\u03c2",
        "㍻ Ⅷ ½ ¾ ﬀ",
        "\U0001d400",
        "\u202ea",
    ),
    *("👩\u200d👩\u200d👧", "👍🏽", "🇩🇪🇫🇷", "☃\ufe0f ©\ufe0f #\ufe0f\u20e3", "\u0600\u0661x"),
    *("\x00", "x\x00y", "\x01a", "a\x1bb\x7f", "\x85", "\u00ad", "\ufffd", "\ue000a", "\ufff0"),
    *("\u2581", "\u2581a", "a\u2581b\u2581", " \u2581 ", "\u2581\u2581 a"),
    *("<0x0A>", "x<0x41>y", "</", "[CLS", "<|endoftext", "Ġthe Ċ", "##ing"),
)
SPECIAL = ("a </s> b", "<s>", "<unk>a", "[SEP][MASK]", "x<|endoftext|>y", "<pad>")

USERS = ["<|sep|>", "\n", "\t", "  ", "whale"]
bpe = functools.partial(default_pieces, model_type="bpe")
default_unigram = functools.partial(default_pieces, model_type="unigram")
KINDS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "word_piece": word_piece,
    "byte_level_prefix": lambda: byte_level(prefix=True),
    "metaspace": metaspace,
    "unigram": unigram,
    "pieces_bpe": bpe,
    "pieces_unigram": default_unigram,
    "pieces_kept": lambda: pieces(model_type="bpe"),
    "pieces_kept_unigram": lambda: pieces(model_type="unigram", pad_id=3),
    "pieces_plain": lambda: pieces(model_type="bpe", add_dummy_prefix=False, bos_id=-1),
    "pieces_spaces": lambda: bpe(remove_extra_whitespaces=False, byte_fallback=True),
    "pieces_identity": lambda: bpe(normalization_rule_name="identity"),
    "pieces_lower": lambda: bpe(normalization_rule_name="nmt_nfkc_cf", byte_fallback=True),
    "pieces_users": lambda: pieces(model_type="bpe", user_defined_symbols=USERS),
    "pieces_users_unigram": lambda: default_unigram(
        byte_fallback=True, user_defined_symbols=["<|sep|>", "\n", "\t"], control_symbols=["<ctl>"]
    ),
    "pieces_char": lambda: default_pieces(model_type="char"),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tokenizer of a kind."""

    @functools.cache
    def make(kind: str) -> Path:
        made = KINDS[kind]()
        folder = tmp_path_factory.mktemp(kind)
        if isinstance(made, bytes):
            (folder / "tokenizer.model").write_bytes(made)
        else:
            (folder / "tokenizer.json").write_text(made.to_str())
        return folder

    return make


def export(tokenizer: Tokenizer, folder: Path, family: Family = LLAMA) -> dict[str, Any]:
    assert family.hf_config is not None
    documents = hf_documents(family.flavors["debug"], family.hf_config, tokenizer, dtype="float32")
    folder.mkdir()
    for name, document in documents.items():
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        (folder / name).write_bytes(raw)
    return documents


@pytest.mark.parametrize("kind", slow_but([*KINDS][::3], KINDS))
def test_transformers_gives_the_ids_of_training(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    local = load_tokenizer(folder_of(kind))
    documents = export(local, tmp_path / "hf")
    report = export_report(documents, local, Data(), of_pairs=False)
    assert report.is_same, report.sentence
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [*LINES, *TEXTS[:3], *PROBES, *HARD]
    for text, ids in zip(texts, reference(texts).input_ids, strict=True):
        assert ids == local.encode(text, bos=True, eos=False), text
    # In training the spelling of a special token is text.
    reference = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "hf", split_special_tokens=True
    )
    expected = [local.encode(text, bos=True, eos=False) for text in SPECIAL]
    # Hugging Face's unigram model finds them as pieces; training cuts the text there.
    if kind != "unigram":
        assert reference(SPECIAL).input_ids == expected
    assert (reference.bos_token_id, reference.eos_token_id) == (local.bos_id, local.eos_id)
    assert reference.pad_token_id == local.pad_id
    # And this library reads what it wrote as the same tokenizer.
    assert load_tokenizer(tmp_path / "hf").fingerprint == local.fingerprint
    ids = local.encode("the white whale", bos=False, eos=False)
    assert reference.decode(ids).strip() == local.decode(ids).strip()


@pytest.mark.parametrize("kind", ["pieces_kept", "byte_level", "word_piece"])
def test_an_encoder_makes_pairs_as_in_training(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    local = load_tokenizer(folder_of(kind))
    export(local, tmp_path / "hf", BERT)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    first, second = (local.encode(text, bos=False, eos=False) for text in ("whale", "the sea"))
    pair = reference("whale", "the sea")
    assert pair.input_ids == [local.bos_id, *first, local.eos_id, *second, local.eos_id]
    assert pair.token_type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert reference("whale").input_ids == [local.bos_id, *first, local.eos_id]
    assert (reference.cls_token_id, reference.sep_token_id) == (local.bos_id, local.eos_id)
    assert reference.mask_token_id == local.mask_id


def test_what_lies_beside_a_tokenizer_does_not_change_what_was_exported(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each of these keys has transformers build another tokenizer, or put no BOS."""
    folder = tmp_path / "given"
    shutil.copytree(folder_of("pieces_kept"), folder)
    named = {"bos_token": {"content": "</s>", "lstrip": True}, "tokenizer_class": "LlamaTokenizer"}
    named |= {"add_bos_token": False, "add_eos_token": True, "legacy": False, "auto_map": {}}
    named |= {"add_prefix_space": False, "chat_template": "{{ messages }}", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    local = load_tokenizer(folder)
    export(local, tmp_path / "hf")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(reference) is transformers.PreTrainedTokenizerFast
    assert (local.bos_id, reference.bos_token_id) == (2, 2)
    texts = [" whale", "the  sea\n"]
    assert reference(texts).input_ids == [local.encode(text, bos=True, eos=False) for text in texts]
    assert reference.chat_template == "{{ messages }}"
    assert reference.unk_token == "<unk>"


def test_a_template_that_begins_as_in_training_is_left_as_it_is(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    document = json.loads((folder_of("byte_level") / "tokenizer.json").read_text())
    offsets = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    both = {"type": "Sequence", "processors": [offsets | {"use_regex": True}, template]}
    for given, is_kept in ((template, True), (both, True), (offsets | {"use_regex": True}, False)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(document | {"post_processor": given}))
        documents = export(load_tokenizer(folder), folder / "hf")
        written = documents["tokenizer.json"].pop("post_processor")
        assert (written == given) is is_kept
        if not is_kept:
            assert written["processors"][0] == given
            assert written["processors"][1]["single"] == template["single"]


def write_documents(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_text_that_gets_other_ids_is_stated(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Characters composed in an unusual order, and a file that was tampered with."""
    local = load_tokenizer(folder_of("pieces_spaces"))
    documents = export(local, tmp_path / "hf")
    report = functools.partial(export_report, documents, local, of_pairs=False)
    write_documents(tmp_path / "plain.jsonl", ["The whale.\n", "", "The sea."])
    plain = Data(dataset_path=str(tmp_path / "plain.jsonl"))
    num_texts = f"{len(PROBES) + 2 * 4:,} texts"
    same = f"The exported tokenizer gives the same ids as training for {num_texts}"
    assert report(plain) == ExportReport(True, same)
    write_documents(tmp_path / "odd.jsonl", ["The whale.", "a\u0328\u0301 e\u0302\u0323"])
    odd = report(Data(dataset_path=str(tmp_path / "odd.jsonl")))
    assert not odd.is_same
    text = f"gives other ids than training for 4 of {num_texts}. The first is 'a"
    assert text in odd.sentence
    assert " instead of [" in odd.sentence
    assert text in odd.readme().decode()
    gone = report(Data(dataset_path=str(tmp_path / "gone.jsonl")))
    assert gone.is_same
    assert "; the run's own text was not compared: data.dataset_path" in gone.sentence
    same = f"The exported tokenizer gives the same ids as training for {len(PROBES):,} texts"
    assert report(None) == ExportReport(True, same)
    documents["tokenizer.json"]["normalizer"] = None
    assert not report(None).is_same
    assert "The first is 'Call me Ishmael." in report(None).sentence


def test_a_text_that_spells_a_special_token_is_stated(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    local = load_tokenizer(folder_of("pieces_kept"))
    documents = export(local, tmp_path / "hf")
    write_documents(tmp_path / "strike.jsonl", ["A <s>price</s>.", "The sea."])
    section = Data(dataset_path=str(tmp_path / "strike.jsonl"))
    report = export_report(documents, local, section, of_pairs=False)
    assert report.is_same
    assert (
        "; 4 of them contain a special token's text. Training reads it as text" in report.sentence
    )
    assert "The first is 'A <s>price</s>.'" in report.sentence
    assert "split_special_tokens=True" in report.sentence


@pytest.mark.parametrize("kind", ["\t", "\u00a0", "\r\n", "\u3000"])
def test_white_space_that_the_corpus_lacks_is_compared(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Lines of the run's text keep all kinds of white space around them."""
    local = load_tokenizer(folder_of("byte_level"))
    documents = export(local, tmp_path / "hf")
    # Text next to it alone: the fixed texts have no such character.
    replace = {"type": "Replace", "pattern": {"String": f"\u0436{kind}"}, "content": "x"}
    documents["tokenizer.json"]["normalizer"] = replace
    write_documents(tmp_path / "plain.jsonl", [f"{number} \u0436" for number in range(40)])
    section = Data(dataset_path=str(tmp_path / "plain.jsonl"))
    report = export_report(documents, local, section, of_pairs=False)
    assert not report.is_same
    assert repr(kind)[1:-1] in report.sentence


def test_a_model_that_has_no_form_in_a_tokenizer_json_is_exported_alone_and_said_so(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "suffix"
    folder.mkdir()
    content = bpe(treat_whitespace_as_suffix=True)
    (folder / "tokenizer.model").write_bytes(content)
    local = load_tokenizer(folder)
    documents = export(local, tmp_path / "hf")
    assert {*documents} == {"config.json", "tokenizer.model"}
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == content
    assert export_report(documents, local, Data(), of_pairs=False) == ExportReport(
        False,
        "The tokenizer cannot be exported as tokenizer.json (it sets treat_whitespace_as_suffix). "
        "tokenizer.model is exported; transformers may compute other ids from it than "
        "sentencepiece",
    )
    (folder / "tokenizer.model").write_bytes(default_pieces(model_type="word", vocab_size=300))
    documents = export(load_tokenizer(folder), tmp_path / "words")
    assert {*documents} == {"config.json", "tokenizer.model"}


def test_an_export_with_other_ids_is_refused_before_training_or_has_them_stated(
    one_process: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(bpe(treat_whitespace_as_suffix=True))
    settings = [
        *TINY,
        "--checkpoint.enable=true",
        "--checkpoint.last_save_hf=true",
        f"--data.tokenizer_path={tmp_path}",
        "--data.allow_tokenizer_mismatch=true",
        "--training.steps=1",
    ]
    check = ["config", "--quiet", "--preflight", f"--job.dump_folder={tmp_path}/run", *settings]
    assert cli.main(check) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "checkpoint.last_save_hf (command line): The tokenizer cannot be exported as" in message
    assert message.rstrip().endswith("set checkpoint.allow_export_mismatch = true")
    allowed = "--checkpoint.allow_export_mismatch=true"
    assert cli.main([*check, allowed]) == 0
    one_process.run(train_and_gather, tmp_path / "run", *settings, allowed)
    written = (tmp_path / "run/checkpoint/hf/README.md").read_text()
    assert written.startswith(
        "# Tokenizer\n\nThe tokenizer cannot be exported as tokenizer.json (it "
    )

    convert = ["convert", "dcp-to-hf", f"{tmp_path}/run/checkpoint/step-1", f"{tmp_path}/hf"]
    assert cli.main(convert) == 2
    assert "the difference, pass --allow-mismatch" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert cli.main([*convert, "--allow-mismatch"]) == 0
    assert (tmp_path / "hf/README.md").read_text() == written


def test_texts_are_those_of_every_source_tokenized_or_not(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    lines = corpus_texts(Data(), tokenizer)
    assert len(lines) > NUM_LINES
    assert any("\n\n" in text for text in lines)
    documents = read_texts("train")
    known = {line for text in documents for line in (text, *text.splitlines(keepends=True))}
    assert known.issuperset(lines)
    write_documents(tmp_path / "long.jsonl", ["x" * 50_000, "y\nz\n"])
    settings = [f"--data.dataset_path={tmp_path}/long.jsonl", f"--output={tmp_path}/tokens"]
    assert cli.main(["tokenize", "--processes=1", *settings]) == 0
    sources = [
        DataSource(name="a", weight=1, dataset_path=str(tmp_path / "tokens")),
        DataSource(name="b", weight=9),
    ]
    mixed = corpus_texts(Data(sources=sources), tokenizer)
    assert mixed[:5] == ["x" * 20_000, "x" * 20_000, "y\nz\n", "y\n", "z\n"]
    assert NUM_LINES // 2 < len(mixed) - 5 < NUM_LINES
