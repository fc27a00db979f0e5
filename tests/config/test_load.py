"""Loading: layers, origins, and what each mistake is called."""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from titan_lite.config.load import ConfigError, LoadedConfig, Problem, load_config
from titan_lite.config.problems import (
    Collector,
    SettingError,
    SettingErrors,
    collecting,
    errors_for,
)
from titan_lite.config.schema import Config


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> LoadedConfig:
    Path("run.toml").write_text(text)
    return load_config("run.toml", overrides)


def problems(text: str, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    return error.value.problems


def the_problem(text: str, *overrides: str) -> tuple[str, str, str]:
    (problem,) = problems(text, *overrides)
    return problem.key, problem.source, problem.message


def test_an_empty_file_is_the_defaults() -> None:
    loaded = load("")
    assert loaded.config == Config()
    assert set(loaded.origins.values()) == {"default"}


def test_without_a_file_the_defaults_are_the_base() -> None:
    assert load_config(None, ["--training.steps=7"]).config.training.steps == 7


def test_an_override_beats_the_file_beats_the_default() -> None:
    loaded = load("[training]\nsteps = 20\nseq_len = 64", "--training.steps=30")
    assert loaded.config.training.steps == 30
    assert loaded.config.training.seq_len == 64
    assert loaded.origins["training.steps"] == "command line"
    assert loaded.origins["training.seq_len"] == "run.toml"
    assert loaded.origins["training.seed"] == "default"


def test_a_file_extends_another_relative_to_itself() -> None:
    Path("sub").mkdir()
    Path("root.toml").write_text("[training]\nsteps = 1\nseed = 1\nseq_len = 16")
    Path("sub/base.toml").write_text('extends = "../root.toml"\n[training]\nsteps = 2\nseed = 2')
    Path("sub/run.toml").write_text('extends = "base.toml"\n[training]\nsteps = 3')
    loaded = load_config("sub/run.toml")
    training = loaded.config.training
    assert (training.steps, training.seed, training.seq_len) == (3, 2, 16)
    assert loaded.origins["training.steps"] == "sub/run.toml"
    assert loaded.origins["training.seed"] == "sub/base.toml"
    assert loaded.origins["training.seq_len"] == "root.toml"


def test_a_list_replaces_the_inherited_list() -> None:
    loaded = load('[optimizer]\nno_decay = ["bias"]', '--optimizer.no_decay=["norm", "embedding"]')
    assert loaded.config.optimizer.no_decay == ["norm", "embedding"]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("--job.description=bare", "bare"),
        ("--job.description=two words", "two words"),
        ('--job.description="quoted words"', "quoted words"),
        ("--job.description=", ""),
        ("--job.description=a=b", "a=b"),
        ('--job.description=write "hi" it\'s # fine', 'write "hi" it\'s # fine'),
        ("--job.description=1\nsteps = 2", "1\nsteps = 2"),
        ('--job.description="2024"', "2024"),
    ],
)
def test_a_value_that_is_no_toml_is_a_plain_string(override: str, value: str) -> None:
    assert load("", override).config.job.description == value


