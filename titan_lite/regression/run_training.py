"""Starts a training run in separate processes, with the launcher, and waits for it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_lite.config.problems import quote
from titan_lite.regression.curves import CurveError
from titan_lite.runtime.parent import PARENT
from titan_lite.runtime.python import PYTHON

# Logs every step, and turns off sinks that a comparison does not read. Overrides replace these.
_DEFAULTS = (
    "--metrics.log_freq=1",
    "--metrics.enable_tensorboard=false",
    "--metrics.enable_wandb=false",
)


def run_training(
    config: Path, overrides: Sequence[str], nproc: int, folder: Path, *, on_cpu: bool = False
) -> None:
    """Trains into a run folder; the run's output goes to standard error.

    Raises CurveError if the run fails; the run has printed the reason.
    """
    arguments = [str(config), *_DEFAULTS, *overrides]
    arguments.append(f"--job.dump_folder={quote(str(folder))}")
    print(f"{nproc} x titan_lite.train {' '.join(arguments)}", file=sys.stderr, flush=True)
    settings = {"NGPU": str(nproc), "NNODES": "1", "MAX_RESTARTS": "0", PARENT: str(os.getpid())}
    device = {"DEVICE": "cpu"} if on_cpu else {}
    result = subprocess.run(
        [*PYTHON, "titan_lite.launch", *arguments],
        env=os.environ | settings | device,
        stdout=sys.stderr,
        check=False,
    )
    if result.returncode:
        raise CurveError(f"the run of {config} ended with exit code {result.returncode}")
