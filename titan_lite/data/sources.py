"""Where documents come from: the bundled corpus, local files, or a Hugging Face dataset by name.

All are read by the streaming code of Hugging Face `datasets`, which is imported on first use.
"""

import contextlib
import functools
import glob
import hashlib
import logging
import os
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_lite.config.schema import Data, Documents
from titan_lite.data.assets import bundled_asset
from titan_lite.data.documents import RAW_ENCODING, Kind
from titan_lite.data.token_files import TokenFolder, is_token_folder
from titan_lite.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

# data.dataset -> (name on the hub, configuration)
PRESETS = {"c4": ("allenai/c4", "en")}
# File suffix, .gz apart -> builder of `datasets`
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
BUNDLED_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Source:
    """A set of documents, not yet opened."""

    name: str
    """How messages call it."""
    key: str
    """The key that chose it, for messages."""
    identity: str
    """Same documents, same identity, wherever they lie: a resumed run compares it."""
    arguments: dict[str, Any]
    """Of datasets.load_dataset."""
    kind: Kind = "rows"
    """Of what it hands out."""
    files: tuple[Path, ...] = ()
    """Local files, in their order."""
    stored: TokenFolder | None = None
    """What is tokenized already."""

    @property
    def documents(self) -> str:
        """Same documents, same text: tokenized or not."""
        return self.stored.manifest.source if self.stored else self.identity


def resolve_sources(section: Data) -> list[Source]:
    """As resolve_source, of each of `data.sources`, or of the one that [data] itself names."""
    skip = section.on_bad_document == "skip"
    if not section.sources:
        return [resolve_source(section, skip=skip)]
    return [
        resolve_source(source, f"data.sources.{source.name}", skip=skip)
        for source in section.sources
    ]


def resolve_source(section: Documents, table: str = "data", *, skip: bool = False) -> Source:
    """Find the documents that a table, by default [data], asks for.

    skip: leaves out files that are called Parquet and are not; their ends are read for it, nothing
    otherwise, and a hub is not asked. Raises ValueError for files that are missing or of unknown or
    mixed format, and for a subset or split that the source does not have.
    """
    if section.dataset_path:
        key = f"{table}.dataset_path"
        chosen = f"{key}={section.dataset_path!r}"
        _refuse(section, ("subset", "split"), chosen, table)
        # os.path: leaves a ~user that does not exist, where Path raises.
        path = Path(os.path.expanduser(section.dataset_path))  # noqa: PTH111
        if is_token_folder(path):
            _refuse(section, ("text_field",), chosen, table)
            return _stored_source(path, key)
        files = _local_files(path, chosen)
        if skip:
            files = _readable(tuple(files), chosen)
        return _files_source(section.dataset_path, key, files)
    key = f"{table}.dataset"
    if section.dataset == "bundled":
        _refuse(section, ("subset",), f"{key}='bundled'", table)
        if section.split not in BUNDLED_SPLITS:
            raise ValueError(
                f"{table}.split={section.split!r}: the bundled corpus has "
                f"{' and '.join(BUNDLED_SPLITS)}"
            )
        path = bundled_asset(f"corpus/{section.split}.jsonl")
        return _files_source(f"bundled corpus ({section.split})", key, [path])
    if Path(section.dataset).exists():
        raise ValueError(f"{key}={section.dataset!r} is a local path: set {key}_path to read it")
    hub_name, subset = PRESETS.get(section.dataset, (section.dataset, ""))
    subset = section.subset or subset
    name = " ".join(filter(None, (hub_name, subset, section.split)))
    arguments = {"path": hub_name, "name": subset or None, "split": section.split}
    return Source(name=name, key=key, identity=name, arguments=arguments)


def check_tokens(sources: Iterable[Source], tokenizer: Tokenizer) -> None:
    """ValueError where what is tokenized already is not so by a run's tokenizer."""
    for source in sources:
        if source.stored:
            source.stored.check(tokenizer, source.key)


def open_dataset(source: Source) -> "IterableDataset | TokenFolder":
    """Open a source for streaming; ValueError when it cannot be reached or read."""
    if source.stored:
        return source.stored
    import datasets

    datasets.disable_progress_bars()
    # Or it asks the hub to count the use of a format, of local files too: without a network that is
    # a question to a name server, now and then for 5 seconds.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    with reading(source):
        return datasets.load_dataset(**source.arguments, streaming=True)


