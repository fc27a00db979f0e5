"""`titan-lite tokenize`: the documents of a configuration as token files, or a check of such."""

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from titan_lite.config.load import ConfigError, LoadedConfig, Problem
from titan_lite.config.problems import SettingError, about
from titan_lite.config.units import format_duration, format_number
from titan_lite.data.files import compression_of
from titan_lite.data.sources import Source, resolve_sources
from titan_lite.data.token_files import UNFINISHED, Manifest, TokenFolder
from titan_lite.runtime.stored_files import damaged_files

if TYPE_CHECKING:
    from titan_lite.data.token_writer import Done

# A line of a terminal is drawn anew, one of a log file is added.
_DRAW_SECONDS = 0.5
_LOG_SECONDS = 30.0


def write(loaded: LoadedConfig, target: Path, *, processes: int, shard_tokens: int) -> int:
    """Writes the folder `target` of what [data] reads, or goes on with it; ConfigError."""
    data = loaded.config.data
    if data.sources:
        with loaded.reporting():
            message = "several sources: tokenize each by itself, with the keys of [data]"
            raise SettingError("data.sources", message)
    from titan_lite.data.token_writer import TargetError
    from titan_lite.data.tokenizing import tokenize

    with loaded.reporting(), about("data.dataset"):
        (source,) = resolve_sources(data)
        progress = _Progress(source, sys.stderr)
        try:
            manifest = tokenize(
                source,
                data,
                target,
                processes=processes,
                shard_tokens=shard_tokens,
                report=progress.update,
            )
        except TargetError as error:
            raise ConfigError([Problem("--output", "command line", str(error))]) from error
        except OSError as error:
            message = (
                f"{error.filename or f'{target}{UNFINISHED}'} cannot be written: {error.strerror}; "
                "the same command goes on"
            )
            raise ConfigError([Problem("--output", "command line", message)]) from error
        except BrokenProcessPool:
            raise ValueError(
                "a process that tokenizes was killed, by the system if memory was short: the same "
                "command goes on, with fewer --processes it needs less"
            ) from None
        except KeyboardInterrupt:
            print(f"\nStopped; the same command goes on from {target}{UNFINISHED}", file=sys.stderr)
            return 130
        finally:
            progress.close()
    print(f"Written to {target}: {_summary(manifest)}")
    return 0


def verify(folder: Path) -> int:
    """Compares all files of a folder with their checksums; returns 1 where one differs."""
    try:
        manifest = TokenFolder(folder).manifest
        files = manifest.files()

        def read(name: str) -> list[str]:
            return damaged_files(folder, files, [name])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [sentence for sentences in pool.map(read, files) for sentence in sentences]
    except ValueError as error:
        found = [str(error)]
    for sentence in found:
        print(f"titan-lite tokenize: {sentence}", file=sys.stderr)
    if not found:
        print(f"{folder} is verified: {_summary(manifest)}")
    return int(bool(found))


def _summary(manifest: Manifest) -> str:
    skipped = f", {manifest.skipped:,} bad ones left out" if manifest.skipped else ""
    return (
        f"{manifest.documents:,} documents{skipped}, {manifest.tokens:,} tokens of {manifest.dtype}"
        f" in {len(manifest.shards)} shard{'s' * (len(manifest.shards) != 1)}"
    )


class _Progress:
    """How far the work is, on a terminal's line or, now and then, as a line of a log."""

    def __init__(self, source: Source, stream: TextIO) -> None:
        self._stream, self._is_terminal = stream, stream.isatty()
        self._total = _size(source)
        self._start = self._drawn = time.monotonic()
        self._before: tuple[int, int] | None = None

    def update(self, done: "Done", num_files: int) -> None:
        """Draws, where it is time to."""
        now = time.monotonic()
        if self._before is None:
            # An earlier call's work says nothing about the speed of this one.
            self._before = done.tokens, done.read
        if now - self._drawn < (_DRAW_SECONDS if self._is_terminal else _LOG_SECONDS):
            return
        self._drawn = now
        seconds = now - self._start
        tokens, read = self._before
        file = min(len(done.rows_per_file), num_files)
        fields = [
            f"file {file}/{num_files}",
            f"{done.documents:,} documents",
            f"{done.tokens:,} tokens",
            f"{format_number((done.tokens - tokens) / seconds, ',.0f')} tokens/s",
        ]
        if self._total and done.read > read:
            left = (self._total - done.read) * seconds / (done.read - read)
            fields.insert(0, f"{min(1.0, done.read / self._total):4.0%}")
            fields.append(f"{format_duration(left)} left")
        text = "  ".join(fields)
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{text[:width]:<{width}}")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Erases a terminal's line."""
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{' ' * width}\r")
            self._stream.flush()


def _size(source: Source) -> int:
    """Bytes of the files, 0 where their rows do not add up to that."""
    plain = source.kind in ("lines", "files") and not any(map(compression_of, source.files))
    return sum(file.stat().st_size for file in source.files) if plain else 0
