"""The cost of the data on the bundled corpus: medians of runs in turn, as one JSON object.

    python -m benchmarks.data [--threads 1] [--rounds 9] [--copies 16] [--output data.json]

- tokenize-and-pack throughput over tiktoken's encode_ordinary_batch, on the same text and threads;
- batches read from token ids in Arrow, Parquet and Megatron files over those tokenized from text;
- `titan-lite tokenize` with 2 processes over 1, on `copies` of the corpus, one file each; process
  start included.
"""

import argparse
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import tiktoken

from benchmarks.command import benchmark_parser, positive, run_benchmark
from benchmarks.measure import Values
from titan_lite.config.schema import Data
from titan_lite.data.assets import bundled_asset
from titan_lite.data.documents import document_of
from titan_lite.data.loader import DataLoader
from titan_lite.data.packing import join_documents, pack
from titan_lite.data.sources import resolve_source
from titan_lite.data.token_folder import TokenManifest
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.data.tokenizing import tokenize

BATCH = 8


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def first_batch_seconds(tokenizer: Tokenizer, seq_len: int) -> float:
    """Returns the seconds from creating the loader to its first batch, on the bundled corpus."""
    start = time.perf_counter()
    loader = DataLoader(
        Data(),
        seq_len=seq_len,
        seed=0,
        local_batch_size=8,
        batch_rank=0,
        batch_degree=2,
        tokenizer=tokenizer,
    )
    next(loader)
    taken = time.perf_counter() - start
    loader.close()
    return taken


def tokenized(section: Data, target: Path, processes: int) -> TokenManifest:
    return tokenize(
        resolve_source(section),
        section,
        target,
        processes=processes,
        shard_size=2**29,
    )


def reading(tokenizer: Tokenizer, seq_len: int, rounds: int) -> dict[str, float]:
    """Measures tokens/s of one epoch's batches, of text and of token ids in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = tokenized(Data(), Path(folder) / "arrow", 1)
        num_batches = manifest.tokens // (BATCH * seq_len)
        write_others(Path(folder))
        forms = ("arrow", "parquet", "megatron")
        sections = {
            "text": Data(),
            **{form: Data(dataset_path=f"{folder}/{form}") for form in forms},
        }
        seconds_of: dict[str, list[float]] = {form: [] for form in sections}
        for _ in range(rounds):
            for form, section in sections.items():
                loader = DataLoader(
                    section,
                    seq_len=seq_len,
                    seed=0,
                    local_batch_size=BATCH,
                    batch_rank=0,
                    batch_degree=1,
                    tokenizer=tokenizer,
                )
                start = time.perf_counter()
                for _ in range(num_batches):
                    next(loader)
                seconds_of[form].append(time.perf_counter() - start)
                loader.close()
    count = num_batches * BATCH * seq_len
    speeds = {form: count / statistics.median(times) for form, times in seconds_of.items()}
    return {
        **{f"batches_of_{form}_tokens_per_s": round(speed) for form, speed in speeds.items()},
        **{f"{form}_over_text": round(speeds[form] / speeds["text"], 2) for form in forms},
    }


def write_others(folder: Path) -> None:
    """Writes the documents of a saved dataset as Parquet and as Megatron's pair of files."""
    dataset = datasets.load_from_disk(str(folder / "arrow"))
    documents = [np.array(ids, np.uint16) for ids in dataset["input_ids"]]
    (folder / "parquet").mkdir()
    dataset.to_parquet(folder / "parquet" / "0.parquet")
    (folder / "megatron").mkdir()
    np.concatenate(documents).tofile(folder / "megatron/0.bin")
    lengths = np.array([len(document) for document in documents], np.int32)
    offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    boundaries = np.arange(len(documents) + 1, dtype=np.int64)
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, len(lengths), len(boundaries))
    content = header + lengths.tobytes() + offsets.tobytes() + boundaries.tobytes()
    (folder / "megatron/0.idx").write_bytes(content)


def tokenizing(copies: int, rounds: int) -> dict[str, float]:
    """Measures tokens/s of `titan-lite tokenize`, by number of processes."""
    seconds_of: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").mkdir()
        for number in range(copies):
            shutil.copy(
                bundled_asset("corpus/train.jsonl"), Path(folder) / f"text/{number:03}.jsonl"
            )
        section = Data(dataset_path=f"{folder}/text")
        target = Path(folder) / "tokens"
        for _ in range(rounds):
            for processes, times in seconds_of.items():
                start = time.perf_counter()
                manifest = tokenized(section, target, processes)
                times.append(time.perf_counter() - start)
                shutil.rmtree(target)
    one, two = (manifest.tokens / statistics.median(times) for times in seconds_of.values())
    return {
        "tokenize_megabytes": round(
            copies * bundled_asset("corpus/train.jsonl").stat().st_size / 1e6, 1
        ),
        "tokenize_1_process_tokens_per_s": round(one),
        "tokenize_2_processes_tokens_per_s": round(two),
        "tokenize_2_over_1": round(two / one, 2),
    }


def measured(options: argparse.Namespace) -> Values:
    """Measures everything on the bundled corpus."""
    tokenizer = load_tokenizer()
    cold = first_batch_seconds(tokenizer, options.seq_len)
    warm = first_batch_seconds(tokenizer, options.seq_len)
    source = resolve_source(Data())
    texts = [document_of(row, source.kind, "text", "") for row in source.open()]
    encoding: tiktoken.Encoding = tokenizer._encoding

    def tokenize_and_pack() -> int:
        documents = tokenizer.encode_documents(texts, threads=options.threads)
        tokens = join_documents(documents, tokenizer.bos_id, tokenizer.eos_id)
        return sum(1 for _ in pack([(None, tokens)], options.seq_len))

    def encode_batch() -> object:
        return encoding.encode_ordinary_batch(texts, num_threads=options.threads)

    times = [(seconds(tokenize_and_pack), seconds(encode_batch)) for _ in range(options.rounds)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    pack_median, encode_median = map(statistics.median, zip(*times, strict=True))
    return {
        "threads": options.threads,
        "tokenize_and_pack_mb_per_s": round(megabytes / pack_median, 2),
        "encode_ordinary_batch_mb_per_s": round(megabytes / encode_median, 2),
        "throughput_ratio": round(encode_median / pack_median, 3),
        "first_batch_seconds": round(cold, 3),
        "first_batch_seconds_datasets_imported": round(warm, 3),
        **reading(tokenizer, options.seq_len, options.rounds),
        **tokenizing(options.copies, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("data", __doc__)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--seq-len", type=positive, default=256)
    parser.add_argument("--copies", type=positive, default=16)
    return run_benchmark(parser, argv, measured)


if __name__ == "__main__":
    sys.exit(main())
