"""Rows of published runs, converted to a Job on a Cluster, and their predictions."""

import functools
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from titan_lite.config.load import ConfigError, Problem
from titan_lite.config.problems import literal
from titan_lite.config.schedules import SCHEDULES
from titan_lite.config.schema import Model
from titan_lite.models.args import DecoderArgs
from titan_lite.models.registry import families, resolve
from titan_lite.planner.cluster import Cluster, find_cluster
from titan_lite.planner.constants import ASSETS
from titan_lite.planner.hardware import DEVICES
from titan_lite.planner.job import Job, Recompute, Sharding
from titan_lite.planner.predict import model_flops
from titan_lite.planner.step_time import BlockTimes, Pair, Parts, Step, StepModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODELS = ASSETS / "published_models.toml"
PublishedRow = Mapping[str, Any]
INTEGERS = ("gpus", "gpus_per_node", "tp", "pp", "cp", "dp", "dp_shard", "pp_stages_per_rank",
            "micro_batch", "grad_accum", "seq_len", "attention_span", "gradient_bytes")  # fmt: skip
NUMBERS = ("value", "node_nic_gbs")
TEXTS = ("system", "metric", "model", "device", "sharding", "stack", "attention", "cross_entropy",
         "ac", "pp_schedule", "cp_method", "reshard", "gradient_sync", "use")  # fmt: skip
# Words in a row's stack -> kernels of planner_constants.toml.
KERNELS = {"eager": "eager", "apex": "apex", "compile": "compile", "fused": "fused", "amp": "amp",
           "layernorm": "torch", "native": "native"}  # fmt: skip
ATTENTION = {"flash1": "flash1", "flash2": "flash", "flash3": "cudnn", "cudnn": "cudnn",
             "unfused": "unfused", "flash;": "unskipped"}  # fmt: skip
# Bytes that a cross-entropy moves per logit.
LOSS_BYTES = {"float32": 28, "compile": 14, "fused": 10, "amp": 68}
# The peaks of a custom part are only in its cluster's file.
KNOWN_DEVICES = (find_cluster("h100_500w").device, *DEVICES)
# GB/s of a node in a row that states none: 100 to 130 fit the rows of torchtitan's A100s.
UNKNOWN_NIC = 100.0
# Stacks whose checkpoints stop once the last saved tensor is back (torch 2.1 and later).
EARLY_STOP = ("eager", "compile", "fused", "native")


class Unpredictable(ValueError):
    """A row cannot be predicted; the message has the reason."""


@dataclass(frozen=True)
class Predicted:
    """A row with its prediction in the row's own unit; reason: why there is none."""

    row: PublishedRow
    value: float | None = None
    step: Step | None = None
    reason: str = ""

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        assert self.value is not None
        return float(self.value / self.row["value"] - 1)


