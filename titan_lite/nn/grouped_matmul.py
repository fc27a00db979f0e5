"""Matmuls of groups of rows, each with the weight of its expert.

torch's grouped_mm rejects float32 on fake tensors and under compile, and has no FLOP formula, so
these operators wrap it.

Shape suffixes: R rows, ordered by expert, E experts, I features in, O features out.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("titan_lite::grouped_matmul", mutates_args=())
def grouped_matmul(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Returns (R, O): each row times the transposed weight of its expert.

    ends_E: int32, the index after each expert's last row.
    """
    return grouped_mm(x_RI, weight_EOI.mT, offs=ends_E)


@torch.library.custom_op("titan_lite::grouped_matmul_weight_grad", mutates_args=())
def grouped_matmul_weight_grad(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    """Returns (E, O, I): the gradient of each expert's weight; zero for an expert without rows."""
    return grouped_mm(grad_RO.T, x_RI, offs=ends_E)


@grouped_matmul.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@grouped_matmul_weight_grad.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(ends_E.shape[0], grad_RO.shape[1], x_RI.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_RI, weight_EOI, ends_E = ctx.saved_tensors
    # grouped_mm rejects the gradient of a sum, whose strides are zero.
    grad_RO = grad_RO.contiguous()
    grad_x_RI = grouped_matmul(grad_RO, weight_EOI.mT, ends_E)
    return grad_x_RI, grouped_matmul_weight_grad(grad_RO, x_RI, ends_E), None


grouped_matmul.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.titan_lite.grouped_matmul)
def _flops(x_RI: list[int], weight_EOI: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_RI) * weight_EOI[1]


@register_flop_formula(torch.ops.titan_lite.grouped_matmul_weight_grad)
def _weight_grad_flops(grad_RO: list[int], x_RI: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad_RO) * x_RI[1]
