"""titan-lite plan scaling: days, energy and cost as models and the number of devices grow.

The projections of Yin et al. (https://doi.org/10.1007/s11227-023-05479-7): compute-optimal training
at 20 tokens per parameter, ideal at the devices' peak, next to what the planner predicts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_lite.config.arguments import UsageError
from titan_lite.config.load import ConfigError, load_config
from titan_lite.models.plan import make_plan
from titan_lite.planner.cluster import Cluster
from titan_lite.planner.counts import num_params
from titan_lite.planner.predict import DAYS, predict
from titan_lite.planner.read import read_job

TOKENS_PER_PARAMETER = 20


def optimal_flops(parameters: float) -> float:
    """FLOPs of compute-optimal training: 6 P D with D = 20 P."""
    return 6 * parameters * TOKENS_PER_PARAMETER * parameters


def ideal_days(flops: float, devices: int, peak: float) -> float:
    """Days at the peak FLOP/s of all devices."""
    return flops / (devices * peak) / DAYS


def scaling(
    configs: Sequence[str], cluster: Cluster, gpus: Sequence[int], overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns a row for each model and number of devices, with a "reason" if it cannot run."""
    rows: list[dict[str, Any]] = []
    for path in configs:
        load_config(path, overrides)
        for count in gpus:
            row: dict[str, Any] = {"config": Path(path).stem, "gpus": count}
            try:
                plan = make_plan(path, overrides, count, with_files=False)
            except ConfigError as error:
                rows.append(row | {"reason": error.problems[0].message})
                continue
            parameters = num_params(plan.args)
            tokens = TOKENS_PER_PARAMETER * parameters
            prediction = predict(read_job(plan), cluster, tokens)
            days, seconds = prediction.seconds / DAYS, prediction.step.seconds
            low, high = prediction.interval.low / seconds, prediction.interval.high / seconds
            rows.append(
                row
                | {
                    "parameters": parameters,
                    "flops": optimal_flops(parameters),
                    "ideal_days": ideal_days(
                        optimal_flops(parameters), count, cluster.peak("bfloat16")
                    ),
                    "days": days,
                    "days_80": [days * low, days * high],
                    "mfu": prediction.mfu,
                    "fits": prediction.fits,
                    "mwh": prediction.total_mwh,
                    "cost": prediction.cost,
                }
            )
    return rows


def text(rows: Sequence[dict[str, Any]], cluster: Cluster) -> str:
    """The rows as a table."""
    lines = [
        f"20 tokens per parameter on {cluster.device.name} ({cluster.name})",
        f"{'config':<26}{'GPUs':>7}{'FLOPs':>12}{'ideal days':>12}{'days':>12}{'MFU':>7}"
        f"{'MWh':>10}{'cost':>14}  fits",
    ]
    for row in rows:
        head = f"{row['config']:<26}{row['gpus']:>7}"
        if "reason" in row:
            lines.append(f"{head}  {row['reason']}")
            continue
        lines.append(
            f"{head}{row['flops']:>12.3g}{row['ideal_days']:>12,.2f}"
            f"{row['days']:>12,.2f}{row['mfu']:>7.1%}{row['mwh']:>10,.0f}"
            f"{'$' + format(row['cost'], ',.0f'):>14}  {'yes' if row['fits'] else 'no'}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], cluster: Cluster, target: str) -> None:
    """Plots ideal and predicted days over the number of devices into the file `target`."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError(
            "--plot requires matplotlib, which is not installed: pip install matplotlib"
        ) from error
    mpl.use("Agg")
    from matplotlib import pyplot

    if all("reason" in row for row in rows):
        raise ValueError("none of the layouts can run: there is nothing to draw")
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, config in enumerate(dict.fromkeys(row["config"] for row in rows)):
        points = [row for row in rows if row["config"] == config and "days" in row]
        gpus, color = [row["gpus"] for row in points], f"C{number}"
        axes.plot(gpus, [row["ideal_days"] for row in points], "--", color=color)
        axes.plot(gpus, [row["days"] for row in points], "o-", color=color, label=config)
        low, high = ([row["days_80"][side] for row in points] for side in (0, 1))
        axes.fill_between(gpus, low, high, color=color, alpha=0.15)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"devices ({cluster.device.name})",
        ylabel="days for 20 tokens per parameter",
        title="Dashed: at the peak. Lines: predicted, with the 80 % interval",
    )
    axes.legend()
    figure.savefig(target, dpi=120, bbox_inches="tight")
