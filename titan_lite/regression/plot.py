"""Plots a comparison with matplotlib, which the extra `plot` installs."""

from pathlib import Path

import numpy as np

from titan_lite.regression.compare import Comparison
from titan_lite.regression.curves import CurveError
from titan_lite.regression.panels import LOG_RATIO


def check_plot(path: Path) -> None:
    """Raises CurveError if matplotlib is not installed, or cannot write this kind of file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CurveError(
            "--plot requires matplotlib, which is not installed: pip install matplotlib"
        ) from None
    if path.suffix.removeprefix(".") not in Figure().canvas.get_supported_filetypes():
        raise CurveError(f"--plot: {path}: matplotlib does not support this format; use .png")


def plot(comparison: Comparison, path: Path) -> None:
    """Plots loss and gradient norm: both curves, and below them the difference and the band."""
    from matplotlib.figure import Figure

    names = ("loss", "grad_norm")
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, height_ratios=(2, 1))
    steps = comparison.a.steps
    for name, (above, below) in zip(names, axes.T, strict=True):
        track = comparison.tracks[name]
        smoothed = comparison.tier == "statistical"
        for curve, line, color in ((comparison.a, track.a, "C0"), (comparison.b, track.b, "C1")):
            if smoothed:
                above.plot(steps, curve.values[name], color=color, linewidth=0.5, alpha=0.4)
            style = "-" if curve is comparison.a else "--"
            above.plot(steps, line, style, color=color, linewidth=1.3, label=curve.name)
        drawn = np.concatenate([track.a, track.b])
        if name == "grad_norm" and np.nanmax(drawn) > LOG_RATIO * np.nanmin(drawn) > 0:
            above.set_yscale("log")
        above.set_title(f"{name}, smoothed" if smoothed else name)
        above.legend()
        band = 100 * track.band
        below.fill_between(steps, -band, band, color="0.85", label="allowed")
        below.plot(steps, 100 * track.difference, color="C3", linewidth=1.0)
        if len(track.outside):
            below.axvline(steps[track.outside[0]], color="C3", linestyle=":", linewidth=1.0)
        below.set_ylabel("B from A, %")
        below.set_xlabel("step")
        below.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(comparison.verdict(), fontsize="medium", wrap=True)
    figure.savefig(path, dpi=110)
