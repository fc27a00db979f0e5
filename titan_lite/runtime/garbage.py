"""Manual garbage collection, so that all ranks pause at the same step."""

import gc


class GarbageCollector:
    """Turns the automatic collector off inside its context, and collects every `freq` steps.

    If each rank collected at a different time, the others would wait for it in the next collective.
    """

    def __init__(self, freq: int) -> None:
        self._freq = freq

    def __enter__(self) -> "GarbageCollector":
        gc.disable()
        gc.collect()
        # Objects from set-up live as long as the run: later collections can skip them.
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        gc.enable()

    def after_step(self, step: int, _: object = None) -> None:
        if step % self._freq == 0:
            gc.collect(1)
