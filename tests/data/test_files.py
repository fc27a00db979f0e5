"""Local files: every way in which the same documents lie on disk gives the same samples."""

import bz2
import gzip
import json
import logging
import lzma
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import ipc, parquet

from tests.data.jobs import close, in_parts, loaders, run, take
from titan_lite.cli import main
from titan_lite.config.load import load_config
from titan_lite.config.schema import Data, DataSource, Validation
from titan_lite.data import files, formats
from titan_lite.data.columns import UnreadableError
from titan_lite.data.file_rows import LocalFiles
from titan_lite.data.held_out import resolve_held_out
from titan_lite.data.sources import resolve_source, resolve_sources
from titan_lite.data.token_folder import read_token_manifest
from titan_lite.runtime.log import warn_once
from titan_lite.tools import tokenize_data

TEXTS = [f"{i} " + "whale \u00e9 " * (i % 7) for i in range(30)]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
INDENTED = json.dumps(list(map(json.loads, LINES.splitlines())), indent=1)


@pytest.fixture(autouse=True)
def warn_again() -> None:
    warn_once.cache_clear()


def zstd(content: bytes) -> bytes:
    """In frames, as parallel compressors write them."""
    frames = (content[start : start + 500] for start in range(0, len(content), 500))
    return b"".join(pyarrow.compress(frame, "zstd", asbytes=True) for frame in frames)


