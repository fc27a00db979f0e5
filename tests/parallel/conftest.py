"""Fixtures shared by the comparisons with one process."""

from collections.abc import Mapping

import pytest

from tests.distributed import Workers
from tests.parallel.parity import Parity


@pytest.fixture(scope="session")
def parity(
    workers: Mapping[int, Workers],
    gpu_workers: Mapping[int, Workers],
    tmp_path_factory: pytest.TempPathFactory,
) -> Parity:
    return Parity(workers, gpu_workers, tmp_path_factory)
