"""A run on several sources: tokens, losses and epochs of each, the same in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.distributed import Workers
from tests.runs import build_trainer, read_metrics, train
from titan_lite.config.load import ConfigError, load_config
from titan_lite.config.render import json_schema, to_toml
from titan_lite.data.loader import Batch
from titan_lite.data.packing import IGNORED
from titan_lite.training.inputs import LossTerms

HALF = "--training.local_batch_size=4"
RUN = ("--training.steps=3", "--optimizer.eps=1e-6", "--data.packing=none")
CP2, TP2, PP2 = (f"--parallel.{axis}=2" for axis in ("cp", "tp", "pp"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three of them: one that ends within a run, and one that is rarer than once a step."""
    folder, tables = tmp_path_factory.mktemp("sources"), []
    for name, weight, count in (("sea", 5, 4), ("land", 3, 24), ("sky", 0.2, 24)):
        path = folder / f"{name}.jsonl"
        texts = (f"{i} {name} and more of it" * (2 + 5 * (i % 3)) for i in range(count))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tables.append(f'{{name = "{name}", weight = {weight}, dataset_path = "{path}"}}')
    return f"--data.sources=[{', '.join(tables)}]"


def _by_source(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k.startswith("source/")} for r in records]


def _by_hand(folder: Path, *overrides: str) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Losses of each source from whole logits of the model before each step."""
    trainer = build_trainer(folder, *overrides)
    names = [source.name for source in trainer.plan.config.data.sources]
    forward_backward, actual = trainer.built.train_step.forward_backward, []

    def look(batches: list[Batch], terms: LossTerms) -> Tensor:
        (batch,) = batches
        with torch.no_grad():
            logits = trainer.built.model(batch.inputs).transpose(1, 2)
        losses = cross_entropy(logits, batch.labels, reduction="none").sum(1)
        valid = (batch.labels != IGNORED).sum(1)
        rows = {name: batch.sources == number for number, name in enumerate(names)}
        means = {name: losses[rows].sum() / valid[rows].sum() for name, rows in rows.items()}
        actual.append({name: mean.item() for name, mean in means.items() if not mean.isnan()})
        return forward_backward(batches, terms)

    trainer.built.train_step.forward_backward = look  # type: ignore[method-assign,assignment]
    trainer.train()
    trainer.close()
    return actual, read_metrics(folder)


@pytest.fixture(scope="module")
def expected(
    sources: str, workers: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Records of one process, whose losses of each source are those of whole logits."""
    folder = tmp_path_factory.mktemp("one")
    by_hand, records = workers[1].run(_by_hand, folder, *RUN, sources)[0]
    for losses, record in zip(by_hand, _by_source(records), strict=True):
        logged = {k.split("/")[1]: v for k, v in record.items() if k.endswith("/loss")}
        assert logged == pytest.approx(losses, rel=1e-5)
    return records


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, (HALF,)),
        (2, (TP2,)),
        (2, (TP2, "--parallel.loss_parallel=false")),
        (2, (CP2,)),
        (2, (PP2, HALF)),
    ],
)
def test_every_layout_logs_the_sources_as_one_process_does(
    world_size: int,
    settings: tuple[str, ...],
    sources: str,
    expected: list[dict[str, Any]],
    workers: dict[int, Workers],
    tmp_path: Path,
) -> None:
    records = workers[world_size].run(train, tmp_path, *RUN, sources, *settings)[0]
    for got, wanted in zip(_by_source(records), _by_source(expected), strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], rel=1e-5)


@pytest.mark.distributed
def test_tokens_of_the_sources_add_up_and_a_source_not_drawn_has_no_loss(
    expected: list[dict[str, Any]],
) -> None:
    for record in expected:
        tokens = {k: v for k, v in record.items() if k.startswith("source/") and "tokens" in k}
        assert sum(tokens.values()) == record["tokens"]
    assert any("source/sky/loss" not in record for record in expected)
    assert all("source/sky/tokens" in record for record in expected)
    assert expected[-1]["source/sea/epochs"] > expected[-1]["source/sky/epochs"] == 0


def _train_resumed(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    save = ("--checkpoint.enable=true", "--checkpoint.interval=2")
    build = build_trainer(folder, *overrides, *save)
    try:
        for step in (1, 2):
            build.train_step(step)
        build.save()
    finally:
        build.close()
    return train(folder, *overrides, *save)


@pytest.mark.distributed
def test_a_resumed_run_counts_on(
    sources: str, expected: list[dict[str, Any]], workers: dict[int, Workers], tmp_path: Path
) -> None:
    records = workers[1].run(_train_resumed, tmp_path, *RUN, sources)[0]
    assert _by_source(records) == _by_source(expected)


def _problems(folder: Path, *overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as error:
        build_trainer(folder, *overrides)
    return [(problem.key, problem.message) for problem in error.value.problems]


A, B = '{name = "a", weight = 1}', '{name = "b", weight = 2.5}'


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ([f"--data.sources=[{A}, {A}]"], "data.sources", '2 sources have the name "a"'),
        (["--data.sources=[{weight = 1}]"], "data.sources", "table 1: name is missing"),
        (
            ['--data.sources=[{name = ""}]'],
            "data.sources",
            'name: expected a non-empty string, got ""',
        ),
        (
            [f'--data.sources=[{A}, {{name = "b", weight = 0}}]'],
            "data.sources",
            "table 2: weight: expected a number greater than 0, got 0",
        ),
        (
            ['--data.sources=[{name = "a", wieght = 1.0}]'],
            "data.sources",
            "table 1: unknown key wieght; did you mean",
        ),
        (
            ["--data.sources=c4"],
            "data.sources",
            'expected an array of tables, each with the head [[data.sources]], got "c4"',
        ),
        (
            ['--data.sources=["c4"]'],
            "data.sources",
            "expected an array of tables, each with the head [[data.sources]], got",
        ),
        (
            [f"--data.sources=[{A}, {B}]", "--data.dataset=c4"],
            "data.dataset",
            'data.dataset = "c4" cannot be combined with data.sources; set it in a table of',
        ),
        (
            ['--data.sources=[{name = "a", weight = 1, dataset_path = "none.jsonl"}]'],
            "data.sources.a.dataset_path",
            'no such file: "none.jsonl"',
        ),
        (
            ['--data.sources=[{name = "a", weight = 1, split = "test"}]'],
            "data.sources.a.split",
            'must be "train" or "validation" for the bundled',
        ),
        (
            [f"--data.sources=[{A}]", "--validation.enable=true"],
            "validation.enable",
            "with data.sources set, validation needs its own documents: set validation.",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    settings: list[str], key: str, message: str, tmp_path: Path
) -> None:
    ((found_key, found_message),) = _problems(tmp_path, *settings)
    assert found_key == key
    assert message in found_message


def test_tables_of_sources_are_read_written_and_described(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[[data.sources]]\nname = "a"\nweight = 1\n[[data.sources]]\nname = "b"\nweight = 2\n'
    )
    loaded = load_config(path)
    assert [(s.name, s.weight, s.split) for s in loaded.config.data.sources] == [
        ("a", 1, "train"),
        ("b", 2, "train"),
    ]
    path.write_text(to_toml(loaded))
    assert load_config(path).config == loaded.config
    described = json_schema({"llama": ["debug"]})["properties"]["data"]["properties"]["sources"][
        "items"
    ]
    assert described["required"] == ["name", "weight"]
