"""The curve of a run, read from its folder or from a golden file; without torch."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titan_lite.config import stored
from titan_lite.config.problems import FIELDS, keys, near_file, quote
from titan_lite.config.schema import Config
from titan_lite.config.stored import global_batch_size, setting

QUANTITIES = ("loss", "grad_norm", "lr", "tokens")
METRICS_FILE, RUN_FILE = "metrics.jsonl", "run.json"

# Keys of [data] that affect the speed of reading, not the samples.
_SPEED_KEYS = frozenset({"prefetch", "tokenizer_threads"})
# From coarse to fine.
_DTYPES = ("float8", "bfloat16", "float16", "float32")
# Paths of which only the file's name is compared: folders differ between machines.
_PATH_KEYS = frozenset({"dataset_path", "tokenizer_path"})

Array = NDArray[np.float64]
Record = dict[str, Any]


class CurveError(ValueError):
    """Runs cannot be read or compared; the message is for the user."""


class Changes(str):
    """The values of a setting that a resume changed, in words: "0.1, then 0.2 from step 5"."""


@dataclass(frozen=True)
class Curve:
    """The logged values of each quantity of a run.

    values: by quantity, one for each of `steps`. data: the settings that select its training data.
    dtype: the coarsest dtype that it computes in. facts: the contents of run.json.
    """

    name: str
    steps: NDArray[np.int64]
    values: Mapping[str, Array]
    data: Mapping[str, Any]
    dtype: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The last logged step."""
        return int(self.steps[-1])


def read_curve(path: Path) -> Curve:
    """Reads the curve of a run folder or a golden file; CurveError if there is none."""
    if not path.exists():
        raise CurveError(f"{path}: no such run folder or golden file{near_file(path)}")
    if not path.is_dir():
        return _read_golden(path)
    check_run_folder(path)
    return make_curve(str(path), read_records(path), read_facts(path))


def check_run_folder(folder: Path) -> None:
    """Raises CurveError if a folder is not a run folder, with the name of one nearby."""
    for name in (RUN_FILE, METRICS_FILE):
        if not (folder / name).exists():
            # Suggest the run that saved a checkpoint, or the newest run in a folder of runs.
            below = sorted(folder.glob(f"*/{RUN_FILE}"), key=lambda file: -file.stat().st_mtime)
            above = [parent / RUN_FILE for parent in (folder.parent, folder.parent.parent)]
            near = next((file for file in (*above, *below) if file.exists()), None)
            hint = f"; did you mean {quote(str(near.parent))}?" if near else ""
            raise CurveError(f"{folder}: not a run folder, it has no {name}{hint}")


def read_records(folder: Path) -> list[Record]:
    """The records of a run folder's metrics.jsonl."""
    path = folder / METRICS_FILE
    records = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise CurveError(f"{path}: line {number} is not JSON: {line[:60]!r}") from None
        if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
            raise CurveError(f"{path}: line {number} is not a record of a step: {line[:60]!r}")
        records.append(record)
    return records


def read_facts(folder: Path) -> dict[str, Any]:
    """The contents of a run folder's run.json."""
    path = folder / RUN_FILE
    try:
        facts: dict[str, Any] = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CurveError(f"{path} is not JSON: {error}") from None
    _check_facts(str(path), facts)
    return facts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CurveError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CurveError(f"{path}: not UTF-8 text") from None


def _check_facts(name: str, facts: Any) -> None:
    """Raises CurveError unless the facts have a configuration and a mesh."""
    config, mesh = (
        (facts.get("config"), facts.get("mesh")) if isinstance(facts, dict) else (None, None)
    )
    if not (
        isinstance(config, dict)
        and isinstance(mesh, dict)
        and all(isinstance(section, dict) for section in config.values())
        and {"dp_replicate", "dp_shard"} <= mesh.keys()
    ):
        raise CurveError(f"{name} has no config and mesh: titan_lite did not write it")
    for segment in facts.get("segments", []):
        _check_facts(f"{name}: a segment", segment)


def segments(facts: Mapping[str, Any], last_step: int) -> list[Mapping[str, Any]]:
    """Returns the facts of each segment (part of a run between two resumes) with logged steps.

    A run.json of an older version describes only the last segment, which then counts as the whole.
    """
    known = facts.get("segments") or [facts]
    logged = [s for s in known if s.get("resumed_from_step", 0) < last_step]
    return logged or list(known[:1])


def words(value: Any) -> str:
    """Formats a setting's value as TOML, or its changes."""
    return str(value) if isinstance(value, Changes) else stored.words(value)


def over_segments(
    segments: Sequence[Mapping[str, Any]],
    values: Sequence[Any],
    describe: Callable[[Any], str] = words,
) -> Any:
    """Returns the value if all segments have the same, else Changes, formatted by `describe`."""
    pairs = zip(segments[1:], values, values[1:], strict=False)
    changes = [(s.get("resumed_from_step", 0) + 1, new) for s, old, new in pairs if new != old]
    if not changes:
        return values[0]
    later = (f"then {describe(new)} from step {step}" for step, new in changes)
    return Changes(", ".join([describe(values[0]), *later]))


