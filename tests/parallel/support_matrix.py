"""docs/support_matrix.md, written from the results of the tests."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.parallel.matrix import (
    BATCH,
    CASES,
    FAMILIES,
    FEATURES,
    FURTHER,
    HOLES,
    IN_PRECISION,
    LAYOUTS,
    MATRIX,
    MODES,
    TOLERANCES,
    Case,
    Hole,
    features,
)
from tests.runs import LATER, Deviations
from titan_lite.models.registry import families

HEAD = f"""\
# Support matrix

The tests write this page, and compare it with their results whenever they run:

<!-- not run: takes minutes; run_tests.sh --all runs the same rows -->
```bash
pytest tests/parallel/test_matrix.py --support-matrix docs/support_matrix.md
```

Each run trains {LATER[-1]} steps of {BATCH} samples, or the `training.steps` of its row, with
uneven numbers of valid tokens. It is compared with a run in one process without compile,
checkpointing or accumulation. The weights before step 1, the loss and gradient norm of each step,
and every gradient of step 1 are compared. For steps {" and ".join(map(str, LATER))} the
layout gets the weights that the single process had before the step; then every gradient is
compared. [numerics.md](numerics.md#layouts-against-one-process) has the reasons. If a row turns on
validation, `validation/loss` is compared as well, with the same bound as the training loss. Runs
use gloo on CPUs, or NCCL if there are as many GPUs as processes.
[test_planted_bugs.py](../tests/parallel/test_planted_bugs.py) shows that the comparison detects
faults.

## float32
"""

LAYOUT = """\
The difference of two tensors is the largest difference of their elements, relative to the tensor's
largest element. For a gradient, a quarter of the largest element of all gradients is added to this
divisor.

The names of layouts have the degrees in `[parallel]`. dpN is `dp_shard = N`, and hsdp RxS is
`dp_replicate = R` and `dp_shard = S`. tpN, cpN and ppN are `tp`, `cp` and `pp`. All other degrees
are 1.

The columns are the modes of activation checkpointing. A cell has the execution and the number of
micro-batches per step, such as "eager x 4". Not every combination is run. Each value of layout,
mode, execution and number of micro-batches is combined with each value of the other three in at
least one run. "aot_eager" is a backend of torch.compile, which has the same graphs for forward and
backward as "compile", without inductor's kernels.
"""

FURTHER_TEXT = """\
These runs have further settings. The single process has the same settings, except those of
`[parallel]` and `training.loss_chunks`:
"""

FAMILIES_TEXT = """\
The rows above are runs of Llama. These are runs of the debug flavors of the other families. The
single process has the same settings, except those of `[parallel]` and `[activation_checkpoint]`.
GPT is tested without the biases of queries, keys and values. Softmax does not change if a vector is
added to all keys, so without rotation the gradient of the keys' bias is only rounding.
"""

FEATURES_TEXT = """\
## Families

Each cell has the layout of a run above with this family and feature. If there is no such run, it
has the reason. FSDP shards over dp_shard x cp, so cp2 is a layout with FSDP. hsdp 2x1 is DDP.
"""

PRECISION = """\
## Other precisions

Each layout is compared with one process in the same precision. The bound for its loss and gradient
norm, at every step, is the largest difference in any step between one process in that precision and
one process in float32. The float32 master weights start with the same bits. Runs with
`optimizer.state_dtype` "int8" or "float8" differ between layouts, because the blocks of elements
that share a scale depend on the layout.
"""

REFUSED = """\
## Refused

The reasons are the error messages on a CPU.
"""


@dataclass
class MatrixResults:
    """Which cases passed, how far off each quantity was at worst, and why holes are refused."""

    passed: dict[Case, bool] = field(default_factory=dict)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    reasons: dict[Hole, str] = field(default_factory=dict)

    def note(self, case: Case, deviations: Deviations) -> None:
        """Keeps what is farther off than in the cases before."""
        for name, (value, place) in deviations.items():
            if name in TOLERANCES and not value <= self.worst.get(name, (-1.0,))[0]:
                self.worst[name] = value, f"{place} of {case}"

    def missing(self) -> list[str]:
        """Cases and holes of the table that were not tried."""
        cases = [
            case for case in (*CASES, *FURTHER, *FAMILIES, *IN_PRECISION) if case not in self.passed
        ]
        return [str(row) for row in (*cases, *(h for h in HOLES if h not in self.reasons))]


def render(results: MatrixResults) -> str:
    """The whole page; nothing of what passes depends on the machine."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: MatrixResults) -> Iterator[str]:
    yield from HEAD.split("\n")
    bounds = [f"{bound:g}" if bound else "the same bits" for bound in TOLERANCES.values()]
    yield from _table(
        ("quantity", "relative difference at most"), zip(TOLERANCES, bounds, strict=True)
    )
    yield ""
    yield from LAYOUT.split("\n")
    cells = {(case.layout, case.mode): _cell(case, results) for case in CASES}
    rows = (
        (layout, str(LAYOUTS[layout][0]), *(cells[layout, mode] for mode in MODES))
        for layout in MATRIX
    )
    yield from _table(("layout", "processes", *MODES), rows)
    yield ""
    yield from FURTHER_TEXT.split("\n")
    yield from _case_table(FURTHER, results)
    yield ""
    yield from FAMILIES_TEXT.split("\n")
    yield from _case_table(FAMILIES, results)
    yield ""
    yield from FEATURES_TEXT.split("\n")
    rows = ((f"`{name}`", *(proof(name, key, results) for key in FEATURES)) for name in families())
    yield from _table(("family", *FEATURES), rows)
    yield ""
    yield from PRECISION.split("\n")
    yield from _case_table(IN_PRECISION, results)
    yield ""
    yield from REFUSED.split("\n")
    refused = (
        (str(hole.world_size), _code(hole.settings), results.reasons[hole].replace("|", "\\|"))
        for hole in HOLES
    )
    yield from _table(("processes", "settings", "reason"), refused)


def proof(family: str, feature: str, results: MatrixResults | None = None) -> str:
    """The cell of a family and a feature; empty if no row has both."""
    wanted = family, feature
    for case in (*CASES, *FURTHER, *FAMILIES):
        name, has = features(case.world_size, (*case.settings, *case.alike))
        if wanted == (name, feature) and feature in has:
            differs = results is not None and not results.passed[case]
            return f"**{case.layout} differs**" if differs else case.layout
    for hole in HOLES:
        name, has = features(hole.world_size, hole.settings)
        if name == family != "llama" and feature in has:
            return "refused: see below"
    return ""


def _case_table(cases: Iterable[Case], results: MatrixResults) -> Iterator[str]:
    return _table(
        ("layout", "checkpointing", "run", "settings"),
        (
            (case.layout, case.mode, _cell(case, results), _code((*case.more, *case.alike)))
            for case in cases
        ),
    )


def _cell(case: Case, results: MatrixResults) -> str:
    return case.cell if results.passed[case] else f"**{case.cell} differs**"


def _code(settings: Iterable[str]) -> str:
    return ", ".join(f"`{setting}`" for setting in settings)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = tuple(head)
    for row in (head, ("---",) * len(head), *rows):
        yield f"| {' | '.join(row)} |"
