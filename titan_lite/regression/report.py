"""An HTML page about one or several runs: curves, speeds, settings and environment."""

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_lite.config.problems import keys
from titan_lite.config.stored import setting
from titan_lite.config.units import format_number
from titan_lite.metrics.record import METRICS
from titan_lite.regression.curves import (
    Record,
    check_run_folder,
    column,
    over_segments,
    read_facts,
    read_records,
    segments,
    words,
)
from titan_lite.regression.panels import Line, Scale, Style, panel

# As many as report.css has colours.
MAX_RUNS = 6
# Title, key of the records, scale, style.
PanelRow = tuple[str, str, Scale, Style]
PANELS: tuple[PanelRow, ...] = (
    ("Loss", "loss", "free", "smoothed"),
    ("Gradient norm", "grad_norm", "log", "smoothed"),
    ("Validation loss", "validation/loss", "free", "line"),
    ("Learning rate", "lr", "from zero", "line"),
    ("WPS", "wps", "from zero", "smoothed"),
    ("MFU", "mfu", "from zero", "smoothed"),
    ("Memory", "memory_gib", "from zero", "line"),
    ("Data wait", "data_wait", "from zero", "smoothed"),
    ("Checkpoint stalls", "checkpoint_blocked_seconds", "from zero", "events"),
)
# Further panels, for runs with experts.
EXPERT_PANELS: tuple[PanelRow, ...] = (
    ("Most loaded expert", "moe/load_max", "from zero", "smoothed"),
    ("Most loaded EP rank", "moe/rank_load_max", "from zero", "smoothed"),
    ("Experts without tokens", "moe/unused_experts", "from zero", "line"),
    ("Entropy of the loads", "moe/entropy", "free", "smoothed"),
    ("Balancing loss", "moe/balance_loss", "free", "smoothed"),
    ("Largest bias", "moe/max_bias", "from zero", "line"),
)
# Averages over the steps since the previous record; in the first record they include start-up.
_SPEEDS = ("wps", "mfu", "data_wait", "seconds_per_step")

# Metrics that a record holds as a list, with a value for each block with experts.
_PER_BLOCK = ("load_max", "unused_experts", "entropy", "balance_loss")
# With more resumes the first table has only their number; the last table has the steps.
_MANY_RESUMES = 4


@dataclass(frozen=True)
class Run:
    """The contents of a run folder, named as on the command line."""

    name: str
    records: Sequence[Record]
    facts: Mapping[str, Any]

    @property
    def segments(self) -> Sequence[Mapping[str, Any]]:
        """Facts in run.json of each segment, the part between two resumes."""
        return segments(self.facts, self.records[-1]["step"] if self.records else 0)

    @property
    def resumes(self) -> list[int]:
        """The steps after which it was resumed."""
        return [step for s in self.segments if (step := s.get("resumed_from_step", 0))]

    def setting(self, key: str) -> Any:
        """The value of section.key, or Changes."""
        return over_segments(self.segments, [setting(s["config"], key) for s in self.segments])

    def line(self, key: str) -> Line:
        """The values of a key in all records that have it; speeds without start-up."""
        having = [r for r in self.records if key in r and not (key in _SPEEDS and r.get("warmup"))]
        steps, values = (column(self.name, having, name) for name in ("step", key))
        return Line(self.name, steps, values)

    def last(self, key: str) -> float | None:
        """The value in the last record that has the key."""
        values = self.line(key).values
        return float(values[-1]) if len(values) else None


def read_run(folder: Path) -> Run:
    """Reads a run folder; raises CurveError if it is not one."""
    check_run_folder(folder)
    return Run(str(folder), read_records(folder), read_facts(folder))


