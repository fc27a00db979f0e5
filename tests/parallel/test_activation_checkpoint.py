"""Each mode trains the same model, and recomputes exactly what it is documented to recompute."""

import itertools
import json
import logging
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from tests.distributed import Workers
from tests.runs import build_trainer, compiled_by, slow_but, train, whole
from titan_lite.config.activation_checkpoint import (
    CHECKPOINT_MODES,
    ActivationCheckpoint,
    EveryNth,
    FirstK,
    Full,
    NoCheckpoint,
    SavedOp,
    SelectiveOp,
)
from titan_lite.config.load import ConfigError
from titan_lite.models.args import DecoderArgs, MoEArgs
from titan_lite.models.plan import make_plan
from titan_lite.nn import varlen
from titan_lite.nn.decoder import Decoder
from titan_lite.parallel.activation_checkpoint import (
    MATMULS,
    OPS,
    SavePolicy,
    apply_activation_checkpoint,
)
from titan_lite.training.loss import cross_entropy_sum

BLOCKS = 4
# Recomputed (matmuls, attentions), of the 7 matmuls and the attention of each of 4 blocks. The
# seventh is never repeated, since backward does not need its result.
MODES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "none": ({}, (0, 0)),
    "full": ({"mode": "full"}, (4 * 6, 4)),
    "every_nth": ({"mode": "every_nth"}, (2 * 6, 2)),
    "every_nth 3": ({"mode": "every_nth", "every_nth": 3}, (2 * 6, 2)),
    "first_k": ({"mode": "first_k"}, (6, 1)),
    "first_k 3": ({"mode": "first_k", "first_k": 3}, (3 * 6, 3)),
    "fraction": ({"mode": "fraction"}, (2 * 6, 2)),
    "fraction 0.4": ({"mode": "fraction", "fraction": 0.4}, (6, 1)),
    "selective_op": ({"mode": "selective_op"}, (4 * 3, 0)),
    "attention": ({"mode": "selective_op", "save": ["attention"]}, (4 * 6, 0)),
    "matmul": ({"mode": "selective_op", "save": ["matmul"]}, (0, 4)),
    "second matmul": ({"mode": "selective_op", "save": ["every_second_matmul"]}, (4 * 3, 4)),
}


class Operations(TorchDispatchMode):
    """Counts operations by name; without those that a selective checkpoint has saved."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name in OPS:
            self.counts[name] += op in OPS[name]
        self.counts["attention"] += op == varlen.OPERATION
        return op(*args, **(kwargs or {}))


def decoder(section: ActivationCheckpoint, *, num_experts: int = 0) -> Decoder:
    kind = partial(MoEArgs, num_experts=num_experts, top_k=2) if num_experts else DecoderArgs
    args = kind(
        dim=64,
        num_layers=BLOCKS,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=128,
        vocab_size=128,
        max_seq_len=32,
    )
    torch.manual_seed(0)
    model = Decoder(args)
    apply_activation_checkpoint(model, section)
    return model


def gradients_of(model: Decoder) -> tuple[list[torch.Tensor], Counter[str]]:
    torch.manual_seed(1)
    loss = model(torch.arange(64).view(2, 32)).square().sum()
    with Operations() as operations:
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], operations.counts


@pytest.mark.parametrize("mode", MODES)
def test_only_what_the_mode_names_is_recomputed_and_no_gradient_changes(mode: str) -> None:
    settings, expected = MODES[mode]
    plain, plain_counts = gradients_of(decoder(NoCheckpoint()))
    gradients, counts = gradients_of(decoder(CHECKPOINT_MODES.validate(settings)))
    recomputed = counts - plain_counts
    assert (recomputed["matmul"], recomputed["attention"]) == expected
    assert len(gradients) == len(plain) == 9 * BLOCKS + 3
    for got, wanted in zip(gradients, plain, strict=True):
        assert torch.equal(got, wanted)


def test_every_nth_begins_with_the_first_block() -> None:
    section = EveryNth(every_nth=3)
    assert list(section.layers(8)) == [0, 3, 6]


def test_a_pipeline_stage_with_fewer_blocks_checkpoints_those_it_has() -> None:
    assert FirstK(first_k=3).layers(2) == range(2)


def test_a_recomputed_dropout_drops_the_same() -> None:
    gradients = []
    for mode in ("none", "full", "selective_op"):
        model = decoder(CHECKPOINT_MODES.variants[mode]())
        for name, module in list(model.named_modules()):
            if name.endswith("feed_forward"):
                block = model.get_submodule(name.rpartition(".")[0])
                # Before the matmuls, for gradients to need what was dropped.
                block.feed_forward = nn.Sequential(nn.Dropout(0.5), module)
        gradients.append(gradients_of(model)[0])
    plain, *others = gradients
    for other in others:
        assert all(torch.equal(got, wanted) for got, wanted in zip(other, plain, strict=True))


def test_matmuls_are_counted_apart_in_forward_and_recomputation() -> None:
    policy = SavePolicy(("every_second_matmul",))
    forward = SelectiveCheckpointContext(is_recompute=False)
    again = SelectiveCheckpointContext(is_recompute=True)
    saved = [
        policy(context, MATMULS[0]) is CheckpointPolicy.MUST_SAVE
        for context in (forward, again, again, forward, again)
    ]
    assert saved == [False, False, True, True, False]


def test_every_name_has_operations() -> None:
    assert set(OPS) == set(get_args(SavedOp))


def test_products_and_order_of_experts_are_saved() -> None:
    def repeated(section: ActivationCheckpoint) -> tuple[int, int]:
        counts = gradients_of(decoder(section, num_experts=4))[1]
        return counts["grouped_matmul"], counts["routing"]

    save: list[SavedOp] = ["grouped_matmul", "routing"]
    needed = repeated(NoCheckpoint())
    assert repeated(SelectiveOp(save=save)) == needed
    matmuls, sorts = repeated(Full())
    assert matmuls > needed[0]
    assert sorts > needed[1]


def test_max_keeps_the_scale_of_float8() -> None:
    """torchao takes a tensor's scale from torch.max of its magnitudes."""

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x / x.abs().max().detach())

    def maxima(save: list[SavedOp]) -> int:
        model = decoder(SelectiveOp(save=save))
        for block in model.layers.values():
            block.feed_forward.w2 = Scaled(128, 64, bias=False)
        return gradients_of(model)[1]["max"]

    assert maxima(["attention"]) == BLOCKS
    assert maxima(["attention", "max"]) == 0


