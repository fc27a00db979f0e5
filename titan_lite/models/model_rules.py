"""Rules between the configuration and the model."""

import dataclasses
from collections.abc import Iterator

from titan_lite.config.activation_checkpoint import FirstK, FractionOfBlocks
from titan_lite.config.optimizers import Muon
from titan_lite.config.problems import SettingError, did_you_mean, nearest, quote
from titan_lite.config.schema import Config, MaskedLM
from titan_lite.models.args import VOCAB_MULTIPLE, DecoderArgs, EncoderArgs, LatentArgs, MoEArgs
from titan_lite.models.family import Family
from titan_lite.models.hf_config import NO_HF_CONFIG, unsupported_in_hf
from titan_lite.models.roles import KINDS, MATRIX_KINDS

# Smallest sample of a pair: the special tokens, and a few tokens of text in each part.
SHORTEST_PAIR = 8


def hf_rules(config: Config, family: Family, args: DecoderArgs) -> Iterator[SettingError]:
    """Yields broken rules between the model's family and its Hugging Face form."""
    if family.hf_config is None:
        message = NO_HF_CONFIG.format(family.name)
    else:
        message = unsupported_in_hf(args, family.hf_config)
    for key in ("initial_load_hf", "last_save_hf"):
        if message and getattr(config.checkpoint, key):
            yield SettingError(
                (f"checkpoint.{key}", "model.name"),
                f"{message}: remove checkpoint.{key}, or choose another model",
            )


def objective_rules(config: Config, family: Family) -> Iterator[SettingError]:
    """Yields broken rules between the family's objective and the data."""
    masked, data = config.masked_lm, config.data
    if family.objective == "causal_lm":
        for key, field in MaskedLM.model_fields.items():
            if getattr(masked, key) != field.default:
                yield SettingError(
                    ("model.name", f"masked_lm.{key}"),
                    f"{key} does not apply to family {quote(family.name)}, which learns the next "
                    f"token: remove masked_lm.{key}",
                )
        if config.training.loss_positions == "labelled" and data.packing in ("concat", "fixed"):
            yield SettingError(
                ("training.loss_positions", "data.packing"),
                'loss_positions = "labelled" does not apply to data.packing = '
                f"{quote(data.packing)}, where every position has a label: set "
                'training.loss_positions = "all"',
            )
        return
    if data.packing != "concat":
        yield SettingError(
            ("model.name", "data.packing"),
            f"data.packing = {quote(data.packing)} does not apply to family {quote(family.name)}, "
            'whose samples are built by [masked_lm]: set data.packing = "concat"',
        )
    if config.attention.kernel == "cudnn":
        yield SettingError(
            ("model.name", "attention.kernel"),
            'attention.kernel = "cudnn" does not support the attention masks of family '
            f'{quote(family.name)}, which hide padding; set attention.kernel = "flash2"',
        )
    if config.training.seq_len < SHORTEST_PAIR:
        yield SettingError(
            ("model.name", "training.seq_len"),
            f"training.seq_len ({config.training.seq_len}) must be at least {SHORTEST_PAIR} for "
            f"family {quote(family.name)}, whose samples are two texts and their special tokens",
        )
    if masked.next_sentence and data.shuffle_buffer < 2 * data.num_streams:
        yield SettingError(
            ("masked_lm.next_sentence", "data.num_streams", "data.shuffle_buffer"),
            f"data.shuffle_buffer ({data.shuffle_buffer}) must be at least 2 x data.num_streams "
            f"({data.num_streams}) = {2 * data.num_streams} if masked_lm.next_sentence is true: a "
            "pair needs two documents of one stream",
        )