def report(runs: Sequence[Run]) -> str:
    """Returns a self-contained HTML page."""
    here = Path(__file__)
    title = ", ".join(run.name for run in runs)
    settings = "Settings that differ" if len(runs) > 1 else "Settings other than the defaults"
    sections = [("Runs", _overview(runs)), ("Curves", _curves(runs, PANELS))]
    if any("moe/load_max" in record for run in runs for record in run.records):
        sections += [
            ("Experts", _curves(runs, EXPERT_PANELS)),
            ("Blocks with experts, in the last record", _table(runs, _blocks)),
        ]
    sections += [
        (settings, _table(runs, _settings(runs))),
        ("Applied", _table(runs, _applied)),
        ("Environment", _table(runs, _environment)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections)
    legend = "".join(
        f"<li>{_legend(number, run, len(runs))}</li>" for number, run in enumerate(runs)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)} - titan_lite</title>"
        f"<style>{here.with_suffix('.css').read_text(encoding='utf-8')}</style></head>"
        f"<body><header><h1>titan_lite</h1><ul>{legend}</ul></header>{body}"
        f"<script>{here.with_suffix('.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _name(number: int, run: Run) -> str:
    """Markup of a run's name, with a sample of its line."""
    key = f'<svg class="key" viewBox="0 0 24 8"><line class="run{number}" x2="24" y1="4" y2="4"/>'
    return f'<span class="run{number}">{key}</svg>{_breakable(run.name)}</span>'


def _legend(number: int, run: Run, count: int) -> str:
    """Markup of a run's name; with several runs a button that hides and shows the run."""
    if count == 1:
        return _name(number, run)
    return f'<button type="button" aria-pressed="true">{_name(number, run)}</button>'


def _breakable(text: str) -> str:
    """Markup of a text that may wrap at separators of paths, keys and names."""
    return re.sub(r"(?<=\w)([/_]+|[.:=-]+(?!\d))(?=\S)", r"\1<wbr>", html.escape(text))


def _blocks(run: Run) -> dict[str, str]:
    """A row for each block with experts, from the last record; dense blocks may precede them."""
    last = next((r for r in reversed(run.records) if "moe/load_max" in r), {})
    columns = [map(float, last.get(f"moe/{name}_per_layer", ())) for name in _PER_BLOCK]
    row = "load {:.2f}, {:.0f} experts without tokens, entropy {:.3f}, balancing loss {:.3g}"
    rows = [row.format(*values) for values in zip(*columns, strict=True)]
    modules = [name for stage in run.facts.get("stages", ()) for name in stage["modules"]]
    first = max(0, sum(name.startswith("layers.") for name in modules) - len(rows))
    return {f"block {first + number}": row for number, row in enumerate(rows)}


def _curves(runs: Sequence[Run], rows: Sequence[PanelRow]) -> str:
    """All panels, over the same range of steps; quantities that no run logged are only listed."""
    steps = [float(record["step"]) for run in runs for record in run.records] or [0.0]
    resumes = [run.resumes for run in runs]
    panels, not_logged = [], []
    for title, key, scale, style in rows:
        lines = [run.line(key) for run in runs]
        if any(len(line.finite.steps) for line in lines):
            panels.append(
                panel(title, _unit(key), lines, scale, style, min(steps), max(steps), resumes)
            )
        else:
            not_logged.append(title)
    marks = " An upright dotted line marks a resume." if any(resumes) else ""
    page = (
        '<p class="faint">Noisy curves: faint values, bold running mean. '
        f"Press a run's name above to hide or show it, log for a logarithmic axis.{marks}</p>"
        '<noscript><p class="warning">The curves are drawn by JavaScript.</p></noscript>'
        f'<div class="panels">{"".join(panels)}</div>'
    )
    if not_logged:
        page += f'<p class="faint">Not logged: {", ".join(not_logged)}</p>'
    return page


def _unit(key: str) -> str:
    unit = METRICS[key].unit
    return f"{unit}, without start-up" if key in _SPEEDS else unit


