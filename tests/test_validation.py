"""The loss over held-out documents: one number in every layout, and no trace in the training."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed import Workers
from tests.runs import build_trainer, compiled_by, read_metrics, splits_backward, train
from titan_lite.config.load import ConfigError
from titan_lite.config.schema import Data, Parallel, Validation
from titan_lite.data.assets import bundled_asset
from titan_lite.data.held_out import HeldOut, read_held_out, resolve_held_out
from titan_lite.data.loader import Batch
from titan_lite.data.packing import IGNORED
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.parallel.pipeline import forward_ticks, local_stages, rank_of_stage

ON = ("--validation.enable=true", "--validation.interval=2", "--validation.steps=2")
RUN = ("--training.steps=3", "--optimizer.eps=1e-6", "--model.num_layers=4")
CP2, TP2, PP2 = (f"--parallel.{axis}=2" for axis in ("cp", "tp", "pp"))
DOCUMENT, HALF = "--data.packing=document", "--training.local_batch_size=4"
QUARTER = "--training.local_batch_size=2"
FLOAT8 = (HALF, "--float8.recipe=tensorwise", "--float8.emulate=true")
COMPILE = "--compile.enable=true"
# Processes and settings; of the pipeline's schedules each way of dealing stages to ranks.
LAYOUTS = (
    (1, (HALF,)),
    (2, (HALF,)),
    (2, (TP2,)),
    (2, (CP2, "--parallel.cp_method=ulysses")),
    (2, (PP2, QUARTER)),
    (2, (PP2, QUARTER, "--parallel.pp_schedule=Interleaved1F1B")),
    pytest.param(
        2,
        (PP2, QUARTER, "--parallel.pp_schedule=ZBVZeroBubble", "--parallel.pp_micro_batches=2"),
        marks=splits_backward,
    ),
)


@pytest.fixture(scope="module")
def expected(
    workers: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Records of one process."""
    return workers[1].run(train, tmp_path_factory.mktemp("one"), *RUN, *ON, DOCUMENT)[0]


def _validations(records: list[dict[str, Any]]) -> list[float]:
    keys = ("loss", "perplexity", "bits_per_byte")
    return [r[f"validation/{key}"] for r in records if "validation/loss" in r for key in keys]


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "settings"), LAYOUTS)
def test_every_layout_validates_as_one_process_does(
    world_size: int,
    settings: tuple[str, ...],
    expected: list[dict[str, Any]],
    workers: dict[int, Workers],
    tmp_path: Path,
) -> None:
    overrides = (*RUN, *ON, DOCUMENT, *settings)
    records = workers[world_size].run(train, tmp_path, *overrides)[0]
    assert [r["step"] for r in records if "validation/loss" in r] == [2, 3]
    assert _validations(records) == pytest.approx(_validations(expected), rel=1e-5)
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], rel=1e-5)


def _train_twice(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], ...]:
    return train(folder / "on", *overrides, *ON), train(folder / "off", *overrides)


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [(HALF,), (PP2, HALF), FLOAT8], ids=str)
def test_training_is_the_same_with_and_without_validation(
    settings: tuple[str, ...], workers: dict[int, Workers], tmp_path: Path
) -> None:
    overrides = (*RUN, "--training.steps=4", "--metrics.log_freq=3", *settings)
    validated, without = workers[2].run(_train_twice, tmp_path, *overrides)[0]
    # A step that is validated is a step that is logged.
    assert [r["step"] for r in validated] == [1, 2, 3, 4]
    assert [r["step"] for r in without] == [1, 3, 4]
    numbers = {r["step"]: (r["loss"], r["grad_norm"], r["tokens"]) for r in validated}
    for record in without:
        assert (record["loss"], record["grad_norm"], record["tokens"]) == numbers[record["step"]]


def _validate_compiled(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], int]:
    with compiled_by("eager"):
        trainer = build_trainer(folder, *overrides, COMPILE)
    trainer.train()
    trainer.close()
    assert trainer.compilations is not None
    return read_metrics(folder), trainer.compilations.recompilations


@pytest.mark.distributed
def test_compiled_blocks_validate_and_are_not_said_to_be_compiled_anew(
    expected: list[dict[str, Any]], workers: dict[int, Workers], tmp_path: Path
) -> None:
    overrides = (*RUN, *ON, DOCUMENT, "--training.steps=4")
    records, recompilations = workers[1].run(_validate_compiled, tmp_path, *overrides)[0]
    assert _validations(records)[:3] == pytest.approx(_validations(expected)[:3], rel=1e-5)
    assert recompilations == 0


def _validate_by_hand(folder: Path, *overrides: str) -> tuple[list[Any], list[float], int]:
    """Returns the validation's results, the loss from whole logits, and what validation changes."""
    trainer = build_trainer(folder, *overrides, "--training.steps=2", *ON)
    seconds = []
    meter = trainer.monitor.meter
    log = meter.log
    meter.log = lambda *a, **k: seconds.append(meter._excluded) or log(*a, **k)  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    held_out = trainer.data.held_out
    assert held_out is not None
    sharded = [isinstance(p, DTensor) for p in trainer.built.model.parameters()]
    losses, spelt = [], 0
    with torch.no_grad():
        for batch in held_out.batches:
            logits = trainer.built.model(batch.inputs).double()
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
                )
            )
            spelt += sum(
                len(trainer.tokenizer._encoding.decode_bytes([t]))
                for t in batch.labels.flatten().tolist()
                if t < trainer.tokenizer.bos_id
            )
    trainer.close()
    loss = torch.cat(losses).mean().item()
    bits = torch.cat(losses).sum().item() / math.log(2) / spelt
    assert all(sharded)
    assert all(p.grad is None for p in trainer.built.model.parameters())
    assert seconds[-1] > 0
    return read_metrics(folder), [loss, math.exp(loss), bits], held_out.num_tokens


