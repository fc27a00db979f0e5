"""The command `titan-lite`: each subcommand parses its own arguments and imports what it needs."""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence

from titan_lite import __version__
from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import ConfigError, LoadedConfig, Problem, read_config
from titan_lite.config.render import json_schema, to_toml
from titan_lite.models import rules

OVERRIDES = """
Every key of the TOML file can be overridden: --section.key=value, the value written as in TOML,
quotes around a plain word left out. The last one wins:
  --training.steps=20 --model.flavor=llama3_8b --job.description="first try"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code: 2 for a mistake in the configuration."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (_train, "train a model (in one process; torchrun or run_train.sh start many)"),
        "config": (_config, "check a configuration and print it with the origin of each value"),
    }
    parser = argparse.ArgumentParser(
        prog="titan-lite",
        description="FSDP2-native pre-training of transformer language models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<8} {text}" for name, (_, text) in commands.items())
        + "\n\n'titan-lite COMMAND --help' explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"titan-lite {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=commands, help="see below")
    command, _ = commands[parser.parse_args(argv[:1]).command]
    try:
        code = command(argv[1:])
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (| head) has gone; the interpreter's last flush must find an open file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    return code


def _train(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print("usage: titan-lite train CONFIG [--section.key=value ...]\n" + OVERRIDES, end="")
        return 0
    from titan_lite import train

    return train.main(argv)


def _config(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="titan-lite config",
        usage="%(prog)s [CONFIG] [--section.key=value ...] [--world-size N] [--quiet] | --schema",
        description="Checks a configuration, and prints it with the origin of each value.",
        epilog=OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of processes to check for (default: $WORLD_SIZE, else what the degrees need)",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but problems")
    parser.add_argument("--schema", action="store_true", help="print a JSON schema for editors")
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="also find the data, read the tokenizer and look for checkpoints",
    )
    # What stands behind "--" is overrides only: a launcher's user cannot mean these options.
    end = argv.index("--") if "--" in argv else len(argv)
    # CONFIG and the overrides may stand in any order, which argparse's positionals do not allow.
    options, rest = parser.parse_known_args(argv[:end])
    rest += argv[end + 1 :]
    if options.schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    path = next((argument for argument in rest if not argument.startswith("-")), None)
    if path is not None:
        rest.remove(path)
    logging.basicConfig(
        format="titan-lite: warning: %(message)s",
        level=logging.ERROR if options.quiet else logging.WARNING,
    )
    loaded = read_config(path, rest)
    if not options.quiet and not loaded.problems:
        print(to_toml(loaded), flush=True)
    plan = rules.check(loaded, _world_size(options.world_size, loaded))
    if options.preflight:
        from titan_lite.preflight import preflight

        preflight(loaded, plan)
    return 0


def _world_size(option: int | None, loaded: LoadedConfig) -> int:
    """The size asked for, else the launcher's, else the smallest that the degrees allow."""
    if option is not None:
        return option
    if (text := os.environ.get("WORLD_SIZE")) is not None:
        if not text.isdecimal():
            raise ConfigError([Problem("WORLD_SIZE", "environment", f"not a number: {text!r}")])
        return int(text)
    parallel = loaded.config.parallel
    return math.prod(max(1, getattr(parallel, axis)) for axis in ParallelDims.AXES)


if __name__ == "__main__":
    sys.exit(main())