def _table(runs: Sequence[Run], rows: Callable[[Run], Mapping[str, str]]) -> str:
    """A column for each run, a row for each key that any of them has."""
    columns = [rows(run) for run in runs]
    keys = dict.fromkeys(key for column in columns for key, value in column.items() if value)
    if not keys:
        return '<p class="faint">none</p>'
    head = "".join(f"<th>{_name(number, run)}</th>" for number, run in enumerate(runs))
    body = "".join(
        f"<tr><th>{_breakable(key)}</th>"
        + "".join(f"<td>{_breakable(column.get(key, ''))}</td>" for column in columns)
        + "</tr>"
        for key in keys
    )
    return _scrolled(f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>")


def _scrolled(table: str) -> str:
    """Markup of a table that scrolls on a narrow screen, with a hint and by keyboard."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'
        '<p class="hint faint" hidden></p>'
    )


def _overview(runs: Sequence[Run]) -> str:
    """A row for each run."""
    summaries = [_summary(run) for run in runs]
    head = "".join(f"<th>{html.escape(key)}</th>" for key in summaries[0])
    body = ""
    for number, (run, summary) in enumerate(zip(runs, summaries, strict=True)):
        description = str(run.setting("job.description"))
        more = f"<br><small>{html.escape(description)}</small>" if description else ""
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in summary.values())
        body += f'<tr><th class="name">{_name(number, run)}{more}</th>{cells}</tr>'
    return _scrolled(
        f'<table class="runs"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _summary(run: Run) -> dict[str, str]:
    done = run.records[-1]["step"] if run.records else 0
    config = run.segments[-1]["config"]
    resumed = f", resumed at {_words(run.resumes)}" if run.resumes else ""
    if len(run.resumes) > _MANY_RESUMES:
        resumed = f", resumed {len(run.resumes)} times"
    rows = {
        "model": f"{setting(config, 'model.name')} {setting(config, 'model.flavor')}",
        "parameters": f"{run.facts.get('parameters', 0):,}",
        "devices": over_segments(run.segments, list(map(_devices, run.segments)), str),
        "steps": f"{done:,} of {setting(config, 'training.steps'):,}{resumed}",
    }
    for label, key, form in (
        ("tokens", "tokens", ",.0f"),
        ("last loss", "loss", ".4f"),
        ("last gradient norm", "grad_norm", ".4f"),
    ):
        value = run.last(key)
        rows[label] = "" if value is None else format_number(value, form)
    for label, key, mean, form, unit in (
        ("WPS, mean", "wps", np.mean, ",.0f", ""),
        ("MFU, mean", "mfu", np.mean, ".1f", " %"),
        ("step, median", "seconds_per_step", np.median, ".3f", " s"),
        ("memory, peak", "memory_gib", np.max, ".2f", " GiB"),
    ):
        values = run.line(key).values
        rows[label] = (
            format_number(float(mean(values)), form) + unit if len(values) else "not measured"
        )
    return rows


def _devices(segment: Mapping[str, Any]) -> str:
    # Expert parallel uses ranks that the other axes count already.
    degrees = [degree for axis, degree in segment["mesh"].items() if axis != "ep"]
    return f"{math.prod(degrees)} x {segment.get('device', '?')}"


def _settings(runs: Sequence[Run]) -> Callable[[Run], dict[str, str]]:
    """Chooses the keys whose values differ between runs; for one run, from the defaults."""
    chosen = []
    for key in keys():
        values = [run.setting(key) for run in runs]
        others = values[1:] or [setting({}, key)]
        # Each run has its own folder.
        same = len(runs) > 1 and key == "job.dump_folder"
        if not same and any(value != values[0] for value in others):
            chosen.append(key)

    def rows(run: Run) -> dict[str, str]:
        return {key: words(run.setting(key)) for key in chosen}

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
    parts = list(map(_segment_environment, run.segments))
    keys = dict.fromkeys(key for part in parts for key in part)
    rows = {
        key: over_segments(run.segments, [part.get(key, "") for part in parts], str) for key in keys
    }
    return rows | {"resumed from step": _words(run.resumes or [0])}


def _segment_environment(segment: Mapping[str, Any]) -> dict[str, str]:
    """Software, machine and mesh of a segment."""
    rows = {
        "started": str(segment.get("started", "")),
        "commit": str(segment.get("git_commit", ""))[:12],
    }
    for group in ("versions", "environment"):
        rows |= {key.replace("_", " "): str(v) for key, v in segment.get(group, {}).items()}
    rows["device"] = str(segment.get("device", ""))
    mesh = {axis: size for axis, size in segment["mesh"].items() if size > 1}
    rows["mesh"] = _words(mesh) or "one process"
    rows["peak that MFU is relative to"] = _words(segment.get("peak", {}))
    return rows


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
