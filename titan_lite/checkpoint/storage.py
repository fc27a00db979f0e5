"""Files of torch.distributed.checkpoint, with checksums, and read without running code in them.

The only file with private names of torch.distributed.checkpoint.
"""

import contextlib
import dataclasses
import io
import pickle
import platform
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.utils.serialization import config as serialization

from titan_lite import __version__
from titan_lite.checkpoint.state import excludes
from titan_lite.config.problems import SettingError, quote
from titan_lite.models.args import pad_vocab_size
from titan_lite.nn.transformer import Transformer
from titan_lite.runtime.shards import with_local
from titan_lite.runtime.stored_files import StoredFile, hexadecimal

Files = dict[str, StoredFile]

# All classes in a metadata file, in addition to dtypes.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that write a checkpoint."""
    return {
        "titan_lite": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    """Returns the lowest rank with an error in a collective exception of torch, and its error."""
    rank = min(error.failures)
    return rank, error.failures[rank][0]


class _ChecksummedFile(io.BufferedWriter):
    """A file that is written sequentially, with its checksum."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.size = self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.size += memoryview(data).nbytes
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


class _ChecksummedFiles(FileSystem):
    """A file system that records size and checksum of written files."""

    def __init__(self) -> None:
        self.written: Files = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb"
        with _ChecksummedFile(path) as file:
            try:
                yield file
            except RuntimeError as error:
                # If the disk is full, torch reports an error of closing the archive instead.
                raise file.error or error from None
        self.written[Path(path).name] = StoredFile(file.size, hexadecimal(file.crc32))

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


@dataclass(frozen=True)
class _Written:
    """Message from a rank to the first rank."""

    items: list[WriteResult]
    files: Files


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes to `folder` and waits for the disk; then the first rank calls `commit`.

    commit: receives size and checksum of all ranks' files; if it raises, saving fails on all ranks.
    """

    def __init__(
        self, folder: Path, commit: Callable[[Files], None], *, single_file_per_rank: bool = True
    ) -> None:
        super().__init__(folder, sync_files=True, single_file_per_rank=single_file_per_rank)
        self.fs = self.files = _ChecksummedFiles()
        self.commit = commit

    def storage_meta(self) -> StorageMeta:
        # torch's would have the path and a random number, which differ in every save.
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[Any]:
        # torch's checksum of each tensor is not needed, as each file has one.
        with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            items = super().write_data(plan, planner).wait()
        future: Future[Any] = Future()
        future.set_result(_Written(items, self.files.written))
        return future

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        super().finish(metadata, [rank.items for rank in results])
        # The first rank has written the metadata in addition.
        files = [*(rank.files for rank in results), self.files.written]
        self.commit({name: file for of_rank in files for name, file in of_rank.items()})


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        member = None
        if name in METADATA_CLASSES.get(module, ()):
            member = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            member = getattr(torch, name)
        if member is None:
            raise pickle.UnpicklingError(
                f"refusing to unpickle {module}.{name}, which no checkpoint contains"
            )
        return member


class CheckpointReader(dcp.FileSystemReader):
    """Reads a checkpoint's files without executing any code in them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads the metadata; ValueError if the file has anything else."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            assert isinstance(metadata, Metadata), type(metadata)
        except Exception as error:
            raise ValueError(f"{path} was not loaded: {error}") from error
        metadata.storage_meta = dataclasses.replace(
            metadata.storage_meta or StorageMeta(), load_id=self.load_id
        )
        return metadata


def check_weights(source: Path, model: Transformer, excluded: Sequence[str]) -> None:
    """Raises ValueError for a weight of a checkpoint that does not fit the whole `model`."""
    metadata = CheckpointReader(source).read_metadata()
    saved, loaded = metadata.state_dict_metadata, set()
    for name, value in model.state_dict().items():
        if excludes(excluded, name):
            continue
        loaded.add(key := f"model.{name}")
        if key not in saved:
            raise _missing(key, source)
        check_shape(key, saved[key], value.shape, model.vocab_size, source)
    check_none_left(metadata, loaded, source, excluded)


def check_shape(key: str, saved: Any, shape: torch.Size, vocab_size: int, source: Path) -> None:
    """Raises ValueError if a saved tensor has another shape; it may lack vocabulary padding."""
    is_padded = shape[:1] == (pad_vocab_size(vocab_size),)
    if saved.size != shape and not (is_padded and saved.size == (vocab_size, *shape[1:])):
        raise ValueError(
            f"{key.removeprefix('model.')} has shape {tuple(saved.size)} in {source} and "
            f"{tuple(shape)} in this run; set [model] to the saved model"
        )


def check_none_left(
    metadata: Metadata, loaded: Set[str], source: Path, excluded: Sequence[str]
) -> None:
    """Raises ValueError for a saved weight that the model does not have, unless it is excluded."""
    for key in metadata.state_dict_metadata:
        name = key.removeprefix("model.")
        if name != key and key not in loaded and not excludes(excluded, name):
            raise ValueError(
                f"{source} has {name}, which this run's model does not have; set [model] to the "
                "saved model"
            )


def _missing(key: str, source: Path) -> ValueError:
    message = f"{key.removeprefix('model.')} is not in {source}, which"
    if not key.startswith("optimizer."):
        return ValueError(f"{message} is a checkpoint of another model: set [model] to that one")
    return SettingError(
        ("optimizer.name", "optimizer.groups"),
        f"{message} has the state of another optimizer: a resumed run must keep its optimizer; to "
        "start a new run from the weights, choose another job.dump_folder and set "
        f"checkpoint.initial_load_path = {quote(str(source))} and "
        "checkpoint.initial_load_model_only = true",
    )


def in_float32(tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns tensors to load into: float32 instead of torchao's quantized blocks.

    It also makes torchao's tensors slice in float32, because they can only be sliced between
    blocks, along the first dim.
    """
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    for kind in (OptimState8bit, OptimStateFp8):
        kind.implements(torch.ops.aten.slice.Tensor)(_cut)
    return {key: _dequantized(value) for key, value in tensors.items()}


def _cut(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    part: Tensor = func(args[0].dequantize(), *args[1:], **kwargs)
    return part


def _dequantized(value: Any) -> Any:
    if not isinstance(value, DTensor) or not hasattr(blocks := value.to_local(), "codes"):
        return value
    return with_local(value, blocks.dequantize())


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Names tensors that do not fit; loads a vocabulary without padding into one with padding."""

    def __init__(self, vocab_size: int, source: Path, excluded: Sequence[str]) -> None:
        """excluded: patterns of parameters that are not loaded."""
        super().__init__()
        self.vocab_size = vocab_size
        self.source = source
        self.excluded = excluded

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = dict(self.metadata.state_dict_metadata)
        for key, value in self.state_dict.items():
            if key not in saved:
                raise _missing(key, self.source)
            entry = saved[key]
            if not isinstance(entry, TensorStorageMetadata) or not isinstance(value, Tensor):
                continue
            check_shape(key, entry, value.shape, self.vocab_size, self.source)
            # Padding that was not saved stays zero.
            saved[key] = dataclasses.replace(entry, size=value.shape)
        self.metadata = dataclasses.replace(self.metadata, state_dict_metadata=saved)
        return super().create_local_plan()

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        assert self.metadata is not None
        wanted = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        check_none_left(self.metadata, wanted, self.source, self.excluded)
        return super().create_global_plan(global_plan)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch's method would unpickle any object.
        key = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[key], loaded)
