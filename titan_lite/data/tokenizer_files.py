"""Loads the tokenizer of a file or folder, of whichever kind it is."""

import os
from pathlib import Path

from titan_lite.config.problems import errors_for, how_to_fetch
from titan_lite.data.assets import bundled_asset
from titan_lite.data.tokenizer import Tokenizer

# A folder's tokenizer is the first of these files, named as in Hugging Face's repositories.
FILE_NAMES = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(path: str | Path = "") -> Tokenizer:
    """Loads the tokenizer of a file or folder, or, without a path, the bundled one.

    The file's content decides the kind: Llama 3's tokenizer.model is a tiktoken table, that of
    other models a sentencepiece model. No code in the file is run.
    Raises ValueError naming data.tokenizer_path and the file if it is missing or cannot be used.
    """
    # os.path leaves an unknown ~user unchanged, Path raises.
    given = Path(os.path.expanduser(path))  # noqa: PTH111
    with errors_for("data.tokenizer_path"):
        file = _file_of(given) if path else bundled_asset("tokenizer/tokenizer.model")
        if not file.is_file():
            fetch = how_to_fetch(str(path), "data.tokenizer_path")
            missing = f"does not exist{fetch}"
            raise ValueError(f"{file} {'is not a regular file' if file.exists() else missing}")
        return _tokenizer_of(file, file.read_bytes())


def _tokenizer_of(file: Path, content: bytes) -> Tokenizer:
    if file.suffix == ".json" or content.lstrip()[:1] == b"{":
        from titan_lite.data.hf_tokenizer import HFTokenizer

        return HFTokenizer(file, content)
    # The first byte of a sentencepiece model; a line of a tiktoken table never starts with it.
    if content[:1] == b"\n":
        from titan_lite.data.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(file, content)
    from titan_lite.data.tiktoken_tokenizer import TiktokenTokenizer, read_ranks

    return TiktokenTokenizer(read_ranks(file, content))


def files_in(folder: Path) -> list[Path]:
    """Returns the tokenizer files in a folder."""
    return [folder / name for name in FILE_NAMES if (folder / name).is_file()]


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = files_in(path)
    if not files:
        raise ValueError(f"the folder {path} has neither {' nor '.join(FILE_NAMES)}")
    return files[0]