def test_an_integer_serves_as_a_float_but_nothing_else_is_converted() -> None:
    assert load("", "--optimizer.lr=1").config.optimizer.lr == 1.0
    assert the_problem("", "--training.steps=5.0") == (
        "training.steps",
        "command line",
        "expected an integer greater than 0, got 5.0",
    )
    assert the_problem("", "--job.description=2024") == (
        "job.description",
        "command line",
        "expected a string, got 2024",
    )


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("[training]\nstpes = 1", "training.stpes", 'unknown key; did you mean "training.steps"?'),
        ("[training]\nlr = 1", "training.lr", 'unknown key; did you mean "optimizer.lr"?'),
        (
            '[training]\ndataset = "c4"',
            "training.dataset",
            'did you mean "data.dataset" or "validation.dataset"?',
        ),
        ("[training]\ntokenizer_pth = 1", "training.tokenizer_pth", '"data.tokenizer_path"?'),
        ("[compile]\nzzzzz = 1", "compile.zzzzz", "unknown key; [compile] has enable"),
        ("[parallel]\nTP = 1", "parallel.TP", 'did you mean "parallel.tp"'),
        ("[parallelism]\ntp = 1", "parallelism", 'unknown table; did you mean "parallel"?'),
        ("[mesh]\ntp = 1\ncp = 2", "mesh", 'unknown table; did you mean "parallel"?'),
        (
            "[qqq]\nwww = 1",
            "qqq",
            "unknown table; the tables are job, model, data, masked_lm, training",
        ),
        ("[qqq]", "qqq", "unknown table; the tables are job"),
        (
            "steps = 1",
            "steps",
            'a key outside of any table; did you mean "training.steps" or',
        ),
        ('"training.steps" = 1', "training.steps", 'did you mean "training.steps"?'),
        ("compile = true", "compile", "expected a table, got true"),
        ("[[training]]\nsteps = 1", "training", "expected a table, got [a table]"),
        ("[training]\nsteps = true", "training.steps", "an integer greater than 0, got true"),
        ("[training]\nsteps = {a = 1}", "training.steps", "greater than 0, got a table"),
        ("[training]\nsteps = 2024-01-01", "training.steps", "greater than 0, got 2024-01-01"),
        (
            "[training]\nseed = -1",
            "training.seed",
            "expected an integer from 0 to 9223372036854775807",
        ),
        ("[training]\nmax_norm = -0.5", "training.max_norm", "a number of at least 0, got -0.5"),
        ("[optimizer]\nlr = 0", "optimizer.lr", "expected a number greater than 0, got 0"),
        ("[optimizer]\nlr = inf", "optimizer.lr", "expected a number greater than 0, got inf"),
        ("[optimizer]\nlr = nan", "optimizer.lr", "expected a number greater than 0, got nan"),
        (
            "[optimizer]\nbeta1 = 1",
            "optimizer.beta1",
            "expected a number of at least 0 and less than 1, got 1",
        ),
        (
            "[masked_lm]\nmask_prob = 1.0",
            "masked_lm.mask_prob",
            "expected a number greater than 0 and less than 1, got 1.0",
        ),
        (
            "[model]\nhidden_dropout = 1.0",
            "model.hidden_dropout",
            "expected a number of at least 0 and less than 1, got 1.0",
        ),
        ("[data]\nshuffle = 1", "data.shuffle", "expected true or false, got 1"),
        (
            '[optimizer]\nname = "Muon"\nns_coefficients = [1.0]',
            "optimizer.ns_coefficients",
            "expected a list of 3 numbers, got [1.0]",
        ),
        (
            "[compile]\ncomponents = []",
            "compile.components",
            'expected a list with at least one of "model" or "loss", got []',
        ),
        (
            '[parallel]\npp_stage_modules = ["norm"]',
            "parallel.pp_stage_modules",
            'expected a list of lists of strings, got ["norm"]',
        ),
        (
            '[optimizer]\nname = "adamw"',
            "optimizer.name",
            'expected "AdamW", "Adam" or "Muon", got "adamw"; did you mean "AdamW"?',
        ),
        (
            '[optimizer]\nno_decay = ["norm", "bais"]',
            "optimizer.no_decay",
            'expected a list with any of "norm", "bias" or "embedding", got ["norm", "bais"]; did '
            'you mean "bias"?',
        ),
        (
            '[optimizer]\nno_decay = "norm"',
            "optimizer.no_decay",
            'expected a list with any of "norm", "bias" or "embedding", got "norm"',
        ),
        (
            '[parallel]\nreshard_after_forward = "alway"',
            "parallel.reshard_after_forward",
            'expected "default", "always", "never", "last_block_kept" or an integer greater '
            'than 0, got "alway"; did you mean "always"?',
        ),
        (
            "[parallel]\nreshard_after_forward = 0",
            "parallel.reshard_after_forward",
            "or an integer greater than 0, got 0",
        ),
        (
            "[parallel]\ndp_shard = -2",
            "parallel.dp_shard",
            "expected -1 or an integer greater than 0, got -2",
        ),
        (
            "[checkpoint]\nload_step = -1",
            "checkpoint.load_step",
            'expected "latest" or an integer of at least 0, got -1',
        ),
        (
            "[comm]\ntrain_timeout_seconds = 99999999999999",
            "comm.train_timeout_seconds",
            "expected an integer from 1 to 604800, got 99999999999999",
        ),
        (
            "[comm]\ninit_timeout_seconds = 604801",
            "comm.init_timeout_seconds",
            "expected an integer from 1 to 604800, got 604801",
        ),
        (
            "[training]\nextends = 'a.toml'",
            "training.extends",
            "extends must be at the top of a file",
        ),
        ("[model]\ndim = 0", "model.dim", "expected an integer greater than 0, got 0"),
        ("[metrics]\npeak_tflops = 0", "metrics.peak_tflops", "a number greater than 0, got 0"),
        ("extends = 3", "extends", "expected the name of a TOML file, got 3"),
    ],
)
def test_a_mistake_is_named_in_human_words(text: str, key: str, message: str) -> None:
    actual = the_problem(text)
    assert actual[:2] == (key, "run.toml")
    assert message in actual[2]
    assert "Input should" not in actual[2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.steps", "expected --section.key=value; the value is missing"),
        ("--training.stpes", 'section.key=value; did you mean "--training.steps="?'),
        ("--steps=3", 'expected --section.key=value; did you mean "--training.steps=" or'),
        ("training.steps=3", 'section.key=value; did you mean "--training.steps="?'),
        ("-training.steps=3", 'section.key=value; did you mean "--training.steps="?'),
        ("--model={dim=5}", "the table model cannot be overridden as a whole"),
        ("--verbose", "not an option; expected --section.key=value"),
        ("extra", "expected --section.key=value"),
        ("--.steps=3", "expected --section.key=value"),
        ("--training.=3", "expected --section.key=value"),
    ],
)
def test_a_malformed_override_is_a_problem_among_others(override: str, message: str) -> None:
    actual = problems("[training]\nsteps = 0", override)
    assert [p.key for p in actual] == [override, "training.steps"]
    assert actual[0].source == "command line"
    assert message in actual[0].message


