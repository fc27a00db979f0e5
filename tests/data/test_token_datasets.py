"""Datasets of token ids, of others: read as the text from which they were made would be."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import ipc, parquet

from tests.data.jobs import TOKENIZER, close, in_parts, loaders, run, take
from tests.data.test_loader import TEXTS
from titan_lite.cli import main
from titan_lite.config.schema import Data
from titan_lite.data.megatron import MegatronFile
from titan_lite.data.sources import resolve_source

IDS = [tokens.tolist() for tokens in TOKENIZER.encode_documents(TEXTS)]
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def write_megatron(
    path: Path,
    documents: Sequence[Sequence[Sequence[int]]],
    dtype: type[Any] = np.uint16,
    code: int = 8,
) -> None:
    """Documents of sequences, byte for byte as Megatron's IndexedDatasetBuilder writes them."""
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    offsets = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    boundaries = np.cumsum([0, *map(len, documents)])
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
    content = (np.array(lengths, "<i4"), offsets.astype("<i8"), boundaries.astype("<i8"))
    path.with_suffix(".idx").write_bytes(header + b"".join(part.tobytes() for part in content))
    path.with_suffix(".bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))


def write_text(folder: Path, files: int) -> None:
    folder.mkdir()
    for i in range(files):
        parquet.write_table(pyarrow.table({"text": TEXTS[i::files]}), folder / f"{i}.parquet")


def write_ids(folder: Path, form: str, files: int, field: str = "input_ids") -> None:
    folder.mkdir(parents=True)
    for i in range(files):
        ids = IDS[i::files]
        if form == "megatron":
            write_megatron(folder / f"{i}", [[document] for document in ids])
        elif form == "megatron_eod_int32":
            # --split-sentences --append-eod
            parts = [[document[:2], document[2:], [EOS]] for document in ids]
            write_megatron(folder / f"{i}", parts, np.int32, 4)
        elif form == "parquet_with_special_tokens":
            table = pyarrow.table({field: [[BOS, *document, EOS] for document in ids], "n": ids})
            parquet.write_table(table, folder / f"{i}.parquet", row_group_size=5)
        elif form == "arrow_stream":
            table = pyarrow.table({field: pyarrow.array(ids, pyarrow.list_(pyarrow.uint16()))})
            with ipc.new_stream(folder / f"{i}.arrow", table.schema) as stream:
                stream.write_table(table, max_chunksize=4)
        else:
            table = pyarrow.table({field: pyarrow.array(ids, pyarrow.large_list(pyarrow.int64()))})
            with ipc.new_file(folder / f"{i}.arrow", table.schema) as opened:
                opened.write_table(table, max_chunksize=7)


FORMS = [
    "megatron",
    "megatron_eod_int32",
    "parquet_with_special_tokens",
    "arrow_stream",
    "arrow_file",
]


@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_samples_are_those_of_the_text(tmp_path: Path, form: str, files: int) -> None:
    write_text(tmp_path / "text", files)
    write_ids(tmp_path / "ids", form, files)
    for num_streams in (2, 3):
        text, ids = (
            Data(dataset_path=str(tmp_path / name), num_streams=num_streams, shuffle_buffer=12)
            for name in ("text", "ids")
        )
        expected = run(text, 80)
        assert run(ids, 80) == expected
        # Resumed on another number of ranks, past the end of the first epoch.
        samples, state = in_parts(ids, [(1, 10), (2, 30), (1, 10)])
        assert samples == expected
        assert state is not None
        assert max(position["epoch"] for position in state["streams"].values()) >= 1


def test_a_field_of_another_name_is_set_by_its_key_and_text_comes_first(tmp_path: Path) -> None:
    write_text(tmp_path / "text", 1)
    expected = run(Data(dataset_path=str(tmp_path / "text"), num_streams=2), 40)
    write_ids(tmp_path / "ids", "arrow_file", 1, field="tokens")
    named = Data(dataset_path=str(tmp_path / "ids"), num_streams=2, tokens_field="tokens")
    assert run(named, 40) == expected
    columns = {"text": TEXTS, "input_ids": [[7, 7, 7]] * len(TEXTS)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "both.parquet")
    both = Data(dataset_path=str(tmp_path / "both.parquet"), num_streams=2)
    assert run(both, 40) == expected
    ids = run(both.model_copy(update={"tokens_field": "input_ids"}), 2)
    assert ids[0] == [BOS, 7, 7, 7, EOS, BOS, 7, 7, 7]


def test_saved_datasets_and_those_by_name_have_a_column_of_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "text", 1)
    expected = run(Data(dataset_path=str(tmp_path / "text"), num_streams=2), 40)
    dataset = datasets.Dataset.from_dict({"input_ids": IDS})
    dataset.save_to_disk(tmp_path / "saved")
    assert run(Data(dataset_path=str(tmp_path / "saved"), num_streams=2), 40) == expected
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: dataset.to_iterable_dataset())
    assert run(Data(dataset="someone/ids", num_streams=2), 40) == expected


