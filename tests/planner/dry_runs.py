"""Writes what dry runs measure to dry_runs_*.json, which the planner's memory is tested against.

    python -m tests.planner.dry_runs presets|random|experts|saved [FIRST [LAST]]

Dry runs take seconds to minutes each, so the tests read the file. `presets` are those of
train_configs/ at their world sizes, one rank for each place in the pipeline (of more than four, the
first two, one in the middle and the last), with as many micro-batches as a pipeline keeps at once,
though it has buffers for all of a pass, and the deep ones with fewer layers. `random` are 212
layouts of small models, drawn with a fixed seed, one rank for each place, of which some are
rejected once the model is split into stages. `experts` are 40 of small Mixture-of-Experts models.
`saved` are small models whose "selective_op" saves one or two kinds of operations, "max" for none.
Cases that the file already has are kept.
"""

import json
import logging
import multiprocessing
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import ConfigError
from titan_lite.config.schedules import SCHEDULES
from titan_lite.models.args import MoEArgs
from titan_lite.models.plan import Plan, make_plan

FOLDER = Path(__file__).parent.parent.parent / "train_configs"
NO_FILES = ("--data.tokenizer_path=",)
# Blocks that a preset is dry-run with in a step at most; those with more have FEW layers, pipelines
# two in each stage.
MOST, FEW = 64, 8


def plan_of(name: str, overrides: list[str], world: int) -> Plan:
    path = FOLDER / f"{name}.toml" if name else None
    return make_plan(path, [*overrides, *NO_FILES], world, with_files=False)


def presets() -> Iterator[tuple[str, list[str], int]]:
    for path in sorted(FOLDER.glob("*.toml")):
        (match,) = re.findall(r"^# Processes: (\d+)$", path.read_text(), re.MULTILINE)
        plan = plan_of(path.stem, [], int(match))
        config, dims = plan.config, plan.dims
        micro = config.training.local_batch_size * dims.batch
        interleaved = config.parallel.stages_per_rank > 1
        most = 2 if dims.pp == 1 else dims.pp * (2 if interleaved else 1) + 1
        steps = min(plan.micro_steps, most)
        steps -= steps % dims.pp if interleaved else 0
        overrides = [f"--training.global_batch_size={steps * micro}"]
        layers = plan.args.num_layers
        fewer = config.parallel.num_stages * 2 if dims.pp > 1 else FEW
        if dims.pp > 1 or layers * steps > MOST:
            overrides.append(f"--model.num_layers={min(layers, fewer)}")
            if config.activation_checkpoint.mode == "first_k":
                overrides.append(f"--activation_checkpoint.first_k={fewer * 3 // 4}")
        yield path.stem, overrides, int(match)


def cost(case: tuple[str, list[str], int]) -> int:
    """Blocks that a rank runs in a step."""
    plan = plan_of(*case)
    return plan.args.num_layers // plan.dims.pp * plan.micro_steps


FAMILIES = ("llama", "llama", "llama", "gpt_neox", "gpt", "qwen3", "bert", "qwen3_moe", "mixtral",
            "deepseek_v3")  # fmt: skip
EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3")


