"""Loader: the same samples for every layout, exact resume, read-ahead that cannot be seen."""

import errno
import gzip
import json
import subprocess
import sys
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given

from tests.data.jobs import (
    FILES,
    LAYOUTS,
    NUM_STREAMS,
    RESUMES,
    SEQ_LEN,
    TOKENIZER,
    close,
    few,
    in_parts,
    loaders,
    merged,
    rows_of,
    run,
    take,
)
from titan_lite.config.load import load_config
from titan_lite.config.schema import Data, Validation
from titan_lite.data import readers
from titan_lite.data.held_out import resolve_held_out
from titan_lite.data.packing import join_documents
from titan_lite.data.sources import resolve_sources
from titan_lite.data.token_folder import read_token_manifest
from titan_lite.tools import tokenize_data

TEXTS = [f"{i} " + "whale " * (i % 7) for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 documents in one file, and the same in 4 files."""
    folder = tmp_path_factory.mktemp("documents")
    write(folder / "one" / "all.jsonl", TEXTS)
    for i in range(4):
        write(folder / "four" / f"{i}.jsonl", TEXTS[i::4])
    return folder


def write(path, texts, field="text"):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def data(folder, files="one", **settings):
    return Data(dataset_path=str(folder / files), **{"shuffle_buffer": 12, **settings})


@given(num_streams=NUM_STREAMS)
@few
def test_sample_g_is_sample_g_div_v_of_stream_g_mod_v(folder, num_streams):
    samples = run(data(folder, num_streams=num_streams, shuffle=False), 60)
    for v in range(num_streams):
        documents = TOKENIZER.encode_documents(TEXTS[v::num_streams])
        epoch = join_documents(documents, TOKENIZER.bos_id, TOKENIZER.eos_id)[:, 0]
        mine = samples[v::num_streams]
        tokens = np.tile(epoch, 2 + len(mine) * SEQ_LEN // len(epoch))
        for item, sample in enumerate(mine):
            assert sample == tokens[item * SEQ_LEN : (item + 1) * SEQ_LEN + 1].tolist()


@given(**LAYOUTS, files=FILES)
@few
def test_samples_and_merged_state_are_the_same_for_every_degree(
    folder, num_streams, degree, batch, files
):
    section = data(folder, files, num_streams=num_streams)
    ranks, alone = loaders(section, degree=degree, batch=batch), loaders(section)
    steps = 72 // (degree * batch)
    assert take(ranks, steps) == take(alone, steps * degree * batch)
    assert merged(ranks) == merged(alone)
    close([*ranks, *alone])


@given(**RESUMES, files=FILES)
@few
def test_resuming_at_any_point_and_any_degree_continues_the_same_samples(
    folder, num_streams, degrees, steps, files
):
    section = data(folder, files, num_streams=num_streams)
    samples, _ = in_parts(section, [(degree, steps) for degree in degrees])
    assert samples == run(section, steps * sum(degrees))


def test_resume_is_exact_across_epochs(folder):
    section = data(folder, num_streams=2, shuffle_buffer=8)
    expected = run(section, 220)
    for stop in range(0, 200, 13):
        _, state = in_parts(section, [(1, stop)])
        assert run(section, 20, state=state) == expected[stop : stop + 20]
    assert max(position["epoch"] for position in state["streams"].values()) >= 2


@pytest.mark.parametrize(
    ("packing", "fields"),
    [("document", 5), ("fixed", 5), ("none", 3)],
)
def test_every_packing_resumes_inside_documents_at_any_degree(folder, packing, fields):
    section = data(folder, num_streams=2, packing=packing, packing_block=4)
    expected, _ = in_parts(section, [(1, 60)], rows_of)
    actual, _ = in_parts(section, [(1, 7), (3, 5), (2, 19)], rows_of)
    assert actual == expected
    assert all(len([v for v in row.values() if v is not None]) == fields for row in expected)
    assert [row["samples"] for row in expected] == list(range(60))
    # Some of the samples start inside a document, and only those of "none" hold no second one.
    assert len({row["inputs"][0] for row in expected}) > 1
    several = [row for row in expected if TOKENIZER.bos_id in row["inputs"][1:]]
    assert (packing == "none") == (not several)


def test_read_ahead_does_not_show_in_the_state(folder):
    eager, lazy = (data(folder, num_streams=2, prefetch=ahead) for ahead in (16, 1))
    states = []
    for section in (eager, lazy):
        ranks = loaders(section)
        before = merged(ranks)
        take(ranks, 5)
        states.append((before, merged(ranks)))
        close(ranks)
    assert states[0] == states[1]
    assert states[0][1]["num_samples"] == 5


def test_closing_and_reading_on_loses_nothing(folder):
    section = data(folder, num_streams=2)
    ranks = loaders(section)
    samples = take(ranks, 3)
    close(ranks)
    samples += take(ranks, 3)
    close(ranks)
    assert samples == run(section, 6)


def test_the_state_stays_a_few_numbers(folder):
    ranks = loaders(data(folder, num_streams=2))
    take(ranks, 40)
    assert len(json.dumps(merged(ranks))) < 3000
    close(ranks)


def documents_of_epochs(section, num_epochs):
    """Order of the document numbers in each epoch of a run with one stream."""
    samples = run(section, 200)
    tokens = samples[0] + [token for sample in samples[1:] for token in sample[1:]]
    texts = TOKENIZER.decode(tokens).split("<|begin_of_text|>")[1:]
    numbers = [int(text.split()[0]) for text in texts if " " in text]
    return [numbers[i * 30 : (i + 1) * 30] for i in range(num_epochs)]


def test_each_epoch_holds_every_document_once_in_an_order_of_its_own(folder):
    section = data(folder, num_streams=1, shuffle_buffer=30)
    first, second = documents_of_epochs(section, 2)
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second != list(range(30))


def test_without_shuffle_documents_come_in_file_order(folder):
    section = data(folder, num_streams=1, shuffle=False)
    assert documents_of_epochs(section, 2) == [list(range(30))] * 2


def test_another_seed_is_another_order_and_the_same_seed_the_same(folder):
    section = data(folder, num_streams=2)
    assert run(section, 30, seed=1) == run(section, 30, seed=1)
    assert run(section, 30, seed=1) != run(section, 30, seed=2)


def test_a_shuffle_buffer_smaller_than_the_streams_still_reads_everything(folder):
    section = data(folder, num_streams=8, shuffle_buffer=1)
    assert run(section, 30) == run(section.model_copy(update={"shuffle": False}), 30)


def test_tokenizer_threads_do_not_change_the_samples(folder):
    one, four = (data(folder, num_streams=2, tokenizer_threads=n) for n in (1, 4))
    assert run(one, 30) == run(four, 30)


def error_of(section, num_batches=1):
    (loader,) = loaders(section)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller reads the message)
        take([loader], num_batches)
    with pytest.raises(ValueError) as again:  # noqa: PT011
        next(loader)
    assert again.value is error.value
    loader.close()
    return str(error.value)


def test_a_missing_text_field_names_the_fields_found(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS, field="txet")
    message = error_of(Data(dataset_path=str(path)))
    assert message.startswith(f'data.text_field: {path}, line 1: no field "text"')
    assert 'its fields: "txet"; set text_field = "txet"' in message


def test_a_document_whose_text_is_not_text_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [1, 2])
    message = error_of(Data(dataset_path=str(path), num_streams=1))
    assert f"{path}, line 1: field 'text' is 1, expected text" in message


def test_too_few_documents_name_the_number_of_streams_that_would_do(folder):
    message = error_of(data(folder, num_streams=64), num_batches=64)
    assert "has 30 documents, too few for 64 streams: set data.num_streams" in message
    assert message.endswith("to at most 30")


def test_one_document_for_eight_streams_is_refused_in_good_english(tmp_path):
    path = write(tmp_path / "a.jsonl", ["alone"])
    message = error_of(Data(dataset_path=str(path), num_streams=8), num_batches=8)
    assert "a.jsonl has 1 document, too few for 8 streams" in message


def test_a_stream_whose_files_are_empty_is_named(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.jsonl", TEXTS if i % 2 else [])
    message = error_of(Data(dataset_path=str(tmp_path), num_streams=2))
    assert f"stream 0 of 2 of {tmp_path} has no documents" in message


def test_an_empty_dataset_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [])
    message = error_of(Data(dataset_path=str(path)))
    assert message == f"data.dataset_path: {path} has no documents"


MALFORMED = {
    "first.jsonl": b"not JSON\n",
    "second.jsonl": b'{"text": "fine"}\n{"text": broken\n',
    "late.jsonl": b'{"text": "%s"}\n' % (b"fine " * 100) * 25_000 + b'{"text": broken\n',
    "latin1.jsonl": b'{"text": "\xe9"}\n',
    "no.jsonl.gz": b"not gzip",
    "cut.jsonl.gz": gzip.compress(b'{"text": "fine"}\n' * 100)[:30],
    "no.parquet": b"not Parquet",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_data_surfaces_with_its_source_and_does_not_hang(tmp_path, name):
    (tmp_path / name).write_bytes(MALFORMED[name])
    section = Data(dataset_path=str(tmp_path / name), num_streams=1, shuffle_buffer=50_000)
    message = error_of(section)
    line = {"second": 2, "late": 25_001}.get(name.partition(".")[0], 1)
    is_read = name.endswith(".jsonl")
    where = f"{tmp_path / name}, line {line}: not " if is_read else "cannot read "
    assert message.startswith(f"data.dataset_path: {where}")
    assert name in message
    assert "\n" not in message


@pytest.fixture
def parquet(tmp_path):
    """Four files with different documents."""
    for i, name in enumerate("abcd"):
        table = pyarrow.table({"text": TEXTS[i::4] * 50})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", use_dictionary=False)
    return tmp_path


@pytest.mark.parametrize("damage", ["cut", "in the middle"])
def test_a_damaged_parquet_file_is_named_among_good_ones(parquet, damage):
    """Damage in the middle is not seen when the file is opened, under "skip" too."""
    bad = parquet / "b.parquet"
    content = bytearray(bad.read_bytes())
    content[30:] = content[30:-20] if damage == "cut" else bytes(400) + content[430:]
    bad.write_bytes(content)
    mode = "raise" if damage == "cut" else "skip"
    section = Data(dataset_path=str(parquet), num_streams=1, on_bad_document=mode)
    assert error_of(section, 99).startswith(f"data.dataset_path: cannot read {bad}: ")


def test_files_that_are_no_parquet_are_left_out_by_name_in_every_layout_alike(
    parquet, caplog, tmp_path_factory
):
    """And in validation, and by titan-lite tokenize."""
    section = Data(
        dataset_path=str(parquet), num_streams=4, shuffle_buffer=12, on_bad_document="skip"
    )
    whole = {name: (parquet / f"{name}.parquet").read_bytes() for name in "bc"}
    (parquet / "b.parquet").write_bytes(whole["b"][:-20])
    # An end that is there and makes no sense.
    (parquet / "c.parquet").write_bytes(whole["c"][:-300] + bytes(250) + whole["c"][-50:])
    ranks, alone = loaders(section, degree=2), loaders(section)
    samples = take(ranks, 12)
    assert samples == take(alone, 24)
    assert merged(ranks) == merged(alone)
    held_out = Validation(enable=True, dataset_path=str(parquet))
    text = Data(on_bad_document="skip")
    overrides = [f"--data.dataset_path={parquet}", "--data.on_bad_document=skip"]
    target = tmp_path_factory.mktemp("tokens") / "tokens"
    loaded = load_config(None, overrides)
    assert tokenize_data.write(loaded, target, processes=1, shard_size=9999) == 0
    resolved = [resolve_held_out(held_out, text).identity, read_token_manifest(target).source]
    for name in "bc":
        logged = f'data.dataset_path = "{parquet}": skipped a file that cannot be read: '
        assert caplog.text.count(f"{logged}{parquet}/{name}.parquet: ") == 1
        (parquet / f"{name}.parquet").unlink()
    good = section.model_copy(update={"on_bad_document": "raise"})
    identity = resolve_sources(good)[0].identity
    assert resolved == [identity, identity]
    only_good = loaders(good)
    assert samples == take(only_good, 24)
    # With a repaired file, the run has more data than at its start.
    (parquet / "b.parquet").write_bytes(whole["b"])
    with pytest.raises(ValueError, match=r"dataset was '2 parquet files .* is '3 parquet files"):
        loaders(section, state=merged(ranks))
    close([*ranks, *alone, *only_good])


def test_nothing_but_files_that_are_no_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"<html>not found</html>")
    section = Data(dataset_path=str(tmp_path), on_bad_document="skip")
    logged = rf"^data.dataset_path: none of the Parquet files .* read: {tmp_path}/a.parquet: Parq"
    with pytest.raises(ValueError, match=logged):
        loaders(section)


def test_a_parquet_file_that_the_system_does_not_hand_out_is_not_left_out(parquet, monkeypatch):
    def read_metadata(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pyarrow.parquet, "read_metadata", read_metadata)
    section = Data(dataset_path=str(parquet), on_bad_document="skip")
    with pytest.raises(ValueError, match=rf"{parquet}/a.parquet: .*Permission denied"):
        loaders(section)


def test_the_state_of_a_run_with_other_settings_is_refused_naming_them(folder):
    (state,) = [loader.state_dict() for loader in loaders(data(folder, num_streams=2))]
    with pytest.raises(ValueError, match=r"data.num_streams was 2 and is 3"):
        loaders(data(folder, num_streams=3), state=state)
    with pytest.raises(
        ValueError,
        match=r"packing was 'concat' and is 'fixed'; data.packing_block was None and is 4",
    ):
        loaders(data(folder, num_streams=2, packing="fixed", packing_block=4), state=state)
    with pytest.raises(ValueError, match=r"training.seed was 0 and is 5"):
        loaders(data(folder, num_streams=2), state=state, seed=5)
    with pytest.raises(ValueError, match=r"dataset was '1 json files .*' and is '4 json files"):
        loaders(data(folder, "four", num_streams=2), state=state)


def test_close_ends_the_worker(folder):
    ranks = loaders(data(folder, num_streams=2), degree=2)
    take(ranks, 1)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("titan_lite data") == 2
    close(ranks)
    assert "titan_lite data" not in [thread.name for thread in threading.enumerate()]


def test_a_process_reads_without_datasets_and_has_no_worker_left_when_it_ends():
    code = (
        "import atexit, sys, threading\n"
        "atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))\n"
        "from tests.data.jobs import Data, loaders\n"
        "(loader,) = loaders(Data())\n"
        "next(loader)\n"
        "print('datasets' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.startswith(b"False\n")
    assert b"titan_lite data" not in ended.stdout


GOOD = [f"document {i} " * 20 for i in range(40)]
NUM = 900  # samples: more than an epoch
BAD = [
    b'{"text": broken',
    b'["a list"]',
    b'{"txt": "another field"}',
    b'{"text": null}',
    b'{"text": ""}',
    b'{"text": "\xe9"}',
    rb'{"text": "half \ud83d"}',
]


def write_with_bad_ones(path):
    """A bad document after every sixth good one, and blank lines, which are none."""
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    for i, bad in enumerate(BAD):
        lines[7 * i : 7 * i] = [bad, b""]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_bad_documents_are_left_out_and_counted_the_same_after_resuming(tmp_path, caplog):
    caplog.set_level("WARNING")
    folder = tmp_path / "bad"
    folder.mkdir()
    bad = Data(
        dataset_path=str(write_with_bad_ones(folder / "a.jsonl")),
        on_bad_document="skip",
        num_streams=1,
        shuffle_buffer=5,
    )
    (loader,) = loaders(bad)
    counts, states = [], []
    expected = []
    for _ in range(NUM):
        expected += take([loader], 1)
        counts.append(loader.num_skipped()[0])
        states.append(json.loads(json.dumps(loader.state_dict())))
    loader.close()
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] >= len(BAD)
    middle = counts.index(3)
    (resumed,) = loaders(bad)
    resumed.load_state_dict(states[middle])
    rest = take([resumed], NUM - 1 - middle)
    assert resumed.num_skipped()[0] == counts[-1]
    resumed.close()
    np.testing.assert_array_equal(rest, expected[middle + 1 :])
    assert "was skipped: not JSON" in caplog.text


def test_a_source_of_bad_documents_only_is_an_error_though_they_are_skipped(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"no\n" * 50)
    section = Data(dataset_path=str(path), num_streams=1, on_bad_document="skip")
    assert "none of the 50 documents of stream 0" in error_of(section)
    monkeypatch.setattr(readers, "MAX_BAD_IN_A_ROW", 20)
    assert error_of(section).endswith(
        '20 bad documents in a row end the run, even with data.on_bad_document = "skip"'
    )


def test_an_empty_text_file_and_one_of_other_bytes_are_bad_documents(tmp_path):
    for name, content, reason in (("a.txt", b"", "is empty"), ("b.txt", b"ab\xff", "byte 0xff")):
        (tmp_path / name).write_bytes(content)
        message = error_of(Data(dataset_path=str(tmp_path / name), num_streams=1))
        assert f"data.dataset_path: {tmp_path / name}: " in message
        assert reason in message


def test_a_document_longer_than_what_is_read_at_once_is_trained_on_whole(tmp_path):
    text = "a whale of a document " * 550_000  # 12 MB; datasets reads 10 MiB at a time
    path = write(tmp_path / "a.jsonl", [text, "short"])
    section = Data(dataset_path=str(path), num_streams=1, shuffle=False)
    (stream,) = loaders(section, seq_len=2_000_000)
    tokens = next(stream).inputs[0].tolist()
    stream.close()
    assert TOKENIZER.decode(tokens[1:]) == text[: len(TOKENIZER.decode(tokens[1:]))]
