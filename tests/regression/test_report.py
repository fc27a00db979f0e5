"""The page of titan-lite report: what is on it, and that it needs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.regression.folders import segments, write_run
from titan_lite import cli
from titan_lite.regression.panels import COLUMNS, running_mean, thin
from titan_lite.regression.report import EXPERT_PANELS, PANELS


class Page(HTMLParser):
    """Figures by caption, table cells by row or by run, and what a page must not have."""

    VOID = ("meta", "line", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.notes: list[str] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[str]] = {}
        self.heads: list[str] = []
        self.external: list[str] = []
        self.attributes: dict[str, Any] = {}
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.external += [f"{tag} {k}" for k, _ in attrs if k in ("src", "href", "onclick")]
        if tag == "figure":
            self.attributes = {name: json.loads(value or "") for name, value in attrs}
        if tag == "button" and "figure" in self.open:
            self.attributes["log"] = dict(attrs)["aria-pressed"] == "true"
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
            self.heads = self.heads or self.cells[1:]
            self.rows[self.cells[0]] = self.cells[1:]

    def handle_data(self, data: str) -> None:
        if self.open[-2:] == ["figcaption", "span"]:
            self.figures[data.strip()] = self.attributes
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if self.open[-1:] == ["p"]:
            self.notes.append(data)

    def overview(self, run: str) -> dict[str, str]:
        """The cells of a run in the first table, by their heading."""
        return dict(zip(self.heads, self.rows[run], strict=True))


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
    records[1] |= {"checkpoint_blocked_seconds": 1.5, "validation/loss": 7.75}
    Path("a/metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    figures = page("a", "b").figures
    assert list(figures) == [title for title, *_ in PANELS]
    assert figures["Loss"]["data-lines"] == [[[1, 2, 3], [8.0, 7.5, 7.25]], [[1, 2], [8.0, 7.0]]]
    for title, value in (("Checkpoint stalls", 1.5), ("Validation loss", 7.75)):
        assert figures[title]["data-lines"] == [[[2], [value]], [[], []]]
    for figure in figures.values():
        assert figure["data-means"] == [None, None], "the values are few"
        # All panels have the same steps below each other.
        assert figure["data-steps"] == [1, 3]


def add_experts(folder: Path, **more: Any) -> None:
    """Adds metrics of two blocks with experts to each record."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record |= {
            "moe/load_max": 2.5 - record["step"] / 4,
            "moe/unused_experts": 3,
            "moe/entropy": 0.75,
            "moe/balance_loss": 0.004,
            "moe/load_max_per_layer": [1.25, 2.5 - record["step"] / 4],
            "moe/unused_experts_per_layer": [0, 3],
            "moe/entropy_per_layer": [0.875, 0.625],
            "moe/balance_loss_per_layer": [0.001, 0.003],
            **more,
        }
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))


def test_runs_with_experts_have_panels_and_a_table_of_blocks() -> None:
    blocks = [{"modules": ["tok_embeddings", "layers.0", "layers.1"]}, {"modules": ["layers.2"]}]
    write_run(Path("dense"), [8.0, 7.5])
    write_run(Path("moe"), [8.0, 7.5, 7.25], stages=blocks)
    assert not {title for title, *_ in EXPERT_PANELS} & page("dense", "moe").figures.keys()
    assert "Experts" not in Path("page.html").read_text()
    add_experts(Path("moe"))
    actual = page("dense", "moe")
    lines = actual.figures["Most loaded expert"]["data-lines"]
    assert lines == [[[], []], [[1, 2, 3], [2.25, 2.0, 1.75]]]
    for title, value in (("Experts without tokens", 3), ("Entropy of the loads", 0.75)):
        assert actual.figures[title]["data-lines"][1][1] == [value] * 3
    assert actual.figures["Balancing loss"]["data-lines"][1][1] == [0.004] * 3
    assert "Not logged: Most loaded EP rank, Largest bias" in actual.notes
    assert "no unit; 1 if all experts are used equally" in Path("page.html").read_text()
    # The first of three blocks is dense.
    row = "load 1.75, 3 experts without tokens, entropy 0.625, balancing loss 0.003"
    assert actual.rows["block 2"] == ["", row]
    assert actual.rows["block 1"][1].startswith("load 1.25, 0 experts without tokens")
    assert "block 0" not in actual.rows
    assert actual.rows["block 2"] == page("moe", "dense").rows["block 2"][::-1]


def test_a_block_whose_loss_is_nan_is_shown() -> None:
    write_run(Path("moe"), [8.0])
    add_experts(Path("moe"), **{"moe/balance_loss_per_layer": [0.001, "nan"]})
    assert page("moe").rows["block 1"][0].endswith("balancing loss nan")


def test_what_was_not_logged_is_named_and_takes_no_room() -> None:
    write_run(Path("a"), [8.0, 7.5])
    actual = page("a")
    assert "Not logged: Validation loss, Checkpoint stalls" in actual.notes
    assert not {"Validation loss", "Checkpoint stalls"} & actual.figures.keys()


