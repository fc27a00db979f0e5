"""A mismatch between what was asked and what was applied is an error that names it."""

import dataclasses

import pytest

from titan_lite.config.schema import ActivationCheckpoint, Compile
from titan_lite.parallel.report import Applied

APPLIED = Applied(
    blocks=4,
    fsdp_units=8,
    fsdp_candidates=8,
    sharded_parameters=39,
    unsharded_parameters=(),
    checkpointed_blocks=0,
    compiled_blocks=0,
)


def test_what_was_asked_for_passes() -> None:
    APPLIED.check(activation_checkpoint=ActivationCheckpoint(), compile=Compile())


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({}, {"compile": Compile(enable=True)}, "0 compiled blocks where 4 were asked for"),
        (
            {"checkpointed_blocks": 3},
            {"activation_checkpoint": ActivationCheckpoint(mode="full")},
            "3 checkpointed blocks where 4 were asked for",
        ),
        ({"compiled_blocks": 1}, {}, "1 compiled blocks where 0 were asked for"),
        ({"unsharded_parameters": ("norm.weight",)}, {}, "parameters outside FSDP: norm.weight"),
        ({"fsdp_units": 1}, {}, "1 FSDP units where 8 were asked for"),
    ],
)
def test_a_mismatch_is_named(changes: dict, asked: dict, message: str) -> None:
    sections = {"activation_checkpoint": ActivationCheckpoint(), "compile": Compile()} | asked
    with pytest.raises(RuntimeError, match=message):
        dataclasses.replace(APPLIED, **changes).check(**sections)
