"""The settings that keys require to have an effect, as the schema states them."""

import json

import pytest
from pydantic import ValidationError

from titan_lite.config.load import load_config
from titan_lite.config.needs import Needs, Variant, needs_of, unmet_needs
from titan_lite.config.problems import FIELDS, SECTIONS, keys
from titan_lite.config.render import json_schema, to_toml
from titan_lite.config.schema import Config

ALL = [
    (table, key, need)
    for table, fields in FIELDS.items()
    for key in fields
    for need in needs_of(SECTIONS[table], key, FIELDS[table][key])
]


@pytest.mark.parametrize(
    ("table", "key", "need"), ALL, ids=[f"{table}.{key}" for table, key, _ in ALL]
)
def test_a_need_is_of_a_key_that_exists_and_a_value_that_it_can_have(
    table: str, key: str, need: Needs
) -> None:
    for other in need.keys:
        dotted = other if "." in other else f"{table}.{other}"
        assert dotted in keys()
        assert dotted != f"{table}.{key}"
        section, _, name = dotted.partition(".")
        for value in need.values or ((need.unless,) if need.above is None else (1,)):
            try:
                Config.model_validate({section: {name: value}})
            except ValidationError as error:
                pytest.fail(f"{dotted} cannot be {value!r}: {error}")


def test_the_conditions_are_put_in_words() -> None:
    config = Config()
    for need, stated, unmet in (
        (Needs("enable", values=(True,)), "checkpoint.enable = true", "checkpoint.enable is false"),
        (Needs("parallel.tp", above=1), "parallel.tp > 1", "parallel.tp is 1"),
        (
            Needs("data.dataset", unless="bundled"),
            'data.dataset other than "bundled"',
            'data.dataset is "bundled"',
        ),
        (Needs("initial_load_path"), "checkpoint.initial_load_path set", "is not set"),
        (Variant("float8.recipe", "a", "b"), 'float8.recipe = "a" or "b"', 'is "none"'),
        (
            Needs("profiling.enable_profiling", "enable", values=(True,)),
            "profiling.enable_profiling or checkpoint.enable = true",
            "profiling.enable_profiling and checkpoint.enable are false",
        ),
    ):
        assert not need.holds(config, "checkpoint")
        assert need.stated("checkpoint") == stated
        assert need.unmet(config, "checkpoint").endswith(unmet)


def test_of_several_keys_one_is_enough() -> None:
    config = load_config(None, ["--profiling.enable_memory_snapshot=true"]).config
    assert Needs("enable_profiling", "enable_memory_snapshot", values=(True,)).holds(
        config, "profiling"
    )


def test_a_key_that_was_not_changed_needs_nothing() -> None:
    assert list(unmet_needs(Config())) == []
    config = load_config(None, ["--parallel.loss_parallel=false"]).config
    [(table, key, need)] = unmet_needs(config)
    assert (table, key, need.keys) == ("parallel", "loss_parallel", ("tp",))


def test_the_json_schema_states_what_keys_need_and_refuses_keys_of_another_variant() -> None:
    tables = json.loads(json.dumps(json_schema({})))["properties"]
    keys = tables["parallel"]["properties"]
    assert keys["loss_parallel"]["description"].endswith(" Needs parallel.tp > 1.")
    assert {"required": ["first_k", "mode"]} in [
        rule["if"] for rule in tables["activation_checkpoint"]["allOf"]
    ]


def test_keys_of_another_variant_are_written_as_comments() -> None:
    text = to_toml(load_config(None, ["--activation_checkpoint.mode=first_k"]))
    assert "\nfirst_k = 1 " in text
    (line,) = [line for line in text.splitlines() if line.startswith("# every_nth is not set ")]
    assert line.endswith(' # requires activation_checkpoint.mode = "every_nth"')
