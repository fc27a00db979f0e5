"""Sources: the real streaming code of `datasets` on local files, and what names resolve to."""

import gzip
import json
import pickle
from unittest import mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from titan_lite.config.schema import Data, Validation
from titan_lite.data.documents import document_of
from titan_lite.data.sources import resolve_source

TEXTS = [f"document {i} \u00e9" for i in range(10)]


def write_jsonl(path, texts):
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def write_parquet(path, texts):
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


def texts_of(dataset, kind="lines"):
    return [document_of(row, kind, "text", "") for row in dataset]


def read(path):
    source = resolve_source(Data(dataset_path=str(path)))
    return texts_of(source.open(), source.kind)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_file_of_documents_is_streamed_in_order(tmp_path, name):
    (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, TEXTS)
    assert read(tmp_path / name) == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("three", encoding="utf-8")
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    assert read(tmp_path) == ["one\n\ntwo\n", "three"]


def test_a_folder_is_read_recursively_and_other_files_in_it_are_left_alone(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text("not a document")
    write_jsonl(tmp_path / "b.jsonl", TEXTS[4:])
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    write_jsonl(tmp_path / "sub" / "c.jsonl.gz", TEXTS[2:4])
    assert read(tmp_path) == TEXTS[:2] + TEXTS[4:] + TEXTS[2:4]


def test_hidden_files_of_a_folder_are_left_alone(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    for name in (".hidden.jsonl", "_meta.jsonl", ".cache/b.jsonl", "sub/_temporary/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, ["not this"])
    assert read(tmp_path) == TEXTS


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    (tmp_path / ".data").mkdir()
    write_jsonl(tmp_path / ".data" / "a.jsonl", TEXTS)
    assert read(tmp_path / ".data") == TEXTS


def test_a_glob_selects_files(tmp_path):
    write_jsonl(tmp_path / "part-0.jsonl", TEXTS[:5])
    write_jsonl(tmp_path / "part-1.jsonl", TEXTS[5:])
    write_jsonl(tmp_path / "other.jsonl", ["not this"])
    assert read(tmp_path / "part-*.jsonl") == TEXTS


def test_a_file_name_with_glob_characters_is_taken_as_it_is(tmp_path):
    write_jsonl(tmp_path / "part[0].jsonl", TEXTS)
    assert read(tmp_path / "part[0].jsonl") == TEXTS


@pytest.mark.parametrize("num_files", [1, 2, 3, 4, 5, 8])
def test_streams_hold_every_document_once(tmp_path, num_files):
    for i in range(num_files):
        write_jsonl(tmp_path / f"{i}.jsonl", TEXTS[i::num_files])
    source = resolve_source(Data(dataset_path=str(tmp_path)))
    streams = [texts_of(source.open(v, 4)) for v in range(4)]
    assert all(streams)
    assert sorted(text for texts in streams for text in texts) == TEXTS


@pytest.mark.parametrize(("num_files", "expected"), [(4, [1]), (6, [1, 5])])
def test_with_a_file_or_more_per_stream_a_stream_reads_whole_files(tmp_path, num_files, expected):
    for i in range(num_files):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"file {i}"] * 3)
    source = resolve_source(Data(dataset_path=str(tmp_path)))
    assert texts_of(source.open(1, 4)) == [f"file {i}" for i in expected for _ in range(3)]


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        (Data(dataset="c4"), {"path": "allenai/c4", "name": "en", "split": "train"}),
        (
            Data(dataset="c4", subset="realnewslike", split="validation"),
            {"path": "allenai/c4", "name": "realnewslike", "split": "validation"},
        ),
        (Data(dataset="some/name"), {"path": "some/name", "name": None, "split": "train"}),
    ],
)
def test_a_hub_name_is_streamed_with_its_arguments(monkeypatch, section, arguments):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **kwargs: calls.append(kwargs))
    with pytest.raises(ValueError, match="num_shards"):
        resolve_source(section).open()
    assert calls == [{**arguments, "streaming": True}]


