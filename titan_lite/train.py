"""The process that trains: `torchrun -m titan_lite.train CONFIG [--section.key=value ...]`."""

import logging
import os
import sys
from collections.abc import Sequence

from titan_lite.config.load import ConfigError, Problem, read_config
from titan_lite.models.rules import check
from titan_lite.runtime.log import set_up_logging

USAGE = "usage: python -m titan_lite.train CONFIG [--section.key=value ...]"
# What torchrun gives each process; without it a process is alone.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the configuration says; returns 2 for a mistake in it, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-"):
        asked = bool({"-h", "--help"} & set(argv))
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    rank = int(os.environ.get("RANK", 0))
    set_up_logging(rank)
    try:
        loaded = read_config(argv[0], argv[1:])
        plan = check(loaded, world_size())
        # torch takes seconds to import: a mistake is answered before.
        from titan_lite.runtime.distributed import stop_process_group
        from titan_lite.trainer import Trainer

        trainer = Trainer(loaded, plan)
    except ConfigError as error:
        # Once per node: what is wrong may be wrong on one node only.
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(error, file=sys.stderr)
        return 2
    try:
        trainer.train()
    except KeyboardInterrupt:
        logger.warning("Interrupted after step %d", trainer.state.step)
        return 130
    finally:
        trainer.close()
    stop_process_group()
    return 0


def world_size() -> int:
    """Processes of the job; ConfigError if the launcher's variables are there only in part."""
    if "RANK" not in os.environ:
        return 1
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            [
                Problem(name, "environment", "not set, though RANK is: start by torchrun")
                for name in missing
            ]
        )
    return int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    sys.exit(main())
