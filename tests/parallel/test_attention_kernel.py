"""The kernel of attention.kernel is the one that torch is left, or is refused with the reason."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.compiler import config as compiler_config
from torch.nn.attention import register_flash_attention_impl
from torch.nn.functional import scaled_dot_product_attention

from tests.distributed import Workers
from tests.parallel.test_activation_checkpoint import Operations
from tests.runs import train
from titan_lite.config.load import load_config
from titan_lite.dryrun.run import _eager
from titan_lite.parallel.attention_kernel import (
    applied_attention_kernel,
    apply_attention_kernel,
    check_attention_kernel,
    merged_kernel,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _torchs_choice_afterwards() -> Iterator[None]:
    yield
    apply_attention_kernel("auto")


@pytest.fixture
def activated() -> Iterator[list[str]]:
    """FlashAttention 3 and 4 as if installed; a list of what is active."""
    from torch.nn.attention import _fa3, _fa4

    active: list[str] = []

    def registering(name: str) -> Any:
        def register() -> Any:
            active.append(name)
            return SimpleNamespace(remove=lambda: active.remove(name))

        return register

    for name in ("FA3", "FA4"):
        register_flash_attention_impl(name, register_fn=registering(name))
    yield active
    apply_attention_kernel("auto")
    register_flash_attention_impl("FA3", register_fn=_fa3.register_flash_attention_fa3)
    register_flash_attention_impl("FA4", register_fn=_fa4.register_flash_attention_fa4)


def test_torch_is_left_the_kernel_alone_and_all_of_them_again(activated: list[str]) -> None:
    for kernel, active in {
        "flash3": ["FA3"],
        "flash4": ["FA4"],
        "cudnn": [],
        "flash2": [],
        "math": [],
        "auto": [],
    }.items():
        apply_attention_kernel(kernel)
        assert applied_attention_kernel() == kernel
        assert activated == active
        # Else torch's cache on the disk would give one kernel's graph for another's.
        assert compiler_config.cache_key_tag == ("" if kernel == "auto" else f" {kernel} attention")
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize(("kernel", "fused"), [("auto", 1), ("flash2", 1), ("math", 0)])
def test_attention_takes_the_kernel_that_is_left(kernel: str, fused: int) -> None:
    apply_attention_kernel(kernel)
    q = torch.randn(1, 2, 8, 16)
    with Operations() as operations:
        scaled_dot_product_attention(q, q, q, is_causal=True)
    assert operations.counts["attention"] == fused


@pytest.mark.parametrize(
    ("kernel", "device", "capability", "message"),
    [
        (
            "cudnn",
            CPU,
            (9, 0),
            '"cudnn" requires a CUDA device, got cpu; set attention.kernel = "a',
        ),
        ("flash2", CUDA, (7, 0), "requires compute capability 8.0 to 12.x, got 7.0"),
        ("flash3", CUDA, (10, 0), '"flash3" requires compute capability 9.0 to 9.x, got 10.0'),
        ("flash4", CUDA, (8, 0), '"flash4" requires compute capability 9.0 to 10.x, got 8.0'),
        (
            "flash3",
            CUDA,
            (9, 0),
            "requires the package flash_attn_interface: No module named 'flash_attn_interface'; "
            'install it, or set attention.kernel = "auto"',
        ),
        ("flash4", CUDA, (9, 0), "requires the package flash_attn.cute: No module named 'flash_a"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused(
    kernel: str,
    device: torch.device,
    capability: tuple[int, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_attention_kernel(kernel, device)


def test_a_torch_without_cudnn_is_refused_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="requires a torch built with cuDNN; set"):
        check_attention_kernel("cudnn", CUDA)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    check_attention_kernel("cudnn", CUDA)


def test_what_every_machine_has_is_not_refused(activated: list[str]) -> None:
    check_attention_kernel("auto", CPU)
    check_attention_kernel("math", CPU)
    assert activated == []


@pytest.mark.parametrize(
    ("kernel", "device_type", "capability", "head_size", "deterministic", "merged"),
    [
        ("auto", "cuda", (9, 0), 128, False, "cudnn"),
        ("auto", "cuda", (10, 0), 64, False, "cudnn"),
        ("auto", "cuda", (8, 0), 128, False, "flash"),
        ("auto", "cuda", (9, 0), 256, False, "flash"),
        ("auto", "cuda", (9, 0), 20, False, "flash"),
        ("auto", "cuda", (9, 0), 128, True, "flash"),
        ("auto", "cpu", (9, 0), 128, False, "flash"),
        ("cudnn", "cuda", (8, 0), 128, False, "cudnn"),
        ("flash3", "cuda", (9, 0), 128, False, "flash"),
    ],
)
def test_parts_of_a_sequence_are_merged_from_cudnn_on_hopper(
    kernel: str,
    device_type: str,
    capability: tuple[int, int],
    head_size: int,
    deterministic: bool,
    merged: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert merged_kernel(kernel, device_type, head_size, deterministic=deterministic) == merged


def test_a_run_with_another_kernel_trains_the_same_model_and_reports_it(
    one_process: Workers, tmp_path: Path
) -> None:
    records = {}
    for kernel in ("auto", "math"):
        settings = ("--training.steps=2", f"--attention.kernel={kernel}")
        records[kernel] = one_process.run(train, tmp_path / kernel, *settings)[0]
        run = json.loads((tmp_path / kernel / "run.json").read_text())
        assert run["applied"]["attention"] == kernel
    for key in ("loss", "grad_norm"):
        got, expected = ([r[key] for r in records[k]] for k in ("math", "auto"))
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kernel", "traced"), [("auto", "auto"), ("math", "math"), ("flash3", "auto")]
)
def test_a_dry_run_needs_no_kernel_of_gpus(kernel: str, traced: str) -> None:
    config = load_config(None, [f"--attention.kernel={kernel}"]).config
    assert _eager(config).attention.kernel == traced
