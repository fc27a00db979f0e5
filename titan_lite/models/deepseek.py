"""DeepSeek-V3 and Moonlight: latent attention, routed and shared experts, dense first blocks.

Sources: arXiv:2412.19437, arXiv:2502.16982 and, at huggingface.co, the config.json of
deepseek-ai/DeepSeek-V3-Base and moonshotai/Moonlight-16B-A3B. V3 was trained on 4,096 tokens; the
YaRN scaling in its file is for longer sequences. Multi-token prediction, an additional block of 14
billion parameters after V3's last one, is left out.
"""

from dataclasses import replace
from typing import Any

from titan_lite.models.args import LatentArgs
from titan_lite.models.family import Family
from titan_lite.models.llama import LLAMA, LLAMA_CONFIG
from titan_lite.models.moe import ROUTED_PLAN, expert_key_map
from titan_lite.models.roles import PlanRow

# Fields that have these values in every model of the class.
_ROUTING: dict[str, Any] = {
    "score": "sigmoid",
    "balance_loss": "sequence",
    "balance_coeff": 1e-4,
    "route_bias": True,
    "bias_rate": 1e-3,
}
_V3 = LatentArgs(
    dim=7168,
    num_layers=61,
    num_heads=128,
    num_kv_heads=128,
    ffn_dim=2048,
    vocab_size=129_280,
    max_seq_len=4096,
    norm_eps=1e-6,
    q_rank=1536,
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    v_dim=128,
    num_experts=256,
    top_k=8,
    groups=8,
    kept_groups=4,
    route_scale=2.5,
    shared_experts=1,
    dense_layers=3,
    dense_dim=18432,
    **_ROUTING,
)
_FEED_FORWARD = "layers.*.feed_forward"
_MLP = "model.layers.*.mlp"

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    build=LLAMA.build,
    flavors={
        # Runs on two CPU cores; the vocabulary is the bundled tokenizer's.
        "debug": replace(
            _V3,
            dim=256,
            num_layers=4,
            num_heads=8,
            num_kv_heads=8,
            ffn_dim=192,
            vocab_size=2048,
            max_seq_len=2048,
            q_rank=96,
            kv_rank=64,
            nope_dim=32,
            rope_dim=16,
            v_dim=32,
            num_experts=8,
            top_k=2,
            groups=4,
            kept_groups=2,
            dense_layers=1,
            dense_dim=576,
        ),
        "671b": _V3,
        "moonlight-16b-a3b": replace(
            _V3,
            dim=2048,
            num_layers=27,
            num_heads=16,
            num_kv_heads=16,
            ffn_dim=1408,
            vocab_size=163_840,
            max_seq_len=8192,
            rope_theta=50_000.0,
            norm_eps=1e-5,
            q_rank=None,
            num_experts=64,
            top_k=6,
            groups=1,
            kept_groups=1,
            route_scale=2.446,
            shared_experts=2,
            dense_layers=1,
            dense_dim=11264,
        ),
    },
    tp_plan=(
        *(row for row in ROUTED_PLAN if not row.pattern.startswith("layers.*.attention.")),
        PlanRow("layers.*.attention", "gather"),
        PlanRow("layers.*.attention.w*_a", "whole", "matrix"),
        PlanRow("layers.*.attention.*_norm", "whole"),
        PlanRow("layers.*.attention.copy", "copy"),
        PlanRow("layers.*.attention.w*[qb]", "colwise"),
        PlanRow("layers.*.attention.wo", "rowwise"),
        PlanRow(_FEED_FORWARD, "gather"),
        PlanRow(f"{_FEED_FORWARD}.w[13]", "colwise"),
        PlanRow(f"{_FEED_FORWARD}.w2", "rowwise"),
        PlanRow(f"{_FEED_FORWARD}.shared", "gather"),
        PlanRow(f"{_FEED_FORWARD}.shared.w[13]", "colwise"),
        PlanRow(f"{_FEED_FORWARD}.shared.w2", "rowwise"),
    ),
    hf_key_map={
        **{
            name: hf
            for name, hf in LLAMA.hf_key_map.items()
            if not name.startswith("layers.*.attention.w")
        },
        **{
            f"layers.*.attention.{name}.*": f"model.layers.*.self_attn.{hf}.*"
            for name, hf in {
                "wq": "q_proj",
                "wq_a": "q_a_proj",
                "q_norm": "q_a_layernorm",
                "wq_b": "q_b_proj",
                "wkv_a": "kv_a_proj_with_mqa",
                "kv_norm": "kv_a_layernorm",
                "wkv_b": "kv_b_proj",
                "wo": "o_proj",
            }.items()
        },
        **expert_key_map("mlp", "gate_proj", "up_proj", "down_proj"),
        f"{_FEED_FORWARD}.router.bias": f"{_MLP}.gate.e_score_correction_bias",
        f"{_FEED_FORWARD}.shared.w1.weight": f"{_MLP}.shared_experts.gate_proj.weight",
        f"{_FEED_FORWARD}.shared.w3.weight": f"{_MLP}.shared_experts.up_proj.weight",
        f"{_FEED_FORWARD}.shared.w2.weight": f"{_MLP}.shared_experts.down_proj.weight",
    },
    hf_config=replace(
        LLAMA_CONFIG,
        architecture="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        args=LatentArgs,
        keys={
            **{name: key for name, key in LLAMA_CONFIG.keys.items() if name != "head_dim"},
            "ffn_dim": "moe_intermediate_size",
            "dense_dim": "intermediate_size",
            "dense_layers": "first_k_dense_replace",
            "q_rank": "q_lora_rank",
            "kv_rank": "kv_lora_rank",
            "nope_dim": "qk_nope_head_dim",
            "rope_dim": "qk_rope_head_dim",
            "v_dim": "v_head_dim",
            "num_experts": "n_routed_experts",
            "shared_experts": "n_shared_experts",
            "top_k": "num_experts_per_tok",
            "groups": "n_group",
            "kept_groups": "topk_group",
            "route_norm": "norm_topk_prob",
            "route_scale": "routed_scaling_factor",
        },
        choices=_ROUTING,
        # transformers/models/deepseek_v3/configuration_deepseek_v3.py
        defaults={
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "norm_topk_prob": True,
        },
        # transformers 5 writes Mixtral's name.
        fallbacks={**LLAMA_CONFIG.fallbacks, "n_routed_experts": "num_local_experts"},
        constants={
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
        },
    ),
    # Multi-token prediction of V3.
    hf_ignored=tuple("model.layers.61" + ".*" * parts for parts in range(2, 6)),
)
