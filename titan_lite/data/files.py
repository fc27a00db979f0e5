"""Finds the local files of a path: a file, a folder, a glob, or a saved dataset."""

import glob
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from titan_lite.config.problems import first_few, quote
from titan_lite.data.formats import KNOWN, compression_of, format_of
from titan_lite.data.megatron import MegatronFile
from titan_lite.data.token_folder import MANIFEST_FILE, PROGRESS_FILE
from titan_lite.runtime.log import warn_once
from titan_lite.runtime.stored_files import json_object

# Files of datasets.save_to_disk.
_STATE, _INFO, SPLITS_FILE = "state.json", "dataset_info.json", "dataset_dict.json"
# Names of companions: files in a folder of documents that are not documents.
_COMPANION_NAMES = re.compile(
    r"(readme|licen[cs]es?|copying|copyright|notice|terms|authors|contributors|changelog|citation"
    r"|(check|md5|sha\d+)sums?)([-_. ].*)?"
)
_COMPANION_JSON = (_STATE, _INFO, SPLITS_FILE, "dataset_infos.json")
# Files of a model or a tokenizer.
_MODEL_FILES = re.compile(
    r"(vocab|added_tokens|special_tokens_map|chat_template|trainer_state|.*config|tokenizer|.*\.index)"
    r"\.json|(merges|vocab|spiece\.vocab|requirements)\.txt"
)
_COMPANION_SUFFIXES = (
    *(".md", ".py", ".sh", ".yaml", ".yml", ".toml", ".cff", ".bib"),
    *(".md5", ".sha1", ".sha256", ".sha512", ".crc", ".lock"),
)
_FOLDERS = {
    "a checkpoint": {"manifest.json", ".metadata"},
    "the folder of a run": {"run.json", "metrics.jsonl"},
}
_ARROW_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")
_SPLIT_WORDS = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")
_LFS_POINTER, _LFS_LIMIT = b"version https://git-lfs.github.com/spec/", 1024


def find_files(path: Path, chosen: str) -> list[Path]:
    """Returns the files of documents that a path names, in order; warns about those it leaves out.

    Empty if nothing matches. Raises ValueError if a file cannot be read, and for a folder without
    files of a supported format.
    """
    # A name that exists is not a glob, whatever characters it has.
    names = [path] if os.path.lexists(path) else _matches(path)
    if not names and (index := path.with_name(f"{path.name}.idx")).is_file():
        # Megatron names a pair of files by their common name without a suffix.
        names = [index]
    files: list[Path] = []
    for name in names:
        if name.is_dir():
            files += _files_of_folder(name, chosen)
        else:
            files.append(name.with_suffix(".idx") if name.suffix == ".bin" else name)
    files = _without_aliases(files, chosen)
    for file in files:
        _check(file)
    return files


def folder_of_split(path: Path, split: str) -> Path:
    """Returns the folder of a split in a folder of DatasetDict.save_to_disk."""
    splits = _read_json(path / SPLITS_FILE).get("splits")
    if not isinstance(splits, list) or split not in splits:
        raise ValueError(f"{split!r} is not a split of {path}, which has {splits}")
    return path / split


def signature(file: Path) -> str:
    """Identifies a file without reading it: by name, size, and the fingerprint of `datasets`."""
    size = num_bytes(file)
    state = file.parent / _STATE
    rows = ""
    if format_of(file) == "arrow" and state.is_file():
        rows = f" {_read_json(state).get('_fingerprint')}"
    return f"{file.name} {size}{rows}"


def num_bytes(file: Path) -> int:
    """Returns the size of a file of documents; for Megatron, of the pair of files."""
    size = file.stat().st_size
    if format_of(file) == "megatron":
        size += file.with_suffix(".bin").stat().st_size
    return size


