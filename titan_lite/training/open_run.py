"""Opens a run: builds a Trainer from a plan, ready for its next step.

`open_run` reads top to bottom. Checks that can fail on a single rank come before the first
collective, where the other ranks would wait for that rank. Later checks fail on all ranks.
"""

import contextlib
import dataclasses
import logging

import torch.distributed as dist

from titan_lite.checkpoint.agreement import agree_on_data, agree_on_start
from titan_lite.checkpoint.hf import load_hf
from titan_lite.checkpoint.hf_files import HFFolder
from titan_lite.checkpoint.hf_layout import HFModel
from titan_lite.checkpoint.manager import CheckpointManager, Stateful
from titan_lite.checkpoint.same_model import model_facts
from titan_lite.checkpoint.state import Start
from titan_lite.checkpoint.storage import versions
from titan_lite.config.problems import errors_for
from titan_lite.metrics.by_source import SourceMeter
from titan_lite.metrics.device import PeakFlops, device_name
from titan_lite.metrics.record import FORMULA
from titan_lite.models.plan import Plan
from titan_lite.parallel.compile import Compilations
from titan_lite.planner.counts import in_words, num_inactive_params
from titan_lite.runtime.distributed import (
    Process,
    clone_store,
    enable_flight_recorder,
    is_emulated,
    start_process_group,
)
from titan_lite.runtime.garbage import GarbageCollector
from titan_lite.runtime.profiler import Profiler
from titan_lite.runtime.progress import Progress
from titan_lite.runtime.run_folder import RUN_FILE, open_run_folder, write_run_file
from titan_lite.runtime.seed import set_determinism
from titan_lite.runtime.stop import StopRequest
from titan_lite.runtime.watchdog import Watchdog
from titan_lite.training.meta_model import build_whole_model, check_device, open_hf_weights
from titan_lite.training.prediction import PredictionRecorder
from titan_lite.training.preflight import check_same_model, lock_folders, preflight
from titan_lite.training.resuming import log_changes
from titan_lite.training.run_data import RunData
from titan_lite.training.setup import BuiltTraining, build_training
from titan_lite.training.step_monitor import StepMonitor
from titan_lite.training.trainer import Trainer, Watcher

logger = logging.getLogger(__name__)


def open_run(
    plan: Plan, *, stop: StopRequest | None = None, progress: Progress | None = None
) -> Trainer:
    """Builds a run and loads its checkpoint or start weights; collective.

    The caller must call Trainer.close. progress: where this process is in its step; must be the
    object that `stop` was made with.
    """
    config = plan.config
    process = Process.from_environment()
    progress = progress or Progress()
    stop = stop or StopRequest(progress)
    with plan.reporting(), contextlib.ExitStack() as stack:
        if process.rank == 0:
            stack.enter_context(lock_folders(plan))
        checked = preflight(plan)
        hf = open_hf_weights(plan) if checked.start.source is None else None
        whole = build_whole_model(plan)
        check_device(plan, whole.model, process.device)
        data = RunData(plan, process, checked.tokenizer)
        stack.callback(data.close)
        data.open(checked.start)

        set_determinism(config.training.seed, deterministic=config.training.deterministic)
        watchdog = _join(plan, process, progress)
        stack.callback(watchdog.close)
        start = _agree(plan, checked.start, data)

        built = build_training(plan, process, whole, progress=progress)
        compilations = Compilations() if config.compile.enable else None
        sources = SourceMeter(config.data) if config.data.sources else None
        stateful: dict[str, Stateful] = {"data": data, "guard": built.train_step.guard}
        if built.train_step.balancer is not None:
            stateful["expert_counts"] = built.train_step.balancer
        if sources is not None:
            stateful["source_tokens"] = sources
        checkpoints = CheckpointManager(
            section=config.checkpoint,
            folder=plan.checkpoint_folder,
            model=built.model,
            optimizer=built.train_step.optimizer,
            average=None if built.train_step.average is None else built.train_step.average.tensors,
            exports_average=config.ema.export,
            stateful=stateful,
            device=process.device,
            layout=dataclasses.asdict(plan.dims),
            config=config.model_dump(),
            tokenizer=checked.tokenizer.fingerprint,
            model_facts=model_facts(plan.family.name, plan.args),
            timeout_seconds=config.comm.init_timeout_seconds,
        )
        stack.callback(checkpoints.close)
        _load(plan, start, hf, built, checkpoints)
        if process.rank == 0:
            open_run_folder(plan.run_folder, resume_step=start.own_step)
            checkpoints.retire_newer_checkpoints(start.own_step)

        _log_run(plan, process, built)
        monitor = StepMonitor(plan, process, built, data.loader, sources, start.state)
        stack.callback(monitor.meter.close)
        if process.rank == 0:
            _write_run_file(plan, process, built, monitor.meter.peak, start.state.step)
        watchers: list[Watcher] = [
            GarbageCollector(config.training.gc_freq),
            Profiler(config.profiling, plan.run_folder / "profile", process.rank),
        ]
        if compilations is not None:
            watchers.append(compilations)
        if checked.cluster is not None and process.rank == 0:
            watchers.append(PredictionRecorder(plan, checked.cluster, monitor.meter))
        return Trainer(
            plan=plan,
            process=process,
            stop=stop,
            progress=progress,
            state=start.state,
            tokenizer=checked.tokenizer,
            built=built,
            data=data,
            checkpoints=checkpoints,
            monitor=monitor,
            watchers=watchers,
            compilations=compilations,
            watchdog=watchdog,
            opened=stack.pop_all(),
        )


