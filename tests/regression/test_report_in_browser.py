"""The page of titan-lite report in a browser: laptop, tablet and phone, light and dark."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.regression.folders import record, write_run
from titan_lite import cli
from titan_lite.regression import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
LAPTOP, TABLET, PHONE = (1366, 768), (768, 1024), (400, 850)
STYLE = Path(report.__file__).with_suffix(".css").read_text()

# Put around the page's own script: errors, and what a user would see.
LISTEN = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
console.error = console.warn = (...words) => errors.push(words.join(" "));
</script>"""
TOOLS = r"""
const figures = [...document.querySelectorAll("figure")];
const boxes = (nodes) => [...nodes].map((node) => node.getBoundingClientRect());
const overlap = (a, b) =>
  a.left < b.right && b.left < a.right && a.top < b.bottom - 3 && b.top < a.bottom - 3;
// The texts of a figure's axes that satisfy a condition on their box, those after it, the drawing.
const labels = (condition) => figures.map((figure) => {
  const all = boxes(figure.querySelectorAll("text"));
  const edge = figure.querySelector("svg").getBoundingClientRect();
  return all.filter((box, i) => condition(box, all.slice(i + 1), edge)).length;
});
// Each word below an element, with the number of lines that it stands on.
const words = (element) => {
  const found = [];
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  while (walker.nextNode())
    for (const { 0: word, index } of walker.currentNode.data.matchAll(/[\p{L}\p{N}]+/gu)) {
      const range = document.createRange();
      range.setStart(walker.currentNode, index);
      range.setEnd(walker.currentNode, index + word.length);
      found.push([word, new Set([...range.getClientRects()].map((box) => box.top)).size]);
    }
  return found;
};
// The tip and the cursor with the pointer at a share of the axis of steps.
const point = (figure, share) => {
  const svg = figure.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const x = box.left + LEFT + share * (box.width - LEFT - RIGHT);
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: box.top }));
  const shown = [...figure.querySelector(".tip").childNodes].map((node) => node.textContent);
  const cursor = svg.querySelector(".cursor").getAttribute("visibility");
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  return [...shown, cursor];
};
const texts = (nodes) => [...nodes].map((node) => node.textContent);
const state = () => ({
  pressed: [...document.querySelectorAll("header button")].map((button) => button.ariaPressed),
  log: figures.map((figure) => figure.querySelector("button").ariaPressed),
  runs: figures.map((figure) => [0, 1, 2].filter((run) => figure.querySelector(`svg .run${run}`))),
  resumes: figures.map((figure) => [...figure.querySelectorAll(".resume")].map((line) => {
    const { x1, x2 } = line;
    const share = (x1.baseVal.value - LEFT) / (line.ownerSVGElement.clientWidth - LEFT - RIGHT);
    return [line.getAttribute("class"), x1.baseVal.value - x2.baseVal.value, share];
  })),
  labels: figures.map((figure) => texts(figure.querySelectorAll("text"))),
  paths: figures.map((figure) => [...figure.querySelectorAll("path")].map(
    (path) => path.getAttribute("d"))),
  notes: texts(document.querySelectorAll(".note")),
  warnings: [...document.querySelectorAll(".warning")].map((warning) => warning.checkVisibility()),
});
const press = (button) => {
  button.focus();
  // Enter and the space bar click a button that has the focus.
  if (document.activeElement === button && button.type === "button") button.click();
  return state();
};
const look = () => {
  scrollTo(0, 900);
  const isSticky = document.querySelector("header").getBoundingClientRect().top === 0;
  scrollTo(0, 0);
  return {
    isSticky,
    width: document.documentElement.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor,
    firstCurve: figures[0].getBoundingClientRect(),
    covering: labels((box, others) => others.some((other) => overlap(box, other))),
    outside: labels((box, _, edge) => box.left < edge.left || box.right > edge.right),
    fonts: [...document.querySelectorAll("figure text")].map((text) => {
      const svg = text.ownerSVGElement;
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      return scale * parseFloat(getComputedStyle(text).fontSize);
    }),
    words: words(document.body),
    tables: [...document.querySelectorAll(".scroll")].map((table) => {
      const hint = table.nextElementSibling;
      const first = table.querySelector("tbody th");
      const hints = [hint.checkVisibility() ? hint.textContent : ""];
      table.focus();
      table.scrollLeft = table.scrollWidth;
      table.onscroll();
      hints.push(hint.checkVisibility() ? hint.textContent : "");
      const offset = first.getBoundingClientRect().left - table.getBoundingClientRect().left;
      table.scrollLeft = 0;
      table.onscroll();
      return { hints, offset, hasFocus: document.activeElement === table };
    }),
    names: texts(document.querySelectorAll("header li")),
    strokes: [...document.querySelectorAll("header line")].map(
      (line) => getComputedStyle(line).stroke),
  };
};
"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no headless browser here")


def open_page(page: Path, probe: str, size: tuple[int, int], dark: bool = False) -> tuple[Any, Any]:
    """The value of a JavaScript expression, and the picture of (height, width, 3) in 0 to 255."""
    image = pytest.importorskip("matplotlib.image")
    text = page.read_text().replace("<head>", f"<head>{LISTEN}")
    requests = 'performance.getEntriesByType("resource").map((entry) => entry.name)'
    seen = f"parent.document.body.dataset.seen = JSON.stringify([{probe}, errors, {requests}])"
    text = text.replace("</body>", f"<script>{TOOLS}{seen}</script></body>")
    # In a frame: no window is as narrow as a phone.
    style = f"border: 0; display: block; width: {size[0]}px; height: {size[1]}px"
    frame = f'<iframe style="{style}" srcdoc="{html.escape(text)}"></iframe>'
    watched = page.with_name("watched.html")
    watched.write_text(f'<!doctype html><body style="margin: 0">{frame}</body>')
    picture = page.with_suffix(".png")
    picture.unlink(missing_ok=True)
    # Chromium wants no sandbox of root's, and a folder that no other one has open.
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", "--disable-default-apps", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={page.with_name('profile')}", "--disable-dev-shm-usage"]
    command += [
        f"--window-size={max(size[0], 600)},{size[1]}",
        f"--screenshot={picture}",
        "--dump-dom",
    ]
    if dark:
        command.append("--blink-settings=preferredColorScheme=0")
    result = subprocess.run(
        [*command, watched.as_uri()],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
        env=os.environ | {"HOME": str(page.parent)},
    )
    actual = re.search(r'data-seen="([^"]*)"', result.stdout)
    assert actual, "the scripts did not run to their end"
    value, errors, requests = json.loads(html.unescape(actual[1]))
    assert errors == []
    assert requests == []
    return value, 255 * image.imread(picture)[: size[1], : size[0], :3]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: a long one, one that stopped early, one that diverged."""
    folder = tmp_path_factory.mktemp("report")
    generator = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs = (
            ("outputs/llama_baselinewithwarmup-2026", 12_000),
            ("stopped", 3_000),
            ("diverged", 9_000),
        )
        for name, steps in runs:
            loss = list(2 + 6 * np.arange(1, steps + 1) ** -0.3 + generator.normal(0, 0.05, steps))
            norms = list(np.exp(generator.normal(-1, 0.8, steps)))
            if name == "diverged":
                loss[-1] = "nan"
            write_run(Path(name), loss, norms, "--job.description=of a name that wraps")
        names = [name for name, _ in runs]
        assert cli.main(["report", *names, "-o", "page.html"]) == 0
    return folder / "page.html"


