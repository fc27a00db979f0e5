"""Sources of documents: finds the documents that a table of the configuration names."""

import contextlib
import functools
import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from titan_lite.config.problems import (
    SettingError,
    brace_hint,
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
from titan_lite.data.file_rows import LocalFiles
from titan_lite.data.files import SPLITS_FILE, find_files, folder_of_split, glob_like, signature
from titan_lite.data.formats import FORMATS, format_of, plain_suffix
from titan_lite.data.hub import HubDataset
from titan_lite.data.plugin_source import PluginDocuments, PluginSource, RowStream
from titan_lite.data.token_folder import MANIFEST_FILE, TokenManifest, read_token_manifest
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.runtime.log import warn_once

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
    opener: LocalFiles | HubDataset | PluginDocuments
    """Opens its streams."""
    kind: Kind = "rows"
    """Kind of its rows."""
    text_field: str = "text"
    """Field of a document's text."""
    tokens_field: str = ""
    """Field of a document's token ids, read instead of its text."""
    files: tuple[Path, ...] = ()
    """Local files, in order."""
    manifest: TokenManifest | None = None
    """The manifest of a folder that titan-lite tokenize wrote."""

    @property
    def table(self) -> str:
        """The table of the key."""
        return self.key.rpartition(".")[0]

    @property
    def documents(self) -> str:
        """The identity of the documents, the same for tokenized ones and their text."""
        return self.manifest.source if self.manifest else self.identity

    @property
    def num_files(self) -> int:
        """Number of files, or of shards of a dataset by name; open(i, num_files) reads one."""
        with reading(self):
            return self.opener.num_files

    def open(self, stream: int = 0, num_streams: int = 1) -> RowStream:
        """Opens one of `num_streams` streams, which together have each document once.

        With at least one file per stream, a stream reads whole files; with fewer files, every
        stream reads all files and keeps every num_streams-th document. ValueError if the source
        cannot be reached or read.
        """
        with reading(self):
            return self.opener.open(stream, num_streams)


@dataclass(frozen=True)
class Choice:
    """A table, and the documents that it names."""

    section: Documents
    table: str
    skip: bool
    """True: files that are not valid Parquet are left out."""

    @property
    def key(self) -> str:
        """The key that names the documents."""
        return f"{self.table}.dataset{'_path' * bool(self.section.dataset_path)}"

    @property
    def name(self) -> str:
        """The value of the key."""
        return self.section.dataset_path or self.section.dataset

    @property
    def setting(self) -> str:
        """Key and value, for messages."""
        return f"{self.key} = {quote(self.name)}"

    @property
    def path(self) -> Path:
        """The path of local documents."""
        # os.path leaves an unknown ~user unchanged, Path raises.
        return Path(os.path.expanduser(self.section.dataset_path))  # noqa: PTH111

    @property
    def row(self) -> str:
        """The name by which the documents are looked up in SOURCES: a suffix or a prefix."""
        if self.section.dataset_path:
            return plain_suffix(Path(self.name))
        return self.name.partition("://")[0]

    def has(self, name: str) -> bool:
        """Returns whether the path is a folder with a file of this name."""
        return bool(self.section.dataset_path) and (self.path / name).is_file()


def _plugin_source(choice: Choice) -> Source:
    plugin: PluginSource = load(SOURCES[choice.row])(choice.section)
    return Source(choice.name, choice.key, plugin.identity, PluginDocuments(plugin))


def _tokenized_source(choice: Choice) -> Source:
    manifest = read_token_manifest(choice.path)
    parts = manifest.paths(choice.path)
    return Source(
        name=str(choice.path),
        key=choice.key,
        identity=f"tokens of {manifest.source}",
        opener=LocalFiles(parts, TOKENS_FIELD),
        tokens_field=TOKENS_FIELD,
        files=tuple(itertools.chain(*parts)),
        manifest=manifest,
    )


def _saved_split(choice: Choice) -> Source:
    with errors_for(f"{choice.table}.split"):
        path = folder_of_split(choice.path, choice.section.split)
    return _local_files(choice, path)


def _local_files(choice: Choice, path: Path | None = None) -> Source:
    files = find_files(path or choice.path, choice.setting)
    if not files:
        hint = brace_hint(choice.name) or how_to_fetch(choice.name, choice.key)
        raise ValueError(f"{quote(choice.name)} matches no file{hint}")
    if choice.skip:
        files = _readable(tuple(files), choice.setting)
    formats = Counter(map(format_of, files))
    if len(formats) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(formats.items(), key=str))
        folder = choice.path if choice.path.is_dir() else files[0].parent
        raise ValueError(
            f"{quote(choice.name)} mixes formats ({counts}): set {choice.key} to a glob of one "
            f"format, such as {glob_like(files[0], folder)}"
        )
    ((form, count),) = formats.items()
    listing = "\n".join(map(signature, files))
    digest = hashlib.sha256(os.fsencode(listing)).hexdigest()[:16]
    text_field, tokens_field = choice.section.text_field, _tokens_field(choice, form, files[0])
    return Source(
        name=choice.name,
        key=choice.key,
        identity=f"{count} {form} files {digest}",
        opener=LocalFiles(tuple((file,) for file in files), tokens_field or text_field),
        kind=FORMATS[plain_suffix(files[0])].kind,
        text_field=text_field,
        tokens_field=tokens_field,
        files=tuple(files),
    )