def test_a_noisy_curve_has_a_running_mean_and_a_schedule_has_none() -> None:
    generator = np.random.default_rng(0)
    write_run(Path("a"), [6 + x for x in generator.normal(size=200)])
    figures = page("a").figures
    each, mean = (np.array(figures["Loss"][key][0][1]) for key in ("data-lines", "data-means"))
    assert len(each) == len(mean) == 200
    assert mean.std() < 0.6 * each.std()
    assert figures["Learning rate"]["data-means"] == [None]


def test_the_running_mean_keeps_lines_and_narrows_to_a_steep_begin() -> None:
    line = np.arange(1000.0)
    assert running_mean(line)[:950] == pytest.approx(line[:950])
    assert running_mean(np.ones(500)) == pytest.approx(np.ones(500))
    assert running_mean(1 / (1 + line))[0] == 1
    assert (running_mean(np.sin(line)) <= 1).all()


def test_speeds_leave_out_the_warm_up_and_other_curves_do_not() -> None:
    write_run(Path("a"), [8.0, 7.5, 7.25])
    lines = Path("a/metrics.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"warmup": True})
    Path("a/metrics.jsonl").write_text("\n".join(lines))
    actual = page("a")
    assert actual.figures["WPS"]["data-lines"] == [[[2, 3], [1002, 1003]]]
    assert actual.figures["Loss"]["data-lines"][0][0] == [1, 2, 3]
    assert actual.overview("a")["WPS, mean"] == "1,002"


def test_tables_say_settings_that_differ_what_was_applied_and_where_it_ran() -> None:
    write_run(
        Path("a"),
        [8.0, 7.5],
        None,
        "--optimizer.lr=1e-3",
        "--job.dump_folder=a",
        resumed_from_step=1,
    )
    write_run(Path("b"), [8.0, 7.5], None, "--optimizer.lr=1e-4", device="NVIDIA H200")
    actual = page("a", "b")
    rows = actual.rows
    assert rows["optimizer.lr"] == ["0.001", "0.0001"]
    assert "training.param_dtype" not in rows, "it is the same"
    assert "job.dump_folder" not in rows, "it always differs"
    assert rows["FSDP modules"] == ["1", "1"]
    assert rows["precision"] == ["float32", "float32"]
    assert rows["torch"] == ["2.13.0", "2.13.0"]
    assert rows["cpu capability"] == ["AVX2", "AVX2"]
    assert rows["device"] == ["AMD EPYC", "NVIDIA H200"]
    assert rows["commit"] == ["0123456789ab", "0123456789ab"]
    assert rows["resumed from step"] == ["1", "0"]
    assert actual.overview("b")["last loss"] == "7.5000"
    assert actual.overview("b")["steps"] == "2 of 10,000"
    # One run is held against the defaults.
    assert page("a").rows["training.param_dtype"] == ['"float32"']


def test_a_resumed_run_shows_the_settings_of_each_part_and_marks_where_it_was_resumed() -> None:
    # The last part has no step yet.
    lr = {0: 0.1, 2: 0.2, 3: 0.2, 4: 0.3}
    parts = segments(*((step, f"--optimizer.lr={value}") for step, value in lr.items()))
    parts[2] |= {"mesh": parts[2]["mesh"] | {"dp_shard": 4}, "git_commit": "fedcba9876543210"}
    write_run(Path("a"), [8.0, 7.5, 7.0, 6.5], None, "--optimizer.lr=0.3", segments=parts)
    write_run(Path("b"), [8.0, 7.5, 7.0, 6.5], None, "--optimizer.lr=0.1")
    actual = page("a", "b")
    assert actual.rows["optimizer.lr"] == ["0.1, then 0.2 from step 3", "0.1"]
    assert actual.rows["mesh"] == ["one process, then dp_shard 4 from step 4", "one process"]
    assert actual.rows["commit"][0] == "0123456789ab, then fedcba987654 from step 4"
    assert actual.rows["resumed from step"] == ["2, 3", "0"]
    assert actual.overview("a")["devices"] == "1 x AMD EPYC, then 4 x AMD EPYC from step 4"
    assert actual.overview("a")["steps"] == "4 of 10,000, resumed at 2, 3"
    assert all(figure["data-resumes"] == [[2, 3], []] for figure in actual.figures.values())
    assert "An upright dotted line marks a resume." in "".join(actual.notes)


def test_many_resumes_are_counted() -> None:
    parts = segments(*((step, "--optimizer.lr=0.1") for step in range(6)))
    write_run(Path("a"), [8.0] * 6, segments=parts)
    assert page("a").overview("a")["steps"] == "6 of 10,000, resumed 5 times"


def test_the_page_needs_no_other_file_and_no_network() -> None:
    write_run(Path("a"), [8.0, 7.5])
    actual, text = page("a"), Path("page.html").read_text()
    assert actual.external == []
    assert not re.search(r"https?:|url\(|@import|<link|fetch\(|import ", text)
    assert "prefers-color-scheme: dark" in text


def test_what_runs_contain_cannot_become_markup() -> None:
    evil = '</script><img src=x onerror="alert(1)">\'&'
    write_run(Path("a"), [8.0, 7.5], None, f"--job.description={json.dumps(evil)}", device=evil)
    actual, text = page("a"), Path("page.html").read_text()
    assert "<img" not in text
    assert f"a{evil}" in actual.rows, "the description stands below the name"
    assert actual.rows["device"] == [evil]
    assert text.count("</script>") == 1


def test_values_that_are_not_finite_are_told() -> None:
    write_run(Path("a"), [8.0, "nan", 7.5, "inf"])
    write_run(Path("b"), [8.0, "nan"])
    actual = page("a", "b")
    assert "a: NaN or Inf at 2 steps, first at 2" in actual.notes
    assert "b: NaN or Inf at 1 step, first at 2" in actual.notes
    assert actual.figures["Loss"]["data-lines"] == [[[1, 3], [8.0, 7.5]], [[1], [8.0]]]


def test_ten_thousand_steps_keep_their_extremes_and_stay_small() -> None:
    loss = [6 + 1 / step for step in range(1, 10_001)]
    loss[5_000] = 9.5
    for name in ("a", "b", "c"):
        write_run(Path(name), loss)
    steps, values = page("a", "b", "c").figures["Loss"]["data-lines"][0]
    assert values[steps.index(5_001)] == 9.5
    assert min(values) == pytest.approx(min(loss), abs=1e-4)
    assert Path("page.html").stat().st_size < 2e6


def test_thinning_keeps_the_least_and_the_most_of_each_column_in_order() -> None:
    generator = np.random.default_rng(0)
    steps, values = np.arange(1.0, 20_001), generator.normal(size=20_000)
    x, y = thin(steps, values, 1, 20_000)
    assert len(x) <= 2 * COLUMNS
    assert (np.diff(x) > 0).all()
    assert {values.min(), values.max()} <= set(y.tolist())
    assert (y == values[x.astype(int) - 1]).all()


def test_a_wide_range_of_norms_starts_with_a_logarithmic_axis() -> None:
    for name, norms in (("wide", [0.1, 1.0, 10.0]), ("narrow", [1.0, 2.0, 3.0])):
        write_run(Path(name), [8.0, 7.0, 6.0], norms)
        assert page(name).figures["Gradient norm"]["log"] == (name == "wide")
    assert not page("wide").figures["Loss"]["log"]


def test_a_run_of_one_step_has_a_page() -> None:
    write_run(Path("a"), [8.0])
    assert page("a").figures["Loss"]["data-steps"] == [1, 2]


def test_lines_end_between_the_words_of_names_and_nowhere_within_numbers() -> None:
    name = "runs/7b_lr-high.v2"
    write_run(Path(name), [8.0], None, "--optimizer.lr=1e-5")
    page(name)
    text = Path("page.html").read_text()
    assert "runs/<wbr>7b_<wbr>lr-<wbr>high.<wbr>v2" in text
    assert "optimizer.<wbr>lr" in text
    assert ">1e-05<" in text


def test_small_numbers_and_small_pages_are_not_rounded_to_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(Path("a"), [2e-5], [3e-6])
    tiny = json.loads(Path("a/metrics.jsonl").read_text())
    tiny |= {"wps": 0.25, "mfu": 0.0004, "seconds_per_step": 0.00012, "memory_gib": 0.0031}
    Path("a/metrics.jsonl").write_text(json.dumps(tiny))
    shown = page("a").overview("a")
    assert shown["last loss"] == "2e-05"
    assert shown["last gradient norm"] == "3e-06"
    assert shown["WPS, mean"] == "0.25"
    assert shown["MFU, mean"] == "0.0004 %"
    assert shown["step, median"] == "0.00012 s"
    assert shown["memory, peak"] == "0.0031 GiB"
    assert re.fullmatch(r"page.html: \d\d\.\d kB\n", capsys.readouterr().out)


def test_what_is_no_run_is_a_mistake(capsys) -> None:
    Path("a").mkdir()
    assert cli.main(["report", "a"]) == 2
    assert "a: not a run folder, it has no run.json" in capsys.readouterr().err
    checkpoint = write_run(Path("runs/b"), [8.0]) / "checkpoint" / "step-1"
    checkpoint.mkdir(parents=True)
    for given in ("runs", "runs/b/checkpoint", "runs/b/checkpoint/step-1"):
        for command in (["report", given], ["compare", "runs/b", given]):
            assert cli.main(command) == 2
            assert f'{given}: not a run folder, it has no run.json; did you mean "runs/b"?' in (
                capsys.readouterr().err
            )
    with pytest.raises(SystemExit):
        cli.main(["report", *"abcdefg"])
    assert "at most 6 runs fit on one page, got 7" in capsys.readouterr().err


def test_options_are_written_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", "runs/a", "--out=page.html"])
    assert "unrecognized arguments: --out=page.html" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(Path("a"), [8.0])

    def write_text(path: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", write_text)
    assert cli.main(["report", "a", "-o", "page.html"]) == 1
    assert capsys.readouterr().err == (
        "titan-lite: page.html cannot be written: No space left on device\n"
    )
