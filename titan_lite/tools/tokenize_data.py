"""`titan-lite tokenize`: writes a configuration's documents as token ids, or verifies them."""

import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from titan_lite.config.load import ConfigError, LoadedConfig, Problem
from titan_lite.config.problems import SettingError, errors_for
from titan_lite.data.sources import resolve_sources
from titan_lite.data.token_folder import UNFINISHED, TokenManifest, read_token_manifest
from titan_lite.runtime.parent import MAYBE_OUT_OF_MEMORY
from titan_lite.runtime.stored_files import damaged_files


def write(loaded: LoadedConfig, target: Path, *, processes: int, shard_size: int) -> int:
    """Tokenizes the documents of [data] into the folder `target`, or resumes; ConfigError."""
    data = loaded.config.data
    from titan_lite.data.tokenizing import TargetError, tokenize

    with loaded.reporting(), errors_for("data.dataset"):
        if data.sources:
            raise SettingError(
                "data.sources",
                "not supported by tokenize: run it for each source, with its keys under [data]",
            )
        (source,) = resolve_sources(data)
        try:
            manifest = tokenize(source, data, target, processes=processes, shard_size=shard_size)
        except (TargetError, OSError) as error:
            message = str(error)
            if isinstance(error, OSError):
                file = error.filename or f"{target}{UNFINISHED}"
                message = (
                    f"{file} cannot be written: {error.strerror}; rerun the same command to resume"
                )
            raise ConfigError([Problem("--output", "command line", message)]) from error
        except BrokenProcessPool:
            raise ValueError(
                f"a tokenizing process was killed {MAYBE_OUT_OF_MEMORY}: rerun the same command to "
                "resume; fewer --processes need less memory"
            ) from None
        except KeyboardInterrupt:
            print(
                f"\nStopped; rerun the same command to resume from {target}{UNFINISHED}",
                file=sys.stderr,
            )
            return 130
    print(f"Written to {target}: {_summary(manifest)}")
    return 0


def verify(folder: Path) -> int:
    """Compares all files of a folder with their checksums; returns 1 if one differs."""
    try:
        manifest = read_token_manifest(folder)
        files = {name: shard.file for name, shard in manifest.shards.items()}
        problems = damaged_files(folder, files, files, threads=os.cpu_count())
    except ValueError as error:
        problems = [str(error)]
    for message in problems:
        print(f"titan-lite tokenize: {message}", file=sys.stderr)
    if not problems:
        print(f"{folder} is verified: {_summary(manifest)}")
    return int(bool(problems))


def _summary(manifest: TokenManifest) -> str:
    skipped = f" ({manifest.skipped:,} bad ones skipped)" if manifest.skipped else ""
    files = len(manifest.shards)
    return (
        f"{manifest.documents:,} documents{skipped}, {manifest.tokens:,} tokens of {manifest.dtype}"
        f" in {files:,} file{'s' * (files != 1)}"
    )