def bytes_of(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def table() -> pyarrow.Table:
    return pyarrow.table({"id": range(30), "text": TEXTS, "images": [b"\xff"] * 30})


def write_parquet(path: Path) -> None:
    parquet.write_table(table(), path, row_group_size=7)


def write_arrow(path: Path, new: Any = ipc.new_stream) -> None:
    with new(str(path), table().schema) as writer:
        writer.write_table(table(), max_chunksize=7)


def write_saved(path: Path) -> None:
    datasets.Dataset(table()).save_to_disk(path, num_shards=1)
    # As map() leaves them.
    write_arrow(path / "cache-0123456789abcdef.arrow")


def write_splits(path: Path) -> None:
    splits = {"test": datasets.Dataset(table()).select([0]), "train": datasets.Dataset(table())}
    datasets.DatasetDict(splits).save_to_disk(path)


def write_cache(path: Path) -> None:
    """Creates a link to a blob without suffix, as in the hub's cache."""
    blob = path / "blobs" / "0123456789abcdef"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(LINES)
    (path / "snapshots" / "rev").mkdir(parents=True)
    (path / "snapshots" / "rev" / "train.jsonl").symlink_to("../../blobs/0123456789abcdef")


def write_linked(path: Path) -> None:
    """A folder that links to the one with the documents, which links back."""
    other = path.with_name("elsewhere")
    other.mkdir()
    (other / "a.jsonl").write_bytes(LINES)
    path.mkdir()
    (path / "linked").symlink_to(other)
    (path / "again").symlink_to(other)
    (path / "loop").symlink_to(path)
    (other / "back").symlink_to(path)


FORMS: dict[str, Callable[[Path], object]] = {
    "a.jsonl.gz": bytes_of(gzip.compress(LINES[:300]) + gzip.compress(LINES[300:])),
    "a.jsonl.bz2": bytes_of(bz2.compress(LINES)),
    "a.jsonl.xz": bytes_of(lzma.compress(LINES)),
    "a.jsonl.zst": bytes_of(zstd(LINES)),
    "A.JSONL": bytes_of(LINES),
    "a.Jsonl.GZ": bytes_of(gzip.compress(LINES)),
    "a.ndjson": bytes_of(LINES),
    "spaced.jsonl": bytes_of(b"\n \n" + LINES.replace(b"\n", b"\n\n")),
    "crlf.jsonl": bytes_of(LINES.replace(b"\n", b"\r\n")),
    "mark.jsonl": bytes_of(b"\xef\xbb\xbf" + LINES),
    "lines.json": bytes_of(LINES),
    "array.json": bytes_of(b"[" + LINES.replace(b"\n", b",\n")[:-2] + b"]"),
    "indented.json.zst": bytes_of(zstd(INDENTED.encode("utf-8-sig"))),
    "a.PARQUET": write_parquet,
    "stream.arrow": write_arrow,
    "file.arrow": lambda path: write_arrow(path, ipc.new_file),
    "saved": write_saved,
    "splits": write_splits,
    "cache": write_cache,
    "linked": write_linked,
    "part [0]* \u00e9.jsonl": bytes_of(LINES),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    path = tmp_path_factory.mktemp("plain") / "a.jsonl"
    path.write_bytes(LINES)
    return run(data(path), 72)


def data(path: Path, **keys: Any) -> Data:
    return Data(dataset_path=str(path), **{"num_streams": 2, "shuffle_buffer": 12, **keys})


@pytest.mark.parametrize("name", FORMS)
def test_samples_are_those_of_plain_jsonl_and_resume_exactly(
    tmp_path: Path, expected: list[list[int]], name: str
) -> None:
    FORMS[name](tmp_path / name)
    samples, _ = in_parts(data(tmp_path / name), [(1, 7), (3, 8), (2, 13), (1, 15)])
    assert samples == expected


@pytest.mark.parametrize("name", ["a.jsonl.zst", "array.json", "a.PARQUET", "saved"])
def test_samples_are_those_of_plain_jsonl_wherever_documents_are_named(
    tmp_path: Path, expected: list[list[int]], name: str
) -> None:
    """In a folder, by a glob, as tokens; a source of a mixture and of a validation."""
    (tmp_path / "x").mkdir()
    FORMS[name](tmp_path / "x" / name)
    path, target = tmp_path / "x" / name, tmp_path / "tokens"
    assert run(data(tmp_path), 72) == expected
    assert run(data(Path(f"{tmp_path}/*/{name}")), 72) == expected
    source = DataSource(name="a", weight=1, dataset_path=str(path))
    mixed = Data(sources=[source], num_streams=2, shuffle_buffer=12)
    assert run(mixed, 72) == expected
    held_out = resolve_held_out(Validation(dataset_path=str(path)), Data())
    assert held_out.identity == resolve_sources(mixed)[0].identity
    loaded = load_config(None, [f"--data.dataset_path={path}"])
    assert tokenize_data.write(loaded, target, processes=1, shard_size=99) == 0
    assert run(data(target), 72) == expected
    assert read_token_manifest(target).documents == 30
    (target / "a.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"/tokens was written by titan-lite tokenize: set data"):
        resolve_source(data(tmp_path))


def read(path: Path) -> list[str]:
    source = resolve_source(Data(dataset_path=str(path)))
    return [Path(file).name for file in source.files]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return list(resolve_source(Data(dataset_path=str(path))).open())


def refused(path: object, **keys: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller reads the message)
        resolve_source(Data(dataset_path=str(path), **keys))
    return str(error.value)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(LINES)


def test_companions_are_no_documents_and_other_files_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.jsonl", "B.JSONL", "x.y/c.jsonl.bz2")
    fill(tmp_path, "LICENSE", "LICENSE.txt", "license-mit.TXT", "README.md", "readme_en.txt")
    fill(tmp_path, "dataset_infos.json", "SHA256SUMS", "md5sum.txt", "load.py", "_SUCCESS")
    fill(tmp_path, ".gitattributes", ".cache/d.jsonl")
    assert read(tmp_path) == ["B.JSONL", "a.jsonl", "c.jsonl.bz2"]
    assert caplog.text == ""
    fill(tmp_path, "e.csv", "sub/f.jsonl.lz4", "g.parquet.gz", "_h.jsonl", "_temporary/i.jsonl")
    for _ in range(2):
        assert read(tmp_path) == ["B.JSONL", "a.jsonl", "c.jsonl.bz2"]
    start = f'data.dataset_path = "{tmp_path}" leaves out'
    assert caplog.messages == [
        f"{start} e.csv, g.parquet.gz, sub/f.jsonl.lz4: documents end in {formats.KNOWN}",
        f"{start} _h.jsonl, _temporary, by name not documents: to read such files, set "
        f'dataset_path to a glob such as "{tmp_path}/*.jsonl"',
    ]
    assert read(tmp_path / "*.jsonl") == ["_h.jsonl", "a.jsonl"]


def test_a_folder_without_documents_is_refused_by_its_files(tmp_path: Path) -> None:
    start = f"data.dataset_path: {tmp_path} has no file ending in {formats.KNOWN}"
    assert refused(tmp_path) == start
    fill(tmp_path, "LICENSE.txt")
    assert refused(tmp_path) == f"{start}; recognized as other files: LICENSE.txt"
    fill(tmp_path, "a.jsonl.lz4", "b.tar.gz")
    assert refused(tmp_path) == (
        f"{start}; unsupported: a.jsonl.lz4, b.tar.gz; recognized as other files: LICENSE.txt"
    )
    fill(tmp_path, "urls.txt")
    assert refused(tmp_path) == (
        f"data.dataset_path: {tmp_path} has text (urls.txt) next to unsupported files "
        "(a.jsonl.lz4, b.tar.gz): to train on the text, set dataset_path to a glob such as "
        f'"{tmp_path}/*.txt"'
    )
    assert read(tmp_path / "*.txt") == ["LICENSE.txt", "urls.txt"]


def test_a_file_and_its_compressed_copy_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.jsonl", "sub/a.jsonl", "b.jsonl.gz")
    assert read(tmp_path) == ["a.jsonl", "b.jsonl.gz", "a.jsonl"]
    assert caplog.messages == []
    fill(tmp_path, "sub/a.jsonl.gz")
    assert read(tmp_path) == ["a.jsonl", "b.jsonl.gz", "a.jsonl", "a.jsonl.gz"]
    assert caplog.messages == [
        f'data.dataset_path = "{tmp_path}" reads sub/a.jsonl.gz and the file of the same name '
        "without compression: if they have the same documents, set dataset_path to a glob of one, "
        f'such as "{tmp_path}/**/*.jsonl.gz"'
    ]
    assert read(tmp_path / "**/*.jsonl.gz") == ["b.jsonl.gz", "a.jsonl.gz"]


def test_of_text_the_companions_are_named_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "moby dick.txt", "Terms of endearment.txt", "README.md")
    assert read(tmp_path) == ["moby dick.txt"]
    assert caplog.messages == [
        f'data.dataset_path = "{tmp_path}" leaves out Terms of endearment.txt, by name not '
        f'documents: to read such files, set dataset_path to a glob such as "{tmp_path}/*.txt"'
    ]


def test_a_file_is_read_once_whatever_links_lead_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "b.jsonl", "z/c.jsonl", "copy.jsonl")
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    (tmp_path / "aliases").symlink_to("z")
    (tmp_path / "z" / "up").symlink_to("..")
    assert read(tmp_path) == ["b.jsonl", "copy.jsonl", "c.jsonl"]
    # Python's glob would not return.
    assert read(tmp_path / "**") == ["b.jsonl", "copy.jsonl", "c.jsonl"]
    assert read(tmp_path / "**" / "*.jsonl") == ["b.jsonl", "copy.jsonl", "c.jsonl"]
    assert f"leaves out {tmp_path}/a.jsonl, the same file as {tmp_path}/b.jsonl" in caplog.text


@pytest.mark.parametrize("extra", [(), ("a.jsonl",)])
def test_a_checkpoint_or_a_run_among_documents_is_refused(
    tmp_path: Path, extra: tuple[str, ...]
) -> None:
    fill(tmp_path, *extra)
    fill(tmp_path, "run/run.json", "run/metrics.jsonl", "run/x/step-1/manifest.json")
    message = refused(tmp_path)
    assert f"data.dataset_path: {tmp_path}/run is the folder of a run: set dataset_path" in message
    (tmp_path / "run" / "run.json").unlink()
    fill(tmp_path, "run/x/step-1/.metadata")
    assert f"{tmp_path}/run/x/step-1 is a checkpoint: set dataset_path to a" in refused(tmp_path)


def test_files_of_a_model_are_no_documents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "merges.txt", "vocab.txt", "config.json", "trainer_state.json", "tokenizer.json")
    start = f"data.dataset_path: {tmp_path} has no file ending in {files.KNOWN}"
    names = "config.json, merges.txt, tokenizer.json and 2 more"
    assert refused(tmp_path) == f"{start}; recognized as other files: {names}"
    fill(tmp_path, "requirements.txt", "moby dick.txt")
    assert read(tmp_path) == ["moby dick.txt"]
    assert "leaves out merges.txt, requirements.txt, vocab.txt and 3 more, by name" in caplog.text