def test_an_override_with_an_unknown_key_is_named() -> None:
    assert the_problem("", "--trainig.steps=3") == (
        "trainig",
        "command line",
        'unknown table; did you mean "training"?',
    )
    assert the_problem("", "--training.steps.x=3")[0] == "training.steps.x"


def test_all_problems_of_all_layers_stand_in_one_block() -> None:
    Path("base.toml").write_text("[optimizer]\nlr = -1")
    text = 'extends = "base.toml"\n[training]\nstpes = 1\n[parallel]\ntp = "two"'
    with pytest.raises(ConfigError) as error:
        load(text, "--training.seq_len=-5")
    assert str(error.value) == (
        "titan-lite: 4 problems in the configuration\n"
        "  optimizer.lr     (base.toml): expected a number greater than 0, got -1\n"
        '  training.stpes   (run.toml): unknown key; did you mean "training.steps"?\n'
        '  parallel.tp      (run.toml): expected an integer greater than 0, got "two"\n'
        "  training.seq_len (command line): expected an integer greater than 0, got -5"
    )


def test_a_mistake_in_a_base_is_one_even_where_it_is_overridden() -> None:
    Path("base.toml").write_text('[training]\nsteps = "many"')
    actual = the_problem('extends = "base.toml"\n[training]\nsteps = 5')
    assert actual[:2] == ("training.steps", "base.toml")


def test_a_toml_syntax_error_has_line_column_and_a_hint() -> None:
    key, source, message = the_problem("[data]\ndataset = c4  # real text")
    assert (key, source) == ("", "run.toml")
    assert "at line 2, column 11" in message
    assert message.endswith('dataset = c4  # real text; write a string in quotes: "c4"')
    assert "(at line 1, column 10): [training" in the_problem("[training\n")[2]
    assert "not valid TOML" in the_problem("[a]\nx = 1\n[a]\n")[2]
    assert "not valid TOML" in the_problem('x = "')[2]