def random_layouts(number: int = 212) -> Iterator[tuple[str, list[str], int]]:
    """Legal layouts of small models, the same ones each time."""
    draw = random.Random(2)
    made = 0
    while made < number:
        tp, cp, pp, shard, replicate = (draw.choice(c) for c in ((1, 1, 2, 4), (1, 1, 1, 2),
                                        (1, 1, 1, 2, 4), (1, 2, 4, 8, 16), (1, 1, 2)))  # fmt: skip
        micro, steps = (
            draw.choice((1, 2, 4)),
            draw.choice((1, 1, 2, 4) if pp == 1 else (2, 4, 8, 8)),
        )
        name = draw.choice(FAMILIES)
        keys = {
            "model.name": name,
            "model.dim": draw.choice((512, 1024, 2048)),
            "model.ffn_dim": draw.choice((1024, 2816, 4096)),
            "model.num_layers": draw.choice((4, 4, 6) if pp == 1 else (4, 8, 8)),
            "model.vocab_size": draw.choice((8192, 32768)),
            "training.seq_len": draw.choice((512, 1024, 2048)),
            "training.local_batch_size": micro,
            "training.global_batch_size": micro * steps * shard * replicate,
            "training.loss_chunks": draw.choice(('"auto"', '"auto"', 1)),
            "training.param_dtype": draw.choice((*["bfloat16"] * 5, "float32")),
            "optimizer.name": draw.choice(("AdamW", "AdamW", "AdamW", "Adam", "Muon")),
            "optimizer.state_dtype": draw.choice((*["float32"] * 5, "bfloat16", "int8", "float8")),
            "ema.enable": draw.choice(("false", "false", "false", "true")),
            "activation_checkpoint.mode": draw.choice(
                (
                    "none",
                    "none",
                    "selective_op",
                    "selective_op",
                    "full",
                    "full",
                    "every_nth",
                    "first_k",
                    "fraction",
                    "memory_budget",
                )
            ),
            "float8.recipe": draw.choice((*["none"] * 5, "tensorwise", "tensorwise", "rowwise")),
            "parallel.tp": tp,
            "parallel.cp": cp,
            "parallel.pp": pp,
            "parallel.dp_shard": shard,
            "parallel.dp_replicate": replicate,
            "parallel.cp_method": draw.choice(("ring", "all_gather", "ulysses")),
            "parallel.pp_schedule": draw.choice(list(SCHEDULES)),
            "parallel.pp_split": draw.choice(("time", "uniform", "parameters")),
            "parallel.sequence_parallel": draw.choice(("true", "true", "false")),
            "parallel.reshard_after_forward": draw.choice(("default", "always", "never")),
            "parallel.gradient_sync": draw.choice(("every_micro_batch", "last_micro_batch")),
        }
        if name in EXPERTS:
            keys["model.ffn_dim"] = draw.choice((256, 768))
            keys["model.num_experts"], keys["model.top_k"] = draw.choice((8, 16)), 2
            keys["parallel.ep"] = draw.choice((1, 2, 2, 4, 8))
            keys["float8.recipe"] = "none"
        if name == "deepseek_v3" and cp > 1:
            keys["model.balance_loss"] = "global_lagged"
        is_float8 = keys["float8.recipe"] != "none"
        if keys["float8.recipe"] == "tensorwise":
            keys["float8.fsdp_all_gather"] = draw.choice(("true", "false"))
        if is_float8 or keys["activation_checkpoint.mode"] == "memory_budget":
            keys["compile.enable"] = "true"
        overrides = [f"--{key}={value}" for key, value in keys.items()]
        world = tp * cp * pp * shard * replicate
        try:
            plan_of("", overrides, world)
        except ConfigError:
            continue
        made += 1
        yield "", overrides, world


def random_experts(number: int = 40) -> Iterator[tuple[str, list[str], int]]:
    """Legal layouts of small Mixture-of-Experts models, the same ones each time."""
    draw = random.Random(1)
    made = 0
    while made < number:
        cp, pp, shard, replicate = (draw.choice(c) for c in ((1, 1, 1, 2), (1, 1, 1, 2),
                                    (1, 2, 4, 8), (1, 1, 2)))  # fmt: skip
        micro, steps = draw.choice((1, 2, 4)), draw.choice((1, 1, 2, 4))
        name = draw.choice(("qwen3_moe", "mixtral", "deepseek_v3"))
        keys = {
            "model.name": name,
            "model.dim": draw.choice((256, 512, 1024)),
            "model.ffn_dim": draw.choice((256, 768)),
            "model.num_layers": draw.choice((4, 6)),
            "model.num_experts": draw.choice((8, 16, 32)),
            "model.top_k": draw.choice((2, 4)) if name != "deepseek_v3" else 2,
            "model.vocab_size": draw.choice((8192, 32768)),
            "training.seq_len": draw.choice((512, 1024)),
            "training.local_batch_size": micro,
            "training.global_batch_size": micro * steps * shard * replicate,
            "parallel.cp": cp,
            "parallel.pp": pp,
            "parallel.ep": draw.choice((1, 2, 2, 4, 8)),
            "parallel.dp_shard": shard,
            "parallel.dp_replicate": replicate,
            "parallel.reshard_after_forward": draw.choice(("default", "always", "never")),
            "parallel.gradient_sync": draw.choice(("every_micro_batch", "last_micro_batch")),
            "activation_checkpoint.mode": draw.choice(("none", "selective_op", "full")),
        }
        if name == "deepseek_v3" and cp > 1:
            keys["model.balance_loss"] = "global_lagged"
        overrides = [f"--{key}={value}" for key, value in keys.items()]
        world = cp * pp * shard * replicate
        try:
            plan_of("", overrides, world)
        except ConfigError:
            continue
        made += 1
        yield "", overrides, world


