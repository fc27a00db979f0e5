"""Parameter counts and FLOPs per token against published numbers and closed forms."""

import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.flop_counter import FlopCounterMode

from titan_lite.config.schema import FFNKind, NormKind, PositionKind
from titan_lite.models.args import DecoderArgs, EncoderArgs
from titan_lite.models.bert import BERT, MEGATRON_BERT
from titan_lite.models.deepseek import DEEPSEEK_V3
from titan_lite.models.gpt import GPT, GPT_NEOX
from titan_lite.models.llama import LLAMA
from titan_lite.models.moe import QWEN3_MOE
from titan_lite.models.qwen import QWEN3
from titan_lite.nn.build_model import build_model
from titan_lite.nn.decoder import Decoder
from titan_lite.nn.encoder import Encoder
from titan_lite.planner.counts import (
    flops_per_token,
    num_active_params,
    num_block_params,
    num_params,
    num_unused_params,
)

LLAMA2_7B = LLAMA.flavors["llama2_7b"]
LLAMA2_70B = LLAMA.flavors["llama2_70b"]
LLAMA3_8B = LLAMA.flavors["llama3_8b"]
LLAMA3_70B = LLAMA.flavors["llama3_70b"]
LLAMA3_405B = LLAMA.flavors["llama3.1_405b"]


def megatron_flops_per_token(
    *,
    dim: int,
    num_layers: int,
    attention_dim: int,
    kv_dim: int,
    ffn_dim: float,
    vocab_size: int,
    seq_len: int,
    gated: bool = True,
    recompute: bool = False,
    causal: bool = False,
) -> float:
    """FLOPs per token by matmul: 3 times the forward; recomputed blocks 4 times, the head still 3.

    Megatron SC'21 (Narayanan et al., arXiv:2104.04473, appendix) is the plain, recomputed case with
    ffn_dim = 4 dim: 96 L h^2 (1 + s / 6h + V / 16 L h). InternLM's get_megatron_flops is the gated
    one with ffn_dim = mlp_ratio dim, not rounded; nanotron's get_flops the gated one, never
    recomputed; Megatron-LM now, NeMo and MaxText halve the attention (causal).
    """
    projections = 4 * dim * attention_dim + 4 * dim * kv_dim
    scores = 4 * seq_len * attention_dim / (2 if causal else 1)
    feed_forward = (6 if gated else 4) * dim * ffn_dim
    blocks = num_layers * (projections + scores + feed_forward)
    return (4 if recompute else 3) * blocks + 3 * 2 * dim * vocab_size


def num_params_non_embedding(args):
    return num_params(args) - num_unused_params(args)


small = st.integers(1, 8)


def sizes(kv, group, head, layers, ffn, vocab):
    return DecoderArgs(
        dim=kv * group * head * 2,
        num_layers=layers,
        num_heads=kv * group,
        num_kv_heads=kv,
        ffn_dim=ffn,
        vocab_size=vocab,
        max_seq_len=64,
    )


small_args = st.builds(sizes, *[small] * 6)
any_args = st.builds(
    dataclasses.replace,
    small_args,
    head_dim=st.none() | small.map(lambda half: 2 * half),
    ffn=st.sampled_from(get_args(FFNKind)),
    norm=st.sampled_from(get_args(NormKind)),
    positions=st.sampled_from(get_args(PositionKind)),
    **dict.fromkeys(
        ("qkv_bias", "out_bias", "ffn_bias", "qk_norm", "parallel_residual", "tied_head"),
        st.booleans(),
    ),
)


def flops(args, seq_len, recomputed=0):
    num_block_params = num_active_params(args, 0, args.num_layers)
    return flops_per_token(
        args, seq_len, num_params_non_embedding(args), num_block_params, recomputed
    )


