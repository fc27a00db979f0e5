"""titan-lite tokenize: the same files after any interruption, read as the text would be."""

import contextlib
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tests.data.jobs import (
    FILES,
    LAYOUTS,
    RESUMES,
    TOKENIZER,
    close,
    few,
    in_parts,
    loaders,
    rows_of,
    run,
    take,
)
from tests.data.test_loader import BAD, TEXTS
from titan_lite.cli import main
from titan_lite.config.schema import Data, DataSource, MaskedLM, Validation
from titan_lite.data import readers, tokenizing
from titan_lite.data.held_out import read_held_out, resolve_held_out
from titan_lite.data.masked_lm import MaskedPairs
from titan_lite.data.sources import resolve_source
from titan_lite.data.token_folder import TokenManifest, read_token_manifest
from titan_lite.data.tokenizing import tokenize
from titan_lite.runtime.folder_lock import FolderLock

ROOT = Path(__file__).parent.parent.parent


def lines(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text}).encode() for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with bad ones and blank lines between, in one file and in four; tokenized, too."""
    folder = tmp_path_factory.mktemp("documents")
    mixed = lines(TEXTS)
    for i, bad in enumerate(BAD):
        mixed[5 * i : 5 * i] = [b"", bad]
    for name, count in (("one", 1), ("four", 4)):
        (folder / name).mkdir()
        for i in range(count):
            (folder / name / f"{i}.jsonl").write_bytes(b"\n".join(mixed[i::count]) + b"\n\n")
        write(folder / name, folder / f"{name}.tokens")
    return folder


def text_data(path: Path, **keys: Any) -> Data:
    keys = {"shuffle_buffer": 12, "on_bad_document": "skip", **keys}
    return Data(dataset_path=str(path), **keys)


def write(
    source: Path,
    target: Path,
    *,
    processes: int = 1,
    shard_size: int = 300,
    **keys: Any,
) -> TokenManifest:
    section = text_data(source, **keys)
    return tokenize(
        resolve_source(section),
        section,
        target,
        processes=processes,
        shard_size=shard_size,
    )


def rows_per_file(manifest: TokenManifest) -> list[int]:
    return [sum(shard.rows for shard in shards) for shards in manifest.files]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@given(**LAYOUTS, files=FILES, shuffle=st.booleans())
@few
def test_samples_are_those_of_the_text_for_every_degree(
    folder: Path, num_streams: int, degree: int, batch: int, files: str, shuffle: bool
) -> None:
    text, stored = (
        text_data(folder / name, num_streams=num_streams, shuffle=shuffle)
        for name in (files, f"{files}.tokens")
    )
    steps = 96 // (degree * batch)
    ranks = loaders(stored, degree=degree, batch=batch)
    alone = loaders(text)
    assert take(ranks, steps) == take(alone, steps * degree * batch)
    skipped = np.max([loader.num_skipped() for loader in ranks], axis=0)
    assert skipped.tolist() == alone[0].num_skipped()
    close([*ranks, *alone])


@given(**RESUMES, files=FILES)
@few
def test_resuming_at_any_point_and_any_degree_continues_the_same_samples(
    folder: Path, num_streams: int, degrees: list[int], steps: int, files: str
) -> None:
    section = text_data(folder / f"{files}.tokens", num_streams=num_streams)
    samples, _ = in_parts(section, [(degree, steps) for degree in degrees])
    assert samples == run(section, steps * sum(degrees))


def test_resume_is_exact_across_epochs(folder: Path) -> None:
    section = text_data(folder / "one.tokens", num_streams=2)
    expected = run(section, 220)
    for stop in range(0, 200, 27):
        _, state = in_parts(section, [(1, stop)])
        assert run(section, 20, state=state) == expected[stop : stop + 20]
    assert max(position["epoch"] for position in state["streams"].values()) >= 2


@pytest.mark.parametrize("packing", ["document", "fixed", "none"])
def test_every_packing_gives_the_rows_of_the_text(folder: Path, packing: str) -> None:
    actual = []
    for name in ("four", "four.tokens"):
        section = text_data(folder / name, num_streams=2, packing=packing, packing_block=4)
        actual.append(in_parts(section, [(1, 40)], rows_of)[0])
    assert actual[0] == actual[1]


@pytest.mark.parametrize("suffix", ["parquet", "txt", "jsonl.gz"])
def test_every_format_gives_the_samples_of_its_text(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "text").mkdir()
    for i in range(3):
        file = tmp_path / "text" / f"{i}.{suffix}"
        if suffix == "parquet":
            parquet.write_table(pyarrow.table({"text": TEXTS[i::3]}), file)
        elif suffix == "txt":
            file.write_text("\n".join(TEXTS[i::3]))
        else:
            file.write_bytes(gzip.compress(b"\n".join(lines(TEXTS[i::3]))))
    write(tmp_path / "text", tmp_path / "tokens")
    for num_streams in (1, 3) if suffix == "txt" else (2, 3, 5):
        text, stored = (
            run(text_data(tmp_path / name, num_streams=num_streams), 60)
            for name in ("text", "tokens")
        )
        assert text == stored


def test_masked_language_models_get_the_samples_of_the_text(tmp_path: Path) -> None:
    texts = [text * 9 for text in TEXTS]
    (tmp_path / "text.jsonl").write_bytes(b"\n".join(lines(texts)))
    write(tmp_path / "text.jsonl", tmp_path / "tokens")
    actual = []
    for name in ("text.jsonl", "tokens"):
        section = text_data(tmp_path / name, num_streams=2)
        pairs = MaskedPairs(MaskedLM(), 32, TOKENIZER)
        actual.append(in_parts(section, [(1, 60)], rows_of, seq_len=32, rows=pairs)[0])
    assert actual[0] == actual[1]
    assert None not in (actual[0][0]["token_types"], actual[0][0]["pair_labels"])


def rows_of_shards(shards: list[int]) -> Iterator[dict[str, str]]:
    for shard in shards:
        yield from ({"text": text} for text in TEXTS[shard::3])


def test_a_dataset_by_name_gives_the_samples_of_its_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = datasets.IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": [0, 1, 2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: hub)
    section = Data(dataset="someone/corpus", shuffle_buffer=12)
    tokenize(
        resolve_source(section),
        section,
        tmp_path / "tokens",
        processes=1,
        shard_size=300,
    )
    for num_streams in (2, 3, 5):
        stream = section.model_copy(update={"num_streams": num_streams})
        stored = text_data(tmp_path / "tokens", num_streams=num_streams)
        assert run(stream, 60) == run(stored, 60)
    manifest = read_token_manifest(tmp_path / "tokens")
    assert (manifest.source, rows_per_file(manifest)) == ("someone/corpus train", [10, 10, 10])


def test_tokens_and_text_are_mixed_as_text_is(folder: Path) -> None:
    actual = []
    for name in ("one", "one.tokens"):
        sources = [
            DataSource(name="a", weight=2, dataset_path=str(folder / name)),
            DataSource(name="b", weight=1, dataset_path=str(folder / "four")),
        ]
        section = Data(sources=sources, num_streams=2, on_bad_document="skip", shuffle_buffer=12)
        actual.append(run(section, 40))
    assert actual[0] == actual[1]


def test_validation_reads_them_and_not_what_is_trained_on(folder: Path, tmp_path: Path) -> None:
    validation = Validation(steps=4, dataset_path=str(folder / "one.tokens"))
    data = text_data(folder / "four")
    settings: dict[str, Any] = {"seq_len": 8, "local_batch_size": 2, "global_batch_size": 2}
    settings |= {"batch_rank": 0, "batch_degree": 1, "tokenizer": TOKENIZER}
    stored = read_held_out(validation, data, **settings)
    text = validation.model_copy(update={"dataset_path": str(folder / "one")})
    read = read_held_out(text, data, **settings)
    assert (stored.num_tokens, stored.num_bytes) == (read.num_tokens, read.num_bytes)
    for local, reference in zip(stored.batches, read.batches, strict=True):
        assert torch.equal(local.labels, reference.labels)
    trained = text_data(folder / "one")
    with pytest.raises(ValueError, match=r"\[data\] trains on .*one\.tokens: set"):
        resolve_held_out(validation, trained)


def test_a_run_on_text_is_not_resumed_on_tokens(folder: Path) -> None:
    (state,) = [loader.state_dict() for loader in loaders(text_data(folder / "one"))]
    with pytest.raises(ValueError, match=r"dataset was '1 json .*' and is 'tokens of 1 json"):
        loaders(text_data(folder / "one.tokens"), state=state)


def test_datasets_reads_the_folder(folder: Path) -> None:
    saved = datasets.load_from_disk(str(folder / "one.tokens"))
    good = [ids for ids in saved["input_ids"] if ids is not None]
    assert (len(good), len(saved)) == (len(TEXTS), len(TEXTS) + len(BAD))
    assert list(map(TOKENIZER.decode, good)) == TEXTS
    assert len(read_token_manifest(folder / "one.tokens").shards) > 2


def test_the_manifest_counts_what_there_is(folder: Path) -> None:
    manifest = read_token_manifest(folder / "four.tokens")
    assert (manifest.documents, manifest.skipped) == (len(TEXTS), len(BAD))
    assert manifest.tokens == sum(map(len, TOKENIZER.encode_documents(TEXTS)))
    assert (manifest.tokenizer, manifest.dtype) == (TOKENIZER.fingerprint, "uint16")


def test_two_processes_take_turns_at_a_file_and_write_what_one_does(
    folder: Path, tmp_path: Path
) -> None:
    write(folder / "one", tmp_path / "two", processes=2)
    assert contents(tmp_path / "two") == contents(folder / "one.tokens")


class Killed(BaseException):
    """Interrupts, as a signal would, at a chosen moment."""


@pytest.mark.parametrize("files", ["one", "four"])
def test_an_interrupted_call_resumes_after_its_complete_parts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    write_part, written = tokenizing._Worker._write_part, list[str]()

    def interrupted(worker: Any, path: Path, texts: Iterator[str]) -> None:
        if len(written) % 3 == 2:
            next(texts)
            written.append("")
            raise Killed
        written.append(path.name)
        write_part(worker, path, texts)

    monkeypatch.setattr(tokenizing._Worker, "_write_part", interrupted)
    target = tmp_path / "tokens"
    with pytest.raises(Killed):
        write(folder / files, target)
    with contextlib.suppress(Killed):
        write(folder / files, target)
    monkeypatch.setattr(
        tokenizing._Worker,
        "_write_part",
        lambda worker, path, texts: (written.append(path.name), write_part(worker, path, texts)),
    )
    if not target.exists():
        write(folder / files, target)
    assert contents(target) == contents(folder / f"{files}.tokens")
    assert not target.with_name("tokens.incomplete").exists()
    # Each part once.
    assert sorted(filter(None, written)) == list(read_token_manifest(target).shards)


def test_a_killed_command_leaves_no_process_and_resumes_to_the_same_bytes(
    folder: Path, tmp_path: Path
) -> None:
    program = (
        "import sys, time\n"
        "from titan_lite.data import tokenizing\n"
        "from titan_lite.cli import main\n"
        "write = tokenizing._Worker._write_part\n"
        "tokenizing._Worker._write_part = lambda *a: (write(*a), time.sleep(0.2))\n"
        "if __name__ == '__main__': main(sys.argv[1:])\n"
    )
    (tmp_path / "slow.py").write_text(program)
    command = ["tokenize", f"--data.dataset_path={folder / 'four'}", "--processes=2"]
    command += ["--data.on_bad_document=skip", "--shard-size=300", f"--output={tmp_path / 'x'}"]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), *command], stderr=subprocess.PIPE, cwd=ROOT
    )
    wait_for(lambda: list((tmp_path / "x.incomplete").glob("*.arrow")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(is_alive(int(child)) for child in children))
    assert main(command) == 0
    assert contents(tmp_path / "x") == contents(folder / "four.tokens")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_the_command_writes_says_so_and_verifies(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "tokens"
    command = ["tokenize", f"--data.dataset_path={folder / 'one'}", "--processes=1"]
    assert main([*command, "--data.on_bad_document=skip", f"--output={target}"]) == 0
    written = capsys.readouterr().out
    assert written.startswith(f"Written to {target}: 30 documents (7 bad ones skipped), ")
    assert main(["tokenize", f"--verify={target}"]) == 0
    assert capsys.readouterr().out.startswith(f"{target} is verified: 30 documents (7 bad ")
    shard = target / "00000-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[-70] ^= 1
    shard.write_bytes(content)
    assert main(["tokenize", f"--verify={target}"]) == 1
    assert f"{shard} is damaged: its checksum is " in capsys.readouterr().err
    shard.write_bytes(b"")
    assert main(["tokenize", f"--verify={target}"]) == 1
    assert "00000-00000.arrow is damaged: it has 0 bytes, expected " in capsys.readouterr().err
    assert main(["tokenize", f"--verify={tmp_path}"]) == 1
    assert "has no tokens.json: it is not complete" in capsys.readouterr().err


def test_progress_is_shown(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tokenizing, "LOG_SECONDS", 0.0)
    arguments = ["tokenize", f"--data.dataset_path={folder / 'four'}", "--processes=1"]
    main([*arguments, "--data.on_bad_document=skip", f"--output={tmp_path / 'a'}"])
    log = capsys.readouterr().err
    assert "100%" in log
    assert "4/4" in log
    assert f"30 documents, {read_token_manifest(tmp_path / 'a').tokens} tokens" in log


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["tokenize", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_tokenized_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str, source: str = "one") -> str:
        first = (f"--data.dataset_path={folder / source}", "--processes=1")
        return refusal(capsys, *first, f"--output={tmp_path / 'x'}", *arguments)

    assert "one/0.jsonl, line 2: not JSON: " in refused()
    message = refused(f"--output={folder / 'one.tokens'}")
    assert f"--output (command line): {folder}/one.tokens exists already: choose" in message
    assert "one.tokens is tokenized already" in refused(source="one.tokens")
    skip = "--data.on_bad_document=skip"
    message = refused(skip, "--data.tokenizer_path=Qwen/Qwen3-8B")
    assert (
        "Qwen/Qwen3-8B does not exist; names on the Hugging Face hub are not fetched: " in message
    )
    (tmp_path / "blank.jsonl").write_text("\n\n")
    empty = f"--data.dataset_path={tmp_path / 'blank.jsonl'}"
    assert "blank.jsonl has no documents" in refused(empty, f"--output={tmp_path / 'y'}")
    lock = FolderLock(tmp_path / "x.incomplete")
    assert f"{tmp_path}/x.incomplete is in use by another run (process {os.getpid()} " in refused(
        skip
    )
    lock.release()
    # A limit on the size of files stands for a full disk.
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (99, former[1]))
    try:
        message = refused(skip)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    message = message.replace(str(tmp_path), "")
    assert "/x.incomplete cannot be written: File too large; rerun the same command" in message
    sources = '--data.sources=[{name="a", weight=1.0}]'
    message = refusal(capsys, sources, f"--output={tmp_path / 'x'}")
    assert "data.sources" in message
    assert "not supported by tokenize: run it for each source" in message


def test_a_folder_that_was_started_with_other_settings_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "_finish", lambda *_: Path("/no/such/file").stat())
        with pytest.raises(OSError, match="no/such"):
            write(folder / "one", tmp_path / "x")
    with pytest.raises(
        ValueError,
        match=r"x\.incomplete was started with different settings: dataset was '1 json files .*' "
        r"and is '4 json files .*'; --shard-size was 300 and is 301; "
        r"remove .*x\.incomplete, or choose another --output$",
    ):
        write(folder / "four", tmp_path / "x", shard_size=301)
    with pytest.raises(
        ValueError, match=r"x\.incomplete is not complete: run the same titan-lite tok"
    ):
        resolve_source(text_data(tmp_path / "x.incomplete"))
    (tmp_path / "x.incomplete" / "progress.json").write_text("{")
    with pytest.raises(ValueError, match=r"progress\.json is damaged .* remove .*x\.incomplete"):
        write(folder / "one", tmp_path / "x")


def test_a_process_that_dies_is_said_so(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tokenizing, "_start_worker", os._exit)
    message = refusal(
        capsys,
        f"--data.dataset_path={folder / 'one'}",
        "--data.on_bad_document=skip",
        f"--output={tmp_path / 'x'}",
        "--processes=2",
    )
    assert "a tokenizing process was killed (possibly by the kernel's out-of-memory" in message


def test_an_interrupted_command_names_the_way_to_resume(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(readers, "document_of", interrupt)
    keys = [f"--data.dataset_path={folder / 'one'}", "--data.on_bad_document=skip"]
    assert main(["tokenize", *keys, "--processes=1", f"--output={tmp_path / 'x'}"]) == 130
    expected = f"Stopped; rerun the same command to resume from {tmp_path / 'x'}.incomplete"
    assert expected in capsys.readouterr().err


def test_empty_files_among_others_are_read_over(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number, texts in enumerate(([], TEXTS[:10], [], TEXTS[10:], [])):
        (tmp_path / "text" / f"{number}.jsonl").write_bytes(b"\n".join(lines(texts)))
    manifest = write(tmp_path / "text", tmp_path / "tokens")
    assert rows_per_file(manifest) == [0, 10, 0, 20, 0]
    for num_streams in (1, 2, 6):
        with_text, stored = (
            [*loaders(text_data(tmp_path / name, num_streams=num_streams))]
            for name in ("text", "tokens")
        )
        if num_streams == 2:  # One of the two has empty files only.
            messages = []
            for ranks in (with_text, stored):
                with pytest.raises(ValueError, match=r"stream 0 of 2 of .* has no doc") as error:
                    take(ranks, 10)
                messages.append(str(error.value).replace("tokens", "text"))
            assert messages[0] == messages[1]
        else:
            assert take(with_text, 60) == take(stored, 60)
        close([*with_text, *stored])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass either --output or --verify"),
        (["--processes=0"], "expected a positive integer, got '0'"),
        (["--shard-size=1.5"], "expected a positive integer, got '1.5'"),
    ],
)
def test_options_that_are_missing_or_wrong_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["tokenize", *arguments])
    assert message in capsys.readouterr().err


def test_tokens_of_another_tokenizer_are_refused_before_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (ROOT / "assets/tokenizer/tokenizer.model").read_bytes().splitlines()
    (tmp_path / "short.model").write_bytes(b"\n".join(lines[:-1]) + b"\n")
    shutil.copytree(folder / "one.tokens", tmp_path / "tokens")
    keys = [f"--data.dataset_path={tmp_path / 'tokens'}", "--model.flavor=debug"]
    keys += [f"--data.tokenizer_path={tmp_path / 'short.model'}", "--quiet", "--preflight"]
    assert main(["config", *keys]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path}/tokens was tokenized with the bundled tokenizer (BOS 1792, " in message
    assert "data.tokenizer_path is another tokenizer (BOS 1791, " in message
    assert 'set data.tokenizer_path = "", or run titan-lite tokenize again' in message


def test_a_folder_that_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(**keys: Any) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller reads the message)
            resolve_source(text_data(tmp_path / "tokens", **keys))
        return str(error.value)

    shutil.copytree(folder / "one.tokens", tmp_path / "tokens")
    for key in ("text_field", "tokens_field"):
        message = f'data.{key}: "x" does not apply to data.dataset_path = '
        assert message in refused(**{key: "x"})
    shard, manifest_file = tmp_path / "tokens/00000-00001.arrow", tmp_path / "tokens/tokens.json"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    message = f"{shard} is damaged: it has {len(content) - 2:,} bytes, expected {len(content):,}"
    assert refused() == f"data.dataset_path: {message}"
    shard.unlink()
    assert "00000-00001.arrow is missing, or cannot be read" in refused()
    manifest = json.loads(manifest_file.read_bytes())
    manifest_file.write_text(json.dumps({**manifest, "format": "x 1"}))
    assert (
        "tokens has format 'x 1'; 'titan_lite tokens 4' is required: run titan-lite tokenize again"
        in refused()
    )
    del manifest["files"]
    manifest_file.write_text(json.dumps(manifest))
    assert "tokens.json is damaged: KeyError('files')" in refused()
    manifest_file.write_text(json.dumps(manifest)[:-9])
    assert "tokens.json is damaged: JSONDecodeError" in refused()
    # As earlier versions wrote them.
    (tmp_path / "old").mkdir()
    for name in ("manifest.json", "00000.tokens", "00000.rows"):
        (tmp_path / "old" / name).write_text("{}")
    for path in (tmp_path / "old", tmp_path):
        with pytest.raises(
            ValueError, match=r"old has token files of an earlier version: run titan-lite tok"
        ):
            resolve_source(text_data(path))


def test_a_damaged_shard_is_named_when_it_is_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one.tokens", tmp_path / "tokens")
    shard = tmp_path / "tokens/00000-00001.arrow"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    ranks = loaders(text_data(tmp_path / "tokens", num_streams=1))
    with pytest.raises(ValueError, match=r"cannot read .*tokens/00000-00001\.arrow: "):
        take(ranks, 60)
    close(ranks)


def test_what_only_text_needs_is_warned_about(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [f"--data.dataset_path={folder / 'one.tokens'}", "--model.flavor=debug", "--preflight"]
    keys += ["--data.on_bad_document=skip", "--data.tokenizer_threads=2", "--data.num_streams=4"]
    assert main(["config", *keys]) == 0
    for key in ("on_bad_document", "tokenizer_threads"):
        message = f"data.{key} (command line) has no effect because the data is tokenized already"
        assert message in caplog.text


def test_too_few_documents_name_the_number_of_streams_that_would_do(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n".join(lines(TEXTS)))
    write(tmp_path / "a.jsonl", tmp_path / "tokens")
    ranks = loaders(text_data(tmp_path / "tokens", num_streams=64))
    with pytest.raises(ValueError, match=r"has 30 documents, too few for 64 streams"):
        take(ranks, 64)
    close(ranks)
