"""Parses a command line: one configuration, and overrides."""

import argparse
import re
from collections.abc import Sequence
from itertools import pairwise

# section.key=value
_OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)+=")


class UsageError(Exception):
    """Arguments or environment variables are wrong; the message is for the user."""


def split_arguments(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the configuration, if there is one, and the overrides, in any order."""
    files = [argument for argument in argv if not argument.startswith("-")]
    if "" in files:
        raise UsageError("an argument is empty; perhaps it is a shell variable that is not set")
    for before, word in pairwise(argv):
        key, separator, value = before.partition("=")
        if separator and word.lower().endswith(".toml"):
            continue
        if word in files and key.startswith("--") and "." in key and not value:
            value = "VALUE" if word == "=" else word.removeprefix("=")
            hint = " (without spaces)" if separator or word.startswith("=") else ""
            raise UsageError(f"{word!r} is not an override: write {key}={value}{hint}")
    for word in files:
        if _OVERRIDE.match(word):
            raise UsageError(f"{word!r} is not an override: write --{word}")
        # Word processors replace two hyphens by one dash.
        if (plain := word.lstrip("\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}")) != word:
            raise UsageError(f"{word!r} starts with a dash instead of two hyphens: --{plain}")
    if len(files) > 1:
        raise UsageError(f"expected one configuration, got {' and '.join(files)}")
    return next(iter(files), None), [word for word in argv if word.startswith("-")]


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, str | None, list[str]]:
    """Returns a command's options, CONFIG and the overrides, which may be in any order."""
    # After "--", the launcher passes the user's overrides, which must not be read as options.
    end = argv.index("--") if "--" in argv else len(argv)
    # argparse does not allow positional arguments in any order.
    options, rest = parser.parse_known_args(argv[:end])
    for word in rest:
        _check_option(word, parser)
    return options, *split_arguments([*rest, *argv[end + 1 :]])


def _check_option(word: str, parser: argparse.ArgumentParser) -> None:
    """Raises UsageError for an option that the command does not have; keys are checked later."""
    # Takes a third of a second, which the launcher does not need.
    from titan_lite.config.problems import did_you_mean, keys, nearest

    name, equals, _ = word.partition("=")
    if not name.startswith("--") or "." in name:
        return
    of_keys = [f"--{key}=" for key in keys() if key.endswith(f".{name[2:]}")]
    if of_keys and equals:
        return
    options = {
        option.removeprefix("--").replace("-", "_"): option
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    near = [options[match] for match in nearest(name.removeprefix("--"), options)]
    hint = did_you_mean(near or of_keys[:3]) or f"; its options are {', '.join(options.values())}"
    raise UsageError(f"{name} is not an option of {parser.prog}{hint}")


def positive(text: str) -> int:
    """Parses the value of an option, a positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps descriptions, but keeps the lines of texts with several lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def examples(*commands: str) -> str:
    """The last part of a help text: complete commands, which tests run."""
    return "\nexamples:\n" + "\n".join(f"  {command}" for command in commands)


def command_parser(
    command: str, description: str, *commands: str, notes: str = "", usage: str | None = None
) -> argparse.ArgumentParser:
    """Returns the parser of a subcommand; its help ends in notes and examples."""
    return argparse.ArgumentParser(
        prog=f"titan-lite {command}",
        usage=usage,
        description=description,
        epilog=notes + examples(*commands),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
