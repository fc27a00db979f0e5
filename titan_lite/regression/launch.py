"""Starts a training run in processes of its own, through torchrun, and waits for it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_lite.config.problems import quote
from titan_lite.regression.curves import Mistake

# What a comparison needs, and without what would only cost time; overrides stand above.
_DEFAULTS = (
    "--metrics.log_freq=1",
    "--metrics.enable_tensorboard=false",
    "--metrics.enable_wandb=false",
)
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(
    config: Path, overrides: Sequence[str], nproc: int, folder: Path, *, on_cpu: bool = False
) -> None:
    """Trains into a run folder; what the run prints, its progress, goes to standard error.

    Raises Mistake where the run fails, which has said why.
    """
    command = ["titan_lite.train", str(config), *_DEFAULTS, *overrides]
    command.append(f"--job.dump_folder={quote(str(folder))}")
    print(f"{nproc} x {' '.join(command)}", file=sys.stderr, flush=True)
    if nproc > 1:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m"]
        command = [*torchrun, *command]
    # Of a launcher that this process itself may run under.
    inherited = {key: os.environ[key] for key in os.environ if key not in _LAUNCHER_VARIABLES}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc))}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    result = subprocess.run(
        [sys.executable, "-m", *command],
        env=threads | inherited | hidden,
        stdout=sys.stderr,
        check=False,
    )
    if result.returncode:
        raise Mistake(f"the run of {config} ended with exit code {result.returncode}")