# Several processes, and the compiler.


def one_backward(folder: str, *overrides: str, backend: str = "inductor") -> dict[str, Any]:
    """Gradients of one micro-batch, what backward executed and what forward saved for it."""
    with compiled_by(backend):
        trainer = build_trainer(folder, *overrides)
    batch = next(trainer.data.batches)
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.built.model(
            batch.inputs,
            head_loss=partial(
                cross_entropy_sum,
                labels=batch.labels,
                num_chunks=1,
                vocab_size=trainer.plan.args.vocab_size,
            ),
        )
    saved_bytes = sum(storage.nbytes() for storage in storages.values())
    counts: Counter[str] = Counter()
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        if trainer.plan.config.compile.enable:
            loss.backward()
        else:
            with Operations() as operations:
                loss.backward()
            counts = operations.counts
    trainer.close()
    return {
        "gradients": whole(trainer.built.model, gradients=True),
        "counts": counts,
        "exchanges": exchange.call_count,
        "saved_bytes": saved_bytes,
        "applied": trainer.built.applied,
    }


def overrides_of(settings: dict[str, Any]) -> list[str]:
    return [f"--activation_checkpoint.{key}={json.dumps(v)}" for key, v in settings.items()]


def assert_same_gradients(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["gradients"].keys() == wanted["gradients"].keys()
    for name, expected in wanted["gradients"].items():
        np.testing.assert_array_equal(got["gradients"][name], expected, err_msg=name)


def assert_near_gradients(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, expected in wanted["gradients"].items():
        largest = np.abs(expected).max()
        np.testing.assert_allclose(
            got["gradients"][name], expected, rtol=0, atol=1e-5 * largest, err_msg=name
        )


# The partitioner, which runs before inductor, decides what is saved and recomputed. test_matrix.py
# shows that inductor's graphs train the same model in all modes.
PARTITIONED = partial(one_backward, backend="aot_eager")
FOUR_BLOCKS = f"--model.num_layers={BLOCKS}"
LAYOUTS = {
    "fsdp 2": ["--training.local_batch_size=4"],
    "tp 2": ["--parallel.tp=2"],
    "tp 2 without sequence parallel": ["--parallel.tp=2", "--parallel.sequence_parallel=false"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", slow_but(["tp 2"], LAYOUTS))
def test_no_mode_changes_a_gradient_of_several_processes(
    layout: str, workers: dict[int, Workers], tmp_path: Path
) -> None:
    def run(settings: dict[str, Any]) -> dict[str, Any]:
        overrides = [FOUR_BLOCKS, *LAYOUTS[layout], *overrides_of(settings)]
        result: dict[str, Any] = workers[2].run(one_backward, mkdtemp(dir=tmp_path), *overrides)[0]
        return result

    plain = run({})
    for mode in ("full", "every_nth", "first_k", "fraction", "selective_op", "second matmul"):
        settings, (matmuls, attentions) = MODES[mode]
        got = run(settings)
        assert_same_gradients(got, plain)
        recomputed = got["counts"] - plain["counts"]
        assert (recomputed["matmul"], recomputed["attention"]) == (matmuls, attentions), mode
        section = CHECKPOINT_MODES.validate(settings)
        selective = section.mode == "selective_op"
        layers = len(section.layers(BLOCKS))
        feature = "selectively checkpointed" if selective else "checkpointed"
        assert got["applied"].count(feature) == layers


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sequence_parallel", "name"), [(True, "reduce_scatter"), (False, "all_reduce")]
)
def test_a_saved_sum_over_ranks_is_not_repeated(
    sequence_parallel: bool, name: SavedOp, workers: dict[int, Workers], tmp_path: Path
) -> None:
    def sums(save: list[SavedOp]) -> dict[str, Any]:
        overrides = [
            "--parallel.tp=2",
            f"--parallel.sequence_parallel={str(sequence_parallel).lower()}",
            *overrides_of({"mode": "selective_op", "save": save}),
        ]
        result: dict[str, Any] = workers[2].run(one_backward, mkdtemp(dir=tmp_path), *overrides)[0]
        return result

    repeated, saved = sums(["attention"]), sums(["attention", name])
    # That of the attention's output, in each of two blocks; the other's is not needed again.
    assert repeated["counts"][name] - saved["counts"][name] == 2
    assert_same_gradients(saved, repeated)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "settings"), slow_but([(1, [])], [(1, []), (2, LAYOUTS["tp 2"])])
)
def test_the_compiler_keeps_to_the_policy(
    world_size: int, settings: list[str], workers: dict[int, Workers], tmp_path: Path
) -> None:
    def run(mode: str, *overrides: str) -> dict[str, Any]:
        overrides = (*settings, *overrides_of(MODES[mode][0]), *overrides)
        result: dict[str, Any] = workers[world_size].run(
            PARTITIONED, mkdtemp(dir=tmp_path), *overrides
        )[0]
        return result

    eager = run("none")
    modes = ["attention", "selective_op", *(["none"] if world_size == 1 else [])]
    compiled = [run(mode, "--compile.enable=true") for mode in modes]
    for got in compiled:
        assert_near_gradients(got, eager)
    for less, more in itertools.pairwise(compiled):
        assert less["saved_bytes"] < 0.8 * more["saved_bytes"]


EXPERT_OPS: tuple[SavedOp, ...] = ("all_to_all", "grouped_matmul")


@pytest.mark.distributed
@pytest.mark.parametrize("axis", slow_but(["ep"], ["ep", "tp"]))
def test_the_compiler_saves_of_experts_what_the_policy_names(
    axis: str, workers: dict[int, Workers], tmp_path: Path
) -> None:
    def run(settings: dict[str, Any], *overrides: str) -> dict[str, Any]:
        layout = (f"--parallel.{axis}=2", f"--training.local_batch_size={4 if axis == 'ep' else 8}")
        overrides = ("--model.name=qwen3_moe", *layout, *overrides_of(settings), *overrides)
        result: dict[str, Any] = workers[2].run(PARTITIONED, mkdtemp(dir=tmp_path), *overrides)[0]
        return result

    saves: list[list[SavedOp]] = [["attention"], ["attention", "routing", *EXPERT_OPS]]
    selective = [{"mode": "selective_op", "save": save} for save in saves]
    eager = run({})
    compiled = [run(settings, "--compile.enable=true") for settings in (*selective, {})]
    for got in compiled:
        assert_near_gradients(got, eager)
    for less, more in itertools.pairwise(compiled):
        assert less["saved_bytes"] < 0.8 * more["saved_bytes"]
    # There and back in each of two blocks: the gradients, and, if not saved, the rows.
    expected = [8, 4, 4] if axis == "ep" else [0, 0, 0]
    assert [got["exchanges"] for got in compiled] == expected


def test_the_compiler_keeps_to_the_memory_budget(one_process: Workers, tmp_path: Path) -> None:
    def run(settings: dict[str, Any], function: Any = PARTITIONED) -> dict[str, Any]:
        overrides = ["--compile.enable=true", *overrides_of(settings)]
        result: dict[str, Any] = one_process.run(function, mkdtemp(dir=tmp_path), *overrides)[0]
        return result

    plain, half, none = (
        run({}),
        run({"mode": "memory_budget"}),
        run({"mode": "memory_budget", "memory_budget": 0.0}),
    )
    assert none["saved_bytes"] < 0.8 * half["saved_bytes"]
    assert half["saved_bytes"] < 0.8 * plain["saved_bytes"]
    assert (
        plain["applied"].activation_memory_budget,
        half["applied"].activation_memory_budget,
    ) == (1.0, 0.5)
    for got in (half, none):
        assert_same_gradients(got, plain)
    by_inductor = run({"mode": "memory_budget"}, one_backward)
    assert none["saved_bytes"] < 0.8 * by_inductor["saved_bytes"]
    assert by_inductor["saved_bytes"] < 0.8 * plain["saved_bytes"]
    assert_near_gradients(by_inductor, plain)


# Errors, warnings and reports.


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (["mode=memory_budget"], "mode", '"memory_budget" is a feature of the compiler: set'),
        (
            ["mode=memory_budget", "memory_budget=1"],
            "memory_budget",
            "expected a number of at least 0 and less than 1, got 1",
        ),
        (
            ["mode=fraction", "fraction=0"],
            "fraction",
            "expected a number greater than 0 and at most 1, got 0",
        ),
        (
            ["mode=selective_op", 'save=["matmul", "every_second_matmul"]'],
            "save",
            'cannot have both "matmul" and "every_second_matmul"; remove one of the two',
        ),
        (["mode=selective_op", "save=[]"], "save", "names no operation: name one, or set"),
        (
            ["mode=first_k", "first_k=5"],
            "first_k",
            "first_k (5) must be at most the model's num_layers (4)",
        ),
        (
            ["mode=fraction", "fraction=0.2"],
            "fraction",
            "fraction (0.2) x num_layers (4) rounds down to 0 layers",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings: list[str], key: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(None, with_keys([], settings), 1)
    actual = {problem.key: problem.message for problem in error.value.problems}
    assert message in actual[f"activation_checkpoint.{key}"]


def test_a_memory_budget_is_refused_with_tensor_parallel() -> None:
    with pytest.raises(ConfigError, match=r"cannot be combined with parallel.tp \(2\)"):
        make_plan(
            None, with_keys(["--parallel.tp=2", "--compile.enable=true"], ["mode=memory_budget"]), 2
        )


@pytest.mark.parametrize(
    ("settings", "key", "mode", "chosen"),
    [
        (["every_nth=3"], "every_nth", "every_nth", "none"),
        (["mode=full", "first_k=3"], "first_k", "first_k", "full"),
        # Also where it has its default value.
        (["mode=full", "first_k=1"], "first_k", "first_k", "full"),
        (["mode=every_nth", "fraction=0.3"], "fraction", "fraction", "every_nth"),
        (["mode=full", 'save=["matmul"]'], "save", "selective_op", "full"),
        (["memory_budget=0.3"], "memory_budget", "memory_budget", "none"),
    ],
)
def test_a_key_of_another_mode_is_refused(
    settings: list[str], key: str, mode: str, chosen: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(None, with_keys([], settings), 1)
    (problem,) = error.value.problems
    assert problem.key == f"activation_checkpoint.{key}"
    assert problem.message == (
        f'does not apply where activation_checkpoint.mode is "{chosen}": set '
        f'activation_checkpoint.mode = "{mode}", or remove {key}'
    )


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (
            ["mode=selective_op", 'save=["attention", "reduce_scatter", "all_reduce", "max"]'],
            [
                '"reduce_scatter" has no effect because parallel.tp is 1, sequence_parallel true',
                '"all_reduce" has no effect because parallel.tp is 1',
                '"max" has no effect because float8.recipe is "none"',
            ],
        ),
        (
            ["mode=selective_op", 'save=["routing", "all_to_all", "grouped_matmul"]'],
            [
                '"routing" has no effect because the model has no experts',
                '"all_to_all" has no effect because parallel.ep is 1',
                '"grouped_matmul" has no effect because the model has no experts',
            ],
        ),
        (["mode=selective_op"], []),
        (["mode=fraction", "fraction=0.3"], []),
    ],
)
def test_saved_operations_that_a_run_does_not_have_are_warned_about(
    settings: list[str], messages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "titan_lite.config"):
        make_plan(None, with_keys([], settings), 1)
    assert len(caplog.records) == len(messages)
    for record, message in zip(caplog.records, messages, strict=True):
        assert record.getMessage().startswith("activation_checkpoint.")
        assert message in record.getMessage()


def with_keys(overrides: list[str], settings: list[str]) -> list[str]:
    return [*overrides, *(f"--activation_checkpoint.{s}" for s in settings)]


def test_hfu_counts_the_blocks_recomputed_whole_and_is_left_out_elsewhere(
    one_process: Workers, tmp_path: Path
) -> None:
    flops = {}
    for mode in ("none", "full", "every_nth", "selective_op"):
        folder = tmp_path / mode
        records = one_process.run(
            train, folder, "--training.steps=2", *overrides_of({"mode": mode})
        )[0]
        run = json.loads((folder / "run.json").read_text())
        flops[mode] = run["flops_per_token"]
        assert ("hfu" in records[-1]) == (mode in ("full", "every_nth"))
    assert flops["none"]["hardware"] is flops["selective_op"]["hardware"] is None
    extra = {mode: flops[mode]["hardware"] - flops[mode]["model"] for mode in ("full", "every_nth")}
    assert extra["full"] == 2 * extra["every_nth"] > 0
