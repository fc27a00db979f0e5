"""The process that trains: `torchrun -m titan_lite.train CONFIG [--section.key=value ...]`."""

import logging
import os
import sys
from collections.abc import Sequence

from titan_lite.config.load import ConfigError, Problem, read_config
from titan_lite.models.rules import check
from titan_lite.runtime.log import set_up_logging
from titan_lite.runtime.stop import (
    EXIT_STOPPED,
    EXIT_STOPPED_UNSAVED,
    StopRequest,
    exit_code_for_launcher,
)
from titan_lite.runtime.writing import WriteError

USAGE = "usage: python -m titan_lite.train CONFIG [--section.key=value ...]"
# What torchrun gives each process; without it a process is alone.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# torchrun asks the others to stop when one process has failed, and looks ten times a second.
LAUNCHER_SECONDS = 3.0

# Not __name__, which is "__main__" here.
logger = logging.getLogger("titan_lite.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the configuration says.

    Returns 2 for a mistake in it, 1 for a failure, 75 when a signal asked to stop and a checkpoint
    was saved, 143 when none was, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-"):
        asked = bool({"-h", "--help"} & set(argv))
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    rank = int(os.environ.get("RANK", 0))
    set_up_logging(rank)
    stop = StopRequest()
    with stop.listening():
        try:
            return _train(argv, rank, stop)
        except ConfigError as error:
            # Once per node: what is wrong may be wrong on one node only.
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                print(error, file=sys.stderr)
            return 2


def _train(argv: Sequence[str], rank: int, stop: StopRequest) -> int:
    loaded = read_config(argv[0], argv[1:])
    plan = check(loaded, world_size())
    processes = plan.dims.world_size
    if rank == 0:
        logger.info(
            "Starting %s in %d process%s", argv[0], processes, "es" if processes > 1 else ""
        )
    # torch takes seconds to import: a mistake is answered before.
    from titan_lite.optim.nonfinite import NonFiniteError
    from titan_lite.runtime.distributed import leave_at_once, stop_process_group
    from titan_lite.trainer import Trainer

    try:
        trainer = Trainer(loaded, plan, stop=stop)
    except WriteError as error:
        return _end(logging.ERROR, str(error), error)
    try:
        trainer.train()
    except NonFiniteError as error:
        if rank == 0:
            logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logger.warning("Interrupted after step %d", trainer.state.step)
        return 130
    except WriteError as error:
        return _end(logging.ERROR, str(error), error)
    except Exception as error:
        # gloo's words for a process that is gone.
        if "by peer" in str(error) and stop.comes_within(LAUNCHER_SECONDS):
            return _end(logging.WARNING, "Ended: another process has failed, and says why", error)
        logger.error("%s", error)
        logger.exception("Failed in step %d (%s)", stop.progress.step, stop.progress.phase)
        if trainer.watchdog.tells and "timed out" in str(error).lower():
            logger.error("%s", trainer.watchdog.report())
        leave_at_once(error)
        return 1
    finally:
        trainer.close()
    stop_process_group()
    if trainer.outcomes.is_stopping:
        saved = loaded.config.checkpoint.enable
        return exit_code_for_launcher(EXIT_STOPPED if saved else EXIT_STOPPED_UNSAVED)
    return 0


def _end(level: int, sentence: str, error: Exception) -> int:
    """Ends a failed process with a sentence that says all, and without a traceback."""
    from titan_lite.runtime.distributed import leave_at_once

    logger.log(level, "%s", sentence)
    # torchrun's summary repeats what led to an error.
    error.__cause__ = None
    leave_at_once(error.with_traceback(None))
    return 1


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
