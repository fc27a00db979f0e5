"""Fixtures shared by all rooms."""

import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.distributed import Workers, WorkersBySize


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support-matrix",
        metavar="PATH",
        type=Path,
        help="write what tests/parallel/test_matrix.py finds to this file, instead of comparing",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Processes inherit that a signal is ignored (by nohup, in a background job), but no handler.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    # One folder, kept between sessions, for what inductor compiles: half a minute per graph. Its
    # key lacks the instruction set, and kernels for another one give NaN.
    instructions = torch.backends.cpu.get_cpu_capability()
    folder = config.rootpath / ".pytest_cache" / "inductor" / instructions
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # A busy machine must not fail a test.
    hypothesis.settings.register_profile("titan_lite", deadline=None)
    hypothesis.settings.load_profile("titan_lite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most tests of several processes first: one at the end keeps one core waiting."""
    heavy = Counter(item.path for item in items if item.get_closest_marker("distributed"))
    items.sort(key=lambda item: -heavy[item.path])


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """Restores the logging that a run in this process has set up, whose handlers would stay."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("titan_lite")]
    loggers = [logging.root, *map(logging.getLogger, names)]
    before = [([*logger.handlers], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[int, Workers]]:
    """`workers[n]`: n processes in one gloo group, started on first use, kept for the session."""
    with WorkersBySize(tmp_path_factory) as by_size:
        yield by_size


@pytest.fixture(scope="session")
def gpu_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[int, Workers]]:
    """`gpu_workers[n]`: n processes as in `workers`, each with a GPU, over NCCL."""
    with WorkersBySize(tmp_path_factory, "cuda") as by_size:
        yield by_size


@pytest.fixture(scope="session")
def one_process(workers: Mapping[int, Workers]) -> Workers:
    return workers[1]
