"""The norm of gradients in every placement, against float64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests.distributed import Workers
from titan_lite.parallel.gradients import clipped_norm, global_norm


@pytest.mark.parametrize("rows", [2048, 512], ids=["whole", "a quarter"])
def test_the_norm_of_many_elements_is_exact_whatever_their_sizes_and_sharding(rows: int) -> None:
    """Gradients like an embedding's: most tokens do not occur, and some occur often."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(2048, 1, generator=generator).pow(8)
    grad = (torch.randn(2048, 512, generator=generator) * sizes)[:rows]
    torch.testing.assert_close(
        global_norm({"w": grad}).total,
        torch.linalg.vector_norm(grad.double()).float(),
        rtol=2e-7,
        atol=0,
    )


def _norm_of_placements() -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "fsdp"))
    placements: list[tuple[Placement, Placement]] = [
        (Replicate(), Shard(0)),
        (Replicate(), Replicate()),
        (Shard(0), Shard(1)),
        (Replicate(), Shard(0)),
    ]
    # The last one has fewer rows than ranks: some hold nothing of it.
    shapes = [(6, 4), (3,), (5, 7), (1, 4)]
    whole = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [distribute_tensor(t, mesh, p) for t, p in zip(whole, placements, strict=True)]
    expected = torch.cat([t.flatten() for t in whole]).double().norm()
    return global_norm(dict(zip("abcd", grads, strict=True))).total.item(), expected.item()


@pytest.mark.distributed
def test_every_element_counts_once_whatever_its_placements(workers: dict[int, Workers]) -> None:
    for norm, expected in workers[4].run(_norm_of_placements):
        assert norm == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_the_scale_clips_to_the_norm_asked_for_as_torch_does(loss_scale: float | None) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    gradient = torch.tensor([3.0, 4.0])
    scale = None if loss_scale is None else torch.tensor(loss_scale)
    for max_norm in (0.0, 1.0, 7.0):
        parameter.grad = gradient * (loss_scale or 1.0)
        norm = clipped_norm([("w", parameter)], max_norm, loss_scale=scale)
        assert norm.total == 5
        divided = parameter.grad if norm.divisor is None else parameter.grad / norm.divisor
        parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_([parameter], max_norm or torch.inf)
        torch.testing.assert_close(divided, parameter.grad, rtol=1e-6, atol=0)
    assert clipped_norm([("w", parameter)], 0.0).divisor is None


def _fsdp_sum() -> float:
    """The gradient of a model in which each rank has a separate loss."""
    from titan_lite.config.dims import ParallelDims
    from titan_lite.config.schema import Model, Parallel
    from titan_lite.models.registry import resolve
    from titan_lite.nn.build_model import build_model
    from titan_lite.parallel.fsdp import apply_fsdp
    from titan_lite.parallel.mesh import build_meshes

    section = Parallel(dp_replicate=2)
    meshes = build_meshes(ParallelDims.resolve(section, dist.get_world_size()), "cpu")
    torch.manual_seed(0)
    model = build_model(
        *resolve(Model(dim=8, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=8))
    )
    dtype = torch.float32
    apply_fsdp(model, meshes.fsdp, section, param_dtype=dtype, reduce_dtype=dtype)
    model(torch.zeros(1, 4, dtype=torch.int64), head_loss=lambda h, w: w.sum() * 1.0).backward()
    assert model.output is not None
    grad = model.output.weight.grad
    assert isinstance(grad, DTensor)
    return grad.full_tensor().mean().item()


@pytest.mark.distributed
def test_gradients_are_summed_over_ranks_and_not_averaged(workers: dict[int, Workers]) -> None:
    assert workers[4].run(_fsdp_sum) == [4.0] * 4
