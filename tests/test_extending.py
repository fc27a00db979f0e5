"""The plugins that docs/extending.md shows, run as a user would: outside the package."""

import json
import re
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.distributed import Workers
from tests.runs import TINY, train, train_and_gather
from titan_lite.config.load import ConfigError
from titan_lite.data.assets import bundled_asset
from titan_lite.models.plan import make_plan

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
SHORT = ("--training.steps=3", "--training.local_batch_size=2", "--training.global_batch_size=4")
PLUGINS = {
    name: tuple(
        f"--{table}.{line.replace(' = ', '=')}"
        for table, lines in re.findall(r"\[(\w+)\]\n((?:\w.*\n)+)", toml)
        for line in lines.splitlines()
    )
    for toml in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    for name in re.findall(r'"(my_\w+)\.setup"', toml)
}
"""The overrides of each example by its package."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of the page."""
    folder = tmp_path_factory.mktemp("packages")
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code, encoding="utf-8")
    return folder


def run(packages: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Trains with packages on the path, in a worker, which keeps what they register."""
    if str(packages) not in sys.path:
        sys.path.insert(0, str(packages))
    return train(folder, *SHORT, *overrides)


def steps_of_weights(packages: Path, folder: Path, *overrides: str) -> list[tuple[Any, Any, Any]]:
    """Each weight before and after the only step, with its gradient."""
    sys.path.insert(0, str(packages))
    _, tensors = train_and_gather(folder, *SHORT, *overrides)
    moments = ("initial weights", "gradients of step 1", "final weights")
    return [tuple(tensors[moment][name] for moment in moments) for name in tensors[moments[0]]]


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


def test_the_page_has_an_example_of_each_seam() -> None:
    assert PLUGINS.keys() == {"my_sgd", "my_sqlite", "my_csv", "my_schedule", "my_groups"}


def test_an_optimizer_of_a_plugin_steps_as_torch_does(
    packages: Path, tmp_path: Path, one_process: Workers
) -> None:
    plain = ("--optimizer.weight_decay=0.0", "--training.max_norm=0.0", "--training.steps=1")
    rate = (
        "--optimizer.lr=0.5",
        "--lr_scheduler.warmup_steps=0",
        "--lr_scheduler.decay_type=constant",
    )
    settings = (*PLUGINS["my_sgd"], *plain, *rate)
    (steps,) = one_process.run(steps_of_weights, packages, tmp_path, *settings)
    assert steps
    for before, gradient, after in steps:
        assert (after == before - 0.5 * gradient).all()


def test_a_database_gives_the_samples_of_its_texts_and_a_sink_every_record(
    packages: Path, tmp_path: Path, one_process: Workers
) -> None:
    lines = bundled_asset("corpus/validation.jsonl").read_text(encoding="utf-8").splitlines()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    books = tmp_path / "books.sqlite"
    with sqlite3.connect(books) as database:
        database.execute("CREATE TABLE books (id INTEGER PRIMARY KEY, text TEXT)")
        texts = [json.loads(line)["text"] for line in lines]
        # Number 0 goes to stream 0, as of a file.
        database.executemany("INSERT INTO books VALUES (?, ?)", enumerate(texts, start=4))
    plugins = "--job.plugins=['my_sqlite.setup', 'my_csv.setup']"
    (records,) = one_process.run(
        run,
        packages,
        tmp_path / "a",
        plugins,
        f"--data.dataset_path={books}",
        *PLUGINS["my_csv"][1:],
    )
    (expected,) = one_process.run(run, packages, tmp_path / "b", f"--data.dataset_path={corpus}")
    assert losses(records) == losses(expected)
    rows = (tmp_path / "a" / "loss.csv").read_text().splitlines()
    assert rows == [f"{record['step']},{record['loss']}" for record in records]


def test_the_example_of_a_sink_drops_the_steps_that_a_resumed_run_writes_again(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(packages)
    from my_csv.sink import CsvSink

    for start_step in (0, 2):
        sink = CsvSink(SimpleNamespace(folder=tmp_path, start_step=start_step))
        for step in range(start_step + 1, start_step + 4):
            sink.write({"step": step, "loss": 10 * start_step + step})
        sink.close()
    assert (tmp_path / "loss.csv").read_text() == "1,1\n2,2\n3,23\n4,24\n5,25\n"


def test_a_schedule_of_a_plugin_runs_a_step_that_1f1b_refuses(
    packages: Path, tmp_path: Path, workers: Mapping[int, Workers]
) -> None:
    one_batch = "--parallel.pp_micro_batches=1"
    records, _ = workers[2].run(run, packages, tmp_path / "a", *PLUGINS["my_schedule"], one_batch)
    expected, _ = workers[2].run(
        run, packages, tmp_path / "b", "--parallel.pp=2", "--parallel.pp_schedule=GPipe", one_batch
    )
    assert losses(records) == losses(expected)
    with pytest.raises(ConfigError, match="requires at least 2 micro-batches"):
        make_plan(None, [*TINY, *SHORT, "--parallel.pp=2", one_batch])


def test_a_family_with_parameters_of_three_dimensions_trains_alike_on_one_and_two_ranks(
    packages: Path, tmp_path: Path, workers: Mapping[int, Workers]
) -> None:
    (expected,) = workers[1].run(run, packages, tmp_path / "one", *PLUGINS["my_groups"])
    for axis in ("tp", "dp_shard"):
        settings = (*PLUGINS["my_groups"], f"--parallel.{axis}=2")
        records, _ = workers[2].run(run, packages, tmp_path / axis, *settings)
        assert losses(records) == pytest.approx(losses(expected), rel=1e-5), axis
        assert records[-1]["grad_norm"] == pytest.approx(expected[-1]["grad_norm"], rel=1e-4), axis
