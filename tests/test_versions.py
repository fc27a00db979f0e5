"""The supported versions of Python and torch, as stated in different places."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
README = (ROOT / "README.md").read_text()
WORKFLOW = (ROOT / ".github/workflows/tests.yml").read_text()
SCRIPT = ROOT / "scripts/test_versions.sh"


def test_the_readme_states_the_bounds_that_are_installed_and_tested() -> None:
    python = re.search(r"Python (3\.\d+) to (3\.\d+)", README)
    torch = re.search(r"torch (2\.\d+) to (2\.\d+)", README)
    assert python
    assert torch
    assert f'requires-python = ">={python[1]}"' in PROJECT
    assert f'"torch>={torch[1]}"' in PROJECT
    script = SCRIPT.read_text()
    assert f"oldest) python=python{python[1]} " in script
    assert f"newest) python=python{python[2]} " in script
    tested = re.search(r"python: \[(.+)\]", WORKFLOW)
    assert tested
    assert tested[1].replace('"', "").split(", ") == [
        f"3.{minor}" for minor in range(int(python[1][2:]), int(python[2][2:]) + 1)
    ]
    assert f'kind: oldest\n            python: "{python[1]}"' in WORKFLOW
    assert f'kind: newest\n            python: "{python[2]}"' in WORKFLOW
    assert f"run: {SCRIPT.relative_to(ROOT)} ${{{{ matrix.kind }}}}" in WORKFLOW


def test_the_script_of_versions_explains_itself_without_a_kind() -> None:
    done = subprocess.run(["bash", SCRIPT, "latest"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "scripts/test_versions.sh oldest   Python 3.10" in done.stderr


def test_no_class_is_subscripted_that_is_generic_only_from_python_3_11_on() -> None:
    """Types and lint do not notice; under Python 3.10 the module cannot be imported."""
    later = re.compile(r"\b(StreamHandler|LoggerAdapter)\[")
    paths = [path for room in ("titan_lite", "tests") for path in (ROOT / room).rglob("*.py")]
    assert [str(path) for path in paths if later.search(path.read_text())] == []