def read_rows(path: str) -> list[dict[str, Any]]:
    """Returns the rows of a file; ConfigError if it has none or cannot be read."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("", path, f"cannot be read: {error}")]) from error
    rows = tables.get("row", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        message = f"expected an array of tables, each with the head [[row]], got {literal(rows)}"
        raise ConfigError([Problem("row", path, message)])
    if not rows:
        raise ConfigError([Problem("row", path, "the file has no [[row]]")])
    problems = [
        Problem(f"row {number}.{key}", path, message)
        for number, row in enumerate(rows, start=1)
        for key, message in _wrong_keys(row)
    ]
    if problems:
        raise ConfigError(problems)
    return rows


def _wrong_keys(row: PublishedRow) -> Iterator[tuple[str, str]]:
    yield from ((key, "missing") for key in ("system", "metric", "value") if key not in row)
    for key, value in row.items():
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if key in INTEGERS and not (is_integer and value > 0):
            yield key, f"expected a positive integer, got {literal(value)}"
        is_number = is_integer or isinstance(value, float)
        if key in NUMBERS and not (is_number and 0 < value < math.inf):
            yield key, f"expected a number greater than 0, got {literal(value)}"
        if key in TEXTS and not (isinstance(value, str) and value):
            yield key, f"expected a string, got {literal(value)}"


@functools.cache
def published_model(name: str) -> DecoderArgs:
    """A model by its published name: "llama3-8b", "llama/llama3_8b", or one of MODELS."""
    special = tomllib.loads(MODELS.read_text(encoding="utf-8"))
    if name in special:
        return resolve(Model(**special[name]))[1]
    family, _, size = name.replace("/", "-", 1).rpartition("-")
    for known in families().values():
        flavors = {size} if known.name == family else {f"{family}_{size}", name.partition("/")[2]}
        for flavor in flavors & known.flavors.keys():
            return known.flavors[flavor]
    raise Unpredictable(f"unknown model {name!r}")


def row_cluster(row: PublishedRow, values: Mapping[str, float]) -> Cluster:
    """The machines of a row."""
    words = re.sub(r" \(inferred\)", "", str(row.get("device", "")))
    name, _, limit = words.partition(",")
    device = next((device for device in KNOWN_DEVICES if device.name == name), None)
    if device is None:
        raise Unpredictable(f"unknown device {words!r}" if words else "the device is not stated")
    watts = re.search(r"(\d+) W", limit)
    return Cluster(
        name=str(row["system"]),
        device=device,
        gpus_per_node=row.get("gpus_per_node", 8),
        node_nic_gbs=row.get("node_nic_gbs", UNKNOWN_NIC),
        power_limit_w=float(watts[1]) if watts else None,
        values=values,
    )


def row_job(row: PublishedRow) -> Job:
    """The run that a row describes."""
    if missing := [key for key in ("model", "gpus", "tp", "pp", "sharding") if key not in row]:
        raise Unpredictable(f"not stated: {', '.join(missing)}")
    args = published_model(str(row["model"]))
    words = str(row.get("stack", "")).split()
    kernels = KERNELS.get(words[0] if words else "")
    kind = str(row.get("attention", "")).split()
    attention = ATTENTION.get(kind[0] if kind else "")
    if kernels is None or attention is None:
        raise Unpredictable("stack or attention is not stated")
    # Yin et al. state neither sequence length nor batch: assume those of their 1T model.
    seq_len, micro = row.get("seq_len", args.max_seq_len), row.get("micro_batch", 4)
    tp, pp, cp = row["tp"], row["pp"], row.get("cp", 1)
    sharding = str(row["sharding"]).split()[0]
    if sharding not in get_args(Sharding):
        raise Unpredictable(f"unknown sharding {sharding!r}")
    schedule = row.get("pp_schedule", "1F1B")
    if schedule not in SCHEDULES:
        raise Unpredictable(f"unknown pp_schedule {schedule!r}")
    dp = row.get("dp", row["gpus"] // (tp * pp * cp))
    shard = row.get("dp_shard", dp if sharding in ("fsdp", "zero1", "zero2", "greedy_zero1") else 1)
    if tp * pp * cp * dp != row["gpus"]:
        raise Unpredictable(f"tp x pp x cp x dp is {tp * pp * cp * dp}, not {row['gpus']} GPUs")
    if dp % shard:
        raise Unpredictable(f"dp_shard ({shard}) does not divide dp ({dp})")
    stages = pp * row.get("pp_stages_per_rank", 1)
    if args.num_layers < stages:
        raise Unpredictable(f"{args.num_layers} blocks in {stages} stages")
    even, rest = divmod(args.num_layers, stages)
    blocks = tuple(even + (number < rest) for number in range(stages))
    again = str(row.get("ac", "none"))
    if again == "none" and sharding in ("hybrid_zero", "greedy_zero1"):
        again = "norms"  # InternLM's default: dropout_selective_checkpoint
    recompute, recomputed = _recompute(again, args.num_layers, blocks)
    steps = row.get("grad_accum", 1)
    float8 = bool(row.get("float8"))
    loss = "amp" if kernels == "amp" else str(row.get("cross_entropy", "fused"))
    return Job(
        args=args,
        seq_len=seq_len,
        span=min(row.get("attention_span", seq_len), seq_len),
        micro_batch=micro,
        micro_steps=steps,
        tp=tp,
        cp=cp,
        pp=pp,
        dp_replicate=dp // shard,
        dp_shard=shard,
        cp_method=row.get("cp_method", "ring"),
        cp_balanced=row.get("cp_balanced", False),
        blocks=blocks,
        stages_per_rank=stages // pp,
        schedule=schedule,
        pipelined=steps,
        sharding=sharding,  # type: ignore[arg-type]
        keeps_gathered=row.get("reshard", "") == "never",
        syncs_last=row.get("gradient_sync", "") == "last_micro_batch",
        sequence_parallel=row.get("sequence_parallel", True),
        async_tp=bool(row.get("async_tp")),
        recompute=recompute,
        recomputed=recomputed,
        early_stop=kernels in EARLY_STOP,
        float8="tensorwise" if float8 else "none",
        float8_gather=float8,
        reduce_bytes=row.get("gradient_bytes", 4),
        # Megatron (fused loss) adds up gradients inside the matmuls, which hide the traffic.
        accumulate_bytes=0 if loss == "fused" else 6 if row.get("gradient_bytes") == 2 else 10,
        kernels=kernels,
        attention=attention,
        loss_bytes=LOSS_BYTES.get(loss, 28) if not row.get("compiled_loss") else 14,
        stack="llm-foundry" if kernels == "torch" else "",
    )


def _recompute(
    text: str, layers: int, blocks: tuple[int, ...]
) -> tuple[Recompute, tuple[int, ...]]:
    """Reads a row's `ac`: the kind of recomputation, and the recomputed blocks of each stage."""
    mode, _, rest = text.split()[0].partition(":")
    if mode == "none":
        return "none", (0,) * len(blocks)
    if mode == "norms":
        return "norms", blocks
    share = 1.0
    try:
        if mode == "every_nth":
            share = 1 / int(rest)
        elif mode == "fraction":
            share = float(rest)
        elif mode == "first_k":
            first, _, of = rest.partition("/")
            share = int(first) / int(of or layers)
        elif mode not in ("full", "selective_op", "attention_core"):
            raise ValueError(mode)
        if not 0 <= share <= 1:
            raise ValueError(share)
    except (ValueError, ZeroDivisionError) as error:
        raise Unpredictable(f"unknown recomputation {text!r}") from error
    kind = mode if mode in ("selective_op", "attention_core") else "full"
    return kind, tuple(round(share * count) for count in blocks)  # type: ignore[return-value]