def rgb(name: str, *, dark: bool) -> tuple[int, ...]:
    """A colour of the style sheet, of its light or dark part."""
    value = re.findall(rf"--{name}: #([0-9a-f]+);", STYLE)[dark]
    value = value if len(value) == 6 else "".join(2 * digit for digit in value)
    return tuple(int(value[i : i + 2], 16) for i in (0, 2, 4))


TICKS = [
    (0, 10, False, "0 2 4 6 8 10"),
    (5.9, 8.2, False, "6 6.5 7 7.5 8"),
    (0, 1.1e-4, False, "0 5e-5 1e-4"),
    (7.9371, 7.9372, False, "7.9371 7.93712 7.93714 7.93716 7.93718 7.9372"),
    (0, 2.2e8, False, "0 5e7 1e8 1.5e8 2e8"),
    (-3, 3, False, "-2 0 2"),
    (0.3, 40, True, "0.5 1 2 5 10 20"),
    (2.1, 8.2, True, "4 6 8"),
    (1e-3, 1e4, True, "0.001 0.01 0.1 1 10 100 1,000 10,000"),
    (1e-8, 1e8, True, "1e-8 1e-6 1e-4 0.01 1 100 10,000 1,000,000 1e8"),
]
AXES = [{"low": low, "high": high, "log": log} for low, high, log, _ in TICKS]
PROBE = f"""{{
  ...look(),
  middle: point(figures[0], 0.5),
  end: point(figures[0], 1),
  left: texts(document.querySelectorAll(".tip")),
  ticks: {json.dumps(AXES)}.map((axis) => ticks(axis, 5).map(([, words]) => words).join(" ")),
  steps: ticks({{low: 1, high: 3}}, 6, true).map(([step]) => step),
}}"""


