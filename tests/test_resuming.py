"""Messages where a run continues from a checkpoint with another configuration."""

import dataclasses
import logging
from typing import Any

import pytest

from titan_lite.checkpoint.manifest import CheckpointManifest
from titan_lite.checkpoint.same_model import model_facts
from titan_lite.config.load import load_config
from titan_lite.models.plan import make_plan
from titan_lite.training.resuming import log_changes

VERSIONS = {"titan_lite": "1", "torch": "2.13.0", "python": "3.12"}
STEPS = ("--training.steps=1000", "--optimizer.lr=0.001", "--lr_scheduler.warmup_steps=100")


def printed(
    caplog: pytest.LogCaptureFixture,
    *changes: str,
    saved: tuple[str, ...] = STEPS,
    step: int = 500,
    world_sizes: tuple[int, int] = (1, 1),
    **manifest: Any,
) -> list[str]:
    """Returns the log of a run saved at `step` with settings `saved`, resumed with `changes`."""
    before, after = (
        make_plan(None, overrides, size)
        for overrides, size in zip((saved, (*saved, *changes)), world_sizes, strict=True)
    )
    facts = {
        "config": before.config.model_dump(),
        "layout": dataclasses.asdict(before.dims),
        "model": model_facts(before.family.name, before.args),
        "versions": VERSIONS,
        **manifest,
    }
    stored = CheckpointManifest(
        step=step, content="run", world_size=world_sizes[0], files={}, **facts
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        log_changes(stored, after, VERSIONS)
    return [" ".join(message.split()) for message in caplog.messages]


def test_settings_that_differ_are_listed_with_both_values(caplog: Any) -> None:
    changes = ("--optimizer.weight_decay=50", "--optimizer.no_decay=[]", "--training.max_norm=0.5")
    assert printed(caplog, *changes) == [
        "Changed since the checkpoint was saved: training.max_norm 1.0 -> 0.5 "
        'optimizer.weight_decay 0.1 -> 50.0 optimizer.no_decay ["norm", "bias"] -> []'
    ]


def test_the_same_settings_and_what_changes_no_number_are_not_listed(caplog: Any) -> None:
    assert printed(caplog) == []
    others = ("--job.dump_folder=moved", "--metrics.log_freq=1", "--checkpoint.interval=3")
    others += ("--data.prefetch=9", "--training.gc_freq=9", "--comm.train_timeout_seconds=9")
    assert printed(caplog, *others) == []


def test_the_mesh_the_batch_that_follows_from_it_and_versions_are_listed(caplog: Any) -> None:
    older = VERSIONS | {"torch": "2.11.0"}
    assert printed(caplog, "--parallel.tp=2", world_sizes=(2, 8), versions=older) == [
        "Changed since the checkpoint was saved: training.global_batch_size 2 -> 4 "
        'parallel.dp_shard 2 -> 4 parallel.tp 1 -> 2 torch "2.11.0" -> "2.13.0"'
    ]


def test_of_the_model_what_was_resolved_is_listed(caplog: Any) -> None:
    # The flavor's own value in other words.
    assert printed(caplog, "--model.dim=256") == []
    assert printed(caplog, "--model.hidden_dropout=0.5", "--model.max_seq_len=4096") == [
        "Changed since the checkpoint was saved: "
        "model.max_seq_len 2048 -> 4096 model.hidden_dropout 0.0 -> 0.5"
    ]


def test_keys_that_an_older_version_did_not_have_had_their_defaults(caplog: Any) -> None:
    config = load_config(None, STEPS).config.model_dump()
    del config["float8"], config["optimizer"]["no_decay"]
    assert printed(caplog, "--optimizer.no_decay=[]", config=config) == [
        'Changed since the checkpoint was saved: optimizer.no_decay ["norm", "bias"] -> []'
    ]


@pytest.mark.parametrize(
    ("changes", "step", "jump"),
    [
        # A finished run, made twice as long.
        (
            ("--training.steps=2000",),
            1000,
            "from 0.0001 in step 1000 to 0.000586",
        ),
        (("--training.steps=2000",), 500, "from 0.000628142 in step 500 to 0.000904656"),
        (("--optimizer.lr=0.002",), 500, "from 0.000628142 in step 500 to 0.00125"),
        (("--lr_scheduler.warmup_steps=10",), 50, "from 0.0005 in step 50 to 0.000996"),
        (("--lr_scheduler.decay_type=constant",), 500, "to 0.001 in step 501"),
        (("--lr_scheduler.min_lr_factor=0.5",), 999, "from 0.000100003 in step 999 to 0.0005"),
    ],
)
def test_a_jump_of_the_learning_rate_is_told_with_both_values(
    caplog: Any, changes: tuple[str, ...], step: int, jump: str
) -> None:
    logged = printed(caplog, *changes, step=step)
    (key, value) = changes[0].removeprefix("--").split("=")
    assert logged[1].startswith("The learning rate jumps from ")
    assert jump in logged[1]
    assert f" in step {step + 1}: {key} " in logged[1]
    assert logged[1].endswith(f"-> {value}") or logged[1].endswith(f'-> "{value}"')
    assert caplog.records[1].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("saved", "longer", "rates"),
    [(2, 4, "0.0001 in step 2 to 0.000231802"), (4, 6, "0.0001 in step 4 to 0.000160289")],
)
def test_a_rate_that_turns_is_a_jump_also_where_the_schedule_is_steeper(
    caplog: Any, saved: int, longer: int, rates: str
) -> None:
    of_run = (f"--training.steps={saved}", "--optimizer.lr=0.001", "--lr_scheduler.warmup_steps=0")
    _, logged = printed(caplog, f"--training.steps={longer}", saved=of_run, step=saved)
    assert logged == (
        f"The learning rate jumps from {rates} in step {saved + 1}: "
        f"training.steps {saved} -> {longer}"
    )


@pytest.mark.parametrize(
    ("saved", "changes", "step"),
    [
        # Nothing changes, where schedules are steep, flat, or at an end.
        *((STEPS, (), step) for step in (1, 100, 500, 999)),
        ((*STEPS, "--lr_scheduler.warmup_steps=0"), (), 1),
        # No step is left.
        (STEPS, (), 1000),
        (STEPS, ("--training.steps=300",), 500),
        # So early that the rate goes back by less than is seen.
        ((*STEPS, "--lr_scheduler.warmup_steps=0"), ("--training.steps=1200",), 10),
        # One step more is as good as none.
        (STEPS, ("--training.steps=1001",), 500),
        # Not yet decaying, and warm-up is over.
        ((*STEPS, "--lr_scheduler.decay_ratio=0.2"), ("--training.steps=2000",), 700),
        (STEPS, ("--training.steps=2000", "--lr_scheduler.decay_ratio=0.5"), 100),
    ],
)
def test_a_learning_rate_without_a_jump_is_not_warned_about(
    caplog: Any, saved: tuple[str, ...], changes: tuple[str, ...], step: int
) -> None:
    logged = printed(caplog, *changes, saved=saved, step=step)
    assert not [line for line in logged if "jumps" in line]