@contextlib.contextmanager
def reading(source: Source) -> Iterator[None]:
    """Whatever `datasets` raises becomes one sentence of ValueError that names source and key."""
    try:
        yield
    except StopIteration:  # datasets looks for the fields in the first document
        raise ValueError(f"{source.key}: {source.name} holds no documents") from None
    except ConnectionError as error:
        raise ValueError(
            f"{source.key}: the Hugging Face hub could not be reached for {source.name}; "
            "without a network, set data.dataset_path to local files"
        ) from error
    # Parsers, decompressors, file systems and HTTP clients each raise types of their own.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        blamed = _file_in_work(error, source) or source.name
        raise ValueError(f"{source.key}: cannot read {blamed}: {reason:.300}") from error


def _file_in_work(error: BaseException, source: Source) -> str:
    """The file that `datasets` was reading, which its builders all call `file`; "" if unknown."""
    files = {str(file) for file in source.files}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(file := frame.f_locals.get("file"), str) and file in files:
            return file
    return ""


def stream_of(dataset: "IterableDataset", stream: int, num_streams: int) -> "IterableDataset":
    """The documents of one stream out of `num_streams`, which together hold each document once.

    With a file or more per stream, a stream reads whole files; with fewer, every stream reads all
    files and keeps every num_streams-th document, so that no file weighs more than its size.
    """
    from datasets.distributed import split_dataset_by_node

    if dataset.num_shards >= num_streams:
        return dataset.shard(num_shards=num_streams, index=stream, contiguous=False)
    return split_dataset_by_node(dataset, rank=stream, world_size=num_streams)


def _refuse(section: Documents, keys: tuple[str, ...], source: str, table: str) -> None:
    for key in keys:
        value, default = getattr(section, key), type(section).model_fields[key].default
        if value != default:
            raise ValueError(
                f"{table}.{key}={value!r} cannot act with {source}: leave it {default!r}"
            )


def _local_files(path: Path, chosen: str) -> list[Path]:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if _format(file) and _is_data(file, path)]
    else:
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207  (Path.glob: relative only)
        files = [file for file in map(Path, names) if file.is_file()]
    known = ", ".join(FORMATS)
    if not files:
        what = f"holds no file ending in {known}" if path.is_dir() else "matches no file"
        raise ValueError(f"{chosen} {what}")
    unknown = [file.name for file in files if not _format(file)]
    if unknown:
        raise ValueError(
            f"{chosen}: unknown format of {unknown[0]!r}, "
            f"expected a name ending in {known} (or these with .gz)"
        )
    return sorted(file.resolve() for file in files)


@functools.cache
def _readable(files: tuple[Path, ...], chosen: str) -> list[Path]:
    """The files but those that are called Parquet and are not, each of which is warned about.

    Asked once, and a process warns of a file once, and has the same files wherever it reads them.
    """
    from pyarrow import parquet

    kept, reason = [], ""
    for file in files:
        if file.suffix == ".parquet":
            try:
                parquet.read_metadata(file)
            except (OSError, ValueError) as error:
                # What the system has against it may be otherwise for another process.
                if isinstance(error, OSError) and error.errno is not None:
                    raise ValueError(f"{chosen}: {file}: {error}") from error
                reason = f"{file}: {' '.join(str(error).split())}"
                logger.warning("%s: a file is left out with all its documents: %s", chosen, reason)
                continue
        kept.append(file)
    if not kept:
        raise ValueError(f"{chosen} holds no Parquet file that can be read: {reason}")
    return kept


def _is_data(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is meant to be read: . and _ mark what is not, as in Hive."""
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    return not hidden and file.is_file()


def _format(file: Path) -> str | None:
    name = file.name.removesuffix(".gz")
    return FORMATS.get(Path(name).suffix)


def _stored_source(path: Path, key: str) -> Source:
    try:
        stored = TokenFolder(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    identity = f"tokens of {stored.manifest.source}"
    return Source(str(path), key, identity, {}, "tokens", stored=stored)


def _files_source(name: str, key: str, files: list[Path]) -> Source:
    formats = Counter(_format(file) for file in files)
    if len(formats) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(formats.items(), key=str))
        raise ValueError(f"{key}={name!r} mixes formats ({counts}): name one by a glob")
    kind = _format(files[0])
    listing = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    arguments: dict[str, Any] = {
        "path": kind,
        "data_files": [glob.escape(str(file)) for file in files],
        "split": "train",
    }
    handed_out: Kind = "rows"
    if kind == "text":
        handed_out = "files"
        arguments |= {"sample_by": "document", "encoding": RAW_ENCODING}
    elif all(".jsonl" in file.suffixes for file in files):
        handed_out = "lines"
        arguments |= {"path": "text", "encoding": RAW_ENCODING}
    identity = f"{len(files)} {kind} files {digest}"
    return Source(name, key, identity, arguments, handed_out, tuple(files))
