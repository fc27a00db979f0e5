"""torch.compile per transformer block: equal blocks share one graph, so one is compiled."""

import logging
import os
import shutil
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch

from titan_lite.config.schema import Compile
from titan_lite.nn.transformer import Transformer
from titan_lite.parallel.attention_ops import CPU_FLASH

logger = logging.getLogger(__name__)

# Steps that may compile: the second as well, because FSDP2 initializes lazily in the first.
WARMUP_STEPS = 2


def check_compiler(device: torch.device) -> None:
    """Raises ValueError if inductor lacks a compiler for the kernels of `device`."""
    if device.type != "cpu":
        # Triton's launchers are written in C.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            raise ValueError(
                "requires a C compiler, but neither gcc nor clang is on PATH: install one, or set "
                "the environment variable CC"
            )
        return
    from titan_lite.parallel.torch_compiler import InvalidCxxCompiler, config, cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        tried = ", ".join(filter(None, config.cpp.cxx))
        raise ValueError(
            f"requires a C++ compiler, but {tried} does not run: install g++, or set the "
            "environment variable CXX"
        ) from None
    if not (headers := Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise ValueError(
            f"requires Python's headers, but {headers} does not exist: install the package "
            "that has them (python3-dev on Debian and Ubuntu)"
        )


def apply_compile(model: Transformer, section: Compile) -> None:
    """Compiles each block in place, as one graph.

    Resets dynamo first: it caches graphs by code, so the shapes of an earlier model in this process
    would make it recompile this model with dynamic shapes.
    """
    if not section.enable:
        return
    torch.compiler.reset()
    if section.covers("model"):
        _untag_attention_on_cpu()
        for block in model.layers.children():
            block.compile(fullgraph=True)


def _untag_attention_on_cpu() -> None:
    """Removes torch's tag for random operators from the CPU's fused attention: it has no dropout.

    With the tag, activation checkpointing saves a random state, which torch 2.13 confuses with
    another saved value of a tensor-parallel block.
    """
    tags = CPU_FLASH.default.tags
    if torch.Tag.nondeterministic_seeded in tags:
        tags.remove(torch.Tag.nondeterministic_seeded)


@dataclass
class Compilations:
    """Counts the graphs that dynamo compiles after this object is created.

    recompilations: number of graphs that were recompiled after the start-up steps.
    """

    recompilations: int = 0
    _steps: int = 0
    _earlier_graphs: int = field(default_factory=lambda: _num_graphs())

    @property
    def graphs(self) -> int:
        """Number of graphs compiled so far; equal blocks share one."""
        return _num_graphs() - self._earlier_graphs

    def after_validation(self) -> None:
        """Ignores the compilations of a validation: the first one compiles forward-only graphs."""
        from titan_lite.parallel.torch_compiler import clear_compilation_metrics

        clear_compilation_metrics()

    def after_step(self, step: int, _: object = None) -> None:
        """Logs dynamo's reason for each recompilation in the step, except during start-up."""
        from titan_lite.parallel.torch_compiler import (
            clear_compilation_metrics,
            get_compilation_metrics,
        )

        reasons = [metrics.recompile_reason for metrics in get_compilation_metrics()]
        clear_compilation_metrics()
        self._steps += 1
        if self._steps <= WARMUP_STEPS:
            return
        sentences = [" ".join(reason.split()) for reason in reasons if reason]
        self.recompilations += len(sentences)
        for reason in sentences:
            logger.warning(
                "Step %d recompiled (%d times so far since start-up): %s",
                step,
                self.recompilations,
                reason,
            )


def _num_graphs() -> int:
    from titan_lite.parallel.torch_compiler import counters

    return int(counters["stats"]["unique_graphs"])
