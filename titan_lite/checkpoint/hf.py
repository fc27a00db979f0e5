"""Reads and writes Hugging Face's safetensors, one tensor or one file at a time."""

import contextlib
import errno
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.futures import Future

from titan_lite.checkpoint.hf_files import INDEX_FILE, HFFolder, write_json
from titan_lite.checkpoint.hf_layout import HFModel
from titan_lite.checkpoint.manifest import TOKENIZER_FOLDER, CheckpointManifest, write_manifest
from titan_lite.checkpoint.storage import (
    CheckpointReader,
    CheckpointWriter,
    Files,
    first_failure,
    versions,
)
from titan_lite.models.args import DecoderArgs
from titan_lite.models.family import Family
from titan_lite.runtime.stored_files import sync_folder, write_bytes

# Prefix of the weights in a checkpoint: "model.tok_embeddings.weight".
PREFIX = "model."
AVERAGE_PREFIX = "ema."


def load_hf(model: nn.Module, folder: HFFolder, hf: HFModel) -> None:
    """Loads a model's parameters in place; each rank reads its own shards. Collective."""
    weights: dict[str, Any] = get_model_state_dict(model)
    reader = HFReader(folder, hf, {name: tensor.shape for name, tensor in weights.items()})
    dcp.load(weights, storage_reader=reader)
    # The load was in place, but torch requires this call after every load.
    set_model_state_dict(model, weights)