@pytest.mark.distributed
def test_the_metrics_are_those_of_whole_logits_and_the_time_is_excluded(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    # Nothing is dropped in validation.
    dropout = ("--model.hidden_dropout=0.3", "--model.attention_dropout=0.3")
    settings = ("--metrics.enable_tensorboard=true", *dropout)
    records, by_hand, num_tokens = workers[1].run(_validate_by_hand, tmp_path, *settings)[0]
    assert _validations(records) == pytest.approx(by_hand, rel=1e-6)
    assert num_tokens == 2 * 8 * 64
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.step for e in events.Scalars("validation/perplexity")] == [2]


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_each_stage_runs_each_micro_batch_once_right_after_the_stage_before(
    schedule: Any, pp: int, count: int
) -> None:
    parallel = Parallel(pp=pp, pp_schedule=schedule)
    when = {}
    for rank in range(pp):
        jobs = forward_ticks(parallel, rank, count)
        assert {stage for stage, _ in jobs.values()} == set(local_stages(parallel, rank))
        assert all(rank_of_stage(parallel, stage) == rank for stage, _ in jobs.values())
        when |= {job: tick for tick, job in jobs.items()}
    stages = pp * parallel.stages_per_rank
    assert when.keys() == {(stage, index) for stage in range(stages) for index in range(count)}
    assert all(when[s, i] == when[s - 1, i] + 1 for s, i in when if s > 0)


def _read(validation: Validation, data: Data, **settings: Any) -> HeldOut:
    defaults = {"seq_len": 32, "local_batch_size": 1, "global_batch_size": 4}
    ranks = {"batch_rank": 0, "batch_degree": 1, "tokenizer": load_tokenizer()}
    return read_held_out(validation, data, **(defaults | ranks | settings))


def _tokens(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.inputs for batch in batches]).flatten().tolist()


def test_the_held_out_stream_is_the_documents_in_order_from_the_first() -> None:
    held_out = _read(Validation(steps=3), Data(num_streams=7))
    lines = bundled_asset("corpus/validation.jsonl").read_text().splitlines()
    first = load_tokenizer().encode(json.loads(lines[0])["text"], bos=True, eos=True)
    assert _tokens(held_out.batches) == first[: 3 * 4 * 32]
    spelt = load_tokenizer().decode(first[1 : 3 * 4 * 32 + 1])
    assert held_out.num_bytes == len(spelt.encode())


def test_ranks_share_the_global_batches_and_know_the_counts_of_all() -> None:
    whole = _read(Validation(), Data(packing="document"))
    parts = [
        _read(Validation(), Data(packing="document"), batch_rank=rank, batch_degree=2)
        for rank in (0, 1)
    ]
    assert {(p.num_tokens, p.num_bytes) for p in parts} == {(whole.num_tokens, whole.num_bytes)}
    for number, batch in enumerate(whole.batches):
        assert torch.equal(parts[number % 2].batches[number // 2].inputs, batch.inputs)
    assert whole.num_tokens == sum(int((b.labels != IGNORED).sum()) for b in whole.batches)


@pytest.fixture
def short(tmp_path: Path) -> str:
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "call me"}\n{"text": "Ishmael"}\n')
    return str(path)


def test_more_batches_than_the_documents_hold_are_refused_with_how_many_there_are(
    short: str,
) -> None:
    validation, small = Validation(dataset_path=short, steps=9), {"seq_len": 2}
    with pytest.raises(
        ValueError,
        match=r"steps: 9 batches \(of 1 samples of 2 tokens\) are too many: .* fills [2-6]; ",
    ) as e:
        _read(validation, Data(), global_batch_size=1, **small)
    fits = int(str(e.value).partition(" fills ")[2][0])
    _read(validation.model_copy(update={"steps": fits}), Data(), global_batch_size=1, **small)


def test_documents_that_are_trained_on_are_refused(short: str, tmp_path: Path) -> None:
    for validation, data in (
        (Validation(split="train"), Data()),
        (Validation(dataset_path=short), Data(dataset_path=short)),
    ):
        with pytest.raises(ValueError, match=r"^validation.dataset.*: \[data\] trains on .*"):
            resolve_held_out(validation, data)


def test_a_run_names_the_key_of_what_cannot_be_validated_on(short: str, tmp_path: Path) -> None:
    for settings, key, message in (
        (
            ("--data.dataset_path=" + short,),
            "validation.enable",
            "validation needs its own documents",
        ),
        (("--validation.split=test",), "validation.split", 'for the bundled corpus, got "test"'),
        (("--validation.steps=10000",), "validation.steps", "are too many: "),
    ):
        with pytest.raises(ConfigError) as error:
            build_trainer(tmp_path, *ON, *settings)
        assert [problem.key for problem in error.value.problems] == [key]
        assert message in error.value.problems[0].message


def test_without_a_dataset_of_its_own_validation_reads_another_split_of_the_datas() -> None:
    data = Data(dataset="c4", subset="realnewslike")
    source = resolve_held_out(Validation(), data)
    assert source.name == "allenai/c4 realnewslike validation"
    own = dataclasses.asdict(resolve_held_out(Validation(dataset="some/name"), data))
    arguments = {"path": "some/name", "name": None, "split": "validation"}
    assert own["opener"] == {"arguments": arguments}
