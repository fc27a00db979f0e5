"""Tokenize-and-pack throughput over tiktoken's encode_ordinary_batch, on the same text and threads.

    python -m benchmarks.data [--threads 1] [--rounds 9]

Both run in turn, in one process; the medians are compared and printed as one JSON object.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import tiktoken

from benchmarks.manifest import report
from titan_lite.config.schema import Data
from titan_lite.data.documents import text_of
from titan_lite.data.loader import DataLoader
from titan_lite.data.packing import join_documents, pack
from titan_lite.data.sources import open_dataset, resolve_source
from titan_lite.data.tokenizer import Tokenizer, load_tokenizer


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def first_batch_seconds(tokenizer: Tokenizer, seq_len: int) -> float:
    """From making the loader to its first batch, on the bundled corpus."""
    start = time.perf_counter()
    loader = DataLoader(
        Data(),
        seq_len=seq_len,
        seed=0,
        local_batch_size=8,
        global_batch_size=16,
        batch_rank=0,
        batch_degree=2,
        tokenizer=tokenizer,
    )
    next(loader)
    taken = time.perf_counter() - start
    loader.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seq_len", type=int, default=256)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer()
    cold = first_batch_seconds(tokenizer, arguments.seq_len)
    warm = first_batch_seconds(tokenizer, arguments.seq_len)
    source = resolve_source(Data())
    texts = [text_of(row, source.kind, "text") for row in open_dataset(source)]
    encoding: tiktoken.Encoding = tokenizer._encoding

    def ours() -> int:
        documents = tokenizer.encode_documents(texts, threads=arguments.threads)
        tokens = join_documents(documents, tokenizer.bos_id, tokenizer.eos_id)
        return sum(1 for _ in pack([(None, tokens)], arguments.seq_len))

    def theirs() -> object:
        return encoding.encode_ordinary_batch(texts, num_threads=arguments.threads)

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(arguments.rounds):
        times["ours"].append(seconds(ours))
        times["theirs"].append(seconds(theirs))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ours_median, theirs_median = (statistics.median(times[key]) for key in ("ours", "theirs"))
    report(
        "data",
        {
            "threads": arguments.threads,
            "tokenize_and_pack_mb_per_s": round(megabytes / ours_median, 2),
            "encode_ordinary_batch_mb_per_s": round(megabytes / theirs_median, 2),
            "throughput_ratio": round(theirs_median / ours_median, 3),
            "first_batch_seconds": round(cold, 3),
            "first_batch_seconds_datasets_imported": round(warm, 3),
        },
    )


if __name__ == "__main__":
    main()
