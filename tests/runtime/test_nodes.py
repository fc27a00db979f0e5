"""Launchers that meet at an endpoint, each in a separate thread."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from tests.distributed import GUARD
from titan_lite.runtime import nodes
from titan_lite.runtime.nodes import (
    FirstNode,
    JobSettings,
    Nodes,
    NodesError,
    Verdict,
    connect,
    listen,
)

JOB = JobSettings("job", NNODES=2, NGPU=1, MAX_RESTARTS=1)


@pytest.fixture
def port() -> int:
    """One that is free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def together() -> Iterator[Callable[..., list[object]]]:
    """Calls functions at the same time and returns their results."""
    with ThreadPoolExecutor(4) as threads:

        def call(*functions: Callable[[], object]) -> list[object]:
            futures = [threads.submit(function) for function in functions]
            return [future.result(timeout=GUARD) for future in futures]

        yield call


def meet(together: Callable[..., list[object]], port: int) -> tuple[Nodes, Nodes]:
    first = connect(JOB, "localhost", port, print)
    assert isinstance(first, FirstNode)
    started, other = together(
        partial(first.start, 7), lambda: connect(JOB, "localhost", port, print)
    )
    assert started.port == 7
    assert other.start(0) == replace(started, node=1)
    return first, other


def test_nodes_start_together_and_end_with_the_worst_code(
    together: Callable[..., list[object]], port: int
) -> None:
    first, other = meet(together, port)
    first.poll()
    other.poll()
    assert not first.events
    assert not other.events
    verdicts = together(
        lambda: first.agree(0, is_stopping=False), lambda: other.agree(75, is_stopping=True)
    )
    assert verdicts == [Verdict(75, again=False)] * 2


def test_a_failure_on_one_node_reaches_the_others_and_is_tried_again_as_often_as_asked(
    together: Callable[..., list[object]], port: int
) -> None:
    first, other = meet(together, port)
    for attempt in (0, 1):
        other.report("failed")
        verdicts = together(
            lambda: first.agree(143, is_stopping=False), lambda: other.agree(1, is_stopping=False)
        )
        assert first.events == {"failed"}
        assert verdicts == [Verdict(1, again=attempt == 0)] * 2
        if attempt == 0:
            starts = together(lambda: first.start(8), lambda: other.start(0))
            assert [start.attempt for start in starts] == [1, 1]
            assert not first.events
            assert not other.events


def test_the_end_of_one_node_by_a_failure_is_told_to_the_others_that_still_run(
    together: Callable[..., list[object]], port: int
) -> None:
    first, other = meet(together, port)

    def run_until_failed(node: Nodes) -> Verdict:
        deadline = time.monotonic() + 30
        while not node.events and time.monotonic() < deadline:
            node.poll()
            time.sleep(0.01)
        return node.agree(143, is_stopping=False)

    nodes = [first, other]
    for failing, running in (nodes, reversed(nodes)):
        verdicts = together(
            partial(failing.agree, 1, is_stopping=False), partial(run_until_failed, running)
        )
        assert running.events == {"failed"}
        assert [verdict.code for verdict in verdicts] == [1, 1]
        if verdicts[0].again:
            together(partial(first.start, 8), partial(other.start, 0))


def test_mistakes_and_stops_are_not_tried_again(
    together: Callable[..., list[object]], port: int
) -> None:
    first, other = meet(together, port)
    verdicts = together(
        lambda: first.agree(1, is_stopping=False), lambda: other.agree(2, is_stopping=False)
    )
    assert verdicts == [Verdict(2, again=False)] * 2
    alone = FirstNode(replace(JOB, NNODES=1), print)
    alone.start(0)
    assert alone.agree(1, is_stopping=True) == Verdict(1, again=False)
    alone.start(0)
    assert alone.agree(1, is_stopping=False) == Verdict(1, again=False)


