"""The whole model on the meta device, and the checks that need it.

These checks run before the first collective, because one rank alone can fail them, and the other
ranks would wait there for it. Each raises a SettingError for the key to change.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from titan_lite.checkpoint.hf_files import CONFIG_FILE, HFFolder
from titan_lite.checkpoint.hf_layout import HFModel, check_start
from titan_lite.checkpoint.manifest import MANIFEST_FILE
from titan_lite.checkpoint.state import Start, check_excluded, newest_below
from titan_lite.checkpoint.storage import check_weights
from titan_lite.config.activation_checkpoint import FractionOfBlocks
from titan_lite.config.problems import SettingError, collecting, errors_for, literal
from titan_lite.config.schema import Float8
from titan_lite.metrics.power import EnergyCounter
from titan_lite.models.plan import Plan
from titan_lite.nn.build_model import build_model
from titan_lite.nn.init import rule_of
from titan_lite.nn.transformer import Transformer
from titan_lite.optim.optimizer import check_groups
from titan_lite.parallel.async_tp import check_async_tp
from titan_lite.parallel.attention_kernel import check_attention_kernel
from titan_lite.parallel.compile import check_compiler
from titan_lite.parallel.context import check_cp
from titan_lite.parallel.float8 import float8_problems
from titan_lite.parallel.fsdp import check_symm_mem
from titan_lite.parallel.pipeline import Stage, check_schedule, split
from titan_lite.parallel.tensor import check_plan
from titan_lite.planner.counts import FlopsPerToken, flops_per_token, num_unused_params
from titan_lite.runtime.distributed import Process, check_dtype
from titan_lite.runtime.profiler import check_profiling


def check_model_and_device(plan: Plan, start: Start | None) -> None:
    """Runs all checks of the model and of this machine's device, and raises all their errors.

    start: the checkpoint or weights to start from. None if there was an error in finding them;
    their check is then skipped.
    """
    device = Process.from_environment().device
    section = plan.config.checkpoint
    model = build_checked_model(plan)
    with collecting() as problems:
        with problems.checking():
            pipeline_stages(plan, model)
        with problems.checking():
            check_device(plan, model, device)
        if start is None:
            return
        with problems.checking(start.key):
            if start.source is None:
                open_hf_weights(plan)
            elif section.exclude_from_loading and not start.resumes:
                check_weights(start.source, model, section.exclude_from_loading)


@dataclass(frozen=True)
class WholeModel:
    """The whole model on the meta device, and its pipeline stages."""

    model: Transformer
    stages: list[Stage]


def build_whole_model(plan: Plan) -> WholeModel:
    """Builds the model on the meta device, splits it into stages, and checks both."""
    model = build_checked_model(plan)
    return WholeModel(model, pipeline_stages(plan, model))


def build_checked_model(plan: Plan) -> Transformer:
    """Builds the model on the meta device.

    SettingError if a key names a parameter that does not exist, or if the TP plan does not fit.
    """
    with errors_for("model.name"), torch.device("meta"):
        model = build_model(plan.family, plan.args)
        # A parameter that no rule initializes is an error here, before any weights are drawn.
        if type(model).init_parameter is Transformer.init_parameter:
            for name, _ in model.named_parameters():
                rule_of(model.init_rules, name)
    with errors_for("checkpoint.exclude_from_loading"):
        names = [name for name, _ in model.named_parameters()]
        check_excluded(plan.config.checkpoint.exclude_from_loading, names)
    check_groups(plan.config.optimizer, names)
    if plan.dims.tp > 1:
        with errors_for("parallel.tp"):
            check_plan(model, plan.family.tp_plan)
    return model


def pipeline_stages(plan: Plan, model: Transformer) -> list[Stage]:
    """Returns the pipeline stages of the whole model; a single one without pipeline parallel."""
    config, parallel = plan.config, plan.config.parallel
    with errors_for("parallel.pp_schedule"):
        check_schedule(parallel)
    key = "pp_stage_modules" if parallel.pp_split == "explicit" else "pp"
    with errors_for(f"parallel.{key}"):
        stages = split(
            model,
            parallel,
            attention_flops=12 * plan.args.attention_dim * plan.attended_tokens,
            head_token_fraction=plan.head_token_fraction,
        )
    section = config.activation_checkpoint
    if isinstance(section, FractionOfBlocks) and not any(section.layers(s.blocks) for s in stages):
        raise SettingError(
            "activation_checkpoint.fraction",
            f"fraction ({section.fraction:g}) x blocks of each pipeline stage "
            f"({', '.join(str(stage.blocks) for stage in stages)}) rounds down to 0: raise it",
        )
    return stages


def count_flops(plan: Plan, whole: WholeModel) -> FlopsPerToken:
    """Returns the FLOPs per token of the whole model."""
    args, section = plan.args, plan.config.activation_checkpoint
    model, recomputed = whole.model, [section.layers(stage.blocks) for stage in whole.stages]
    num_params = model.num_parameters - num_unused_params(args)
    num_params -= round((1 - plan.head_token_fraction) * args.vocab_size * args.dim)
    return flops_per_token(
        args,
        plan.attended_tokens,
        num_params_non_embedding=num_params,
        num_block_params=sum(
            model.active(name, p).numel() for name, p in model.layers.named_parameters()
        ),
        num_recomputed_layers=0 if section.mode == "selective_op" else sum(map(len, recomputed)),
    )


def check_device(plan: Plan, model: Transformer, device: torch.device) -> None:
    """Raises a SettingError for each setting that this device does not support."""
    config, dtype = plan.config, plan.config.training.param_dtype
    with collecting() as problems:
        with problems.checking("profiling.enable_memory_snapshot"):
            check_profiling(config.profiling, device)
        if config.metrics.power:
            with problems.checking("metrics.power"):
                EnergyCounter(device)
        with problems.checking("training.param_dtype"):
            check_dtype(dtype, device)
        with problems.checking("attention.kernel"):
            check_attention_kernel(config.attention.kernel, device)
        if config.parallel.fsdp_symm_mem:
            with problems.checking("parallel.fsdp_symm_mem"):
                check_symm_mem(device)
        if config.parallel.async_tp:
            with problems.checking("parallel.async_tp"):
                check_async_tp(device, plan.dims.tp)
        if plan.dims.cp > 1:
            with problems.checking("training.param_dtype"):
                check_cp(config.parallel.cp_method, device, dtype)
        if config.compile.enable:
            with problems.checking("compile.enable"):
                check_compiler(device)
        with problems.checking():
            check_float8(plan, model, config.float8, device)


def check_float8(plan: Plan, model: Transformer, section: Float8, device: torch.device) -> None:
    """Raises a SettingError for each part of the model that cannot be trained in float8."""
    with collecting() as problems:
        problems.errors += float8_problems(
            model,
            plan.family.tp_plan,
            float8=section,
            parallel=plan.config.parallel,
            dims=plan.dims,
            device=device,
        )


def open_hf_weights(plan: Plan) -> tuple[HFFolder, HFModel] | None:
    """Opens the weights of checkpoint.initial_load_hf and checks that they fit this run's model.

    None if the key is not set.
    """
    path = plan.config.checkpoint.initial_load_hf
    if not path:
        return None
    source = Path(path).expanduser()
    checkpoint = source if (source / MANIFEST_FILE).exists() else newest_below(source)
    if checkpoint and not (source / CONFIG_FILE).exists():
        message = (
            f"{source} is, or contains, a checkpoint of titan_lite, not Hugging Face weights: set "
            f"checkpoint.initial_load_path = {literal(str(checkpoint))} instead"
        )
        raise SettingError("checkpoint.initial_load_hf", message)
    with errors_for("checkpoint.initial_load_hf"):
        folder = HFFolder.open(source)
        hf = HFModel.of(plan.family, plan.args)
        check_start(folder, hf, plan.family, plan.args)
    return folder, hf