def test_a_syntax_error_in_a_base_is_attributed_to_the_base() -> None:
    Path("base.toml").write_text("x =")
    key, source, message = the_problem('extends = "base.toml"')
    assert (key, source) == ("", "base.toml")
    assert "not valid TOML" in message


def test_a_missing_file_offers_the_nearest_name() -> None:
    Path("debug.toml").write_text("")
    with pytest.raises(ConfigError, match=r'debgu\.toml: no such file; did you mean "debug.toml"'):
        load_config("debgu.toml")
    with pytest.raises(
        ConfigError, match=r'nowhere/x\.toml: no such file, and no folder "nowhere"'
    ):
        load_config("nowhere/x.toml")


def test_a_common_suffix_makes_no_two_names_alike() -> None:
    Path("u.toml").write_text("")
    with pytest.raises(ConfigError, match=r"nosuch\.toml: no such file$"):
        load_config("nosuch.toml")


def test_a_missing_base_names_both_files() -> None:
    Path("base.toml").write_text("")
    assert the_problem('extends = "bsae.toml"') == (
        "extends",
        "run.toml",
        'base file "bsae.toml": no such file; did you mean "base.toml"?',
    )


def test_a_folder_is_told_apart_from_a_file() -> None:
    Path("configs").mkdir()
    Path("configs/a.toml").write_text("")
    with pytest.raises(ConfigError, match=r"configs: a folder, .* is expected; it holds a.toml"):
        load_config("configs")


def test_a_file_under_a_file_cannot_be_read() -> None:
    Path("plain").write_text("")
    with pytest.raises(ConfigError, match=r"plain/x\.toml: cannot be read: Not a directory"):
        load_config("plain/x.toml")


def test_names_that_no_file_can_have_are_problems_too() -> None:
    assert "cannot be read: embedded null byte" in the_problem(r'extends = "\u0000"')[2]
    assert "cannot be read: File name too long" in the_problem(f'extends = "{"x" * 300}"')[2]
    Path("loop.toml").symlink_to("loop.toml")
    assert "cannot be read: Too many levels" in the_problem('extends = "loop.toml"')[2]


def test_a_pipe_is_refused_and_not_waited_for() -> None:
    os.mkfifo("pipe.toml")
    message = "cannot be read: it must be a regular file, because several processes read it"
    assert message in the_problem('extends = "pipe.toml"')[2]
    with pytest.raises(ConfigError, match=f"pipe.toml: {message}"):
        load_config("pipe.toml")


def test_a_problem_stays_on_one_line_of_bearable_length() -> None:
    actual = problems('"a\\nb" = 1', "--x\ny", f"--training.steps={'z' * 500}")
    lines = str(ConfigError(actual)).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) < 200


def test_a_file_that_is_not_utf8_says_where() -> None:
    Path("run.toml").write_bytes(b'[job]\ndescription = "caf\xe9"')
    with pytest.raises(ConfigError, match=r"run.toml: not UTF-8 text: byte 0xe9 in line 2"):
        load_config("run.toml")


def test_a_byte_order_mark_is_no_mistake() -> None:
    Path("run.toml").write_bytes(b"\xef\xbb\xbf[training]\nsteps = 3")
    assert load_config("run.toml").config.training.steps == 3


def test_a_circle_of_bases_shows_the_chain() -> None:
    Path("a.toml").write_text('extends = "b.toml"')
    Path("b.toml").write_text('extends = "a.toml"')
    assert the_problem('extends = "a.toml"') == (
        "extends",
        "b.toml",
        "the files extend each other in a circle: run.toml -> a.toml -> b.toml -> a.toml",
    )
    assert "run.toml -> run.toml" in the_problem('extends = "run.toml"')[2]


