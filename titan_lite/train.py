"""The process that trains: `torchrun -m titan_lite.train CONFIG [--section.key=value ...]`."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence

from titan_lite.config.arguments import UsageError, split_arguments
from titan_lite.config.load import ConfigError, Problem
from titan_lite.models.plan import make_plan
from titan_lite.runtime.log import is_first_to_print, set_up_logging, set_up_streams
from titan_lite.runtime.other_launchers import unexpected_start
from titan_lite.runtime.parent import PARENT, watch_parent
from titan_lite.runtime.progress import Progress
from titan_lite.runtime.stop import (
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_STOPPED_UNSAVED,
    EXIT_USAGE,
    StopRequest,
    handled_signals,
)
from titan_lite.runtime.writing import WriteError

USAGE = "usage: titan-lite train CONFIG [--section.key=value ...]"
# Variables that a launcher sets for each process. Without them there is only this process.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = "environment"

# Time within which the launcher stops this process after another one has failed.
LAUNCHER_SECONDS = 3.0

# Not __name__, which is "__main__" here.
logger = logging.getLogger("titan_lite.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the model of the configuration, and returns the exit code.

    2: usage or configuration error. 1: failure. 75: stopped by a signal, with a checkpoint. 143:
    stopped without one. A second SIGINT ends the process at once, with 130.
    """
    set_up_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    try:
        path, overrides = split_arguments(argv)
        if path is None:
            raise UsageError(USAGE)
        rank, world_size = position()
    except (UsageError, ConfigError) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    set_up_logging(rank)
    progress = Progress()
    stop = StopRequest(progress)
    with stop.listening():
        # Only with a launcher: a process that was started by hand may outlive its parent (nohup).
        if PARENT in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
            watch_parent(stop.launcher_has_gone)
        try:
            return _train(path, overrides, rank, world_size, stop, progress)
        except ConfigError as error:
            if is_first_to_print(str(error)):
                print(error, file=sys.stderr)
            _leave_others(EXIT_USAGE)
            return EXIT_USAGE


def _train(
    path: str,
    overrides: Sequence[str],
    rank: int,
    world_size: int,
    stop: StopRequest,
    progress: Progress,
) -> int:
    plan = make_plan(path, overrides, world_size)
    if rank == 0:
        logger.info("Starting %s in %d process%s", path, world_size, "es" if world_size > 1 else "")
    # torch takes seconds to import, so configuration errors are reported before. Its objects live
    # until the end: without garbage collection the import is 10 % faster.
    gc.disable()
    from titan_lite.optim.nonfinite import NonFiniteError
    from titan_lite.runtime.distributed import stop_process_group
    from titan_lite.training.open_run import open_run

    gc.freeze()
    gc.enable()

    try:
        trainer = open_run(plan, stop=stop, progress=progress)
    except WriteError as error:
        return _end(error)
    try:
        trainer.train()
    except NonFiniteError as error:
        if rank == 0:
            logger.error("%s", error)
        return EXIT_FAILED
    except WriteError as error:
        return _end(error)
    except Exception as error:
        # gloo reports "Connection closed by peer" if another process has ended.
        if "by peer" in str(error) and stop.comes_within(LAUNCHER_SECONDS):
            logger.info("Exiting because another process failed; its message has the cause")
            _leave_others(EXIT_FAILED)
            return EXIT_FAILED
        if progress.phase == "data" and isinstance(error, ValueError | OSError):
            # A document cannot be read; the message has its file and line.
            return _end(error)
        has_timed_out = "timed out" in str(error).lower()
        # Ranks that waited for another one have the same message.
        if is_first_to_print("timed out" if has_timed_out else str(error)):
            logger.error("%s", error)
            logger.exception("Failed in step %d (%s)", progress.step, progress.phase)
        if trainer.watchdog.logs and has_timed_out:
            logger.error("%s", trainer.watchdog.report())
        _leave_others(EXIT_FAILED)
        return EXIT_FAILED
    finally:
        trainer.close()
    stop_process_group()
    if trainer.is_stopping:
        return EXIT_STOPPED if plan.config.checkpoint.enable else EXIT_STOPPED_UNSAVED
    return 0


def _end(error: Exception) -> int:
    """Ends a failed process with the error's message, without a traceback."""
    if is_first_to_print(str(error)):
        logger.error("%s", error)
    _leave_others(EXIT_FAILED)
    return EXIT_FAILED


def _leave_others(code: int) -> None:
    """Ends this process at once if it has a launcher, because others may be waiting for it."""
    if "RANK" in os.environ:
        from titan_lite.runtime.distributed import exit_immediately

        exit_immediately(code)


def position() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes.

    Raises ConfigError if only some of the launcher's variables are set, or a value is not valid.
    """
    if "RANK" in os.environ:
        missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
        message = "not set, though RANK is: start with run_train.sh or torchrun"
        if missing:
            raise ConfigError([Problem(name, ENVIRONMENT, message) for name in missing])
        world_size = _integer("WORLD_SIZE", 1, 2**31 - 1)
        _integer("LOCAL_RANK", 0, world_size - 1)
        _integer("MASTER_PORT", 0, 2**16 - 1)
        return _integer("RANK", 0, world_size - 1), world_size
    if name := unexpected_start():
        message = (
            f"is {os.environ[name]}, but RANK is not set: every process would train alone. Start "
            f"them with run_train.sh or torchrun, once per node; for a single process, unset {name}"
        )
        raise ConfigError([Problem(name, ENVIRONMENT, message)])
    return 0, 1


def _integer(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        message = f"must be an integer from {least} to {most}, got {text!r}"
        raise ConfigError([Problem(name, ENVIRONMENT, message)])
    return int(text)


if __name__ == "__main__":
    code = main()
    for number in handled_signals():
        # The run has ended: a signal must not change the exit code.
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
