"""The table of scripts/first_gpu.sh: measured values of its stages next to predicted ones.

    python -m benchmarks.first_gpu FOLDER

Prints it in Markdown and writes it to FOLDER, as table.md and, with machine and versions, as
summary.json. The predictions are arithmetic for one H200, made before the library ran on a GPU.
"""

import argparse
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.measure import Values

Range = tuple[float, float]

# Tokens/s and MFU in %, attention counted whole, of a model's compiled bfloat16 variant.
SPEEDS: dict[str, tuple[Range, Range]] = {
    # Matmuls 63 % of the step, attention 24, elementwise 5, the head's chain 3.5, optimizer 2.
    "1b": ((48_000, 58_000), (52, 62)),
    # Matmuls at 650 to 750 TFLOP/s are 74 % of the step.
    "8b": ((33_000, 39_000), (56, 66)),
}
# Tokens/s over those of the compiled bfloat16 variant.
OVER_COMPILE: dict[str, Range] = {
    # Norms and rotary embeddings are not fused: 125 kernels per block instead of 36.
    "eager": (0.75, 0.85),
    # Matmuls save 6 ms per block, maxima and casts cost 0.9.
    "compile, tensorwise": (1.20, 1.30),
    "compile, rowwise": (1.05, 1.20),
    "compile, loss in one chunk": (1.00, 1.02),
    # torch's choice on this device.
    "compile, cudnn": (0.98, 1.02),
    # Attention, 24 % of the step, takes 1.5 to 1.7 times as long.
    "compile, flash2": (0.85, 0.90),
    "compile, once more": (0.98, 1.02),
}
CEILINGS: dict[str, Range] = {
    "matmul_tflops": (770, 800),
    "sustained_matmul_tflops": (690, 800),
    "copy_tbytes_per_s": (4.1, 4.4),
}
# Rate of cuDNN's attention over that of flash attention 2.
CUDNN_OVER_FLASH: Range = (1.5, 1.7)
# Share of the step in which the device waits for the host, in %.
IDLE: Range = (0, 3)
# Seconds of a compiled step over torchtitan's.
OVER_TORCHTITAN: Range = (0.90, 1.00)


def row(stage: str, what: str, measured: Any, predicted: Range | None = None) -> Values:
    """Returns one line of the table."""
    verdict = ""
    if predicted is not None and isinstance(measured, int | float):
        low, high = predicted
        verdict = "below" if measured < low else "above" if measured > high else "as predicted"
    return {
        "stage": stage,
        "what": what,
        "predicted": predicted,
        "measured": measured,
        "verdict": verdict,
    }


def ceilings(results: Values) -> Iterator[Values]:
    """Yields the rows of benchmarks.ceilings."""
    for what, predicted in CEILINGS.items():
        yield row("ceilings", what, results[what], predicted)


def attention(results: Sequence[Values]) -> Iterator[Values]:
    """Yields the rows of benchmarks.attention."""
    for result in results:
        what = f"{result['case']}: TFLOP/s"
        yield row("attention", what, result.get("tflops", result.get("failed")))
    tflops = {result["case"]: result.get("tflops") for result in results}
    if tflops.get("cuDNN") and tflops.get("flash"):
        ratio = round(tflops["cuDNN"] / tflops["flash"], 3)
        yield row("attention", "cuDNN over flash", ratio, CUDNN_OVER_FLASH)


def features(results: Sequence[Values]) -> Iterator[Values]:
    """Yields the rows of benchmarks.features."""
    for result in results:
        losses = f"loss {result.get('first_loss', 0):.3f} to {result.get('last_loss', 0):.3f}"
        yield row("features", result["feature"], result.get("failed", losses))


def tests(path: Path) -> Iterator[Values]:
    """Yields the rows of pytest's XML report."""
    for case in ET.parse(path).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = next((o for o in ("failure", "error", "skipped") if o in tags), "passed")
        yield row("tests", case.attrib["name"], outcome)


