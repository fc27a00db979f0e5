"""Logging to standard output: rank 0 speaks, the others only warn."""

import logging
import sys


def set_up_logging(rank: int) -> None:
    """Sends the package's log to standard output with the rank in each line."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s [rank{rank}] %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    logger = logging.getLogger("titan_lite")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # What these warn of is the same on every rank: the configuration, checkpoints, data, tokenizer.
    same = ("config", "preflight", "checkpoint.state")
    for name in (*same, "data.files", "data.sources", "data.tokenizer"):
        logging.getLogger(f"titan_lite.{name}").setLevel(
            logging.WARNING if rank == 0 else logging.ERROR
        )
