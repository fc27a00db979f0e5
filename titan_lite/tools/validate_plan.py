"""titan-lite plan validate: predicts published runs, and reports the errors."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from titan_lite.planner.constants import FITTED, LITERATURE, SPREADS
from titan_lite.planner.interval import interval
from titan_lite.planner.predict import model_flops
from titan_lite.tools.fit import Fit, fit
from titan_lite.tools.published import (
    Predicted,
    PublishedRow,
    predict_row,
    read_rows,
)


def report(path: str, *, constants: str, refit: bool, as_json: bool) -> str:
    """Predicts the rows of a file, and formats the errors by system.

    constants: as in the command's help. refit: fit the constants to the file first.
    """
    rows = read_rows(path)
    used = [row for row in rows if row.get("use", "time") == "time"]
    fitted = fit(used) if refit else None
    if constants == "leave-one-system-out":
        predicted = _leave_one_out(used)
    else:
        values = LITERATURE | (FITTED if constants == "fitted" else {})
        values |= fitted.values if fitted else {}
        predicted = {id(row): predict_row(row, values) for row in used}
    everything = [
        predicted.get(
            id(row), Predicted(row, reason=f'use = "{row.get("use")}": no speed to predict')
        )
        for row in rows
    ]
    done = [p for p in everything if p.value is not None]
    nulls = null_errors(done)
    facts: dict[str, Any] = {
        "rows": [_facts(p) for p in everything],
        **_statistics([p.error for p in done]),
        "null_mean": _mean_error(list(nulls.values())),
        "constants": constants,
        "fitted_constants": 0 if constants == "literature" else len(SPREADS),
        "systems": {
            system: _statistics([p.error for p in group])
            | {"rows": len(group), "null_mean": _mean_error([nulls[id(p)] for p in group])}
            for system, group in _by_system(done).items()
        },
    }
    if fitted:
        facts["fit"] = _fit_facts(fitted)
    return json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts))


def null_errors(predicted: Sequence[Predicted]) -> dict[int, float]:
    """Errors of the null model, which has one share of the peak per device, fitted to the rows."""
    shares = {id(p): _share_of_peak(p) for p in predicted}
    by_device = defaultdict(list)
    for p in predicted:
        by_device[p.row["device"]].append(math.log(shares[id(p)]))
    return {
        id(p): math.exp(statistics.mean(by_device[p.row["device"]])) / shares[id(p)] - 1
        for p in predicted
    }


def _share_of_peak(p: Predicted) -> float:
    """The share of the peak that the published speed amounts to; recomputation counts as work."""
    assert p.step is not None
    assert p.value is not None
    job, step = p.step.job, p.step
    speed = p.row["value"] / p.value
    wps = step.wps * (1 / speed if p.row["metric"] == "step_time_s" else speed)
    recomputed = sum(job.recomputed) / sum(job.blocks) if job.recompute == "full" else 0
    peak = step.cluster.peak("float8" if job.float8 != "none" else "bfloat16")
    return wps * model_flops(job.args, job.span) * (1 + recomputed / 3) / peak


def _leave_one_out(rows: Sequence[PublishedRow]) -> dict[int, Predicted]:
    """Predicts each system with constants fitted to the other systems."""
    predicted: dict[int, Predicted] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        values = LITERATURE | fit([row for row in rows if row["system"] != system]).values
        predicted |= {id(row): predict_row(row, values) for row in rows if row["system"] == system}
    return predicted


def _facts(p: Predicted) -> dict[str, Any]:
    row = p.row
    facts: dict[str, Any] = {key: row.get(key) for key in ("system", "table", "metric")}
    facts |= {"published": row["value"]} | {
        key: row.get(key) for key in ("unit", "model", "device", "gpus", "seq_len", "ac")
    }
    if p.step is None or p.value is None:
        return facts | {"predicted": None, "error": None, "reason": p.reason}
    bounds = interval(p.step)
    ratios = bounds.low / p.step.seconds, bounds.high / p.step.seconds
    if row["metric"] != "step_time_s":
        ratios = 1 / ratios[1], 1 / ratios[0]
    low, high = (p.value * ratio for ratio in ratios)
    return facts | {"predicted": p.value, "error": p.error, "low": low, "high": high}


def _by_system(predicted: Sequence[Predicted]) -> dict[str, list[Predicted]]:
    groups = defaultdict(list)
    for p in predicted:
        groups[str(p.row["system"])].append(p)
    return dict(groups)


def _mean_error(errors: Sequence[float]) -> float | None:
    return statistics.mean(map(abs, errors)) if errors else None


def _statistics(errors: Sequence[float]) -> dict[str, float | None]:
    sizes = sorted(map(abs, errors))
    if not sizes:
        return dict.fromkeys(("mean", "median", "p90", "worst"))
    return {
        "mean": statistics.mean(sizes),
        "median": statistics.median(sizes),
        "p90": sizes[math.ceil(0.9 * len(sizes)) - 1],
        "worst": sizes[-1],
    }


def _fit_facts(fit: Fit) -> dict[str, Any]:
    return {
        "effective_degrees_of_freedom": round(fit.freedom, 2),
        "constants": {
            name: {
                "value": value,
                "spread_before": SPREADS[name],
                "spread_after": round(fit.spreads[name], 4),
                "learned": fit.spreads[name] < 0.8 * SPREADS[name],
            }
            for name, value in fit.values.items()
        },
    }


def _lines(facts: Mapping[str, Any]) -> list[str]:
    head = f"{'system':<18}{'rows':>5}{'mean':>8}{'median':>8}{'p90':>8}{'worst':>8}{'null':>8}"
    lines = [head]
    for system, row in [*facts["systems"].items(), ("all", {**facts, "rows": None})]:
        cells = [row[key] for key in ("mean", "median", "p90", "worst", "null_mean")]
        count = row["rows"] or sum(r["predicted"] is not None for r in facts["rows"])
        numbers = "".join(f"{'-' if cell is None else f'{cell:.1%}':>8}" for cell in cells)
        lines.append(f"{system:<18}{count:>5}{numbers}")
    lines.append(
        f"constants: {facts['constants']}, {facts['fitted_constants']} of them fitted to published "
        "rows; null: one constant per device, fitted to these rows"
    )
    for name, row in facts.get("fit", {}).get("constants", {}).items():
        learned = "" if row["learned"] else "  not learned: the spread stays that of the prior"
        spreads = f"{row['spread_before']:.0%} -> {row['spread_after']:.1%}"
        lines.append(f"  {name:<28}{row['value']:>8.4f}  {spreads}{learned}")
    if "fit" in facts:
        freedom = facts["fit"]["effective_degrees_of_freedom"]
        lines.append(f"  effective degrees of freedom: {freedom}")
    reasons: dict[str, int] = defaultdict(int)
    for row in facts["rows"]:
        if row["predicted"] is None:
            reasons[f"{row['system']}, {row['metric']}: {row['reason']}"] += 1
    lines += [f"not predicted ({count}): {reason}" for reason, count in reasons.items()]
    return lines