def optimizer_rules(config: Config, family: Family) -> Iterator[SettingError]:
    """Yields broken rules between Muon, the precision and the family."""
    section, plan = config.optimizer, family.tp_plan
    if not isinstance(section, Muon):
        return
    if config.training.param_dtype == "float16":
        yield SettingError(
            ("training.param_dtype", "optimizer.name"),
            'optimizer.name = "Muon" is not tested with the loss scaling of training.param_dtype = '
            '"float16"; set training.param_dtype = "bfloat16"',
        )
    has_group = any(group.algorithm == "muon" for group in section.groups)
    if not has_group and not any((row.kind or KINDS.get(row.role)) in MATRIX_KINDS for row in plan):
        yield SettingError(
            ("optimizer.name", "model.name"),
            f"family {quote(family.name)} does not mark the matrices that Muon can train (its "
            'tp_plan marks none); set algorithm = "muon" in a table of [[optimizer.groups]]',
        )
    if section.per_head and not any(row.matches("layers.0.attention.wk") for row in plan):
        yield SettingError(
            ("optimizer.per_head", "model.name"),
            f"per_head requires layers.*.attention.wk, which family {quote(family.name)} does not "
            "have: set optimizer.per_head = false",
        )


def model_rules(config: Config, args: DecoderArgs) -> Iterator[SettingError]:
    """Yields broken rules between the model's sizes, the sequence and the degrees."""
    seq_len, tp, data = config.training.seq_len, config.parallel.tp, config.data
    if data.packing == "fixed" and data.packing_block > args.max_seq_len:
        yield SettingError(
            ("data.packing_block", "model.max_seq_len"),
            f"packing_block ({data.packing_block}) must be at most the model's max_seq_len "
            f"({args.max_seq_len})",
        )
    if data.packing != "fixed" and seq_len > args.max_seq_len:
        yield SettingError(
            ("training.seq_len", "model.max_seq_len"),
            f"seq_len ({seq_len}) must be at most the model's max_seq_len ({args.max_seq_len})",
        )
    heads, cp = args.num_heads // tp, config.parallel.cp
    if config.parallel.cp_method == "ulysses" and args.num_heads % tp == 0 and heads % cp:
        # "ring" does not keep attention inside documents.
        other = "all_gather" if data.masks_attention else "ring"
        yield SettingError(
            ("parallel.cp", "parallel.cp_method", "parallel.tp", "model.num_heads"),
            f"num_heads ({args.num_heads}) / parallel.tp ({tp}) = {heads} must be a multiple of "
            f'parallel.cp ({cp}), which "ulysses" requires; set parallel.cp_method = '
            f"{quote(other)}",
        )
    parallel = config.parallel
    if args.tied_head and parallel.pp > 1 and parallel.schedule.is_v:
        yield SettingError(
            ("parallel.pp_schedule", "model.tied_head"),
            f'"{parallel.pp_schedule}" has the first and the last stage on one rank, which does '
            'not support a tied embedding; set parallel.pp_schedule = "Interleaved1F1B"',
        )
    section, layers = config.activation_checkpoint, args.num_layers
    if isinstance(section, FirstK) and section.first_k > layers:
        yield SettingError(
            ("activation_checkpoint.first_k", "model.num_layers"),
            f"first_k ({section.first_k}) must be at most the model's num_layers ({layers})",
        )
    if isinstance(section, FractionOfBlocks) and not section.layers(layers):
        yield SettingError(
            ("activation_checkpoint.fraction", "model.num_layers"),
            f"fraction ({section.fraction:g}) x num_layers ({layers}) rounds down to 0 layers; set "
            "a larger activation_checkpoint.fraction",
        )
    for name in config.checkpoint.allow_model_changes:
        known = ["name", *(field.name for field in dataclasses.fields(args))]
        if name not in known:
            yield SettingError(
                "checkpoint.allow_model_changes",
                f"{quote(name)} is not a setting of the model{did_you_mean(nearest(name, known))}",
            )
    yield from _head_rules(args)
    yield from _encoder_rules(config, args)
    yield from _moe_rules(config, args)
    if args.num_heads % args.num_kv_heads:
        yield SettingError(
            ("model.flavor", "model.num_heads", "model.num_kv_heads"),
            f"num_heads ({args.num_heads}) must be a multiple of num_kv_heads "
            f"({args.num_kv_heads})",
        )
    kernel = config.attention.kernel
    if args.attention_dropout and kernel not in ("auto", "math"):
        yield SettingError(
            ("model.flavor", "model.attention_dropout", "attention.kernel"),
            f"attention.kernel = {quote(kernel)} does not support model.attention_dropout "
            f'({args.attention_dropout:g}); set attention.kernel = "auto", or '
            "model.attention_dropout = 0",
        )
    if args.causal and args.attention_dropout and cp > 1:
        yield SettingError(
            ("parallel.cp", "model.flavor", "model.attention_dropout"),
            f"attention_dropout ({args.attention_dropout:g}) requires whole sequences, which "
            f"parallel.cp ({cp}) splits: set model.attention_dropout = 0 (hidden_dropout works)",
        )
    if args.positions == "learned":
        for key in ("rotary_fraction", "rope_theta"):
            if getattr(config.model, key) is not None:
                yield SettingError(
                    (f"model.{key}", "model.positions"),
                    f'{key} does not apply to positions = "learned", where nothing is rotated: '
                    f"remove model.{key}",
                )
    for name in ("num_heads", "num_kv_heads", "ffn_dim"):
        size, shown = getattr(args, name), ""
        if name == "ffn_dim" and isinstance(args, MoEArgs):
            # Routed experts are not split. Shared experts are: together they are one feed-forward.
            size *= args.shared_experts
            shown = f" x number of shared experts ({args.shared_experts})"
        if size % tp:
            yield SettingError(
                ("parallel.tp", f"model.{name}"),
                f"{name} ({getattr(args, name)}){shown} must be a multiple of parallel.tp ({tp})",
            )
    if args.padded_vocab_size % tp:
        yield SettingError(
            ("parallel.tp", "model.vocab_size"),
            f"the padded vocab_size ({args.padded_vocab_size}, a multiple of {VOCAB_MULTIPLE}) "
            f"must be a multiple of parallel.tp ({tp})",
        )