def test_an_arrow_stream_without_its_end_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut off between two batches it reads like a whole one."""
    path = tmp_path / "a.arrow"
    for new in (ipc.new_file, ipc.new_stream):
        write_arrow(path, new)
        assert len(read_rows(path)) == 30
        assert caplog.messages == []
    path.write_bytes(path.read_bytes()[:-8])
    assert len(read_rows(path)) == 30
    assert caplog.messages == [f"{path} has no end marker: its last documents may be missing"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(LINES, mtime=0), "it is compressed by gzip: decompress it, or name it .gz"),
        (bz2.compress(LINES), "it is compressed by bzip2: decompress it, or name it .bz2"),
        (lzma.compress(LINES), "it is compressed by xz: decompress it, or name it .xz"),
        (zstd(LINES), "it is compressed by zstd: decompress it, or name it .zst"),
        (LINES.decode().encode("utf-16"), "it is UTF-16: convert it, as by iconv -f UTF-16 -t U"),
        (LINES.decode().encode("utf-16-le"), "has a NUL byte at position 1, as UTF-16 and binary"),
    ],
    ids=["gzip", "bzip2", "xz", "zstd", "utf-16", "utf-16-le"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_content_that_is_no_text_is_named(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    compress = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(compress(content))
    assert f"; {reason}".replace("; has", " has") in error_of(data(tmp_path / name, num_streams=1))


def test_a_file_without_the_column_of_text_is_named(tmp_path: Path) -> None:
    parquet.write_table(table(), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"input_ids": [[1, 2]]}), tmp_path / "b.parquet")
    message = error_of(data(tmp_path, num_streams=1))
    assert f'{tmp_path}/b.parquet, row 1: no field "text"; its fields: "input_ids"; data' in message
    (tmp_path / "c.jsonl").write_text("{}\n")
    assert 'no field "text"; its fields: none; data' in error_of(data(tmp_path / "c.jsonl"))


def test_a_link_out_of_the_folder_does_not_bring_in_what_lies_around_it(tmp_path: Path) -> None:
    fill(tmp_path, "mine/a.jsonl", "others.jsonl")
    (tmp_path / "mine" / "up").symlink_to(tmp_path)
    assert read(tmp_path / "mine") == ["a.jsonl"]


def test_a_glob_takes_folders_as_they_would_be_by_path(tmp_path: Path) -> None:
    fill(tmp_path, "x/1.jsonl/part-0.jsonl", "x/1.jsonl/_SUCCESS", "x/2.jsonl")
    assert read(tmp_path / "x" / "*.jsonl") == ["part-0.jsonl", "2.jsonl"]


def test_a_glob_of_folders_passes_over_files_beside_them(tmp_path: Path) -> None:
    fill(tmp_path, "README.md", "x/a.jsonl", "x/y/b.jsonl", ".cache/c.jsonl")
    assert read(tmp_path / "*" / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl"]


def test_the_current_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert read(Path()) == ["a.jsonl"]


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_bytes(LINES)
    assert len(run(data(tmp_path), 9)) == 9


def test_a_folder_of_several_splits_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "en/train-0.jsonl", "en/contest.jsonl", "en/trainer.jsonl")
    read(tmp_path)
    assert caplog.text == ""
    fill(tmp_path, "validation/0.jsonl")
    read(tmp_path)
    assert "reads files of several splits (train, validation): to train on one" in caplog.text
    assert f'a glob such as "{tmp_path}/**/*train*.jsonl"' in caplog.text
    fill(tmp_path, "x/train/1.jsonl", "x/test/2.jsonl")
    read(tmp_path / "x")
    assert f'a glob such as "{tmp_path}/x/**/*train*/**"' in caplog.text
    assert read(tmp_path / "x/**/*train*/**") == ["1.jsonl"]


def test_a_folder_whose_name_starts_with_an_underscore_is_read_by_the_glob_of_the_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.jsonl", "_b/c.jsonl")
    assert read(tmp_path) == ["a.jsonl"]
    assert f'a glob such as "{tmp_path}/_b/**"' in caplog.text
    assert read(tmp_path / "_b/**") == ["c.jsonl"]


def test_a_link_within_a_path_is_followed(tmp_path: Path) -> None:
    fill(tmp_path, "real/deep/a.jsonl", "real/b.jsonl", "b.jsonl")
    (tmp_path / "link").symlink_to("real/deep")
    section = Data(dataset_path=f"{tmp_path}/link/../b.jsonl")
    (file,) = resolve_source(section).files
    assert file.samefile(tmp_path / "real" / "b.jsonl")


def test_the_same_files_by_links_have_the_identity_of_plain_ones(tmp_path: Path) -> None:
    fill(tmp_path, "plain/train.jsonl")
    write_cache(tmp_path / "cache")
    plain, linked = (
        resolve_source(Data(dataset_path=str(tmp_path / name))) for name in ("plain", "cache")
    )
    assert plain.identity == linked.identity


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_what_is_no_file_of_its_own_is_refused_and_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # A socket's path is short.
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / name)
    os.mkfifo(tmp_path / "manifest.json")
    for path in (tmp_path / name, tmp_path):
        assert f"{tmp_path / name} is not a regular file" in refused(path)
    (tmp_path / name).unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(name)
        assert f"{tmp_path / name} is not a regular file" in refused(tmp_path)
    (tmp_path / name).unlink()
    for target in ("nowhere", name):
        (tmp_path / name).symlink_to(target)
        assert f"{tmp_path / name} is a link to a missing file" in refused(tmp_path)
        (tmp_path / name).unlink()


def test_files_and_folders_without_permission_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a.jsonl", "sub/b.jsonl")
    monkeypatch.setattr(os, "access", lambda path, _: path.name != "b.jsonl")
    assert f"no permission to read {tmp_path}/sub/b.jsonl" in refused(tmp_path)

    def scandir(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    assert refused(tmp_path).endswith(f": cannot list {tmp_path}: Permission denied")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pointer_of_git_lfs_is_not_taken_for_the_file(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    assert f"{tmp_path / name} is a pointer of Git LFS" in refused(tmp_path)


def error_of(section: Data) -> str:
    (loader,) = loaders(section)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller reads the message)
        take([loader], 99)
    close([loader])
    return str(error.value)


def test_parquet_without_rows_is_read_among_others_and_refused_alone(tmp_path: Path) -> None:
    for i, rows in enumerate((10, 0, 20, 0)):
        parquet.write_table(table().slice(10 * (i > 0), rows), tmp_path / f"{i}.parquet")
    with parquet.ParquetWriter(tmp_path / "no_groups.parquet", table().schema):
        pass
    rows = list(resolve_source(data(tmp_path)).open())
    assert [row["text"] for row in rows] == TEXTS
    whole = run(data(tmp_path, num_streams=7), 30)
    assert whole == in_parts(data(tmp_path, num_streams=7), [(1, 9), (3, 7)])[0]
    for name in ("3", "no_groups"):
        path = tmp_path / f"{name}.parquet"
        assert error_of(data(path)) == f"data.dataset_path: {path} has no documents"


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


@pytest.mark.parametrize("damage", [cut, lambda content: b"<html>" + content])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.txt.bz2", bz2.compress(LINES)),
        ("a.json.xz", lzma.compress(LINES)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.arrow", None),
        ("a.parquet", None),
    ],
    ids=["gz", "bz2", "xz", "zst", "arrow", "parquet"],
)
def test_a_damaged_file_is_named_among_good_ones(
    tmp_path: Path, name: str, content: bytes | None, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    if content is None:
        (write_arrow if name == "a.arrow" else write_parquet)(path)
        content = path.read_bytes()
        path.with_stem("b").write_bytes(content)
    path.write_bytes(damage(content))
    message = error_of(data(tmp_path, num_streams=1))
    assert message.startswith(f"data.dataset_path: cannot read {path}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("suffix", "compress"), [("bz2", bz2.compress), ("xz", lzma.compress), ("gz", gzip.compress)]
)
def test_a_damaged_member_of_a_compressed_file_is_named(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    """Parallel compressors write many members."""
    path, members = tmp_path / f"a.jsonl.{suffix}", [compress(LINES[:300]), compress(LINES[300:])]
    for damaged in (b"\0\0\0\0".join(members), b"".join(members) + b"\0" * 512):
        path.write_bytes(damaged)
        assert [json.loads(row["text"])["text"] for row in read_rows(path)] == TEXTS
    for damaged in (members[1][:1] + b"?" + members[1][2:], members[1][:6], b"<html>"):
        path.write_bytes(members[0] + damaged)
        message = error_of(data(path, num_streams=1))
        assert message.startswith(f"data.dataset_path: cannot read {path}: ")


@pytest.mark.parametrize(
    "change", [lambda c: c + b'{"text": "new"}\n', lambda c: c[: c.rindex(b"{")]]
)
@pytest.mark.parametrize("is_open", [True, False])
def test_a_file_that_changes_while_a_run_reads_it_is_named(
    tmp_path: Path, change: Callable[[bytes], bytes], is_open: bool
) -> None:
    """Whatever the file is cut to or gets, each of its lines is a document."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    rows = LocalFiles([[path]], "text").open(0, 1)
    reading = iter(rows)
    if is_open:
        next(reading)
    path.write_bytes(change(LINES))
    reason = f"its size changed from {len(LINES):,} to {path.stat().st_size:,} bytes during the run"
    with pytest.raises(UnreadableError, match=f"cannot read {path}: {reason}"):
        list(reading)


