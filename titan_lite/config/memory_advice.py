"""Settings that need less device memory, those that cost least speed first."""

from collections.abc import Iterator

from titan_lite.config.dims import ParallelDims
from titan_lite.config.schema import Config


def memory_advice(config: Config, dims: ParallelDims) -> list[str]:
    """Returns the three cheapest changes that would help this run: key, value and reason."""
    return list(_advice(config, dims))[:3]


def _advice(config: Config, dims: ParallelDims) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    mode = config.activation_checkpoint.mode
    if parallel.gradient_sync == "last_micro_batch":
        yield 'parallel.gradient_sync = "every_micro_batch": gradients are kept as shards'
    if dims.tp > 1 and not parallel.sequence_parallel:
        yield (
            f"parallel.sequence_parallel = true: activations between blocks shrink to 1 / {dims.tp}"
        )
    if dims.dp_replicate > 1:
        yield (
            f"parallel.dp_replicate = 1: weights, gradients and optimizer state in "
            f"{dims.fsdp * dims.dp_replicate} shards instead of {dims.fsdp}"
        )
    if isinstance(training.loss_chunks, int) and training.loss_chunks < 8:
        yield f"training.loss_chunks = {2 * training.loss_chunks}: half of the logits at a time"
    if mode == "none":
        yield 'activation_checkpoint.mode = "selective_op": cheap operations are computed twice'
    if dims.fsdp > 1 and parallel.reshard_after_forward != "always":
        yield 'parallel.reshard_after_forward = "always": no block stays gathered after forward'
    if training.local_batch_size > 1:
        yield (
            f"training.local_batch_size = {training.local_batch_size // 2}: fewer activations; set "
            "training.global_batch_size to keep the batch, by gradient accumulation"
        )
    if mode != "full":
        yield 'activation_checkpoint.mode = "full": only the inputs of blocks are kept'
    if training.param_dtype == "float32":
        yield 'training.param_dtype = "bfloat16": half of the activations'
    if training.seq_len >= 8192:
        yield f"parallel.cp = {2 * dims.cp}: each rank has a smaller part of each sequence"
    yield "more devices, for parallel.dp_shard or parallel.tp: smaller shards"
    if not parallel.cpu_offload:
        yield "parallel.cpu_offload = true: parameters and optimizer state in host memory"
    yield "a smaller training.seq_len, or a smaller model"
