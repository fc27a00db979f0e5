"""Reads the first documents of local sources before any process starts. Does not import torch."""

from collections.abc import Sequence
from dataclasses import replace

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Data
from titan_lite.data.file_rows import LocalFiles
from titan_lite.data.formats import plain_suffix
from titan_lite.data.mixture import Mixture
from titan_lite.data.readers import DocumentReader
from titan_lite.data.sources import Source
from titan_lite.data.streams import too_few
from titan_lite.data.tokenizer import Tokenizer


def check_documents(
    section: Data, sources: Sequence[Source], tokenizer: Tokenizer, *, num_samples: int
) -> None:
    """Raises ValueError for local documents with which a run of num_samples would fail.

    These are a bad first document, an unreadable file, and fewer documents than the run's streams.
    """
    mixture = Mixture([source.weight for source in section.sources] or [1])
    for number, source in enumerate(sources):
        if not source.files:
            continue
        # After 64 rounds of all streams, each source has had each of its streams.
        samples = range(min(num_samples, 64 * section.num_streams))
        streams = {g % section.num_streams for g in samples if mixture.source(g) == number}
        own_section = section.model_copy(update={"num_streams": 1})
        # One file of each suffix: files of another suffix may not be documents.
        by_suffix = {plain_suffix(file): file for file in reversed(source.files)}
        for file in list(by_suffix.values()):
            opener = LocalFiles(((file,),), source.tokens_field or source.text_field)
            first = DocumentReader(replace(source, opener=opener), own_section, 0, tokenizer)
            first.read(1)
        reader = DocumentReader(source, own_section, 0, tokenizer)
        num_bad = 0
        while True:
            num_read, good = reader.read(1)
            if good or num_read == 0:
                break
            num_bad += 1
        if num_bad > 0 and not good:
            raise SettingError(
                source.key, f"none of the {num_bad} documents of {source.name} is usable"
            )
        # With fewer documents than streams, the last streams have none.
        if (total := reader.count(section.num_streams)) <= max(streams, default=0):
            raise too_few(source, total, section.num_streams)
