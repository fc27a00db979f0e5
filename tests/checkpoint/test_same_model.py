"""A checkpoint of another model is refused by its settings, before any process starts."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.test_manifest import make_checkpoint
from titan_lite import cli
from titan_lite.checkpoint.manifest import read_manifest, write_manifest
from titan_lite.checkpoint.same_model import IMPLIED_BY_WEIGHTS, model_facts
from titan_lite.config.schema import Model
from titan_lite.models.args import DecoderArgs, EncoderArgs, RopeScaling
from titan_lite.models.bert import BERT
from titan_lite.models.family import Family
from titan_lite.models.llama import LLAMA
from titan_lite.models.registry import resolve
from titan_lite.nn.build_model import build_model

SAVED = {"name": "llama", "flavor": "debug", "dim": 64, "num_heads": 4, "num_kv_heads": 2}


def checkpoint_of(folder: Path, model: dict[str, Any], step: int = 4) -> Path:
    """A checkpoint whose manifest has this [model]."""
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
        ({"num_heads": 2}, "model.num_heads", "num_heads is 2, not 4; head_dim is 32, not 16"),
        ({"ffn": "gelu"}, "model.ffn", 'ffn is "gelu", not "swiglu"'),
        ({"tied_head": True}, "model.tied_head", "tied_head is true, not false"),
        ({"positions": "learned"}, "model.positions", 'positions is "learned", not "rotary"'),
        ({"parallel_residual": True}, "model.parallel_residual", "residual is true, not false"),
        ({"rotary_fraction": 0.5}, "model.rotary_fraction", "rotary_fraction is 0.5, not 1.0"),
        ({"name": "bert"}, "model.name", 'name is "bert", not "llama"'),
        # The same numbers.
        (
            {"name": "internlm", "qkv_bias": False, "out_bias": False},
            "model.name",
            'name is "internlm", not "llama"',
        ),
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
    assert f"differs from the checkpoint {checkpoint}: " in error
    fits = key not in ("model.dim", "model.num_layers", "model.vocab_size", "model.positions")
    fits = fits and change.get("name") not in ("bert", "gpt_neox")
    remedy = "to load the weights nevertheless, set checkpoint.allow_model_changes = ["
    assert (remedy in error) == (source == "initial" and fits)
    weights = " and set checkpoint.initial_load_path to this checkpoint" if fits else ""
    new_run = f"to start a new run, choose another job.dump_folder{weights}"
    assert (new_run in error) == (source == "resume")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, {}10000.0"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06, {}1e-05"),
    ],
)
def test_what_runs_tune_is_refused_where_a_run_resumes_and_else_logged(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    message: str,
) -> None:
    # Older versions had a key `module`.
    checkpoint = checkpoint_of(tmp_path / "run/checkpoint", SAVED | {"module": ""})
    overrides = ["--checkpoint.enable=true", *settings(SAVED | change)]
    resume = [*overrides, f"--job.dump_folder={tmp_path / 'run'}"]
    assert cli.main(["config", "--quiet", "--preflight", *resume]) == 2
    assert message.format("not ") in " ".join(capsys.readouterr().err.split())
    initial = [f"--checkpoint.initial_load_path={checkpoint}", f"--job.dump_folder={tmp_path}/new"]
    assert cli.main(["config", "--quiet", "--preflight", *overrides, *initial]) == 0
    logged = message.format(f"; the weights of {checkpoint} were trained with ")
    assert caplog.messages == [f"model.{logged}".replace(", ;", ";")]
    caplog.clear()
    allowed = f"--checkpoint.allow_model_changes={json.dumps(list(change))}"
    assert cli.main(["config", "--quiet", "--preflight", *overrides, *initial, allowed]) == 0
    assert not caplog.messages


def test_a_model_is_changed_on_purpose_by_naming_what_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(tmp_path / "run/checkpoint", SAVED)
    start = ["--checkpoint.enable=true", f"--checkpoint.initial_load_path={checkpoint}"]
    start += settings(SAVED | {"num_heads": 2, "head_dim": 32, "tied_head": True})
    new, own = f"--job.dump_folder={tmp_path / 'new'}", f"--job.dump_folder={tmp_path / 'run'}"
    run = ["config", "--quiet", "--preflight", *start]
    assert cli.main([*run, new]) == 2
    remedy = 'checkpoint.allow_model_changes = ["head_dim", "num_heads", "tied_head"]'
    assert remedy in capsys.readouterr().err
    assert cli.main([*run, new, f"--{remedy.replace(' = ', '=')}"]) == 0
    assert cli.main([*run, new, '--checkpoint.allow_model_changes=["tied_head"]']) == 2
    error = capsys.readouterr().err
    assert "num_heads is 2, not 4" in error
    assert "tied_head" not in error
    # A run that resumes has no such key.
    assert cli.main([*run, own, f"--{remedy.replace(' = ', '=')}"]) == 2
    assert "tied_head is true, not false" in capsys.readouterr().err
    # Exclusions allow no more than what names and shapes show.
    excluded = '--checkpoint.exclude_from_loading=["output.*"]'
    assert cli.main([*run, new, excluded]) == 2
    assert "num_heads is 2, not 4" in capsys.readouterr().err
    assert cli.main([*run, new, '--checkpoint.allow_model_changes=["tied_haed"]']) == 2
    logged = '"tied_haed" is not a setting of the model; did you mean "tied_head"?'
    assert logged in capsys.readouterr().err


def test_the_manifest_holds_the_model_whatever_becomes_of_its_flavor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = RopeScaling(
        factor=8, low_freq_factor=1, high_freq_factor=4, original_max_seq_len=2048
    )
    args = replace(resolve(Model(**SAVED))[1], rope_scaling=scaling, num_kv_heads=4, head_dim=32)
    checkpoint = checkpoint_of(tmp_path / "checkpoint", SAVED)
    facts = model_facts("llama", args)
    write_manifest(checkpoint, replace(read_manifest(checkpoint), model=facts))
    overrides = ["--checkpoint.enable=true", f"--job.dump_folder={tmp_path}", *settings(SAVED)]
    assert cli.main(["config", "--quiet", "--preflight", *overrides]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "num_kv_heads is 2, not 4" in error
    assert "rope_scaling is not set, not {factor = 8, low_freq_factor = 1, " in error
    # A manifest of an older version, which did not have this field.
    del facts["rope_scaling"], facts["num_kv_heads"], facts["head_dim"]
    facts |= {"num_kv_heads": 2, "head_dim": 16}
    write_manifest(checkpoint, replace(read_manifest(checkpoint), model=facts))
    assert cli.main(["config", "--quiet", "--preflight", *overrides]) == 0


def _shapes(args: DecoderArgs) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = build_model(BERT if isinstance(args, EncoderArgs) else LLAMA, args)
    return {name: parameter.shape for name, parameter in model.state_dict().items()}


@pytest.mark.parametrize("family", [LLAMA, BERT])
def test_the_settings_that_weights_show_are_those_that_change_their_names_or_shapes(
    family: Family,
) -> None:
    args = replace(family.flavors["debug"], positions="learned", tied_head=False)
    shapes = _shapes(args)
    choices = {"norm": ("rmsnorm", "layernorm"), "positions": ("learned", "rotary")}
    for name in IMPLIED_BY_WEIGHTS & {field.name for field in dataclasses.fields(args)}:
        value = getattr(args, name)
        if name in choices:
            other = next(choice for choice in choices[name] if choice != value)
        else:
            other = not value if isinstance(value, bool) else 2 * value
        assert _shapes(replace(args, **{name: other})) != shapes, name


@pytest.mark.parametrize(
    ("saved", "overrides"),
    [
        (SAVED, []),
        # The same numbers in other words, and what no weight depends on.
        (SAVED | {"head_dim": 16, "num_layers": 4}, []),
        (SAVED, ["--model.max_seq_len=99999"]),
        (SAVED, ["--model.hidden_dropout=0.1", "--model.fp32_residual=true"]),
        # Nothing that could be compared here.
        ({"name": "gone"}, []),
        ({"dim": "wide"}, []),
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
    assert "dim is 256, not 64; " in error
