"""Run N = run k + resume + run N - k, bit for bit on CPU."""

import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.test_manifest import flip_a_bit
from tests.distributed import Workers
from tests.runs import (
    TINY,
    Tensors,
    build_trainer,
    gather,
    read_metrics,
    splits_backward,
    train,
    train_and_gather,
)
from titan_lite import cli
from titan_lite.checkpoint import manager
from titan_lite.checkpoint.state import saved_steps
from titan_lite.checkpoint.storage import CheckpointReader
from titan_lite.config.load import ConfigError, load_config
from titan_lite.optim import loss_scaler
from titan_lite.optim.optimizer import OptimizerContext, build_optimizer

EVERY_4 = ("--checkpoint.enable=true", "--checkpoint.interval=4", "--training.steps=10")
BUT_EMBEDDINGS = '--optimizer.no_decay=["embedding"]'
NUMERIC = ("step", "loss", "grad_norm", "lr", "tokens")


def _interrupted(folder: Path, *overrides: str) -> None:
    """Trains 6 of the 10 steps and is gone: the checkpoint of step 4 is the last one."""
    trainer = build_trainer(folder, *EVERY_4, *overrides)
    for step in range(1, 7):
        trainer.train_step(step)
        if step == 4:
            trainer.save()
    trainer.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, ()),
        (
            2,
            (
                "training.local_batch_size=2",
                "training.param_dtype=bfloat16",
                "optimizer.name=Muon",
            ),
        ),
        (
            2,
            (
                "training.local_batch_size=4",
                "parallel.dp_replicate=2",
                "optimizer.name=Adam",
                "model.hidden_dropout=0.1",
                "model.attention_dropout=0.1",
            ),
        ),
        pytest.param(
            4,
            ("training.local_batch_size=2", "activation_checkpoint.mode=full"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    workers: dict[int, Workers], tmp_path: Path, world_size: int, settings: tuple[str, ...]
) -> None:
    overrides = [f"--{setting}" for setting in settings]
    processes = workers[world_size]
    expected, expected_tensors = processes.run(
        train_and_gather, tmp_path / "uninterrupted", *EVERY_4, *overrides
    )[0]
    processes.run(_interrupted, tmp_path / "resumed", *overrides)
    got, tensors = processes.run(train_and_gather, tmp_path / "resumed", *EVERY_4, *overrides)[0]
    assert [[record[key] for key in NUMERIC] for record in got] == [
        [record[key] for key in NUMERIC] for record in expected
    ]
    for name, array in expected_tensors["final weights"].items():
        np.testing.assert_array_equal(tensors["final weights"][name], array, err_msg=name)


def _of_its_own(folder: Path) -> str:
    """Changes a run so that each rank has a different copy of the data."""
    copy = folder / f"rank{dist.get_rank()}"
    copy.mkdir()
    for number in range(1 + dist.get_rank()):
        (copy / f"{number}.txt").write_text("document " * 999)
    settings = ("--data.num_streams=1", "--training.local_batch_size=4")
    with pytest.raises(ConfigError) as error:
        build_trainer(folder, f"--data.dataset_path={copy}", *settings)
    return str(error.value)


@pytest.mark.distributed
def test_ranks_that_find_other_documents_are_refused(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    logged = (
        r"data\.dataset_path .*ranks read different data: dataset is '1 text files \w+' on rank 0 "
        r"and '2 text files \w+' on rank 1; the files of data\.dataset_path or data\.sources must "
    )
    for message in workers[2].run(_of_its_own, tmp_path):
        assert re.search(logged, message)


def _with_overflows(function: Any, *arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scaler, "INIT_SCALE", 2.0**26)
        return function(*arguments)


def test_a_float16_run_resumes_with_its_loss_scale(one_process: Workers, tmp_path: Path) -> None:
    settings = (*EVERY_4, "--training.param_dtype=float16")
    expected, _ = one_process.run(_with_overflows, train_and_gather, tmp_path / "a", *settings)[0]
    one_process.run(_with_overflows, _interrupted, tmp_path / "b", *settings)
    got, _ = one_process.run(_with_overflows, train_and_gather, tmp_path / "b", *settings)[0]
    keys = ("loss", "loss_scale", "skipped_steps")
    assert [[r[key] for key in keys] for r in got] == [[r[key] for key in keys] for r in expected]
    assert expected[3]["skipped_steps"] == 4
    assert 4 < expected[-1]["skipped_steps"] < 10


CHANGED = (
    "--optimizer.name=Adam",
    "--optimizer.weight_decay=0.5",
    "--optimizer.beta1=0.5",
    "--optimizer.beta2=0.5",
    "--optimizer.eps=0.01",
    "--optimizer.no_decay=[]",
)


def _change_by_hand(folder: Path) -> Tensors:
    """Weights after step 6, the optimizer being another one with the same state from step 5 on."""
    trainer = build_trainer(folder, *EVERY_4)
    for step in range(1, 7):
        if step == 5:
            former = trainer.built.train_step.optimizer
            section = load_config(None, ["--optimizer.lr=1e-3", *CHANGED]).config.optimizer
            context = OptimizerContext(
                ranks=None, param_dtype=torch.float32, args=trainer.plan.args
            )
            trainer.built.train_step.optimizer = build_optimizer(
                trainer.built.model, section, trainer.plan.family.tp_plan, context
            )
            trainer.built.train_step.optimizer.state = former.state
        trainer.train_step(step)
    trainer.close()
    return gather(trainer)


def _with_groups_in_the_file(function: Any, *arguments: Any) -> Any:
    """Rewrites a checkpoint as older versions did, with the groups' settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "STATE", "")
        return function(*arguments)


@pytest.mark.parametrize("how", ["resumed", "resumed from groups in the file", "in another folder"])
def test_a_resume_takes_the_optimizers_settings_from_the_configuration(
    how: str, one_process: Workers, tmp_path: Path
) -> None:
    (expected,) = one_process.run(_change_by_hand, tmp_path / "by hand")
    if how == "resumed from groups in the file":
        one_process.run(_with_groups_in_the_file, _interrupted, tmp_path / "run")
        saved = CheckpointReader(tmp_path / "run" / "checkpoint" / "step-4").read_metadata()
        assert any(".param_groups." in key for key in saved.state_dict_metadata)
    else:
        one_process.run(_interrupted, tmp_path / "run")
    folder, settings = tmp_path / "run", (*EVERY_4, *CHANGED)
    if how == "in another folder":
        path = folder / "checkpoint" / "step-4"
        initial = f"--checkpoint.initial_load_path={path}"
        folder = tmp_path / "other"
        settings += (initial, "--checkpoint.initial_load_model_only=false")
    tensors = one_process.run(_train_two_more, folder, *settings)[0]
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)


def _train_two_more(folder: Path, *overrides: str) -> Tensors:
    trainer = build_trainer(folder, *overrides)
    for step in (5, 6):
        trainer.train_step(step)
    trainer.close()
    return gather(trainer)


def _steps_counted(folder: Path, *overrides: str) -> dict[str, float]:
    """By parameter, the steps that the optimizer has counted when a run starts."""
    trainer = build_trainer(folder, *overrides)
    trainer.close()
    return {
        name: trainer.built.train_step.optimizer.state[parameter]["step"].item()
        for name, parameter in trainer.built.model.named_parameters()
    }


def test_parameters_that_are_not_loaded_begin_with_an_optimizer_that_has_taken_no_step(
    one_process: Workers, tmp_path: Path
) -> None:
    one_process.run(_interrupted, tmp_path / "run")
    (steps,) = one_process.run(
        _steps_counted,
        tmp_path / "other",
        *EVERY_4,
        f"--checkpoint.initial_load_path={tmp_path}/run/checkpoint/step-4",
        "--checkpoint.initial_load_model_only=false",
        '--checkpoint.exclude_from_loading=["output.*"]',
    )
    assert steps.pop("output.weight") == 0
    assert set(steps.values()) == {4}


def _step_under_each(folder: Path, *implementations: str) -> list[float]:
    losses = []
    for step, implementation in enumerate(implementations, start=1):
        trainer = build_trainer(folder, *EVERY_4, f"--optimizer.implementation={implementation}")
        record = trainer.train_step(step)
        assert record is not None
        losses.append(record["loss"])
        for group in trainer.built.train_step.optimizer.param_groups:
            assert group["fused"] == (implementation == "fused")
            assert group["foreach"] == (implementation == "foreach")
        trainer.save()
        trainer.close()
    return losses


def test_each_implementation_of_the_optimizer_resumes_each_other(
    one_process: Workers, tmp_path: Path
) -> None:
    pairs = ["foreach", "fused", "for-loop", "fused", "foreach", "for-loop", "foreach"]
    assert len(set(itertools.pairwise(pairs))) == 6
    (losses,) = one_process.run(_step_under_each, tmp_path / "moves", *pairs)
    records = one_process.run(train, tmp_path / "stays", "--training.steps=10")[0]
    assert losses == pytest.approx([record["loss"] for record in records[:7]], rel=1e-6)


def test_only_the_latest_checkpoints_are_kept_and_the_last_step_is_always_saved(
    one_process: Workers, tmp_path: Path
) -> None:
    settings = ("--checkpoint.interval=2", "--checkpoint.keep_latest_k=2", "--training.steps=7")
    one_process.run(train_and_gather, tmp_path, "--checkpoint.enable=true", *settings)
    assert saved_steps(tmp_path / "checkpoint") == [6, 7]


def test_a_missing_step_is_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.load_step +\(command line\).*found: none"):
        build_trainer(tmp_path, "--checkpoint.enable=true", "--checkpoint.load_step=3")


def test_resuming_with_another_data_order_is_refused(one_process: Workers, tmp_path: Path) -> None:
    one_process.run(_interrupted, tmp_path)
    with pytest.raises(AssertionError, match=r"data\.num_streams was 4 and is 2"):
        one_process.run(train_and_gather, tmp_path, *EVERY_4, "--data.num_streams=2")


def test_a_fresh_start_in_the_folder_of_an_earlier_run_moves_it_aside(
    one_process: Workers, tmp_path: Path
) -> None:
    one_process.run(train_and_gather, tmp_path, *EVERY_4)
    one_process.run(train_and_gather, tmp_path, *EVERY_4, "--checkpoint.load_step=0")
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 11))
    (earlier,) = (tmp_path / "previous").iterdir()
    assert read_metrics(earlier)[-1]["step"] == 10
    (retired,) = (tmp_path / "checkpoint").glob("retired-*")
    assert saved_steps(retired) == [4, 8, 10]


def test_going_back_to_a_step_retires_the_later_checkpoints(
    one_process: Workers, tmp_path: Path
) -> None:
    one_process.run(train_and_gather, tmp_path, *EVERY_4)
    back = ("--checkpoint.load_step=4", "--training.steps=6", "--checkpoint.keep_latest_k=1")
    one_process.run(train_and_gather, tmp_path, *EVERY_4, *back)
    assert saved_steps(tmp_path / "checkpoint") == [6]
    (retired,) = (tmp_path / "checkpoint").glob("retired-*")
    assert saved_steps(retired) == [8, 10]
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 7))
    segments = json.loads((tmp_path / "run.json").read_text())["segments"]
    assert [
        (segment["resumed_from_step"], segment["config"]["training"]["steps"])
        for segment in segments
    ] == [(0, 10), (4, 6)]


def test_a_run_without_checkpoints_leaves_those_of_others_alone(
    one_process: Workers, tmp_path: Path
) -> None:
    one_process.run(train_and_gather, tmp_path, *EVERY_4)
    one_process.run(train_and_gather, tmp_path, "--training.steps=1")
    assert saved_steps(tmp_path / "checkpoint") == [4, 8, 10]


def _log_of_start(folder: Path, *overrides: str) -> list[str]:
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("titan_lite.training.resuming")
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    build_trainer(folder, *overrides).close()
    logger.removeHandler(handler)
    return [record.getMessage() for record in records]


def test_a_finished_run_that_is_started_again_has_nothing_to_do(
    one_process: Workers, tmp_path: Path
) -> None:
    expected = one_process.run(train_and_gather, tmp_path, *EVERY_4)[0]
    facts = (tmp_path / "run.json").read_text()
    got = one_process.run(train_and_gather, tmp_path, *EVERY_4, "--optimizer.lr=0.5")[0]
    assert got[0] == expected[0]
    assert (tmp_path / "run.json").read_text() == facts
    longer = ("--training.steps=20", "--optimizer.eps=1e-6")
    changes, jump = one_process.run(_log_of_start, tmp_path, *EVERY_4, *longer)[0]
    assert "optimizer.eps   1e-08 -> 1e-06" in changes
    assert jump == (
        "The learning rate jumps from 0.0001 in step 10 to 0.00055 in step 11: "
        "training.steps 10 -> 20"
    )
    np.testing.assert_equal(got[1]["final weights"], expected[1]["final weights"])


def _draw_after(folder: Path, step: int) -> float:
    """A random number drawn after `step`, a checkpoint being saved there."""
    trainer = build_trainer(folder, *EVERY_4, "--training.local_batch_size=4")
    for number in range(trainer.state.step + 1, step + 1):
        torch.rand(1000)
        trainer.train_step(number)
    trainer.save()
    trainer.close()
    return torch.rand(()).item()


def test_generators_go_on_where_they_were(workers: dict[int, Workers], tmp_path: Path) -> None:
    expected = workers[2].run(_draw_after, tmp_path, 3)
    assert workers[2].run(_draw_after, tmp_path, 3) == expected


def _with_folders_of_their_own(folder: Path) -> None:
    _interrupted(folder / f"node{dist.get_rank()}", "--training.local_batch_size=4")


@pytest.mark.distributed
def test_a_folder_that_ranks_do_not_share_is_named_when_saving_and_when_resuming(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] cannot see .*all nodes share"):
        workers[2].run(_with_folders_of_their_own, tmp_path)
    workers[1].run(_interrupted, tmp_path / "node0")
    with pytest.raises(AssertionError, match=r"ranks found checkpoints of .*: \[4, 0\]"):
        workers[2].run(_with_folders_of_their_own, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ((), ("--parallel.pp=2",)),
        pytest.param(
            ("--parallel.pp=2",),
            ("--parallel.pp=2", "--parallel.pp_schedule=ZBVZeroBubble"),
            marks=[splits_backward, pytest.mark.slow],
        ),
    ],
    ids=["fsdp 2 to pp 2", "pp 2 to 2 stages in a V"],
)
def test_a_run_goes_on_under_another_pipeline(
    saving: tuple[str, ...],
    loading: tuple[str, ...],
    workers: dict[int, Workers],
    tmp_path: Path,
) -> None:
    settings = ("--model.num_layers=4", "--optimizer.weight_decay=0")
    one = workers[1].run(train, tmp_path / "one", *settings, "--training.steps=10")
    settings += ("--training.local_batch_size=1",)
    # Other groups of parameters, which make no difference here.
    saving, loading = (*saving, "--optimizer.no_decay=[]"), (*loading, BUT_EMBEDDINGS)
    workers[2].run(_interrupted, tmp_path / "moved", *settings, *saving)
    got = workers[2].run(train, tmp_path / "moved", *EVERY_4, *settings, *loading)[0]
    assert [record["step"] for record in got] == list(range(1, 11))
    for key in ("loss", "grad_norm", "lr", "tokens"):
        expected = [record[key] for record in one[0]]
        assert [record[key] for record in got] == pytest.approx(expected, rel=1e-5), key


def _error_of_starting(folder: Path, *overrides: str) -> str:
    try:
        build_trainer(folder, *overrides)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.distributed
def test_weights_that_do_not_fit_are_refused_by_name(
    workers: dict[int, Workers], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*EVERY_4, "--training.local_batch_size=4")
    workers[2].run(_interrupted, tmp_path / "a", *settings)
    # With exclusions, the settings of another model may be right.
    start = (f"--checkpoint.initial_load_path={tmp_path / 'a/checkpoint/step-4'}",)
    start += ('--checkpoint.exclude_from_loading=["norm.weight"]', *settings)
    run = workers[2].run
    for message in run(_error_of_starting, tmp_path / "b", *start, "--model.ffn_dim=96"):
        assert "layers.0.feed_forward.w1.weight has shape (128, 64) in " in message
        assert "and (96, 64) in this run; set [model] to the saved model" in message
    for message in run(_error_of_starting, tmp_path / "b", *start, "--model.num_layers=3"):
        assert re.search(r"layers\.2\.\S+ is not in ", message)
    for message in run(_error_of_starting, tmp_path / "b", *start, "--model.num_layers=1"):
        assert re.search(
            r"step-4 has layers\.1\.\S+, which this run's model does not have; set \[model\] to",
            message,
        )
    # The preflight compares the same, without reading a weight.
    excluded = '--checkpoint.exclude_from_loading=["tok_embeddings.*", "output.*"]'
    keys = ["--quiet", "--preflight", "--world-size=2", "--", *TINY, *start]
    keys.append(f"--job.dump_folder={tmp_path / 'b'}")
    for settings, words in (
        (["--model.ffn_dim=96"], "layers.0.feed_forward.w1.weight has shape (128, 64) in "),
        (["--model.num_layers=3"], "layers.2.attention_norm.weight is not in "),
        (["--model.num_layers=1"], "step-4 has layers.1."),
        (["--model.tied_head=true"], ""),
        ([], None),
        (["--model.vocab_size=2100", excluded], None),
    ):
        assert cli.main(["config", *keys, *settings]) == (0 if words is None else 2)
        assert (words or "") in capsys.readouterr().err


@pytest.mark.distributed
def test_another_optimizer_is_refused_with_its_key(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    muon, batch = "--optimizer.name=Muon", "--training.local_batch_size=4"
    groups = '--optimizer.groups=[{pattern="layers.*", algorithm="adamw"}]'
    for name, saved, own, key in (
        ("a", (), (muon,), "optimizer.name"),
        ("b", (muon,), (muon, groups), "optimizer.groups"),
    ):
        workers[2].run(_interrupted, tmp_path / name, batch, *saved)
        source = tmp_path / name / "checkpoint" / "step-4"
        given = (*EVERY_4, batch, *own)
        for message in workers[2].run(_error_of_starting, tmp_path / name, *given):
            assert f"{key} (command line): optimizer.state.layers.0." in message
            assert f" is not in {source}, which has the state of another optimizer" in message
            assert (
                "choose another job.dump_folder and set checkpoint.initial_load_path = "
                f'"{source}" and checkpoint.initial_load_model_only = true'
            ) in message


def test_a_flipped_bit_in_the_latest_is_found_on_loading_and_an_earlier_one_resumed_from(
    one_process: Workers, tmp_path: Path
) -> None:
    expected = one_process.run(train_and_gather, tmp_path, *EVERY_4)[0][0]
    for step in (8, 10):
        flip_a_bit(tmp_path / "checkpoint" / f"step-{step}" / "__0_0.distcp", 5000)
    (message,) = one_process.run(_error_of_starting, tmp_path, *EVERY_4, "--checkpoint.load_step=8")
    assert "step-8/__0_0.distcp is damaged: its checksum is" in message
    got = one_process.run(train_and_gather, tmp_path, *EVERY_4)[0][0]
    assert [[r[key] for key in NUMERIC] for r in got] == [
        [r[key] for key in NUMERIC] for r in expected
    ]
    (retired,) = (tmp_path / "checkpoint").glob("retired-*")
    assert saved_steps(retired) == [8, 10]
    assert saved_steps(tmp_path / "checkpoint") == [4, 8, 10]