def test_damaged_offsets_of_an_arrow_file_do_not_crash_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    rows = pyarrow.table({"text": ["aaaa", "bbbb"]})
    with ipc.new_stream(str(path), rows.schema) as writer:
        writer.write_table(rows)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(struct.pack("<3i", 0, 4, 8), struct.pack("<3i", 0, 2**30, 8)))
    assert path.read_bytes() != whole
    assert error_of(data(path, num_streams=1)).startswith(f"data.dataset_path: cannot read {path}")


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_columns_are_judged_as_fields_are(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / f"a.{write.__name__.removeprefix('write_')}"
    write(path)
    message = error_of(data(path, text_field="texts"))
    assert (
        'no field "texts"; its fields: "id", "text", "images"; set text_field = "text"' in message
    )
    assert "field 'id' is 0, expected text" in error_of(data(path, text_field="id"))


def test_a_field_that_a_later_file_lacks_is_named_with_file_and_line(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'[{"text": "fine"}, {"txt": "no"}]'))
    message = error_of(data(tmp_path, num_streams=1))
    assert f'{tmp_path}/b.json.gz, document 2: no field "text"' in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{\n "text": "one",\n "id": 1\n}\n', None),
        (b'{"text": broken\n{"text": "fine"}\n', "document 1: not JSON"),
        (b'["a string"]', 'document 1: expected a JSON object, got "a string"'),
        (b'{"data": [{"text": "a"}]}', 'no field "text"; its fields: "data"; data.on_bad'),
        (b"\x00\x00\x00", "document 1: has a NUL byte at position 0"),
        (b"\xff\xfe{\x00}\x00", "document 1: not UTF-8: byte 0xff"),
        (b" \n\r\n\t\n", "has no documents"),
        (b"[]", "has no documents"),
    ],
)
def test_json_is_one_document_or_lines(tmp_path: Path, content: bytes, reason: str | None) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    section = data(path, num_streams=1)
    if reason is None:
        assert len(run(section, 9)) == 9
    else:
        assert reason in error_of(section)


