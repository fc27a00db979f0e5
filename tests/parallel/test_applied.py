"""The report lists features of the modules; a difference from the configuration is an error."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Workers
from tests.runs import build_trainer
from titan_lite.config.activation_checkpoint import (
    ActivationCheckpoint,
    Full,
    MemoryBudget,
    SelectiveOp,
)
from titan_lite.config.schema import Parallel
from titan_lite.parallel import parallelize
from titan_lite.parallel.applied import Applied

BLOCKS = ("layers.0", "layers.1")
PRECISION = "bfloat16 computation, float32 reduction"
APPLIED = Applied(
    blocks=2,
    modules={"FSDP module": ("model", *BLOCKS), "checkpointed": BLOCKS},
    mesh={"pp": 1, "dp_replicate": 1, "fsdp": 2, "tp": 1},
    sharded_parameters=20,
    whole_parameters=0,
    precision=PRECISION,
    symm_mem=False,
    saved_ops=(),
    activation_memory_budget=1.0,
    attention="auto",
    dropout={},
)
FULL = Full()
SELECTIVE = SelectiveOp(save=["max"])


def test_what_was_asked_for_passes() -> None:
    problems = APPLIED.check(APPLIED.modules, FULL, Parallel(dp_shard=2), PRECISION, "auto")
    assert problems is None


@pytest.mark.parametrize(
    ("changes", "section", "message"),
    [
        (
            {"modules": {**APPLIED.modules, "checkpointed": ()}},
            FULL,
            "missing checkpointed: layers.0",
        ),
        (
            {"modules": {**APPLIED.modules, "compiled": BLOCKS}},
            FULL,
            "unexpected compiled: layers.0",
        ),
        (
            {"modules": {"checkpointed": BLOCKS}},
            FULL,
            "missing FSDP module: layers.0, layers.1, model",
        ),
        ({"precision": "float32 computation"}, FULL, "computation, but bfloat16 comp"),
        ({"symm_mem": True}, FULL, "symmetric memory is True, but False was configured"),
        ({"attention": "math"}, FULL, "attention is math, but auto was configured"),
        ({"mesh": APPLIED.mesh | {"fsdp": 4}}, FULL, "fsdp is 4, but 2 was configured"),
        ({"mesh": APPLIED.mesh | {"tp": 2}}, FULL, "tp is 2, but 1 was configured"),
        ({}, SELECTIVE, "activation_checkpoint.save is (), but ('max',) was configured"),
        ({"saved_ops": ("max",)}, FULL, "save is ('max',), but () was configured"),
        (
            {"activation_memory_budget": 0.5},
            FULL,
            "activation memory budget is 0.5, but 1.0 was configured",
        ),
        (
            {},
            MemoryBudget(memory_budget=0.25),
            "activation memory budget is 1.0, but 0.25 was configured",
        ),
    ],
)
def test_a_mismatch_names_the_modules(
    changes: dict[str, Any], section: ActivationCheckpoint, message: str
) -> None:
    applied = dataclasses.replace(APPLIED, **changes)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        applied.check(APPLIED.modules, section, Parallel(dp_shard=2), PRECISION, "auto")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "checkpointed      2 of 2 blocks\n"),
        ({"saved_ops": ("max",)}, "checkpointed      2 of 2 blocks; saved: max\n"),
        ({"symm_mem": True}, "float32 reduction; symmetric memory\n"),
        ({"attention": "flash3"}, "attention         flash3\n"),
        (
            {"merged_attention": ("cudnn",)},
            "attention         torch's choice; cudnn for the keys of each rank\n",
        ),
        ({"activation_memory_budget": 0.5}, "activation memory kept to 0.5 by the compiler\n"),
    ],
)
def test_the_table_has_a_line_for_each_technique(changes: dict[str, Any], words: str) -> None:
    assert words in str(dataclasses.replace(APPLIED, **changes))


def test_attentions_over_other_ranks_than_asked_for_are_named() -> None:
    configured = {**APPLIED.modules, "ring attention over 2 ranks": ["layers.0.attention"]}
    message = "missing ring attention over 2 ranks: layers.0.attention"
    with pytest.raises(RuntimeError, match=message):
        APPLIED.check(configured, FULL, Parallel(), PRECISION, "auto")
    applied = dataclasses.replace(APPLIED, modules=configured)
    applied.check(configured, FULL, Parallel(), PRECISION, "auto")
    assert "context parallel  1 ring attention over 2 ranks" in str(applied)


def _report(folder: Path) -> str:
    trainer = build_trainer(
        folder,
        "--parallel.tp=2",
        "--training.local_batch_size=4",
        "--float8.recipe=rowwise",
        "--float8.emulate=true",
        "--float8.filter=['layers.0.attention.*']",
        "--activation_checkpoint.mode=every_nth",
        "--model.hidden_dropout=0.1",
        "--model.attention_dropout=0.05",
    )
    trainer.close()
    return str(trainer.built.applied)


@pytest.mark.distributed
def test_everything_is_counted_on_the_modules_of_a_run(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    assert workers[4].run(_report, tmp_path)[3].splitlines() == [
        "  mesh              pp 1 x dp_replicate 1 x fsdp 2 x tp 2",
        "  FSDP2             6 modules; 21 parameter tensors sharded, 0 whole; float32 "
        "computation, float32 reduction",
        "  tensor parallel   1 vocab, 10 colwise, 4 rowwise, 5 sequence, 4 gather, 1 head",
        "  context parallel  0 modules",
        "  expert parallel   0 modules",
        "  float8            10 linears, 0 of them all-gathered in float8",
        "  attention         torch's choice",
        "  checkpointed      1 of 2 blocks",
        "  compiled          0 of 2 blocks",
        "  pipeline          1 stage",
        "  dropout           0.1 of hidden features in 5 places, 0.05 of attention's weights in 2 "
        "places",
    ]
    modules = json.loads((tmp_path / "run.json").read_text())["applied"]["modules"]
    assert modules["checkpointed"] == ["layers.0"]
    assert modules["rowwise"][:2] == ["layers.0.attention.wo", "layers.1.attention.wo"]
    assert "layers.0.attention.wq" not in modules["float8 linear"]


def _skip(folder: Path, function: str, *overrides: str) -> str:
    """The error of a run in which one step of `parallelize` is forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallelize, function, lambda *_args, **_kwargs: None)
        try:
            build_trainer(folder, *overrides)
        except RuntimeError as error:
            return str(error)
    return "no error"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        (
            "apply_fsdp",
            (),
            "missing FSDP module: layers.0, layers.1, model, norm, output, tok_em",
        ),
        (
            "apply_activation_checkpoint",
            ("--activation_checkpoint.mode=full",),
            "missing checkpointed",
        ),
        ("apply_compile", ("--compile.enable=true",), "missing compiled: layers.0, layers.1"),
        (
            "apply_tp",
            ("--parallel.tp=2",),
            "missing vocab: tok_embeddings; missing sequence: layers.0.att",
        ),
    ],
)
def test_what_was_forgotten_is_named(
    function: str,
    settings: tuple[str, ...],
    message: str,
    workers: dict[int, Workers],
    tmp_path: Path,
) -> None:
    actual = workers[2].run(_skip, tmp_path, function, "--training.local_batch_size=4", *settings)
    assert message in actual[1]
    assert actual[0] == actual[1]