def make_curve(name: str, records: Sequence[Record], facts: Mapping[str, Any]) -> Curve:
    """Makes a curve of a run's records and facts; CurveError if a column is missing."""
    if not records:
        raise CurveError(f"{name}: no step was logged")
    values = {key: column(name, records, key) for key in QUANTITIES}
    steps = np.array([record["step"] for record in records])
    if len(wrong := np.flatnonzero(np.diff(steps) <= 0)):
        before, step = steps[wrong[0] : wrong[0] + 2]
        raise CurveError(f"{name}: steps must increase, but step {step} follows step {before}")
    parts = segments(facts, int(steps[-1]))
    data = [data_settings(part["config"], part["mesh"]) for part in parts]
    whole = {key: over_segments(parts, [of_part[key] for of_part in data]) for key in data[0]}
    coarsest = min((dtype(part["config"]) for part in parts), key=_DTYPES.index)
    return Curve(name, steps, values, whole, coarsest, facts)


def column(name: str, records: Sequence[Record], key: str) -> Array:
    """Returns the values of a key; CurveError if a record does not have it as a number."""
    values = []
    for record in records:
        try:
            # JSON has no NaN and Inf: they are stored as "nan" and "inf", which float() reads.
            values.append(float(record[key]))
        except KeyError:
            raise CurveError(f"{name}: no {key} in the record of step {record['step']}") from None
        except (TypeError, ValueError):
            message = f"{name}: {key} of step {record['step']} is not a number: {record[key]!r}"
            raise CurveError(message) from None
    return np.array(values)


def _read_golden(path: Path) -> Curve:
    text = _read_text(path)
    try:
        golden = json.loads(text)
        facts, records = golden["manifest"], golden["records"]
        digest = facts["records_sha256"]
    except (ValueError, KeyError, TypeError):
        raise CurveError(f"{path}: neither a golden file nor a run folder") from None
    if digest != records_digest(records):
        raise CurveError(
            f"{path}: its records were edited; only titan-lite golden accept may change a golden "
            "curve"
        )
    _check_facts(str(path), facts)
    return make_curve(str(path), records, facts)


def records_digest(records: Sequence[Record]) -> str:
    """SHA-256 of records, independent of the file's formatting."""
    return sha256(json.dumps(records).encode()).hexdigest()


def dtype(config: Mapping[str, Any]) -> str:
    """The coarsest dtype that a run computes in: float8, or that of parameters or reductions."""
    if setting(config, "float8.recipe") != "none":
        return "float8"
    types = {setting(config, f"training.{key}") for key in ("param_dtype", "reduce_dtype")}
    return min(types, key=_DTYPES.index)


def data_settings(config: Mapping[str, Any], mesh: Mapping[str, int]) -> dict[str, Any]:
    """Returns the settings, by key, that determine the tokens of each step."""
    names = [name for name in FIELDS["data"] if name not in _SPEED_KEYS]
    data = {f"data.{name}": setting(config, f"data.{name}") for name in names}
    for name in _PATH_KEYS:
        data[f"data.{name}"] = PurePath(data[f"data.{name}"]).name
    for key in ("training.seq_len", "training.seed"):
        data[key] = setting(config, key)
    return data | {"training.global_batch_size": global_batch_size(config, mesh)}


def check_same_data(a: Mapping[str, Any], b: Mapping[str, Any], *, other_seeds: bool) -> None:
    """Raises CurveError naming every difference between the data of two runs.

    other_seeds: whether seeds may differ.
    """
    differing = [
        f"{key} is {words(a[key])} and {words(b[key])}"
        for key in a
        if a[key] != b[key] and not (other_seeds and key == "training.seed")
    ]
    if differing:
        hint = ""
        if differing[0].startswith("training.seed"):
            hint = "; --tier statistical compares runs of different seeds"
        raise CurveError(f"the runs saw different data: {'; '.join(differing)}{hint}")


def check_same_steps(a: Curve, b: Curve) -> None:
    """Raises CurveError if two runs logged different steps."""
    if not np.array_equal(a.steps, b.steps):
        raise CurveError(f"the runs logged different steps: {_steps(a)}, {_steps(b)}")


def _steps(curve: Curve) -> str:
    first, last, count = int(curve.steps[0]), int(curve.steps[-1]), len(curve.steps)
    every = setting(curve.facts["config"], "metrics.log_freq")
    return f"{curve.name} {count} from {first} to {last} (metrics.log_freq {every})"


def differing_settings(a: Curve, b: Curve) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, except the folders that the runs write to."""
    changed = {}
    parts = [segments(curve.facts, curve.last_step) for curve in (a, b)]
    for key in keys():
        values = [over_segments(p, [setting(s["config"], key) for s in p]) for p in parts]
        if values[0] != values[1] and key != "job.dump_folder":
            changed[key] = values[0], values[1]
    return changed


def non_default(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the values of a stored configuration that differ from the defaults."""
    defaults = Config().model_dump()
    changed = {
        section: {
            key: value for key, value in values.items() if value != defaults[section].get(key)
        }
        for section, values in config.items()
        if section in defaults
    }
    return {section: values for section, values in changed.items() if values}
