"""Builds the meter of a run, with its peak and its sinks."""

import logging
from pathlib import Path

from titan_lite.config.problems import quote
from titan_lite.config.schema import Config
from titan_lite.metrics.device import find_peak
from titan_lite.metrics.meter import Meter
from titan_lite.metrics.power import EnergyCounter
from titan_lite.metrics.sinks import Destination, open_sinks
from titan_lite.planner.counts import FlopsPerToken
from titan_lite.runtime.distributed import Process, all_reduce

logger = logging.getLogger(__name__)


def build_meter(
    config: Config, process: Process, folder: Path, flops: FlopsPerToken, *, start_step: int
) -> Meter:
    """Builds this rank's meter; rank 0 writes records below `folder`. start_step: steps done."""
    if config.activation_checkpoint.mode in ("selective_op", "memory_budget"):
        logger.info(
            "HFU is not measured: activation_checkpoint.mode = %s recomputes operations that the "
            "FLOP formula does not count",
            quote(config.activation_checkpoint.mode),
        )
    # Emulated float8 is rounded to 8 bits, but its matmuls are in float32.
    dtype = "float32" if config.float8.emulate else config.training.param_dtype
    peak = find_peak(config.metrics, process.device, dtype)
    sinks = []
    if process.rank == 0:
        sinks = open_sinks(
            config.metrics,
            Destination(
                folder=folder,
                start_step=start_step,
                num_steps=config.training.steps,
                settings=config.model_dump(),
            ),
        )
    return Meter(
        section=config.metrics,
        sinks=sinks,
        flops=flops,
        peak=peak,
        device=process.device,
        num_devices=process.world_size,
        num_steps=config.training.steps,
        start_step=start_step,
        all_reduce=all_reduce,
        energy=EnergyCounter(process.device) if config.metrics.power else None,
    )
