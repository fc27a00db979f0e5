"""Train the bundled byte-level BPE on the bundled corpus and print the entropy of its tokens.

    python scripts/train_tokenizer.py

Writes assets/tokenizer/tokenizer.model in tiktoken's format. The unigram entropy, in nats, is the
loss of a model that knows only how often each token occurs: a model that learns must go below it.
"""

import argparse
import base64
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from titan_lite.data.assets import ASSETS
from titan_lite.data.packing import join_documents
from titan_lite.data.tiktoken_tokenizer import SPLIT_PATTERN
from titan_lite.data.tokenizer_files import load_tokenizer

NUM_RANKS = 1792  # with the 256 special tokens: a vocabulary of 2,048


def train(texts: Iterable[str], num_ranks: int = NUM_RANKS) -> Tokenizer:
    """A Hugging Face byte-level BPE tokenizer; the same texts give the same merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tiktoken_lines(tokenizer: Tokenizer) -> bytes:
    """The vocabulary as tiktoken's file: base64 token, space, rank."""
    byte_of = {char: value for value, char in byte_level_alphabet().items()}
    ranks = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[char] for char in token) for token, _ in ranks]
    return b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens))


def byte_level_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {v: chr(v) for v in printable} | {v: chr(256 + i) for i, v in enumerate(others)}


def read_texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy of the token frequencies, in nats."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ASSETS / "tokenizer" / "tokenizer.model")
    output: Path = parser.parse_args().output
    texts = {split: read_texts(ASSETS / "corpus" / f"{split}.jsonl") for split in SPLITS}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(tiktoken_lines(train(texts["train"])))
    tokenizer = load_tokenizer(output)
    for split, documents in texts.items():
        encoded = tokenizer.encode_documents(documents)
        tokens = join_documents(encoded, tokenizer.bos_id, tokenizer.eos_id)[:, 0]
        size = sum(len(text.encode()) for text in documents)
        print(
            f"{split}: {len(tokens)} tokens, {size / len(tokens):.3f} bytes per token, "
            f"unigram entropy {unigram_entropy(tokens):.4f} nats"
        )


SPLITS = ("train", "validation")

if __name__ == "__main__":
    main()
