"""The files of a Hugging Face model: config.json, safetensors and their index.

Does not import torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from titan_lite.runtime.stored_files import json_object

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Name in safetensors -> name in torch. Other dtypes are only in quantized models.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TENSORFLOW = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, and its name in it; dtype: its name in torch."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class HFFolder:
    """A folder's config.json, and the file of each tensor. No tensor is read."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "HFFolder":
        """Opens a folder; ValueError naming a file that is missing, damaged or not supported."""
        config = _read_json(path / CONFIG_FILE)
        tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(path):
            tensors |= _read_header(file)
        return cls(path, config, tensors)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weight_files(path: Path) -> list[Path]:
    """Returns the files in the index, or the only one."""
    if (path / INDEX_FILE).exists():
        weight_map = _read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path / INDEX_FILE}: no weight_map that names files")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{path / INDEX_FILE}: {name!r} is not a file of the same folder")
            if not (path / name).is_file():
                raise ValueError(f"{path / INDEX_FILE} names {name}, which does not exist")
        return [path / name for name in names]
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pth")):
        raise ValueError(
            f"{path} contains {pickles[0]}, which can run code when it is opened; only safetensors "
            "are read: write them with save_pretrained of transformers"
        )
    raise ValueError(f"{path} must contain {SINGLE_FILE} or {INDEX_FILE}")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                _modern(name): StoredTensor(
                    file, name, tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype())
                )
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged, or not a safetensors file: {error}") from error


def _modern(name: str) -> str:
    """Returns the current name of a tensor: files from TensorFlow (BERT's) have older names."""
    module, _, kind = name.rpartition(".")
    return f"{module}.{_TENSORFLOW[kind]}" if kind in _TENSORFLOW else name


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(
            f"{path.parent} has no {path.name}: not the folder of a Hugging Face model"
        )
    return json_object(path, path.read_bytes())