def speeds(stage: str, results: Sequence[Values]) -> Iterator[Values]:
    """Yields the rows of benchmarks.step and benchmarks.h200."""
    wps, mfu = SPEEDS["1b" if stage == "1b" else "8b"]
    for result in results:
        name = result["variant"].partition(", ")[2] or "compile"
        if "failed" in result:
            yield row(stage, name, result["failed"])
            continue
        is_base = name == "compile"
        yield row(stage, f"{name}: tokens/s", result["wps"], wps if is_base else None)
        yield row(stage, f"{name}: MFU %", result["mfu"], mfu if is_base else None)
        if result.get("wps_over_compile") and not is_base:
            predicted = OVER_COMPILE.get(name)
            yield row(stage, f"{name}: over compile", result["wps_over_compile"], predicted)
        idle = round(100 * result["idle_share"], 1)
        yield row(stage, f"{name}: no kernel ran, %", idle, None if name == "eager" else IDLE)
        yield row(stage, f"{name}: kernels per step", result["kernels_per_step"])
        yield row(stage, f"{name}: peak GiB", result["peak_memory_gib"])


def torchtitan(results: Sequence[Values]) -> Iterator[Values]:
    """Yields the rows of benchmarks.beside_torchtitan."""
    for result in results:
        what = f"{result['dtype']}, {result['mode']}: step time"
        predicted = OVER_TORCHTITAN if result["mode"] == "compile" else None
        yield row("torchtitan", what, result["seconds_over_torchtitan"]["median"], predicted)


def rows(folder: Path) -> Iterator[Values]:
    """Yields all lines of the table: for each stage, its exit code and its results."""
    runs = [line.split("\t") for line in (folder / "stages.tsv").read_text().splitlines()]
    # The last run of a stage counts.
    for stage, (code, seconds) in {stage: rest for stage, *rest in runs}.items():
        outcome = {"0": "done", "124": "time limit", "137": "killed"}.get(code, f"exit code {code}")
        yield row(stage, f"stage, {seconds} s", outcome)
        file = folder / f"{stage}.json"
        if (xml := folder / "tests.xml").exists() and stage == "tests":
            yield from tests(xml)
        elif file.exists():
            results = json.loads(file.read_text())["results"]
            if stage in ("first", "1b", "8b"):
                yield from speeds(stage, results)
            else:
                yield from READERS[stage](results)


READERS: dict[str, Any] = {
    "ceilings": ceilings,
    "attention": attention,
    "features": features,
    "torchtitan": torchtitan,
}


def table(lines: Sequence[Values]) -> str:
    """Returns the lines in Markdown."""
    text = ["| stage | what | predicted | measured | |", "|---|---|---|---|---|"]
    for line in lines:
        predicted = "{:,g} to {:,g}".format(*line["predicted"]) if line["predicted"] else ""
        measured = line["measured"]
        if isinstance(measured, int | float):
            # Rounded to four digits.
            measured = f"{float(f'{measured:.4g}'):,g}"
        cells = (line["stage"], line["what"], predicted, measured, line["verdict"])
        text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(text)


def measured(options: argparse.Namespace) -> list[Values]:
    """Returns the lines of the table."""
    options.folder = options.folder.absolute()
    options.output = options.output or str(options.folder / "summary.json")
    return list(rows(options.folder))


def report(options: argparse.Namespace, lines: Sequence[Values], stored: str) -> None:
    """Prints and writes the table."""
    manifest = json.loads(stored)["manifest"]
    keys = ("device", "driver", "cuda", "torch", "python", "git_commit")
    text = f"{', '.join(f'{key} {manifest[key]}' for key in keys)}\n\n{table(lines)}\n"
    (options.folder / "table.md").write_text(text)
    print(text, end="")


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("first_gpu", __doc__)
    parser.add_argument("folder", type=Path)
    return run_benchmark(parser, argv, measured, report=report)


if __name__ == "__main__":
    sys.exit(main())