def hf_to_dcp(
    folder: HFFolder,
    hf: HFModel,
    target: Path,
    *,
    config: dict[str, Any],
    model: dict[str, Any],
    tokenizer: str,
    tokenizer_files: Mapping[str, bytes],
) -> None:
    """Writes a checkpoint with only the weights, in their dtypes; in one process.

    It holds one tensor at a time, and writes each to a separate file. config, model, tokenizer:
    values of the manifest. tokenizer_files: contents by name.
    """
    dtypes = {name: folder.tensors[hf_names[0]].dtype for name, (hf_names, _) in hf.places.items()}
    weights = {
        name: torch.empty(hf.shape(name), dtype=getattr(torch, dtype), device="meta")
        for name, dtype in dtypes.items()
    }
    aside = target.with_name(target.name + ".incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)

    def commit(files: Files) -> None:
        if tokenizer_files:
            (aside / TOKENIZER_FOLDER).mkdir()
            for name, content in tokenizer_files.items():
                stored = f"{TOKENIZER_FOLDER}/{name}"
                files[stored] = write_bytes(aside / stored, content)
            sync_folder(aside / TOKENIZER_FOLDER)
        manifest = CheckpointManifest(
            step=0,
            content="model",
            world_size=1,
            layout={},
            versions=versions(),
            config=config,
            files=files,
            tokenizer=tokenizer,
            model=model,
        )
        write_manifest(aside, manifest)
        sync_folder(aside)
        aside.rename(target)

    # torch keeps all tensors of a file until the end, so each tensor has a separate file.
    writer = CheckpointWriter(aside, commit, single_file_per_rank=False)
    with _one_process():
        dcp.save(
            {PREFIX.removesuffix("."): weights},
            storage_writer=writer,
            planner=_ReadWhenWritten(folder, hf),
            no_dist=True,
        )


class HFReader(dcp.FileSystemReader):
    """Reads parts of our tensors from a Hugging Face folder, for dcp.load.

    shapes: shapes of our tensors in the model, including the padding of the vocabulary.
    """

    def __init__(self, folder: HFFolder, hf: HFModel, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__(folder.path)
        self.folder = folder
        self.hf = hf
        self.shapes = shapes

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(),
                    shape,
                    [ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)],
                )
                for name, shape in self.shapes.items()
            },
            storage_data={},
        )

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> "Future[None]":
        for item in plan.items:
            name = item.storage_index.fqn
            box = _read(self.folder, self.hf, name, item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item)
            target.detach().copy_(box)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Reads each tensor only when dcp.save writes it."""

    def __init__(self, folder: HFFolder, hf: HFModel) -> None:
        super().__init__()
        self.folder = folder
        self.hf = hf

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        name = index.fqn.removeprefix(PREFIX)
        shape = self.hf.shape(name)
        return _read(self.folder, self.hf, name, [0] * len(shape), shape)


class DCPToHF:
    """Converts the weights of a checkpoint on disk to Hugging Face's files.

    dtype: a dtype's name in torch; None: as saved. average: write the average of the weights.
    Raises ValueError if the checkpoint is of another model, or has no average.
    """

    def __init__(
        self,
        source: Path,
        family: Family,
        args: DecoderArgs,
        *,
        dtype: str | None = None,
        max_shard_bytes: int = 5 * 10**9,
        average: bool = False,
    ) -> None:
        self.hf = HFModel.of(family, args)
        self.reader = _ReadOnce(source)
        metadata = self.reader.read_metadata().state_dict_metadata
        if average and not any(key.startswith(AVERAGE_PREFIX) for key in metadata):
            raise ValueError(
                f"{source} has no average of the weights: a run saves one with ema.enable = true, "
                "unless checkpoint.last_save_model_only = true"
            )
        self.keys: dict[str, str] = {}
        self.saved: dict[str, TensorStorageMetadata] = {}
        # Buffers have no average.
        for prefix in (PREFIX, AVERAGE_PREFIX) if average else (PREFIX,):
            for key, tensor in metadata.items():
                if key.startswith(prefix) and isinstance(tensor, TensorStorageMetadata):
                    name = key.removeprefix(prefix)
                    self.keys[name], self.saved[name] = key, tensor
        self.parts: dict[str, Tensor] = {}
        self._check(source)
        self.dtypes = {
            name: getattr(torch, dtype)
            if dtype and not tensor.is_buffer
            else self.saved[next(iter(tensor.parts))].properties.dtype
            for name, tensor in self.hf.tensors.items()
        }
        self.files = split_state_dict_into_shards_factory(
            {
                name: math.prod(tensor.shape) * self.dtypes[name].itemsize
                for name, tensor in self.hf.tensors.items()
            },
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_bytes,
        )

    @property
    def dtype(self) -> str:
        """The dtype for config.json: that of the first tensor."""
        return str(next(iter(self.dtypes.values()))).removeprefix("torch.")

    def write(self, target: Path, documents: Mapping[str, Mapping[str, Any] | bytes]) -> None:
        """Writes the folder `target`, with JSON or bytes by file name; collective in a group.

        The ranks divide the files among them, and each holds one at a time. The folder is renamed
        to `target` when it is complete; it then replaces an earlier one.
        """
        rank, world_size = 0, 1
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        aside = target.with_name(target.name + ".incomplete")
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        _barrier()
        names_by_file = list(self.files.filename_to_tensors.items())
        for file, names in names_by_file[rank::world_size]:
            tensors = {name: self._tensor(name) for name in names}
            _save(tensors, aside / file)
            # The permissions of a new file; safetensors lets only the owner read it.
            (aside / file).chmod(aside.stat().st_mode & 0o666)
            # Frees this file's tensors before the next one's are read.
            del tensors
        _barrier()
        if rank == 0:
            if self.files.is_sharded:
                index = {
                    "metadata": self.files.metadata,
                    "weight_map": self.files.tensor_to_filename,
                }
                write_json(aside / INDEX_FILE, index)
            for name, document in documents.items():
                if isinstance(document, bytes):
                    (aside / name).write_bytes(document)
                else:
                    write_json(aside / name, document)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
        _barrier()

    def _tensor(self, name: str) -> Tensor:
        tensor = self.hf.tensors[name]
        names = [self.keys[part] for part in tensor.parts]
        # Our tensors have all experts, so the names of one tensor's experts are consecutive.
        if self.parts.keys() != set(names):
            self.parts = {}
            for name_of_ours in tensor.parts:
                saved = self.saved[name_of_ours]
                empty = torch.empty(saved.size, dtype=saved.properties.dtype)
                self.parts[self.keys[name_of_ours]] = empty
            with _one_process():
                dcp.load(self.parts, storage_reader=self.reader, no_dist=True)
        return tensor.join([self.parts[part] for part in names]).to(self.dtypes[name])

    def _check(self, source: Path) -> None:
        for tensor in self.hf.tensors.values():
            for part in tensor.parts:
                if part not in self.saved:
                    raise ValueError(f"{source} has no weight {part}")
                size, expected = self.saved[part].size, self.hf.shape(part)
                # More rows are a vocabulary's padding.
                if size[1:] != expected[1:] or size[0] < expected[0]:
                    raise ValueError(
                        f"{part} is {tuple(size)} in {source}, {expected} in the model"
                    )


class _ReadOnce(CheckpointReader):
    """Caches the metadata, which dcp.load reads in every call."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def _read(folder: HFFolder, hf: HFModel, name: str, offsets: Any, lengths: Any) -> Tensor:
    """Reads a box of our tensor `name`."""
    with contextlib.ExitStack() as opened:

        def stored(hf_name: str) -> Any:
            place = folder.tensors[hf_name]
            file = opened.enter_context(safe_open(place.file, framework="pt"))
            return file.get_slice(place.name)

        return hf.read(name, stored, offsets, lengths)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file; OSError where the system refuses it."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # Its text alone has the number of the system's error.
        match = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = int(match[1]) if match else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Suppresses torch's warning about no_dist, and raises the cause of a CheckpointException."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise first_failure(error)[1] from error


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
