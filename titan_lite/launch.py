"""Starts a run's processes on this node and watches them; `run_train.sh` calls it.

The settings are environment variables, which `run_train.sh --help` explains.
"""

import contextlib
import gc
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from titan_lite.config.arguments import UsageError, split_arguments
from titan_lite.runtime.gpus import count_gpus
from titan_lite.runtime.log import MESSAGES, set_up_streams
from titan_lite.runtime.nodes import (
    FirstNode,
    JobSettings,
    Nodes,
    NodesError,
    NodeStart,
    connect,
    listen,
)
from titan_lite.runtime.other_launchers import unexpected_start
from titan_lite.runtime.parent import MAYBE_OUT_OF_MEMORY, PARENT, watch_parent
from titan_lite.runtime.python import PYTHON
from titan_lite.runtime.stop import (
    EXIT_STOPPED_UNSAVED,
    EXIT_USAGE,
    ORDERLY,
    SENT,
    handled_signals,
    worst_code,
)

USAGE = "usage: run_train.sh [CONFIG.toml] [--section.key=value ...]"
PROGRAM = (*PYTHON, "titan_lite.train")
# Hints about processes that were killed.
HINTS: dict[int, str] = {
    signal.SIGKILL: f" {MAYBE_OUT_OF_MEMORY}",
    signal.SIGBUS: " (possibly because a data file was cut, or /dev/shm is full)",
}
DEFAULT_PORT = 29500
POLL_SECONDS = 0.1
# Longer than TERM_GRACE, after which a stuck process ends by itself.
KILL_AFTER_SECONDS = 30.0


@dataclass(frozen=True)
class Settings:
    """The command line and the environment variables."""

    config: str
    overrides: tuple[str, ...]
    job: JobSettings
    on_gpu: bool

    @classmethod
    def read(cls, argv: Sequence[str]) -> "Settings":
        path, overrides = split_arguments(argv)
        config = path or os.environ["CONFIG_FILE"]
        if not config.lower().endswith(".toml"):
            raise UsageError(f"the configuration must be a .toml file, got {config!r}")
        nodes = _number("NNODES", 1, at_least=1)
        try:
            gpus = count_gpus()
        except ValueError as error:
            raise UsageError(str(error)) from error
        processes = _number("NGPU", gpus or 2, at_least=1)
        if gpus and processes > gpus:
            raise UsageError(
                f"NGPU must be at most {gpus}, the GPUs that torch can use here, got {processes}"
            )
        if name := unexpected_start(nodes, (nodes, nodes * processes)):
            raise UsageError(
                f"{name} is {os.environ[name]}, but run_train.sh starts {processes} processes "
                f"per node (NNODES is {nodes}): run it once per node, with NNODES, or unset {name}"
            )
        run_id = os.environ.get("RDZV_ID", "titan_lite")
        job = JobSettings(run_id, nodes, processes, _number("MAX_RESTARTS", 0, at_least=0))
        return cls(config, tuple(overrides), job, gpus > 0)


def _number(name: str, default: int, *, at_least: int) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and int(text) >= at_least):
        raise UsageError(f"{name} must be an integer >= {at_least}, got {text!r}")
    return int(text)


