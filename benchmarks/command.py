"""The command line that all benchmarks share."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.manifest import store
from benchmarks.workers import BenchmarkError
from titan_lite.config.load import ConfigError
from titan_lite.regression.curves import CurveError


def benchmark_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m benchmarks.NAME`, with the option that all have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", metavar="FILE", help="kept in benchmarks/results/")
    return parser


def add_turns(parser: argparse.ArgumentParser, *, warmup: int, rounds: int, steps: int) -> None:
    """Adds the options that every benchmark of steps has."""
    parser.add_argument("--warmup", type=positive, default=warmup, help="steps at least")
    parser.add_argument("--rounds", type=positive, default=rounds, help="turns of each variant")
    parser.add_argument("--steps", type=positive, default=steps, help="steps of a turn")


def positive(text: str) -> int:
    """Parses a positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer greater than 0, got {text!r}")
    return int(text)


def run_benchmark(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    measured: Callable[[argparse.Namespace], Any],
    *,
    takes_overrides: bool = False,
    stored: Callable[[Any], Any] = lambda results: results,
    report: Callable[[argparse.Namespace, Any, str], int | None] = lambda _, __, text: print(text),
) -> int:
    """Keeps the results in --output and prints them; returns 2 after an error of the user's.

    An iterator's results are stored one by one, since the next may end this process. Overrides
    (--section.key=value) are in `options.overrides`. `stored` returns the part of the results that
    becomes JSON. `report` gets options, results and the JSON text, prints and draws, and returns
    an exit code other than 0.
    """
    if takes_overrides:
        options, options.overrides = parser.parse_known_args(argv)
    else:
        options = parser.parse_args(argv)
    name = parser.prog.rpartition(".")[2]
    try:
        results = measured(options)
        if isinstance(results, Iterator):
            results, iterator = [], results
            for result in iterator:
                results.append(result)
                text = store(name, stored(results), options.output)
        else:
            text = store(name, stored(results), options.output)
    except (BenchmarkError, ConfigError, CurveError) as error:
        print(error, file=sys.stderr)
        return 2
    return report(options, results, text) or 0