def _encoder_rules(config: Config, args: DecoderArgs) -> Iterator[SettingError]:
    """Yields features that only decoders or only pre-norm blocks support."""
    if not isinstance(args, EncoderArgs):
        return
    if (cp := config.parallel.cp) > 1:
        yield SettingError(
            ("model.name", "parallel.cp"),
            f"parallel.cp ({cp}) must be 1 for encoders, because context parallel requires causal "
            "attention",
        )
    for name in ("parallel_residual", "fp32_residual"):
        if args.post_norm and getattr(args, name):
            yield SettingError(
                ("model.name", "model.flavor", f"model.{name}"),
                f"{name} is not supported by post-norm models: set model.{name} = false",
            )


def _moe_rules(config: Config, args: DecoderArgs) -> Iterator[SettingError]:
    """Rules of Mixture of Experts."""
    if not isinstance(args, MoEArgs):
        if (ep := config.parallel.ep) > 1:
            yield SettingError(
                ("parallel.ep", "model.name"),
                f"parallel.ep ({ep}) must be 1 for family {quote(config.model.name)}, which has no "
                "experts",
            )
        return
    if isinstance(args, LatentArgs):
        yield from _latent_rules(config, args)
    if args.dense_layers >= args.num_layers:
        yield SettingError(
            ("model.flavor", "model.num_layers"),
            f"num_layers ({args.num_layers}) must be more than the flavor's number of dense first "
            f"blocks ({args.dense_layers})",
        )
    per_group = args.num_experts // args.groups
    if args.groups > 1 and (args.num_experts % args.groups or per_group < 2):
        yield SettingError(
            ("model.flavor", "model.num_experts"),
            f"num_experts ({args.num_experts}) must be a multiple of {args.groups} and at least "
            f"{2 * args.groups}: the flavor has {args.groups} equal groups of at least 2 experts",
        )
    elif args.num_experts >= args.top_k > args.kept_groups * per_group:
        yield SettingError(
            ("model.flavor", "model.num_experts", "model.top_k"),
            f"top_k ({args.top_k}) must be at most {args.kept_groups * per_group}, the number of "
            f"experts in the {args.kept_groups} groups that a token may go to",
        )
    if args.top_k > args.num_experts:
        yield SettingError(
            ("model.flavor", "model.num_experts", "model.top_k"),
            f"top_k ({args.top_k}) must be at most num_experts ({args.num_experts})",
        )
    if args.ffn != "swiglu" or args.ffn_bias:
        yield SettingError(
            ("model.ffn", "model.ffn_bias"),
            'experts require model.ffn = "swiglu" and model.ffn_bias = false',
        )
    parallel, dtype = config.parallel, config.training.param_dtype
    if args.balance_loss == "micro_batch":
        yield SettingError(
            "model.balance_loss",
            '"micro_batch" depends on training.local_batch_size, accumulation and the number of '
            'ranks, so that no two layouts train alike: set "sequence" or "global_lagged"',
        )
    if args.balance_loss == "none" and config.model.balance_coeff is not None:
        yield SettingError(
            "model.balance_coeff",
            'balance_coeff requires model.balance_loss, which is "none": set model.balance_loss, '
            "or remove model.balance_coeff",
        )
    if args.bias_rate and not args.route_bias:
        yield SettingError(
            ("model.bias_rate", "model.route_bias"),
            f"bias_rate ({args.bias_rate:g}) requires a bias: set model.route_bias = true, or "
            "model.bias_rate = 0",
        )
    if args.num_experts % parallel.ep:
        yield SettingError(
            ("parallel.ep", "model.flavor", "model.num_experts"),
            f"parallel.ep ({parallel.ep}) must divide num_experts ({args.num_experts})",
        )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield SettingError(
            ("model.name", "parallel.tp", "parallel.sequence_parallel"),
            f"tp ({parallel.tp}) requires sequence parallel for Mixture of Experts, because each "
            "rank routes its part of the sequence: set parallel.sequence_parallel = true",
        )
    if args.dense_dim % parallel.tp:
        yield SettingError(
            ("parallel.tp", "model.flavor"),
            f"the flavor's dense_dim ({args.dense_dim}) must be a multiple of parallel.tp "
            f"({parallel.tp})",
        )
    multiple = 4 if dtype == "float32" else 8
    for name in ("dim", "ffn_dim"):
        if (size := getattr(args, name)) % multiple:
            yield SettingError(
                ("model.flavor", f"model.{name}"),
                f"{name} ({size}) must be a multiple of {multiple} in {dtype}: grouped_mm requires "
                "rows of a multiple of 16 bytes",
            )


