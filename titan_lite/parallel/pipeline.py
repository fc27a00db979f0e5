"""Pipeline parallelism: stages of consecutive blocks, run by the schedules of torch.

The only file with private names of torch.distributed.pipelining.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_lite.config.registry import load
from titan_lite.config.schema import Parallel
from titan_lite.config.units import format_scaled
from titan_lite.models.stage_split import balanced
from titan_lite.nn.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a pipeline: its modules, parameters and FLOPs.

    modules: names of the model's children and blocks. flops: per token, forward and backward.
    """

    modules: tuple[str, ...]
    parameters: int
    flops: int

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return sum(name.startswith("layers.") for name in self.modules)


def split(
    model: Transformer, parallel: Parallel, attention_flops: int, head_token_fraction: float = 1.0
) -> list[Stage]:
    """Returns the stages of the whole model in order; one stage without pipeline parallel.

    attention_flops: per token, of one block's matmuls without parameters.
    head_token_fraction: fraction of tokens for which the output projection is computed.
    Raises ValueError if there are fewer blocks than stages, or if `pp_stage_modules` does not list
    every module once, in order, with the inseparable ones in the last stage.
    """
    first = [name for name in model.ends if name in model.first]
    last = [name for name in model.ends if name in model.last]
    blocks = [f"layers.{name}" for name in model.layers]
    names = (*first, *blocks, *last)
    parameters = {name: _numel(model, name, model.without_padding) for name in names}
    # These cost nothing or next to nothing: embedding lookups, and heads for one token per sample.
    free = (*first, *model.per_sample)
    flops = {name: 6 * _numel(model, name, model.active) for name in names if name not in free}
    if model.tied_head and parallel.pp == 1:
        parameters["output"] = 0
    for name in blocks:
        flops[name] += attention_flops
    flops["output"] = round(head_token_fraction * flops["output"])
    num_stages = parallel.num_stages
    if parallel.pp_split == "explicit":
        stages = [tuple(names) for names in parallel.pp_stage_modules]
        if list(itertools.chain(*stages)) != list(parameters):
            raise ValueError(
                f"must list each of these modules once, in this order: {', '.join(parameters)}"
            )
        if not set(model.inseparable) <= set(stages[-1]):
            raise ValueError(f"must list {', '.join(model.inseparable)} in the last stage")
    elif len(blocks) < num_stages:
        most = max(1, len(blocks) // parallel.stages_per_rank)
        raise ValueError(
            f"a pipeline of {num_stages} stages requires at least {num_stages} blocks, got "
            f"{len(blocks)}; set parallel.pp to at most {most}"
        )
    else:
        # Embedding and head go with the blocks next to them.
        groups = [[name] for name in blocks]
        groups[0][:0] = first
        groups[-1] += last
        costs = {
            "uniform": dict.fromkeys(blocks, 1),
            "parameters": parameters,
            "time": flops,
        }[parallel.pp_split]
        bounds = balanced([sum(costs.get(n, 0) for n in group) for group in groups], num_stages)
        stages = [tuple(itertools.chain(*groups[start:end])) for start, end in bounds]
    return [
        Stage(
            modules=names,
            parameters=sum(parameters[name] for name in names),
            flops=sum(flops.get(name, 0) for name in names),
        )
        for names in stages
    ]


def _numel(model: Transformer, name: str, part: Callable[[str, Tensor], Tensor]) -> int:
    """Counts elements of a child's or block's parameters, after `part` is applied to each."""
    parameters = model.get_submodule(name).named_parameters()
    return sum(part(f"{name}.{own}", parameter).numel() for own, parameter in parameters)


def summarize_stages(stages: Sequence[Stage], schedule: str) -> str:
    """Returns a line for each stage, and the ratio of the slowest stage's work to the mean."""
    mean = sum(stage.flops for stage in stages) / len(stages)
    worst = max(stage.flops for stage in stages)
    lines = [f"{schedule}, {len(stages)} stages, the largest {worst / mean:.2f} of an even share"]
    for number, stage in enumerate(stages):
        # Lists only the first and the last block.
        words = [
            " to ".join(dict.fromkeys((names[0], names[-1]))) if is_block else ", ".join(names)
            for is_block, group in itertools.groupby(
                stage.modules, lambda name: name.startswith("layers.")
            )
            for names in (list(group),)
        ]
        lines.append(
            f"stage {number}: {stage.parameters:,} parameters, "
            f"{format_scaled(stage.flops, 'FLOP')} per token: {', '.join(words)}"
        )
    return "\n".join(lines)


def prune_to_stage(model: Transformer, modules: Sequence[str]) -> Transformer:
    """Removes all children and blocks of a model except `modules`, in place."""
    for end in model.ends:
        if end not in modules:
            setattr(model, end, None)
    for name in list(model.layers):
        if f"layers.{name}" not in modules:
            del model.layers[name]
    return model


def merge_stages(model: Transformer, stages: Sequence[Transformer]) -> Transformer:
    """Replaces a model's children and blocks with those of this rank's stages.

    The model then has this rank's parameters, with the names of the whole model. It must not be
    called.
    """
    for end in model.ends:
        setattr(model, end, next((m for s in stages if (m := getattr(s, end)) is not None), None))
    model.layers = nn.ModuleDict({name: b for s in stages for name, b in s.layers.items()})
    if model.tied_head and model.output is not None and model.tok_embeddings is None:
        # The last stage's copy has the same name as the first stage's embedding, so both are
        # initialized, updated and saved equally.
        model.tok_embeddings = nn.Embedding(0, 0)
        model.tok_embeddings.weight = model.output.weight
    return model


def add_tied_gradients(model: Transformer, group: dist.ProcessGroup) -> None:
    """Sums the gradients of both copies of a tied embedding, in the first and the last stage.

    Must be called on every rank of `group`, the pipeline; on ranks without a copy it is a no-op.
    """
    first, last = 0, group.size() - 1
    if group.rank() not in (first, last):
        return
    other = last if group.rank() == first else first
    assert model.tok_embeddings is not None
    grad = model.tok_embeddings.weight.grad
    assert isinstance(grad, DTensor)
    local = grad.to_local()
    peer = torch.empty_like(local)
    operations = [
        dist.P2POp(dist.isend, local, group=group, group_peer=other),
        dist.P2POp(dist.irecv, peer, group=group, group_peer=other),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    # Equal on both, because a sum of two numbers does not depend on their order.
    local += peer


def local_stages(parallel: Parallel, pp_rank: int) -> list[int]:
    """Returns one rank's stages: every pp-th, or, for V schedules, one from each end."""
    if parallel.schedule.is_v:
        return [pp_rank, parallel.num_stages - 1 - pp_rank]
    return list(range(pp_rank, parallel.num_stages, parallel.pp))


def rank_of_stage(parallel: Parallel, number: int) -> int:
    """Returns the pipeline rank that has a stage."""
    if parallel.schedule.is_v:
        return min(number, parallel.num_stages - 1 - number)
    return number % parallel.pp


def forward_ticks(parallel: Parallel, rank: int, count: int) -> dict[int, tuple[int, int]]:
    """Returns tick -> (stage, micro-batch) of a rank's forward passes, for `count` micro-batches.

    In each tick a rank runs one forward. A stage runs a micro-batch one tick after the previous
    stage, so that a tensor that is sent at the end of a tick is used in the next one.
    """
    pp, num_stages = parallel.pp, parallel.num_stages
    ticks = {}
    for index in range(count):
        # `pp` micro-batches keep the ranks busy for one round of the stages. In a V, the two stages
        # of a rank are an odd number of ticks apart.
        group, place = divmod(index, pp)
        start = 2 * index if parallel.schedule.is_v else group * num_stages + place
        for number in local_stages(parallel, rank):
            ticks[start + number] = number, index
    return ticks


# torch 2.11 expects gradients of all arguments of a stage, but some of ours are not tensors.
CAN_SPLIT_BACKWARD = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)  # type: ignore[operator]


def check_schedule(parallel: Parallel) -> None:
    """Raises ValueError for a schedule that this version of torch cannot run."""
    if parallel.schedule.splits_backward and not CAN_SPLIT_BACKWARD:
        raise ValueError(
            f'"{parallel.pp_schedule}" splits backward, which requires torch 2.13 or later, got '
            f'{torch.__version__}; set parallel.pp_schedule = "1F1B" or "Interleaved1F1B"'
        )


class Pipeline:
    """The stages of this rank under a schedule; `step` runs the micro-batches of one pass."""

    def __init__(
        self,
        stages: Mapping[int, Transformer],
        parallel: Parallel,
        *,
        num_micro_batches: int,
        tokens_shape: tuple[int, int],
        hidden_shape: tuple[int, int, int],
        hidden_dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        """stages: by number. hidden_shape: of the tensors that stages send."""
        # Imports the compiler, which takes time, so only for runs with a pipeline.
        from torch.distributed.pipelining import PipelineStage

        self.num_micro_batches = num_micro_batches
        self.parallel = parallel
        self.group = group
        num_stages = parallel.num_stages
        # Given here, so that torch does not run the model once to get them.
        tokens = torch.empty(tokens_shape, dtype=torch.int64, device="meta")
        hidden = torch.empty(hidden_shape, dtype=hidden_dtype, device="meta", requires_grad=True)
        self.hidden, self.device = hidden, device
        loss = torch.empty((), device="meta", requires_grad=True)
        self.stages = [
            PipelineStage(
                module,
                number,
                num_stages,
                device,
                input_args=hidden if number > 0 else tokens,
                output_args=hidden if number < num_stages - 1 else loss,
                group=group,
            )
            for number, module in stages.items()
        ]
        schedule = load(parallel.schedule.build)
        self.schedule = schedule(
            self.stages if parallel.stages_per_rank > 1 else self.stages[0],
            num_micro_batches,
            # The last stage returns its share of the loss.
            loss_fn=lambda output, _target: output,
            scale_grads=False,
        )
        if parallel.schedule.is_v and device.type == "cpu":
            # torch 2.11 sends a first message between neighbouring stages; with gloo, a rank cannot
            # send to itself.
            self._skip_first_messages()

    def _skip_first_messages(self) -> None:
        for stage in self.stages:
            stage._get_init_p2p_neighbors_ops = list  # type: ignore[method-assign]

    def skip_shape_negotiation(self) -> None:
        """Skips the exchange between stages before the first step: a dry run has no peers.

        torch 2.11 opens connections, torch 2.13 also negotiates shapes, and torch 2.15 does neither
        with a fake process group.
        """
        self._skip_first_messages()
        if not hasattr(self.schedule, "_warmup_p2p"):
            return
        from torch.distributed.pipelining._utils import InferenceMode

        def agree(stages: Sequence["PipelineStage"], *_: Any) -> None:
            for stage in stages:
                stage._inference_mode = InferenceMode.STATIC

        self.schedule._warmup_p2p = agree

    def step(self, micro_batches: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> list[Tensor]:
        """Runs forward and backward of each micro-batch: (tokens, keyword arguments of the model).

        Returns the losses of the micro-batches on the rank of the last stage, none elsewhere.
        """
        losses: list[Tensor] = []
        for stage in self.stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        # The part of torch's `step` after splitting a batch into micro-batches.
        self.schedule._step_microbatches(
            [(tokens,) for tokens, _ in micro_batches],
            [dict(kwargs) for _, kwargs in micro_batches],
            [None] * len(micro_batches),
            losses,
            return_outputs=False,
        )
        return [loss.detach() for loss in losses]

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> list[Tensor]:
        """Runs the forward pass of `step`, for any schedule."""
        modules = {stage.stage_index: stage.submod for stage in self.stages}
        rank, last = self.group.rank(), self.parallel.num_stages - 1
        jobs = forward_ticks(self.parallel, rank, len(micro_batches))
        losses: list[Tensor] = []
        received: Tensor | None = None
        for tick in range(max(jobs) + 1):
            operations, output = [], None
            if tick in jobs:
                number, index = jobs[tick]
                tokens, kwargs = micro_batches[index]
                output = modules[number](tokens if number == 0 else received, **kwargs)
                if number == last:
                    losses.append(output)
                elif number + 1 not in modules:
                    peer = rank_of_stage(self.parallel, number + 1)
                    operations.append(
                        dist.P2POp(dist.isend, output, group=self.group, group_peer=peer)
                    )
            received = output
            number, _ = jobs.get(tick + 1, (0, 0))
            if number > 0 and number - 1 not in modules:
                received = torch.empty_like(self.hidden, device=self.device, requires_grad=False)
                peer = rank_of_stage(self.parallel, number - 1)
                operations.append(
                    dist.P2POp(dist.irecv, received, group=self.group, group_peer=peer)
                )
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
        return losses