def test_megatron_files_are_named_by_either_or_by_what_they_share(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a_text_document", [[ids] for ids in IDS])
    for name in ("a_text_document", "a_text_document.idx", "a_text_document.bin", "*document*"):
        source = resolve_source(Data(dataset_path=str(tmp_path / name)))
        assert source.files == (tmp_path / "a_text_document.idx",)
        assert source.tokens_field == "input_ids"
    assert source.identity == resolve_source(Data(dataset_path=str(tmp_path))).identity
    write_megatron(tmp_path / "a_text_document", [[ids[:-1]] for ids in IDS])
    assert source.identity != resolve_source(Data(dataset_path=str(tmp_path))).identity


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(np.uint8, 1), (np.int8, 2), (np.int16, 3), (np.int32, 4), (np.int64, 5), (np.uint16, 8)],
)
def test_every_integer_type_of_megatron_is_read(
    tmp_path: Path, dtype: type[Any], code: int
) -> None:
    documents = [[[1, 2], [3]], [], [[100]], [[5, 6, 7], [8]]]
    write_megatron(tmp_path / "a", documents, dtype, code)
    file = MegatronFile(tmp_path / "a.idx")
    assert [file[i].tolist() for i in range(len(file))] == [[1, 2, 3], [], [100], [5, 6, 7, 8]]
    assert not file[3].flags.owndata


def damage(path: Path, offset: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: (path / "a.bin").unlink(),
            r"a\.bin is missing: .*a\.idx is the index of its",
        ),
        (lambda path: (path / "a.idx").write_bytes(b""), r"a\.idx is damaged: it does not start"),
        (lambda path: damage(path / "a.idx", 0, b"TNTIDX"), r"does not start with Megatron's b'MM"),
        (lambda path: damage(path / "a.idx", 9, b"\x02"), r"a\.idx has version 2; 1 is required"),
        (lambda path: damage(path / "a.idx", 17, b"\x07"), r"has dtype code 7; token ids have one"),
        (
            lambda path: (path / "a.idx").write_bytes((path / "a.idx").read_bytes()[:-3]),
            r"a\.idx has 639 bytes; 30 sequences and 31 document boundaries take 642",
        ),
        (
            lambda path: (path / "a.bin").write_bytes((path / "a.bin").read_bytes()[:-2]),
            r"a\.bin has [\d,]+ bytes; its index describes ",
        ),
        (lambda path: damage(path / "a.idx", 634, b"\x1d"), r"its documents do not cover its seq"),
    ],
)
def test_damaged_megatron_files_are_named(tmp_path: Path, change: Any, message: str) -> None:
    write_megatron(tmp_path / "a", [[ids] for ids in IDS])
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"^data\.dataset_path: .*{message}"):
        resolve_source(Data(dataset_path=str(tmp_path / "a.idx")))