def test_a_missing_file_and_a_bad_override_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        load_config("missing.toml", ["--training.steps=0"])
    assert [p.source for p in error.value.problems] == ["missing.toml", "command line"]


def test_all_problems_reach_the_process_that_asked_another() -> None:
    """A pool waits for ever for an exception that it cannot read."""
    error = ConfigError([Problem("parallel.pp", "command line", "too many")])
    sent = pickle.loads(pickle.dumps(error))
    assert (sent.problems, str(sent)) == (error.problems, str(error))


def reported(*overrides: str, errors: Sequence[SettingError]) -> list[tuple[str, str, str]]:
    with (
        pytest.raises(ConfigError) as error,
        load_config(None, overrides).reporting(),
        collecting() as problems,
    ):
        problems.errors += errors
    return [(p.key, p.source, p.message) for p in error.value.problems]


def test_no_message_is_searched_for_a_key() -> None:
    """parallel.pp is part of other keys, and a path may spell any."""
    message = "parallel.pp_split splits runs/optimizer.lr=1e-3"
    set_all = ("--parallel.pp=2", "--parallel.pp_split=uniform", "--optimizer.lr=1")
    errors = [SettingError("training.steps", message)]
    assert reported(*set_all, errors=errors) == [("training.steps", "default", message)]
    with pytest.raises(SettingError) as error, errors_for("parallel.pp_split"):
        raise OSError(message)
    assert (error.value.keys, error.value.message) == (("parallel.pp_split",), message)


def test_of_several_keys_the_last_one_that_somebody_set_is_blamed() -> None:
    errors = [SettingError(("parallel.dp_shard", "parallel.pp", "parallel.tp"), "too many")]
    assert reported(errors=errors) == [("parallel.dp_shard", "default", "too many")]
    for set_here in (["pp"], ["pp", "tp"]):
        overrides = [f"--parallel.{key}=2" for key in set_here]
        blamed = f"parallel.{set_here[-1]}"
        assert reported(*overrides, errors=errors) == [(blamed, "command line", "too many")]


def test_of_several_keys_that_of_the_latest_layer_is_blamed_whatever_their_order() -> None:
    Path("base.toml").write_text("[model]\nnum_layers = 3\nnum_heads = 8\n")
    text = 'extends = "base.toml"\n[model]\ndim = 32\n'

    def blamed(*keys: str, overrides: Sequence[str] = ()) -> str:
        with pytest.raises(ConfigError) as error, load(text, *overrides).reporting():
            raise SettingError(keys, "wrong")
        (problem,) = error.value.problems
        return problem.key

    tp = ["--parallel.tp=3"]
    assert blamed("parallel.tp", "model.dim", "model.num_heads", overrides=tp) == "parallel.tp"
    assert blamed("model.dim", "model.num_heads", "parallel.tp") == "model.dim"
    assert blamed("model.num_layers", "model.num_heads") == "model.num_heads"
    assert blamed("model.num_heads", "parallel.tp", "model.num_layers") == "model.num_layers"


def test_a_key_of_a_source_comes_from_where_the_sources_do() -> None:
    errors = [SettingError("data.sources.web.split", "no such split")]
    overrides = '--data.sources=[{name = "web", weight = 1}]'
    [(key, source, _)] = reported(overrides, errors=errors)
    assert (key, source) == ("data.sources.web.split", "command line")


def test_what_several_checks_find_is_reported_together() -> None:
    collector = Collector()
    with collector.checking("parallel.tp"):
        raise ValueError("too many")
    with collector.checking("parallel.tp"), collecting() as inner:
        inner.errors += [SettingError("job.dump_folder", "is locked")] * 2
    with collector.checking("parallel.tp"):
        pass
    with pytest.raises(SettingErrors) as error, collecting() as outer:
        outer.errors += collector.errors
    assert str(error.value).splitlines() == [
        "parallel.tp: too many",
        *["job.dump_folder: is locked"] * 2,
    ]
    sent = pickle.loads(pickle.dumps(error.value))
    assert str(sent) == str(error.value)
