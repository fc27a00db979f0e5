"""Maps our tensors to those of Hugging Face.

A Hugging Face tensor consists of parts, each of which is one of our tensors. The rows of each part
are split into groups; the tensor is a sequence of groups, each with its rows of every part. Our
tensors with the weights of all experts correspond to one Hugging Face tensor per expert.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from titan_lite.checkpoint.hf_files import DTYPES, HFFolder
from titan_lite.config.problems import first_few
from titan_lite.models.args import DecoderArgs
from titan_lite.models.family import Family
from titan_lite.models.hf_config import TUNABLE, HFLayout, hf_differences
from titan_lite.models.patterns import matches, translate
from titan_lite.nn.build_model import build_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HFTensor:
    """One Hugging Face tensor. parts: our names -> number of rows in it.

    expert: index of this expert in its only part; None if the tensor has all of its parts.
    is_buffer: True if it is not a parameter; it is float32 in all files.
    """

    name: str
    parts: Mapping[str, int]
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    expert: int | None = None
    is_buffer: bool = False

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Makes the whole tensor from its parts, in order, without the vocabulary's padding."""
        if self.expert is not None:
            return parts[0][self.expert].contiguous()
        parts = [part[:rows] for part, rows in zip(parts, self.parts.values(), strict=True)]
        grouped = [part.unflatten(0, (self.groups, -1)) for part in parts]
        whole = torch.cat(grouped, dim=1).flatten(0, 1) if len(parts) > 1 else parts[0]
        return (whole.T if self.transposed else whole).contiguous()

    def read(
        self, stored: Any, part: str, offsets: Sequence[int], lengths: Sequence[int]
    ) -> Tensor:
        """Reads the box of a part at `offsets`. stored: a slice from safe_open.

        Rows after the part's last row are the padding of a vocabulary: zero.
        """
        last = min(offsets[0] + lengths[0], self.parts[part])
        columns = tuple(
            slice(offset, offset + size)
            for offset, size in zip(offsets[1:], lengths[1:], strict=True)
        )
        boxes = [
            stored[(*columns, rows)].T if self.transposed else stored[(rows, *columns)]
            for rows in self._runs(part, offsets[0], last)
        ]
        if padding := lengths[0] - sum(map(len, boxes)):
            boxes.append(torch.zeros(padding, *lengths[1:]))
        return torch.cat(boxes) if len(boxes) > 1 else boxes[0]

    def _runs(self, part: str, first: int, last: int) -> Iterator[slice]:
        """Yields the contiguous slices with the part's rows from `first` up to `last`."""
        names = list(self.parts)
        before = sum(self.parts[name] for name in names[: names.index(part)]) // self.groups
        size = self.parts[part] // self.groups
        stride = sum(self.parts.values()) // self.groups
        while first < last:
            group, row = divmod(first, size)
            count = min(size - row, last - first)
            start = group * stride + before + row
            yield slice(start, start + count)
            first += count


