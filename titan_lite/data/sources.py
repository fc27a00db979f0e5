"""Sources of documents: the bundled corpus, local files, or a Hugging Face dataset by name.

Datasets by name are streamed by Hugging Face `datasets`, which is imported on first use.
"""

import contextlib
import functools
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_lite.config.problems import (
    SettingError,
    did_you_mean,
    errors_for,
    how_to_fetch,
    nearest,
    one_of,
    quote,
)
from titan_lite.config.registry import SOURCES, load
from titan_lite.config.schema import Data, Documents
from titan_lite.data.assets import bundled_asset
from titan_lite.data.columns import UnreadableError, column_names
from titan_lite.data.documents import TOKENS_FIELD, Kind
from titan_lite.data.file_rows import FileRows
from titan_lite.data.files import find_files, folder_of_split, has_splits, signature, warn_once
from titan_lite.data.formats import FORMATS, format_of, plain_suffix
from titan_lite.data.plugin_source import PluginRows, PluginSource, RowStream
from titan_lite.data.token_folder import MANIFEST_FILE, TokenManifest, read_token_manifest
from titan_lite.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

# data.dataset -> (name on the hub, configuration)
PRESETS = {"c4": ("allenai/c4", "en")}
BUNDLED_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Source:
    """A set of documents, not yet opened."""

    name: str
    """Name in messages."""
    key: str
    """The key that chose the source, for messages."""
    identity: str
    """A name that is the same for the same documents in any folder; a resumed run compares it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of datasets.load_dataset, for a dataset by name."""
    kind: Kind = "rows"
    """Kind of its rows."""
    parts: tuple[tuple[Path, ...], ...] = ()
    """Local files, in order; a file written by titan-lite tokenize may have several parts."""
    text_field: str = "text"
    """Field of a document's text."""
    tokens_field: str = ""
    """Field of a document's token ids, read instead of its text."""
    plugin: PluginSource | None = None
    """The source of a plugin."""
    manifest: TokenManifest | None = None
    """The manifest of a folder that titan-lite tokenize wrote."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Local files, part by part."""
        return tuple(file for parts in self.parts for file in parts)

    @property
    def documents(self) -> str:
        """The identity of the documents, the same for tokenized ones and their text."""
        return self.manifest.source if self.manifest else self.identity

    @property
    def is_tokenized(self) -> bool:
        """True if documents are known to be token ids before they are read."""
        return bool(self.tokens_field)

    @property
    def num_files(self) -> int:
        """Number of files, or of shards of a dataset by name; open(i, num_files) reads one."""
        if self.plugin:
            return 1
        return len(self.parts) or int(self._dataset.num_shards)

    def open(self, stream: int = 0, num_streams: int = 1) -> RowStream:
        """Opens one of `num_streams` streams, which together have each document once.

        With at least one file per stream, a stream reads whole files; with fewer files, every
        stream reads all files and keeps every num_streams-th document. ValueError if the source
        cannot be reached or read.
        """
        if self.plugin:
            with reading(self):
                return PluginRows(self.plugin.open(stream, num_streams))
        if self.parts:
            field = self.tokens_field or self.text_field
            return FileRows(self.parts, field, stream, num_streams)
        if self._dataset.num_shards >= num_streams:
            return self._dataset.shard(num_shards=num_streams, index=stream, contiguous=False)
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(self._dataset, rank=stream, world_size=num_streams)

    @functools.cached_property
    def _dataset(self) -> "IterableDataset":
        import datasets

        datasets.disable_progress_bars()
        with reading(self):
            return datasets.load_dataset(**self.arguments, streaming=True)


def resolve_sources(section: Data) -> list[Source]:
    """Finds the documents of each of data.sources, or of the one source that [data] names."""
    skip = section.on_bad_document == "skip"
    if not section.sources:
        return [resolve_source(section, skip=skip)]
    sources = [
        resolve_source(source, f"data.sources.{source.name}", skip=skip)
        for source in section.sources
    ]
    _warn_of_shared(sources)
    return sources


