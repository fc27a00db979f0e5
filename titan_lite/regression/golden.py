"""Golden curves: expected curves of runs, each in a text file next to its case."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from titan_lite.config.problems import literal, near_file
from titan_lite.config.section import Positive, PositiveFloat, Section
from titan_lite.regression.compare import LAYOUT_TOLERANCES, Comparison, Tier, compare
from titan_lite.regression.curves import (
    QUANTITIES,
    CurveError,
    Record,
    dtype,
    make_curve,
    non_default,
    read_curve,
    read_facts,
    read_records,
    records_digest,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Facts of run.json that a golden file has; time and place of the run are not among them.
_KEPT_FACTS = ("versions", "environment", "device", "mesh")


class Tolerance(Section):
    """[tolerance]: largest relative differences of a step."""

    loss: PositiveFloat
    grad_norm: PositiveFloat


class CaseFile(Section):
    """A case: one run, and how closely it must follow its golden curve."""

    config: str
    """TOML file of the run, relative to the case."""
    nproc: Positive
    """Processes."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device that it runs on; "cuda" has a golden file for each kind of device."""
    tier: Tier
    """Tier of titan-lite compare."""
    why: str
    """Why the tolerance is not tighter; written into the golden file."""
    tolerance: Tolerance | None = None
    """Replaces the tolerances of tier "layout"."""
    overrides: dict[str, dict[str, Any]] = Field(default={})
    """Keys that differ from the file's, as tables."""


class Case:
    """A case file, with its paths resolved."""

    def __init__(self, path: Path) -> None:
        """Raises CurveError if there is no such case, or it is not valid."""
        self.path = path
        try:
            self.file = CaseFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CurveError(f"{path}: no such case{near_file(path, '*.toml')}") from None
        except OSError as error:
            raise CurveError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise CurveError(f"{path}: not UTF-8 text") from None
        except tomllib.TOMLDecodeError as error:
            raise CurveError(f"{path}: not valid TOML: {error}") from None
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise CurveError(f"{path}: not a golden case: {'; '.join(wrong)}") from None

    @property
    def config(self) -> Path:
        """The TOML file of the run."""
        return self.path.parent / self.file.config

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides as command-line arguments."""
        return tuple(
            f"--{section}.{key}={literal(value)}"
            for section, table in self.file.overrides.items()
            for key, value in table.items()
        )

    def golden(self, device_name: str) -> Path:
        """Path of the golden file, which names the kind of device if it is an accelerator."""
        kind = ""
        if self.file.device != "cpu":
            kind = "." + re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
        return self.path.with_name(f"{self.path.stem}{kind}.golden.json")

    def accepted(self, device_name: str) -> Path:
        """Path of the golden file; raises CurveError if there is none yet."""
        golden = self.golden(device_name)
        if not golden.exists():
            raise CurveError(
                f"{golden}: there is no golden curve yet; titan-lite golden accept {self.path} "
                "writes it"
            )
        return golden

    def check(self, run: Path) -> Comparison:
        """Compares the golden curve with that of a run folder of this case."""
        golden = self.accepted(read_facts(run)["device"])
        a, b = read_curve(golden), read_curve(run)
        return compare(a, b, self.file.tier, self._tolerances(b.dtype))

    def _tolerances(self, dtype: str) -> Mapping[str, float]:
        own = self.file.tolerance
        return LAYOUT_TOLERANCES[dtype] if own is None else own.model_dump()

    def accept(self, run: Path) -> tuple[Path, Comparison | None]:
        """Writes the curve of a run folder as the golden one; returns the comparison with the old
        one, if there is one."""
        facts = read_facts(run)
        path = self.golden(facts["device"])
        changed = None
        if path.exists():
            try:
                changed = self.check(run)
            except CurveError as error:
                print(f"{path}: {error}", file=sys.stderr)
        records = [{key: r[key] for key in ("step", *QUANTITIES)} for r in read_records(run)]
        make_curve(str(run), records, facts)
        path.write_text(_golden_text(self._manifest(facts, records), records), encoding="utf-8")
        return path, changed

    def _manifest(self, facts: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
        config = non_default(facts["config"])
        config.get("job", {}).pop("dump_folder", None)
        of_type = dtype(facts["config"])
        return {
            "case": self.path.name,
            "tier": self.file.tier,
            "tolerance": self._tolerances(of_type) if self.file.tier == "layout" else None,
            "why": self.file.why,
            "dtype": of_type,
            **{key: facts[key] for key in _KEPT_FACTS},
            "config": {section: table for section, table in config.items() if table},
            "records_sha256": records_digest(records),
        }


def _golden_text(manifest: Mapping[str, Any], records: Sequence[Record]) -> str:
    """JSON with one line per step, so that a diff shows the changed steps."""
    lines = ",\n".join(f"    {json.dumps(record)}" for record in records)
    head = json.dumps(manifest, indent=2).replace("\n", "\n  ")
    return f'{{\n  "manifest": {head},\n  "records": [\n{lines}\n  ]\n}}\n'
