"""Logits and gradients against Hugging Face transformers on the same random weights."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titan_lite.checkpoint.hf_layout import HFModel
from titan_lite.models.args import DecoderArgs, MoEArgs, RopeScaling
from titan_lite.models.deepseek import DEEPSEEK_V3
from titan_lite.models.family import Family
from titan_lite.models.gpt import GPT, GPT_NEOX
from titan_lite.models.hf_config import hf_config_from_args, hf_differences
from titan_lite.models.internlm import INTERNLM
from titan_lite.models.llama import LLAMA
from titan_lite.models.moe import MIXTRAL, QWEN3_MOE
from titan_lite.models.qwen import QWEN2_5, QWEN3
from titan_lite.models.registry import families
from titan_lite.nn.build_model import build_model
from titan_lite.nn.decoder import Decoder

transformers = pytest.importorskip("transformers")

# Small; the keys that make the family keep their form.
SMALL = {
    "dim": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "ffn_dim": 96,
    "vocab_size": 160,
    "max_seq_len": 128,
}
# A short original length, so that kept, blended and stretched frequencies all occur.
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=48
)


@dataclass(frozen=True)
class Case:
    """A family's debug flavor made smaller, with other choices."""

    family: Family
    choices: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> DecoderArgs:
        return replace(self.family.flavors["debug"], **SMALL | self.choices)


CASES = {
    "mha": Case(LLAMA),
    "gqa": Case(LLAMA, {"num_kv_heads": 2}),
    "tied head": Case(LLAMA, {"tied_head": True}),
    "one kv head": Case(LLAMA, {"num_kv_heads": 1}),
    "theta and eps": Case(LLAMA, {"rope_theta": 500_000.0, "norm_eps": 1e-3}),
    "scaled rope": Case(
        LLAMA, {"num_kv_heads": 2, "rope_theta": 500_000.0, "rope_scaling": SCALING}
    ),
    "internlm": Case(INTERNLM),
    "qwen2.5": Case(QWEN2_5, {"num_kv_heads": 2}),
    "qwen3": Case(QWEN3, {"num_kv_heads": 2, "head_dim": 32}),
    "gpt_neox": Case(GPT_NEOX, {"rotary_fraction": 0.5}),
    "gpt_neox, one after the other": Case(GPT_NEOX, {"parallel_residual": False}),
    "gpt_neox, as the 20b": Case(GPT_NEOX, {"ffn": "gelu_tanh"}),
    "gpt": Case(GPT),
    "qwen3_moe": Case(QWEN3_MOE, {"num_kv_heads": 2, "head_dim": 32}),
    "qwen3_moe, weights as they are": Case(QWEN3_MOE, {"route_norm": False, "top_k": 3}),
    "mixtral": Case(MIXTRAL, {"num_kv_heads": 2}),
    "qwen3_moe, one expert": Case(QWEN3_MOE, {"route_norm": False, "top_k": 1}),
    "deepseek_v3": Case(DEEPSEEK_V3),
    "deepseek_v3, as Moonlight": Case(
        DEEPSEEK_V3,
        {"q_rank": None, "groups": 1, "kept_groups": 1, "shared_experts": 2, "norm_eps": 1e-3},
    ),
    "deepseek_v3, weights as they are": Case(
        DEEPSEEK_V3, {"route_norm": False, "v_dim": 16, "kept_groups": 3, "top_k": 5}
    ),
}


