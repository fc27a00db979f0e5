"""Properties of loading and rendering, for any configuration."""

import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_lite.config.load import ConfigError, LoadedConfig, load_config
from titan_lite.config.problems import FIELDS, SECTIONS, keys
from titan_lite.config.render import to_toml
from titan_lite.config.schema import Config

positive = st.integers(1, 10**12)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
number = st.floats(1e-12, 1e12, allow_nan=False)


def table(section: str, **values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    model = SECTIONS[section]
    return st.fixed_dictionaries({}, optional=values).map(lambda kwargs: model(**kwargs))


configs = st.builds(
    Config,
    job=table("job", dump_folder=words, description=words),
    model=table("model", dim=positive, rope_theta=number),
    data=table("data", shuffle=st.booleans(), dataset=words, num_streams=positive),
    training=table(
        "training",
        steps=positive,
        global_batch_size=positive | st.just(-1),
        param_dtype=st.sampled_from(["float32", "bfloat16"]),
    ),
    optimizer=table(
        "optimizer",
        lr=number,
        beta1=st.floats(0, 1, exclude_max=True),
        no_decay=st.lists(st.sampled_from(["norm", "bias", "embedding"])),
    ),
    parallel=table(
        "parallel",
        reshard_after_forward=positive
        | st.sampled_from(["default", "always", "never", "last_block_kept"]),
    ),
    checkpoint=table("checkpoint", load_step=st.integers(0, 10**9) | st.just("latest")),
    metrics=table("metrics", peak_tflops=number),
)


@given(configs)
def test_what_is_rendered_parses_back_to_the_same(config: Config) -> None:
    rendered = to_toml(LoadedConfig(config, dict.fromkeys(keys(), "a file")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_text(rendered, encoding="utf-8")
        assert load_config(path).config == config


@given(st.lists(st.tuples(st.sampled_from(["steps", "seq_len", "gc_freq"]), positive)))
def test_the_last_override_of_a_key_wins(pairs: list[tuple[str, int]]) -> None:
    overrides = [f"--training.{key}={value}" for key, value in pairs]
    training = load_config(None, overrides).config.training
    for key, value in dict(pairs).items():
        assert getattr(training, key) == value


@st.composite
def typos(draw: st.DrawFn) -> tuple[str, str]:
    """A key, and the same with one character dropped, added, replaced, or two exchanged."""
    section, _, key = draw(st.sampled_from(keys())).partition(".")
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase))
    wrong = draw(
        st.sampled_from(
            [
                key[:at] + key[at + 1 :],
                key[:at] + letter + key[at:],
                key[:at] + letter + key[at + 1 :],
                key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :],
            ]
        ).filter(lambda wrong: wrong and wrong not in FIELDS[section])
    )
    return f"{section}.{key}", f"{section}.{wrong}"


@given(typos())
def test_a_key_with_one_wrong_character_is_named(typo: tuple[str, str]) -> None:
    _, wrong = typo
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"--{wrong}=1"])
    (problem,) = error.value.problems
    assert problem.key == wrong
    assert problem.message.startswith("unknown key; ")


def test_nearly_every_typo_is_answered_with_the_right_key() -> None:
    answered = total = 0
    for dotted in keys():
        section, _, key = dotted.partition(".")
        wrongs = {key[:at] + key[at + 1 :] for at in range(len(key))}
        wrongs |= {key[:at] + "x" + key[at + 1 :] for at in range(len(key))}
        wrongs |= {key[:at] + "x" + key[at:] for at in range(len(key))}
        for wrong in sorted(wrongs - FIELDS[section].keys() - {""}):
            with pytest.raises(ConfigError) as error:
                load_config(None, [f"--{section}.{wrong}=1"])
            total += 1
            answered += f'"{dotted}"' in error.value.problems[0].message
    assert answered / total > 0.99, f"{answered} of {total}"
