"""titan-lite plan recalibrate: a factor that makes a prediction match a finished run."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_lite.config.arguments import UsageError
from titan_lite.config.dims import ParallelDims
from titan_lite.config.plugins import import_plugins
from titan_lite.config.schema import Config
from titan_lite.models.plan import Plan
from titan_lite.models.registry import resolve
from titan_lite.planner.cluster import Cluster
from titan_lite.planner.job import Job
from titan_lite.planner.predict import predict
from titan_lite.planner.read import read_job
from titan_lite.runtime.stored_files import json_object

FEWEST = 3


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run with its job.cluster and measured seconds of a step.

    Records that include start-up are left out, as is the time that steps waited for data.
    """

    job: Job
    cluster: str
    seconds: float


def read_run(folder: str) -> MeasuredRun:
    """Reads a run's folder; raises ConfigError if it has too few records."""
    try:
        run_file = Path(folder) / "run.json"
        facts = json_object(run_file, run_file.read_bytes())
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        import_plugins(facts["config"]["job"].get("plugins", []))
        config = Config.model_validate(facts["config"])
        dims = ParallelDims(**facts["mesh"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f'run.json has no "{error.args[0]}"'
        elif isinstance(error, (TypeError, AttributeError)):
            reason = "run.json was not written by a run"
        elif isinstance(error, OSError):
            reason = f"{Path(error.filename).name} cannot be read: {error.strerror}"
        raise UsageError(f"{folder} must be the folder of a finished run: {reason}") from error
    seconds = [
        record["seconds_per_step"] * (1 - record.get("data_wait", 0.0) / 100)
        for record in records
        if _is_measured(record)
    ]
    if len(seconds) < FEWEST:
        raise UsageError(
            f"{folder} has {len(seconds)} records after start-up; at least {FEWEST} are required"
        )
    family, args = resolve(config.model)
    plan = Plan(config=config, origins={}, dims=dims, family=family, args=args)
    return MeasuredRun(read_job(plan), config.job.cluster, statistics.median(seconds))


def recalibrate(run: MeasuredRun, cluster: Cluster) -> dict[str, Any]:
    """Returns measured and predicted seconds of a step, and the constant that makes them equal."""
    name, predicted = f"step/{run.job.kernels}", predict(run.job, cluster, 1.0).step.seconds
    factor = run.seconds / predicted * cluster.measured.get(name, 1.0)
    return {
        "measured_seconds": run.seconds,
        "predicted_seconds": predicted,
        "constant": name,
        "value": round(factor, 4),
    }


def _is_measured(record: Any) -> bool:
    if not isinstance(record, dict) or record.get("warmup"):
        return False
    seconds = record.get("seconds_per_step")
    return isinstance(seconds, int | float) and seconds > 0


def text(result: dict[str, Any]) -> str:
    """Formats the result, with the factor as lines for the cluster's file."""
    return (
        f"measured {result['measured_seconds']:.4g} s a step, predicted "
        f"{result['predicted_seconds']:.4g} s; in the cluster's file:\n"
        f'[measured]\n"{result["constant"]}" = {result["value"]}'
    )
