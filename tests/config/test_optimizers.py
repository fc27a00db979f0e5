"""[optimizer], whose keys depend on its name."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from titan_lite import cli
from titan_lite.config.load import ConfigError, load_config
from titan_lite.config.optimizers import BUILDERS, OPTIMIZERS, Adam, Optimizer, register_optimizer
from titan_lite.config.render import json_schema, to_markdown, to_toml
from titan_lite.models.plan import make_plan
from titan_lite.planner.memory import peak
from titan_lite.planner.read import read_job


class Rolling(Optimizer):
    name: Literal["Rolling"] = "Rolling"
    friction: float = 0.9
    """Decay of the average."""
    momentum: Annotated[int, Field(ge=1)] = 1
    """Steps that are averaged; Muon's key of this name is a number below 1."""
    state_dtype: Literal["fp16", "int8"] = "fp16"
    """Type of the average; AdamW's key of this name has other values."""
    ns_steps: str = "few"
    """Not a number, as Muon's key of this name."""

    @property
    def state_bytes(self) -> float:
        return 2 if self.state_dtype == "fp16" else 1


@pytest.fixture
def registered() -> Iterator[None]:
    register_optimizer(Rolling, "nowhere:build")
    yield
    del BUILDERS["Rolling"], OPTIMIZERS.variants["Rolling"]
    # Merges the keys again.
    OPTIMIZERS.add(Adam)


def problem(*overrides: str, path: str | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"--optimizer.{override}" for override in overrides])
    (actual,) = error.value.problems
    return f"{actual.key} ({actual.source}): {actual.message}"


@pytest.mark.usefixtures("registered")
def test_a_registered_optimizer_has_the_common_keys_and_its_own() -> None:
    section = load_config(None, ["--optimizer.name=Rolling", "--optimizer.friction=0.5"]).config
    assert section.optimizer == Rolling(friction=0.5)
    assert section.model_dump()["optimizer"]["friction"] == 0.5
    assert problem("name=Rollin") == (
        'optimizer.name (command line): expected "AdamW", "Adam", "Muon" or "Rolling", got '
        '"Rollin"; did you mean "Rolling"?'
    )


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("momentum=0.5", "expected an integer of at least 1, got 0.5"),
        ("state_dtype=fp61", 'expected "fp16" or "int8", got "fp61"; did you mean "fp16"?'),
        (
            "groups=1",
            "expected an array of tables, each with the head [[optimizer.groups]], got 1",
        ),
    ],
)
def test_a_wrong_value_is_compared_with_the_type_of_the_chosen_optimizer(
    override: str, message: str
) -> None:
    assert problem("name=Rolling", override).endswith(f"(command line): {message}")


@pytest.mark.usefixtures("registered")
def test_a_key_of_another_optimizer_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problem("friction=0.5") == (
        'optimizer.friction (command line): does not apply where optimizer.name is "AdamW": set '
        'optimizer.name = "Rolling", or remove friction'
    )
    assert problem("name=Rolling", "frictoin=1.0") == (
        'optimizer.frictoin (command line): unknown key; did you mean "optimizer.friction"?'
    )
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text("[optimizer]\nbeta1 = 0.8")
    Path("b.toml").write_text('extends = "a.toml"\n[optimizer]\nname = "Rolling"\nbeta1 = 0.8')
    assert problem(path="b.toml").startswith(
        'optimizer.beta1 (b.toml): does not apply where optimizer.name is "Rolling": set '
        'optimizer.name = "AdamW" or "Adam" or "Muon", or'
    )


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("state_dtype", ["fp16", "int8"])
def test_keys_that_are_named_like_those_of_adamw_and_muon_do_not_mean_the_same(
    state_dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in the planner nor in the rules: AdamW's "int8" requires synchronous checkpoints."""
    overrides = [
        "--optimizer.name=Rolling",
        f"--optimizer.state_dtype={state_dtype}",
        "--checkpoint.enable=true",
        "--checkpoint.async_mode=async",
    ]
    assert cli.main(["plan", *overrides, "--cluster=h100", "--world-size=8"]) == 0
    assert "optimizer" in capsys.readouterr().out
    plan = make_plan(None, overrides, 8)
    job = read_job(plan)
    plain = dataclasses.replace(job, moment_bytes=4.0)
    assert (
        peak(plain).parts["optimizer"]
        == (4 if state_dtype == "fp16" else 8) * peak(job).parts["optimizer"]
    )


@pytest.mark.usefixtures("registered")
def test_another_optimizer_replaces_the_keys_of_the_files_that_are_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text("[optimizer]\nlr = 1e-3\nbeta1 = 0.8")
    Path("b.toml").write_text('extends = "a.toml"\n[optimizer]\nname = "Rolling"')
    Path("c.toml").write_text('extends = "b.toml"\n[optimizer]\nfriction = 0.5')
    expected = Rolling(lr=1e-3, friction=0.5)
    assert load_config("c.toml").config.optimizer == expected
    overrides = ["--optimizer.friction=0.5", "--optimizer.name=Rolling"]
    assert load_config("a.toml", overrides).config.optimizer == expected
    # A misspelt key is none of another optimizer.
    Path("a.toml").write_text("[optimizer]\nbeta3 = 0.8")
    assert "optimizer.beta3 (a.toml): unknown key" in problem("name=Rolling", path="a.toml")
    # The order of overrides decides nothing.
    assert "does not apply" in problem("beta1=0.8", "name=Rolling")


@pytest.mark.usefixtures("registered")
def test_what_is_written_states_which_optimizer_has_a_key() -> None:
    text = to_toml(load_config(None, ["--optimizer.name=Rolling"]))
    assert "\nfriction = 0.9 " in text
    (line,) = [line for line in text.splitlines() if line.startswith("# beta1 is not set")]
    assert line.endswith('# requires optimizer.name = "AdamW" or "Adam" or "Muon"')
    assert 'Decay of the average. Requires optimizer.name = "Rolling".' in to_markdown()
    table = json_schema({})["properties"]["optimizer"]
    assert table["properties"]["name"]["enum"] == ["AdamW", "Adam", "Muon", "Rolling"]
    assert {
        "if": {"required": ["friction", "name"]},
        "then": {"properties": {"name": {"enum": ["Rolling"]}}},
    } in table["allOf"]


@pytest.mark.usefixtures("registered")
def test_a_name_is_registered_once() -> None:
    class Other(Optimizer):
        name: Literal["Rolling"] = "Rolling"

    with pytest.raises(ValueError, match='already registered as "Rolling"; choose another name'):
        register_optimizer(Other, "nowhere:build")
    register_optimizer(Rolling, "nowhere:build")


def test_a_wrong_group_is_named_by_its_place(tmp_path: Path) -> None:
    assert problem('groups=[{pattern="a"}, {patern="b"}]').endswith(
        'table 2: unknown key patern; did you mean "pattern"?'
    )
    path = tmp_path / "a.toml"
    path.write_text(
        '[[optimizer.groups]]\npattern = "*.weight"\nlr_factor = 0.5\n'
        '[[optimizer.groups]]\npattern = "*"\n'
    )
    loaded = load_config(path)
    assert [group.lr_factor for group in loaded.config.optimizer.groups] == [0.5, 1]
    written = tmp_path / "b.toml"
    written.write_text(to_toml(loaded))
    assert load_config(written).config == loaded.config
