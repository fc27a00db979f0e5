"""Mistakes that a run would fail at are refused in one process, before any other starts."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.checkpoint.test_same_model import checkpoint_of
from titan_lite import cli
from titan_lite.checkpoint.manifest import read_manifest, write_manifest
from titan_lite.checkpoint.state import RUN_STATE_FILE
from titan_lite.data.sources import Source
from titan_lite.parallel import compile as compiling
from titan_lite.parallel import pipeline
from titan_lite.runtime.folder_lock import FolderLock
from titan_lite.runtime.stored_files import write_text

Preflight = Callable[..., str]
BERT = ("--model.name=bert", "--training.seq_len=128")


def write_lines(path: Path, documents: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    return path


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Preflight:
    """Calls the preflight of run_train.sh, which must refuse; returns its message, on one line."""

    def call(*overrides: str, world_size: int = 2) -> str:
        keys = [f"--job.dump_folder={tmp_path / 'run'}", *overrides]
        size = f"--world-size={world_size}"
        assert cli.main(["config", "--quiet", "--preflight", size, "--", *keys]) == 2
        return " ".join(capsys.readouterr().err.split())

    return call


@pytest.fixture
def accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def call(*overrides: str) -> None:
        keys = [f"--job.dump_folder={tmp_path / 'run'}", *overrides]
        code = cli.main(["config", "--quiet", "--preflight", "--world-size=2", "--", *keys])
        assert (code, capsys.readouterr().err) == (0, "")

    return call


WORDS = {"text": "word " * 300}


@pytest.mark.parametrize(
    ("documents", "settings", "message"),
    [
        (
            [{"body": "a"}] * 99,
            (),
            'line 1: no field "text"; its fields: "body"; set text_field = "body"',
        ),
        ([{"text": 3}] * 99, (), "line 1: field 'text' is 3, expected text"),
        ([{"text": ""}] * 99, (), "line 1: field 'text' is empty"),
        (
            [{"text": "a\ud83d"}] * 99,
            (),
            r"line 1: field 'text' has half of a surrogate pair, \ud83d at position 1, which",
        ),
        (["words"] * 99, (), "line 1: expected a JSON object"),
        ([], (), "has no documents"),
        (
            [{"body": "a"}] * 99,
            ("--data.on_bad_document=skip",),
            "none of the 99 documents of",
        ),
        ([WORDS] * 63, (), "has 63 documents, too few for 64 streams"),
    ],
)
def test_documents_that_a_run_cannot_begin_with_are_refused(
    tmp_path: Path,
    refused: Preflight,
    documents: list[object],
    settings: tuple[str, ...],
    message: str,
) -> None:
    path = write_lines(tmp_path / "a.jsonl", documents)
    actual = refused(f"--data.dataset_path={path}", *settings)
    assert actual.startswith("titan-lite: 1 problem in the configuration data.")
    assert message in actual


def test_documents_of_columns_are_looked_at_as_well(tmp_path: Path, refused: Preflight) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [1] * 99}), tmp_path / "a.parquet")
    assert "field 'text' is 1" in refused(f"--data.dataset_path={tmp_path}")
    actual = refused(f"--data.dataset_path={tmp_path}", "--data.text_field=body")
    assert 'no field "body"; its fields: "text"; data' in actual


def test_each_source_is_looked_at(tmp_path: Path, refused: Preflight) -> None:
    good = write_lines(tmp_path / "good.jsonl", [WORDS] * 64)
    bad = write_lines(tmp_path / "bad.jsonl", [{"body": "a"}] * 64)
    tables = ", ".join(
        f'{{name = "{path.stem}", weight = 1, dataset_path = "{path}"}}' for path in (good, bad)
    )
    actual = refused(f"--data.sources=[{tables}]")
    assert f'{bad}, line 1: no field "text"' in actual
    assert "data.sources.bad.text_field (command line)" in actual


def test_files_of_a_model_among_documents_are_left_out_and_others_looked_at(
    tmp_path: Path,
    refused: Preflight,
    accepted: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_lines(tmp_path / "a.jsonl", [WORDS] * 64)
    for name in ("vocab.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text('{"!": 0}')
    setting = f"--data.dataset_path={tmp_path}"
    accepted(setting)
    left_out = "leaves out config.json, tokenizer_config.json, vocab.json, by name not documents"
    assert left_out in caplog.text
    (tmp_path / "statistics.json").write_text('{"documents": 64}')
    actual = refused(setting)
    assert 'statistics.json, document 1: no field "text"; its fields: "documents"; data' in actual


def test_sources_that_read_the_same_documents_are_named(
    tmp_path: Path, accepted: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    write_lines(tmp_path / "a.jsonl", [WORDS] * 64)
    write_lines(tmp_path / "b.jsonl", [WORDS] * 99)

    def warnings_of(*paths: str) -> list[str]:
        caplog.clear()
        tables = [
            f'{{name = "{number}", weight = 1, dataset_path = "{tmp_path}/{path}"}}'
            for number, path in enumerate(paths)
        ]
        accepted(f"--data.sources=[{', '.join(tables)}]")
        return [message for message in caplog.messages if "both read" in message]

    assert warnings_of("a.jsonl", "b.jsonl") == []
    assert warnings_of("a.jsonl", "*.jsonl") == [
        "data.sources.1.dataset_path and data.sources.0.dataset_path both read "
        f"{tmp_path}/*.jsonl: the sum of their weights applies to its documents"
    ]


def test_a_run_that_reads_few_streams_needs_few_documents(
    tmp_path: Path, accepted: Callable[..., None]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [WORDS] * 4)
    # 2 steps of a sample for each of 2 ranks: streams 0 to 3.
    accepted(f"--data.dataset_path={path}", "--training.steps=2", "--training.seq_len=64")
    accepted(f"--data.dataset_path={path}", "--data.num_streams=4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("--validation.steps=10000",),
            "10000 batches (of 2 samples of 2048",
        ),
        (("--training.seq_len=8192",), "10 batches (of 2 samples of 8192 tokens"),
        (
            ("--training.global_batch_size=64",),
            "10 batches (of 64 samples of 2048 tokens) are too many: ",
        ),
        (
            (*BERT, "--validation.steps=10000"),
            "10000 batches (of 2 samples of 128",
        ),
        (("--validation.dataset_path={few}",), " fills 0; set a smaller validation.steps"),
        (("--validation.dataset_path={bad}",), "validation.text_field (default): "),
    ],
)
def test_held_out_documents_that_are_too_few_are_refused(
    tmp_path: Path, refused: Preflight, settings: tuple[str, ...], message: str
) -> None:
    few = write_lines(tmp_path / "few.jsonl", [{"text": "word"}])
    bad = write_lines(tmp_path / "bad.jsonl", [{"body": "word"}])
    keys = [setting.format(few=few, bad=bad) for setting in settings]
    actual = refused("--validation.enable=true", "--model.max_seq_len=8192", *keys)
    assert actual.startswith("titan-lite: 1 problem in the configuration validation.")
    assert message in actual


def test_a_path_that_spells_a_key_is_not_blamed(tmp_path: Path, refused: Preflight) -> None:
    """Nothing searches a message for keys, of which a path may have any."""
    folder = tmp_path / "optimizer.lr=1e-3"
    actual = refused(
        f"--job.dump_folder={folder}",
        "--optimizer.lr=1e-3",
        "--checkpoint.enable=true",
        "--checkpoint.load_step=99",
    )
    assert actual == (
        "titan-lite: 1 problem in the configuration checkpoint.load_step (command line): "
        f"no checkpoint of step 99 in {folder}/checkpoint; steps found: none"
    )


def test_files_locks_and_devices_are_reported_together(tmp_path: Path, refused: Preflight) -> None:
    lock = FolderLock(tmp_path / "run")
    actual = refused(
        "--checkpoint.enable=true", "--checkpoint.load_step=99", "--attention.kernel=flash2"
    )
    lock.release()
    assert "3 problems" in actual
    for key in ("checkpoint.load_step", "job.dump_folder", "attention.kernel"):
        assert f"{key} (command line):" in " ".join(actual.split())


def test_data_settings_of_another_run_are_refused(tmp_path: Path, refused: Preflight) -> None:
    checkpoint = checkpoint_of(tmp_path / "run/checkpoint", {"flavor": "debug"})
    state = json.loads((checkpoint / RUN_STATE_FILE).read_text())
    state["data"] = {"settings": {"data.num_streams": 8, "training.seed": 0}}
    manifest = read_manifest(checkpoint)
    text = json.dumps(state)
    manifest.files[RUN_STATE_FILE] = write_text(checkpoint / RUN_STATE_FILE, text)
    write_manifest(checkpoint, manifest)
    actual = refused("--checkpoint.enable=true")
    assert "data.num_streams was 8 and is 64" in actual
    assert "set checkpoint.initial_load_path to the checkpoint's folder and" in actual
    assert "checkpoint.load_step (default): " in actual
    assert "training.seed" not in actual


def test_what_the_devices_cannot_do_is_refused_in_one_block(
    refused: Preflight, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_compiler() -> str:
        raise OSError

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    actual = refused(
        "--compile.enable=true",
        "--float8.recipe=rowwise",
        "--profiling.enable_memory_snapshot=true",
        "--parallel.pp=2",
        "--model.num_layers=1",
        "--training.global_batch_size=2",
        f"--data.dataset_path={write_lines(tmp_path / 'a.jsonl', [{'body': 'a'}])}",
    )
    assert actual.startswith("titan-lite: 5 problems in the configuration ")
    for words in (
        'no field "text"; its fields: "body"',
        "a pipeline of 2 stages requires at least 2 blocks, got 1; set parallel.pp to at most 1",
        "compile.enable (command line): requires a C++ compiler, but ",
        'float8.recipe (command line): "rowwise" requires CUDA compute capability',
        "profiling.enable_memory_snapshot (command line): memory snapshots require a CUDA device",
    ):
        assert words in actual, words


def test_a_kernel_of_gpus_is_refused_on_a_cpu(refused: Preflight) -> None:
    message = 'attention.kernel (command line): "flash3" requires a CUDA device, got cpu'
    assert message in refused("--attention.kernel=flash3")


def test_symmetric_memory_needs_gpus_and_a_torch_that_has_it(
    refused: Preflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FSDPModule, "set_symm_mem_for_comm", lambda _: None, raising=False)
    message = "parallel.fsdp_symm_mem (command line): requires CUDA devices, got cpu; set parallel."
    assert message in refused("--parallel.fsdp_symm_mem=true")
    monkeypatch.delattr(FSDPModule, "set_symm_mem_for_comm")
    assert "requires torch 2.13 or later, got " in refused("--parallel.fsdp_symm_mem=true")


def test_a_schedule_that_splits_backward_needs_a_torch_that_can(
    refused: Preflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CAN_SPLIT_BACKWARD", False)
    message = (
        'parallel.pp_schedule (command line): "ZBVZeroBubble" splits backward, which requires '
        "torch 2.13 or later, got "
    )
    assert message in refused(
        "--parallel.pp=2", "--parallel.pp_schedule=ZBVZeroBubble", "--model.num_layers=4"
    )


def test_async_tensor_parallel_needs_gpus(refused: Preflight) -> None:
    keys = ("--parallel.tp=2", "--parallel.async_tp=true", "--compile.enable=true")
    assert "parallel.async_tp (command line): requires NVIDIA GPUs with" in refused(*keys)


def test_an_old_gpu_is_refused_bfloat16_and_float8(
    refused: Preflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    actual = refused("--float8.recipe=rowwise")
    assert "training.param_dtype (default): Tesla V100 does not support bfloat16" in actual
    assert "float8.recipe (command line): " in actual
    assert "but Tesla V100 has 7.0" in actual


@pytest.mark.parametrize(
    ("device", "missing", "message"),
    [
        ("cpu", "compiler", "requires a C++ compiler, but nowhere/g++ does not run: install g++"),
        ("cpu", "headers", "requires Python's headers, but nowhere/Python.h does not exist"),
        ("cuda", "compiler", "requires a C compiler, but neither gcc nor clang is on PATH"),
    ],
)
def test_compilation_needs_a_compiler(
    monkeypatch: pytest.MonkeyPatch, device: str, missing: str, message: str
) -> None:
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    cxx: tuple[str | None, ...] = (None, "nowhere/g++")
    if missing == "headers":
        cxx = (sys.executable,)  # Accepts --version.
        monkeypatch.setattr("sysconfig.get_path", lambda _: "nowhere")
    else:
        monkeypatch.setattr("shutil.which", lambda _: None)
    with config.patch({"cpp.cxx": cxx}), pytest.raises(ValueError, match=re.escape(message)):
        compiling.check_compiler(torch.device(device))
    cpp_builder.cpp_compiler_search.cache_clear()


def test_names_of_weights_that_no_parameter_has_are_refused(refused: Preflight) -> None:
    actual = refused('--checkpoint.exclude_from_loading=["outptu.*"]')
    assert '"outptu.*" matches no parameter' in actual


def test_both_folders_of_a_run_are_tried(
    tmp_path: Path, refused: Preflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan_lite.runtime.folder_lock.LOCK_SECONDS", 0.0)
    for key, name in (("job.dump_folder", "run"), ("checkpoint.folder", "saved")):
        lock = FolderLock(tmp_path / name)
        settings = ("--checkpoint.enable=true", f"--checkpoint.folder={tmp_path / 'saved'}")
        assert f"{key} (command line): {tmp_path / name} is in use by another run" in refused(
            *settings
        )
        lock.release()


def test_a_run_on_local_files_is_checked_without_torch_and_datasets(tmp_path: Path) -> None:
    keys = [f"--job.dump_folder={tmp_path / 'run'}", "--validation.enable=true"]
    program = (
        "import sys, shutil; shutil.which = lambda name: None\n"
        "from titan_lite.cli import main\n"
        f"assert main(['config', '--quiet', '--preflight', *{keys}]) == 0\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_dataset_by_name_is_left_to_the_run(
    monkeypatch: pytest.MonkeyPatch, accepted: Callable[..., None]
) -> None:
    def unreachable(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Source, "open", unreachable)
    accepted("--data.dataset=c4", "--validation.enable=true", "--validation.split=validation")
