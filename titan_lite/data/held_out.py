"""The batches of a validation: the first ones of a held-out dataset, the same every time.

Sample g is the g-th of one stream over all documents, in order; samples are distributed to ranks
as in training, see loader.py.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Data, Documents, Validation
from titan_lite.data.packing import IGNORED, Packing, Row, RowMaker
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

    batches: this rank's micro-batches. Counts over all ranks: num_tokens, labels that are not -100;
    num_bytes, of the text of these labels, without BOS and EOS; num_pairs, pairs with a label.
    """

    batches: "list[Batch]"
    num_tokens: int
    num_bytes: int
    num_pairs: int


def documents_held_out(validation: Validation, data: Data) -> Documents:
    """Returns the documents of [validation]; if it has no dataset, another split of [data]'s."""
    if validation.dataset or validation.dataset_path:
        own = validation.dataset or "bundled"
        return validation.model_copy(update={"dataset": own})
    subset = validation.subset or data.subset
    return validation.model_copy(update={"dataset": data.dataset, "subset": subset})


def resolve_held_out(validation: Validation, data: Data) -> Source:
    """Finds the documents; ValueError if they are also trained on."""
    skip = data.on_bad_document == "skip"
    source = resolve_source(documents_held_out(validation, data), "validation", skip=skip)
    sources = resolve_sources(data)
    if source.documents in [trained.documents for trained in sources]:
        raise SettingError(
            source.key,
            f"[data] trains on {source.name}: set another dataset or split in [validation]",
        )
    trained_files = {os.path.realpath(file) for trained in sources for file in trained.files}
    for file in source.files:
        if os.path.realpath(file) in trained_files:
            raise SettingError(
                source.key, f"[data] trains on {file}: set other files in [validation]"
            )
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
    rows: RowMaker | None = None,
) -> HeldOut:
    """Reads and tokenizes the whole validation set on every rank.

    rows: turns documents into samples; None: packed by data.packing. Raises ValueError if there are
    too few documents for `validation.steps` batches.
    """
    # Imports torch, which the preflight runs without.
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
    rows: RowMaker,
) -> Iterator[Row]:
    """Yields the samples of one validation; ValueError if there are too few documents."""
    documents = documents_held_out(validation, data)
    read = {key: getattr(documents, key) for key in Documents.model_fields}
    # In order, 64 documents at a time.
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
                f"{validation.steps} batches (of {global_batch_size} samples of {seq_len} tokens) "
                f"are too many: {source.name} fills {sample // global_batch_size}; set a smaller "
                "validation.steps, or add documents",
            )
        yield row
