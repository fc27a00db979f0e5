"""benchmarks/numerics.py, with runs made for it, and docs/numerics.md."""

import json
from pathlib import Path

import pytest

from benchmarks import numerics
from tests.regression.folders import write_run
from titan_lite.models.plan import make_plan
from titan_lite.regression.compare import LAYOUT_TOLERANCES
from titan_lite.regression.noise import ALPHA, WINDOWS, _student_t


@pytest.mark.parametrize("pair", numerics.PAIRS, ids=lambda pair: pair.name)
def test_each_side_of_a_pair_is_a_run_of_one_global_batch(pair: numerics.Pair) -> None:
    batches = set()
    for side in (pair.a, pair.b):
        settings = [f"--{setting}" for setting in (*numerics.RUN, *side.settings)]
        plan = make_plan(numerics.CONFIG, settings, side.nproc)
        batches.add(plan.global_batch_size)
    assert len(batches) == 1


def test_pairs_become_a_table_and_each_run_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = []

    def run_training(config: Path, overrides: list[str], nproc: int, folder: Path) -> None:
        launched.append(nproc)
        write_run(folder, [8.0, 7.0 + 0.1 * (nproc == 4)], None, *overrides)

    monkeypatch.setattr(numerics, "run_training", run_training)
    monkeypatch.setattr(
        numerics, "plot", lambda actual, path: path.write_text(json.dumps(actual.report()))
    )
    argv = ["--steps=2", f"--folder={tmp_path}", "--only", "dp2", "hsdp 2x2", "bfloat16"]
    assert numerics.main(argv) == 1
    out = capsys.readouterr().out
    assert "| dp2 | layout | within | 0.0e+00 of 1.0e-05 | 0.0e+00 of 1.0e-04 |" in out
    assert "| hsdp 2x2 | layout | **outside** at step 2 | 1.4e-02 of 1.0e-05 |" in out
    assert "| bfloat16 | statistical | --tier statistical estimates the noise from" in out
    assert launched == [1, 2, 4, 1]
    drawn = json.loads((tmp_path / "dp2.png").read_text())
    assert (drawn["a"], drawn["b"]) == ("1 process", "2 processes, training.local_batch_size=2")
    numerics.main(argv)
    assert launched == [1, 2, 4, 1]


def test_the_page_states_the_tolerances_and_the_limit() -> None:
    page = numerics.DOCS.read_text()
    for dtype, row in (("float32", "1e-5 | 1e-4"), ("bfloat16", "1e-2 | 0.25")):
        assert f"| {dtype} | {row} |" in page
        assert [float(x) for x in row.split(" | ")] == list(LAYOUT_TOLERANCES[dtype].values())
    assert f"{_student_t(1 - ALPHA / (4 * WINDOWS), WINDOWS - 2):.1f} SE(t)" in page
    assert numerics.TABLE.search(page)
