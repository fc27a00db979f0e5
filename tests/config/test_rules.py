"""Rules between keys: refused with the numbers, or warned about where a setting has no effect."""

import contextlib
import importlib
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from titan_lite.config.dims import ParallelDims
from titan_lite.config.load import ConfigError, Problem, load_config
from titan_lite.config.render import to_toml
from titan_lite.models.plan import Plan, make_plan

PP2 = ("parallel.pp=2", "training.global_batch_size=8")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan_of(*settings: str, world_size: int = 1) -> Plan:
    return make_plan(None, [f"--{setting}" for setting in settings], world_size)


def check(*settings: str, world_size: int = 1) -> ParallelDims:
    return plan_of(*settings, world_size=world_size).dims


def broken(*settings: str, world_size: int = 1) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as error:
        check(*settings, world_size=world_size)
    return error.value.problems


REFUSED: list[tuple[list[str], int, str, str]] = [
    (
        ["parallel.tp=2", "parallel.reshard_after_forward=2"],
        8,
        "parallel.reshard_after_forward",
        "reshard_after_forward = 2, an integer, cannot be combined with parallel.tp (2): FSDP2 ",
    ),
    (
        ["parallel.cp=2", "data.packing=document"],
        2,
        "data.packing",
        '"document" keeps attention inside documents, which parallel.cp_method = "ring"',
    ),
    (
        ["data.packing=fixed", "data.packing_block=96"],
        1,
        "data.packing",
        '"fixed" requires data.packing_block (96) to divide training.seq_len',
    ),
    (
        ["data.packing=fixed"],
        1,
        "data.packing",
        "(2048) to divide training.seq_len (2048) into at least 2 blocks; if a sample is to be one",
    ),
    (
        ["parallel.pp=4", "training.global_batch_size=3"],
        4,
        "training.global_batch_size",
        'with parallel.pp = 4, "1F1B" requires at least 4 micro-batches per step, got 3 = '
        "global_batch_size (3) / (local_batch_size (1) x data-parallel degree (1 at world size "
        "4)); set training.global_batch_size = 4",
    ),
    (
        [*PP2, "training.local_batch_size=8"],
        2,
        "training.global_batch_size",
        "got 1 = global_batch_size (8) / (local_batch_size (8) x data-parallel degree (1 at world "
        "size 2)); set training.global_batch_size = 16 or training.local_batch_size = 4",
    ),
    (
        ["parallel.pp=2", "training.local_batch_size=8", "training.global_batch_size=-1"],
        2,
        "training.global_batch_size",
        # A smaller micro-batch alone would not help.
        "got 1, because training.global_batch_size is -1; set training.global_batch_size = 16",
    ),
    (
        [*PP2, "training.global_batch_size=3", 'parallel.pp_schedule="Interleaved1F1B"'],
        2,
        "training.global_batch_size",
        "got 3 = global_batch_size (3) / (local_batch_size (1) x data-parallel degree (1 at world "
        "size 2)); set training.global_batch_size = 4",
    ),
    (
        [*PP2, 'parallel.pp_schedule="Interleaved1F1B"', "parallel.pp_micro_batches=1"],
        2,
        "parallel.pp_micro_batches",
        'with parallel.pp = 2, "Interleaved1F1B" requires a multiple of 2 micro-batches in a '
        "pass, but parallel.pp_micro_batches is 1; set it to -1 (all 8 of a step), or to a "
        "divisor of 8 that is a multiple of 2",
    ),
    (
        [*PP2, "parallel.pp_schedule=DualPipeV", "parallel.pp_micro_batches=2"],
        2,
        "parallel.pp_micro_batches",
        'with parallel.pp = 2, "DualPipeV" requires at least 4 micro-batches in a pass, but '
        "parallel.pp_micro_batches is 2; set it to -1 (all 8 of a step), or to a divisor of 8 that "
        "is at least 4",
    ),
    (
        [*PP2, "parallel.pp_micro_batches=3"],
        2,
        "parallel.pp_micro_batches",
        "pp_micro_batches (3) must divide the number of micro-batches of a step: 8 = "
        "global_batch_size (8) / (local_batch_size (1) x data-parallel degree (1 at world size 2))",
    ),
    (
        [*PP2, "parallel.pp_schedule=ZBVZeroBubble", "compile.enable=true"],
        2,
        "parallel.pp_schedule",
        "computes input and weight gradients separately, which torch does not support for compiled",
    ),
    (
        [
            *PP2,
            "parallel.pp_schedule=InterleavedZeroBubble",
            "activation_checkpoint.mode=selective_op",
        ],
        2,
        "parallel.pp_schedule",
        'recompute a "selective_op" block for one of them only; set activation_checkpoint.mode',
    ),
    (
        [*PP2, "parallel.pp_split=explicit", 'parallel.pp_stage_modules=[["layers.0"], []]'],
        2,
        "parallel.pp_stage_modules",
        'pp_split = "explicit" requires parallel.pp_stage_modules to list 2 stages ("1F1B" on 2 '
        "ranks), each with at least one module; it lists 2, 1 without a module",
    ),
    (
        [*PP2, "parallel.pp_split=explicit"],
        2,
        "parallel.pp_split",
        "each with at least one module; it lists 0",
    ),
    (
        ["parallel.dp_shard=4", "parallel.dp_replicate=2"],
        6,
        "parallel.dp_shard",
        "the degrees must multiply to the world size (6), got pp (1) x dp_replicate (2) x "
        "dp_shard (4) x cp (1) x tp (1)",
    ),
    (
        ["parallel.dp_replicate=4"],
        6,
        "parallel.dp_replicate",
        "with dp_shard = -1, the world size (6) must be a positive multiple of pp (1) x "
        "dp_replicate (4) x cp (1) x tp (1) = 4; lower a degree, or use a multiple of 4 processes",
    ),
    (
        ["checkpoint.initial_load_hf=.", 'checkpoint.exclude_from_loading=["output.*"]'],
        1,
        "checkpoint.exclude_from_loading",
        "cannot be combined with checkpoint.initial_load_hf, which loads all parameters; conv",
    ),
    (["data.dataset_path=none[0].txt"], 1, "data.dataset_path", "no such file"),
    (["data.dataset_path=~/no/such/x.txt"], 1, "data.dataset_path", "and no folder"),
    ([f"data.dataset_path={'x' * 300}"], 1, "data.dataset_path", "no such file"),
    ([f"data.tokenizer_path={'x' * 300}/a"], 1, "data.tokenizer_path", "no such file"),
    ([], 0, "parallel.dp_shard", "the world size (0) must be a positive multiple of"),
    (
        ["training.global_batch_size=12", "training.local_batch_size=2"],
        4,
        "training.global_batch_size",
        "global_batch_size (12) must be a multiple of training.local_batch_size (2) x "
        "data-parallel degree (4) = 8 at world size 4 (to change it: --world-size, or NGPU x "
        "NNODES)",
    ),
    (
        ["parallel.reshard_after_forward=3"],
        8,
        "parallel.reshard_after_forward",
        "reshard_after_forward (3) must be above 1, below the FSDP degree and divide it; the FSDP "
        "degree is 8 at world size 8 (to change it: --world-size, or NGPU x NNODES): use 2 or 4",
    ),
    (
        ["parallel.reshard_after_forward=8"],
        8,
        "parallel.reshard_after_forward",
        "use 2 or 4",
    ),
    (
        ["parallel.reshard_after_forward=3"],
        4,
        "parallel.reshard_after_forward",
        "the FSDP degree is 4 at world size 4 (to change it: --world-size, or NGPU x NNODES): use "
        "2",
    ),
    (
        ["parallel.reshard_after_forward=2"],
        2,
        "parallel.reshard_after_forward",
        'use "always" or "never"',
    ),
    (
        ["checkpoint.load_step=20"],
        1,
        "checkpoint.load_step",
        "load_step = 20 requires checkpoint.enable = true: without it the run neither reads nor",
    ),
    (
        ["checkpoint.enable=true", "checkpoint.load_step=20", "training.steps=20"],
        1,
        "checkpoint.load_step",
        "load_step (20) must be below training.steps (20): no step would be trained",
    ),
    (
        ["checkpoint.initial_load_path=."],
        1,
        "checkpoint.initial_load_path",
        '"." requires checkpoint.enable = true',
    ),
    (
        ["checkpoint.enable=true", "checkpoint.initial_load_path=no/such"],
        1,
        "checkpoint.initial_load_path",
        'no such folder: "no/such", and no folder "no"',
    ),
    (
        ["checkpoint.enable=true", f"checkpoint.initial_load_path={__file__}"],
        1,
        "checkpoint.initial_load_path",
        f'must be a folder, got the file "{__file__}"',
    ),
    (
        ["checkpoint.enable=true", "checkpoint.interval=4", "checkpoint.keep_every=6"],
        1,
        "checkpoint.keep_every",
        "keep_every (6) must be a multiple of checkpoint.interval (4)",
    ),
    (
        ["checkpoint.folder=a/../../b"],
        1,
        "checkpoint.folder",
        '"a/../../b" is outside of job.dump_folder',
    ),
    (
        ["profiling.enable_profiling=true", "profiling.profile_freq=2"],
        1,
        "profiling.profile_freq",
        "profile_freq (2) must be at least 3, the steps recorded in each period",
    ),
    (
        ["parallel.async_tp=true", "parallel.sequence_parallel=false"],
        1,
        "parallel.async_tp",
        "async_tp = true requires compile.enable = true and parallel.tp > 1 and "
        "parallel.sequence_parallel = true",
    ),
    (
        ["attention.kernel=flash3", "training.param_dtype=float32"],
        1,
        "attention.kernel",
        'attention.kernel = "flash3" does not support training.param_dtype = "float32"; set '
        'training.param_dtype = "bfloat16", or attention.kernel = "math"',
    ),
    (
        ["attention.kernel=cudnn", "data.packing=document"],
        1,
        "attention.kernel",
        '"cudnn" does not support attention inside documents (data.packing = "document"); set',
    ),
    (
        ["attention.kernel=cudnn", "training.deterministic=true"],
        1,
        "attention.kernel",
        '"cudnn" is not deterministic; set training.deterministic = false, or attention.kernel',
    ),
    (
        ["attention.kernel=math", "parallel.cp=2"],
        2,
        "attention.kernel",
        '"math" returns no log-sum-exp, which parallel.cp_method = "ring" requires; set paral',
    ),
    (
        [
            "parallel.fsdp_symm_mem=true",
            "parallel.async_tp=true",
            "parallel.tp=2",
            "compile.enable=true",
        ],
        4,
        "parallel.fsdp_symm_mem",
        "fsdp_symm_mem = true cannot be combined with parallel.async_tp = true: a process can",
    ),
    (
        ["optimizer.state_dtype=bfloat16", "optimizer.beta2=0.999"],
        1,
        "optimizer.beta2",
        'beta2 (0.999) must be at most 0.99 with optimizer.state_dtype = "bfloat16"',
    ),
    (
        [
            "optimizer.state_dtype=int8",
            "checkpoint.enable=true",
            "checkpoint.async_mode=async_pinned",
        ],
        1,
        "checkpoint.async_mode",
        '"async_pinned" copies tensors, which torchao does not support for '
        'optimizer.state_dtype = "int8"; set checkpoint.async_mode = "disabled"',
    ),
    (
        ['optimizer.groups=[{pattern="*", algorithm="Muon"}]'],
        1,
        "optimizer.groups",
        'table 1: optimizer.name = "AdamW" has no algorithm "Muon"; remove the key algorithm',
    ),
    (
        ["data.dataset_path=texts/*.jsonl"],
        1,
        "data.dataset_path",
        'no such file: "texts/*.jsonl", and no folder "texts"',
    ),
    (
        ["data.dataset_path=HuggingFaceFW/fineweb"],
        1,
        "data.dataset_path",
        'no such file: "HuggingFaceFW/fineweb", and no folder "HuggingFaceFW"; names on the '
        "Hugging Face hub are not fetched: run hf download HuggingFaceFW/fineweb --repo-type "
        'dataset --local-dir DIR, and set data.dataset_path = "DIR", or set data.dataset = '
        '"HuggingFaceFW/fineweb" to stream it',
    ),
    (
        ["validation.dataset_path=hf://datasets/allenai/c4"],
        1,
        "validation.dataset_path",
        "hf download allenai/c4 --repo-type dataset --local-dir DIR, and set "
        'validation.dataset_path = "DIR", or set validation.dataset = "allenai/c4" to stream',
    ),
    (
        ["data.tokenizer_path=meta-llama/Llama-3.1-8B"],
        1,
        "data.tokenizer_path",
        "not fetched: run hf download meta-llama/Llama-3.1-8B --local-dir DIR, and set "
        'data.tokenizer_path = "DIR"',
    ),
    (
        ["checkpoint.enable=true", "checkpoint.initial_load_hf=gpt2"],
        1,
        "checkpoint.initial_load_hf",
        'no such folder: "gpt2"; names on the Hugging Face hub are not fetched: run '
        'hf download gpt2 --local-dir DIR, and set checkpoint.initial_load_hf = "DIR"',
    ),
    (
        ["checkpoint.enable=true", "checkpoint.initial_load_path=Qwen/Qwen2.5-0.5B"],
        1,
        "checkpoint.initial_load_path",
        "hf download Qwen/Qwen2.5-0.5B --local-dir DIR, and set checkpoint.initial_load_hf",
    ),
    (
        ["data.dataset_path=s3://bucket/part.jsonl"],
        1,
        "data.dataset_path",
        'no such file: "s3://bucket/part.jsonl"; addresses are not fetched: download to DIR, '
        'and set data.dataset_path = "DIR"',
    ),
    (
        ["data.tokenizer_path=tokenizer.model"],
        1,
        "data.tokenizer_path",
        'no such file: "tokenizer.model"; did you mean "tokeniser.model"?',
    ),
    (
        ["job.dump_folder=tokeniser.model/run"],
        1,
        "job.dump_folder",
        'cannot be created: "tokeniser.model" is a file',
    ),
]


