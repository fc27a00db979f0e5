"""The encoder under every kind of parallelism against one process, on hand-made batches."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, linear

from tests.distributed import Workers
from tests.parallel.matrix import as_overrides
from tests.runs import TINY, whole
from titan_lite.models.plan import make_plan
from titan_lite.nn.build_model import build_model
from titan_lite.nn.document_attention import dense_mask
from titan_lite.nn.token_context import TokenContext
from titan_lite.parallel.gradients import clipped_norm
from titan_lite.parallel.init_weights import init_weights
from titan_lite.parallel.mesh import build_meshes
from titan_lite.parallel.parallel_model import ParallelModel, build_parallel
from titan_lite.parallel.pipeline import add_tied_gradients, split
from titan_lite.runtime.distributed import Process

# An odd vocabulary, which is padded.
SAMPLES, SEQ_LEN, VOCAB = 4, 32, 2047
ALIKE = (f"model.vocab_size={VOCAB}", f"training.seq_len={SEQ_LEN}")
LAYOUTS = {
    "tp2": ("parallel.tp=2",),
    "tp2 without sequence parallel": ("parallel.tp=2", "parallel.sequence_parallel=false"),
    "dp2": (),
    "dp2, gathered again": ("parallel.reshard_after_forward=always",),
    "pp2": ("parallel.pp=2",),
}


def _samples() -> dict[str, Tensor]:
    """Pairs of texts and padding; labels, and samples with one, uneven over ranks."""
    generator = torch.Generator().manual_seed(0)
    lengths_B1 = torch.tensor([[SEQ_LEN], [9], [25], [17]])
    places_S = torch.arange(SEQ_LEN)
    padding_BS = places_S >= lengths_B1
    tokens, labels = torch.randint(VOCAB, (2, SAMPLES, SEQ_LEN), generator=generator)
    labels[(torch.rand(labels.shape, generator=generator) > 0.3) | padding_BS] = -100
    return {
        "tokens": tokens,
        "labels": labels,
        "types": (places_S >= lengths_B1 // 2).long(),
        "documents": padding_BS.long(),
        "pair_labels": torch.tensor([1, 0, 1, 1]),
    }


def _head_loss(labels_BS: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    logits = linear(hidden, weight, bias)
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    return cross_entropy(logits[..., :VOCAB].flatten(0, 1), labels_BS.flatten(), reduction="sum")


def _pair_loss(labels_B: Tensor, logits_B2: Tensor) -> Tensor:
    return 7 * cross_entropy(logits_B2, labels_B, reduction="sum")


def _call(samples: Mapping[str, Tensor], rows: slice) -> tuple[Tensor, dict[str, Any]]:
    part = {name: tensor[rows] for name, tensor in samples.items()}
    mask = dense_mask(part["documents"], torch.arange(SEQ_LEN), torch.float32, causal=False)
    return part["tokens"], {
        "head_loss": partial(_head_loss, part["labels"]),
        "pair_loss": partial(_pair_loss, part["pair_labels"]),
        "context": TokenContext(mask=mask, token_types_BS=part["types"]),
    }


def _forward_backward(built: ParallelModel, calls: list[tuple[Tensor, dict[str, Any]]]) -> float:
    """The loss of all micro-batches of all ranks."""
    losses = [torch.zeros(())]
    if built.pipeline is not None:
        losses += built.pipeline.step(calls)
        assert built.meshes.pp is not None
        add_tied_gradients(built.model, built.meshes.pp)
    else:
        for tokens, kwargs in calls:
            losses.append(built.model(tokens, **kwargs))
            losses[-1].backward()
    loss = torch.stack(losses).sum().detach()
    dist.all_reduce(loss)
    return loss.item()


def _gradients(built: ParallelModel) -> dict[str, Any]:
    """Those of all stages, and their norm."""
    pp, tied = built.meshes.pp, None
    if pp is not None and built.model.output is not None:
        tied = built.model.get_parameter("output.weight")
    norm = clipped_norm(built.model.named_parameters(), 0, pp_group=pp, tied=tied).total
    stages = [whole(built.model, gradients=True)]
    if pp is not None:
        stages *= 2
        dist.all_gather_object(stages, dict(stages[0]), group=pp)
    return {"norm": norm.item()} | {name: grad for stage in stages for name, grad in stage.items()}


def _step_twice(*overrides: str) -> list[dict[str, Any]]:
    """Loss, norm and every gradient of two steps of plain gradient descent, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "FSDP2-wrapped module")
        return _step_twice_of(*overrides)


def _step_twice_of(*overrides: str) -> list[dict[str, Any]]:
    process = Process.from_environment()
    batch = f"--training.global_batch_size={SAMPLES}"
    plan = make_plan(None, [*TINY, *as_overrides(*ALIKE, *overrides), batch], process.world_size)
    config = plan.config
    with torch.device("meta"):
        model = build_model(plan.family, plan.args)
    size, per_rank = config.training.local_batch_size, SAMPLES // plan.dims.batch
    built = build_parallel(
        model,
        split(model, config.parallel, attention_flops=0),
        plan,
        build_meshes(plan.dims, "cpu"),
        process,
    )
    init_weights(model, device=process.device, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    samples, steps = _samples(), []
    first = plan.dims.batch_rank(process.rank) * per_rank
    for _ in range(2):
        starts = range(first, first + per_rank, size)
        loss = _forward_backward(built, [_call(samples, slice(s, s + size)) for s in starts])
        # Tensor-parallel ranks have the same one.
        steps.append({"loss": loss / plan.dims.tp} | _gradients(built))
        optimizer.step()
        optimizer.zero_grad()
    return steps


@pytest.fixture(scope="module")
def alone(workers: Mapping[int, Workers]) -> dict[str, list[dict[str, Any]]]:
    """The steps of one process, by family."""
    return {
        name: workers[1].run(_step_twice, f"model.name={name}", "training.local_batch_size=4")[0]
        for name in ("bert", "megatron_bert")
    }


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["bert", "megatron_bert"])
def test_a_parallel_encoder_has_the_loss_and_every_gradient_of_one_process(
    family: str, layout: str, alone: dict[str, Any], workers: Mapping[int, Workers]
) -> None:
    size = 4 if layout.startswith("tp") else 2
    got = workers[2].run(
        _step_twice,
        f"model.name={family}",
        f"training.local_batch_size={size}",
        f"training.global_batch_size={SAMPLES}",
        *LAYOUTS[layout],
    )[0]
    for step, expected in zip(got, alone[family], strict=True):
        assert step.keys() == expected.keys()
        for name in ("loss", "norm"):
            assert step[name] == pytest.approx(expected[name], rel=1e-5), name
        largest = max(np.abs(g).max() for n, g in expected.items() if n not in ("loss", "norm"))
        for name in step.keys() - {"loss", "norm"}:
            gradient, reference = step[name], expected[name]
            # Softmax does not see what is added to all keys: that gradient is rounding.
            scale = largest if name.endswith("wk.bias") else np.abs(reference).max()
            assert np.abs(gradient[: len(reference)] - reference).max() <= 2e-5 * scale, name
            # Rows beyond pad a vocabulary.
            assert not gradient[len(reference) :].any(), name
