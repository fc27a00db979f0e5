"""InternLM 7B and 20B: Llama with the biases that the 7B has on its attention projections.

Sources: 7B: InternLM's configs/7B_sft.py and its training code (Wqkv and the output projection have
biases, the feed-forward and the head none), RMSNorm epsilon 1e-5 in training. 20B: the config.json
of huggingface.co/internlm/internlm-20b, which has no biases ("bias": false). Hugging Face's
InternLMForCausalLM has the same names and computation as LlamaForCausalLM with attention_bias, so
weights are exported for that class.
"""

from dataclasses import replace

from titan_lite.models.family import Family
from titan_lite.models.llama import LLAMA, LLAMA_CONFIG

_7B = replace(
    LLAMA.flavors["llama2_7b"], vocab_size=103_168, max_seq_len=2048, qkv_bias=True, out_bias=True
)

INTERNLM = Family(
    name="internlm",
    build=LLAMA.build,
    flavors={
        "debug": replace(LLAMA.flavors["debug"], num_kv_heads=8, qkv_bias=True, out_bias=True),
        "7b": _7B,
        "20b": replace(
            _7B,
            dim=5120,
            num_layers=60,
            num_heads=40,
            num_kv_heads=40,
            ffn_dim=13824,
            max_seq_len=4096,
            norm_eps=1e-6,
            qkv_bias=False,
            out_bias=False,
        ),
    },
    tp_plan=LLAMA.tp_plan,
    hf_key_map=LLAMA.hf_key_map,
    hf_config=replace(
        LLAMA_CONFIG,
        aliases=("InternLMForCausalLM",),
        keys={
            **LLAMA_CONFIG.keys,
            "qkv_bias": "attention_bias",
            "out_bias": "attention_bias",
        },
        defaults={**LLAMA_CONFIG.defaults, "attention_bias": False},
        fallbacks={**LLAMA_CONFIG.fallbacks, "attention_bias": "bias"},
        constants={"hidden_act": "silu", "mlp_bias": False},
    ),
    hf_ignored=LLAMA.hf_ignored,
)