def test_a_saved_dataset_is_read_by_its_split(tmp_path: Path) -> None:
    write_splits(tmp_path / "saved")
    path = tmp_path / "saved"
    test, train = (
        resolve_source(Data(dataset_path=str(path), split=split)) for split in ("test", "train")
    )
    assert [len(list(source.open())) for source in (test, train)] == [1, 30]
    assert train.identity == resolve_source(Data(dataset_path=str(path / "train"))).identity
    held_out = Validation(dataset_path=str(path), split="test")
    resolve_held_out(held_out, Data(dataset_path=str(path)))
    with pytest.raises(ValueError, match=r"\[data\] trains on .*saved: set another .* in \[val"):
        resolve_held_out(held_out, Data(dataset_path=str(path), split="test"))
    message = refused(path, split="validation")
    assert message == (
        f"data.split: 'validation' is not a split of {path}, which has ['test', 'train']"
    )
    assert 'data.subset: "en" does not apply' in refused(path, subset="en")
    assert 'data.split: "test" does not apply' in refused(path / "train", split="test")
    assert f"{path} has several splits: set dataset_path to this folder" in refused(tmp_path)


def test_a_file_among_those_that_are_trained_on_is_not_held_out(tmp_path: Path) -> None:
    fill(tmp_path, "x/a.jsonl", "x/b.jsonl")
    (tmp_path / "held_out.jsonl").symlink_to("x/b.jsonl")
    held_out = Validation(dataset_path=str(tmp_path / "held_out.jsonl"))
    file = tmp_path / "held_out.jsonl"
    message = rf"^validation.dataset_path: \[data\] trains on {file}: set other files in \[val"
    with pytest.raises(ValueError, match=message):
        resolve_held_out(held_out, data(tmp_path / "x"))