def _tokens_field(choice: Choice, form: str, first: Path) -> str:
    """Returns the field of token ids in the files; "" if their text is read."""
    given = choice.section.tokens_field
    if form == "text" and given:
        raise SettingError(
            f"{choice.table}.tokens_field",
            f"{quote(given)} does not apply to text files: set it to {quote('')}",
        )
    if given or form in ("json", "text"):
        return given
    if form == "megatron":
        return TOKENS_FIELD
    try:
        names = column_names(first)
    except (OSError, ValueError):
        # A damaged file is reported when it is read.
        return ""
    return TOKENS_FIELD if choice.section.text_field not in names and TOKENS_FIELD in names else ""


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


def _bundled_corpus(choice: Choice) -> Source:
    split = choice.section.split
    if split not in BUNDLED_SPLITS:
        raise SettingError(
            f"{choice.table}.split",
            f"must be {one_of([quote(split) for split in BUNDLED_SPLITS])} for the bundled "
            f"corpus, got {quote(split)}",
        )
    source = _local_files(choice, bundled_asset(f"corpus/{split}.jsonl"))
    return replace(source, name=f"bundled corpus ({split})")


def _hub_dataset(choice: Choice) -> Source:
    section = choice.section
    if "://" in section.dataset:
        known = ", ".join(SOURCES) or "none; job.plugins may register some"
        raise ValueError(
            f"no data source {quote(choice.row)}{did_you_mean(nearest(choice.row, SOURCES))} "
            f"(registered: {known})"
        )
    if Path(section.dataset).exists():
        raise ValueError(
            f"{quote(section.dataset)} is a local path: set {choice.key}_path to read it"
        )
    hub_name, subset = PRESETS.get(section.dataset, (section.dataset, ""))
    subset = section.subset or subset
    name = " ".join(filter(None, (hub_name, subset, section.split)))
    arguments = {"path": hub_name, "name": subset or None, "split": section.split}
    return Source(
        name=name,
        key=choice.key,
        identity=name,
        opener=HubDataset(arguments),
        text_field=section.text_field,
        tokens_field=section.tokens_field,
    )


def _kind_of(choice: Choice) -> tuple[Callable[[Choice], Source], tuple[str, ...]]:
    """Returns the function that finds a table's documents, and the table's keys without effect.

    The function raises ValueError for documents that are missing or of a wrong kind, and reads none
    of them. Plugins add rows to SOURCES; formats.FORMATS has the formats of local files.
    """
    if choice.row in SOURCES:
        return _plugin_source, ()
    if choice.has(MANIFEST_FILE):
        return _tokenized_source, ("subset", "split", "text_field", "tokens_field")
    if choice.has(SPLITS_FILE):
        return _saved_split, ("subset",)
    if choice.section.dataset_path:
        return _local_files, ("subset", "split")
    if choice.name == "bundled":
        return _bundled_corpus, ("subset",)
    return _hub_dataset, ()


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
    choice = Choice(section, table, skip)
    find, unused = _kind_of(choice)
    for key in unused:
        value, default = getattr(section, key), type(section).model_fields[key].default
        if value != default:
            raise SettingError(
                f"{table}.{key}",
                f"{quote(value)} does not apply to {choice.setting}: set it to {quote(default)}",
            )
    with errors_for(choice.key):
        return find(choice)


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
            f"without a network, set {source.table}.dataset_path to local files",
        ) from error
    # Parsers, decompressors, file systems and HTTP clients each raise other types.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(source.key, f"cannot read {source.name}: {reason:.300}") from error
