"""titan-lite plan: predicts memory, time, cost and energy of runs, without torch."""

import argparse
from collections.abc import Sequence

from titan_lite.tools import validate_plan


def validate(argv: Sequence[str]) -> int:
    """titan-lite plan validate."""
    parser = argparse.ArgumentParser(
        prog="titan-lite plan validate",
        description="Predicts the runs of a file like assets/published_rows.toml, and prints the "
        "errors by system.",
        allow_abbrev=False,
    )
    parser.add_argument("rows", metavar="ROWS.toml")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--constants",
        choices=("fitted", "literature", "leave-one-system-out"),
        default="fitted",
        help="those fitted to assets/published_rows.toml, those of the literature alone, or for "
        "each system those fitted to the file's other systems",
    )
    parser.add_argument("--fit", action="store_true", help="fit the constants to the file first")
    options = parser.parse_args(argv)
    print(
        validate_plan.report(
            options.rows, constants=options.constants, refit=options.fit, as_json=options.json
        )
    )
    return 0


def main(argv: list[str]) -> int:
    """Runs one form of the command."""
    commands = {"validate": validate}
    if argv[:1] and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    raise SystemExit(2)
