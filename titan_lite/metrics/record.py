"""Keys of a log record: unit, reduction across ranks and TensorBoard tag of each."""

from dataclasses import dataclass
from typing import Literal

Record = dict[str, float]
"""Key -> value, one record per log step; always has `step`, and `warmup` only if it is true."""

FORMULA = (
    "6 * (active parameters - input embedding - next-sentence classifier) "
    "+ 12 * layers * attention_dim * seq_len. Active parameters exclude the experts that a token "
    'is not routed to. With data.packing = "fixed", packing_block replaces seq_len. Scores that '
    "causal and document masks remove are counted, padding tokens are not. With "
    'training.loss_positions = "labelled", the head of masked language models is counted for '
    "masked_lm.mask_prob of the tokens"
)
"""FLOPs that `mfu` counts: torchtitan's convention, full attention, no recomputation."""


@dataclass(frozen=True)
class Metric:
    """One key of a record.

    reduction: "global" numbers are equal on all ranks by construction; "max" is the maximum.
    """

    unit: str
    tag: str
    reduction: Literal["global", "max"] = "global"


METRICS: dict[str, Metric] = {
    "loss": Metric("nats per token", "train/loss"),
    "grad_norm": Metric("no unit", "train/grad_norm"),
    # Masked language models only: the two parts of the loss.
    "masked_lm_loss": Metric("nats per masked token", "train/masked_lm_loss"),
    "next_sentence_loss": Metric("nats per pair", "train/next_sentence_loss"),
    "next_sentence_accuracy": Metric("share of pairs", "train/next_sentence_accuracy"),
    "lr": Metric("no unit", "train/lr"),
    "loss_scale": Metric("no unit; only with float16", "train/loss_scale"),
    "skipped_steps": Metric("steps since step 0", "train/skipped_steps"),
    "skipped_documents": Metric("documents since step 0", "train/skipped_documents"),
    "tokens": Metric("tokens since step 0", "train/tokens"),
    # Mixture of Experts only; metrics.jsonl also has lists with a value for each block.
    "moe/load_max": Metric("tokens of the most loaded expert / the mean", "moe/load_max"),
    "moe/rank_load_max": Metric(
        "tokens of the most loaded rank's experts / the mean", "moe/rank_load_max"
    ),
    "moe/unused_experts": Metric("experts without tokens, in all blocks", "moe/unused_experts"),
    "moe/entropy": Metric("no unit; 1 if all experts are used equally", "moe/entropy"),
    "moe/balance_loss": Metric("nats, summed over blocks", "moe/balance_loss"),
    "moe/max_bias": Metric("largest absolute bias of an expert", "moe/max_bias", "max"),
    "validation/loss": Metric("nats per token", "validation/loss"),
    "validation/masked_lm_loss": Metric("nats per masked token", "validation/masked_lm_loss"),
    "validation/next_sentence_loss": Metric("nats per pair", "validation/next_sentence_loss"),
    "validation/next_sentence_accuracy": Metric(
        "share of pairs", "validation/next_sentence_accuracy"
    ),
    "validation/perplexity": Metric("no unit", "validation/perplexity"),
    "validation/bits_per_byte": Metric("bits per byte", "validation/bits_per_byte"),
    "wps": Metric("tokens/s per device", "speed/wps"),
    "samples_per_second": Metric("samples/s of the whole job", "speed/samples_per_second"),
    "iterations_per_second": Metric("optimizer steps/s", "speed/iterations_per_second"),
    "seconds_per_step": Metric("s", "speed/seconds_per_step"),
    "tflops": Metric("TFLOP/s per device", "speed/tflops"),
    "mfu": Metric("% of peak", "speed/mfu_percent"),
    "mfu_causal": Metric("% of peak", "speed/mfu_causal_percent"),
    "hfu": Metric("% of peak", "speed/hfu_percent"),
    "data_wait": Metric("% of the time", "speed/data_wait_percent", "max"),
    "watts": Metric("W, mean of the devices", "power/watts"),
    "joules_per_token": Metric("J, of all devices", "power/joules_per_token"),
    "memory_gib": Metric("GiB, peak", "memory/peak_gib", "max"),
    "memory_reserved_gib": Metric("GiB, peak", "memory/peak_reserved_gib", "max"),
    "alloc_retries": Metric("count since start", "memory/alloc_retries", "max"),
    "ooms": Metric("count since start", "memory/ooms", "max"),
    # Sums over the saves that ended since the last record.
    "checkpoint_blocked_seconds": Metric(
        "s that training waited", "checkpoint/blocked_seconds", "max"
    ),
    "checkpoint_seconds": Metric("s from start to commit", "checkpoint/seconds", "max"),
    "checkpoint_bytes": Metric("bytes of all files", "checkpoint/bytes"),
    "checkpoint_gb_per_second": Metric("GB/s", "checkpoint/gb_per_second"),
}


def scalars(record: Record) -> dict[str, float]:
    """The record's numbers by tag; a key outside METRICS is its own tag.

    Speeds that include start-up are left out: a curve cannot mark them.
    """
    values = {}
    for key, value in record.items():
        tag = METRICS[key].tag if key in METRICS else key
        if key in ("step", "warmup") or isinstance(value, list):
            continue
        if not (record.get("warmup") and tag.startswith("speed/")):
            values[tag] = value
    return values
