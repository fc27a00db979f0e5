"""Formats sizes, rates and durations readably, from very small to very large values."""

import math
import re
from collections.abc import Sequence
from typing import Literal

PREFIXES = {
    1000: ("", "k", "M", "G", "T", "P", "E"),
    1024: ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"),
}


def format_scaled(value: float, unit: str, base: Literal[1000, 1024] = 1000) -> str:
    """Formats three digits with the fitting prefix of a unit: 1234567 "B" as 1.23 MB."""
    power, prefixes = 0, PREFIXES[base]
    # Compares the rounded value: 999,999 B are 1.00 MB.
    while _rounded(value) >= base and power + 1 < len(prefixes):
        value, power = value / base, power + 1
    decimals = 0 if power == 0 else max(2 - math.floor(math.log10(_rounded(value))), 0)
    return f"{value:,.{decimals}f} {prefixes[power]}{unit}"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}") if value < 1000 else round(value)


def format_number(value: float, form: str) -> str:
    """Formats a value with `form`, such as ".2f", unless that shows too few or too many digits.

    If fewer than two digits would remain, shows two, such as 0.0012 for ".1f". From ten million,
    shows four if the format has decimals.
    """
    text, width = f"{value:{form}}", int(re.sub(r"\D.*", "", form) or 0)
    digits = re.sub(r"\D", "", text).lstrip("0")
    if 0 < abs(value) < 10 and len(digits) < 2:
        return f"{value:.2g}".rjust(width)
    if 1e7 <= abs(value) < math.inf and not form.endswith(".0f"):
        return f"{value:.4g}".rjust(width)
    return text


def format_duration(seconds: float) -> str:
    """Formats seconds as h:mm:ss; hours may exceed 24."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
