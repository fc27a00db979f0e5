"""Each packing trains the same model in every layout, and counts the tokens it trains on."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.distributed import Workers
from tests.parallel.matrix import TOLERANCES_OF_3_STEPS
from tests.parallel.test_activation_checkpoint import Operations
from tests.runs import (
    Run,
    build_trainer,
    deviations,
    exceeding,
    later_weights,
    slow_but,
    train,
    train_and_gather,
)
from titan_lite.config.activation_checkpoint import CHECKPOINT_MODES
from titan_lite.data.loader import Batch
from titan_lite.models.llama import LLAMA
from titan_lite.nn.build_model import build_model
from titan_lite.nn.document_attention import dense_mask, document_spans
from titan_lite.nn.token_context import TokenContext
from titan_lite.parallel.activation_checkpoint import apply_activation_checkpoint
from titan_lite.parallel.context import Method, local_positions

STEPS = ("--training.steps=3", "--data.num_streams=2")
HALF = "--training.local_batch_size=4"
CP2, TP2, PP2 = (f"--parallel.{axis}=2" for axis in ("cp", "tp", "pp"))
COMPILE, SELECTIVE = "--compile.enable=true", "--activation_checkpoint.mode=selective_op"
ULYSSES, ALL_GATHER = (f"--parallel.cp_method={method}" for method in ("ulysses", "all_gather"))
# Processes, packing and settings; micro-batches of 4 have other documents than those of 8.
CASES = (
    (1, "document", (HALF,)),
    (2, "document", (HALF,)),
    (2, "document", (TP2, SELECTIVE)),
    (2, "document", (CP2, ULYSSES)),
    (2, "document", (CP2, ALL_GATHER, COMPILE, SELECTIVE)),
    (2, "document", (PP2, HALF)),
    (2, "fixed", (CP2, ALL_GATHER, HALF)),
    (2, "none", (HALF,)),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 37 words, several of which fill a row of 64 tokens."""
    path = tmp_path_factory.mktemp("corpus") / "short.jsonl"
    texts = (f"{i} " + "all that most maddens and torments " * (i % 7) for i in range(300))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _settings(packing: str, corpus: Path) -> tuple[str, ...]:
    packed = (f"--data.packing={packing}", f"--data.dataset_path={corpus}")
    return (*STEPS, *packed, *(("--data.packing_block=16",) if packing == "fixed" else ()))


@pytest.fixture(scope="module")
def expected(
    corpus: Path, workers: dict[int, Workers], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """Returns results of one process, by packing."""
    return {
        packing: workers[1].run(
            train_and_gather, tmp_path_factory.mktemp(packing), *_settings(packing, corpus)
        )[0]
        for packing in ("concat", "document", "fixed", "none")
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "packing", "settings"),
    slow_but([case for case in CASES if COMPILE not in case[2]], CASES),
)
def test_every_layout_trains_what_one_process_does(
    world_size: int,
    packing: str,
    settings: tuple[str, ...],
    corpus: Path,
    expected: dict[str, Run],
    workers: dict[int, Workers],
    tmp_path: Path,
) -> None:
    overrides = (*_settings(packing, corpus), *settings)
    reference = expected[packing]
    train = partial(train_and_gather, weights=later_weights(reference))
    got = workers[world_size].run(train, tmp_path, *overrides)[0]
    assert exceeding(deviations(got, reference), TOLERANCES_OF_3_STEPS) == {}
    applied = json.loads((tmp_path / "run.json").read_text())["applied"]
    assert applied["compiled_graphs"] == (1 if COMPILE in settings else None)


def _what_the_model_gets(folder: Path, *overrides: str) -> tuple[Batch, TokenContext]:
    trainer = build_trainer(folder, *overrides)
    batch, contexts = next(trainer.data.batches), []
    trainer.data.batches = iter([batch])
    trainer.built.model.register_forward_pre_hook(
        lambda _model, _inputs, kwargs: contexts.append(kwargs["context"]), with_kwargs=True
    )
    trainer.train_step(1)
    trainer.close()
    return batch, contexts[0]


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["ulysses", "all_gather"])
def test_ranks_of_a_sample_get_the_positions_in_its_documents_and_what_they_see(
    method: Method, corpus: Path, workers: dict[int, Workers], tmp_path: Path
) -> None:
    overrides = (*_settings("document", corpus), CP2, f"--parallel.cp_method={method}")
    for rank, (batch, got) in enumerate(workers[2].run(_what_the_model_gets, tmp_path, *overrides)):
        assert batch.positions is not None
        assert batch.documents is not None
        local = local_positions(method, 64, rank, size=2)
        assert torch.equal(got.positions_S, batch.positions[:, local])
        queries = torch.arange(64) if method == "ulysses" else local
        assert torch.equal(got.mask, dense_mask(batch.documents, queries, torch.float32))


def _repeated_attentions(mode: str) -> int:
    """In the backward pass of a checkpointed model, with the kernel of GPUs, on fake tensors."""
    args = dataclasses.replace(LLAMA.flavors["debug"], dim=64, ffn_dim=128, num_layers=3)
    spans = document_spans(torch.tensor([[0, 0, 1, 1, 1, 2]]), torch.arange(6))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(LLAMA, args)
        apply_activation_checkpoint(model, CHECKPOINT_MODES.variants[mode]())
        loss = model(torch.zeros(1, 6, dtype=torch.int64), context=TokenContext(mask=spans)).sum()
        with Operations() as operations:
            loss.backward()
    return operations.counts["attention"]


def test_a_kept_attention_inside_documents_is_not_repeated() -> None:
    assert _repeated_attentions("full") == 3
    assert _repeated_attentions("selective_op") == 0


@pytest.mark.distributed
def test_what_a_token_sees_and_what_is_counted_depend_on_the_packing(
    expected: dict[str, Run],
) -> None:
    losses = {packing: records[0]["loss"] for packing, (records, _) in expected.items()}
    # "concat", "document" and "fixed" have the same tokens, and see more or less of them.
    assert len(set(losses.values())) == 4
    tokens = {packing: records[-1]["tokens"] for packing, (records, _) in expected.items()}
    assert tokens["concat"] == tokens["document"] == tokens["fixed"] == 3 * 8 * 64
    assert 0 < tokens["none"] < 3 * 8 * 64
    for record in expected["none"][0]:
        assert record["wps"] == pytest.approx(
            record["samples_per_second"] * _tokens_of(expected["none"], record["step"]) / 8
        )


def _tokens_of(run: Run, step: int) -> int:
    """Tokens of one step."""
    seen = [0, *(record["tokens"] for record in run[0])]
    return int(seen[step] - seen[step - 1])


@pytest.mark.distributed
def test_tokens_without_padding_are_counted_on_after_a_resume(
    corpus: Path, expected: dict[str, Run], workers: dict[int, Workers], tmp_path: Path
) -> None:
    settings = (*_settings("none", corpus), "--checkpoint.enable=true")
    workers[1].run(train, tmp_path, *settings, "--training.steps=2")
    (records,) = workers[1].run(train, tmp_path, *settings)
    assert [record["tokens"] for record in records] == [
        record["tokens"] for record in expected["none"][0]
    ]
