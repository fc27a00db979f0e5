"""The benchmark of calibrated predictions, without its measurements."""

from typing import Any

import pytest

from benchmarks.measure import Variant
from benchmarks.planner_cpu import GROUPS, PROCESSES, compared, summary
from titan_lite.planner.cluster import find_cluster

RUNS = [
    Variant(name, config, overrides, PROCESSES)
    for group in GROUPS
    for name, (config, overrides) in group.items()
]


@pytest.mark.parametrize("variant", RUNS, ids=lambda variant: variant.name)
def test_every_run_is_predicted(variant: Variant) -> None:
    run = compared(variant, {"seconds_per_step": {"median": 1e-9}}, find_cluster("h100"))
    assert run["predicted"] > 0
    assert run["error"] > 0
    assert not run["in_interval"]


def test_pairs_that_differ_by_more_than_15_percent_are_ranked() -> None:
    def run(name: str, measured: float, predicted: float) -> dict[str, Any]:
        error = predicted / measured - 1
        return {"run": name, "measured": {"median": measured}, "predicted": predicted} | {
            "error": error,
            "in_interval": abs(error) < 0.06,
        }

    actual = summary([run("a", 1.0, 1.3), run("b", 1.1, 1.2), run("c", 1.2, 1.2)])
    assert actual["wrong_order"] == [["c", "a"]]
    assert actual["worst_error"] == pytest.approx(0.3)
    assert actual["in_interval"] == 1
    assert len(RUNS) == 12