def _warn_of_shared(sources: Sequence[Source]) -> None:
    """Logs sources of a mixture that read the same documents."""
    readers: dict[str, Source] = {}
    for source in sources:
        for item in (source.documents, *map(os.path.realpath, source.files)):
            other = readers.setdefault(item, source)
            if other is not source:
                warn_once(
                    f"{source.key} and {other.key} both read {source.name}: the sum of their "
                    "weights applies to its documents"
                )
                break


def resolve_source(section: Documents, table: str = "data", *, skip: bool = False) -> Source:
    """Finds the documents that a table, by default [data], names.

    skip: leaves out files named Parquet that are not valid Parquet, whose last bytes are read to
    check. Nothing else is read, and no request is sent to a hub. Raises ValueError for files that
    are missing or have an unknown or mixed format, and for a subset or split that the source does
    not have.
    """
    if plugin := _plugin_source(section, table):
        return plugin
    if section.dataset_path:
        key = f"{table}.dataset_path"
        chosen = f"{key} = {quote(section.dataset_path)}"
        # os.path leaves an unknown ~user unchanged, Path raises.
        path = Path(os.path.expanduser(section.dataset_path))  # noqa: PTH111
        if (path / MANIFEST_FILE).is_file():
            _refuse(section, ("subset", "split", "text_field", "tokens_field"), chosen, table)
            return _tokenized_source(path, key)
        if has_splits(path):
            _refuse(section, ("subset",), chosen, table)
            with errors_for(f"{table}.split"):
                path = folder_of_split(path, section.split)
        else:
            _refuse(section, ("subset", "split"), chosen, table)
        with errors_for(key):
            files = find_files(path, chosen)
            if not files:
                fetch = how_to_fetch(section.dataset_path, key)
                raise ValueError(f"{quote(section.dataset_path)} matches no file{fetch}")
            if skip:
                files = _readable(tuple(files), chosen)
        return _files_source(section, key, files)
    key = f"{table}.dataset"
    if section.dataset == "bundled":
        _refuse(section, ("subset",), f'{key} = "bundled"', table)
        if section.split not in BUNDLED_SPLITS:
            raise SettingError(
                f"{table}.split",
                f"must be {one_of([quote(split) for split in BUNDLED_SPLITS])} for the bundled "
                f"corpus, got {quote(section.split)}",
            )
        path = bundled_asset(f"corpus/{section.split}.jsonl")
        bundled = section.model_copy(update={"dataset_path": f"bundled corpus ({section.split})"})
        return _files_source(bundled, key, [path])
    if Path(section.dataset).exists():
        raise SettingError(
            key, f"{quote(section.dataset)} is a local path: set {key}_path to read it"
        )
    hub_name, subset = PRESETS.get(section.dataset, (section.dataset, ""))
    subset = section.subset or subset
    name = " ".join(filter(None, (hub_name, subset, section.split)))
    arguments = {"path": hub_name, "name": subset or None, "split": section.split}
    return Source(
        name=name,
        key=key,
        identity=name,
        arguments=arguments,
        text_field=section.text_field,
        tokens_field=section.tokens_field,
    )


def _plugin_source(section: Documents, table: str) -> Source | None:
    """Returns the source of a plugin that registered the table's prefix or file suffix, if any."""
    if section.dataset_path:
        key, given = "dataset_path", section.dataset_path
        kind = plain_suffix(Path(given))
    else:
        key, given = "dataset", section.dataset
        kind, separator, _ = given.partition("://")
        if separator and kind not in SOURCES:
            known = ", ".join(SOURCES) or "none; job.plugins may register some"
            raise SettingError(
                f"{table}.dataset",
                f"no data source {quote(kind)}{did_you_mean(nearest(kind, SOURCES))} "
                f"(registered: {known})",
            )
    if kind not in SOURCES:
        return None
    with errors_for(f"{table}.{key}"):
        plugin: PluginSource = load(SOURCES[kind])(section)
    return Source(given, f"{table}.{key}", plugin.identity, plugin=plugin)


