"""The page of titan-lite report: what is on it, and that it needs nothing else."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.regression.folders import write_run
from titan_lite import cli
from titan_lite.regression.panels import HEIGHT, LEFT, RIGHT, WIDTH, Axis, thin
from titan_lite.regression.report import PANELS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """Figures by caption, table cells by row, and what a page must not have."""

    VOID = ("meta", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[str]] = {}
        self.external: list[str] = []
        self.attributes: dict[str, Any] = {}
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.external += [f"{tag} {k}" for k, _ in attrs if k in ("src", "href", "onclick")]
        if tag == "figure":
            self.attributes = dict(attrs) | {"points": []}
        if tag == "polyline":
            self.attributes["points"].append(dict(attrs)["points"])
        if tag == "tr":
            self.cells = []
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr":
            self.rows[self.cells[0]] = self.cells[1:]

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["figcaption"]:
            self.figures[data.strip()] = self.attributes
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1] += data


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def page(*runs: str) -> Page:
    assert cli.main(["report", *runs, "-o", "page.html"]) == 0
    return Page(Path("page.html").read_text())


def test_every_panel_shows_every_run() -> None:
    write_run(Path("a"), [8.0, 7.5, 7.25], [0.5, 0.6, 0.7])
    write_run(Path("b"), [8.0, 7.0], [0.5, 0.55], "--parallel.tp=1")
    records = [json.loads(line) for line in Path("a/metrics.jsonl").read_text().splitlines()]
    records[1]["checkpoint_blocked_seconds"] = 1.5
    Path("a/metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    figures = page("a", "b").figures
    assert list(figures) == [title for title, _, _ in PANELS]
    loss = json.loads(figures["Loss"]["data-lines"])
    assert loss == [[[1, 2, 3], [8.0, 7.5, 7.25]], [[1, 2], [8.0, 7.0]]]
    assert json.loads(figures["Checkpoint stalls"]["data-lines"]) == [[[2], [1.5]], [[], []]]
    for figure in figures.values():
        assert len(figure["points"]) == 2
        points = [tuple(map(float, p.split(","))) for p in figure["points"][0].split()]
        assert all(LEFT <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_speeds_leave_out_the_warm_up_and_other_curves_do_not() -> None:
    write_run(Path("a"), [8.0, 7.5, 7.25])
    lines = Path("a/metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"warmup": True})
    Path("a/metrics.jsonl").write_text("\n".join(lines))
    found = page("a")
    assert json.loads(found.figures["WPS"]["data-lines"]) == [[[2, 3], [1002, 1003]]]
    assert json.loads(found.figures["Loss"]["data-lines"])[0][0] == [1, 2, 3]
    assert found.rows["WPS, mean"] == ["1,002"]


def test_tables_say_settings_that_differ_what_was_applied_and_where_it_ran() -> None:
    write_run(Path("a"), [8.0, 7.5], None, "--optimizer.lr=1e-3")
    write_run(Path("b"), [8.0, 7.5], None, "--optimizer.lr=1e-4", device="NVIDIA H200")
    rows = page("a", "b").rows
    assert rows["optimizer.lr"] == ["0.001", "0.0001"]
    assert "training.param_dtype" not in rows, "it is the same"
    assert rows["FSDP units"] == ["1", "1"]
    assert rows["precision"] == ["float32", "float32"]
    assert rows["torch"] == ["2.13.0", "2.13.0"]
    assert rows["cpu capability"] == ["AVX2", "AVX2"]
    assert rows["device"] == ["AMD EPYC", "NVIDIA H200"]
    assert rows["loss, last"] == ["7.5000", "7.5000"]
    # One run is held against the defaults.
    assert page("a").rows["training.param_dtype"] == ['"float32"']


def test_the_page_needs_no_other_file_and_no_network() -> None:
    write_run(Path("a"), [8.0, 7.5])
    found, text = page("a"), Path("page.html").read_text()
    assert found.external == []
    assert not re.search(r"https?:|url\(|@import|<link|fetch\(|import ", text)
    assert "prefers-color-scheme: dark" in text


def test_what_runs_contain_cannot_become_markup() -> None:
    evil = '</script><img src=x onerror="alert(1)">\'&'
    write_run(Path("a"), [8.0, 7.5], None, f"--job.description={json.dumps(evil)}", device=evil)
    found, text = page("a"), Path("page.html").read_text()
    assert "<img" not in text
    assert found.rows["description"] == [evil]
    assert found.rows["device"] == [evil]
    assert text.count("</script>") == 1


def test_values_that_are_not_finite_are_told() -> None:
    write_run(Path("a"), [8.0, "nan", 7.5, "inf"])
    lines = json.loads(page("a").figures["Loss"]["data-lines"])
    assert "a: not finite at 2 steps, first at 2" in Path("page.html").read_text()
    assert lines == [[[1, 3], [8.0, 7.5]]]


def test_ten_thousand_steps_keep_their_extremes_and_stay_small() -> None:
    loss = [6 + 1 / step for step in range(1, 10_001)]
    loss[5_000] = 9.5
    for name in ("a", "b", "c"):
        write_run(Path(name), loss)
    steps, values = json.loads(page("a", "b", "c").figures["Loss"]["data-lines"])[0]
    assert values[steps.index(5_001)] == 9.5
    assert min(values) == pytest.approx(min(loss), abs=1e-4)
    assert Path("page.html").stat().st_size < 2e6


def test_thinning_keeps_the_least_and_the_most_of_each_column_in_order() -> None:
    generator = np.random.default_rng(0)
    steps, values = np.arange(1.0, 20_001), generator.normal(size=20_000)
    x, y = thin(steps, values, 1, 20_000)
    assert len(x) <= 2 * (WIDTH - LEFT - RIGHT)
    assert (np.diff(x) > 0).all()
    assert {values.min(), values.max()} <= set(y.tolist())
    assert (y == values[x.astype(int) - 1]).all()


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (5.9, 8.2, False, [6, 6.5, 7, 7.5, 8]),
        (0.3, 40, True, [0.5, 1, 2, 5, 10, 20]),
        (1e-3, 1e4, True, [1e-3, 1e-2, 0.1, 1, 10, 100, 1000, 1e4]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, log: bool, ticks: list[float]) -> None:
    assert Axis(low, high, 0, 100, log).ticks(5) == pytest.approx(ticks)


def test_a_wide_range_of_norms_is_drawn_in_decades() -> None:
    write_run(Path("a"), [8.0, 7.0, 6.0], [0.1, 1.0, 10.0])
    points = page("a").figures["Gradient norm"]["points"][0].split()
    y = [float(point.split(",")[1]) for point in points]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)


def test_a_run_of_one_step_has_a_page() -> None:
    write_run(Path("a"), [8.0])
    assert page("a").figures["Loss"]["points"]


def test_what_is_no_run_is_a_mistake(capsys) -> None:
    Path("a").mkdir()
    assert cli.main(["report", "a"]) == 2
    assert "a: not a run folder, it has no run.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["report", *"abcdefg"])
    assert "at most 6 runs fit on one page, got 7" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no headless browser here")
def test_a_browser_draws_the_page() -> None:
    write_run(Path("a"), [8.0, 7.5, 7.25])
    page("a")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu"]
    uri = Path("page.html").resolve().as_uri()
    result = subprocess.run(
        [*command, "--window-size=1366,900", "--screenshot=page.png", "--dump-dom", uri],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    # The script has run: each figure has a place for the values under the pointer.
    assert result.stdout.count('class="tip"') == len(PANELS) - 1
