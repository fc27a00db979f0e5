"""The planner against published runs and against the dry run, with a picture.

    python -m benchmarks.plan [--no-fits] [--output plan.json] [--picture docs/planning.png]

Predicts assets/published_rows.toml with the fitted constants, with those of the literature alone
and with each system left out of the fit (not with --no-fits, which fits nothing), and the peaks in
tests/planner/dry_runs_*.json. The file,
in benchmarks/results/, holds the errors by system and every row; the picture plots predicted over
published. Nothing is measured in seconds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import benchmark_parser, run_benchmark
from titan_lite.models.plan import make_plan
from titan_lite.planner.memory import memory
from titan_lite.planner.read import read_job
from titan_lite.tools import validate_plan

ROOT = Path(__file__).parent.parent
ROWS = str(ROOT / "assets/published_rows.toml")
MODES = ("fitted", "literature", "leave-one-system-out")
# llm-foundry's rows have separate constants; Yin et al. do not state their batch.
APART = {"without llm-foundry": ("mpt",), "without llm-foundry and yin": ("mpt", "yin")}


Facts = dict[str, Any]


def measured(options: argparse.Namespace) -> tuple[dict[str, Facts], list[Facts]]:
    """Returns predicted speeds by mode, and predicted peaks."""
    modes = MODES[:2] if options.no_fits else MODES
    time = {mode: validated(mode, refit=not options.no_fits) for mode in modes}
    return time, [place for kind in ("presets", "random") for place in peaks(kind)]


def stored(results: tuple[dict[str, Facts], list[Facts]]) -> Facts:
    """Returns the errors, and every place and row."""
    time, places = results
    return {
        "time": {mode: summary(facts) for mode, facts in time.items()},
        "memory": {
            kind: errors([p for p in places if p["kind"] == kind]) for kind in ("presets", "random")
        },
        "memory_places": places,
        "rows": [row for row in time["fitted"]["rows"] if row["predicted"] is not None],
    }


def report(options: argparse.Namespace, results: Any, text: str) -> None:
    """Prints the errors and draws the picture."""
    content = json.loads(text)["results"]
    print(json.dumps({"time": content["time"], "memory": content["memory"]}, indent=2))
    draw(*results, options.picture)


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("plan", __doc__)
    parser.set_defaults(output="plan.json")
    parser.add_argument("--picture", default=str(ROOT / "docs/planning.png"))
    parser.add_argument("--no-fits", action="store_true")
    return run_benchmark(parser, argv, measured, stored=stored, report=report)


def validated(mode: str, *, refit: bool) -> dict[str, Any]:
    """Returns the output of titan-lite plan validate --json."""
    refit = refit and mode == "fitted"
    text = validate_plan.report(ROWS, constants=mode, refit=refit, as_json=True)
    result: dict[str, Any] = json.loads(text)
    return result


def summary(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns errors over all rows, by system, and without the systems of APART."""
    keys = ("mean", "median", "p90", "worst", "null_mean", "fitted_constants")
    result = {key: facts[key] for key in keys} | {"systems": facts["systems"]}
    for words, systems in APART.items():
        sizes = [
            abs(row["error"])
            for row in facts["rows"]
            if row["error"] is not None and not row["system"].startswith(systems)
        ]
        result[words] = {"rows": len(sizes), "mean": statistics.mean(sizes)}
    return result | ({"fit": facts["fit"]} if "fit" in facts else {})


def peaks(kind: str) -> list[dict[str, Any]]:
    """Returns predicted and dry-run peaks of the places in tests/planner/dry_runs_*.json."""
    result = []
    file = ROOT / f"tests/planner/dry_runs_{kind}.json"
    for row in json.loads(file.read_text(encoding="utf-8")):
        path = f"{ROOT}/train_configs/{row['config']}.toml" if row["config"] else None
        overrides = [*row["overrides"], "--data.tokenizer_path="]
        plan = make_plan(path, overrides, row["world_size"], with_files=False)
        job = read_job(plan)
        place = memory(job)[row["place"]]
        result.append(
            {
                "kind": kind,
                "config": row["config"] or " ".join(row["overrides"]),
                "place": row["place"],
                "predicted": round(place.bytes),
                "dry_run": row["peak"],
                "error": place.bytes / row["peak"] - 1,
            }
        )
    return result


def errors(places: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns mean and worst of the places' errors."""
    sizes = [abs(place["error"]) for place in places]
    return {"places": len(sizes), "mean": statistics.mean(sizes), "worst": max(sizes)}


def draw(time: dict[str, dict[str, Any]], places: Sequence[dict[str, Any]], target: str) -> None:
    """Draws predicted over published speeds, and over dry-run peaks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5))
    for axes, mode in zip(panels, ("fitted", "literature"), strict=False):
        for number, system in enumerate(time[mode]["systems"]):
            rows = [
                row
                for row in time[mode]["rows"]
                if row["system"] == system and row["predicted"] is not None
            ]
            axes.scatter(
                [row["published"] for row in rows],
                [row["predicted"] / row["published"] for row in rows],
                s=12,
                color=f"C{number % 10}",
                marker="os^D"[number // 10],
                label=system,
            )
        axes.set(
            xscale="log",
            ylim=(0.6, 1.5),
            xlabel="published, in the row's unit",
            ylabel="predicted / published",
            title=f"Speeds, constants: {mode}",
        )
        axes.axhline(1, color="grey", lw=0.5)
    panels[0].legend(fontsize=7)
    for kind, marker in (("presets", "o"), ("random", ".")):
        of_kind = [place for place in places if place["kind"] == kind]
        panels[2].scatter(
            [place["dry_run"] / 2**30 for place in of_kind],
            [1 + place["error"] for place in of_kind],
            s=16,
            marker=marker,
            label=kind,
        )
    panels[2].set(
        xscale="log", ylim=(0.6, 1.5), xlabel="dry run, GiB", title="Peak memory", ylabel="ratio"
    )
    panels[2].axhline(1, color="grey", lw=0.5)
    panels[2].legend()
    figure.savefig(target, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