def test_a_hub_dataset_is_sent_to_processes_without_what_is_open(monkeypatch):
    opened = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: opened)
    source = resolve_source(Data(dataset="some/name"))
    before = pickle.dumps(source)
    assert source.num_files == 1
    assert pickle.dumps(source) == before


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            ConnectionError("Couldn't reach 'allenai/c4' on the Hub (OfflineModeIsEnabled)"),
            "data.dataset: the Hugging Face hub could not be reached for allenai/c4 en train; "
            "without a network, set data.dataset_path to local files",
        ),
        (
            FileNotFoundError("no dataset\n\nof that name"),
            "data.dataset: cannot read allenai/c4 en train: no dataset of that name",
        ),
        (RuntimeError(), "data.dataset: cannot read allenai/c4 en train: RuntimeError"),
    ],
)
def test_whatever_datasets_raises_becomes_one_sentence(monkeypatch, raised, message):
    def load_dataset(**_):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole message is compared)
        resolve_source(Data(dataset="c4")).open()
    assert str(error.value) == message
    assert error.value.__cause__ is raised


def test_without_a_network_the_key_to_set_is_in_the_table_of_the_source(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=ConnectionError))
    source = resolve_source(Validation(dataset="c4"), table="validation")
    with pytest.raises(ValueError, match=r"without a network, set validation\.dataset_path to"):
        source.open()


def test_the_bundled_corpus_is_clean_prose_with_no_work_in_both_splits():
    sources = {}
    for split in ("train", "validation"):
        documents = [
            json.loads(row["text"].encode("latin-1"))
            for row in resolve_source(Data(split=split)).open()
        ]
        sources[split] = {document["source"] for document in documents}
        for text in (document["text"] for document in documents):
            assert 200 < len(text) < 10_000
            assert text == text.strip()
            assert all(character.isprintable() or character == "\n" for character in text)
            assert not {"\ufffd", "\u00c3", "\u00e2"} & set(text)
    assert sources["train"].isdisjoint(sources["validation"])


def test_the_same_files_elsewhere_have_the_same_identity(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "x.jsonl", TEXTS)
    a, b = (resolve_source(Data(dataset_path=str(tmp_path / f))) for f in ("a", "b"))
    assert a.identity == b.identity
    write_jsonl(tmp_path / "b" / "x.jsonl", TEXTS[1:])
    assert resolve_source(Data(dataset_path=str(tmp_path / "b"))).identity != a.identity


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_path": "nowhere.jsonl"}, r'data.dataset_path: "nowhere.jsonl" matches no file'),
        (
            {"dataset_path": "HuggingFaceFW/fineweb"},
            r"matches no file; names on the .* hub are not fetched: run hf download Hugging",
        ),
        ({"dataset_path": "no*.jsonl"}, r'data.dataset_path: "no\*.jsonl" matches no file'),
        ({"dataset_path": "empty"}, r"data.dataset_path: empty has no file ending in .jsonl"),
        ({"dataset_path": "a.csv"}, r"unknown format of 'a.csv', expected a name ending in .jsonl"),
        (
            {"dataset_path": "mixed"},
            r'mixes formats \(1 json, 1 text\): set data.dataset_path to a .*"mixed/\*\.',
        ),
        ({"dataset_path": "mixed/a.txt", "subset": "en"}, r'data.subset: "en" does not apply to'),
        ({"dataset_path": "mixed/a.txt", "split": "test"}, r'data.split: "test" does not apply'),
        ({"subset": "en"}, r'data.subset: "en" does not apply to data.dataset = "bundled"'),
        ({"split": "test"}, r'data.split: must be "train" or "validation" for the bundled corpus'),
        ({"dataset": "mixed"}, r'data.dataset: "mixed" is a local path: set data.dataset_path'),
    ],
)
def test_what_cannot_be_read_is_named_before_anything_is_opened(
    tmp_path, monkeypatch, settings, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "mixed" / "a.txt").write_text("text")
    write_jsonl(tmp_path / "mixed" / "b.jsonl", TEXTS)
    with pytest.raises(ValueError, match=message):
        resolve_source(Data(**settings))