@pytest.mark.parametrize(
    ("position", "number"),
    [
        (34, "<i4"),  # the length of the first sequence
        (34 + 4 * 30 + 8, "<i8"),  # the offset of the second
        (34 + 12 * 30 + 8, "<i8"),  # the boundary after the first document
    ],
    ids=["length", "offset", "boundary"],
)
@pytest.mark.parametrize("value", [-2, 5, 29, 2**20])
def test_damaged_positions_of_megatron_documents_are_named(
    tmp_path: Path, position: int, number: str, value: int
) -> None:
    path = tmp_path / "a"
    write_megatron(path, [[ids] for ids in IDS])
    damage(path.with_suffix(".idx"), position, np.array([value], number).tobytes())
    source = resolve_source(Data(dataset_path=f"{path}.idx"))
    with pytest.raises(
        ValueError, match=rf"cannot read {path}.idx: the positions of document \d+ "
    ):
        list(source.open())


def test_an_integer_that_takes_more_than_64_bits_spoils_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [1, -99999999999999999999]}\n{"input_ids": [1, 2]}\n')
    (rank,) = loaders(Data(dataset_path=str(path), num_streams=1))
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: token id -9{20} takes more than 64 b"):
        take([rank], 1)
    close([rank])
    ranks = loaders(Data(dataset_path=str(path), num_streams=1, on_bad_document="skip"))
    assert len(take(ranks, 1)) == 1
    close(ranks)


def test_ids_outside_the_vocabulary_and_columns_of_other_types_are_named(tmp_path: Path) -> None:
    def error_of(columns: dict[str, Any], **keys: Any) -> str:
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        section = Data(dataset_path=str(tmp_path / "a.parquet"), num_streams=1, **keys)
        ranks = loaders(section)
        with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller reads the message)
            take(ranks, 9)
        close(ranks)
        return str(error.value)

    file = rf"data.dataset_path: {tmp_path}/a.parquet"
    for skip in ("raise", "skip"):
        assert error_of({"input_ids": [[1, 2], [3, 2048]]}, on_bad_document=skip) == (
            f"{file}, row 2: token id 2048 is outside the tokenizer's vocabulary of 2,048; set "
            "data.tokenizer_path to the tokenizer that made it"
        )
    assert "row 1: token id -1 is outside" in error_of({"input_ids": [[1, -1]]})
    assert error_of({"input_ids": [[1.0, 2.0]]}).endswith(
        f"cannot read {tmp_path}/a.parquet: column 'input_ids' is list<element: double>; it must "
        "be text, or token ids, which must be integers without nulls"
    )
    assert "must be integers without nulls" in error_of({"input_ids": [[1, None]]})
    message = error_of({"input_ids": ["some text"]})
    assert message.startswith(f"data.tokens_field: {tmp_path}/a.parquet, row 1: field 'input_ids'")
    assert "is 'some text', expected a list of token ids" in message
    assert "row 2: field 'input_ids' is None" in error_of({"input_ids": [[1], None]})
    assert "row 1: field 'input_ids' is empty" in error_of({"input_ids": [[], [1]]})
    assert 'no field "ids"; its fields: "input_ids"; set tokens_field = "input_ids"' in error_of(
        {"input_ids": [[1]]}, tokens_field="ids"
    )
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        ValueError, match=r"^data\.tokens_field: \"x\" does not apply to text files"
    ):
        resolve_source(Data(dataset_path=str(tmp_path / "a.txt"), tokens_field="x"))


def test_a_preflight_names_the_file_and_warns_of_keys_of_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    keys = [
        "config",
        f"--data.dataset_path={tmp_path / 'a'}",
        "--model.flavor=debug",
        "--preflight",
    ]
    keys += ["--data.num_streams=4", "--data.tokenizer_threads=2", "--quiet"]
    write_megatron(tmp_path / "a", [[ids] for ids in IDS])
    assert main(keys) == 0
    message = "data.tokenizer_threads (command line) has no effect because the data is tokenized"
    assert message in caplog.text
    write_megatron(tmp_path / "a", [[[5000]], [[6]]])
    assert main(keys) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path}/a.idx, row 1: token id 5000 is outside the tokenizer's" in message