def megatron(args, seq_len, **kwargs):
    return megatron_flops_per_token(
        dim=args.dim,
        num_layers=args.num_layers,
        attention_dim=args.attention_dim,
        kv_dim=args.kv_dim,
        ffn_dim=args.ffn_dim,
        vocab_size=args.vocab_size,
        seq_len=seq_len,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("args", "total", "non_embedding"),
    [
        (LLAMA2_7B, 6_738_415_616, 6_607_343_616),
        (LLAMA2_70B, 68_976_648_192, 68_714_504_192),
        (LLAMA3_8B, 8_030_261_248, 7_504_924_672),
        (LLAMA3_70B, 70_553_706_496, 69_503_033_344),
        (LLAMA3_405B, 405_853_388_800, 403_752_042_496),
    ],
)
def test_parameter_counts_are_the_published_ones(args, total, non_embedding):
    assert num_params(args) == total
    assert num_params_non_embedding(args) == non_embedding


@pytest.mark.parametrize(
    ("args", "gflops", "causal_share"),
    [(LLAMA3_8B, 57.91, 0.889), (LLAMA3_70B, 481.4, 0.933), (LLAMA3_405B, 2625.4, 0.961)],
)
def test_torchtitans_flops_per_token_at_8192(args, gflops, causal_share):
    counted = flops(args, 8192)
    assert counted.model / 1e9 == pytest.approx(gflops, rel=1e-4)
    assert counted.causal / counted.model == pytest.approx(causal_share, abs=5e-4)
    assert counted.hardware is None


@pytest.mark.parametrize(("recompute", "gflops"), [(False, 44.411), (True, 58.370)])
def test_internlm_7b_by_internlms_own_formula(recompute, gflops):
    counted = megatron_flops_per_token(
        dim=4096,
        num_layers=32,
        attention_dim=4096,
        kv_dim=4096,
        ffn_dim=4096 * 8 / 3,
        vocab_size=103168,
        seq_len=2048,
        recompute=recompute,
    )
    assert counted / 1e9 == pytest.approx(gflops, abs=1e-3)


def test_llama2_7b_by_nanotrons_formula():
    assert megatron(LLAMA2_7B, 4096) / 1e9 == pytest.approx(46.085, abs=1e-3)


@pytest.mark.parametrize(
    ("args", "seq_len", "share"),
    [(LLAMA2_7B, 4096, 0.930), (LLAMA2_70B, 32768, 0.808), (LLAMA2_70B, 65536, 0.722)],
)
def test_causal_share_of_megatrons_formula(args, seq_len, share):
    causal, full = megatron(args, seq_len, causal=True), megatron(args, seq_len)
    assert causal / full == pytest.approx(share, abs=1e-3)


def test_gpt_175b_matches_the_closed_form_of_megatron_sc21():
    h, layers, vocab, s = 12288, 96, 51200, 2048
    counted = megatron_flops_per_token(
        dim=h,
        num_layers=layers,
        attention_dim=h,
        kv_dim=h,
        ffn_dim=4 * h,
        vocab_size=vocab,
        seq_len=s,
        gated=False,
        recompute=True,
    )
    closed_form = 96 * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    assert counted == pytest.approx(closed_form)


@given(args=small_args, seq_len=st.integers(1, 64))
def test_titans_count_exceeds_the_matmuls_by_the_norms_alone(args, seq_len):
    norms = (2 * args.num_layers + 1) * args.dim
    counted = flops(args, seq_len, recomputed=args.num_layers)
    assert counted.model == megatron(args, seq_len) + 6 * norms
    assert counted.causal == megatron(args, seq_len, causal=True) + 6 * norms
    again = megatron(args, seq_len, recompute=True) - megatron(args, seq_len)
    last_matmuls = 2 * args.num_layers * args.dim * args.ffn_dim
    assert counted.hardware - counted.model == again - last_matmuls + 2 * (norms - args.dim)


@settings(max_examples=40)
@given(args=any_args)
def test_parameters_are_those_of_the_model_that_is_built(args):
    with torch.device("meta"):
        model = Decoder(args)
    assert num_params(args) == model.num_parameters
    assert num_block_params(args) == sum(p.numel() for p in model.layers.parameters())
    lookups = [model.pos_embeddings] + ([] if args.tied_head else [model.tok_embeddings])
    looked_up = sum(p.numel() for module in lookups if module for p in module.parameters())
    if not args.tied_head:
        looked_up -= (args.padded_vocab_size - args.vocab_size) * args.dim
    assert num_params(args) - num_params_non_embedding(args) == looked_up


