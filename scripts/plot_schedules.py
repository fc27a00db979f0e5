"""Draws docs/schedules.png: learning rates of a run, as titan_lite computes them."""

from matplotlib.figure import Figure

from titan_lite.config.schema import LRScheduler
from titan_lite.optim.schedule import lr_factor

STEPS = 1000
PANELS = (
    ({"decay_type": "cosine"}, {"decay_type": "linear"}, {"decay_type": "inverse_sqrt"}),
    (
        {"decay_type": "linear", "decay_ratio": 0.2},
        {"decay_type": "sqrt", "decay_steps": 300},
        {"decay_type": "cosine", "decay_start": 400, "decay_steps": 300},
    ),
    (
        {"decay_type": "constant", "rewarmup_start": 500, "rewarmup_steps": 100},
        {"decay_type": "cosine", "rewarmup_start": 500, "rewarmup_steps": 100},
    ),
)


def main() -> None:
    """Writes the picture."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for panel, settings in zip(figure.subplots(1, 3, sharey=True), PANELS, strict=True):
        for keys in settings:
            section = LRScheduler(warmup_steps=100, **keys)
            label = ", ".join(f"{key} = {value}" for key, value in keys.items())
            steps = range(1, STEPS + 1)
            panel.plot(steps, [lr_factor(step, section, STEPS) for step in steps], label=label)
        panel.set_xlabel("step")
        panel.legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig("docs/schedules.png", dpi=110)


if __name__ == "__main__":
    main()