@pytest.mark.parametrize(("settings", "world_size", "key", "message"), REFUSED)
def test_what_cannot_work_is_refused_with_the_numbers(
    settings: list[str], world_size: int, key: str, message: str
) -> None:
    Path("tokeniser.model").write_text("")
    (problem,) = broken(*settings, world_size=world_size)
    assert problem.key == key
    assert problem.source == ("command line" if settings else "default")
    assert message in problem.message


@pytest.mark.parametrize(
    ("settings", "world_size"), [(row[0], row[1]) for row in REFUSED if len(row[0]) > 1]
)
def test_an_override_that_contradicts_a_valid_file_is_blamed(
    settings: list[str], world_size: int
) -> None:
    Path("tokeniser.model").write_text("")
    for override in settings:
        others = [f"--{setting}" for setting in settings if setting != override]
        with contextlib.suppress(ConfigError):
            make_plan(None, others, world_size)
            Path("run.toml").write_text(to_toml(load_config(None, others)))
            with pytest.raises(ConfigError) as error:
                make_plan("run.toml", [f"--{override}"], world_size)
            blamed = {(p.key, p.source) for p in error.value.problems}
            assert blamed == {(override.partition("=")[0], "command line")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["parallel.cp=4"], "seq_len (100) must be a multiple of 2 x parallel.cp (4) = 8"),
        (
            ["parallel.cp=4", "parallel.cp_method=all_gather"],
            "seq_len (100) must be a multiple of 2 x parallel.cp (4) = 8",
        ),
        (
            ["parallel.cp=3", "parallel.cp_method=ulysses"],
            "seq_len (100) must be a multiple of parallel.cp (3)",
        ),
        (["parallel.tp=3"], "seq_len (100) must be a multiple of parallel.tp (3)"),
        (
            ["parallel.cp=4", "parallel.cp_method=ulysses", "parallel.tp=2"],
            "seq_len (100) / parallel.cp (4) = 25 must be a multiple of parallel.tp (2)",
        ),
    ],
)
def test_sequences_must_divide_over_the_context_and_tensor_axes(
    settings: list[str], message: str
) -> None:
    actual = broken(*settings, "training.seq_len=100", world_size=24)
    assert [p.message for p in actual if p.key == "training.seq_len"] == [message]


