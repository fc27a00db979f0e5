"""docs/ci.md and the workflow, as far as they can be held against what is here."""

import re
import shlex
import sys
from pathlib import Path

from titan_lite.config.load import load_config
from titan_lite.regression.golden import CaseFile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
WORKFLOW = (ROOT / ".github/workflows/loss_curve.yml").read_text()
PAGE = (ROOT / "docs/ci.md").read_text()


def test_the_workflow_trains_a_configuration_that_is_here() -> None:
    config = re.search(r"CONFIG: (\S+)", WORKFLOW)
    settings = re.search(r"SETTINGS: (.+)", WORKFLOW)
    assert config
    assert settings
    loaded = load_config(ROOT / config[1], shlex.split(settings[1]))
    assert loaded.config.training.steps == 20
    assert list((ROOT / "tests/golden").glob("*.toml"))


def test_the_case_of_the_page_is_a_case() -> None:
    text = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert text
    case = CaseFile.model_validate(tomllib.loads(text[1]))
    assert case.overrides["training"] == {"steps": 20, "param_dtype": "float32"}