def in_files(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """By the names that files have.

    transformers 5 renames GPT-NeoX's head and Mixtral's router as it reads them, and makes one
    tensor of all experts of a block.
    """
    renamed = {"lm_head.weight": "embed_out.weight"} if family is GPT_NEOX else {}
    return {
        renamed.get(stored, stored): tensor
        for name, whole in tensors.items()
        for stored, tensor in _of_each_expert(name, whole, family)
    }


def _of_each_expert(name: str, tensor: Tensor, family: Family) -> Iterator[tuple[str, Tensor]]:
    pattern = r"model\.layers\.(\d+)\.mlp\.(gate\.weight|experts\.\w+)"
    match = re.fullmatch(pattern, name)
    if match is None:
        yield name, tensor
        return
    layer, kind = match.groups()

    def stored(name: str, expert: int = 0) -> str:
        pattern = family.hf_key_map[f"layers.*.feed_forward.{name}"]
        return pattern.replace("*", layer, 1).replace("*", str(expert))

    if kind == "gate.weight":
        yield stored("router.weight"), tensor
        return
    for expert, whole in enumerate(tensor):
        if kind == "experts.down_proj":
            yield stored("experts.w2", expert), whole
        else:
            gate, up = whole.chunk(2)
            yield stored("experts.w1", expert), gate
            yield stored("experts.w3", expert), up


def build_hf_model(args: DecoderArgs, family: Family) -> nn.Module:
    """Returns transformers' model of the config.json that we write."""
    assert family.hf_config is not None
    config = hf_config_from_args(args, family.hf_config, dtype="float32")
    architecture: Any = getattr(transformers, family.hf_config.architecture)
    model: nn.Module = architecture(
        architecture.config_class(**config, attn_implementation="eager")
    )
    # GPT-2's default is dropout, which our model does not have.
    return model.eval()


def saved(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model that are saved, those with two names once."""
    names = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    return {**dict(model.named_parameters()), **buffers}


def joined(hf: HFModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights as Hugging Face's tensors."""
    return {
        name: tensor.join([state[part] for part in tensor.parts])
        for name, tensor in hf.tensors.items()
    }


def taken(
    hf: HFModel, stored: Mapping[str, Tensor], parts: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors' names and values, out of Hugging Face's."""
    for part, tensor in parts.items():
        yield part, hf.read(part, stored.__getitem__, (0,) * tensor.ndim, tensor.shape)


def give_weights(hf: HFModel, model: nn.Module, hf_weights: Mapping[str, Tensor]) -> None:
    """Copies our weights to parameters by their names in files."""
    weights = joined(hf, model.state_dict())
    assert weights.keys() == hf_weights.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            hf_weights[name].copy_(weight)


def assert_same_gradients(hf: HFModel, model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """expected: gradients by their names in files."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    references = dict(taken(hf, expected, gradients))
    assert references.keys() == dict(model.named_parameters()).keys()
    # Softmax does not see what is added to all keys: the gradient of such a bias is rounding.
    scale = max(reference.abs().max() for reference in references.values())
    for name, gradient in gradients.items():
        largest = scale if name.endswith("wk.bias") else references[name].abs().max()
        error = (gradient - references[name]).abs().max() / largest
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient_equal_hugging_face(name: str) -> None:
    case = CASES[name]
    args = case.args
    torch.manual_seed(0)
    model = Decoder(args)
    # Larger than at init, so that attention is far from uniform and norms and biases matter.
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if name.endswith("bias") else 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    hf = HFModel.of(case.family, args)
    hf_model = build_hf_model(args, case.family)
    give_weights(hf, model, in_files(saved(hf_model), case.family))
    tokens = torch.randint(args.vocab_size, (2, 100))
    cotangent = torch.randn(2, 100, args.vocab_size)

    logits = model(tokens)
    expected = hf_model(input_ids=tokens).logits
    (logits * cotangent).mean().backward()
    (expected * cotangent).mean().backward()

    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    gradients = {name: p.grad for name, p in hf_model.named_parameters() if p.grad is not None}
    hf_gradients = in_files(gradients, case.family)
    assert hf_gradients.keys() == {n for n, t in hf.tensors.items() if not t.is_buffer}
    assert_same_gradients(hf, model, hf_gradients)


def test_the_scaled_case_keeps_blends_and_stretches_frequencies() -> None:
    args = CASES["scaled rope"].args
    plain = args.rope_theta ** -(torch.arange(0, 16, 2) / 16)
    # The angle at position 1 is the frequency itself, below pi for all.
    rope = Decoder(args).rope
    # The second half of the table, whose sines are not negated.
    ratio = plain / torch.atan2(rope.sin_SR[1, 8:], rope.cos_SR[1, 8:])
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(8.0, rel=1e-4)
    assert ((ratio > 1.01) & (ratio < 7.99)).any()


FLAVORS = [
    pytest.param(family, args, id=f"{family.name}-{flavor}")
    for family in families().values()
    if family.hf_config is not None
    for flavor, args in family.flavors.items()
]


@pytest.mark.parametrize(("family", "args"), FLAVORS)
def test_shapes_of_every_flavor_are_those_of_hugging_face(
    family: Family, args: DecoderArgs
) -> None:
    # Two stand for all: dense first blocks are alike, and so are all others.
    first = {"dense_layers": 1} if isinstance(args, MoEArgs) and args.dense_layers else {}
    args = replace(args, num_layers=2, **first)
    with torch.device("meta"):
        model = build_hf_model(args, family)
    expected = in_files(saved(model), family)
    tensors = HFModel.of(family, args).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tuple(parameter.shape) for name, parameter in expected.items()
    }
    # And their own config.json describes the same model to us.
    written: Any = model.config
    assert family.hf_config is not None
    assert hf_differences(written.to_dict(), family.hf_config, args) == {}


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_weights_return_from_hugging_faces_form_bit_for_bit(family: Family) -> None:
    args = replace(family.flavors["debug"], **SMALL)
    model = build_model(family, args)
    state = {
        name: torch.randn_like(model.without_padding(name, tensor))
        for name, tensor in saved(model).items()
    }
    hf = HFModel.of(family, args)
    stored = joined(hf, state)
    for name, tensor in taken(hf, stored, state):
        assert torch.equal(tensor, state[name]), name
    assert hf.num_parameters == sum(tensor.numel() for tensor in state.values())
