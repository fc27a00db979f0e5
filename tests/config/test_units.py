"""Sizes, rates and durations as texts."""

import math

import pytest

from titan_lite.config.units import format_duration, format_number, format_scaled


@pytest.mark.parametrize(
    ("value", "base", "text"),
    [
        (0, 1000, "0 B"),
        (999, 1000, "999 B"),
        (1_000, 1000, "1.00 kB"),
        (12_345, 1000, "12.3 kB"),
        (9_996, 1000, "10.0 kB"),
        (999_499, 1000, "999 kB"),
        (999_999, 1000, "1.00 MB"),
        (2.5e9, 1000, "2.50 GB"),
        (7e15, 1000, "7.00 PB"),
        (7e21, 1000, "7,000 EB"),
        (0.25, 1000, "0 B"),
        (1023, 1024, "1,023 B"),
        (1024, 1024, "1.00 KiB"),
        (2**20 - 1, 1024, "1.00 MiB"),
        (1012 * 2**20, 1024, "1,012 MiB"),
        (141 * 2**30, 1024, "141 GiB"),
    ],
)
def test_a_size_has_three_digits_in_the_unit_that_fits(value: float, base: int, text: str) -> None:
    assert format_scaled(value, "B", base) == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.0, ".1f", "0.0"),
        (12.34, ".1f", "12.3"),
        (0.34, ".1f", "0.34"),
        (0.0004, ".1f", "0.0004"),
        (0.000_012_34, "8.4f", " 1.2e-05"),
        (-0.000_5, ".2f", "-0.0005"),
        (5.0, ",.0f", "5"),
        (4.7, "9,.0f", "      4.7"),
        (0.3, "9,.0f", "      0.3"),
        (47.3, "9,.0f", "       47"),
        (12_345_678.9, "9,.0f", "12,345,679"),
        (1.2345678e12, "8.4f", "1.235e+12"),
        (math.nan, "7.4f", "    nan"),
        (math.inf, "7.4f", "    inf"),
    ],
)
def test_a_number_keeps_two_digits_however_small(value: float, form: str, text: str) -> None:
    assert format_number(value, form) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (41.4, "0:00:41"), (59.6, "0:01:00"), (3661, "1:01:01"), (90000, "25:00:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
