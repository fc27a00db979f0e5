"""Every layout, with every feature, trains the model that one process trains."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.matrix import (
    ACCUMULATIONS,
    CASES,
    FAMILIES,
    FEATURES,
    FURTHER,
    HOLES,
    IN_PRECISION,
    MATRIX,
    MODES,
    QUICK,
    TOLERANCES,
    Case,
    Hole,
    as_overrides,
)
from tests.parallel.parity import Parity
from tests.parallel.support_matrix import MatrixResults, proof, render
from tests.runs import build_trainer, exceeding, splits_backward
from titan_lite.config.load import ConfigError
from titan_lite.models.registry import families

COMMITTED = Path(__file__).parents[2] / "docs" / "support_matrix.md"


@pytest.fixture(scope="module")
def results() -> MatrixResults:
    return MatrixResults()


def test_every_two_values_of_any_two_axes_meet_in_a_case() -> None:
    axes = (tuple(MATRIX), MODES, (True, False), ACCUMULATIONS)
    rows = [
        (case.layout, case.mode, case.execution == "eager", case.micro_batches) for case in CASES
    ]
    for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2):
        met = {(row[i], row[j]) for row in rows}
        assert set(itertools.product(first, second)) - met == set()


@pytest.mark.parametrize("name", families())
def test_every_family_meets_every_feature_in_a_case_or_is_refused(name: str) -> None:
    assert [feature for feature in FEATURES if not proof(name, feature)] == []


def parameters(cases: Iterable[Case]) -> list[Any]:
    marks = {case: [pytest.mark.slow] * (case not in QUICK) for case in cases}
    return [
        pytest.param(case, marks=[*marks[case], *[splits_backward] * case.splits_backward])
        for case in cases
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("case", parameters((*CASES, *FURTHER, *FAMILIES)), ids=str)
def test_a_layout_equals_one_process(case: Case, parity: Parity, results: MatrixResults) -> None:
    results.passed[case] = False
    deviations = parity.deviations(case)
    results.note(case, deviations)
    assert exceeding(deviations, TOLERANCES) == {}
    results.passed[case] = True


@pytest.mark.distributed
@pytest.mark.parametrize("case", parameters(IN_PRECISION), ids=str)
def test_a_layout_is_no_farther_from_one_process_than_its_precision_from_float32(
    case: Case, parity: Parity, results: MatrixResults
) -> None:
    results.passed[case] = False
    yardstick = parity.of_precision(case)
    bounds = {key: yardstick[key][0] for key in ("loss", "grad_norm")}
    assert exceeding(parity.deviations(case), bounds) == {}
    results.passed[case] = True


@pytest.mark.parametrize("hole", HOLES, ids=lambda hole: ", ".join(hole.settings))
def test_what_does_not_go_together_is_refused(
    hole: Hole, results: MatrixResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(hole.world_size)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as error:
        build_trainer(tmp_path, "--training.local_batch_size=1", *as_overrides(*hole.settings))
    (problem,) = error.value.problems
    assert problem.key in {setting.partition("=")[0] for setting in hole.settings}
    results.reasons[hole] = f"{problem.key}: {problem.message}"


def test_the_committed_support_matrix_holds_the_results(
    results: MatrixResults, request: pytest.FixtureRequest
) -> None:
    print(results.worst)
    path = request.config.getoption("--support-matrix")
    for case in (*CASES, *FURTHER, *FAMILIES, *IN_PRECISION):
        # Where the page is only compared, slow rows may have been left out.
        if case not in QUICK and not path:
            results.passed.setdefault(case, True)
    if missing := results.missing():
        pytest.skip(f"{len(missing)} rows of the table were not tried, such as {missing[0]}")
    if path:
        path.write_text(render(results))
    else:
        assert COMMITTED.read_text() == render(results), "write it with --support-matrix"
