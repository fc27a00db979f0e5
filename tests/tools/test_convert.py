"""`titan-lite convert`, there and back, and what it refuses."""

import json
import os
import pickle
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runs import full_disk
from titan_lite import cli
from titan_lite.checkpoint.manifest import read_manifest, write_manifest, write_text
from titan_lite.config.load import load_config
from titan_lite.data.hf_documents import hf_documents
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.models import registry
from titan_lite.models.args import DecoderArgs, RopeScaling
from titan_lite.models.hf_config import hf_config_from_args
from titan_lite.models.llama import LLAMA
from titan_lite.models.registry import resolve

transformers = pytest.importorskip("transformers")

ARGS = DecoderArgs(
    dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=48,
    vocab_size=2048,
    max_seq_len=64,
    rope_theta=5e5,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    ),
)


def save_theirs(folder: Path, args: DecoderArgs = ARGS) -> Any:
    """A model as transformers writes it, in several files."""
    assert LLAMA.hf_config is not None
    described = hf_config_from_args(args, LLAMA.hf_config, dtype="bfloat16")
    config = transformers.LlamaConfig(**described)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("tied_head", [False, True])
def test_there_and_back_every_bit_is_the_same(
    tied_head: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = replace(ARGS, tied_head=tied_head)
    reference = save_theirs(tmp_path / "huggingface", args)
    assert len(list((tmp_path / "huggingface").glob("*.safetensors"))) > 1
    assert cli.main(["convert", "hf-to-dcp", f"{tmp_path}/huggingface", f"{tmp_path}/dcp"]) == 0
    printed = capsys.readouterr().out
    count = sum(parameter.numel() for parameter in reference.parameters())
    assert f"LlamaForCausalLM, {count:,} parameters in bfloat16" in printed
    # It prints a configuration that runs this model.
    (tmp_path / "run.toml").write_text(printed[printed.index("[model]") :])
    assert resolve(load_config(tmp_path / "run.toml").config.model) == (LLAMA, args)

    back = ["convert", "dcp-to-hf", f"{tmp_path}/dcp", f"{tmp_path}/own"]
    assert cli.main([*back, "--max-shard-size=100KB"]) == 0
    assert "No tokenizer files were exported; pass --tokenizer to" in capsys.readouterr().out
    local, expected = tensors(tmp_path / "own"), tensors(tmp_path / "huggingface")
    assert local.keys() == expected.keys()
    for name, tensor in expected.items():
        assert local[name].dtype == torch.bfloat16
        assert torch.equal(local[name], tensor), name
    index = json.loads((tmp_path / "own" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2 * count}
    assert index["weight_map"].keys() == expected.keys()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert again.dtype == torch.bfloat16
    assert again.config.tie_word_embeddings is tied_head


def save_tokenizer(folder: Path) -> None:
    """The bundled tokenizer next to a model, as a tokenizer.json and what transformers adds."""
    assert LLAMA.hf_config is not None
    documents = hf_documents(ARGS, LLAMA.hf_config, load_tokenizer(), dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(documents[name]))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def test_a_converted_checkpoint_keeps_the_tokenizer_and_the_recipe_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_theirs(tmp_path / "huggingface")
    save_tokenizer(tmp_path / "huggingface")
    target = tmp_path / "dcp"
    assert cli.main(["convert", "hf-to-dcp", f"{tmp_path}/huggingface", str(target)]) == 0
    printed = capsys.readouterr().out
    assert f'[data]\ntokenizer_path = "{target}/tokenizer"\n' in printed
    # The recipe runs, and with another tokenizer it does not.
    recipe = tmp_path / "run.toml"
    recipe.write_text(printed[printed.index("[model]") :])
    preflight = ["config", str(recipe), "--quiet", "--preflight"]
    preflight += [f"--job.dump_folder={tmp_path}/run", "--training.seq_len=64"]
    assert cli.main(preflight) == 0
    changed = json.loads((target / "tokenizer" / "tokenizer.json").read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert cli.main([*preflight, f"--data.tokenizer_path={tmp_path}"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"gives other ids than the tokenizer of {target}" in message
    assert f'set data.tokenizer_path = "{target}/tokenizer"' in message
    assert cli.main(["checkpoint", "verify", str(target)]) == 0

    # A checkpoint is moved with its tokenizer.
    target = target.rename(tmp_path / "moved")
    assert cli.main(["convert", "dcp-to-hf", str(target), f"{tmp_path}/own"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        local, reference = (tmp_path / folder / name for folder in ("own", "huggingface"))
        assert local.read_bytes() == reference.read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    assert tokenizer("whale").input_ids == load_tokenizer().encode("whale", bos=True, eos=False)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["bos_token_id"] == 1792
    capsys.readouterr()
    back = ["convert", "dcp-to-hf", str(target)]
    other = [*back, f"{tmp_path}/other", f"--tokenizer={tmp_path}"]
    assert cli.main(other) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path} gives other ids than the tokenizer of {target}" in message
    assert message.endswith(
        "To export it with a README.md that describes the difference, pass --allow-mismatch\n"
    )
    assert not (tmp_path / "other").exists()
    assert cli.main([*other, "--allow-mismatch"]) == 0
    for text in (capsys.readouterr().err, (tmp_path / "other/README.md").read_text()):
        assert f"{tmp_path} gives other ids than the tokenizer of {target}" in text
        assert f"The exported tokenizer gives the same ids as {tmp_path} for " in text

    # A run's checkpoint does not keep it, and its tokenizer may have changed.
    manifest = read_manifest(target)
    files = {name: file for name, file in manifest.files.items() if "/" not in name}
    config = {**manifest.config, "data": {"tokenizer_path": str(tmp_path)}}
    shutil.rmtree(target / "tokenizer")
    write_manifest(target, replace(manifest, files=files, config=config))
    assert cli.main([*back, f"{tmp_path}/refused"]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path} gives other ids than the tokenizer of {target}" in message
    assert message.endswith("pass the tokenizer of the training with --tokenizer\n")
    (tmp_path / "tokenizer.json").unlink()
    assert cli.main([*back, f"{tmp_path}/refused"]) == 2
    message = capsys.readouterr().err
    assert f"the folder {tmp_path} has neither tokenizer.json nor tokenizer.model: " in message
    assert message.endswith("name the run's tokenizer with --tokenizer\n")


def test_a_model_without_a_tokenizer_that_can_be_read_is_said_so(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "huggingface"
    shutil.copytree(saved / "huggingface", folder)
    (folder / "merges.txt").write_text("a b")
    assert cli.main(["convert", "hf-to-dcp", str(folder), f"{tmp_path}/dcp"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"{folder} has neither tokenizer.json nor tokenizer.model: set data.tokenizer_path to the "
        "model's tokenizer; save_pretrained of transformers' AutoTokenizer writes it\n"
    ) in printed
    assert "[data]" not in printed
    assert (tmp_path / "dcp" / "tokenizer" / "merges.txt").read_text() == "a b"
    (folder / "tokenizer.json").write_text("{}")
    assert cli.main(["convert", "hf-to-dcp", str(folder), f"{tmp_path}/unread"]) == 0
    assert "titan-lite convert: warning: data.tokenizer_path: " in capsys.readouterr().err
    assert read_manifest(tmp_path / "unread").tokenizer == ""
    assert cli.main(["convert", "dcp-to-hf", f"{tmp_path}/unread", f"{tmp_path}/own"]) == 0
    assert (tmp_path / "own" / "tokenizer.json").read_text() == "{}"


NAMES = (
    "internlm",
    "qwen2.5",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_neox",
    "gpt",
    "bert",
    "megatron_bert",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_goes_there_and_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = registry.families()[name]
    small = {"dim": 32, "num_layers": 2, "ffn_dim": 48, "vocab_size": 160, "max_seq_len": 64}
    args = replace(family.flavors["debug"], **small)
    assert family.hf_config is not None
    architecture: Any = getattr(transformers, family.hf_config.architecture)
    described = hf_config_from_args(args, family.hf_config, dtype="float32")
    torch.manual_seed(0)
    architecture(architecture.config_class(**described)).save_pretrained(tmp_path / "huggingface")
    assert cli.main(["convert", "hf-to-dcp", f"{tmp_path}/huggingface", f"{tmp_path}/dcp"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "run.toml").write_text(printed[printed.index("[model]") :])
    assert resolve(load_config(tmp_path / "run.toml").config.model) == (family, args)
    assert cli.main(["convert", "dcp-to-hf", f"{tmp_path}/dcp", f"{tmp_path}/own"]) == 0
    local, expected = tensors(tmp_path / "own"), tensors(tmp_path / "huggingface")
    assert local.keys() == expected.keys()
    assert all(torch.equal(local[key], tensor) for key, tensor in expected.items())
    is_causal = family.objective == "causal_lm"
    auto = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForPreTraining
    again = auto.from_pretrained(tmp_path / "own")
    assert type(again) is architecture


def test_the_bias_of_a_choice_stays_in_float32(tmp_path: Path) -> None:
    family = registry.families()["deepseek_v3"]
    small = {"dim": 32, "num_layers": 2, "ffn_dim": 48, "vocab_size": 160}
    args, hf_config = replace(family.flavors["debug"], **small), family.hf_config
    assert hf_config is not None
    described = hf_config_from_args(args, hf_config, dtype="float32")
    hf_model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**described))
    for name, buffer in hf_model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer += 1e-3 * torch.rand(len(buffer)) + 1
    hf_model.save_pretrained(tmp_path / "huggingface")
    assert cli.main(["convert", "hf-to-dcp", f"{tmp_path}/huggingface", f"{tmp_path}/dcp"]) == 0
    back = ["convert", "dcp-to-hf", f"{tmp_path}/dcp", f"{tmp_path}/ours", "--dtype=bfloat16"]
    assert cli.main(back) == 0
    expected = tensors(tmp_path / "huggingface")
    for name, tensor in tensors(tmp_path / "ours").items():
        kept = name.endswith("e_score_correction_bias")
        assert torch.equal(tensor, expected[name].to(torch.float32 if kept else torch.bfloat16))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16)


def test_files_as_google_wrote_them_are_read(tmp_path: Path) -> None:
    given = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8}
    config = transformers.BertConfig(**given, intermediate_size=48, vocab_size=160)
    reference = transformers.BertForPreTraining(config)
    reference.save_pretrained(tmp_path / "huggingface")
    # A class without both heads, TensorFlow's names, a second bias, a buffer.
    described = json.loads((tmp_path / "huggingface" / "config.json").read_text())
    described["architectures"] = ["BertForMaskedLM"]
    (tmp_path / "huggingface" / "config.json").write_text(json.dumps(described))
    stored = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors(tmp_path / "huggingface").items()
    }
    assert any(name.endswith("gamma") for name in stored)
    stored["cls.predictions.decoder.bias"] = stored["cls.predictions.bias"].clone()
    stored["bert.embeddings.position_ids"] = torch.arange(512)
    save_file(stored, tmp_path / "huggingface" / "model.safetensors")
    assert cli.main(["convert", "hf-to-dcp", f"{tmp_path}/huggingface", f"{tmp_path}/dcp"]) == 0
    assert cli.main(["convert", "dcp-to-hf", f"{tmp_path}/dcp", f"{tmp_path}/own"]) == 0
    local = tensors(tmp_path / "own")
    expected = {n: p for n, p in reference.named_parameters() if n in local}
    assert len(local) == len(stored) - 2
    assert all(torch.equal(local[name], tensor) for name, tensor in expected.items())
    assert expected.keys() == local.keys()


def test_another_dtype_and_a_tokenizer_can_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_theirs(tmp_path / "huggingface")
    cli.main(["convert", "hf-to-dcp", f"{tmp_path}/huggingface", f"{tmp_path}/dcp"])
    back = ["convert", "dcp-to-hf", f"{tmp_path}/dcp", f"{tmp_path}/own"]
    assert cli.main([*back, "--dtype=float32", "--tokenizer="]) == 0
    assert (
        "exported tokenizer gives the same ids as the bundled tokenizer for "
        in capsys.readouterr().out
    )
    assert [path.name for path in tmp_path.glob("own/*.safetensors")] == ["model.safetensors"]
    # The permissions of the one are those of the other.
    modes = {path.stat().st_mode for path in (tmp_path / "own").iterdir()}
    assert len(modes) == 1
    expected = tensors(tmp_path / "huggingface")
    for name, tensor in tensors(tmp_path / "own").items():
        assert torch.equal(tensor, expected[name].float())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert model.dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    assert model.config.bos_token_id == tokenizer.bos_token_id == 1792


class LivePeak(TorchDispatchMode):
    """The most bytes that tensors have held at once, as far as operations show them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            storage = result.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.live.values()))
        return result


def test_a_conversion_holds_one_tensor_or_one_file_at_a_time(tmp_path: Path) -> None:
    save_theirs(tmp_path / "huggingface", replace(ARGS, num_layers=16))
    sizes = [tensor.nbytes for tensor in tensors(tmp_path / "huggingface").values()]
    with LivePeak() as to_dcp:
        cli.main(["convert", "hf-to-dcp", f"{tmp_path}/huggingface", f"{tmp_path}/dcp"])
    assert max(sizes) <= to_dcp.peak < 3 * max(sizes)
    back = ["convert", "dcp-to-hf", f"{tmp_path}/dcp", f"{tmp_path}/own", "--max-shard-size=50KB"]
    with LivePeak() as to_hf:
        cli.main(back)
    assert max(sizes) <= to_hf.peak < 3 * max(sizes)
    assert sum(sizes) > 3.5 * max(sizes)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Puts all tensors into one file, with changes; None leaves one out."""
    changed = tensors(folder) | {name.replace("__", "."): t for name, t in changes.items()}
    for path in folder.glob("model*"):
        path.unlink()
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def edit_index(folder: Path, name: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def cut_short(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model as transformers writes it, "huggingface", and its checkpoint, "dcp"."""
    folder = tmp_path_factory.mktemp("saved")
    save_theirs(folder / "huggingface")
    assert cli.main(["convert", "hf-to-dcp", f"{folder}/huggingface", f"{folder}/dcp"]) == 0
    return folder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            only_pickles,
            "contains pytorch_model.bin, which can run code when it is opened; only safet",
        ),
        (lambda f: [p.unlink() for p in f.glob("model*")], "must contain model.safetensors or "),
        (lambda f: (f / "config.json").unlink(), "has no config.json: not the folder of a Hugging"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON: Expecting"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (shutil.rmtree, "huggingface does not exist"),
        (cut_short, ".safetensors is damaged, or not a safetensors file: "),
        (lambda f: edit_index(f, "gone.safetensors"), "names gone.safetensors, which does not exi"),
        (
            lambda f: edit_index(f, "../x.safetensors"),
            "'../x.safetensors' is not a file of the same",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            "model.safetensors.index.json: no weight_map that names files",
        ),
        (lambda f: edit_config(f, architectures=["Gemma"]), "no model family supports architect"),
        (lambda f: edit_config(f, mlp_bias=True), "config.json: mlp_bias = True is not"),
        (
            lambda f: edit_config(f, rope_parameters={**rope_of(f), "factor": 32.0}),
            "config.json has rope_scaling = RopeScaling(factor=32.0",
        ),
        (
            lambda f: edit_tensors(f, lm_head__weight=None, model__norm__weight=None),
            "huggingface lacks model.norm.weight, lm_head.weight",
        ),
        (
            lambda f: edit_tensors(f, **{f"extra{n}": torch.ones(2) for n in range(6)}),
            "huggingface has tensors that this model does not have: extra0, extra1, extra2, "
            "extra3 and 2 more",
        ),
        (
            lambda f: edit_tensors(f, model__norm__weight=torch.ones(33)),
            "huggingface has other shapes: model.norm.weight (33,), not (32,)",
        ),
        (
            lambda f: edit_tensors(f, model__norm__weight=torch.ones(32, dtype=torch.int8)),
            "huggingface has dtypes other than float32, bfloat16, float16: model.norm.weight I8",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_is_no_model_of_ours_is_refused_in_one_sentence(
    spoil: Any, message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "huggingface"
    shutil.copytree(saved / "huggingface", folder)
    spoil(folder)
    assert cli.main(["convert", "hf-to-dcp", str(folder), f"{tmp_path}/dcp"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("titan-lite convert: ")
    assert printed.count("\n") == 1
    assert not list(tmp_path.glob("dcp*"))


def rope_of(folder: Path) -> dict[str, Any]:
    rope: dict[str, Any] = json.loads((folder / "config.json").read_text())["rope_parameters"]
    return rope


def test_what_files_may_hold_beside_the_weights_is_passed_over(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "huggingface"
    shutil.copytree(saved / "huggingface", folder)
    inv_freq = {f"model__layers__{n}__self_attn__rotary_emb__inv_freq": torch.ones(4) for n in "01"}
    # A tied model's head is its embedding, whatever is in the file.
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, **inv_freq)
    assert cli.main(["convert", "hf-to-dcp", str(folder), f"{tmp_path}/dcp"]) == 0


def edit_model(folder: Path, **changes: Any) -> None:
    manifest = read_manifest(folder)
    model = manifest.config["model"] | changes if changes else None
    write_manifest(folder, replace(manifest, config={"model": model}, model={}))


def made_with_plugins(folder: Path) -> None:
    """Registers a family as a plugin would."""
    manifest = read_manifest(folder)
    config = {"job": {"plugins": ["mine"]}, "model": {"name": "my_family"}}
    write_manifest(folder, replace(manifest, config=config))


def edit_facts(folder: Path) -> None:
    """Changes the flavor, as a newer version might."""
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, model=manifest.model | {"norm_eps": 0.5}))


def spoil_metadata(folder: Path) -> None:
    """Metadata that would have a command run."""
    manifest = read_manifest(folder)
    spoilt = write_text(folder / ".metadata", pickle.dumps(os.system, protocol=0).decode())
    write_manifest(folder, replace(manifest, files=manifest.files | {".metadata": spoilt}))


def flip_bit(folder: Path) -> None:
    path = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (flip_bit, [], ".distcp is damaged: its checksum is "),
        (
            lambda f: (f / "manifest.json").unlink(),
            [],
            "has no manifest.json: it is not a complete",
        ),
        (edit_model, [], "dcp does not name a known model: "),
        (edit_facts, [], "has changed since the checkpoint was saved: norm_eps is 1e-05, not 0.5"),
        (spoil_metadata, [], "refusing to unpickle posix.system"),
        (lambda f: edit_model(f, name="lama"), [], 'unknown family "lama"; did you mean "llama"?'),
        (lambda f: edit_model(f, num_layers=3), [], "has no weight layers.2.attention_norm.weig"),
        (lambda f: edit_model(f, ffn_dim=49), [], "w1.weight is (48, 32) in "),
        (made_with_plugins, [], 'its run had job.plugins = ["mine"]: name them with --plugin'),
        (lambda f: None, ["--plugin=mine"], "No module named 'mine'; install its package"),
        (
            lambda f: None,
            ["--tokenizer=meta-llama/Llama-3.1-8B"],
            "8B does not exist; names on the Hugging Face hub are not fetched: run "
            "hf download meta-llama/Llama-3.1-8B --local-dir DIR, and name DIR as --tokenizer",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_converted_is_refused(
    spoil: Any,
    options: list[str],
    message: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "dcp"
    shutil.copytree(saved / "dcp", folder)
    spoil(folder)
    assert cli.main(["convert", "dcp-to-hf", str(folder), f"{tmp_path}/own", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("own*"))


def test_a_checkpoint_that_is_missing_is_not_sought_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", "dcp-to-hf", "nope", f"{tmp_path}/own"]) == 2
    message = (
        "nope does not exist; name a checkpoint of a run, such as outputs/checkpoint/step-1000"
    )
    assert message in capsys.readouterr().err


def test_a_family_without_a_form_in_transformers_is_refused(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry._FAMILIES, "data", {"llama": replace(LLAMA, hf_config=None)})
    assert cli.main(["convert", "dcp-to-hf", f"{saved}/dcp", f"{tmp_path}/own"]) == 2
    message = 'family "llama" cannot be converted to or from transformers, because it defines no'
    assert message in capsys.readouterr().err


def test_a_form_that_the_class_has_not_is_refused(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flavors = {name: replace(args, parallel_residual=True) for name, args in LLAMA.flavors.items()}
    monkeypatch.setattr(registry._FAMILIES, "data", {"llama": replace(LLAMA, flavors=flavors)})
    folder = tmp_path / "dcp"
    shutil.copytree(saved / "dcp", folder)
    manifest = read_manifest(folder)
    # As a checkpoint of such a model, not of the flavor before it changed.
    write_manifest(folder, replace(manifest, model=manifest.model | {"parallel_residual": True}))
    assert cli.main(["convert", "dcp-to-hf", str(folder), f"{tmp_path}/own"]) == 2
    message = "LlamaForCausalLM does not support parallel_residual True (only False)"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "problem", "meant"),
    [
        (
            "dcp-to-hf run hf --dtype=bfloat16",
            "run is not a checkpoint, but holds some; the newest",
            "dcp-to-hf run/checkpoint/step-12 hf --dtype=bfloat16",
        ),
        (
            "dcp-to-hf run/checkpoint/ hf",
            "run/checkpoint is not a checkpoint, but holds some",
            "dcp-to-hf run/checkpoint/step-12 hf",
        ),
        (
            "dcp-to-hf hf run/checkpoint/step-12",
            "hf does not exist, and run/checkpoint/step-12 does",
            "dcp-to-hf run/checkpoint/step-12 hf",
        ),
        (
            "hf-to-dcp dcp huggingface/",
            "dcp does not exist, and huggingface does: the source comes first",
            "hf-to-dcp huggingface/ dcp",
        ),
        (
            "dcp-to-hf huggingface dcp",
            "huggingface is a model of Hugging Face already",
            "hf-to-dcp huggingface dcp",
        ),
        (
            "hf-to-dcp run hf",
            "run is a checkpoint or holds some; the other direction",
            "dcp-to-hf run/checkpoint/step-12 hf",
        ),
    ],
)
def test_the_command_that_was_meant_is_printed(
    given: str,
    problem: str,
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (4, 12):
        folder = Path(f"run/checkpoint/step-{step}")
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    Path("huggingface").mkdir()
    Path("huggingface/config.json").write_text("{}")
    assert cli.main(["convert", *given.split()]) == 2
    message = capsys.readouterr().err
    assert problem in message
    assert message.endswith(f": titan-lite convert {meant}\n")


def test_nothing_is_written_over(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "hf-to-dcp", f"{saved}/huggingface", f"{saved}/dcp"]) == 2
    assert "dcp exists already; name a folder that does not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("direction", "source", "file"),
    [("hf-to-dcp", "huggingface", ""), ("dcp-to-hf", "dcp", ": '{}.incomplete/model.safetensors'")],
)
def test_a_full_disk_is_one_sentence(
    direction: str,
    source: str,
    file: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with full_disk(10_000):
        assert cli.main(["convert", direction, f"{saved}/{source}", f"{tmp_path}/new"]) == 2
    reason = f"[Errno 27] File too large{file.format(tmp_path / 'new')}"
    assert capsys.readouterr().err == f"titan-lite convert: {reason}\n"


@pytest.mark.parametrize("size", ["5 apples", "0GB", "-1"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["convert", "dcp-to-hf", "a", "b", f"--max-shard-size={size}"])
    assert exit.value.code == 2
    assert f'expected a size as "5GB" or "200MB", got \'{size}\'' in capsys.readouterr().err
