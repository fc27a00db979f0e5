"""Rendezvous of the launchers of a job: they start attempts together and agree on the result.

The first node listens at the endpoint. The others keep a connection to it, whose loss shows that a
launcher has died. No torch.
"""

import contextlib
import errno
import json
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from titan_lite.runtime.stop import EXIT_FAILED, EXIT_USAGE, ORDERLY, worst_code

WAIT_SECONDS = 600.0
# Limit for a reply; a listening launcher checks for messages ten times a second.
ANSWER_SECONDS = 15.0
POLL_SECONDS = 0.1

Log = Callable[[str], None]
Event = Literal["failed", "stopped"]
"""The attempt has failed, or a signal ended it before all processes listened for signals."""


class NodesError(Exception):
    """The nodes cannot run the job together. code: exit code of the process."""

    def __init__(self, message: str, code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class JobSettings:
    """Settings that must be equal on all nodes, named as the environment variables."""

    RDZV_ID: str
    NNODES: int
    NGPU: int
    MAX_RESTARTS: int


@dataclass(frozen=True)
class NodeStart:
    """The start of an attempt: this node's number, and the port of the store on the first node."""

    node: int
    port: int
    attempt: int


@dataclass(frozen=True)
class Verdict:
    """The common result of an attempt. again: True if all nodes start another one."""

    code: int
    again: bool


class Connection:
    """Messages over a socket, one JSON object per line; never blocks."""

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        # Detects the loss of a machine within two minutes.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, name):
                stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._stream, self._unread = stream, b""
        self.is_open = True

    def send(self, **message: object) -> None:
        try:
            self._stream.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.close()

    def receive(self) -> list[dict[str, Any]]:
        """Returns complete messages; an empty one if they are not those of a launcher."""
        while self.is_open:
            try:
                data = self._stream.recv(2**16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self._unread += data
            if not data:
                self.close()
        *lines, self._unread = self._unread.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if all(isinstance(message, dict) for message in messages):
            return messages
        self.close()
        return [{}]

    def close(self) -> None:
        self.is_open = False
        self._stream.close()


class Nodes(ABC):
    """This node's connection to the others. events: those of the attempt on any node."""

    def __init__(self, endpoint: str, log: Log) -> None:
        self.events: set[Event] = set()
        self._endpoint, self._log = endpoint, log
        # Connections to nodes that take part in the current attempt.
        self._running: list[Connection] = []

    def report(self, event: Event) -> None:
        """Notes an event of this attempt, and sends it to the others."""
        if event not in self.events:
            self.events.add(event)
            for other in self._running:
                other.send(event=event)

    @abstractmethod
    def start(self, port: int) -> NodeStart:
        """Waits for all nodes. port: that of the store, used if this is the first node."""

    @abstractmethod
    def poll(self) -> None:
        """Reads the other nodes' messages."""

    @abstractmethod
    def agree(self, code: int, *, is_stopping: bool) -> Verdict:
        """Waits until all nodes have ended the attempt. is_stopping: a signal stopped this one."""


class FirstNode(Nodes):
    """The node at the endpoint, or the only one."""

    def __init__(
        self, job: JobSettings, log: Log, server: socket.socket | None = None, endpoint: str = ""
    ) -> None:
        super().__init__(endpoint, log)
        self._job, self._server = job, server
        if server is not None:
            server.setblocking(False)
        self._attempt = -1
        # Connections that have not introduced themselves, and launchers of this job.
        self._strangers: list[Connection] = []
        self._members: list[Connection] = []
        self._ended: dict[Connection, tuple[int, bool]] = {}

    def start(self, port: int) -> NodeStart:
        last_message, deadline = "", time.monotonic() + WAIT_SECONDS
        while missing := self._job.NNODES - self._admit():
            text = f"{missing} of {self._job.NNODES} nodes at {self._endpoint}"
            if text != last_message:
                last_message = text
                self._log(f"Waiting for {text}")
                for member in self._members:
                    member.send(waiting=text)
            if time.monotonic() > deadline:
                message = f"gave up after {WAIT_SECONDS:.0f} s of waiting for {text}"
                raise NodesError(message, EXIT_FAILED)
            time.sleep(POLL_SECONDS)
        self._attempt += 1
        self.events.clear()
        self._ended, self._running = {}, list(self._members)
        for node, member in enumerate(self._running, start=1):
            member.send(start=asdict(NodeStart(node, port, self._attempt)))
        return NodeStart(0, port, self._attempt)

    def poll(self) -> None:
        self._admit()

    def agree(self, code: int, *, is_stopping: bool) -> Verdict:
        if code not in ORDERLY:
            self.report("failed")
        while len(self._ended) < len(self._running):
            time.sleep(POLL_SECONDS)
            self._admit()
        codes = [code, *(ended for ended, _ in self._ended.values())]
        is_stopping |= any(stopping for _, stopping in self._ended.values())
        is_left = self._attempt < self._job.MAX_RESTARTS
        code = worst_code(codes)
        verdict = Verdict(code, code == EXIT_FAILED and is_left and not is_stopping)
        for member in self._running:
            member.send(verdict=asdict(verdict))
        return verdict

    def _admit(self) -> int:
        """Reads all connections and admits launchers of this job; returns the number of nodes."""
        if self._server is not None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._strangers.append(Connection(self._server.accept()[0]))
        for member in self._members:
            self._read(member)
        self._members = [member for member in self._members if member.is_open]
        for stranger in list(self._strangers):
            messages = stranger.receive()
            if messages or not stranger.is_open:
                self._strangers.remove(stranger)
            if messages:
                self._greet(stranger, messages[0])
        return 1 + len(self._members)

    def _greet(self, stranger: Connection, message: dict[str, Any]) -> None:
        job, refusal = message.get("titan_lite"), None
        if not isinstance(job, dict):
            stranger.close()
            return
        for name, value in asdict(self._job).items():
            if job.get(name) != value:
                refusal = f"{name} is {job.get(name)} here and {value} on the first node"
        if refusal is None and len(self._members) + 1 == self._job.NNODES:
            refusal = (
                f"job {self._job.RDZV_ID!r} already has its {self._job.NNODES} nodes; if this is a "
                "different job, set another RDZV_ENDPOINT"
            )
        if refusal is not None:
            stranger.send(refused=refusal)
            stranger.close()
            return
        stranger.send(welcome=True)
        self._members.append(stranger)

    def _read(self, member: Connection) -> None:
        for message in member.receive():
            if "event" in message:
                self.report(message["event"])
            if "code" in message:
                self._ended[member] = message["code"], message["is_stopping"]
        if not member.is_open and member in self._running and member not in self._ended:
            self._ended[member] = EXIT_FAILED, False
            self._log(f"Lost the connection to node {self._running.index(member) + 1}")
            self.report("failed")


class OtherNode(Nodes):
    """A node that is connected to the first one."""

    def __init__(self, first: Connection, endpoint: str, log: Log) -> None:
        super().__init__(endpoint, log)
        self._first, self._running = first, [first]
        self._start: NodeStart | None = None
        self._verdict: Verdict | None = None

    def start(self, port: int) -> NodeStart:
        while self._start is None:
            if not self._first.is_open:
                message = f"lost the connection to the node at {self._endpoint}"
                raise NodesError(message, EXIT_FAILED)
            time.sleep(POLL_SECONDS)
            self.poll()
        start, self._start = self._start, None
        return start

    def poll(self) -> None:
        self.take(self._first.receive())
        if not self._first.is_open:
            self.events.add("failed")

    def agree(self, code: int, *, is_stopping: bool) -> Verdict:
        if code not in ORDERLY:
            self.report("failed")
        self._first.send(code=code, is_stopping=is_stopping)
        while self._verdict is None:
            if not self._first.is_open:
                self._log(f"Lost the connection to the node at {self._endpoint}")
                return Verdict(worst_code([code, EXIT_FAILED]), again=False)
            time.sleep(POLL_SECONDS)
            self.poll()
        verdict, self._verdict = self._verdict, None
        return verdict

    def take(self, messages: list[dict[str, Any]]) -> None:
        """Handles messages of the first node."""
        for message in messages:
            if "waiting" in message:
                self._log(f"Waiting for {message['waiting']}")
            if "start" in message:
                self._start = NodeStart(**message["start"])
                self.events.clear()
            if "event" in message:
                self.events.add(message["event"])
            if "verdict" in message:
                self._verdict = Verdict(**message["verdict"])


def connect(job: JobSettings, host: str, port: int, log: Log) -> Nodes:
    """Listens at the endpoint if it is a free port of this machine, else connects to it."""
    endpoint, is_local = f"{host}:{port}", _is_of_this_machine(host)
    if is_local:
        try:
            return FirstNode(job, log, listen(port), endpoint)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                message = f"cannot listen at port {port} of {host}: {error.strerror}"
                raise NodesError(message) from error
    # A port of this machine that is in use accepts connections at once.
    wait_seconds = ANSWER_SECONDS if is_local else WAIT_SECONDS
    for first in _connections(host, port, log, wait_seconds):
        first.send(titan_lite=asdict(job))
        messages: list[dict[str, Any]] = []
        deadline = time.monotonic() + ANSWER_SECONDS
        while not messages and first.is_open and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            messages = first.receive()
        if messages and "refused" in messages[0]:
            raise NodesError(f"{endpoint}: {messages[0]['refused']}")
        if messages and "welcome" in messages[0]:
            node = OtherNode(first, endpoint, log)
            node.take(messages[1:])
            return node
        if messages or first.is_open:
            break
    raise NodesError(
        f"{endpoint} is in use by another program: set RDZV_ENDPOINT to a free port, the same on "
        "all nodes"
    )


def _connections(host: str, port: int, log: Log, seconds: float) -> Iterator[Connection]:
    """Yields connections to an endpoint; connects again if the caller continues.

    Ends a few seconds after the first connection; raises NodesError if there is none in time.
    """
    has_warned, deadline, is_answered = False, time.monotonic() + seconds, False
    while time.monotonic() < deadline:
        try:
            connection = Connection(socket.create_connection((host, port), timeout=5))
        except OSError as error:
            if not has_warned:
                log(f"Waiting for the first node at {host}:{port}: {error.strerror or error}")
                has_warned = True
            last = error
        else:
            if not is_answered:
                is_answered, deadline = True, time.monotonic() + 5
            yield connection
        time.sleep(1)
    if not is_answered and seconds == WAIT_SECONDS:
        message = f"gave up waiting for the first node at {host}:{port}: {last.strerror or last}"
        raise NodesError(message, EXIT_FAILED)


def listen(port: int) -> socket.socket:
    """A socket on all addresses of this machine, with a backlog for all processes of a job."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
        )
    return socket.create_server(("", port), backlog=4096)


def _is_of_this_machine(host: str) -> bool:
    """Returns True if a name or address is one of this machine's."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, 0, type=socket.SOCK_STREAM
        ):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False