@dataclass(frozen=True)
class HFModel:
    """All tensors of a model in Hugging Face's layout, without the padding of the vocabulary.

    tensors: by Hugging Face name, in the order of the model. places: our name -> (Hugging Face
    names, the part's name); one Hugging Face name, or one per expert; includes both names of a tied
    weight. ignored: patterns of names that files may have in addition.
    """

    tensors: Mapping[str, HFTensor]
    places: Mapping[str, tuple[tuple[str, ...], str]]
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, family: Family, args: DecoderArgs) -> "HFModel":
        """Builds the model on the meta device, to get its shapes."""
        with torch.device("meta"):
            model = build_model(family, args)
        state = model.state_dict(keep_vars=True)
        buffers = {name: state[name] for name, _ in model.named_buffers() if name in state}
        parameters = dict(model.named_parameters()) | buffers
        first_name = {id(parameter): name for name, parameter in parameters.items()}
        parts: dict[str, list[str]] = {}
        places, tied = {}, []
        for name, parameter in state.items():
            part = first_name[id(parameter)]
            hf_name = translate(part, family.hf_key_map)
            places[name] = (_names(hf_name, parameter), part)
            if name == part:
                parts.setdefault(hf_name, []).append(name)
            else:
                tied.append(translate(name, family.hf_key_map))
        rows = list(family.hf_key_map)
        tensors: dict[str, HFTensor] = {}
        shapes = {
            name: model.without_padding(name, parameter).shape
            for name, parameter in parameters.items()
        }
        for name, names in parts.items():
            # The order of the map is the order of the parts.
            names.sort(key=lambda part: next(n for n, row in enumerate(rows) if matches(row, part)))
            if "*" not in name:
                tensor = _hf_tensor(name, names, shapes, family, args)
                tensors[name] = replace(tensor, is_buffer=names[0] in buffers)
                continue
            _, *shape = shapes[names[0]]
            for expert, of_expert in enumerate(_names(name, parameters[names[0]])):
                tensors[of_expert] = HFTensor(
                    name=of_expert, parts={names[0]: shape[0]}, shape=tuple(shape), expert=expert
                )
        return cls(tensors, places, (*family.hf_ignored, *tied))

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of our tensor, without the padding of a vocabulary."""
        names, part = self.places[name]
        tensor = self.tensors[names[0]]
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        experts = () if tensor.expert is None else (len(names),)
        return (*experts, tensor.parts[part], *shape[1:])

    def read(
        self,
        name: str,
        stored: Callable[[str], Any],
        offsets: Sequence[int],
        lengths: Sequence[int],
    ) -> Tensor:
        """Reads the box of our tensor at `offsets`. stored: gets a Hugging Face tensor's slice."""
        names, part = self.places[name]
        if self.tensors[names[0]].expert is None:
            return self.tensors[names[0]].read(stored(names[0]), part, offsets, lengths)
        box = torch.empty(0)
        for index in range(lengths[0]):
            hf_name = names[offsets[0] + index]
            rows = self.tensors[hf_name].read(stored(hf_name), part, offsets[1:], lengths[1:])
            if index == 0:
                box = rows.new_empty(tuple(lengths))
            box[index] = rows
        return box

    @property
    def num_parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def check(self, folder: HFFolder) -> None:
        """Raises ValueError with all differences between this model and a folder's tensors."""
        stored = folder.tensors
        pairs = [(tensor, stored[name]) for name, tensor in self.tensors.items() if name in stored]
        problems = {
            "lacks": [name for name in self.tensors if name not in stored],
            "has tensors that this model does not have:": [
                name
                for name in stored
                if name not in self.tensors
                and not any(matches(pattern, name) for pattern in self.ignored)
            ],
            "has other shapes:": [
                f"{tensor.name} {given.shape}, not {tensor.shape}"
                for tensor, given in pairs
                if given.shape != tensor.shape
            ],
            f"has dtypes other than {', '.join(DTYPES.values())}:": [
                f"{tensor.name} {given.dtype}"
                for tensor, given in pairs
                if given.dtype not in DTYPES.values()
            ],
        }
        clauses = [f"{words} {first_few(names, 4)}" for words, names in problems.items() if names]
        if clauses:
            raise ValueError(f"{folder.path} {'; '.join(clauses)}")


def check_start(folder: HFFolder, hf: HFModel, family: Family, args: DecoderArgs) -> None:
    """Raises ValueError if the folder has a different model.

    Only warns about fields in TUNABLE, which a run may change on purpose.
    """
    assert family.hf_config is not None
    architecture = family.hf_config.architecture
    if not family.hf_config.matches_architecture(
        architectures := folder.config.get("architectures") or []
    ):
        raise ValueError(
            f'model.name = "{family.name}" requires architecture {architecture}, got '
            f"{architectures} in {folder.path}"
        )
    different = hf_differences(folder.config, family.hf_config, args)
    tuned = {name: different.pop(name) for name in TUNABLE if name in different}
    if different:
        words = [
            f"{name} must be {stored}, got {value}" for name, (stored, value) in different.items()
        ]
        raise ValueError(f"[model] does not match {folder.path}: {'; '.join(words)}")
    for name, (hf_value, value) in tuned.items():
        logger.warning(
            "%s was trained with %s %s, this run has %s", folder.path, name, hf_value, value
        )
    hf.check(folder)


def _names(hf_name: str, parameter: Tensor) -> tuple[str, ...]:
    """Hugging Face names of our tensor: one for each expert if the name has a `*`."""
    if "*" not in hf_name:
        return (hf_name,)
    return tuple(hf_name.replace("*", str(expert)) for expert in range(len(parameter)))


def _hf_tensor(
    name: str,
    parts: Sequence[str],
    shapes: Mapping[str, torch.Size],
    family: Family,
    args: DecoderArgs,
) -> HFTensor:
    layouts = (layout for pattern, layout in family.hf_layouts.items() if matches(pattern, name))
    layout = next(layouts, HFLayout())
    rows = {part: shapes[part][0] for part in parts}
    shape = (sum(rows.values()), *shapes[parts[0]][1:])
    return HFTensor(
        name=name,
        parts=rows,
        shape=shape[::-1] if layout.transposed else shape,
        groups=getattr(args, layout.groups) if layout.groups else 1,
        transposed=layout.transposed,
    )
