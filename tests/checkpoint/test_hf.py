"""Runs that start from, and end in, folders that Hugging Face transformers reads and writes."""

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from tests.distributed import Workers
from tests.runs import TINY, Run, build_trainer, train_and_gather
from titan_lite import cli
from titan_lite.checkpoint import hf
from titan_lite.checkpoint.hf_files import HFFolder
from titan_lite.checkpoint.hf_layout import HFModel, check_start
from titan_lite.checkpoint.manifest import read_manifest
from titan_lite.config.load import ConfigError
from titan_lite.data.export_check import ExportReport, export_report
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.models import registry
from titan_lite.models.args import DecoderArgs
from titan_lite.models.hf_config import hf_config_from_args
from titan_lite.models.llama import LLAMA
from titan_lite.models.patterns import translate
from titan_lite.models.plan import make_plan
from titan_lite.nn.decoder import Decoder
from titan_lite.runtime.distributed import Process
from titan_lite.runtime.writing import WriteError
from titan_lite.training import export

transformers = pytest.importorskip("transformers")

# An odd vocabulary, which is padded.
MODEL = ("--model.vocab_size=2049", "--model.tied_head=true", "--model.norm_eps=1e-3")
SAVING = ("--checkpoint.enable=true", "--checkpoint.last_save_hf=true", "--training.steps=1")


def _args(*overrides: str) -> DecoderArgs:
    return make_plan(None, [*TINY, *overrides], 1).args


def _run(folder: Path, *overrides: str) -> tuple[Run, list[str]]:
    """A run with small files for Hugging Face, and the names of those that this rank wrote."""
    written: list[str] = []
    save_file = hf.save_file

    reports: list[bool] = []

    def report(*args: Any, **options: Any) -> ExportReport:
        result = export_report(*args, **options)
        reports.append(result.is_same)
        return result

    def remember(tensors: Any, path: Path, **options: Any) -> None:
        written.append(path.name)
        save_file(tensors, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        small = functools.partial(hf.DCPToHF, max_shard_bytes=100_000)
        patch.setattr(export, "DCPToHF", small)
        patch.setattr(hf, "save_file", remember)
        patch.setattr(export, "export_report", report)
        half = "--training.local_batch_size=4"
        run = train_and_gather(folder, *SAVING, *MODEL, half, *overrides)
    # One rank compares the tokenizer that it wrote.
    assert reports == [True] * (Process.from_environment().rank == 0)
    return run, written


def _check_folder(folder: Path, weights: dict[str, Any]) -> None:
    """transformers opens the folder, and computes what our model does with these weights."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    args = _args(*MODEL)
    local = Decoder(args)
    for name, parameter in local.named_parameters():
        parameter.data = torch.from_numpy(weights[name][: len(parameter)])
        stored = reference.get_parameter(translate(name, LLAMA.hf_key_map))
        assert torch.equal(stored, local.without_padding(name, parameter)), name
    tokens = torch.randint(args.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = reference(tokens).logits, local(tokens)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def _assert_same(local: np.ndarray, reference: torch.Tensor) -> None:
    """Equal in their rows; ours past them are padding, which is zero."""
    np.testing.assert_array_equal(local[: len(reference)], reference)
    assert not local[len(reference) :].any()


@pytest.mark.distributed
def test_a_run_goes_to_hugging_face_and_another_layout_starts_from_there(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    """dp 2 x tp 2 to pp 2 x tp 2, tied head and padded vocabulary."""
    results = workers[4].run(_run, tmp_path / "a", "--parallel.tp=2")
    (_, weights), _ = results[0]
    folder = tmp_path / "a" / "checkpoint" / "hf"
    _check_folder(folder, weights["final weights"])
    # Each file was written once, by ranks in turn.
    written = [names for _, names in results]
    assert all(written)
    on_disk = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(name for names in written for name in names) == on_disk
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert set(index["weight_map"].values()) == set(on_disk)
    num_parameters = Decoder(_args(*MODEL)).num_parameters
    assert index["metadata"]["total_size"] == 4 * num_parameters
    assert transformers.AutoTokenizer.from_pretrained(folder).bos_token_id == 1792

    start = (f"--checkpoint.initial_load_hf={folder}", "--parallel.tp=2", "--parallel.pp=2")
    # Saved in the background, which is waited for.
    results = workers[4].run(_run, tmp_path / "b", *start, "--checkpoint.async_mode=async")
    (_, moved), _ = results[0]
    assert moved["initial weights"].keys() == weights["final weights"].keys()
    for name, expected in weights["final weights"].items():
        np.testing.assert_array_equal(moved["initial weights"][name], expected, err_msg=name)
    _check_folder(tmp_path / "b" / "checkpoint" / "hf", moved["final weights"])


def test_the_runs_own_checkpoint_comes_before_the_initial_weights(
    one_process: Workers, hf_folder: Path, tmp_path: Path
) -> None:
    """And a finished run, started again, even for fewer steps, writes hf/ again."""
    start = f"--checkpoint.initial_load_hf={hf_folder}"
    (_, first), _ = one_process.run(_run, tmp_path, start, "--training.steps=2")[0]
    reference = transformers.AutoModelForCausalLM.from_pretrained(hf_folder)
    embedding = reference.get_input_embeddings().weight.detach()
    _assert_same(first["initial weights"]["tok_embeddings.weight"], embedding)
    written = tmp_path / "checkpoint" / "hf" / "config.json"
    written.unlink()
    saved = read_manifest(tmp_path / "checkpoint" / "step-2")
    assert saved.tokenizer == load_tokenizer().fingerprint
    # The tensor that no longer exists is not requested.
    (hf_folder / "model.safetensors").unlink()
    (_, again), _ = one_process.run(_run, tmp_path, start)[0]
    np.testing.assert_equal(again["initial weights"], first["final weights"])
    assert written.exists()


def _without_room(folder: Path, *overrides: str) -> None:
    """A run that saves its last checkpoint but not the Hugging Face export logs that."""

    def save_file(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error: I/O error: No space left on device (os error 28)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "save_file", save_file)
        with pytest.raises(WriteError, match="/checkpoint/hf cannot be written: No space left"):
            train_and_gather(folder, *SAVING, *MODEL, *overrides)


def test_a_run_whose_export_failed_finishes_it_when_started_again(
    one_process: Workers, tmp_path: Path
) -> None:
    weights_last = ("--checkpoint.last_save_model_only=true", "--checkpoint.export_dtype=bfloat16")
    one_process.run(_without_room, tmp_path, *weights_last)
    assert not (tmp_path / "checkpoint" / "hf").exists()
    (records, weights), _ = one_process.run(_run, tmp_path, *weights_last)[0]
    assert [record["step"] for record in records] == [1]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint" / "hf")
    embedding = reference.get_input_embeddings().weight.detach().float()
    _assert_same(weights["final weights"]["tok_embeddings.weight"], embedding)


def test_a_run_begins_with_a_converted_checkpoint(
    one_process: Workers, hf_folder: Path, tmp_path: Path
) -> None:
    assert cli.main(["convert", "hf-to-dcp", str(hf_folder), f"{tmp_path}/dcp"]) == 0
    start = f"--checkpoint.initial_load_path={tmp_path}/dcp"
    (_, weights), _ = one_process.run(_run, tmp_path / "run", start)[0]
    reference = transformers.AutoModelForCausalLM.from_pretrained(hf_folder)
    for name, array in weights["initial weights"].items():
        expected = reference.get_parameter(translate(name, LLAMA.hf_key_map)).detach()
        _assert_same(array, expected)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A model that transformers has drawn and saved."""
    args = _args(*MODEL)
    assert LLAMA.hf_config is not None
    config = transformers.LlamaConfig(**hf_config_from_args(args, LLAMA.hf_config, dtype="float32"))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "huggingface")
    return tmp_path / "huggingface"


