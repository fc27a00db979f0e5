"""Speed and memory of compile, float8, attention kernels and other features on one or two H200.

    python -m benchmarks.h200 [--only WORD ...] [--limit 450] [--warmup 3] [--rounds 4]
        [--steps 2] [--output h200.json] [--section.key=value ...]

The variants run one after the other, since no two fit into the memory together. The last variant of
a model repeats an earlier one and shows the drift of the machine. No variant starts later than
`limit` seconds after the first. The file, in benchmarks/results/, is written after each of them;
a table is printed at the end. --only keeps the variants whose names contain one of the words.
Variants with a kernel that is not installed, or with more GPUs than there are, are left out.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch

from benchmarks.command import add_turns, benchmark_parser, positive, run_benchmark
from benchmarks.idle import kernel_time, with_idle_share
from benchmarks.manifest import DEVICE
from benchmarks.measure import Values, Variant, measure
from benchmarks.workers import BenchmarkError
from titan_lite.parallel.attention_kernel import PACKAGES

CONFIGS = "benchmarks/configs"
# The variant that the others of a model are compared with.
BASE = "compile"
COMPILE = "--compile.enable=true"
TENSORWISE = "--float8.recipe=tensorwise"
ROWWISE = "--float8.recipe=rowwise"

SUITE: dict[str, dict[str, tuple[str, ...]]] = {
    "llama3_1b": {
        "eager": (),
        BASE: (COMPILE,),
        "compile, tensorwise": (COMPILE, TENSORWISE),
        "compile, rowwise": (COMPILE, ROWWISE),
        "compile, selective_op": (COMPILE, "--activation_checkpoint.mode=selective_op"),
        "compile, loss in one chunk": (COMPILE, "--training.loss_chunks=1"),
        "compile, cudnn": (COMPILE, "--attention.kernel=cudnn"),
        "compile, flash2": (COMPILE, "--attention.kernel=flash2"),
        "compile, flash3": (COMPILE, "--attention.kernel=flash3"),
        "compile, flash4": (COMPILE, "--attention.kernel=flash4"),
        "compile, 2 GPUs": (COMPILE,),
        "compile, 2 GPUs, fsdp_symm_mem": (COMPILE, "--parallel.fsdp_symm_mem=true"),
        "compile, once more": (COMPILE,),
    },
    "llama3_8b": {
        "eager": (),
        BASE: (COMPILE,),
        "compile, tensorwise": (COMPILE, TENSORWISE),
        "compile, rowwise": (COMPILE, ROWWISE),
        "compile, once more": (COMPILE,),
    },
}


def is_available(name: str) -> bool:
    """Returns whether the GPUs and packages of a variant are there; a CPU stands for two GPUs."""
    if "2 GPUs" in name:
        return DEVICE.type == "cpu" or torch.cuda.device_count() > 1
    package = PACKAGES.get(name.rpartition(", ")[2], "torch")
    return find_spec(package.partition(".")[0]) is not None


def variants(words: Sequence[str], overrides: Sequence[str]) -> list[Variant]:
    """Returns the suite's variants whose names contain one of the words; without words, all.

    Those that need other packages or more GPUs than there are are left out.
    """
    suite = [
        Variant(
            f"{model}, {name}",
            f"{CONFIGS}/{model}.toml",
            (*settings, *overrides),
            nproc=2 if "2 GPUs" in name else 1,
        )
        for model, ways in SUITE.items()
        for name, settings in ways.items()
        if is_available(name)
    ]
    kept = [v for v in suite if not words or any(word in v.name for word in words)]
    if not kept:
        raise BenchmarkError(f"--only {' '.join(words)}: no variant has such a name")
    return kept


def measured(options: argparse.Namespace) -> Iterator[Values]:
    """Yields the result of each variant."""
    chosen = variants(options.only, options.overrides)
    for variant in chosen:
        variant.settings("outputs", options.steps)
    begin = time.monotonic()
    for variant in chosen:
        if time.monotonic() - begin > options.limit:
            yield {"variant": variant.name, "failed": "no time was left"}
        else:
            yield one(variant, options)


def one(variant: Variant, options: argparse.Namespace) -> Values:
    """Returns the variant's result, or the reason of its failure: others may still run."""
    try:
        (result,) = measure([variant], options, extra=kernel_time)
    except (BenchmarkError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return {"variant": variant.name, "failed": str(error).strip().splitlines()[-1]}
    return with_idle_share(result)


def with_ratios(results: Sequence[Values]) -> list[Values]:
    """Adds each variant's WPS over that of its model's base."""
    bases = {result["variant"]: result["wps"] for result in results if "wps" in result}
    with_ratio = []
    for result in results:
        base = bases.get(f"{result['variant'].partition(', ')[0]}, {BASE}")
        ratio = round(result["wps"] / base, 3) if base and "wps" in result else None
        with_ratio.append(result | {"wps_over_compile": ratio})
    return with_ratio


def table(results: Sequence[Values]) -> str:
    """Returns the results in Markdown."""
    lines = [
        "| variant | s per step | WPS | over compile | MFU % | peak GiB | no kernel ran |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if "failed" in result:
            lines.append(f"| {result['variant']} | {result['failed']} | | | | | |")
            continue
        cells = (
            result["variant"],
            result["seconds_per_step"]["median"],
            result["wps"],
            result["wps_over_compile"] or "",
            result["mfu"] or "",
            result["peak_memory_gib"],
            f"{result['idle_share']:.1%}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def report(_options: argparse.Namespace, results: Sequence[Values], _text: str) -> int:
    """Prints the table; returns 1 if a variant failed."""
    print(table(with_ratios(results)))
    return int(any("failed" in result for result in results))


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("h200", __doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--limit", type=positive, default=450, help="in seconds")
    add_turns(parser, warmup=3, rounds=4, steps=2)
    parser.set_defaults(output="h200.json")
    return run_benchmark(
        parser, argv, measured, takes_overrides=True, stored=with_ratios, report=report
    )


if __name__ == "__main__":
    sys.exit(main())