def test_ulysses_needs_no_halves_of_what_a_rank_holds() -> None:
    settings = ("parallel.cp_method=ulysses", "training.seq_len=100")
    assert check("parallel.cp=4", *settings, world_size=4).cp == 4


def test_all_broken_rules_stand_together() -> None:
    actual = broken(
        "parallel.reshard_after_forward=5",
        "training.global_batch_size=3",
        "training.reduce_dtype=float16",
        "data.tokenizer_path=x",
        world_size=4,
    )
    assert {p.key for p in actual} == {
        "parallel.reshard_after_forward",
        "training.global_batch_size",
        "training.reduce_dtype",
        "data.tokenizer_path",
    }


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (0, 'no permission to write in "locked"'),
        (os.ST_RDONLY, '"locked" is on a file system that is read-only'),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, flags: int, reason: str
) -> None:
    locked = ("locked", "open/locked")
    for name in locked:
        Path(name).mkdir(parents=True)
    # The superuser may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path not in locked)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    message = f"cannot be written: {reason}"
    (problem,) = broken("job.dump_folder=locked/new/run", "checkpoint.enable=true")
    assert (problem.key, problem.message) == ("job.dump_folder", message)
    elsewhere = ("job.dump_folder=open", "checkpoint.folder=locked/of/run")
    (problem,) = broken(*elsewhere, "checkpoint.enable=true")
    assert problem.key == "checkpoint.folder"
    assert problem.message == message.replace("locked", "open/locked")
    check(*elsewhere)
    check("job.dump_folder=open", "checkpoint.enable=true")


