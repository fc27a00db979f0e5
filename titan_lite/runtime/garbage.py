"""Manual garbage collection, so that all ranks pause at the same step."""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def collected_every(freq: int) -> Iterator[Callable[[int], None]]:
    """Turns the automatic collector off; yields a function that collects every `freq` steps.

    A rank that collects on its own makes all the others wait for it in the next collective.
    """
    gc.disable()
    gc.collect()
    # What set-up made lives as long as the run: later collections need not look at it.
    gc.freeze()

    def collect(step: int) -> None:
        if step % freq == 0:
            gc.collect(1)

    try:
        yield collect
    finally:
        gc.unfreeze()
        gc.enable()
