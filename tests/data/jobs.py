"""The loaders of all ranks of a job, and what they give together, in global order."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from titan_lite.config.schema import Data
from titan_lite.data.loader import DataLoader, merge_states
from titan_lite.data.packing import RowMaker
from titan_lite.data.tokenizer_files import load_tokenizer

TOKENIZER = load_tokenizer()
SEQ_LEN = 8
NUM_STREAMS = st.sampled_from([1, 2, 3, 4, 6, 8])
DEGREES = st.sampled_from([1, 2, 3, 4, 8])
FILES = st.sampled_from(["one", "four"])
# A layout, and a job that is resumed at other degrees after some steps.
LAYOUTS = {"num_streams": NUM_STREAMS, "degree": DEGREES, "batch": st.integers(1, 3)}
RESUMES = {
    "num_streams": NUM_STREAMS,
    "degrees": st.lists(DEGREES, min_size=2, max_size=4),
    "steps": st.integers(0, 9),
}
few = settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])


def loaders(
    section: Data,
    degree: int = 1,
    state: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    batch: int = 1,
    seq_len: int = SEQ_LEN,
    tokenizer: Any = TOKENIZER,
    rows: RowMaker | None = None,
) -> list[DataLoader]:
    """Returns loaders of `degree` ranks with `batch` samples at a time, after a merged state."""
    made = [
        DataLoader(
            section,
            seq_len=seq_len,
            seed=seed,
            local_batch_size=batch,
            batch_rank=rank,
            batch_degree=degree,
            tokenizer=tokenizer,
            rows=rows,
        )
        for rank in range(degree)
    ]
    for loader in made:
        if state is not None:
            loader.load_state_dict(state)
    return made


def rows_of(ranks: Sequence[DataLoader], num_batches: int) -> list[dict[str, Any]]:
    """The next samples of the job, each as all that the model gets of it."""
    rows = []
    for _ in range(num_batches):
        # The rank whose turn it is gives the first sample of the step.
        turn = ranks[0].state_dict()["num_samples"] % len(ranks)
        batches = [vars(next(loader)) for loader in [*ranks[turn:], *ranks[:turn]]]
        for number in range(len(batches[0]["inputs"])):
            for batch in batches:
                rows.append(
                    {k: None if t is None else t[number].tolist() for k, t in batch.items()}
                )
    return rows


def take(ranks: Sequence[DataLoader], num_batches: int) -> list[list[int]]:
    """The next samples of the job, each as its S + 1 tokens."""
    rows = rows_of(ranks, num_batches)
    assert all(row["inputs"][1:] == row["labels"][:-1] for row in rows)
    return [[*row["inputs"], row["labels"][-1]] for row in rows]


def merged(ranks: Iterable[DataLoader]) -> dict[str, Any]:
    """The state of the job, as it comes back from a file."""
    state: dict[str, Any] = json.loads(
        json.dumps(merge_states([loader.state_dict() for loader in ranks]))
    )
    return state


def close(ranks: Iterable[DataLoader]) -> None:
    for loader in ranks:
        loader.close()


def in_parts(
    section: Data,
    parts: Iterable[tuple[int, int]],
    read: Callable[[list[DataLoader], int], list[Any]] = take,
    *,
    state: dict[str, Any] | None = None,
    **layout: Any,
) -> tuple[list[Any], dict[str, Any] | None]:
    """Samples of a job that is resumed for each part, (degree, batches), and its last state."""
    samples = []
    for degree, num_batches in parts:
        ranks = loaders(section, degree, state, **layout)
        samples += read(ranks, num_batches)
        state = merged(ranks)
        close(ranks)
    return samples, state


def run(section: Data, num_batches: int, *, degree: int = 1, **layout: Any) -> list[list[int]]:
    """Returns the samples of a job that is not interrupted."""
    samples, _ = in_parts(section, [(degree, num_batches)], **layout)
    return samples
