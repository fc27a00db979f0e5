"""The operators of torch's fused attention, whose names are private."""

import torch

aten = torch.ops.aten

FLASH = aten._scaled_dot_product_flash_attention
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward
CPU_FLASH = aten._scaled_dot_product_flash_attention_for_cpu
CPU_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
EFFICIENT = aten._scaled_dot_product_efficient_attention
CUDNN = aten._scaled_dot_product_cudnn_attention
CUDNN_BACKWARD = aten._scaled_dot_product_cudnn_attention_backward
OVERRIDEABLE = aten._scaled_dot_product_fused_attention_overrideable
