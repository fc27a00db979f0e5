"""The batches of a validation: the first ones of a held-out dataset, the same every time.

Legend: as in loader.py. Sample g is the g-th of one stream over all documents, in their order;
global batches and what ranks get of them are cut as in training.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Data, Documents, Validation
from titan_lite.data.packing import IGNORED, Packing, Row, Rows
from titan_lite.data.sources import (
    Source,
    check_tokens,
    resolve_source,
    resolve_sources,
)
from titan_lite.data.streams import Position, Stream
from titan_lite.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from titan_lite.data.loader import Batch


@dataclass(frozen=True)
class HeldOut:
    """The validation set, kept in host memory for the whole run.

    batches: this rank's micro-batches. num_tokens: labels counted in those of all ranks; num_bytes:
    of text that these labels spell, where BOS and EOS spell none; num_pairs: samples of two parts
    whose label counts.
    """

    batches: "list[Batch]"
    num_tokens: int
    num_bytes: int
    num_pairs: int


def documents_held_out(validation: Validation, data: Data) -> Documents:
    """Documents of [validation]; without a dataset of its own, another split of [data]'s."""
    if validation.dataset or validation.dataset_path:
        own = validation.dataset or "bundled"
        return validation.model_copy(update={"dataset": own})
    subset = validation.subset or data.subset
    return validation.model_copy(update={"dataset": data.dataset, "subset": subset})


def resolve_held_out(validation: Validation, data: Data) -> Source:
    """Finds the documents; ValueError where they are those that are trained on."""
    skip = data.on_bad_document == "skip"
    source = resolve_source(documents_held_out(validation, data), "validation", skip=skip)
    sources = resolve_sources(data)
    if source.documents in [trained.documents for trained in sources]:
        raise SettingError(source.key, f"{source.name} is what [data] trains on, not held out")
    trained_files = {os.path.realpath(file) for trained in sources for file in trained.files}
    for file in source.files:
        if os.path.realpath(file) in trained_files:
            raise SettingError(source.key, f"[data] trains on {file}, too")
    return source


def read_held_out(
    validation: Validation,
    data: Data,
    *,
    seq_len: int,
    local_batch_size: int,
    global_batch_size: int,
    batch_rank: int,
    batch_degree: int,
    tokenizer: Tokenizer,
    rows: Rows | None = None,
) -> HeldOut:
    """Reads and tokenizes all of it, on every rank; rows: None: packed as [data] says.

    Raises ValueError where the documents are too few for `validation.steps` batches.
    """
    # Imports torch, which what is known before a run does without.
    from titan_lite.data.loader import Batch

    mine: list[Row] = []
    num_tokens = num_bytes = num_pairs = 0
    for sample, row in enumerate(
        held_out_rows(
            validation,
            data,
            seq_len=seq_len,
            global_batch_size=global_batch_size,
            tokenizer=tokenizer,
            rows=rows or Packing(data, seq_len),
        )
    ):
        counted = row.labels != IGNORED
        num_tokens += int(counted.sum())
        num_bytes += tokenizer.num_bytes(row.labels[counted], row.inputs[counted])
        num_pairs += row.pair_labels not in (None, IGNORED)
        if sample % batch_degree == batch_rank:
            mine.append(row)
    starts = range(0, len(mine), local_batch_size)
    batches = [Batch.of(mine[start : start + local_batch_size]) for start in starts]
    return HeldOut(batches, num_tokens, num_bytes, num_pairs)


def held_out_rows(
    validation: Validation,
    data: Data,
    *,
    seq_len: int,
    global_batch_size: int,
    tokenizer: Tokenizer,
    rows: Rows,
) -> Iterator[Row]:
    """Yields the samples of one validation; ValueError where the documents are too few."""
    documents = documents_held_out(validation, data)
    read = {key: getattr(documents, key) for key in Documents.model_fields}
    # In order, a few at a time.
    section = data.model_copy(
        update={**read, "shuffle": False, "num_streams": 1, "shuffle_buffer": 64, "sources": []}
    )
    source = resolve_held_out(validation, data)
    check_tokens([source], tokenizer)
    stream = Stream(
        source,
        section,
        stream=0,
        seed=0,
        tokenizer=tokenizer,
        rows=rows,
        position=Position(),
    )
    for sample in range(validation.steps * global_batch_size):
        row = stream.row(sample)
        if stream.position.block.epoch > 0:
            raise SettingError(
                "validation.steps",
                f"{validation.steps} batches of {global_batch_size} samples of "
                f"{seq_len} tokens are more than {source.name} holds: it has "
                f"{sample // global_batch_size}",
            )
        yield row
