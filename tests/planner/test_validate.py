"""The planner against published runs: assets/published_rows.toml, and files of a user's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from titan_lite import cli
from titan_lite.planner.constants import FITTED, LITERATURE, SPREADS
from titan_lite.tools.fit import fit
from titan_lite.tools.published import read_rows
from titan_lite.tools.validate_plan import report

ROWS = Path(__file__).parent.parent.parent / "assets" / "published_rows.toml"
MPT = ("mpt-h100", "mpt-a100-40")
LLAMA = """
[[row]]
system = "mine"
table = "t"
model = "llama3-8b"
device = "H100 SXM 80GB"
gpus = 8
tp = 1
pp = 1
sharding = "fsdp"
micro_batch = 1
seq_len = 8192
stack = "compile"
attention = "flash2"
cross_entropy = "float32"
metric = "tokens_per_gpu_per_s"
value = 9000
"""


def errors(facts: dict[str, Any], *, mpt: bool) -> list[float]:
    return [
        abs(row["error"])
        for row in facts["rows"]
        if row["predicted"] is not None and (row["system"] in MPT) == mpt
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def validated(constants: str, path: Path = ROWS) -> dict[str, Any]:
    actual: dict[str, Any] = json.loads(
        report(str(path), constants=constants, refit=False, as_json=True)
    )
    return actual


def test_published_speeds_are_predicted_with_the_fitted_constants() -> None:
    facts = validated("fitted")
    assert mean(errors(facts, mpt=False)) < 0.04
    for system in MPT:
        assert facts["systems"][system]["mean"] < 0.05
    assert facts["fitted_constants"] == len(FITTED) == len(SPREADS)
    # One constant per device, fitted to the same rows, explains them worse.
    assert facts["null_mean"] > 2 * facts["mean"]


def test_published_speeds_are_predicted_with_the_constants_of_the_literature() -> None:
    actual = validated("literature")
    assert mean(errors(actual, mpt=False)) < 0.07
    # FSDP2 and DTensor copy what they send, which is 2 to 7 % of these steps.
    for system in ("torchtitan-a100", "torchtitan-h100", "torchtitan-405b"):
        assert actual["systems"][system]["mean"] < 0.025
    assert actual["fitted_constants"] == 0


def test_every_row_is_listed_and_what_is_not_predicted_has_a_reason() -> None:
    facts = validated("fitted")
    assert len(facts["rows"]) == len(read_rows(str(ROWS))) == 259
    for row in facts["rows"]:
        if row["predicted"] is None:
            assert row["reason"]
        else:
            assert row["low"] < row["predicted"] < row["high"]
            assert row["error"] == pytest.approx(row["predicted"] / row["published"] - 1)


def test_most_published_speeds_lie_in_the_interval() -> None:
    rows = [row for row in validated("literature")["rows"] if row["predicted"] is not None]
    inside = [row["low"] <= row["published"] <= row["high"] for row in rows]
    assert mean(inside) > 0.75


@pytest.mark.timeout(600)
def test_the_shipped_constants_are_what_the_fit_finds() -> None:
    actual = fit([row for row in read_rows(str(ROWS)) if row["use"] == "time"])
    assert actual.values == pytest.approx(FITTED, rel=0.01)
    assert actual.freedom < len(SPREADS)


def test_a_row_of_a_users_own_is_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.toml"
    unknown = LLAMA.replace("H100 SXM 80GB", "H900").replace('"mine"', '"unknown"')
    file.write_text(LLAMA + unknown)
    assert cli.main(["plan", "validate", str(file)]) == 0
    out = capsys.readouterr().out
    assert "mine" in out
    assert "not predicted (1): unknown, tokens_per_gpu_per_s: unknown device 'H900'" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row (FILE): the file has no [[row]]"),
        ('[[row]]\nsystem = "mine"\nvalue = 1', "row 1.metric (FILE): missing"),
        ("[[row", "cannot be read"),
    ],
)
def test_a_file_that_has_no_rows_is_an_error(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(text)
    assert cli.main(["plan", "validate", str(file)]) == 2
    assert message.replace("FILE", str(file)) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "value = 9000",
            'value = "x"',
            "row 1.value (FILE): expected a number greater than 0, got",
        ),
        (
            "value = 9000",
            "value = nan",
            "row 1.value (FILE): expected a number greater than 0, got",
        ),
        (
            "value = 9000",
            "value = 0",
            "row 1.value (FILE): expected a number greater than 0, got 0",
        ),
        ("gpus = 8", 'gpus = "8"', 'row 1.gpus (FILE): expected a positive integer, got "8"'),
        ("tp = 1", "tp = 0", "row 1.tp (FILE): expected a positive integer, got 0"),
        ("tp = 1", "tp = true", "row 1.tp (FILE): expected a positive integer, got true"),
        ('model = "llama3-8b"', "model = 5", "row 1.model (FILE): expected a string, got 5"),
        ('"fsdp"', '""', "row 1.sharding (FILE): expected a string"),
    ],
)
def test_a_wrong_value_of_a_row_is_an_error(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(LLAMA.replace(old, new))
    assert cli.main(["plan", "validate", str(file)]) == 2
    assert message.replace("FILE", str(file)) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"fsdp"', '"fsdq"', "unknown sharding 'fsdq'"),
        ("tp = 1", 'tp = 1\npp_schedule = "x"', "unknown pp_schedule 'x'"),
        ("tp = 1", 'tp = 1\nac = "every_nth:0"', "unknown recomputation 'every_nth:0'"),
        ("tp = 1", 'tp = 1\nac = "first_k:x"', "unknown recomputation 'first_k:x'"),
        ("tp = 1", 'tp = 1\nac = "fraction:2"', "unknown recomputation 'fraction:2'"),
        ("tp = 1", "tp = 1\ndp_shard = 3", "dp_shard (3) does not divide dp (8)"),
        ("tp = 1", "tp = 3", "tp x pp x cp x dp is 6, not 8 GPUs"),
        ('"llama3-8b"', '"nope"', "unknown model 'nope'"),
        ('"tokens_per_gpu_per_s"', '"x"', "metric 'x' is not a speed"),
    ],
)
def test_a_row_that_cannot_be_predicted_has_a_reason(
    old: str, new: str, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(LLAMA.replace(old, new))
    (row,) = validated("fitted", file)["rows"]
    assert row["reason"] == reason


@pytest.mark.parametrize("text", ["row = 5", "row = [1]", "[row]\na = 1"])
def test_rows_that_are_no_tables_are_an_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(text)
    assert cli.main(["plan", "validate", str(file)]) == 2
    assert "expected an array of tables, each with the head [[row]], got" in capsys.readouterr().err


def test_every_fitted_constant_has_a_value_from_the_literature() -> None:
    for name in FITTED:
        quantity = name.split("/")[0]
        assert any(known.split("/")[0] == quantity for known in LITERATURE)


@pytest.mark.parametrize("constants", ["literature", "leave-one-system-out"])
def test_constants_that_are_not_fitted_to_the_file_refuse_fit(
    constants: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", "validate", str(ROWS), "--fit", "--constants", constants])
    assert f"--fit requires --constants fitted, got {constants}" in capsys.readouterr().err
