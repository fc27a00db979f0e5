"""Llama 2, 3 and 3.1: published sizes, tensor-parallel plan and Hugging Face names.

Sources: arXiv 2307.09288 and 2407.21783, and the params.json / config.json that Meta publishes.
Llama 3.1 differs from Llama 3 by its rotary scaling and its 131,072 tokens, not in parameters or
FLOPs. torchtitan's flavors "8B", "70B" and "405B" (torchtitan/models/llama3) carry Llama 3.1's
scaling and 131,072 tokens, cut to training.seq_len: llama3.1_* here.
"""

from dataclasses import replace

from titan_lite.models.args import DecoderArgs, RopeScaling
from titan_lite.models.family import Family
from titan_lite.models.hf_config import USUAL_KEYS, HFConfig
from titan_lite.models.roles import PlanRow

_LLAMA2_7B = DecoderArgs(
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    ffn_dim=11008,
    vocab_size=32000,
    max_seq_len=4096,
)
_LLAMA2_13B = replace(
    _LLAMA2_7B, dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, ffn_dim=13824
)
_LLAMA2_70B = replace(
    _LLAMA2_7B, dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, ffn_dim=28672
)
_LLAMA3_8B = DecoderArgs(
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    ffn_dim=14336,
    vocab_size=128256,
    max_seq_len=8192,
    rope_theta=500_000.0,
)
_LLAMA3_70B = replace(_LLAMA3_8B, dim=8192, num_layers=80, num_heads=64, ffn_dim=28672)


def _llama3_1(args: DecoderArgs) -> DecoderArgs:
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )
    return replace(args, max_seq_len=131_072, rope_scaling=scaling)


LLAMA_CONFIG = HFConfig(
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys={
        **USUAL_KEYS,
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "tied_head": "tie_word_embeddings",
    },
    # transformers/models/llama/configuration_llama.py
    defaults={
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    fallbacks={"num_key_value_heads": "num_attention_heads"},
    constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)

LLAMA = Family(
    name="llama",
    build="titan_lite.nn.decoder:Decoder",
    flavors={
        # Runs on two CPU cores; the vocabulary is the bundled tokenizer's.
        "debug": DecoderArgs(
            dim=256,
            num_layers=4,
            num_heads=8,
            num_kv_heads=4,
            ffn_dim=768,
            vocab_size=2048,
            max_seq_len=2048,
        ),
        "llama2_7b": _LLAMA2_7B,
        "llama2_13b": _LLAMA2_13B,
        "llama2_70b": _LLAMA2_70B,
        "llama3_8b": _LLAMA3_8B,
        "llama3_70b": _LLAMA3_70B,
        "llama3.1_8b": _llama3_1(_LLAMA3_8B),
        "llama3.1_70b": _llama3_1(_LLAMA3_70B),
        "llama3.1_405b": _llama3_1(
            replace(_LLAMA3_8B, dim=16384, num_layers=126, num_heads=128, ffn_dim=53248)
        ),
    },
    tp_plan=(
        PlanRow("tok_embeddings", "vocab"),
        PlanRow("layers.*.attention_norm", "sequence"),
        PlanRow("layers.*.attention", "gather"),
        PlanRow("layers.*.attention.w[qkv]", "colwise"),
        PlanRow("layers.*.attention.wo", "rowwise"),
        PlanRow("layers.*.ffn_norm", "sequence"),
        PlanRow("layers.*.feed_forward", "gather"),
        PlanRow("layers.*.feed_forward.w[13]", "colwise"),
        PlanRow("layers.*.feed_forward.w2", "rowwise"),
        PlanRow("norm", "sequence"),
        PlanRow("output", "head"),
    ),
    hf_key_map={
        "tok_embeddings.*": "model.embed_tokens.*",
        "layers.*.attention_norm.*": "model.layers.*.input_layernorm.*",
        "layers.*.attention.wq.*": "model.layers.*.self_attn.q_proj.*",
        "layers.*.attention.wk.*": "model.layers.*.self_attn.k_proj.*",
        "layers.*.attention.wv.*": "model.layers.*.self_attn.v_proj.*",
        "layers.*.attention.wo.*": "model.layers.*.self_attn.o_proj.*",
        "layers.*.ffn_norm.*": "model.layers.*.post_attention_layernorm.*",
        "layers.*.feed_forward.w1.*": "model.layers.*.mlp.gate_proj.*",
        "layers.*.feed_forward.w3.*": "model.layers.*.mlp.up_proj.*",
        "layers.*.feed_forward.w2.*": "model.layers.*.mlp.down_proj.*",
        "norm.*": "model.norm.*",
        "output.*": "lm_head.*",
    },
    hf_config=LLAMA_CONFIG,
    # Files of Llama 2 hold the frequencies of the rotary embedding.
    hf_ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
