"""A run's tokenizer fits its model, and is the one that the weights were trained with."""

import base64
import json
from pathlib import Path

import pytest

from tests.distributed import Workers
from tests.runs import TINY, train_and_gather
from titan_lite import cli
from titan_lite.checkpoint.manifest import CheckpointManifest, write_manifest
from titan_lite.data.assets import bundled_asset
from titan_lite.data.hf_documents import hf_documents
from titan_lite.data.probes import PROBES
from titan_lite.data.tiktoken_tokenizer import TiktokenTokenizer
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.models.llama import LLAMA

BUNDLED = load_tokenizer()


def write_table(path: Path, ranks: list[bytes]) -> str:
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)]
    path.write_bytes(b"\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer with as many tokens and the same special ones, in another order."""
    assert isinstance(BUNDLED, TiktokenTokenizer)
    ranks = list(BUNDLED.ranks)
    path = tmp_path_factory.mktemp("other") / "tokenizer.model"
    return write_table(path, ranks[:256] + ranks[:255:-1])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled tokenizer as a tokenizer.json, in a folder."""
    assert LLAMA.hf_config is not None
    folder = tmp_path_factory.mktemp("converted")
    documents = hf_documents(LLAMA.flavors["debug"], LLAMA.hf_config, BUNDLED, dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(documents[name]))
    return folder


def preflight(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Returns what a preflight of these settings prints as refused; empty where it passes."""
    code = cli.main(["config", "--quiet", "--preflight", *overrides])
    message = " ".join(capsys.readouterr().err.split())
    assert (code == 2) == bool(message)
    return message


@pytest.mark.parametrize(
    ("vocab_size", "filled"),
    [(2048, ""), (2275, ""), (2276, "90.0%"), (49_152, "4.2%"), (152_064, "1.3%")],
)
def test_a_tokenizer_that_fills_less_than_nine_tenths_of_the_vocabulary_is_refused(
    vocab_size: int, filled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = f"--model.vocab_size={vocab_size}"
    message = preflight(capsys, setting)
    if not filled:
        assert not message
        return
    assert (
        f"the bundled tokenizer has 2,048 tokens, {filled} of the model's vocabulary of "
        f"{vocab_size:,}; at least 90% is required. Set data.tokenizer_path to the model's "
        "tokenizer, or model.vocab_size = 2048, or data.allow_tokenizer_mismatch = true"
    ) in message
    assert not preflight(capsys, setting, "--data.allow_tokenizer_mismatch=true")


# Vocabularies as they were published, and how many tokens their tokenizers have.
PUBLISHED = {
    "GPT-2 in Megatron": (51_200, 50_257),
    "DeepSeek-V2": (102_400, 100_015),
    "T5": (32_128, 32_100),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_padding_of_published_vocabularies_is_accepted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocab_size, num_tokens = PUBLISHED[name]
    ranks = [bytes([value]) for value in range(256)]
    ranks += [b"%d" % number for number in range(1000, 1000 + num_tokens - 512)]
    path = write_table(tmp_path / "tokenizer.model", ranks)
    assert load_tokenizer(path).vocab_size == num_tokens
    settings = (f"--model.vocab_size={vocab_size}", f"--data.tokenizer_path={path}")
    assert not preflight(capsys, *settings)


def checkpoint(folder: Path, tokenizer: str, path: str, content: str = "model") -> Path:
    """A checkpoint as far as a preflight looks at it."""
    folder.mkdir(parents=True)
    manifest = CheckpointManifest(
        step=0,
        content=content,
        world_size=1,
        layout={},
        versions={"torch": "2.13"},
        config={"data": {"tokenizer_path": path}},
        files={},
        tokenizer=tokenizer,
    )
    write_manifest(folder, manifest)
    (folder / "run_state.json").write_text('{"step": 0, "tokens": 0}')
    return folder


def test_weights_that_another_tokenizer_came_with_are_refused(
    other: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = load_tokenizer(other).fingerprint
    source = checkpoint(tmp_path / "a", reference, other)
    start = ("--checkpoint.enable=true", f"--checkpoint.initial_load_path={source}")
    start += (f"--job.dump_folder={tmp_path / 'run'}",)
    message = preflight(capsys, *start)
    assert message.startswith("titan-lite: 1 problem in the configuration data.tokenizer_path")
    assert (
        f"the bundled tokenizer gives other ids than the tokenizer of {source} "
        f"(fingerprint {BUNDLED.fingerprint}, not {reference}): set data.tokenizer_path = "
        f'"{other}", or set data.allow_tokenizer_mismatch = true to train with the bundled '
        "tokenizer"
    ) in message
    assert not preflight(capsys, *start, "--data.allow_tokenizer_mismatch=true")
    assert not preflight(capsys, *start, f"--data.tokenizer_path={other}")
    # The same tokenizer in another format, and a checkpoint of an earlier version.
    same = checkpoint(tmp_path / "b", BUNDLED.fingerprint, "")
    start = (*start[:1], f"--checkpoint.initial_load_path={same}", start[2])
    assert not preflight(capsys, *start, f"--data.tokenizer_path={converted}")
    assert "(fingerprint " in preflight(capsys, *start, f"--data.tokenizer_path={other}")
    unknown = checkpoint(tmp_path / "c", "", "")
    assert not preflight(capsys, *start, f"--checkpoint.initial_load_path={unknown}")


@pytest.mark.parametrize("key", ["resumed", "initial"])
def test_a_run_that_resumes_cannot_change_its_tokenizer(
    key: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "checkpoint" / "step-0"
    source = own if key == "resumed" else tmp_path / "a"
    checkpoint(source, BUNDLED.fingerprint, "", content="run")
    start = ["--checkpoint.enable=true", f"--job.dump_folder={tmp_path}"]
    if key == "initial":
        start += [f"--checkpoint.initial_load_path={source}"]
        start += ["--checkpoint.initial_load_model_only=false"]
    assert not preflight(capsys, *start)
    changed = (f"--data.tokenizer_path={other}", "--data.allow_tokenizer_mismatch=true")
    message = preflight(capsys, *start, *changed)
    assert f"{other} gives other ids than the tokenizer of {source}" in message
    assert 'data.tokenizer_path = ""; a run that resumes cannot change its tokenizer' in message


def test_the_tokenizer_of_a_hugging_face_model_is_compared(
    other: str,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The folders have tokenizers but no weights, which check_model_and_device would read.
    monkeypatch.setattr("titan_lite.training.meta_model.check_model_and_device", lambda *_: None)
    start = f"--checkpoint.initial_load_hf={converted}"
    assert not preflight(capsys, start)
    assert not preflight(capsys, start, f"--data.tokenizer_path={converted}")
    message = preflight(capsys, start, f"--data.tokenizer_path={other}")
    assert (
        f"{other} gives other ids than the tokenizer of {converted} (fingerprint BOS 1792,"
        in message
    )
    assert f'set data.tokenizer_path = "{converted}"' in message
    mismatch = "--data.allow_tokenizer_mismatch=true"
    assert not preflight(capsys, start, f"--data.tokenizer_path={other}", mismatch)
    # One of several files in the folder is enough, one that cannot be read is named.
    (tmp_path / "tokenizer.json").write_text("{}")
    start = f"--checkpoint.initial_load_hf={tmp_path}"
    assert not preflight(capsys, start)
    assert f"data.tokenizer_path is not compared with {tmp_path}/tokenizer.json" in caplog.text
    (tmp_path / "tokenizer.model").write_bytes(Path(other).read_bytes())
    assert "gives other ids" in preflight(capsys, start)
    assert not preflight(capsys, start, f"--data.tokenizer_path={other}")


def test_a_fingerprint_knows_ids_and_special_tokens_alone(other: str, converted: Path) -> None:
    assert len(set(PROBES)) > 300
    same = load_tokenizer(converted)
    assert same.fingerprint == BUNDLED.fingerprint
    prints = {BUNDLED.fingerprint, load_tokenizer(other).fingerprint}
    document = json.loads((converted / "tokenizer.json").read_text())
    # More tokens at the end change nothing, a normalizer or another BOS does.
    extended = document["added_tokens"][0] | {"id": 2048, "content": "<|new|>"}
    for changes, named in (
        ({"added_tokens": [*document["added_tokens"], extended]}, None),
        ({"normalizer": {"type": "Lowercase"}}, None),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "\t"}, "content": " "}}, None),
        ({}, "<|end_of_text|>"),
    ):
        folder = converted / str(len(prints))
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(document | changes))
        if named:
            (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": named}))
        prints.add(load_tokenizer(folder).fingerprint)
    assert len(prints) == 5


def test_tokens_that_no_probe_has_are_in_a_fingerprint(tmp_path: Path) -> None:
    lines = bundled_asset("tokenizer/tokenizer.model").read_bytes().splitlines()
    (a, _), (b, _) = lines[-2].split(), lines[-1].split()
    lines[-2:] = [b"%b %d" % (b, len(lines) - 2), b"%b %d" % (a, len(lines) - 1)]
    (tmp_path / "other.model").write_bytes(b"\n".join(lines))
    other = load_tokenizer(tmp_path / "other.model")
    assert other.vocab_size == BUNDLED.vocab_size
    ids = [[t.tolist() for t in each.encode_documents(PROBES)] for each in (other, BUNDLED)]
    assert ids[0] == ids[1]
    assert other.fingerprint != BUNDLED.fingerprint


def test_another_file_with_the_same_ids_resumes_a_run_and_reads_its_tokens(
    one_process: Workers, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = f"--data.dataset_path={tmp_path}/tokens"
    assert cli.main(["tokenize", f"--output={tmp_path}/tokens", "--processes=1"]) == 0
    capsys.readouterr()  # Drops the progress bar.
    other = f"--data.tokenizer_path={converted}"
    for name, source in (("text", ()), ("tokens", (tokens,))):
        settings = (*TINY, *source, "--checkpoint.enable=true", "--checkpoint.interval=1")
        one_process.run(train_and_gather, tmp_path / name, *settings, "--training.steps=1")
        longer = (*settings, "--training.steps=2", other)
        assert not preflight(capsys, f"--job.dump_folder={tmp_path / name}", *longer)
        one_process.run(train_and_gather, tmp_path / name, *longer)
        assert (tmp_path / name / "checkpoint/step-2").is_dir()