@pytest.fixture(scope="module")
def laptop(page: Path) -> tuple[Any, Any]:
    return open_page(page, PROBE, LAPTOP)


def test_a_laptop_shows_the_page(laptop: tuple[Any, Any]) -> None:
    check_screen(*laptop, LAPTOP, dark=False)


@pytest.mark.parametrize(
    ("size", "dark"), [(TABLET, True), (PHONE, False)], ids=["tablet", "phone"]
)
def test_a_smaller_screen_shows_the_page(page: Path, size: tuple[int, int], dark: bool) -> None:
    check_screen(*open_page(page, PROBE, size, dark), size, dark=dark)


def check_screen(seen: dict[str, Any], picture: Any, size: tuple[int, int], *, dark: bool) -> None:
    assert seen["width"] == size[0], "nothing to scroll sideways"
    assert seen["background"] == f"rgb{rgb('page', dark=dark)}"
    assert seen["firstCurve"]["bottom"] < size[1], "the loss is on the first screen"
    assert len(seen["covering"]) == 7
    assert not any(seen["covering"]), "labels that cover each other"
    assert not any(seen["outside"]), "labels that are cut off"
    assert min(seen["fonts"]) >= 10, "pixels on the screen"
    assert len(seen["words"]) > 100
    assert [word for word, lines in seen["words"] if lines > 1] == [], "broken inside"
    assert seen["isSticky"], "the legend stays while one scrolls"
    assert seen["names"] == ["outputs/llama_baselinewithwarmup-2026", "stopped", "diverged"]
    assert seen["strokes"] == [f"rgb{rgb(f'run{number}', dark=dark)}" for number in range(3)]
    assert picture.shape[:2] == (size[1], size[0])
    assert tuple(picture[-1, 2].round()) == rgb("page", dark=dark)
    for number in range(3):
        near = np.abs(picture - rgb(f"run{number}", dark=dark)).max(axis=2) < 3
        assert near.sum() > (300 if size == LAPTOP else 100), f"run{number} is not to be seen"
    right, left = "more columns to the right: scroll sideways", "more columns to the left"
    assert seen["tables"][0]["hints"] == (["", ""] if size == LAPTOP else [right, left])
    for table in seen["tables"]:
        assert table["hasFocus"], "the arrow keys scroll it"
        assert table["offset"] == 0, "the first column stays"


def test_the_pointer_shows_the_values_of_the_runs_that_were_there(laptop: tuple[Any, Any]) -> None:
    seen, _ = laptop
    step, *values, cursor = seen["middle"]
    assert step.startswith("step 6,0"), "of 12,000"
    assert len(values) == 2, "one of the three had stopped"
    assert all(2 < float(value) < 3 for value in values)
    assert cursor == "visible"
    assert len(seen["end"]) == 3
    assert seen["left"] == [""] * 7


def test_ticks_are_round_numbers_with_the_digits_that_distinguish_them(
    laptop: tuple[Any, Any],
) -> None:
    seen, _ = laptop
    assert seen["ticks"] == [words for *_, words in TICKS]
    assert seen["steps"] == [1, 2, 3], "whole numbers, also where there are few"


