"""Loading a checkpoint runs no code from its files."""

import errno
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from titan_lite.checkpoint.storage import (
    CheckpointReader,
    CheckpointWriter,
    LoadPlanner,
    first_failure,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
VOCAB_SIZE = 5


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.marker),)


def _save(folder: Path, **tensors: object) -> None:
    writer = CheckpointWriter(folder, lambda files: None)
    dcp.save(dict(tensors), storage_writer=writer)


def _load(folder: Path, **tensors: object) -> dict[str, object]:
    loaded = dict(tensors)
    dcp.load(
        loaded,
        storage_reader=CheckpointReader(folder),
        planner=LoadPlanner(VOCAB_SIZE, folder, ["other.*"]),
    )
    return loaded


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    values = {"lr": 0.5, "betas": (0.9, 0.95), "fused": True}
    _save(tmp_path, weight=torch.arange(4).bfloat16(), **values)
    loaded = _load(tmp_path, weight=torch.zeros(4), **dict.fromkeys(values, 0))
    assert torch.equal(loaded.pop("weight"), torch.arange(4).float())
    assert loaded == values


def test_code_in_the_metadata_is_refused_and_not_run(tmp_path: Path) -> None:
    _save(tmp_path, weight=torch.ones(4))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Evil(tmp_path / "marker")))
    with pytest.raises(
        ValueError, match=r"\.metadata was not loaded: refusing to unpickle posix.mkdir"
    ):
        CheckpointReader(tmp_path).read_metadata()
    assert not (tmp_path / "marker").exists()
    for name in ("load", "serialization.load", "Tensor"):
        pickled = pickle.dumps(torch.load).replace(b"load", name.encode())
        (tmp_path / ".metadata").write_bytes(pickled)
        with pytest.raises(ValueError, match="was not loaded"):
            CheckpointReader(tmp_path).read_metadata()


def test_code_in_a_value_is_refused_and_not_run(tmp_path: Path) -> None:
    _save(tmp_path, lr=_Evil(tmp_path / "marker"))
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        _load(tmp_path, lr=0.0)
    assert not (tmp_path / "marker").exists()


def test_a_full_disk_is_told_as_the_system_tells_it(tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {f"w{i}": torch.ones(size) for i, size in enumerate([4096, 64, 16384, 3] * 3)}
    for limit in range(20_000, 220_000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
        try:
            with pytest.raises(CheckpointException) as error:
                _save(tmp_path / str(limit), **tensors)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        cause = first_failure(error.value)[1]
        assert isinstance(cause, OSError)
        assert cause.errno == errno.EFBIG


def test_a_vocabulary_saved_without_padding_is_loaded_into_one_that_has_it(tmp_path: Path) -> None:
    weight = torch.arange(15.0).view(5, 3)
    _save(tmp_path, weight=weight)
    loaded = _load(tmp_path, weight=torch.zeros(128, 3))
    assert torch.equal(loaded["weight"], torch.nn.functional.pad(weight, (0, 0, 0, 123)))
    for shape in ((6, 3), (256, 3), (128, 4)):
        with pytest.raises(CheckpointException, match=r"weight has shape \(5, 3\) in .* and \("):
            _load(tmp_path, weight=torch.zeros(shape))
