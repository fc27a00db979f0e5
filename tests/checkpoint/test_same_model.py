"""A checkpoint of another model is refused by its settings, before any process starts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_manifest import make_checkpoint
from titan_lite import cli
from titan_lite.checkpoint.manifest import read_manifest, write_manifest

SAVED = {"name": "llama", "flavor": "debug", "dim": 64, "num_heads": 4, "num_kv_heads": 2}


def checkpoint_of(folder: Path, model: dict[str, Any], step: int = 4) -> Path:
    """A checkpoint whose manifest says that it was saved with this [model]."""
    checkpoint = make_checkpoint(folder, step)
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, dataclasses.replace(manifest, config={"model": model}))
    return checkpoint


def settings(model: dict[str, Any]) -> list[str]:
    return [f"--model.{key}={json.dumps(value)}" for key, value in model.items()]


@pytest.mark.parametrize("source", ["resume", "initial"])
@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"dim": 128}, "model.dim", "dim is 128, not 64"),
        ({"num_layers": 3}, "model.num_layers", "num_layers is 3, not 4"),
        ({"vocab_size": 4096}, "model.vocab_size", "vocab_size is 4096, not 2048"),
        # Sizes are the same, and what they mean is not.
        ({"num_heads": 2, "head_dim": 32}, "model.num_heads", "num_heads is 2, not 4"),
        ({"ffn": "gelu"}, "model.ffn", 'ffn is "gelu", not "swiglu"'),
        ({"tied_head": True}, "model.tied_head", "tied_head is true, not false"),
        ({"positions": "learned"}, "model.positions", 'positions is "learned", not "rotary"'),
        ({"name": "bert"}, "model.name", 'name is "bert", not "llama"'),
        ({"name": "gpt_neox"}, "model.flavor", "ffn_bias is true, not false"),
    ],
)
def test_another_model_is_refused_with_the_key(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    change: dict[str, Any],
    key: str,
    message: str,
) -> None:
    checkpoint = checkpoint_of(tmp_path / "run/checkpoint", SAVED)
    overrides = ["--checkpoint.enable=true", f"--job.dump_folder={tmp_path / 'run'}"]
    if source == "initial":
        overrides = [
            "--checkpoint.enable=true",
            f"--job.dump_folder={tmp_path / 'another'}",
            f"--checkpoint.initial_load_path={checkpoint}",
        ]
    overrides += settings(SAVED | change)
    assert cli.main(["config", "--quiet", "--preflight", *overrides]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{key} (command line): " in error
    assert message in error
    assert f" as in {checkpoint}: weights of another model do not fit" in error


@pytest.mark.parametrize(
    ("saved", "overrides"),
    [
        (SAVED, []),
        # The same numbers in other words, and what no weight depends on.
        (SAVED | {"head_dim": 16, "num_layers": 4}, []),
        (SAVED, ["--model.rope_theta=1e6", "--model.max_seq_len=99999", "--model.norm_eps=1e-6"]),
        (SAVED, ["--model.hidden_dropout=0.1", "--model.fp32_residual=true"]),
        # Nothing that could be compared here.
        ({"name": "someones", "module": "their.module"}, []),
        ({"name": "gone"}, []),
        ({"dim": "wide"}, []),
        # Left out by name, which the weights themselves have to show.
        (SAVED, ["--model.vocab_size=4096", '--checkpoint.exclude_from_loading=["tok*", "out*"]']),
    ],
)
def test_the_same_model_is_not_refused(
    tmp_path: Path, saved: dict[str, Any], overrides: list[str]
) -> None:
    checkpoint = checkpoint_of(tmp_path, saved)
    start = ["--checkpoint.enable=true", f"--checkpoint.initial_load_path={checkpoint}"]
    start += [f"--job.dump_folder={tmp_path / 'run'}", *settings(SAVED), *overrides]
    assert cli.main(["config", "--quiet", "--preflight", *start]) == 0


def test_a_setting_that_is_missing_this_time_is_the_fault_of_the_checkpoint_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint_of(tmp_path / "checkpoint", SAVED)
    overrides = ["--checkpoint.enable=true", f"--job.dump_folder={tmp_path}"]
    assert cli.main(["config", "--quiet", "--preflight", *overrides]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "checkpoint.load_step (default): dim is 256, not 64, " in error
