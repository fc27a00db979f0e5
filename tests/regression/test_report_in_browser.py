"""The page of titan-lite report as a browser draws it, on a laptop's screen, light and dark."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.regression.folders import write_run
from titan_lite import cli
from titan_lite.regression import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
SIZE = (1366, 768)
STYLE = Path(report.__file__).with_suffix(".css").read_text()

# Put around the page's own script: what went wrong, and what a user would see.
LISTEN = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
console.error = console.warn = (...words) => errors.push(words.join(" "));
</script>"""
LOOK = """<script>
const boxes = (nodes) => [...nodes].map((node) => node.getBoundingClientRect());
const overlap = (a, b) =>
  a.left < b.right && b.left < a.right && a.top < b.bottom - 3 && b.top < a.bottom - 3;
const figures = [...document.querySelectorAll("figure")];
const covering = figures.map((figure) => {
  const labels = boxes(figure.querySelectorAll("text"));
  return labels.filter((a, i) => labels.some((b, j) => i < j && overlap(a, b))).length;
});
const outside = figures.map((figure) => {
  const edge = figure.querySelector("svg").getBoundingClientRect();
  return boxes(figure.querySelectorAll("text")).filter(
    (box) => box.left < edge.left || box.right > edge.right).length;
});
const point = (figure, share) => {
  const [left, right] = JSON.parse(figure.dataset.axes);
  const svg = figure.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const x = ((left + share * (right - left)) / svg.viewBox.baseVal.width) * box.width;
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + x, clientY: box.top }));
  const shown = [...figure.querySelector(".tip").childNodes].map((node) => node.textContent);
  const cursor = svg.querySelector(".cursor").getAttribute("visibility");
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  return [...shown, cursor];
};
scrollTo(0, 900);
const sticks = document.querySelector("header").getBoundingClientRect().top === 0;
scrollTo(0, 0);
const seen = {
  errors,
  requests: performance.getEntriesByType("resource").map((entry) => entry.name),
  width: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor,
  tips: document.querySelectorAll(".tip").length,
  firstCurve: figures[0].getBoundingClientRect(),
  covering, outside, sticks,
  names: [...document.querySelectorAll("header li")].map((item) => item.textContent),
  strokes: [...document.querySelectorAll("header line")].map(
    (line) => getComputedStyle(line).stroke),
  middle: point(figures[0], 0.5),
  end: point(figures[0], 1),
  left: figures[0].querySelector(".tip").textContent,
};
document.documentElement.dataset.seen = JSON.stringify(seen);
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no headless browser here")


def open_page(page: Path, *flags: str) -> tuple[dict[str, Any], Any]:
    """What the probe saw, and the picture as an array of (height, width, 3) in 0 to 255."""
    image = pytest.importorskip("matplotlib.image")
    text = page.read_text().replace("<head>", f"<head>{LISTEN}")
    watched = page.with_name("watched.html")
    watched.write_text(text.replace("</body>", f"{LOOK}</body>"))
    picture = page.with_suffix(".png")
    picture.unlink(missing_ok=True)
    # Chromium wants no sandbox of root's, and a folder that no other one has open.
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", "--disable-default-apps", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={page.with_name('profile')}", "--disable-dev-shm-usage"]
    command += [f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={picture}", "--dump-dom"]
    result = subprocess.run(
        [*command, *flags, watched.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"HOME": str(page.parent)},
    )
    found = re.search(r'data-seen="([^"]*)"', result.stdout)
    assert found, "the scripts did not run to their end"
    return json.loads(html.unescape(found[1])), 255 * image.imread(picture)[:, :, :3]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: a long one, one that stopped early, one that diverged."""
    folder = tmp_path_factory.mktemp("report")
    generator = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, steps in (("baseline", 12_000), ("stopped", 3_000), ("diverged", 9_000)):
            loss = list(2 + 6 * np.arange(1, steps + 1) ** -0.3 + generator.normal(0, 0.05, steps))
            norms = list(np.exp(generator.normal(-1, 0.8, steps)))
            if name == "diverged":
                loss[-1] = "nan"
            write_run(Path(name), loss, norms, "--job.description=of a name that wraps")
        assert cli.main(["report", "baseline", "stopped", "diverged", "-o", "page.html"]) == 0
    return folder / "page.html"


def rgb(name: str, *, dark: bool) -> tuple[int, ...]:
    """A colour of the style sheet, of its light or dark part."""
    value = re.findall(rf"--{name}: #([0-9a-f]+);", STYLE)[dark]
    value = value if len(value) == 6 else "".join(2 * digit for digit in value)
    return tuple(int(value[i : i + 2], 16) for i in (0, 2, 4))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_laptop_shows_the_page(page: Path, dark: bool) -> None:
    flags = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    seen, picture = open_page(page, *flags)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["width"] == SIZE[0], "nothing to scroll sideways"
    assert seen["background"] == f"rgb{rgb('page', dark=dark)}"
    assert seen["firstCurve"]["bottom"] < SIZE[1], "the loss is on the first screen"
    assert seen["tips"] == len(seen["covering"]) == 7
    assert not any(seen["covering"]), "labels that cover each other"
    assert not any(seen["outside"]), "labels that are cut off"
    assert seen["sticks"], "the legend stays while one scrolls"
    assert seen["names"] == ["baseline", "stopped", "diverged"]
    assert seen["strokes"] == [f"rgb{rgb(f'run{number}', dark=dark)}" for number in range(3)]
    assert picture.shape[:2] == (SIZE[1], SIZE[0])
    assert tuple(picture[-1, 2].round()) == rgb("page", dark=dark)
    for number in range(3):
        near = np.abs(picture - rgb(f"run{number}", dark=dark)).max(axis=2) < 3
        assert near.sum() > 300, f"run{number} is not to be seen"


def test_the_pointer_shows_the_values_of_the_runs_that_were_there(page: Path) -> None:
    seen, _ = open_page(page)
    step, *values, cursor = seen["middle"]
    assert step.startswith("step 6,0"), "of 12,000"
    assert len(values) == 2, "one of the three had stopped"
    assert all(2 < float(value) < 3 for value in values)
    assert cursor == "visible"
    assert len(seen["end"]) == 3
    assert seen["left"] == ""


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
