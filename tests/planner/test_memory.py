"""The planner's memory against the dry run's, measured by dry_runs.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from titan_lite.models.plan import make_plan
from titan_lite.planner.cluster import find_cluster
from titan_lite.planner.memory import memory, peak, room
from titan_lite.planner.read import read_job

FOLDER = Path(__file__).parent
PRESETS = FOLDER.parent.parent / "train_configs"


def cases(kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / f"dry_runs_{kind}.json").read_text())
    return found


def compare(case: dict[str, Any]) -> tuple[float, float, float]:
    """The place's predicted peak, the whole job's, and the share of memory that it may take."""
    path = PRESETS / f"{case['config']}.toml" if case["config"] else None
    overrides = [*case["overrides"], "--data.tokenizer_path="]
    plan = make_plan(path, overrides, case["world_size"], with_files=False)
    job = read_job(plan.config, plan.dims, plan.family, plan.args)
    return memory(job)[case["place"]].bytes, peak(job).bytes, room(job)


def test_the_presets_memory_is_that_of_the_dry_run() -> None:
    errors = {
        f"{case['config']}, place {case['place']}": compare(case)[0] / case["peak"] - 1
        for case in cases("presets")
    }
    assert len(errors) >= 32
    sizes = list(map(abs, errors.values()))
    assert sum(sizes) / len(sizes) < 0.02, errors
    assert max(sizes) < 0.065, errors


@pytest.mark.parametrize("kind", ["presets", "random"])
def test_a_job_is_said_to_fit_only_where_the_dry_run_fits(kind: str) -> None:
    """On a device that is just large enough to be called so."""
    for case in cases(kind):
        _, whole, share = compare(case)
        assert case["peak"] <= whole / share, case


def test_a_pipeline_is_as_large_as_its_largest_place() -> None:
    plan = make_plan(PRESETS / "llama2_70b_tp4_pp8.toml", [], 32, with_files=False)
    job = read_job(plan.config, plan.dims, plan.family, plan.args)
    places = memory(job)
    assert len(places) == 8
    assert peak(job).bytes == max(place.bytes for place in places) == places[0].bytes
    # The dry run of the whole preset: 67.7 GiB.
    assert places[0].bytes / 2**30 == pytest.approx(67.7, rel=0.06)
    assert places[-1].bytes < 0.65 * places[0].bytes


def test_llama_3_70b_needs_more_than_one_node() -> None:
    plan = make_plan(
        PRESETS / "llama3_70b.toml",
        ["--data.tokenizer_path=", "--parallel.tp=1", "--parallel.dp_shard=8"],
        8,
        with_files=False,
    )
    job = read_job(plan.config, plan.dims, plan.family, plan.args)
    assert peak(job).bytes > find_cluster("h100").memory
