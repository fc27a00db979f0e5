"""Qwen (version 1), Qwen 2.5 and the dense sizes of Qwen 3, as three families.

Sources: the config.json of each base model at huggingface.co/Qwen (Qwen-14B, Qwen2.5-*, Qwen3-*).
All three are Llamas with other numbers. Qwen has biases on queries, keys and values, for which
Hugging Face has one fused projection; its config.json has twice the feed-forward width (27392). Its
long-context methods (dynamic NTK, log-n attention) only affect sequences of more than the 2,048
tokens of training, and are left out. Its hf_config is None, because transformers has no such class,
only code in the models' folders (trust_remote_code). Qwen 2.5 has the biases as well, grouped
heads, and a tied head in small sizes. Qwen 3 has no biases; it normalizes each head of queries and
keys, and heads have 128 features for any width (arXiv:2505.09388).
"""

from dataclasses import replace

from titan_lite.models.args import DecoderArgs
from titan_lite.models.family import Family
from titan_lite.models.llama import LLAMA, LLAMA_CONFIG
from titan_lite.models.roles import PlanRow

_DEBUG = LLAMA.flavors["debug"]


QWEN = Family(
    name="qwen",
    build=LLAMA.build,
    flavors={
        "debug": replace(_DEBUG, num_kv_heads=8, norm_eps=1e-6, qkv_bias=True),
        "14b": DecoderArgs(
            dim=5120,
            num_layers=40,
            num_heads=40,
            num_kv_heads=40,
            ffn_dim=13696,
            vocab_size=152_064,
            max_seq_len=8192,
            norm_eps=1e-6,
            qkv_bias=True,
        ),
    },
    tp_plan=LLAMA.tp_plan,
    hf_key_map={
        "tok_embeddings.*": "transformer.wte.*",
        "layers.*.attention_norm.*": "transformer.h.*.ln_1.*",
        "layers.*.attention.wq.*": "transformer.h.*.attn.c_attn.*",
        "layers.*.attention.wk.*": "transformer.h.*.attn.c_attn.*",
        "layers.*.attention.wv.*": "transformer.h.*.attn.c_attn.*",
        "layers.*.attention.wo.*": "transformer.h.*.attn.c_proj.*",
        "layers.*.ffn_norm.*": "transformer.h.*.ln_2.*",
        # The gate is what the activation is applied to.
        "layers.*.feed_forward.w1.*": "transformer.h.*.mlp.w2.*",
        "layers.*.feed_forward.w3.*": "transformer.h.*.mlp.w1.*",
        "layers.*.feed_forward.w2.*": "transformer.h.*.mlp.c_proj.*",
        "norm.*": "transformer.ln_f.*",
        "output.*": "lm_head.*",
    },
)

_2_5_7B = DecoderArgs(
    dim=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    ffn_dim=18944,
    vocab_size=152_064,
    max_seq_len=131_072,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    qkv_bias=True,
)
_2_5_14B = replace(
    _2_5_7B,
    dim=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    ffn_dim=13824,
    norm_eps=1e-5,
)
_2_5_3B = replace(
    _2_5_7B,
    dim=2048,
    num_layers=36,
    num_heads=16,
    num_kv_heads=2,
    ffn_dim=11008,
    vocab_size=151_936,
    max_seq_len=32_768,
    tied_head=True,
)

QWEN2_5 = Family(
    name="qwen2.5",
    build=LLAMA.build,
    flavors={
        "debug": replace(_DEBUG, norm_eps=1e-6, qkv_bias=True, tied_head=True),
        "0.5b": replace(_2_5_3B, dim=896, num_layers=24, num_heads=14, ffn_dim=4864),
        "1.5b": replace(
            _2_5_3B, dim=1536, num_layers=28, num_heads=12, ffn_dim=8960, max_seq_len=131_072
        ),
        "3b": _2_5_3B,
        "7b": _2_5_7B,
        "14b": _2_5_14B,
        "32b": replace(_2_5_14B, num_layers=64, ffn_dim=27648),
        "72b": replace(_2_5_14B, dim=8192, num_layers=80, num_heads=64, ffn_dim=29568),
    },
    tp_plan=LLAMA.tp_plan,
    hf_key_map=LLAMA.hf_key_map,
    hf_config=replace(
        LLAMA_CONFIG,
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        choices={"qkv_bias": True},
        # transformers/models/qwen2/configuration_qwen2.py
        defaults={**LLAMA_CONFIG.defaults, "max_position_embeddings": 32_768},
        constants={"hidden_act": "silu", "use_sliding_window": False},
    ),
)

_3_8B = DecoderArgs(
    dim=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=12288,
    vocab_size=151_936,
    max_seq_len=32_768,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    qk_norm=True,
)

QWEN3 = Family(
    name="qwen3",
    build=LLAMA.build,
    flavors={
        # As in the small sizes, all heads together are wider than the model.
        "debug": replace(_DEBUG, head_dim=64, norm_eps=1e-6, qk_norm=True),
        "0.6b": replace(_3_8B, dim=1024, num_layers=28, num_heads=16, ffn_dim=3072, tied_head=True),
        "1.7b": replace(_3_8B, dim=2048, num_layers=28, num_heads=16, ffn_dim=6144, tied_head=True),
        "4b": replace(_3_8B, dim=2560, ffn_dim=9728, tied_head=True),
        "8b": _3_8B,
        "14b": replace(_3_8B, dim=5120, num_layers=40, num_heads=40, ffn_dim=17408),
        "32b": replace(_3_8B, dim=5120, num_layers=64, num_heads=64, ffn_dim=25600),
    },
    tp_plan=(*LLAMA.tp_plan, PlanRow("layers.*.attention.[qk]_norm", "heads")),
    hf_key_map={
        **LLAMA.hf_key_map,
        "layers.*.attention.q_norm.*": "model.layers.*.self_attn.q_norm.*",
        "layers.*.attention.k_norm.*": "model.layers.*.self_attn.k_norm.*",
    },
    hf_config=replace(
        LLAMA_CONFIG,
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        choices={"qk_norm": True},
        # transformers/models/qwen3/configuration_qwen3.py
        defaults={**LLAMA_CONFIG.defaults, "max_position_embeddings": 32_768, "head_dim": 128},
        constants={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    ),
)
