"""The command line, as a shell sees it: output, exit code, and no needless imports."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from titan_lite import __version__, cli
from titan_lite.config.load import ConfigError, load_config
from titan_lite.config.problems import FIELDS

SLOW_IMPORTS = {"torch", "torchao", "numpy", "datasets", "pyarrow", "pandas", "transformers"}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("run.toml").write_text('[training]\nsteps = 300\n[job]\ndescription = "a \\"run\\""\n')


def titan_lite(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "titan_lite.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_config_prints_toml_that_loads_back_to_the_same() -> None:
    result = titan_lite("config", "run.toml", "--optimizer.lr=1e-3", "--model.num_layers=2")
    assert (result.returncode, result.stderr) == (0, "")
    Path("again.toml").write_text(result.stdout)
    again = load_config("again.toml").config
    assert again == load_config("run.toml", ["--optimizer.lr=1e-3", "--model.num_layers=2"]).config


def test_config_prints_the_origin_of_each_value_in_one_column() -> None:
    lines = titan_lite("config", "run.toml", "--optimizer.lr=1e-3").stdout.splitlines()
    origins = {line.split(" = ")[0]: line.rpartition("  # ")[2] for line in lines if " = " in line}
    assert origins["description"] == "run.toml"
    assert origins["lr"] == "command line"
    assert origins["seed"] == "default"
    # A line too long for the column keeps its comment behind it.
    short = [line for line in lines if " = " in line and len(line.rpartition("  # ")[0]) <= 50]
    assert len({line.rindex("  # ") for line in short}) == 1
    assert any(line.startswith("# peak_tflops is not set") for line in lines)


def test_config_shows_what_the_flavor_says_and_loads_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = ["--model.flavor=llama3_8b", "--model.num_layers=2", "--model.vocab_size=1000"]
    assert cli.main(["config", *keys]) == 0
    text = capsys.readouterr().out
    lines = {line.partition("  ")[0]: line.rpartition("  # ")[2] for line in text.splitlines()}
    assert lines["# dim = 4096"] == "llama3_8b"
    assert lines["# head_dim = 128"] == "llama3_8b"
    assert lines['# ffn = "swiglu"'] == "llama3_8b"
    assert lines["num_layers = 2"] == "command line"
    # 2 x 218,112,000 of a block, 2 x 1000 x 4096 of the vocabulary, the last norm.
    assert "# parameters: 444,420,096" in lines
    Path("again.toml").write_text(text)
    assert load_config("again.toml").config == load_config(None, keys).config


def test_config_shows_no_numbers_of_a_flavor_that_is_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigError):
        cli._config(["--model.flavor=nope"])
    out = capsys.readouterr().out
    assert "# dim is not set" in out
    assert "parameters" not in out


def test_looking_at_a_configuration_needs_none_of_its_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = ["--data.tokenizer_path=none.model", "--data.dataset_path=none.jsonl"]
    assert titan_lite("config", *keys, "--quiet").stderr == ""
    result = titan_lite("config", *keys)
    assert result.returncode == 0
    for key, path in (("tokenizer_path", "none.model"), ("dataset_path", "none.jsonl")):
        warning = (
            f'a run would stop at the start: data.{key} (command line): no such file: "{path}"'
        )
        assert f"titan-lite: warning: {warning}" in result.stderr
    assert cli.main(["config", *keys, "--preflight", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("titan-lite: 2 problems in the configuration")
    assert 'no such file: "none.model"' in error


def test_an_unknown_cluster_is_a_warning_like_a_missing_file() -> None:
    result = titan_lite("config", "--job.cluster=h1000")
    assert result.returncode == 0
    assert (
        "titan-lite: warning: a run would stop at the start: job.cluster (command line): "
        'no cluster "h1000"; did you mean "h100"? (known: a100' in result.stderr
    )


def test_a_missing_checkpoint_is_a_warning_like_a_missing_file() -> None:
    folder = "--job.dump_folder=runs/optimizer.lr=1e-3"
    enabled = ["--optimizer.lr=1e-3", "--checkpoint.enable=true", folder]
    result = titan_lite("config", *enabled, "--checkpoint.load_step=99")
    assert result.returncode == 0
    assert result.stderr == (
        "titan-lite: warning: a run would stop at the start: checkpoint.load_step (command line): "
        "no checkpoint of step 99 in runs/optimizer.lr=1e-3/checkpoint; steps found: none\n"
    )
    result = titan_lite("config", *enabled, "--checkpoint.initial_load_path=none")
    assert result.stderr.splitlines() == [
        "titan-lite: warning: a run would stop at the start: checkpoint.initial_load_path "
        '(command line): no such folder: "none"; names on the Hugging Face hub are not fetched: '
        'run hf download none --local-dir DIR, and set checkpoint.initial_load_hf = "DIR"'
    ]


def test_the_configuration_and_the_options_stand_in_any_order() -> None:
    given = [
        "--training.steps=400",
        "run.toml",
        "--quiet",
        "--job.description=b a --x",
        "--world-size=2",
    ]
    assert titan_lite("config", *given).returncode == 0
    given.remove("--quiet")
    stdout = titan_lite("config", *given).stdout
    assert "steps = 400 " in stdout
    assert 'description = "b a --x"' in stdout


def test_quiet_prints_nothing_when_all_is_well() -> None:
    result = titan_lite("config", "run.toml", "--quiet", "--data.subset=en")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_what_cannot_act_is_a_warning_on_stderr() -> None:
    result = titan_lite("config", "run.toml", "--data.subset=en")
    assert result.returncode == 0
    assert result.stderr == (
        "titan-lite: warning: data.subset (command line) has no effect because "
        'data.dataset is "bundled"\n'
    )


def test_mistakes_are_one_block_on_stderr_and_exit_code_2() -> None:
    result = titan_lite("config", "run.toml", "--training.stpes=1", "--training.seq_len=-5")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "titan-lite: 2 problems in the configuration\n"
        '  training.stpes   (command line): unknown key; did you mean "training.steps"?\n'
        "  training.seq_len (command line): expected an integer greater than 0, got -5\n"
    )


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "\n  dryrun     run one step of any rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--world_size", "8"], 'of titan-lite plan; did you mean "--world-size"?'),
        (["plan", "--world_size=8"], 'of titan-lite plan; did you mean "--world-size"?'),
        (["dryrun", "--cluster", "h100"], 'of titan-lite dryrun; did you mean "--job.cluster="?'),
        (["config", "--gpus=8"], "of titan-lite config; its options are --help, --world-size, "),
    ],
)
def test_an_unknown_option_is_named(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([argv[0], "run.toml", *argv[1:]]) == 2
    name = argv[1].partition("=")[0]
    assert f"titan-lite: {name} is not an option {message}" in capsys.readouterr().err


def test_rules_of_the_configuration_and_the_model_stand_in_one_block() -> None:
    result = titan_lite(
        "config", "--quiet", "--world-size=3", "--parallel.dp_replicate=2", "--model.flavor=debgu"
    )
    assert result.returncode == 2
    assert result.stderr.startswith("titan-lite: 2 problems in the configuration\n")
    assert "the world size (3) must be a positive multiple of" in result.stderr
    assert 'did you mean "debug"?' in result.stderr


def test_the_world_size_is_the_option_or_the_launchers_or_what_the_degrees_need() -> None:
    three = ["config", "--quiet", "--parallel.dp_shard=3"]
    assert titan_lite(*three).returncode == 0
    assert titan_lite(*three, WORLD_SIZE="3").returncode == 0
    assert "the world size (4)" in titan_lite(*three, WORLD_SIZE="4").stderr
    assert titan_lite(*three, "--world-size", "3", WORLD_SIZE="4").returncode == 0
    assert (
        "titan-lite: the variable WORLD_SIZE must be an integer, got 'x'"
        in titan_lite(*three, WORLD_SIZE="x").stderr
    )
    assert titan_lite(*three, "--world-size", "x").returncode == 2


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "titan_lite.cli", "config"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_help_and_version_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert titan_lite("--version").stdout == f"titan-lite {__version__}\n"
    assert "check a configuration and print it" in titan_lite("--help").stdout
    assert "--section.key=value" in titan_lite("config", "--help").stdout
    assert "--section.key=value" in titan_lite("train", "--help").stdout
    unknown = titan_lite("trian")
    assert unknown.returncode == 2
    assert "'train'" in unknown.stderr


def test_train_hands_its_arguments_over(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def main(argv: list[str]) -> int:
        given.append(argv)
        return 3

    monkeypatch.setattr("titan_lite.train.main", main)
    assert cli.main(["train", "run.toml", "--job.description=two words"]) == 3
    assert given == [["run.toml", "--job.description=two words"]]


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["config", "run.toml"],
        ["config", "--schema"],
        ["config", "--help"],
        ["config", "missing.toml"],
        ["config", "run.toml", "--training.stpes=1"],
        ["config", "run.toml", "--world-size=7", "--parallel.dp_shard=2"],
        ["config", "run.toml", "--model.flavor=none"],
        ["train", "missing.toml"],
    ],
    ids=" ".join,
)
def test_answers_need_no_import_that_takes_seconds(argv: list[str]) -> None:
    """How long they take: benchmarks/launch.py."""
    program = (
        "import sys; from titan_lite.cli import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit: pass\n"
        f"print(sorted({SLOW_IMPORTS} & sys.modules.keys()), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def schema() -> Any:
    return json.loads(titan_lite("config", "--schema").stdout)


def test_the_schema_documents_every_key_and_forbids_others(schema: Any) -> None:
    assert schema["$schema"].startswith("http://json-schema.org/draft-07")
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"extends", *FIELDS}
    for section, fields in FIELDS.items():
        table = schema["properties"][section]
        assert table["additionalProperties"] is False
        assert set(table["properties"]) == set(fields)
        assert all(field["description"] for field in table["properties"].values())
    assert "$ref" not in json.dumps(schema)
    assert "null" not in json.dumps(schema)


def test_the_schema_and_the_page_of_a_file_have_the_keys_of_its_plugins() -> None:
    Path("rolling.py").write_text(
        "from typing import Literal\n"
        "from titan_lite.config.optimizers import Optimizer, register_optimizer\n"
        "class Rolling(Optimizer):\n"
        '    name: Literal["Rolling"] = "Rolling"\n'
        "    friction: float = 0.9\n"
        '    """Decay of the average."""\n'
        'register_optimizer(Rolling, "nowhere:build")\n'
    )
    Path("run.toml").write_text('[job]\nplugins = ["rolling"]\n')
    result = titan_lite("config", "run.toml", "--schema", PYTHONPATH=".")
    optimizer = json.loads(result.stdout)["properties"]["optimizer"]["properties"]
    assert optimizer["friction"]["default"] == 0.9
    assert (
        "`friction`: a number" in titan_lite("config", "run.toml", "--docs", PYTHONPATH=".").stdout
    )


def test_the_schema_carries_choices_and_bounds(schema: Any) -> None:
    properties = schema["properties"]
    assert properties["optimizer"]["properties"]["name"]["enum"] == ["AdamW", "Adam", "Muon"]
    assert properties["training"]["properties"]["steps"]["exclusiveMinimum"] == 0
    assert properties["model"]["properties"]["dim"]["type"] == "integer"
    reshard = properties["parallel"]["properties"]["reshard_after_forward"]["anyOf"]
    assert [option["type"] for option in reshard] == ["string", "integer"]
