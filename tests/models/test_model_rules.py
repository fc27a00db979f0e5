"""Rules between the configuration and the model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from titan_lite.config.load import ConfigError
from titan_lite.config.optimizers import Muon, OptimizerGroup
from titan_lite.config.schema import Config
from titan_lite.models.args import DecoderArgs
from titan_lite.models.bert import BERT, MEGATRON_BERT
from titan_lite.models.llama import LLAMA
from titan_lite.models.model_rules import model_rules, optimizer_rules
from titan_lite.models.plan import make_plan
from titan_lite.models.roles import PlanRow


def problems(overrides: Sequence[str], world_size: int = 1) -> list[tuple[str, str, str]]:
    with pytest.raises(ConfigError) as error:
        make_plan(None, overrides, world_size)
    return [(p.key, p.source, p.message) for p in error.value.problems]


def rules_broken(config: Config, args: DecoderArgs) -> list[tuple[tuple[str, ...], str]]:
    return [(error.keys, error.message) for error in model_rules(config, args)]


def test_a_sound_configuration_gives_dims_family_and_args() -> None:
    plan = make_plan(None, ["--model.num_layers=2"], world_size=4)
    assert plan.dims.dp_shard == 4
    assert plan.family is LLAMA
    assert plan.args.num_layers == 2


def test_a_sequence_longer_than_the_models_is_refused_with_both_numbers() -> None:
    assert problems(["--training.seq_len=4096"]) == [
        (
            "training.seq_len",
            "command line",
            "seq_len (4096) must be at most the model's max_seq_len (2048)",
        )
    ]


def test_a_long_row_of_blocks_is_as_long_as_its_blocks() -> None:
    long = ("--training.seq_len=8192", "--data.packing=fixed")
    make_plan(None, [*long, "--data.packing_block=2048"], world_size=1)
    [(key, _, message)] = problems([*long, "--data.packing_block=4096"])
    assert key == "data.packing_block"
    assert message == "packing_block (4096) must be at most the model's max_seq_len (2048)"


MOE = "--model.name=qwen3_moe"


@pytest.mark.parametrize(
    ("overrides", "world_size", "key", "message"),
    [
        (
            ["--model.top_k=9"],
            1,
            "model.top_k",
            "top_k (9) must be at most num_experts (8)",
        ),
        (
            ["--model.ffn=gelu"],
            1,
            "model.ffn",
            'experts require model.ffn = "swiglu" and model.ffn_bias = false',
        ),
        (
            ["--model.ffn_dim=36", "--training.param_dtype=bfloat16"],
            1,
            "model.ffn_dim",
            "ffn_dim (36) must be a multiple of 8 in bfloat16: grouped_mm requires rows of a "
            "multiple of 16 bytes",
        ),
        (
            ["--model.balance_loss=micro_batch"],
            1,
            "model.balance_loss",
            '"micro_batch" depends on training.local_batch_size, accumulation and the number of '
            'ranks, so that no two layouts train alike: set "sequence" or "global_lagged"',
        ),
        (
            ["--model.balance_loss=none", "--model.balance_coeff=0.1"],
            1,
            "model.balance_coeff",
            'balance_coeff requires model.balance_loss, which is "none": set model.balance_loss, '
            "or remove model.balance_coeff",
        ),
        (
            ["--model.bias_rate=0.001"],
            1,
            "model.bias_rate",
            "bias_rate (0.001) requires a bias: set model.route_bias = true, or "
            "model.bias_rate = 0",
        ),
        (
            ["--parallel.ep=3"],
            3,
            "parallel.ep",
            "parallel.ep (3) must divide num_experts (8)",
        ),
        (
            ["--parallel.ep=8"],
            4,
            "parallel.ep",
            "parallel.ep (8) must divide dp_shard (4) x cp (1) x tp (1) = 4, the number of ranks "
            "over which experts can be distributed",
        ),
        (
            ["--parallel.tp=2", "--parallel.dp_replicate=2", "--parallel.ep=4"],
            4,
            "parallel.tp",
            "parallel.ep (4) must divide dp_shard (1) x cp (1) x tp (2) = 2, the number of ranks "
            "over which experts can be distributed",
        ),
        (
            ["--parallel.ep=2", "--model.name=llama"],
            2,
            "model.name",
            'parallel.ep (2) must be 1 for family "llama", which has no experts',
        ),
        (
            ["--parallel.tp=2", "--parallel.sequence_parallel=false"],
            2,
            "parallel.sequence_parallel",
            "tp (2) requires sequence parallel for Mixture of Experts, because each rank routes "
            "its part of the sequence: set parallel.sequence_parallel = true",
        ),
    ],
)
def test_what_experts_cannot_do_is_refused(
    overrides: list[str], world_size: int, key: str, message: str
) -> None:
    [(found_key, _, actual)] = problems([MOE, *overrides], world_size)
    assert (found_key, actual) == (key, message)


DEEPSEEK = "--model.name=deepseek_v3"


@pytest.mark.parametrize(
    ("overrides", "world_size", "key", "message"),
    [
        (
            ["--model.num_layers=1"],
            1,
            "model.num_layers",
            "num_layers (1) must be more than the flavor's number of dense first blocks (1)",
        ),
        (
            ["--model.num_experts=10"],
            1,
            "model.num_experts",
            "num_experts (10) must be a multiple of 4 and at least 8: the flavor has 4 equal "
            "groups of at least 2 experts",
        ),
        (
            ["--model.top_k=5"],
            1,
            "model.top_k",
            "top_k (5) must be at most 4, the number of experts in the 2 groups that a token may "
            "go to",
        ),
        (
            ["--model.num_heads=16"],
            1,
            "model.num_heads",
            "num_kv_heads (8) must be equal to num_heads (16) in multi-head latent attention",
        ),
        (
            ["--model.head_dim=32"],
            1,
            "model.head_dim",
            "head_dim does not apply to multi-head latent attention: remove the key",
        ),
        (
            ["--model.positions=learned"],
            1,
            "model.positions",
            "positions does not apply to multi-head latent attention: remove the key",
        ),
        (
            ["--parallel.tp=8", "--model.ffn_dim=196", "--training.param_dtype=float32"],
            8,
            "model.ffn_dim",
            "ffn_dim (196) x number of shared experts (1) must be a multiple of parallel.tp (8)",
        ),
        (
            ["--optimizer.name=Muon", "--optimizer.per_head=true"],
            1,
            "model.name",
            'per_head requires layers.*.attention.wk, which family "deepseek_v3" does not have: '
            "set optimizer.per_head = false",
        ),
    ],
)
def test_what_latent_attention_and_groups_cannot_do_is_refused(
    overrides: list[str], world_size: int, key: str, message: str
) -> None:
    [(found_key, _, actual)] = problems([DEEPSEEK, *overrides], world_size)
    assert (found_key, actual) == (key, message)


def test_rows_of_experts_may_be_4_numbers_of_float32() -> None:
    plan = make_plan(None, [MOE, "--model.ffn_dim=36", "--training.param_dtype=float32"], 1)
    assert plan.args.ffn_dim == 36


def test_the_key_that_somebody_set_is_blamed() -> None:
    [(key, source, _)] = problems(["--model.max_seq_len=64"])
    assert (key, source) == ("model.max_seq_len", "command line")


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    [(key, _, message)] = problems(["--model.num_heads=12"])
    assert key == "model.num_heads"
    assert message == (
        "dim (256) must be a multiple of num_heads (12), unless model.head_dim is set"
    )
    make_plan(None, ["--model.num_heads=12", "--model.head_dim=16"], world_size=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--model.dim=24", "--model.num_heads=8"],
            "rotary_fraction (1) of the 3 features of a head is 3; it must be even and at least 2",
        ),
        (
            ["--model.num_heads=8", "--model.rotary_fraction=0.01"],
            "rotary_fraction (0.01) of the 32 features of a head is 0; it must be even and "
            "at least 2",
        ),
    ],
)
def test_heads_that_cannot_be_rotated_in_pairs_are_refused(
    overrides: list[str], message: str
) -> None:
    [(key, _, actual)] = problems(overrides)
    assert (key, actual) == (overrides[-1].removeprefix("--").partition("=")[0], message)


def test_rotation_cannot_be_set_where_positions_are_learned() -> None:
    actual = problems(["--model.name=gpt", "--model.rope_theta=1e6", "--model.rotary_fraction=0.5"])
    assert {(key, message) for key, _, message in actual} == {
        (
            f"model.{key}",
            f'{key} does not apply to positions = "learned", where nothing is rotated: '
            f"remove model.{key}",
        )
        for key in ("rope_theta", "rotary_fraction")
    }


def test_query_heads_that_kv_heads_do_not_divide_are_refused() -> None:
    assert problems(["--model.num_kv_heads=3"]) == [
        (
            "model.num_kv_heads",
            "command line",
            "num_heads (8) must be a multiple of num_kv_heads (3)",
        )
    ]


def test_heads_that_tp_does_not_divide_are_refused() -> None:
    config = Config.model_validate({"parallel": {"tp": 8}})
    assert rules_broken(config, LLAMA.flavors["debug"]) == [
        (
            ("parallel.tp", "model.num_kv_heads"),
            "num_kv_heads (4) must be a multiple of parallel.tp (8)",
        )
    ]
    config = Config.model_validate({"parallel": {"tp": 3}})
    broken = [message for _, message in rules_broken(config, LLAMA.flavors["debug"])]
    assert broken[0] == "num_heads (8) must be a multiple of parallel.tp (3)"
    assert broken[-1] == (
        "the padded vocab_size (2048, a multiple of 128) must be a multiple of parallel.tp (3)"
    )
    args = replace(LLAMA.flavors["debug"], ffn_dim=129)
    config = Config.model_validate({"parallel": {"tp": 2}})
    assert rules_broken(config, args) == [
        (("parallel.tp", "model.ffn_dim"), "ffn_dim (129) must be a multiple of parallel.tp (2)")
    ]


def test_a_tied_embedding_is_not_held_twice_by_a_rank() -> None:
    def broken(schedule: str) -> list[str]:
        parallel = {"pp": 2, "pp_schedule": schedule}
        config = Config.model_validate({"parallel": parallel})
        args = replace(LLAMA.flavors["debug"], tied_head=True)
        return [message for _, message in rules_broken(config, args)]

    assert broken("DualPipeV") == [
        '"DualPipeV" has the first and the last stage on one rank, which does not support a '
        'tied embedding; set parallel.pp_schedule = "Interleaved1F1B"'
    ]
    assert not broken("1F1B")


def test_heads_that_ulysses_cannot_deal_to_the_ranks_are_refused() -> None:
    def broken(packing: str = "concat", **parallel: object) -> list[str]:
        config = Config.model_validate({"parallel": parallel, "data": {"packing": packing}})
        return [message for _, message in rules_broken(config, LLAMA.flavors["debug"])]

    # "ring" would be refused.
    [message] = broken("document", cp=8, tp=2, cp_method="ulysses")
    assert message.endswith('set parallel.cp_method = "all_gather"')
    assert broken(cp=8, tp=2, cp_method="ulysses") == [
        "num_heads (8) / parallel.tp (2) = 4 must be a multiple of parallel.cp (8), which "
        '"ulysses" requires; set parallel.cp_method = "ring"'
    ]
    assert not broken(cp=8, tp=2, cp_method="ring")
    # 4 key/value heads: repeated for 8 ranks.
    assert not broken(cp=8, cp_method="ulysses")


def test_weights_of_attention_are_not_dropped_where_no_rank_has_all_of_a_sequence() -> None:
    config = Config.model_validate({"parallel": {"cp": 2}})
    dropping = replace(LLAMA.flavors["debug"], hidden_dropout=0.1, attention_dropout=0.1)
    assert rules_broken(config, dropping) == [
        (
            ("parallel.cp", "model.flavor", "model.attention_dropout"),
            "attention_dropout (0.1) requires whole sequences, which parallel.cp (2) splits: set "
            "model.attention_dropout = 0 (hidden_dropout works)",
        )
    ]
    assert not rules_broken(config, replace(dropping, attention_dropout=0.0))
    config = Config.model_validate({"attention": {"kernel": "flash2"}})
    assert rules_broken(config, dropping) == [
        (
            ("model.flavor", "model.attention_dropout", "attention.kernel"),
            'attention.kernel = "flash2" does not support model.attention_dropout (0.1); set '
            'attention.kernel = "auto", or model.attention_dropout = 0',
        )
    ]


def test_an_encoder_is_not_split_over_the_sequences_of_causal_attention() -> None:
    config = Config.model_validate({"parallel": {"cp": 2}, "training": {"seq_len": 512}})
    assert rules_broken(config, BERT.flavors["base"]) == [
        (
            ("model.name", "parallel.cp"),
            "parallel.cp (2) must be 1 for encoders, because context parallel requires causal "
            "attention",
        )
    ]


@pytest.mark.parametrize("name", ["parallel_residual", "fp32_residual"])
def test_a_residual_stream_that_is_normalised_is_neither_parallel_nor_kept_wide(name: str) -> None:
    config = Config.model_validate({"training": {"seq_len": 512}})
    given = {name: True}
    assert rules_broken(config, replace(BERT.flavors["base"], **given)) == [
        (
            ("model.name", "model.flavor", f"model.{name}"),
            f"{name} is not supported by post-norm models: set model.{name} = false",
        )
    ]
    assert not rules_broken(config, replace(MEGATRON_BERT.flavors["base"], **given))


def test_a_sequence_longer_than_the_table_of_positions_is_refused_with_both_numbers() -> None:
    actual = problems(["--model.name=bert", "--model.flavor=base", "--training.seq_len=1024"])
    messages = [message for _, _, message in actual]
    assert "seq_len (1024) must be at most the model's max_seq_len (512)" in messages


def test_problems_of_the_configuration_and_of_the_model_come_together(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\nflavor = "debgu"\n[parallel]\ndp_shard = 3\n')
    with pytest.raises(ConfigError) as error:
        make_plan(file, world_size=2)
    actual = {(p.key, p.source) for p in error.value.problems}
    assert actual == {("model.flavor", str(file)), ("parallel.dp_shard", str(file))}
    assert 'did you mean "debug"?' in str(error.value)


def test_problems_of_loading_come_first_and_alone() -> None:
    overrides = ["--job.x=1", "--training.steps=0", "--model.name=foo"]
    with pytest.raises(ConfigError) as error:
        make_plan(None, overrides, world_size=3)
    assert [problem.key for problem in error.value.problems] == ["job.x", "training.steps"]


def test_broken_rules_of_the_configuration_and_of_the_model_come_together() -> None:
    overrides = ["--data.dataset_path=nope", "--parallel.dp_replicate=2", "--model.name=foo"]
    keys = [key for key, _, _ in problems(overrides, world_size=3)]
    assert keys == ["data.dataset_path", "parallel.dp_replicate", "model.name"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "data.packing=none",
            'data.packing = "none" does not apply to family "bert", whose samples are built by '
            '[masked_lm]: set data.packing = "concat"',
        ),
        (
            "attention.kernel=cudnn",
            'attention.kernel = "cudnn" does not support the attention masks of family "bert", '
            'which hide padding; set attention.kernel = "flash2"',
        ),
        (
            "training.seq_len=7",
            'training.seq_len (7) must be at least 8 for family "bert", whose samples are two '
            "texts and their special tokens",
        ),
        (
            "data.shuffle_buffer=127",
            "data.shuffle_buffer (127) must be at least 2 x data.num_streams (64) = 128 if "
            "masked_lm.next_sentence is true: a pair needs two documents of one stream",
        ),
    ],
)
def test_what_a_masked_language_model_cannot_make_samples_of_is_refused(
    setting: str, message: str
) -> None:
    bert = ["--model.name=bert", "--masked_lm.next_sentence=true", "--model.attention_dropout=0"]
    short = [*bert, "--training.seq_len=512"]
    make_plan(None, short, world_size=1)
    # The error names the key that bert restricts, not another one that was set.
    key, _, _ = setting.partition("=")
    assert problems([*short, f"--{setting}"]) == [(key, "command line", message)]


def test_keys_of_another_objective_are_refused() -> None:
    settings = ["--masked_lm.mask_prob=0.2", "--training.loss_positions=labelled"]
    assert problems([*settings, "--model.name=llama"]) == [
        (
            "masked_lm.mask_prob",
            "command line",
            'mask_prob does not apply to family "llama", which learns the next token: remove '
            "masked_lm.mask_prob",
        ),
        (
            "training.loss_positions",
            "command line",
            'loss_positions = "labelled" does not apply to data.packing = "concat", where '
            'every position has a label: set training.loss_positions = "all"',
        ),
    ]
    padded = ["--data.packing=none", "--training.loss_positions=labelled"]
    make_plan(None, padded, world_size=1)


def test_pairs_are_made_of_a_buffer_that_nothing_shuffles(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def warnings(*overrides: str) -> list[str]:
        caplog.clear()
        settings = ["--data.shuffle=false", "--data.shuffle_buffer=500", "--training.seq_len=512"]
        settings.append("--model.attention_dropout=0")
        make_plan(None, [*settings, *overrides], world_size=1)
        return caplog.messages

    idle = ["data.shuffle_buffer (command line) has no effect because data.shuffle is false"]
    assert warnings("--model.name=bert") == []
    assert warnings("--model.name=bert", "--masked_lm.next_sentence=false") == idle
    assert warnings("--model.name=llama") == idle


def test_muon_is_refused_where_it_is_not_proven_or_has_no_matrices() -> None:
    muon = "--optimizer.name=Muon"
    [(key, _, message)] = problems([muon, "--training.param_dtype=float16"])
    assert key == "optimizer.name"
    assert message == (
        'optimizer.name = "Muon" is not tested with the loss scaling of training.param_dtype = '
        '"float16"; set training.param_dtype = "bfloat16"'
    )
    config = make_plan(None, [muon, "--optimizer.per_head=true"], 1).config
    nameless = replace(LLAMA, name="mine", tp_plan=(PlanRow("blocks.*", "whole"),))
    assert [(error.keys[0], error.message) for error in optimizer_rules(config, nameless)] == [
        (
            "optimizer.name",
            'family "mine" does not mark the matrices that Muon can train (its tp_plan marks '
            'none); set algorithm = "muon" in a table of [[optimizer.groups]]',
        ),
        (
            "optimizer.per_head",
            'per_head requires layers.*.attention.wk, which family "mine" does not have: set '
            "optimizer.per_head = false",
        ),
    ]
    group = OptimizerGroup(pattern="blocks.*", algorithm="muon")
    named = config.model_copy(update={"optimizer": Muon(groups=[group])})
    assert list(optimizer_rules(named, nameless)) == []
