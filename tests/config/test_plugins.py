"""Modules of job.plugins are imported before a configuration is checked, by every command."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from titan_lite import cli
from titan_lite.config.load import ConfigError, load_config
from titan_lite.config.problems import SettingError
from titan_lite.config.registry import SOURCES
from titan_lite.config.schedules import SCHEDULES, PipelineSchedule
from titan_lite.config.schema import Data
from titan_lite.data.sources import resolve_source
from titan_lite.models import registry
from titan_lite.models.plan import make_plan

FAMILY = """
from dataclasses import replace

from titan_lite.models.llama import LLAMA
from titan_lite.models.registry import register

register(replace(LLAMA, name="mine"))
"""
GIVEN = ("--job.plugins=['my_plugin.setup']", "--model.name=mine")


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The module my_plugin.setup, which registers a family until a test writes something else."""
    package = tmp_path / "my_plugin"
    package.mkdir()
    (package / "setup.py").write_text(FAMILY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(registry._FAMILIES, "data", dict(registry._FAMILIES))
    yield package / "setup.py"
    for name in [name for name in sys.modules if name.split(".")[0] == "my_plugin"]:
        del sys.modules[name]


def test_a_plugin_of_a_file_adds_a_family_and_an_override_replaces_the_list(
    setup: Path, tmp_path: Path
) -> None:
    (tmp_path / "base.toml").write_text('[job]\nplugins = ["my_plugin.setup"]\n')
    (tmp_path / "run.toml").write_text('extends = "base.toml"\n[model]\nname = "mine"\n')
    with pytest.raises(ConfigError, match="No module named 'other'"):
        make_plan(tmp_path / "run.toml", ["--job.plugins=['other']"])
    assert "my_plugin.setup" not in sys.modules
    assert make_plan(tmp_path / "run.toml").family.name == "mine"


@pytest.mark.parametrize(
    "command",
    [
        ["config", *GIVEN],
        ["plan", *GIVEN, "--cluster=h100", "--world-size=8"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_imports_plugins(
    setup: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 0, capsys.readouterr().err


def test_the_process_of_a_dry_run_imports_them_before_anything_else(
    setup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from titan_lite.dryrun import run

    plan = make_plan(None, GIVEN)
    del sys.modules["my_plugin.setup"]
    monkeypatch.setattr(run, "dry_run", lambda *_, **__: "my_plugin.setup" in sys.modules)
    assert run._quiet_dry_run(plan, (0, 1, 1), repeats=True)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nunpy", "ModuleNotFoundError: No module named 'nunpy' ({path}, line 1)"),
        ("x = 1\nx.y", "AttributeError: 'int' object has no attribute 'y' ({path}, line 2)"),
        ("if", "SyntaxError: invalid syntax (setup.py, line 1)"),
    ],
)
def test_a_plugin_that_fails_is_one_problem_with_its_reason(
    setup: Path, code: str, reason: str
) -> None:
    setup.write_text(code)
    with pytest.raises(ConfigError) as error:
        # The name that it would have registered is not reported as unknown.
        make_plan(None, GIVEN)
    (problem,) = error.value.problems
    assert (problem.key, problem.source) == ("job.plugins", "command line")
    assert problem.message == 'cannot import "my_plugin.setup": ' + reason.format(path=setup)


@pytest.mark.parametrize("module", ["no_such", "../x", ".x", "a b", "a/b.py", ""])
def test_a_module_that_cannot_be_found_is_named(module: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"--job.plugins=['{module}']"])
    (problem,) = error.value.problems
    assert problem.message.startswith(f'cannot import "{module}": ')
    is_missing = "ModuleNotFoundError" in problem.message
    hint = "install its package, or put the folder that holds it on PYTHONPATH"
    assert problem.message.endswith(hint) == is_missing


def test_a_wrong_type_is_answered_as_for_any_key() -> None:
    with pytest.raises(ConfigError, match='expected a list of strings, got "x"'):
        load_config(None, ["--job.plugins=x"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parallel.pp_schedule=1F1C", '"DualPipeV", got "1F1C"; did you mean "1F1B"?'),
        ("metrics.sinks=['wand']", '"wandb", got ["wand"]; did you mean "wandb"?'),
    ],
)
def test_a_name_that_nothing_registered_is_answered_with_those_that_are(
    setting: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"--{setting}"])
    assert error.value.problems[0].message.endswith(message)


def test_a_source_that_nothing_registered_is_answered_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SOURCES, "data", {})
    with pytest.raises(SettingError, match="registered: none"):
        resolve_source(Data(dataset="s4://books"))
    SOURCES.register("s3", "my_plugin:Books")
    with pytest.raises(SettingError, match='no data source "s4"; did you mean "s3"'):
        resolve_source(Data(dataset="s4://books"))
    with pytest.raises(ValueError, match='another data source is already registered as "s3"'):
        SOURCES.register("s3", "other:Books")


def test_a_looped_schedule_of_a_plugin_chooses_its_stages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SCHEDULES, "data", dict(SCHEDULES))
    SCHEDULES.register(
        "Mine", PipelineSchedule(build="mine:Mine", stages_per_rank=None, min_per_rank=3)
    )
    settings = ["--parallel.pp=2", "--parallel.pp_schedule=Mine", "--parallel.pp_stages_per_rank=4"]
    with pytest.raises(ConfigError, match='"Mine" requires at least 6 micro-batches'):
        make_plan(None, [*settings, "--training.global_batch_size=5"])
    plan = make_plan(None, [*settings, "--training.global_batch_size=6"])
    assert plan.config.parallel.num_stages == 8
    assert "pp_stages_per_rank" not in caplog.text