def _latent_rules(config: Config, args: LatentArgs) -> Iterator[SettingError]:
    """Yields settings that do not apply to latent attention."""
    others = ("head_dim", "qkv_bias", "out_bias", "qk_norm", "positions", "rotary_fraction")
    for name in others:
        if getattr(config.model, name) is not None:
            yield SettingError(
                f"model.{name}",
                f"{name} does not apply to multi-head latent attention: remove the key",
            )
    if args.num_heads > args.num_kv_heads:
        yield SettingError(
            ("model.num_heads", "model.num_kv_heads"),
            f"num_kv_heads ({args.num_kv_heads}) must be equal to num_heads ({args.num_heads}) in "
            "multi-head latent attention",
        )


def _head_rules(args: DecoderArgs) -> Iterator[SettingError]:
    """Checks that heads have one size, and an even number of rotated features."""
    if args.head_dim is None and args.dim % args.num_heads:
        yield SettingError(
            ("model.flavor", "model.dim", "model.num_heads"),
            f"dim ({args.dim}) must be a multiple of num_heads ({args.num_heads}), unless "
            "model.head_dim is set",
        )
    elif args.positions == "rotary" and (args.rotary_dim % 2 or not args.rotary_dim):
        yield SettingError(
            ("model.flavor", "model.dim", "model.num_heads", "model.rotary_fraction"),
            f"rotary_fraction ({args.rotary_fraction:g}) of the {args.head_size} features of a "
            f"head is {args.rotary_dim}; it must be even and at least 2",
        )