class PublishedStepModel(StepModel):
    """Also predicts what other libraries do: partial recomputation, DDP, ZeRO-1, InternLM's."""

    def _block(self, job: Job) -> BlockTimes:
        times, rates = super()._block(job), self.rates
        if job.recompute == "attention_core":
            return times._replace(again=(0.0, times.attention[0]))
        if job.recompute == "norms":
            features = self.args.dim / (job.tp if job.sequence_parallel else 1)
            moved = 2 * rates.bytes["norm"][0] * features * job.local_tokens * rates.scale
            return times._replace(again=(0.0, 0.0, moved / rates.hbm))
        return times

    def _pipeline(self, job: Job, block: BlockTimes, head: Pair, parts: Parts) -> None:
        super()._pipeline(job, block, head, parts)
        if job.sharding != "fsdp":
            size = self.params / job.pp / job.tp * job.reduce_bytes
            parts["fsdp"] = 0.5 * self.ring(size, job.fsdp * job.dp_replicate, job.tp, 2)

    def shard(self, job: Job, block: BlockTimes, parts: Parts) -> None:
        if job.sharding == "fsdp":
            super().shard(job, block, parts)
            return
        ranks, stride = job.fsdp * job.dp_replicate, job.tp
        if ranks == 1:
            return
        local = self.params / job.tp
        size = local * job.reduce_bytes
        layers = self.args.num_layers
        backward = 0.9 * layers * block.seconds(1, job.recomputed[0] / layers)
        reduces = job.micro_steps if job.sharding == "zero2" else 1
        passes = 1 if job.sharding in ("zero1", "zero2") else 2
        exposed = reduces * self.exposed(self.ring(size, ranks, stride, passes), backward)
        values = 2 * self.rates.scale * local
        if job.sharding in ("zero1", "zero2", "hybrid_zero"):
            exposed += self.ring(values, job.fsdp, stride)
        elif job.sharding == "greedy_zero1":
            # Each tensor has an owner, which sends it along a chain of all ranks.
            inner = self.inner(ranks, stride)
            owners = min(ranks, num_tensors(self.args))
            exposed += values / self.rates.bandwidth(ranks, inner)
            exposed += owners * self.rates.hops(ranks, inner)
        parts["fsdp"] = exposed


def num_tensors(args: DecoderArgs) -> int:
    """Parameter tensors of a model with one projection for queries, keys and values."""
    norms = 4 if args.norm == "layernorm" else 2
    matrices = 5 if args.ffn == "swiglu" else 4
    biases = args.qkv_bias + args.out_bias + 2 * args.ffn_bias
    return args.num_layers * (norms + matrices + biases) + 3


def in_unit(row: PublishedRow, step: Step) -> float:
    """Converts a step to the unit of the row's metric."""
    job = step.job
    match row["metric"]:
        case "step_time_s":
            return step.seconds
        case "tokens_per_gpu_per_s":
            return step.wps
        case "tokens_per_s":
            return step.wps * job.world_size
        case "samples_per_s":
            return step.wps * job.world_size / job.seq_len
        case "iter_per_s":
            return 1 / step.seconds
        case "tflops_per_gpu" | "tflops_per_device":
            return step.wps * model_flops(job.args, job.span) / 1e12
        case "pflops_total":
            return step.wps * model_flops(job.args, job.span) * job.world_size / 1e15
    raise Unpredictable(f"metric {row['metric']!r} is not a speed")


def predict_row(row: PublishedRow, values: Mapping[str, float]) -> Predicted:
    """The row's prediction, or why there is none."""
    try:
        job = row_job(row)
        step = PublishedStepModel(row_cluster(row, values), job).predict(job)
        return Predicted(row, in_unit(row, step), step)
    except (Unpredictable, KeyError) as error:
        return Predicted(row, reason=str(error))
