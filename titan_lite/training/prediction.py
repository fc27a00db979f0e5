"""Compares the planner's prediction of a run with its measured values."""

import logging
from typing import Any

from titan_lite.metrics.meter import Meter
from titan_lite.models.plan import Plan
from titan_lite.planner.cluster import Cluster
from titan_lite.planner.predict import predict
from titan_lite.planner.read import read_job
from titan_lite.runtime.run_folder import update_run_file

logger = logging.getLogger(__name__)

GIB = 2**30


class PredictionRecorder:
    """Writes the prediction to run.json before the first step, the measured values at the end."""

    def __init__(self, plan: Plan, cluster: Cluster, meter: Meter) -> None:
        self._folder, self._meter = plan.run_folder, meter
        job = read_job(plan)
        # `tokens` affects only the length and cost of the whole run, which are not recorded.
        self._prediction = predict(job, cluster, tokens=1.0)

    def __enter__(self) -> "PredictionRecorder":
        self._update({})
        return self

    def after_step(self, step: int, _: object = None) -> None:
        """Does nothing: the measured values are written at the end."""

    def __exit__(self, *_: object) -> None:
        seconds = self._meter.seconds_per_step
        if seconds is None:
            return
        predicted, interval = self._prediction.step.seconds, self._prediction.interval
        memory = self._meter.peak_memory_gib
        self._update({"seconds_per_step": seconds, "memory_gib": memory})
        logger.info(
            "Predicted for %s: %.3g s per step (80 %% interval: %.3g to %.3g), measured: %.3g s "
            "(%+.0f %%); predicted memory: %.2f GiB, measured: %.2f GiB %s",
            self._prediction.step.cluster.name,
            predicted,
            interval.low,
            interval.high,
            seconds,
            100 * (seconds / predicted - 1),
            self._prediction.peak.bytes / GIB,
            memory,
            self._meter.memory_kind,
        )

    def _update(self, measured: dict[str, float]) -> None:
        interval = self._prediction.interval
        facts: dict[str, Any] = {
            "cluster": self._prediction.step.cluster.name,
            "predicted": {
                "seconds_per_step": self._prediction.step.seconds,
                # Bounds of the 80 % interval.
                "seconds_80": [interval.low, interval.high],
                "memory_gib": self._prediction.peak.bytes / GIB,
            },
            "measured": measured,
        }
        update_run_file(self._folder, {"prediction": facts})
