"""Qwen 3's Mixture of Experts and Mixtral: decoders whose feed-forwards are experts.

Sources: arXiv:2505.09388 and arXiv:2401.04088, and at huggingface.co the config.json of
Qwen/Qwen3-30B-A3B-Base and Qwen/Qwen3-235B-A22B, mistralai/Mixtral-8x7B-v0.1 and 8x22B-v0.3. The
intermediate_size in Qwen's files is for dense layers, of which there are none. Qwen balances the
load of the global batch, which is not known until all of it is routed; here, the previous step's
load is used.
"""

from dataclasses import replace

from titan_lite.models.args import MoEArgs
from titan_lite.models.family import Family
from titan_lite.models.llama import LLAMA, LLAMA_CONFIG
from titan_lite.models.qwen import QWEN3
from titan_lite.models.roles import PlanRow

_QWEN3_30B = MoEArgs(
    dim=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    ffn_dim=768,
    vocab_size=151_936,
    max_seq_len=32_768,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    qk_norm=True,
    num_experts=128,
    top_k=8,
    balance_loss="global_lagged",
)
_MIXTRAL_8X7B = MoEArgs(
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    ffn_dim=14336,
    vocab_size=32_000,
    max_seq_len=32_768,
    rope_theta=1_000_000.0,
    num_experts=8,
    top_k=2,
)
# Runs on two CPU cores; the vocabulary is the bundled tokenizer's.
_DEBUG = MoEArgs(
    dim=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    ffn_dim=256,
    vocab_size=2048,
    max_seq_len=2048,
    num_experts=8,
    top_k=2,
)
_FEED_FORWARD = "layers.*.feed_forward"
ROUTED_PLAN = (
    *(row for row in LLAMA.tp_plan if not row.pattern.startswith(_FEED_FORWARD)),
    PlanRow(f"{_FEED_FORWARD}.router", "router"),
    PlanRow(f"{_FEED_FORWARD}.router.copy", "copy"),
    PlanRow(f"{_FEED_FORWARD}.experts", "expert"),
)


def expert_key_map(moe: str, gate: str, up: str, down: str) -> dict[str, str]:
    """Rows for router and experts; the second `*` of a name is an expert's number."""
    return {
        f"{_FEED_FORWARD}.router.weight": f"model.layers.*.{moe}.gate.weight",
        f"{_FEED_FORWARD}.experts.w1": f"model.layers.*.{moe}.experts.*.{gate}.weight",
        f"{_FEED_FORWARD}.experts.w3": f"model.layers.*.{moe}.experts.*.{up}.weight",
        f"{_FEED_FORWARD}.experts.w2": f"model.layers.*.{moe}.experts.*.{down}.weight",
    }


def _without_feed_forward(key_map: dict[str, str]) -> dict[str, str]:
    return {name: hf for name, hf in key_map.items() if not name.startswith(_FEED_FORWARD)}


QWEN3_MOE = Family(
    name="qwen3_moe",
    build=LLAMA.build,
    flavors={
        "debug": replace(
            _DEBUG, head_dim=64, norm_eps=1e-6, qk_norm=True, balance_loss="global_lagged"
        ),
        "30b-a3b": _QWEN3_30B,
        "235b-a22b": replace(_QWEN3_30B, dim=4096, num_layers=94, num_heads=64, ffn_dim=1536),
    },
    tp_plan=(*ROUTED_PLAN, PlanRow("layers.*.attention.[qk]_norm", "heads")),
    hf_key_map={
        **_without_feed_forward(dict(QWEN3.hf_key_map)),
        **expert_key_map("mlp", "gate_proj", "up_proj", "down_proj"),
    },
    hf_config=replace(
        LLAMA_CONFIG,
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        args=MoEArgs,
        keys={
            **LLAMA_CONFIG.keys,
            "ffn_dim": "moe_intermediate_size",
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "route_norm": "norm_topk_prob",
        },
        choices={"qk_norm": True, "balance_loss": "global_lagged"},
        # transformers/models/qwen3_moe/configuration_qwen3_moe.py
        defaults={
            **LLAMA_CONFIG.defaults,
            "max_position_embeddings": 32_768,
            "norm_topk_prob": False,
        },
        # transformers 5 writes Mixtral's name.
        fallbacks={**LLAMA_CONFIG.fallbacks, "num_experts": "num_local_experts"},
        constants={
            "hidden_act": "silu",
            "attention_bias": False,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
)

MIXTRAL = Family(
    name="mixtral",
    build=LLAMA.build,
    flavors={
        "debug": _DEBUG,
        "8x7b": _MIXTRAL_8X7B,
        "8x22b": replace(
            _MIXTRAL_8X7B,
            dim=6144,
            num_layers=56,
            num_heads=48,
            ffn_dim=16384,
            vocab_size=32_768,
            max_seq_len=65_536,
        ),
    },
    tp_plan=ROUTED_PLAN,
    hf_key_map={
        **_without_feed_forward(dict(LLAMA.hf_key_map)),
        **expert_key_map("block_sparse_moe", "w1", "w3", "w2"),
    },
    hf_config=replace(
        LLAMA_CONFIG,
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        args=MoEArgs,
        keys={
            **LLAMA_CONFIG.keys,
            "num_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
        },
        # transformers/models/mixtral/configuration_mixtral.py
        defaults={
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        constants={"hidden_act": "silu", "sliding_window": None},
    ),
)