def write_values(**values: Sequence[float | str]) -> None:
    """A page of runs, resumed after step 2, with these losses; their MFU is the same number."""
    for name, losses in values.items():
        write_run(Path(name), losses, resumed_from_step=2)
        records = [
            record(step, loss, 1.0) | {"mfu": loss} for step, loss in enumerate(losses, start=1)
        ]
        Path(name, "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert cli.main(["report", *values, "-o", "page.html"]) == 0


def heights(path: str) -> list[float]:
    return [float(y) for y in re.findall(r"[ML][\d.]+,(-?[\d.]+)", path)]


def test_a_hidden_run_leaves_all_panels_which_rescale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_values(high=[800.0, 700.0, "nan"], low=[4.0, 3.0, 2.0])
    probe = """[state(), ...[...document.querySelectorAll("header button")].map(press),
      point(figures[0], 0.5), press(document.querySelector("header button"))]"""
    (start, without_high, without_any, tip, without_low), _ = open_page(
        tmp_path / "page.html", probe, LAPTOP
    )
    assert start["pressed"] == ["true", "true"]
    assert start["runs"] == [[0, 1]] * 7
    marks = [[f"run{number} resume", 0, pytest.approx(0.5, abs=0.01)] for number in range(2)]
    assert start["resumes"] == [marks] * 7, "of steps 1 to 3"
    assert without_high["resumes"] == [marks[1:]] * 7
    assert start["warnings"] == [True, True], "of loss and MFU"
    assert without_high["pressed"] == ["false", "true"]
    assert without_high["runs"] == [[1]] * 7
    assert without_high["warnings"] == [False, False]
    assert start["labels"][0][:5] == ["0", "200", "400", "600", "800"]
    assert without_high["labels"][0][:5] == ["2", "2.5", "3", "3.5", "4"]
    assert without_any["runs"] == [[]] * 7
    assert without_any["notes"] == ["no run to show"] * 7
    assert tip == ["hidden"], "of the cursor"
    assert without_low["pressed"] == ["true", "false"]
    assert without_low["runs"] == [[0]] * 7


def test_a_logarithmic_axis_takes_any_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_values(decades=[1000.0, 100.0, 10.0, 1.0], signs=[100.0, 0.0, -5.0, 10.0], zero=[0.0] * 4)
    probe = """[state(), press(figures[0].querySelector("button")),
      ...[0, 1].map((run) => press(document.querySelectorAll("header button")[run])),
      press(figures[0].querySelector("button"))]"""
    (start, log, _, only_zero, linear), _ = open_page(tmp_path / "page.html", probe, PHONE)
    assert start["log"] == ["false"] * 7
    assert log["log"] == ["true"] + ["false"] * 6
    assert log["paths"][1:] == start["paths"][1:], "the other panels stay"
    decades, dots, signs, *_ = log["paths"][0]
    assert np.diff(np.diff(heights(decades))) == pytest.approx([0, 0], abs=0.21)
    assert dots.count("M") == 4, "so few values are dots"
    # Two values on their own: the line has a gap between them.
    assert signs.count("M") == 2
    assert heights(signs) == heights(decades)[1:3]
    assert log["labels"][0][:4] == ["1", "10", "100", "1,000"]
    assert log["notes"][0] == "values at or below 0 are left out"
    assert only_zero["notes"][0] == "no value above 0 for a logarithmic axis"
    assert len(heights(only_zero["paths"][0][0])) == 4
    assert linear["notes"] == [""] * 7
    everything = json.dumps([start, log, only_zero, linear])
    assert "NaN" not in everything
    assert "Infinity" not in everything


def luminance(color: tuple[int, ...]) -> float:
    shares = [c / 255 for c in color]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_curves_stand_out_from_what_is_behind_them(dark: bool) -> None:
    """By WCAG 2.1's contrast ratio for text, 4.5."""
    for name in ("ink", "faint", *(f"run{number}" for number in range(report.MAX_RUNS))):
        for behind in ("page", "card"):
            two = sorted(luminance(rgb(color, dark=dark)) for color in (name, behind))
            assert (two[1] + 0.05) / (two[0] + 0.05) >= 4.5, (name, behind)
