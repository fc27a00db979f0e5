"""A folder written by `titan-lite tokenize`: a saved dataset of token ids, and tokens.json.

The dataset has the format of `datasets.save_to_disk`: Arrow files with a column input_ids, without
BOS and EOS, and a row for each document of the source, in order; a bad document is null. File
00002-00001.arrow is the second part of the source's third file.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from titan_lite.config.problems import SettingError, quote
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.runtime.stored_files import StoredFile, check_size, write_text

MANIFEST_FILE = "tokens.json"
PROGRESS_FILE = "progress.json"
FORMAT = "titan_lite tokens 4"
UNFINISHED = ".incomplete"


@dataclass(frozen=True)
class Shard:
    """An Arrow file. skipped: bad documents among its rows."""

    rows: int
    skipped: int
    tokens: int
    file: StoredFile


@dataclass(frozen=True, kw_only=True)
class TokenManifest:
    """The content of tokens.json.

    tokenizer: its fingerprint. source: the identity of the source's documents. files: the shards of
    each of the source's files.
    """

    tokenizer: str
    tokenizer_path: str
    source: str
    source_name: str
    text_field: str
    dtype: str
    files: list[list[Shard]]
    versions: dict[str, str]

    @property
    def shards(self) -> dict[str, Shard]:
        """All shards by name, in order."""
        return {
            shard_name(number, part): shard
            for number, shards in enumerate(self.files)
            for part, shard in enumerate(shards)
        }

    @property
    def documents(self) -> int:
        """Number of documents that are not bad."""
        return sum(shard.rows - shard.skipped for shard in self.shards.values())

    @property
    def skipped(self) -> int:
        """Number of bad documents."""
        return sum(shard.skipped for shard in self.shards.values())

    @property
    def tokens(self) -> int:
        """Number of token ids."""
        return sum(shard.tokens for shard in self.shards.values())

    def paths(self, folder: Path) -> tuple[tuple[Path, ...], ...]:
        """Returns the paths of the shards of each of the source's files."""
        return tuple(
            tuple(folder / shard_name(number, part) for part in range(len(shards)))
            for number, shards in enumerate(self.files)
        )

    def check(self, folder: Path, tokenizer: Tokenizer, key: str) -> None:
        """Raises SettingError if another tokenizer than the run's made the ids."""
        if self.tokenizer != tokenizer.fingerprint:
            raise SettingError(
                key,
                f"{folder} was tokenized with {self.tokenizer_path or 'the bundled tokenizer'} "
                f"({self.tokenizer}), but data.tokenizer_path is another tokenizer "
                f"({tokenizer.fingerprint}): set data.tokenizer_path = "
                f"{quote(self.tokenizer_path)}, or run titan-lite tokenize again",
            )

    def write(self, folder: Path) -> None:
        """Writes tokens.json."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def shard_name(number: int, part: int) -> str:
    """Returns the name of a part of the source's file `number`."""
    return f"{number:05d}-{part:05d}.arrow"


def read_token_manifest(folder: Path) -> TokenManifest:
    """Reads a folder's manifest; ValueError naming a file that is missing, damaged or truncated."""
    file = folder / MANIFEST_FILE
    if not file.exists():
        raise ValueError(f"{folder} has no {MANIFEST_FILE}: it is not complete")
    try:
        content = json.loads(file.read_bytes())
        form = content.pop("format")
        files = [
            [Shard(**{**shard, "file": StoredFile(**shard["file"])}) for shard in shards]
            for shards in content.pop("files")
        ]
        manifest = TokenManifest(**content, files=files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None
    if form != FORMAT:
        raise ValueError(
            f"{folder} has format {form!r}; {FORMAT!r} is required: run titan-lite tokenize again"
        )
    for name, shard in manifest.shards.items():
        check_size(folder / name, shard.file)
    return manifest
