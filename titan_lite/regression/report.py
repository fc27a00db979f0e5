"""A page to look at: the curves, speeds, settings and surroundings of one or several runs."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_lite.config.problems import FIELDS, literal
from titan_lite.metrics.record import METRICS
from titan_lite.regression.curves import (
    METRICS_FILE,
    RUN_FILE,
    Mistake,
    Record,
    read_facts,
    read_records,
    setting,
)
from titan_lite.regression.panels import Line, Scale, panel

# As many as report.css has colours.
MAX_RUNS = 6
# Title, key of the records, scale.
PANELS: tuple[tuple[str, str, Scale], ...] = (
    ("Loss", "loss", "free"),
    ("Gradient norm", "grad_norm", "log"),
    ("Learning rate", "lr", "from zero"),
    ("WPS", "wps", "from zero"),
    ("MFU", "mfu", "from zero"),
    ("Memory", "memory_gib", "from zero"),
    ("Data wait", "data_wait", "from zero"),
    ("Checkpoint stalls", "checkpoint_blocked_seconds", "from zero"),
)
# Measured over a window that, in the first record, holds start-up.
_SPEEDS = ("wps", "mfu", "data_wait")


@dataclass(frozen=True)
class Run:
    """A run folder's content, under the name that the user gave."""

    name: str
    records: Sequence[Record]
    facts: Mapping[str, Any]

    def line(self, key: str) -> Line:
        """The records that hold the key, without the warm-up's speeds."""
        held = [r for r in self.records if key in r and not (key in _SPEEDS and r.get("warmup"))]
        values = [float(record[key]) for record in held]
        return Line(self.name, np.array([float(r["step"]) for r in held]), np.array(values))

    def last(self, key: str) -> float | None:
        """The value of the last record that holds the key."""
        values = self.line(key).values
        return float(values[-1]) if len(values) else None


def read_run(folder: Path) -> Run:
    """Mistake where the folder is not a run's."""
    for name in (RUN_FILE, METRICS_FILE):
        if not (folder / name).exists():
            raise Mistake(f"{folder}: not a run folder, it has no {name}")
    return Run(str(folder), read_records(folder), read_facts(folder))


def report(runs: Sequence[Run]) -> str:
    """HTML that needs nothing but itself."""
    here = Path(__file__)
    panels = "".join(
        panel(title, _unit(key), [run.line(key) for run in runs], scale)
        for title, key, scale in PANELS
    )
    title = ", ".join(run.name for run in runs)
    settings = "Settings that differ" if len(runs) > 1 else "Settings other than the defaults"
    tables = (
        ("Runs", _table(runs, _summary)),
        ("Curves", f'<div class="panels">{panels}</div>'),
        (settings, _table(runs, _settings(runs))),
        ("Applied", _table(runs, _applied)),
        ("Environment", _table(runs, _environment)),
    )
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in tables)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{here.with_suffix('.css').read_text(encoding='utf-8')}</style></head>"
        f"<body><h1>titan_lite: {html.escape(title)}</h1>{body}"
        f"<script>{here.with_suffix('.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _unit(key: str) -> str:
    unit = METRICS[key].unit.removeprefix("1") if key in METRICS else "s"
    return f"{unit}, without warm-up" if key in _SPEEDS else unit


def _table(runs: Sequence[Run], rows: Callable[[Run], Mapping[str, str]]) -> str:
    """A column for each run, a row for each key that any of them has."""
    columns = [rows(run) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    if not keys:
        return '<p class="faint">none</p>'
    head = "".join(
        f'<th class="key run{number}">{html.escape(run.name)}</th>'
        for number, run in enumerate(runs)
    )
    body = "".join(
        f"<tr><th>{html.escape(key)}</th>"
        + "".join(f"<td>{html.escape(column.get(key, ''))}</td>" for column in columns)
        + "</tr>"
        for key in keys
    )
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _summary(run: Run) -> dict[str, str]:
    config, mesh = run.facts["config"], run.facts["mesh"]
    devices = int(np.prod(list(mesh.values())))
    seconds = run.line("seconds_per_step").values
    numbers = {
        "loss, last": ("loss", "{:.4f}"),
        "gradient norm, last": ("grad_norm", "{:.4f}"),
        "tokens": ("tokens", "{:,.0f}"),
    }
    means = {"WPS, mean": ("wps", "{:,.0f}"), "MFU, mean": ("mfu", "{:.1f} %")}
    rows = {
        "description": str(setting(config, "job.description")),
        "model": f"{setting(config, 'model.name')} {setting(config, 'model.flavor')}, "
        f"{run.facts.get('parameters', 0):,} parameters",
        "devices": f"{devices} x {run.facts.get('device', '?')}",
        "steps": f"{run.records[-1]['step'] if run.records else 0} of "
        f"{setting(config, 'training.steps')}",
    }
    for label, (key, form) in numbers.items():
        value = run.last(key)
        rows[label] = "" if value is None else form.format(value)
    for label, (key, form) in means.items():
        values = run.line(key).values
        rows[label] = form.format(values.mean()) if len(values) else "not measured"
    memory = run.line("memory_gib").values
    rows["memory, peak"] = f"{memory.max():.2f} GiB" if len(memory) else ""
    rows["step time, median"] = f"{np.median(seconds):.3f} s" if len(seconds) else ""
    return rows


def _settings(runs: Sequence[Run]) -> Callable[[Run], dict[str, str]]:
    """The keys whose values the runs do not share, or one does not share with the defaults."""
    chosen = []
    for section, fields in FIELDS.items():
        for name, field in fields.items():
            key = f"{section}.{name}"
            values = [setting(run.facts["config"], key) for run in runs]
            others = values[1:] or [field.default]
            if any(value != values[0] for value in others):
                chosen.append(key)

    def rows(run: Run) -> dict[str, str]:
        values = {key: setting(run.facts["config"], key) for key in chosen}
        return {key: "not set" if v is None else literal(v) for key, v in values.items()}

    return rows


def _applied(run: Run) -> dict[str, str]:
    rows: dict[str, str] = {}
    for key, value in run.facts.get("applied", {}).items():
        if key == "modules":
            rows |= {f"{feature}s": str(len(names)) for feature, names in value.items()}
        elif value not in (None, "", []):
            rows[key.replace("_", " ")] = _words(value)
    return rows


def _environment(run: Run) -> dict[str, str]:
    facts = run.facts
    rows = {"started": str(facts.get("started", "")), "commit": str(facts.get("git_commit", ""))}
    for group in ("versions", "environment"):
        rows |= {key.replace("_", " "): str(v) for key, v in facts.get(group, {}).items()}
    rows["device"] = str(facts.get("device", ""))
    rows["peak that MFU divides by"] = _words(facts.get("peak", {}))
    rows["resumed from step"] = str(facts.get("resumed_from_step", 0))
    return rows


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