def _saved_files(folder: Path) -> set[Path]:
    """Returns the data files that a saved dataset lists; map() keeps caches next to them."""
    state = _read_json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder} is a selection of rows, written by an old version of datasets: "
            "load it with datasets.load_from_disk and save it again"
        )
    try:
        return {folder / data_file["filename"] for data_file in state["_data_files"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / _STATE} is damaged: {error!r}") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    return json_object(file, file.read_bytes())


def _files_of_folder(folder: Path, chosen: str) -> list[Path]:
    """Returns the files of documents below a folder, in order; warns about those left out."""
    files, others, companions = [], [], []
    for file in sorted(_below(folder)):
        if _is_companion(file):
            companions.append(file)
        elif format_of(file) and not _is_marked(file):
            files.append(file)
        else:
            others.append(file)
    # The cache of a hub has the blobs, too, to which its snapshots link.
    targets = {os.path.realpath(file) for file in files} if others else set()
    others = [file for file in others if os.path.realpath(file) not in targets]
    if not files:
        reasons = [
            f"{reason}: {_some(rest, folder)}"
            for rest, reason in (
                (others, "unsupported"),
                (companions, "recognized as other files"),
            )
            if rest
        ]
        raise ValueError("; ".join([f"{folder} has no file ending in {KNOWN}", *reasons]))
    formats = {format_of(file) for file in files}
    unread = [file for file in others if not _is_marked(file)]
    if formats == {"text"} and unread:
        raise ValueError(
            f"{folder} has text ({_some(files, folder)}) next to unsupported files "
            f"({_some(unread, folder)}): to train on the text, set dataset_path to a glob such "
            f"as {glob_like(files[0], folder)}"
        )
    names = "\n".join(str(file.relative_to(folder)) for file in files)
    splits = set(_SPLIT_WORDS.findall(names.lower()))
    if len(splits) > 1 and "train" in splits:
        named = [file for file in files if "train" in file.name]
        of_folders = quote(f"{glob.escape(str(folder))}/**/*train*/**")
        train = glob_like(named[0], folder, "*train*") if named else of_folders
        warn_once(
            f"{chosen} reads files of several splits ({', '.join(sorted(splits))}): to train on "
            f"one of them, set dataset_path to a glob such as {train}"
        )
    plain = set(files)
    twice = [file for file in files if compression_of(file) and file.with_suffix("") in plain]
    if twice:
        warn_once(
            f"{chosen} reads {_some(twice, folder)} and the file of the same name without "
            "compression: if they have the same documents, set dataset_path to a glob of one, such "
            f"as {glob_like(twice[0], folder)}"
        )
    if unread:
        warn_once(f"{chosen} leaves out {_some(unread, folder)}: documents end in {KNOWN}")
    unlike = [file for file in others if _is_marked(file)]
    if "text" in formats:
        unlike += [file for file in companions if format_of(file) == "text"]
    unlike += [
        file
        for file in companions
        if file not in unlike and _MODEL_FILES.fullmatch(file.name.lower())
    ]
    if unlike:
        warn_once(
            f"{chosen} leaves out {_some(unlike, folder)}, by name not documents: to read such "
            f"files, set dataset_path to a glob such as {glob_like(unlike[0], folder)}"
        )
    return files


def glob_like(file: Path, folder: Path, stem: str = "*") -> str:
    """Returns a quoted glob of the files below a folder that have the suffix of one of them."""
    if file.is_dir():
        return quote(f"{file}/**")
    suffix = f"{Path(file.stem).suffix if compression_of(file) else ''}{file.suffix}"
    depth = "" if file.absolute().parent == folder.absolute() else "**/"
    return quote(f"{glob.escape(str(folder))}/{depth}{stem}{suffix}")


def _matches(pattern: Path) -> list[Path]:
    """Returns the paths that match a glob; after a final **, only files."""
    parts = pattern.parts
    if "**" not in parts:
        return [Path(name) for name in glob.glob(str(pattern))]  # noqa: PTH207  (absolute ones, too)
    # Python's ** follows loops of links, and hangs if there are two.
    place = parts.index("**")
    rest = parts[place + 1 :] or ("*",)
    matches = []
    for folder in filter(Path.is_dir, _matches(Path(*parts[:place]))):
        for path, _, _ in _walk(folder, hidden=(".",)):
            matches += _matches(Path(glob.escape(str(path)), *rest))
    return matches if parts[-1] != "**" else [match for match in matches if not match.is_dir()]


def _walk(folder: Path, hidden: tuple[str, ...]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walks folders as os.walk does, sorted; follows links to folders, and enters each once."""
    entered: set[str] = set()
    linked = deque([folder])

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot list {error.filename}: {error.strerror}") from error

    while linked:
        links: list[Path] = []
        for top, inner, files in os.walk(linked.popleft(), onerror=fail):
            path, real = Path(top), os.path.realpath(top)
            if real in entered:
                inner.clear()
                continue
            entered.add(real)
            inner.sort()
            yield path, inner, sorted(files)
            inner[:] = [name for name in inner if not name.startswith(hidden)]
            # A link to a folder that contains the link is a loop.
            links += [
                path / name
                for name in inner
                if (path / name).is_symlink()
                and not Path(real).is_relative_to(os.path.realpath(path / name))
            ]
        linked += sorted(links, key=lambda link: (len(link.parts), link))


def _below(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder, and folders whose names start with _.

    Names that start with . or _ are not data, as in Hive. The folders that start with _ are not
    entered, but a warning names them.
    """
    for path, inner, files in _walk(folder, hidden=(".", "_")):
        if "00000.tokens" in files:
            raise ValueError(
                f"{path} has token files of an earlier version: run titan-lite tokenize again"
            )
        if {_STATE, MANIFEST_FILE} <= set(files):
            raise ValueError(
                f"{path} was written by titan-lite tokenize: set dataset_path to this folder"
            )
        if PROGRESS_FILE in files:
            raise ValueError(
                f"{path} is not complete: run the same titan-lite tokenize command again"
            )
        for kind, names_of_kind in _FOLDERS.items():
            if names_of_kind <= set(files):
                raise ValueError(
                    f"{path} is {kind}: set dataset_path to a folder with only documents, or to a "
                    "glob such as folder/*.jsonl"
                )
        if SPLITS_FILE in files:
            raise ValueError(f"{path} has several splits: set dataset_path to this folder")
        saved = _saved_files(path) if {_STATE, _INFO} <= set(files) else set()
        yield from saved
        names = [name for name in files if not name.startswith(".")]
        names += [name for name in inner if name.startswith("_")]
        yield from (path / name for name in names if path / name not in saved)


def _is_companion(file: Path) -> bool:
    name, form = file.name.lower(), format_of(file)
    if form == "json":
        return name in _COMPANION_JSON or bool(_MODEL_FILES.fullmatch(name))
    if name.startswith("_"):
        return not form and not file.is_dir()
    if form == "text" and _MODEL_FILES.fullmatch(name):
        return True
    if form in ("", "text") and _COMPANION_NAMES.fullmatch(name):
        return True
    if file.suffix == ".bin" and file.with_suffix(".idx").is_file():
        return True
    return file.suffix.lower() in _COMPANION_SUFFIXES


def _is_marked(file: Path) -> bool:
    """Returns whether a file is marked as not data by its name."""
    # Caches of datasets.
    return file.name.startswith("_") or (
        file.name.startswith("cache-") and format_of(file) == "arrow"
    )


def _some(files: list[Path], folder: Path) -> str:
    """Returns the first three names of files, and the number of the others."""
    return first_few([str(file.relative_to(folder)) for file in files], 3)


def _without_aliases(files: Iterable[Path], chosen: str) -> list[Path]:
    """Returns each file once, sorted by name: under its own name rather than that of a link."""
    by_target: dict[str, list[Path]] = {}
    for file in {file.absolute() for file in files}:
        by_target.setdefault(os.path.realpath(file), []).append(file)
    kept = []
    for names in by_target.values():
        names.sort(key=lambda name: (name.is_symlink(), len(name.parts), name))
        kept.append(names[0])
        for name in names[1:]:
            if name.is_symlink():
                warn_once(f"{chosen} leaves out {name}, the same file as {names[0]}")
    return sorted(kept)


def _check(file: Path) -> None:
    """Raises ValueError for a file that cannot be opened, is a pipe, or has an unknown format."""
    if not file.exists():
        reason = "is a link to a missing file" if file.is_symlink() else "is missing"
        raise ValueError(f"{file} {reason}")
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    if not format_of(file):
        raise ValueError(f"unknown format of {file.name!r}, expected a name ending in {KNOWN}")
    if not os.access(file, os.R_OK):
        raise ValueError(f"no permission to read {file}")
    size = file.stat().st_size
    if 0 < size < _LFS_LIMIT:
        with file.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ValueError(
                    f"{file} is a pointer of Git LFS instead of the file: fetch it with "
                    "git lfs pull"
                )
    if format_of(file) == "megatron":
        MegatronFile(file)
    if format_of(file) == "arrow" and size > 8:
        with file.open("rb") as opened:
            opened.seek(-8, os.SEEK_END)
            if not opened.read().endswith(_ARROW_ENDS):
                warn_once(f"{file} has no end marker: its last documents may be missing")