def test_a_node_that_has_gone_fails_the_attempt_and_can_be_replaced(
    together: Callable[..., list[object]], port: int
) -> None:
    first, other = meet(together, port)
    other._first.close()  # type: ignore[attr-defined]
    assert together(lambda: first.agree(143, is_stopping=False)) == [Verdict(1, again=True)]
    started, replaced = together(
        lambda: first.start(9), lambda: connect(JOB, "localhost", port, print)
    )
    assert (started.attempt, replaced.start(0).node) == (1, 1)
    # The first one goes: it holds the store, and nobody can take its place.
    first._running[0].close()  # type: ignore[attr-defined]
    verdict = replaced.agree(75, is_stopping=False)
    assert replaced.events == {"failed"}
    assert verdict == Verdict(1, again=False)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (replace(JOB, NGPU=8), "NGPU is 8 here and 1 on the first node"),
        (replace(JOB, RDZV_ID="b"), "RDZV_ID is b here and job on the first node"),
        (JOB, "job 'job' already has its 2 nodes; if this is a different job, set another RDZV_"),
    ],
)
def test_a_node_of_another_job_or_too_many_are_refused(
    together: Callable[..., list[object]], port: int, job: JobSettings, message: str
) -> None:
    first, _other = meet(together, port)

    def answer() -> None:
        with contextlib.suppress(NodesError):
            first.agree(0, is_stopping=False)

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(answer)
        with pytest.raises(NodesError, match=message) as error:
            connect(job, "localhost", port, print)
        _other.agree(0, is_stopping=False)
        waiting.result(timeout=GUARD)
    assert error.value.code == 2


@pytest.mark.parametrize("text", [b'{"titan_lite": 5}\n', b"{}\n", b"[1]\n", b"GET / HTTP/1.1\r\n"])
def test_programs_that_are_no_launchers_are_turned_away(text: bytes) -> None:
    server = listen(0)
    first = FirstNode(JOB, lambda _: None, server)
    with server, socket.create_connection(("127.0.0.1", server.getsockname()[1])) as stranger:
        stranger.sendall(text)
        stranger.shutdown(socket.SHUT_WR)
        stranger.setblocking(False)
        while True:
            first.poll()
            try:
                assert stranger.recv(1) == b""
                break
            except BlockingIOError:
                continue


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"{}\n", b"1\n"])
def test_a_port_that_another_program_has_is_told_from_a_launcher(
    monkeypatch: pytest.MonkeyPatch, reply: bytes
) -> None:
    monkeypatch.setattr(nodes, "ANSWER_SECONDS", 1.0)
    with ThreadPoolExecutor(1) as threads, socket.create_server(("", 0)) as server:
        answered = threads.submit(lambda: server.accept()[0])
        if reply:
            answered.add_done_callback(lambda future: future.result().sendall(reply))
        taken = server.getsockname()[1]
        message = f"^localhost:{taken} is in use by another program: set RDZV_ENDPOINT to a free"
        with pytest.raises(NodesError, match=message) as error:
            connect(JOB, "localhost", taken, print)
        answered.result().close()
    assert error.value.code == 2


def test_what_is_awaited_is_said_and_not_awaited_for_ever(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setattr(nodes, "WAIT_SECONDS", 0.5)
    messages: list[str] = []
    first = connect(JOB, "localhost", port, messages.append)
    with pytest.raises(NodesError, match=f"waiting for 1 of 2 nodes at localhost:{port}$") as error:
        first.start(0)
    assert messages == [f"Waiting for 1 of 2 nodes at localhost:{port}"]
    assert error.value.code == 1
    monkeypatch.setattr(nodes, "_is_of_this_machine", lambda _: False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(NodesError, match="gave up waiting for the first node at node0:5: refused"):
        connect(JOB, "node0", 5, messages.append)
    assert messages[1:] == ["Waiting for the first node at node0:5: refused"]


def refuse(*_: object, **__: object) -> None:
    raise OSError("refused")
