"""BERT in two forms: the original, and the one that Megatron and NeMo train.

Sources. Original: arXiv:1810.04805 and Hugging Face's BertForPreTraining, which normalises after
each sum. Megatron: arXiv:1909.08053, section 5.3, which moves the norms before attention and
feed-forward and adds a final one; its flavors are those of the BERT-base and BERT-large that NeMo
trained on a 64,000-token vocabulary with a table of 2,048 positions and LayerNorm epsilon 1e-5.
Both predict masked tokens, by a transform and the tied embedding with a separate bias, and whether
the second text follows the first. Both train with dropout 0.1.
"""

from dataclasses import replace
from typing import Any

from titan_lite.models.args import EncoderArgs
from titan_lite.models.family import Family
from titan_lite.models.hf_config import USUAL_KEYS, HFConfig
from titan_lite.models.llama import LLAMA
from titan_lite.models.roles import PlanRow

# Fields that have these values in every original model.
_ORIGINAL: dict[str, Any] = {
    "ffn": "gelu",
    "norm": "layernorm",
    "qkv_bias": True,
    "out_bias": True,
    "ffn_bias": True,
    "positions": "learned",
    "tied_head": True,
    "post_norm": True,
}


def _bert(dim: int, num_layers: int, num_heads: int) -> EncoderArgs:
    return EncoderArgs(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        ffn_dim=4 * dim,
        vocab_size=30_522,
        max_seq_len=512,
        norm_eps=1e-12,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        **_ORIGINAL,
    )


def _megatron(args: EncoderArgs) -> EncoderArgs:
    return replace(args, vocab_size=64_000, max_seq_len=2048, norm_eps=1e-5, post_norm=False)


_BASE, _LARGE = _bert(768, 12, 12), _bert(1024, 24, 16)
# Runs on two CPU cores, without dropout; the vocabulary is the bundled tokenizer's.
_DEBUG = replace(
    _bert(256, 4, 8),
    vocab_size=2048,
    max_seq_len=2048,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
_LAYER = "bert.encoder.layer.*"
_KEY_MAP = {
    "tok_embeddings.weight": "bert.embeddings.word_embeddings.weight",
    "pos_embeddings.weight": "bert.embeddings.position_embeddings.weight",
    "type_embeddings.weight": "bert.embeddings.token_type_embeddings.weight",
    "layers.*.attention.wq.*": f"{_LAYER}.attention.self.query.*",
    "layers.*.attention.wk.*": f"{_LAYER}.attention.self.key.*",
    "layers.*.attention.wv.*": f"{_LAYER}.attention.self.value.*",
    "layers.*.attention.wo.*": f"{_LAYER}.attention.output.dense.*",
    "layers.*.feed_forward.w1.*": f"{_LAYER}.intermediate.dense.*",
    "layers.*.feed_forward.w2.*": f"{_LAYER}.output.dense.*",
    "transform.dense.*": "cls.predictions.transform.dense.*",
    "transform.norm.*": "cls.predictions.transform.LayerNorm.*",
    "output.weight": "cls.predictions.decoder.weight",
    "output.bias": "cls.predictions.bias",
    "pair_head.pooler.*": "bert.pooler.dense.*",
    "pair_head.classifier.*": "cls.seq_relationship.*",
}
_CONFIG = HFConfig(
    architecture="BertForPreTraining",
    # The class of Google's own files, which have both heads.
    aliases=("BertForMaskedLM",),
    model_type="bert",
    args=EncoderArgs,
    keys={
        **USUAL_KEYS,
        "norm_eps": "layer_norm_eps",
        "hidden_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    choices=_ORIGINAL,
    # transformers/models/bert/configuration_bert.py
    defaults={
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    },
    constants={
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
)
# A second name of the output's bias, and numbers from 0, in old files.
_IGNORED = ("cls.predictions.decoder.bias", "bert.embeddings.position_ids")

MEGATRON_BERT = Family(
    name="megatron_bert",
    build="titan_lite.nn.encoder:Encoder",
    objective="masked_lm",
    flavors={
        "debug": replace(_megatron(_DEBUG), vocab_size=2048),
        "base": _megatron(_BASE),
        "large": _megatron(_LARGE),
    },
    tp_plan=(
        *LLAMA.tp_plan,
        PlanRow("pos_embeddings", "positions"),
        PlanRow("type_embeddings", "positions"),
        PlanRow("transform.dense", "sequence", "head"),
        PlanRow("transform.norm", "sequence"),
        PlanRow("pair_head", "gather"),
        PlanRow("pair_head.pooler", "whole", "head"),
        PlanRow("pair_head.classifier", "whole", "head"),
    ),
    hf_key_map={
        **_KEY_MAP,
        "layers.*.attention_norm.*": f"{_LAYER}.attention.ln.*",
        "layers.*.ffn_norm.*": f"{_LAYER}.ln.*",
        "norm.*": "bert.encoder.ln.*",
    },
    hf_config=replace(
        _CONFIG,
        architecture="MegatronBertForPreTraining",
        aliases=(),
        model_type="megatron-bert",
        choices={**_ORIGINAL, "post_norm": False},
    ),
    hf_ignored=_IGNORED,
)

BERT = Family(
    name="bert",
    build=MEGATRON_BERT.build,
    objective=MEGATRON_BERT.objective,
    flavors={"debug": _DEBUG, "base": _BASE, "large": _LARGE},
    tp_plan=(
        *(row for row in MEGATRON_BERT.tp_plan if row.pattern != "norm"),
        PlanRow("embedding_norm", "sequence"),
    ),
    hf_key_map={
        **_KEY_MAP,
        "embedding_norm.*": "bert.embeddings.LayerNorm.*",
        "layers.*.attention_norm.*": f"{_LAYER}.attention.output.LayerNorm.*",
        "layers.*.ffn_norm.*": f"{_LAYER}.output.LayerNorm.*",
    },
    hf_config=_CONFIG,
    hf_ignored=_IGNORED,
)
