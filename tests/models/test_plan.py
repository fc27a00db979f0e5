"""The values computed from a configuration before a run."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from titan_lite.config.load import ConfigError
from titan_lite.models.llama import LLAMA
from titan_lite.models.plan import make_plan


def test_a_plan_has_the_settings_their_origins_the_degrees_and_the_model() -> None:
    plan = make_plan(None, ["--model.num_layers=2", "--parallel.tp=2"], world_size=4)
    assert (plan.config.model.num_layers, plan.args.num_layers) == (2, 2)
    assert plan.origins["model.num_layers"] == "command line"
    assert (plan.dims.dp_shard, plan.dims.tp) == (2, 2)
    assert plan.family is LLAMA
    with pytest.raises(FrozenInstanceError):
        plan.micro_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("size", "global_batch_size", "micro_steps"), [(-1, 8, 1), (8, 8, 1), (24, 24, 3)]
)
def test_the_global_batch_is_cut_into_micro_batches_of_all_data_parallel_ranks(
    size: int, global_batch_size: int, micro_steps: int
) -> None:
    settings = ["--training.local_batch_size=2", f"--training.global_batch_size={size}"]
    plan = make_plan(None, [*settings, "--parallel.tp=2"], world_size=8)
    assert (plan.global_batch_size, plan.micro_steps) == (global_batch_size, micro_steps)


def test_without_a_world_size_the_degrees_choose_the_smallest() -> None:
    plan = make_plan(None, ["--parallel.tp=2", "--parallel.dp_replicate=2"])
    assert (plan.dims.world_size, plan.dims.dp_shard) == (4, 1)


def test_checkpoints_are_below_the_run_folder_unless_elsewhere(tmp_path: Path) -> None:
    plan = make_plan(None, ["--job.dump_folder=runs/a"])
    assert plan.checkpoint_folder == Path("runs/a/checkpoint")
    plan = make_plan(None, ["--job.dump_folder=runs/a", f"--checkpoint.folder={tmp_path}"])
    assert (plan.run_folder, plan.checkpoint_folder) == (Path("runs/a"), tmp_path)


def test_an_override_that_contradicts_a_file_is_blamed(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\nnum_heads = 8\nvocab_size = 2048\n[training]\nseq_len = 2048\n")
    with pytest.raises(ConfigError) as error:
        make_plan(file, ["--parallel.tp=3"], 3)
    assert len(error.value.problems) == 4
    assert {(p.key, p.source) for p in error.value.problems} == {("parallel.tp", "command line")}
    assert "seq_len (2048) must be a multiple of parallel.tp (3)" in str(error.value)