def check_tokens(sources: Iterable[Source], tokenizer: Tokenizer) -> None:
    """Raises ValueError for documents that another tokenizer has tokenized."""
    for source in sources:
        if source.manifest:
            source.manifest.check(source.files[0].parent, tokenizer, source.key)


@contextlib.contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turns any exception into a one-sentence SettingError that names the source and its key."""
    try:
        yield
    except SettingError:
        raise
    except UnreadableError as error:
        raise SettingError(source.key, f"{error}") from error
    except StopIteration:  # datasets looks for the fields in the first document
        raise SettingError(source.key, f"{source.name} has no documents") from None
    except ConnectionError as error:
        raise SettingError(
            source.key,
            f"the Hugging Face hub could not be reached for {source.name}; "
            "without a network, set data.dataset_path to local files",
        ) from error
    # Parsers, decompressors, file systems and HTTP clients each raise other types.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(source.key, f"cannot read {source.name}: {reason:.300}") from error


def _refuse(section: Documents, keys: tuple[str, ...], source: str, table: str) -> None:
    for key in keys:
        value, default = getattr(section, key), type(section).model_fields[key].default
        if value != default:
            raise SettingError(
                f"{table}.{key}",
                f"{quote(value)} has no effect with {source}: leave it {quote(default)}",
            )


@functools.cache
def _readable(files: tuple[Path, ...], chosen: str) -> list[Path]:
    """Returns the files without those named Parquet that are not valid, with a warning for each.

    Cached, so that a process warns about a file once and always reads the same files.
    """
    from pyarrow import parquet

    kept, reason = [], ""
    for file in files:
        if format_of(file) == "parquet":
            try:
                parquet.read_metadata(file)
            except (OSError, ValueError) as error:
                # An error of the operating system may not occur in another process.
                if isinstance(error, OSError) and error.errno is not None:
                    raise ValueError(f"{file}: {error}") from error
                reason = f"{file}: {' '.join(str(error).split())}"
                logger.warning("%s: skipped a file that cannot be read: %s", chosen, reason)
                continue
        kept.append(file)
    if not kept:
        raise ValueError(f"none of the Parquet files can be read: {reason}")
    return kept


def _tokenized_source(path: Path, key: str) -> Source:
    with errors_for(key):
        manifest = read_token_manifest(path)
    return Source(
        name=str(path),
        key=key,
        identity=f"tokens of {manifest.source}",
        parts=manifest.paths(path),
        tokens_field=TOKENS_FIELD,
        manifest=manifest,
    )


def _files_source(section: Documents, key: str, files: list[Path]) -> Source:
    name, formats = section.dataset_path, Counter(map(format_of, files))
    if len(formats) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(formats.items(), key=str))
        raise SettingError(key, f"{quote(name)} mixes formats ({counts}): set a glob of one")
    ((form, count),) = formats.items()
    listing = "\n".join(map(signature, files))
    digest = hashlib.sha256(os.fsencode(listing)).hexdigest()[:16]
    return Source(
        name=name,
        key=key,
        identity=f"{count} {form} files {digest}",
        kind=FORMATS[plain_suffix(files[0])].kind,
        parts=tuple((file,) for file in files),
        text_field=section.text_field,
        tokens_field=_tokens_field(section, form, files[0], key),
    )


def _tokens_field(section: Documents, form: str, first: Path, key: str) -> str:
    """Returns the field of token ids in the files; "" if their text is read."""
    if form == "text" and section.tokens_field:
        table = key.rpartition(".")[0]
        raise SettingError(
            f"{table}.tokens_field",
            f"{quote(section.tokens_field)} has no effect on text files: leave it {quote('')}",
        )
    if section.tokens_field or form in ("json", "text"):
        return section.tokens_field
    if form == "megatron":
        return TOKENS_FIELD
    try:
        names = column_names(first)
    except (OSError, ValueError):
        # A damaged file is reported when it is read.
        return ""
    return TOKENS_FIELD if section.text_field not in names and TOKENS_FIELD in names else ""