def test_a_model_of_other_numbers_is_refused_before_any_process_group(
    hf_folder: Path, tmp_path: Path
) -> None:
    start = f"--checkpoint.initial_load_hf={hf_folder}"
    message = r"initial_load_hf \(command line\): \[model\] does not match"
    with pytest.raises(ConfigError, match=message):
        build_trainer(tmp_path, *MODEL, start, "--model.num_heads=4", "--model.ffn_dim=96")
    with pytest.raises(
        ConfigError, match=r"num_heads must be 8, got 4; .*ffn_dim must be 128, got 96"
    ):
        build_trainer(tmp_path, *MODEL, start, "--model.num_heads=4", "--model.ffn_dim=96")
    config = hf_folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MistralForCausalLM"))
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM, got \[.Mistral"):
        build_trainer(tmp_path, *MODEL, start)


def test_numbers_that_a_run_may_change_on_purpose_are_warned_about(
    hf_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = _args(*MODEL, "--model.rope_theta=2e6")
    with caplog.at_level(logging.WARNING):
        check_start(HFFolder.open(hf_folder), HFModel.of(LLAMA, args), LLAMA, args)
    assert "was trained with rope_theta 10000.0, this run has 2000000.0" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("last_save_hf=true", r"last_save_hf .*true requires checkpoint.enable = true"),
        ("initial_load_hf=nowhere", r"initial_load_hf .*: no such folder: \"nowhere\""),
        (
            "initial_load_hf=.",
            r"initial_load_hf .*: initial_load_hf cannot be combined with checkpoint\.initial_load",
        ),
    ],
)
def test_settings_that_cannot_act_are_refused(setting: str, message: str) -> None:
    other = ["--checkpoint.initial_load_path=."] if setting == "initial_load_hf=." else []
    with pytest.raises(ConfigError, match=message):
        make_plan(None, [f"--checkpoint.{setting}", *other], 1)


def test_a_family_without_a_form_in_transformers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry._FAMILIES, "data", {"llama": replace(LLAMA, hf_config=None)})
    settings = ["--checkpoint.enable=true", "--checkpoint.last_save_hf=true"]
    message = "because it defines no hf_config: remove checkpoint.last_save_hf, or choose another"
    with pytest.raises(ConfigError, match=message):
        make_plan(None, settings, 1)


def test_a_form_that_transformers_class_has_not_is_refused() -> None:
    settings = ["--checkpoint.enable=true", "--checkpoint.last_save_hf=true"]
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not support norm layernorm"):
        make_plan(None, [*settings, "--model.norm=layernorm"], 1)