@settings(max_examples=20)
@given(args=any_args, post_norm=st.booleans(), num_token_types=small)
def test_parameters_are_those_of_the_encoder_that_is_built(args, post_norm, num_token_types):
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    args = EncoderArgs(**fields, post_norm=post_norm, num_token_types=num_token_types)
    with torch.device("meta"):
        model = Encoder(args)
    assert num_params(args) == model.num_parameters
    lookups = [model.pos_embeddings, model.type_embeddings]
    lookups += [] if args.tied_head else [model.tok_embeddings]
    unused = [*lookups, model.pair_head]
    unused = sum(p.numel() for module in unused if module for p in module.parameters())
    if not args.tied_head:
        unused -= (args.padded_vocab_size - args.vocab_size) * args.dim
    assert num_params(args) - num_params_non_embedding(args) == unused


@pytest.mark.parametrize(("flavor", "seq_len"), [("base", 512), ("base", 2048), ("large", 512)])
def test_bert_exceeds_nemos_formula_by_the_transform_and_what_is_no_matrix(flavor, seq_len):
    args = MEGATRON_BERT.flavors[flavor]
    h, layers, vocab = args.dim, args.num_layers, args.vocab_size
    nemo = 72 * layers * h**2 * (1 + seq_len / (6 * h) + vocab / (12 * layers * h))
    assert megatron(args, seq_len, gated=False) == pytest.approx(nemo)
    counted = flops(args, seq_len)
    # A block has 2 norms and biases of 4 h, 4 h and h features; then the last and the head's norm.
    vectors = layers * (4 * h + 9 * h) + 2 * h + vocab
    transform = h * h + 3 * h
    assert counted.model == round(nemo) + 6 * (transform + vectors)
    assert counted.causal == counted.model


@pytest.mark.parametrize(
    ("flavor", "linear", "attention"), [("671b", 219.8, 61.4), ("moonlight-16b-a3b", 15.5, 3.4)]
)
def test_flops_of_latent_attention_count_features_of_queries_and_of_values(
    flavor, linear, attention
):
    args = DEEPSEEK_V3.flavors[flavor]
    counted = flops(args, 4096)
    scores = 6 * args.num_layers * args.num_heads * (128 + 64 + 128) * 4096
    assert counted.model - counted.causal == scores / 2
    assert [(counted.model - scores) / 1e9, scores / 1e9] == pytest.approx(
        [linear, attention], abs=0.05
    )


# Values as long as queries: the product of shorter ones runs on padded values.
EQUAL_HEADS = dataclasses.replace(
    DEEPSEEK_V3,
    flavors={"debug": dataclasses.replace(DEEPSEEK_V3.flavors["debug"], v_dim=48)},
)


@pytest.mark.parametrize(
    ("family", "checkpointed"),
    [
        (LLAMA, 0),
        (LLAMA, 1),
        (LLAMA, 3),
        (LLAMA, 4),
        (QWEN3, 3),
        (GPT, 3),
        (GPT_NEOX, 3),
        (BERT, 3),
        (MEGATRON_BERT, 3),
        (EQUAL_HEADS, 0),
        (EQUAL_HEADS, 4),
        (QWEN3_MOE, 3),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_flops_are_those_that_torch_counts_in_a_training_step(family, checkpointed):
    args, batch, seq_len = family.flavors["debug"], 2, 64
    # On the meta device attention is counted as the full matmuls that it stands for.
    with torch.device("meta"):
        model = build_model(family, args)
        tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    for name, block in list(model.layers.items())[:checkpointed]:
        model.layers[name] = checkpoint_wrapper(block)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert args.num_layers == 4
    local = flops(args, seq_len, recomputed=checkpointed)
    # Norms and biases, which the formula counts.
    counted = [p for name, p in model.named_parameters() if not name.startswith("pair_head")]
    vectors = sum(p.numel() for p in counted if p.ndim == 1)
    of_a_block = sum(p.numel() for p in block.parameters() if p.ndim == 1) if checkpointed else 0
    ours_of_matmuls = (local.hardware or local.model) - 6 * vectors - 2 * checkpointed * of_a_block
    assert counter.get_total_flops() == batch * seq_len * ours_of_matmuls
