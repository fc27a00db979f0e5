"""Processes that stay alive and call functions one after the other, for tests and benchmarks."""

import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

# After a failure: the other processes may wait for the failed one until their own timeout.
SECONDS_AFTER_FAILURE = 60


class Processes:
    """Processes by rank; `outcomes(function, *arguments)` calls it in each.

    Each process calls `target(rank, *arguments, connection)`, which prepares it, then calls
    `serve(connection)`.
    """

    # A process may take so long to end before it is killed.
    seconds_to_leave = 0

    def __init__(
        self, context: Any, nproc: int, target: Callable[..., None], *arguments: Any
    ) -> None:
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        self.is_closed = False
        for rank in range(nproc):
            local, peer = context.Pipe()
            process = context.Process(target=target, args=(rank, *arguments, peer), daemon=True)
            process.start()
            peer.close()
            self.connections.append(local)
            self.processes.append(process)

    def outcomes(
        self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None
    ) -> Iterator[tuple[int, str, Any]]:
        """Calls the function; yields rank, outcome and value of each process.

        Outcomes are "done" with the result, "rejected" and "failed" with a message, and "died" with
        the exit code. Raises TimeoutError if none arrives for `timeout` seconds.
        """
        for connection in self.connections:
            connection.send((function, arguments))
        waiting: dict[Any, int] = {c: rank for rank, c in enumerate(self.connections)}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                ranks = sorted(waiting.values())
                raise TimeoutError(f"ranks {ranks} did not answer in {timeout} s")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    outcome, value = connection.recv()
                except EOFError:
                    self.processes[rank].join(timeout=60)
                    outcome, value = "died", self.processes[rank].exitcode
                if outcome != "done":
                    timeout = SECONDS_AFTER_FAILURE
                yield rank, outcome, value

    def close(self) -> None:
        """Ends the processes."""
        self.is_closed = True
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=self.seconds_to_leave)
            process.kill()
            process.join()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(
    connection: Connection, rejection: type[Exception] | tuple[type[Exception], ...] = ()
) -> None:
    """Runs calls until the connection is closed; only the message of a `rejection` is returned."""
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("done", function(*arguments)))
        except rejection as error:
            connection.send(("rejected", str(error)))
        except Exception:
            connection.send(("failed", traceback.format_exc()))
