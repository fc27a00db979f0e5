"""Stages of a pipeline: how a model is split, which splits are rejected, and the report."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed import Workers
from tests.runs import build_trainer, read_metrics
from titan_lite.config.load import ConfigError
from titan_lite.config.schema import Model, Parallel
from titan_lite.models.registry import resolve
from titan_lite.models.stage_split import balanced
from titan_lite.nn.build_model import build_model
from titan_lite.nn.decoder import Decoder
from titan_lite.parallel.pipeline import local_stages, split, summarize_stages

BLOCKS = [f"layers.{index}" for index in range(6)]


def model(num_layers: int = 6) -> Decoder:
    with torch.device("meta"):
        return build_model(*resolve(Model(num_layers=num_layers)))


def modules(**parallel: Any) -> list[tuple[str, ...]]:
    return [stage.modules for stage in split(model(), Parallel(**parallel), attention_flops=0)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_no_other_cut_has_a_smaller_largest_part(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    bounds = balanced(costs, parts)
    assert [start for start, _ in bounds[1:]] == [end for _, end in bounds[:-1]]
    assert (bounds[0][0], bounds[-1][1], len(bounds)) == (0, len(costs), parts)

    def largest(cuts: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs))))

    best = min(map(largest, itertools.combinations(range(1, len(costs)), parts - 1)))
    assert max(sum(costs[start:end]) for start, end in bounds) == best


@pytest.mark.parametrize(
    ("costs", "parts", "sizes"),
    [([1] * 10, 4, [3, 3, 2, 2]), ([1] * 8 + [10], 4, [3, 3, 2, 1]), ([1, 1, 1], 3, [1, 1, 1])],
)
def test_of_equally_good_cuts_the_most_even_one_is_taken(
    costs: list[int], parts: int, sizes: list[int]
) -> None:
    assert [end - start for start, end in balanced(costs, parts)] == sizes


def test_stages_hold_equal_numbers_of_blocks_of_parameters_or_of_flops() -> None:
    # In units of a debug block (0.79 M): embedding and head 0.67 each; a lookup has no FLOPs.
    assert modules(pp=4, pp_split="uniform") == [
        ("tok_embeddings", *BLOCKS[:2]),
        tuple(BLOCKS[2:4]),
        (BLOCKS[4],),
        (BLOCKS[5], "norm", "output"),
    ]
    assert modules(pp=4, pp_split="parameters") == [
        ("tok_embeddings", BLOCKS[0]),
        tuple(BLOCKS[1:3]),
        tuple(BLOCKS[3:5]),
        (BLOCKS[5], "norm", "output"),
    ]
    assert modules(pp=4, pp_split="time") == [
        ("tok_embeddings", *BLOCKS[:2]),
        tuple(BLOCKS[2:4]),
        (BLOCKS[4],),
        (BLOCKS[5], "norm", "output"),
    ]


def test_parameters_and_flops_of_the_stages_are_those_of_the_model() -> None:
    whole = model()
    stages = split(whole, Parallel(pp=2), attention_flops=1000)
    assert sum(stage.parameters for stage in stages) == sum(p.numel() for p in whole.parameters())
    embedding = 2048 * 256
    total = 6 * (sum(p.numel() for p in whole.parameters()) - embedding) + 6 * 1000
    assert sum(stage.flops for stage in stages) == total
    assert sum(stage.blocks for stage in stages) == 6
    first, *others = summarize_stages(stages, "1F1B").splitlines()
    assert re.fullmatch(r"1F1B, 2 stages, the largest 1\.\d\d of an even share", first)
    assert others[1].endswith("per token: layers.3 to layers.5, norm, output")


def test_stages_can_be_named() -> None:
    stages = [["tok_embeddings"], [*BLOCKS, "norm", "output"]]
    assert modules(pp=2, pp_split="explicit", pp_stage_modules=stages) == [
        tuple(names) for names in stages
    ]


def test_ranks_have_every_pp_th_stage_or_one_from_either_end() -> None:
    loop = Parallel(pp=4, pp_schedule="Interleaved1F1B", pp_stages_per_rank=3)
    assert local_stages(loop, 1) == [1, 5, 9]
    assert local_stages(Parallel(pp=4, pp_schedule="ZBVZeroBubble"), 1) == [1, 6]
    assert local_stages(Parallel(pp=4), 3) == [3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--parallel.pp=4"],
            r"parallel.pp +\(command line\): a pipeline of 4 stages requires at least 4 blocks, "
            "got 2; set parallel.pp to at most 2",
        ),
        (
            [
                "--parallel.pp=4",
                "--parallel.pp_split=explicit",
                '--parallel.pp_stage_modules=[["tok_embeddings"],["layers.1"],["norm"],["output"]]',
            ],
            r"parallel.pp_stage_modules +\(command line\): must list each of these modules once, "
            "in this order: tok_embeddings, layers.0, layers.1, norm, output",
        ),
        (
            [
                "--parallel.pp=2",
                "--model.name=bert",
                "--parallel.pp_split=explicit",
                '--parallel.pp_stage_modules=[["tok_embeddings","pos_embeddings","type_embeddings",'
                '"embedding_norm","layers.0","layers.1","transform"],["output","pair_head"]]',
            ],
            r"parallel.pp_stage_modules +\(command line\): must list transform, output, "
            "pair_head in the last stage",
        ),
        (
            [
                "--parallel.pp=2",
                "--model.num_layers=4",
                "--activation_checkpoint.mode=fraction",
                "--activation_checkpoint.fraction=0.25",
            ],
            r"activation_checkpoint.fraction +\(command line\): fraction \(0.25\) x blocks of "
            r"each pipeline stage \(3, 1\) rounds down to 0",
        ),
    ],
)
def test_what_the_model_cannot_be_cut_into_is_refused_before_any_process_group(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        build_trainer(tmp_path, "--training.local_batch_size=1", *overrides)


def test_a_tied_embedding_counts_once_in_one_stage_and_is_copied_to_the_last_of_several() -> None:
    with torch.device("meta"):
        whole = build_model(*resolve(Model(num_layers=6, tied_head=True)))
    size = sum(p.numel() for p in whole.parameters())
    assert [stage.parameters for stage in split(whole, Parallel(), attention_flops=0)] == [size]
    stages = split(whole, Parallel(pp=2), attention_flops=0)
    assert sum(stage.parameters for stage in stages) == size + 2048 * 256


def _say(folder: Path) -> tuple[str, list[str]]:
    trainer = build_trainer(
        folder,
        "--parallel.pp=2",
        "--parallel.pp_schedule=Interleaved1F1B",
        "--model.num_layers=4",
        "--training.local_batch_size=2",
        "--training.steps=2",
        "--activation_checkpoint.mode=first_k",
    )
    names = [name for name, _ in trainer.built.model.named_parameters()]
    trainer.train()
    trainer.close()
    return str(trainer.built.applied), names


@pytest.mark.distributed
def test_a_run_says_what_its_stages_are_and_counts_the_whole_model(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    (first, names), (second, other_names) = workers[2].run(_say, tmp_path)
    assert "  pipeline          Interleaved1F1B, 4 stages, the largest " in first
    assert "stage 3: 168,128 parameters" in first
    # One block of each of its two stages.
    assert "  checkpointed      2 of 2 blocks\n" in first
    assert second.endswith(first[first.index("  pipeline") :])
    assert not set(names) & set(other_names)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["parameters"] == sum(stage["parameters"] for stage in run["stages"])
    assert [stage["modules"][0] for stage in run["stages"]] == [
        "tok_embeddings",
        "layers.1",
        "layers.2",
        "layers.3",
    ]
    # All 4 blocks are recomputed, two of them on the other rank.
    flops = run["flops_per_token"]
    assert flops["hardware"] > flops["model"]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