def _join(plan: Plan, process: Process, progress: Progress) -> Watchdog:
    """Starts the process group and the watchdog of its collectives."""
    comm, hint = plan.config.comm, ""
    if process.device.type == "cuda":
        hint = enable_flight_recorder(plan.run_folder)
    start_process_group(process, comm)
    return Watchdog(
        progress,
        clone_store(),
        rank=process.rank,
        world_size=process.world_size,
        timeout=comm.init_timeout_seconds,
        logs=process.local_rank == 0,
        hint=hint,
    )


def _agree(plan: Plan, local: Start, data: RunData) -> Start:
    """Returns the start that all ranks agree on; checks that they read the same data; collective.

    local: the start that this rank would take.
    """
    with errors_for("data.dataset"):
        agree_on_data(data.loader.state_dict()["settings"])
    with errors_for(local.key):
        start = agree_on_start(
            local,
            plan.config.checkpoint,
            plan.checkpoint_folder,
            last_step=plan.config.training.steps,
        )
    if start is not local:
        # An earlier checkpoint, since the latest is damaged.
        check_same_model(start, plan)
        data.open(start)
    return start


def _load(
    plan: Plan,
    start: Start,
    hf: tuple[HFFolder, HFModel] | None,
    built: BuiltTraining,
    checkpoints: CheckpointManager,
) -> None:
    """Loads the checkpoint or the Hugging Face weights to start from, if there are any."""
    if start.source is not None:
        with errors_for(start.key):
            checkpoints.load(start)
        logger.info("%s from %s", "Resumed" if start.resumes else "Started", start.source)
        if start.manifest is not None and start.content == "run" and dist.get_rank() == 0:
            log_changes(start.manifest, plan, versions())
    elif hf is not None:
        load_hf(built.model, *hf)
        if built.train_step.average is not None:
            built.train_step.average.restart()
        logger.info("Loaded the weights of %s", hf[0].path)
    built.train_step.refresh_float8_scales()


def _log_run(plan: Plan, process: Process, built: BuiltTraining) -> None:
    config = plan.config
    logger.info(
        "%sModel: %s %s, %s parameters. Processes: %d, on %s. Applied features:\n%s",
        f"Run: {config.job.description}. " if config.job.description else "",
        config.model.name,
        config.model.flavor,
        in_words(built.num_params, plan.args),
        plan.dims.world_size,
        device_name(process.device),
        built.applied,
    )
    dtype = config.training.param_dtype
    if process.rank == 0 and is_emulated(dtype, process.device):
        logger.warning(
            'training.param_dtype = "%s" is slow on this processor, for which torch has no matrix '
            'products of this type; set training.param_dtype = "float32"',
            dtype,
        )


def _write_run_file(
    plan: Plan, process: Process, built: BuiltTraining, peak: PeakFlops, start_step: int
) -> None:
    """Writes the run's device, layout, applied features and configuration to run.json."""
    # The file of a finished run keeps the settings that trained it.
    if start_step >= plan.config.training.steps and (plan.run_folder / RUN_FILE).exists():
        return
    write_run_file(
        plan.run_folder,
        {
            "device": device_name(process.device),
            "mesh": dataclasses.asdict(plan.dims),
            "applied": dataclasses.asdict(built.applied),
            "parameters": built.num_params,
            "active_parameters": built.num_params - num_inactive_params(plan.args),
            "stages": [dataclasses.asdict(stage) for stage in built.stages],
            "flops_per_token": dataclasses.asdict(built.flops) | {"formula": FORMULA},
            "peak": dataclasses.asdict(peak),
            "config": plan.config.model_dump(),
        },
        resumed_from_step=start_step,
    )