def read_endpoint() -> tuple[str, int]:
    """Returns (host, port) of RDZV_ENDPOINT, else of MASTER_ADDR and MASTER_PORT."""
    text = os.environ.get("RDZV_ENDPOINT", "")
    if not text:
        address = os.environ.get("MASTER_ADDR")
        if not address:
            raise UsageError("NNODES > 1 requires RDZV_ENDPOINT or MASTER_ADDR")
        if ":" in address:
            address = f"[{address}]"
        text = f"{address}:{os.environ.get('MASTER_PORT') or DEFAULT_PORT}"
    host, separator, port = text.rpartition(":")
    # There is no port, possibly after an IPv6 address.
    if not separator or text.endswith("]") or (":" in host and not host.endswith("]")):
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not (_is_host(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(f"RDZV_ENDPOINT must be HOST:PORT, got {text!r}")
    return host, int(port)


def _is_host(text: str) -> bool:
    try:
        if ":" in text:
            ipaddress.IPv6Address(text)
        # socket.getaddrinfo encodes names in the same way, and raises this error.
        text.encode("idna")
    except ValueError:
        return False
    return bool(text)


class Signals:
    """Ends this process at the first signal; while training processes run, notes it instead."""

    def __init__(self) -> None:
        self.are_noted = False
        self.noted: list[signal.Signals] = []
        # Exit code once the training processes have ended; a later signal does not change it.
        self.code: int | None = None
        for number in handled_signals():
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.are_noted:
            self.noted.append(signal.Signals(number))
            return
        code = 128 + number if number == signal.SIGINT else EXIT_STOPPED_UNSAVED
        raise SystemExit(code if self.code is None else self.code)

    def take(self) -> list[signal.Signals]:
        """Signals since the last call."""
        noted, self.noted = self.noted, []
        return noted


class Attempt:
    """The training processes of this node, from their start to their end.

    was_signalled: True once a signal has requested a stop.
    """

    def __init__(self, settings: Settings, start: NodeStart, address: str, folder: str) -> None:
        """Starts the processes.

        address: that of the node with the store. folder: shared by the processes, see MESSAGES.
        """
        self._settings, self._start, self._folder = settings, start, folder
        job = settings.job
        shared = {
            "WORLD_SIZE": job.NNODES * job.NGPU,
            "LOCAL_WORLD_SIZE": job.NGPU,
            "GROUP_RANK": start.node,
            "GROUP_WORLD_SIZE": job.NNODES,
            "MASTER_ADDR": address,
            "MASTER_PORT": start.port,
            # This launcher serves the store.
            "TORCHELASTIC_USE_AGENT_STORE": True,
            MESSAGES: folder,
            PARENT: os.getpid(),
        }
        self._processes = [
            subprocess.Popen(
                [*PROGRAM, settings.config, *settings.overrides],
                env=defaults(settings)
                | os.environ
                | {name: str(value) for name, value in shared.items()}
                | {"RANK": str(start.node * job.NGPU + local), "LOCAL_RANK": str(local)},
                stdin=subprocess.DEVNULL,
                # The launcher handles Ctrl-C and a hang-up for all of them.
                start_new_session=True,
            )
            for local in range(job.NGPU)
        ]
        self.was_signalled = self._was_interrupted = False
        self._kill_at: float | None = None

    def watch(self, nodes: Nodes, signals: Signals) -> int:
        """Waits until all processes have ended; returns their common exit code."""
        while True:
            codes = [process.poll() for process in self._processes]
            if "stopped" in nodes.events or (self.was_signalled and -signal.SIGUSR1 in codes):
                # A process ended before it listened for signals, so none trains yet: the others
                # would wait for it forever.
                nodes.report("stopped")
                self.kill()
                return EXIT_STOPPED_UNSAVED
            if None not in codes:
                break
            self._handle_signals(signals.take())
            nodes.poll()
            if self._kill_at is None:
                failed = [code for code in codes if code is not None and not self._is_orderly(code)]
                if failed or "failed" in nodes.events:
                    if not failed:
                        log("Exiting because another node failed; see its log for the cause")
                    self._report_killed(codes)
                    nodes.report("failed")
                    self._send(signal.SIGTERM)
                    self._kill_at = time.monotonic() + KILL_AFTER_SECONDS
            elif time.monotonic() > self._kill_at:
                self.kill()
            time.sleep(POLL_SECONDS)
        if self._kill_at is None:
            self._report_killed(codes)
        ended = [self._code(process.returncode) for process in self._processes]
        return worst_code(ended)

    def kill(self) -> None:
        """Kills all processes and their children."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _handle_signals(self, numbers: Sequence[signal.Signals]) -> None:
        # One event can send several signals: GNU timeout to the process and to its group, a closed
        # terminal from the shell and from the system, systemd SIGHUP after SIGTERM. So only a
        # second Ctrl-C ends the run at once.
        if self._was_interrupted and signal.SIGINT in numbers:
            self.kill()
            raise SystemExit(128 + signal.SIGINT)
        self._was_interrupted |= signal.SIGINT in numbers
        if self.was_signalled or not numbers:
            return
        self.was_signalled, name = True, numbers[0].name
        hint = "; a second Ctrl-C ends at once" if self._was_interrupted else ""
        log(f"{name}: stopping within three steps{hint}")
        with contextlib.suppress(OSError):
            (Path(self._folder) / SENT).write_text(f"{name} to the launcher")
        # The signal whose handling has no time limit.
        self._send(signal.SIGUSR1)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)

    def _code(self, code: int) -> int:
        # A process that ended by SIGUSR1 did not listen for signals yet.
        return EXIT_STOPPED_UNSAVED if self.was_signalled and code == -signal.SIGUSR1 else code

    def _is_orderly(self, code: int) -> bool:
        return self._code(code) in ORDERLY

    def _report_killed(self, codes: Sequence[int | None]) -> None:
        for local, code in enumerate(codes):
            if code is None or code >= 0 or self._is_orderly(code):
                continue
            rank = self._start.node * self._settings.job.NGPU + local
            pid, name = self._processes[local].pid, signal.Signals(-code).name
            log(f"rank {rank}, process {pid}, was killed by {name}{HINTS.get(-code, '')}")


def defaults(settings: Settings) -> dict[str, str]:
    """Environment variables of the training processes, unless the user has set them."""
    processes, variables = settings.job.NGPU, {}
    if not settings.on_gpu:
        variables["OMP_NUM_THREADS"] = str(max(1, _cores() // processes))
    elif processes > 1:
        variables["OMP_NUM_THREADS"] = "1"
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return variables


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def log(message: str) -> None:
    """Prints a line, unless the terminal is closed."""
    with contextlib.suppress(OSError):
        print(f"titan-lite: {message}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and returns the processes' common exit code, or 2 for a usage error."""
    set_up_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    signals = Signals()
    if PARENT in os.environ:
        watch_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        settings = Settings.read(argv)
        if os.environ.get("DEVICE") == "cpu":
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        if code := _check(settings):
            return code
        return _run(settings, signals)
    except UsageError as error:
        log(str(error))
        return EXIT_USAGE
    except NodesError as error:
        log(str(error))
        return error.code


def _check(settings: Settings) -> int:
    """Checks the configuration once, in a separate process, before the training processes start."""
    world_size = settings.job.NNODES * settings.job.NGPU
    command = [*PYTHON, "titan_lite.cli", "config", settings.config, "--quiet"]
    command += ["--preflight", "--world-size", str(world_size), "--", *settings.overrides]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait()
        finally:
            process.kill()


def _run(settings: Settings, signals: Signals) -> int:
    job, address = settings.job, loopback()
    nodes: Nodes = FirstNode(job, log)
    if job.NNODES > 1:
        address, port = read_endpoint()
        nodes = connect(job, address, port, log)
    while True:
        server = listen(0) if job.NNODES > 1 else socket_at(address)
        start = nodes.start(server.getsockname()[1])
        with _temporary_folder() as folder:
            signals.are_noted = True
            attempt = Attempt(settings, start, address, folder)
            try:
                if start.node == 0:
                    threading.Thread(target=_serve, args=(server,), daemon=True).start()
                signals.code = attempt.watch(nodes, signals)
            except BaseException:
                attempt.kill()
                raise
        signals.are_noted = False
        verdict = nodes.agree(signals.code, is_stopping=attempt.was_signalled)
        if not verdict.again:
            return verdict.code
        signals.code = None
        log(f"Starting all processes again: restart {start.attempt + 1} of {job.MAX_RESTARTS}")


def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory(prefix="titan_lite-")
    except OSError as error:
        raise UsageError(f"{error.strerror}; set TMPDIR to a folder that can be written") from error


def loopback() -> str:
    """The loopback address, which needs no name resolution."""
    for address in ("127.0.0.1", "::1"):
        with contextlib.suppress(OSError):
            socket_at(address).close()
            return address
    raise UsageError("this machine has no loopback address: neither 127.0.0.1 nor ::1")


def socket_at(address: str) -> socket.socket:
    """A socket that listens at a free port of an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family)


def _serve(server: socket.socket) -> None:
    """Serves the store of an attempt forever; connections wait while torch is imported."""
    # See titan_lite.train.
    gc.disable()
    from torch.distributed import TCPStore

    gc.freeze()
    gc.enable()
    port = server.getsockname()[1]
    store = TCPStore(
        loopback(), port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
    )
    threading.Event().wait()
    del store


if __name__ == "__main__":
    sys.exit(main())