def test_splits_of_the_same_size_are_told_apart(tmp_path: Path) -> None:
    rows = {"train": ["one"], "validation": ["two"]}
    splits = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert resolve_held_out(Validation(dataset_path=path), Data(dataset_path=path)).files


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("state.json", "{", "state.json is not JSON: "),
        ("state.json", "[]", "state.json is not a JSON object"),
        ("state.json", "{}", "state.json is damaged: KeyError('_data_files')"),
        (
            "state.json",
            '{"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}',
            "is a selection of rows, written by an old version of datasets",
        ),
        ("data-00000-of-00001.arrow", None, "data-00000-of-00001.arrow is missing"),
    ],
)
def test_a_saved_dataset_that_is_not_whole_is_refused(
    tmp_path: Path, file: str, content: str | None, reason: str
) -> None:
    write_saved(tmp_path / "saved")
    if content is None:
        (tmp_path / "saved" / file).unlink()
    else:
        (tmp_path / "saved" / file).write_text(content)
    assert reason in refused(tmp_path / "saved")


def test_ranks_whose_compressed_files_differ_do_not_resume_each_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl.zst").write_bytes(zstd(LINES if name == "a" else LINES[:900]))
    _, state = in_parts(data(tmp_path / "a"), [(1, 3)])
    with pytest.raises(ValueError, match=r"dataset was '1 json files .*' and is '1 json files"):
        loaders(data(tmp_path / "b"), state=state)


def test_the_command_line_names_what_is_left_out_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    fill(tmp_path, "a.jsonl", "b.csv")
    keys = [f"--data.dataset_path={tmp_path}", "--data.num_streams=2"]
    assert main(["config", *keys, "--preflight", "--quiet"]) == 0
    assert caplog.text.count("leaves out b.csv") == 1


def test_a_place_in_the_data_from_before_files_were_read_directly_is_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    rows = LocalFiles([[tmp_path / "a.jsonl"]], "text").open(0, 1)
    with pytest.raises(ValueError, match=r"saved by an older version .* checkpoint.initial_load_p"):
        rows.load_state_dict({"shard_idx": 0, "shard_example_idx": 12})