# Layouts of two ranks in which the loss is the peak, and what "selective_op" may save of them.
SAVED = {
    ("model.name=llama", "parallel.tp=1"): ("attention", "matmul", "every_second_matmul"),
    ("model.name=llama", "parallel.tp=1", 'training.param_dtype="float32"'): ("attention",),
    ("model.name=llama", "parallel.tp=2"): (
        "attention",
        "matmul",
        "every_second_matmul",
        "reduce_scatter",
        "all_reduce",
        "matmul+reduce_scatter",
        "every_second_matmul+reduce_scatter",
    ),
    ("model.name=llama", "parallel.tp=2", "parallel.sequence_parallel=false"): (
        "reduce_scatter",
        "all_reduce",
        "matmul+all_reduce",
    ),
    ("model.name=gpt", "parallel.tp=1"): ("attention", "matmul", "every_second_matmul"),
    ("model.name=qwen3_moe", "model.num_experts=8", "model.top_k=2", "parallel.ep=2"): (
        "attention",
        "every_second_matmul",
        "routing",
        "all_to_all",
        "grouped_matmul",
    ),
    ("model.name=qwen3_moe", "model.num_experts=8", "model.top_k=2", "parallel.tp=2"): (
        "reduce_scatter",
        "matmul+reduce_scatter",
        "routing",
        "grouped_matmul",
    ),
    ("model.name=deepseek_v3", "model.num_experts=8", "model.top_k=2", "parallel.ep=2"): (
        "attention",
        "matmul",
        "every_second_matmul",
        "routing",
        "all_to_all",
        "grouped_matmul",
    ),
}


def saved() -> Iterator[tuple[str, list[str], int]]:
    size = ("model.dim=256", "model.ffn_dim=384", "model.num_layers=4", "model.vocab_size=65536",
            "training.seq_len=256", "training.local_batch_size=2", "training.loss_chunks=1",
            "activation_checkpoint.mode=selective_op")  # fmt: skip
    for layout, names in SAVED.items():
        for name in ("max", *names):
            save = '", "'.join(name.split("+"))
            keys = (*layout, *size, f'activation_checkpoint.save=["{save}"]')
            yield "", [f"--{key}" for key in keys], 2


CASES = {"presets": presets, "random": random_layouts, "experts": random_experts, "saved": saved}


def ranks(dims: ParallelDims) -> list[int]:
    places = range(dims.pp) if dims.pp <= 4 else (0, 1, dims.pp // 2, dims.pp - 1)
    return [dims.rank(dict.fromkeys(dims.AXES, 0) | {"pp": place}) for place in places]


def measure(
    name: str, overrides: list[str], world: int, rank: int, repeats: bool, queue: Any
) -> None:
    import torch

    from titan_lite.dryrun.run import dry_run

    torch.set_num_threads(1)
    actual = dry_run(plan_of(name, overrides, world), rank, repeats=repeats)
    measured = actual.measured
    queue.put(
        {
            "place": actual.place["pp"],
            "parameters": actual.parameters,
            "flops": measured.flops,
            "held": measured.held,
            "peak": measured.peak.bytes,
            "categories": {k: v for k, v in measured.peak.categories.items() if v},
            "collectives": [[c.operation, c.axis, c.count, c.bytes] for c in measured.collectives],
        }
    )


def measured_alone(*case: Any) -> dict[str, Any] | None:
    """Measures a rank in a separate process; None if it fails."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=measure, args=(*case, queue))
    child.start()
    while True:
        try:
            row: dict[str, Any] = queue.get(timeout=1)
            break
        except Empty:
            if child.exitcode is not None:
                return None
    child.join()
    return row


def main() -> None:
    import torch  # Once, for all children.

    import titan_lite.dryrun.run  # noqa: F401

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    which, *span = sys.argv[1:]
    cases = sorted(CASES[which](), key=cost) if which == "presets" else list(CASES[which]())
    first, last = [*map(int, span), *(0, len(cases))[len(span) :]]
    file = Path(__file__).parent / f"dry_runs_{which}.json"
    for name, overrides, world in cases[first:last]:
        rows = json.loads(file.read_text()) if file.exists() else []
        plan = plan_of(name, overrides, world)
        for rank in ranks(plan.dims):
            case = {"config": name, "overrides": overrides, "world_size": world, "rank": rank}
            if any(case.items() <= row.items() for row in rows):
                continue
            row = None
            # Blocks with experts do not always free what they made themselves, and others may not
            # stand for all either.
            if not isinstance(plan.args, MoEArgs):
                row = measured_alone(name, overrides, world, rank, True)
            row = row or measured_alone(name, overrides, world, rank, False)
            if row is None:
                print("FAILED", case, flush=True)
                continue
            rows.append(case | row)
            file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            print(case["config"], rank, rows[-1]["peak"] / 2**30, flush=True)


if __name__ == "__main__":
    main()
