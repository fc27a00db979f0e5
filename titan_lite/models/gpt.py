"""GPT in two forms: GPT-NeoX's, with rotary embedding, and GPT-2's, 3's and Megatron's, without.

Sources. NeoX: github.com/EleutherAI/gpt-neox (configs/175B.yml: layers, width, heads; rotary over
whole heads, untied head, LayerNorm and biases everywhere), its vocabulary padded to 50,432;
"20b": arXiv:2204.06745, and the config.json of huggingface.co/EleutherAI/gpt-neox-20b. "1.4b" and
"16b" are those of the published FSDP and DeepSpeed runs on Frontier: the 1.4B's numbers are of
FORGE (24 layers of 2,064 features), by the same authors in the same framework; of the 16B only
layers and width are known, its 48 heads are a guess. Learned positions: arXiv:2005.14165 (GPT-3's
175B); "1t": arXiv:2104.04473, whose vocabulary is 51,200.
"""

from dataclasses import replace
from typing import Any

from titan_lite.models.args import DecoderArgs
from titan_lite.models.family import Family
from titan_lite.models.hf_config import USUAL_KEYS, HFConfig, HFLayout
from titan_lite.models.llama import LLAMA
from titan_lite.models.roles import PlanRow

# Fields that have these values in every model of both forms.
_FORM: dict[str, Any] = {
    "norm": "layernorm",
    "qkv_bias": True,
    "out_bias": True,
    "ffn_bias": True,
}


def _neox(dim: int, num_layers: int, num_heads: int, vocab_size: int = 50_432) -> DecoderArgs:
    return DecoderArgs(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        ffn_dim=4 * dim,
        vocab_size=vocab_size,
        max_seq_len=2048,
        ffn="gelu",
        **_FORM,
    )


def _learned(args: DecoderArgs) -> DecoderArgs:
    return replace(args, ffn="gelu_tanh", positions="learned", tied_head=True)


def _fused(hf_name: str) -> dict[str, str]:
    """Rows for query, key and value, which are one linear."""
    return {f"layers.*.attention.{name}.*": f"{hf_name}.*" for name in ("wq", "wk", "wv")}


_DEBUG = _neox(256, 4, 8, 2048)
_NEOX_LAYER = "gpt_neox.layers.*"
_GPT_LAYER = "transformer.h.*"

GPT_NEOX = Family(
    name="gpt_neox",
    build=LLAMA.build,
    flavors={
        "debug": replace(_DEBUG, rotary_fraction=0.25, parallel_residual=True),
        "1.4b": _neox(2064, 24, 24),
        "16b": _neox(6144, 34, 48),
        "20b": replace(
            _neox(6144, 44, 64), ffn="gelu_tanh", rotary_fraction=0.25, parallel_residual=True
        ),
        "175b": _neox(12288, 96, 96),
        "1t": _neox(25600, 128, 160, 51_200),
    },
    tp_plan=LLAMA.tp_plan,
    hf_key_map={
        "tok_embeddings.weight": "gpt_neox.embed_in.weight",
        "layers.*.attention_norm.*": f"{_NEOX_LAYER}.input_layernorm.*",
        **_fused(f"{_NEOX_LAYER}.attention.query_key_value"),
        "layers.*.attention.wo.*": f"{_NEOX_LAYER}.attention.dense.*",
        "layers.*.ffn_norm.*": f"{_NEOX_LAYER}.post_attention_layernorm.*",
        "layers.*.feed_forward.w1.*": f"{_NEOX_LAYER}.mlp.dense_h_to_4h.*",
        "layers.*.feed_forward.w2.*": f"{_NEOX_LAYER}.mlp.dense_4h_to_h.*",
        "norm.*": "gpt_neox.final_layer_norm.*",
        "output.weight": "embed_out.weight",
    },
    hf_config=HFConfig(
        architecture="GPTNeoXForCausalLM",
        model_type="gpt_neox",
        keys={
            **USUAL_KEYS,
            "norm_eps": "layer_norm_eps",
            "qkv_bias": "attention_bias",
            "out_bias": "attention_bias",
            "parallel_residual": "use_parallel_residual",
            "rotary_fraction": "rotary_pct",
            "rope_theta": "rotary_emb_base",
            "tied_head": "tie_word_embeddings",
            "hidden_dropout": "hidden_dropout",
            "attention_dropout": "attention_dropout",
            "ffn": "hidden_act",
        },
        choices={"norm": "layernorm", "ffn_bias": True},
        # transformers/models/gpt_neox/configuration_gpt_neox.py
        defaults={
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10_000.0,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
        },
        names={
            "hidden_act": {
                "gelu": "gelu",
                # Names in the 20B's files.
                "gelu_fast": "gelu_tanh",
                "gelu_new": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh",
            }
        },
    ),
    hf_layouts={f"{_NEOX_LAYER}.attention.query_key_value.*": HFLayout(groups="num_heads")},
    # Old files hold the causal mask and the frequencies of the rotary embedding.
    hf_ignored=(
        f"{_NEOX_LAYER}.attention.bias",
        f"{_NEOX_LAYER}.attention.masked_bias",
        f"{_NEOX_LAYER}.attention.rotary_emb.inv_freq",
    ),
)

GPT = Family(
    name="gpt",
    build=LLAMA.build,
    flavors={
        "debug": _learned(_DEBUG),
        "175b": _learned(_neox(12288, 96, 96, 51_200)),
        "1t": _learned(_neox(25600, 128, 160, 51_200)),
    },
    tp_plan=(*LLAMA.tp_plan, PlanRow("pos_embeddings", "positions")),
    hf_key_map={
        "tok_embeddings.weight": "transformer.wte.weight",
        "pos_embeddings.weight": "transformer.wpe.weight",
        "layers.*.attention_norm.*": f"{_GPT_LAYER}.ln_1.*",
        **_fused(f"{_GPT_LAYER}.attn.c_attn"),
        "layers.*.attention.wo.*": f"{_GPT_LAYER}.attn.c_proj.*",
        "layers.*.ffn_norm.*": f"{_GPT_LAYER}.ln_2.*",
        "layers.*.feed_forward.w1.*": f"{_GPT_LAYER}.mlp.c_fc.*",
        "layers.*.feed_forward.w2.*": f"{_GPT_LAYER}.mlp.c_proj.*",
        "norm.*": "transformer.ln_f.*",
        "output.weight": "lm_head.weight",
    },
    hf_config=HFConfig(
        architecture="GPT2LMHeadModel",
        model_type="gpt2",
        keys={
            "dim": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "num_kv_heads": "n_head",
            "ffn_dim": "n_inner",
            "vocab_size": "vocab_size",
            "max_seq_len": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tied_head": "tie_word_embeddings",
        },
        choices={"ffn": "gelu_tanh", "positions": "learned", **_FORM},
        # transformers/models/gpt2/configuration_gpt2.py
        defaults={"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        constants={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    # Conv1D
    hf_layouts={
        f"{_GPT_LAYER}.{name}.weight": HFLayout(transposed=True)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
    # Old files hold the causal mask.
    hf_ignored=(f"{_GPT_LAYER}.attn.bias", f"{_GPT_LAYER}.attn.masked_bias"),
)