def test_a_path_of_documents_is_literal_before_it_is_a_glob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("part[0].txt").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check("data.dataset_path=part[0].txt")
    assert check("data.dataset_path=~/part[0].txt", "data.tokenizer_path=~/part[0].txt")
    assert check("data.dataset_path=~/*.txt")
    (problem,) = broken("data.dataset_path=part[1].txt")
    assert problem.key == "data.dataset_path"
    (problem,) = broken("data.dataset_path={part,other}*.txt")
    assert '"{part,other}*.txt"; {a,b} is not expanded: use *, ? or [ab], or' in problem.message


def test_rules_without_degrees_hold_where_the_world_size_does_not_divide() -> None:
    actual = broken(
        "parallel.dp_replicate=2",
        "training.global_batch_size=3",
        "training.local_batch_size=2",
        world_size=3,
    )
    assert [p.key for p in actual] == ["parallel.dp_replicate", "training.global_batch_size"]
    assert actual[1].message == (
        "global_batch_size (3) must be a multiple of training.local_batch_size (2)"
    )


def test_what_can_work_gives_the_degrees() -> None:
    Path("a.txt").write_text("")
    dims = check(
        "parallel.dp_replicate=2",
        "training.global_batch_size=32",
        "parallel.reshard_after_forward=2",
        "data.dataset_path=*.txt",
        "data.tokenizer_path=a.txt",
        world_size=8,
    )
    assert dims == ParallelDims(pp=1, dp_replicate=2, dp_shard=4, cp=1, tp=1)


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        (["data.num_streams=6"], 4, "data.num_streams (6) is not a multiple of the data-parallel"),
        (
            ["data.shuffle_buffer=100"],
            1,
            "data.shuffle_buffer (100) is below 2 x data.num_streams (64) = 128, so nothing is",
        ),
        (
            ["training.steps=20"],
            1,
            "lr_scheduler.warmup_steps (200) > training.steps (20): "
            "the learning rate never reaches optimizer.lr (0.0003)",
        ),
        (
            ["training.steps=200"],
            1,
            "lr_scheduler.warmup_steps (200) = training.steps: "
            "the learning rate does not reach optimizer.lr (0.0003) before the last step",
        ),
        (
            ["lr_scheduler.decay_ratio=0"],
            1,
            'lr_scheduler.decay_type ("cosine") has no effect because decay_ratio (0) '
            "x training.steps (10000) is 0",
        ),
        (
            ["lr_scheduler.decay_ratio=0.9", "training.steps=1000"],
            1,
            "warm-up (200) and decay (900 steps, decay_ratio 0.9) are longer than "
            "training.steps (1000)",
        ),
        (
            ["checkpoint.interval=5"],
            1,
            "checkpoint.interval (command line) has no effect because checkpoint.enable is false",
        ),
        (["checkpoint.async_mode=async"], 1, "because checkpoint.enable is false"),
        (
            ["checkpoint.enable=true", "checkpoint.keep_latest_k=0", "checkpoint.keep_every=500"],
            1,
            "because checkpoint.keep_latest_k is 0",
        ),
        (
            ["checkpoint.enable=true", "checkpoint.export_dtype=bfloat16"],
            1,
            "because checkpoint.last_save_model_only is false",
        ),
        (
            ["checkpoint.enable=true", 'checkpoint.exclude_from_loading=["output.*"]'],
            1,
            "because checkpoint.initial_load_path is not set",
        ),
        (["profiling.profile_freq=5"], 1, "profiling.profile_freq (command line) has no effect"),
        (
            ["profiling.enable_profiling=true", "training.steps=250", "profiling.profile_freq=300"],
            1,
            "profiling.enable_profiling (command line) has no effect because "
            "profiling.profile_freq (300) > training.steps (250)",
        ),
        (
            [
                "activation_checkpoint.mode=selective_op",
                'activation_checkpoint.save=["attention"]',
                "model.attention_dropout=0.1",
                "compile.enable=true",
            ],
            1,
            'activation_checkpoint.save (command line): "attention" has no effect because ',
        ),
        (
            ["float8.recipe=rowwise"],
            1,
            'float8.recipe ("rowwise") is slow without compile.enable = true: every cast takes',
        ),
        (
            ["model.attention_dropout=0.1"],
            1,
            "model.attention_dropout (0.1) is slow without compile.enable = true: generating the",
        ),
        (["parallel.loss_parallel=false"], 2, "because parallel.tp is 1"),
        (["parallel.sequence_parallel=false"], 2, "because parallel.tp is 1"),
        (["data.packing_block=64"], 1, 'because data.packing is "concat"'),
        (['compile.components=["loss"]'], 1, "because compile.enable is false"),
        (["parallel.pp_split=uniform"], 1, "because paral"),
        (
            ["parallel.gradient_sync=last_micro_batch"],
            1,
            "because no gradient is reduced at world size 1 (to change it: --world-size, or NGPU x",
        ),
        (["parallel.gradient_sync=last_micro_batch"], 2, "because a step is one micro-batch"),
        ([*PP2, "parallel.gradient_sync=last_micro_batch"], 4, "because a pipeline reduces gradi"),
        (["parallel.fsdp_symm_mem=true"], 1, "because nothing is sharded at world size 1 (to"),
        (
            ["model.fp32_residual=true", "training.param_dtype=float32"],
            1,
            'because training.param_dtype is "float32"',
        ),
        ([*PP2, "parallel.pp_stages_per_rank=3"], 2, 'because parallel.pp_schedule is "1F1B"'),
        ([*PP2, 'parallel.pp_stage_modules=[["a"]]'], 2, 'because parallel.pp_split is "time"'),
        (["parallel.cp_method=ulysses"], 1, "because paral"),
        (["data.shuffle=false", "data.shuffle_buffer=500"], 1, "because data.shuffle is false"),
        (
            ["data.dataset_path=.", "data.dataset=c4"],
            1,
            "data.dataset (command line) has no",
        ),
        (["validation.steps=3"], 1, "because validation.enab"),
        (
            ["validation.enable=true", "validation.dataset_path=.", "validation.dataset=c4"],
            1,
            'because validation.dataset_path is "."',
        ),
        (
            ["optimizer.name=Muon", "optimizer.ns_dtype=bfloat16", "training.param_dtype=float32"],
            1,
            'those of two layouts differ by up to 2 %, with "float32" by at most 1e-5',
        ),
        (["data.subset=en"], 1, 'because data.dataset is "bundled"'),
        (
            ["optimizer.weight_decay=0", 'optimizer.no_decay=["norm"]'],
            1,
            "because optimizer.weight_decay is 0",
        ),
        (
            ["lr_scheduler.decay_type=constant", "lr_scheduler.decay_ratio=0.5"],
            1,
            'because lr_scheduler.decay_type is "constant"',
        ),
    ],
)
def test_a_setting_without_effect_is_warned_about(
    settings: list[str], world_size: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "titan_lite.config"):
        plan_of(*settings, world_size=world_size)
    (record,) = caplog.records
    assert message in record.getMessage()


def test_weights_from_hugging_face_need_no_checkpoints(caplog: pytest.LogCaptureFixture) -> None:
    plan_of("checkpoint.initial_load_hf=.")
    assert not caplog.records


@pytest.mark.parametrize("world_size", [1, 2, 64])
def test_the_defaults_give_no_warning(world_size: int, caplog: pytest.LogCaptureFixture) -> None:
    plan_of(world_size=world_size)
    assert not caplog.records


def test_a_written_configuration_gives_no_more_warnings_than_it_had(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path("all.toml").write_text(to_toml(load_config(None)))
    make_plan("all.toml")
    assert not caplog.records


def test_wandb_must_be_installed_and_have_its_token_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    # A folder that wandb left behind is not a package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        (problem,) = broken("metrics.enable_wandb=true")
    assert problem.key == "metrics.enable_wandb"
    assert problem.message.endswith("not installed: pip install wandb")
    (tmp_path / "wandb" / "__init__.py").touch()
    importlib.invalidate_caches()
    (problem,) = broken("metrics.enable_wandb=true")
    assert "WANDB_API_KEY, or WANDB_MODE=offline" in problem.message
    monkeypatch.setenv("WANDB_MODE", "offline")
    check("metrics.enable_wandb=true")
