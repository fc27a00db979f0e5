"""Async tensor parallel: inductor splits an all-gather and the matmuls that read it, or a matmul
and its reduce-scatter, into chunks that overlap, over symmetric memory."""

import warnings

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch.distributed.device_mesh import DeviceMesh

ALL_GATHER_MATMUL = "fused_all_gather_matmul"
MATMUL_REDUCE_SCATTER = "fused_matmul_reduce_scatter"
FUSED = {
    "symm_mem.fused_all_gather_matmul.default": ALL_GATHER_MATMUL,
    "symm_mem.fused_all_gather_scaled_matmul.default": ALL_GATHER_MATMUL,
    "symm_mem.fused_matmul_reduce_scatter.default": MATMUL_REDUCE_SCATTER,
    "symm_mem.fused_scaled_matmul_reduce_scatter.default": MATMUL_REDUCE_SCATTER,
}
"""The operations that the rewrite inserts into a graph, including the scaled ones of float8."""


def check_async_tp(device: torch.device, tp: int) -> None:
    """Raises ValueError if `device` and its tensor-parallel group have no symmetric memory."""
    kernel = f"symm_mem::{ALL_GATHER_MATMUL}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(kernel, device.type.upper()):
        raise ValueError(
            f"requires NVIDIA GPUs with symmetric memory over NVLink, got {device}; set "
            "parallel.async_tp = false"
        )
    if device.type != "cuda":
        return
    # The tensor-parallel axis is the innermost one, so its ranks are consecutive.
    first = device.index - device.index % tp
    for peer in range(first, min(first + tp, torch.cuda.device_count())):
        if peer != device.index and not torch.cuda.can_device_access_peer(device, peer):
            raise ValueError(
                f"requires peer access between the {tp} GPUs of a tensor-parallel group, but "
                f"{device} cannot access cuda:{peer}; set parallel.async_tp = false"
            )


def apply_async_tp(mesh: DeviceMesh, *, enable: bool) -> None:
    """Turns the rewrite on for graphs with collectives of the 1D `mesh`, or off for all graphs.

    Inductor's settings are global, so a run without it must reset those of an earlier run.
    """
    from titan_lite.parallel.torch_compiler import CustomGraphPass, config, counters

    class CountFused(CustomGraphPass):
        """Adds the fused operations of a rewritten graph to inductor's counters.

        A graph from inductor's cache is not rewritten again, but inductor stores with it what its
        compilation added to the counters, and adds that again.
        """

        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.nodes:
                if name := FUSED.get(str(node.target)):
                    counters["inductor"][name] += 1

        def uuid(self) -> str:
            # Part of inductor's cache key: must be changed whenever this pass changes.
            return "titan_lite.CountFused"

    config._micro_pipeline_tp = enable
    config.post_grad_custom_post_pass = CountFused() if enable else None
    for name in (ALL_GATHER_MATMUL, MATMUL_REDUCE_SCATTER):
        counters["inductor"].pop(name, None)
    if enable:
        with warnings.catch_warnings():
            # Deprecated in torch 2.13, although the rewrite still needs it.
            warnings.simplefilter("ignore", FutureWarning)
            symmetric_memory.enable_symm_mem_for_group(mesh.get_group().group_name)


def count_fused() -> dict[str, int]:
    """Returns the number of fused operations in all graphs that this run compiled."""
    from titan_lite.parallel.torch_compiler import counters

    names = (ALL_GATHER_MATMUL, MATMUL_REDUCE_SCATTER)
    return {f"{name}s": counters["inductor"][name] for name in names}
