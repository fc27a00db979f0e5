"""Selects the attention kernel: torch's choice, or one for the whole process."""

from typing import Literal

import torch
from torch.backends import cuda, cudnn
from torch.compiler import config as compiler_config
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from titan_lite.config.schema import AttentionKernel

MergedKernel = Literal["flash", "cudnn"]
"""A kernel that returns its log-sum-exp, which is needed to merge results for parts of the keys."""

# torch's names for implementations that replace its own flash attention.
FLASH_IMPLS = {"flash3": "FA3", "flash4": "FA4"}
PACKAGES = {"flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
# First and last major compute capability that has each kernel.
CAPABILITIES = {"cudnn": (8, 12), "flash2": (8, 12), "flash3": (9, 9), "flash4": (9, 10)}
# Major compute capabilities on which cuDNN is twice as fast as torch's flash attention 2, and on
# which torch prefers it.
PREFERS_CUDNN = (9, 10)
# The largest head size that cuDNN's backward supports on every device.
MAX_CUDNN_HEAD_SIZE = 128
USERS_TAG = compiler_config.cache_key_tag


def check_attention_kernel(kernel: AttentionKernel, device: torch.device) -> None:
    """Raises ValueError if the device or this installation does not have the kernel."""
    if kernel in ("auto", "math"):
        return
    remedy = 'set attention.kernel = "auto"'
    if device.type != "cuda":
        raise ValueError(f'"{kernel}" requires a CUDA device, got {device.type}; {remedy}')
    major, minor = torch.cuda.get_device_capability(device)
    first, last = CAPABILITIES[kernel]
    if not first <= major <= last:
        raise ValueError(
            f'"{kernel}" requires compute capability {first}.0 to {last}.x, got {major}.{minor}; '
            f"{remedy}"
        )
    if kernel == "cudnn" and not cudnn.is_available():
        raise ValueError(f'"{kernel}" requires a torch built with cuDNN; {remedy}')
    if kernel in FLASH_IMPLS:
        try:
            activate_flash_attention_impl(FLASH_IMPLS[kernel])
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(
                f'"{kernel}" requires the package {PACKAGES[kernel]}: {error}; install it, '
                f"or {remedy}"
            ) from error


def apply_attention_kernel(kernel: AttentionKernel) -> None:
    """Restricts torch to this attention kernel; "auto" allows all."""
    impl = FLASH_IMPLS.get(kernel)
    if impl is not None:
        activate_flash_attention_impl(impl)
    elif current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    is_auto = kernel == "auto"
    cuda.enable_flash_sdp(is_auto or kernel.startswith("flash"))
    cuda.enable_cudnn_sdp(is_auto or kernel == "cudnn")
    cuda.enable_math_sdp(is_auto or kernel == "math")
    cuda.enable_mem_efficient_sdp(is_auto)
    # torch's cache key for compiled graphs on disk does not include the allowed kernels.
    compiler_config.cache_key_tag = USERS_TAG if is_auto else f"{USERS_TAG} {kernel} attention"


def applied_attention_kernel() -> str:
    """Returns the value of attention.kernel that is in effect."""
    allowed = {
        "flash": cuda.flash_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    if all(allowed.values()):
        return "auto"
    names = {impl: kernel for kernel, impl in FLASH_IMPLS.items()}
    flash = names.get(current_flash_attention_impl() or "", "flash2")
    return " or ".join(
        flash if kernel == "flash" else kernel for kernel, is_on in allowed.items() if is_on
    )


def merged_kernel(
    kernel: AttentionKernel, device_type: str, head_size: int, *, deterministic: bool
) -> MergedKernel:
    """Returns the kernel for attention to one rank's keys at a time; cuDNN on Hopper."""
    if kernel != "auto" or device_type != "cuda":
        return "cudnn" if kernel == "cudnn" else "flash"
    fits = head_size <= MAX_CUDNN_HEAD_SIZE and head_size % 8 == 0 and not deterministic
    major, _ = torch.cuda.get_device_capability()
    return "cudnn" if fits and cudnn.is_available() and major in PREFERS_CUDNN else "flash"
