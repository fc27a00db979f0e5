"""The planner's constants: how much of a datasheet's numbers training reaches, with sources.

A name is the quantity, then what it belongs to: "matmul/A100" is the share of the matmul peak that
an A100 reaches, "matmul/A100/llm-foundry" the same under that software stack. Look-ups take the
most special name there is. docs/planning.md explains them.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

LITERATURE: dict[str, float] = {
    # Share of the matmul peak that large bfloat16 products reach in training.
    "matmul": 0.75,
    "matmul/A100": 0.82,  # 268 of 312 TFLOP/s in the best microbenchmarks, less in training
    "matmul/A100-64": 0.88,  # Leonardo's part has 124 multiprocessors
    "matmul/H100": 0.70,  # 792 of 989 TFLOP/s in the best microbenchmarks; the power limit binds
    "matmul/V100": 0.70,
    "matmul/MI250X": 0.45,  # arXiv:2312.12705: 36 to 38 % of peak for 22B and 175B models
    "matmul/MI300X": 0.55,  # microbenchmarks reach 0.58
    # Share of the bfloat16 peak that attention reaches on long sequences.
    "attention/flash": 0.45,
    "attention/flash/A100": 0.60,  # FlashAttention-2's paper
    "attention/flash/H100": 0.33,  # FlashAttention-2, head size 128: 335 TFLOP/s at 16k tokens
    "attention/flash1": 0.27,
    "attention/cudnn": 0.55,  # cuDNN 539, FlashAttention-3 616 TFLOP/s at 16k tokens
    "attention/unskipped": 0.22,  # half of flash: computes what the causal mask hides as well
    "attention/unskipped/A100": 0.30,
    "attention/unskipped/H100": 0.165,
    "attention_forward": 1.05,
    "attention_forward_tokens": 350.0,
    "attention_backward": 0.95,
    "attention_backward_tokens": 900.0,
    "unfused_matmul": 0.6,  # of "matmul": the products of unfused attention
    "hbm": 0.80,  # share of the memory bandwidth that element-wise kernels reach
    "float8": 0.85,  # of the float8 peak times "matmul"
    "inner": 128.0,  # a product over K reaches K / (K + inner) of its rate
    "inner8": 256.0,  # the same in float8
    "kernel_us": 1.5,  # between the starts of two kernels
    # Collectives.
    "link": 0.75,  # of one direction of the links within a node: 230 to 250 of 300 GB/s on A100s
    "nic": 0.80,  # of the network between nodes
    "hop_us": 3.4,  # NCCL's tuning table, ring, simple protocol
    "node_hop_us": 14.0,
    "interference": 0.18,  # a hidden collective slows what hides it by this share of its time
    "async_tp": 0.5,  # of tensor-parallel communication hidden; 0.3 to 0.75 seen
    "straggler": 0.004,  # of a step, per doubling of the nodes
    "straggler_ms": 5.0,  # per doubling of the nodes
    # Power, of the range between idle and the limit.
    "idle_watts": 0.12,
    "memory_watts": 0.65,
    "waiting_watts": 0.35,
}
"""Datasheets, microbenchmarks and kernel counts alone: nothing was fitted to a run."""

FITTED: dict[str, float] = {
    "matmul/A100": 0.7773,
    "matmul/A100-64": 0.93,
    "matmul/H100": 0.6704,
    "matmul/MI250X": 0.3525,
    "hbm": 0.7373,
    "matmul/A100/llm-foundry": 0.7452,
    "attention/unskipped/A100": 0.3207,
    "hbm/A100/llm-foundry": 0.9273,
    "matmul/H100/llm-foundry": 0.6288,
    "attention/unskipped/H100": 0.1842,
    "hbm/H100/llm-foundry": 0.7672,
}
"""What `titan-lite plan validate --fit` finds on assets/published_rows.toml, over LITERATURE."""

SPREADS: dict[str, float] = {
    "matmul/A100": 0.10,
    "matmul/A100-64": 0.10,
    "matmul/H100": 0.12,
    "matmul/MI250X": 0.30,
    "hbm": 0.08,
    "matmul/A100/llm-foundry": 0.12,
    "attention/unskipped/A100": 0.12,
    "hbm/A100/llm-foundry": 0.12,
    "matmul/H100/llm-foundry": 0.12,
    "attention/unskipped/H100": 0.12,
    "hbm/H100/llm-foundry": 0.12,
}
"""The constants that are fitted, with the spread (log standard deviation) believed before."""

# First words of a device's name -> its architecture and multiprocessors (AMD: compute units).
ARCHITECTURES = (
    ("A100 SXM 64GB", "A100-64", 124),
    ("A100", "A100", 108),
    ("A800", "A100", 108),
    ("H100 PCIe", "H100", 114),
    ("H100", "H100", 132),
    ("H200", "H100", 132),
    ("GH200", "H100", 132),
    ("B200", "B200", 148),
    ("GB200", "B200", 148),
    ("V100", "V100", 80),
    ("MI250X", "MI250X", 110),
    ("MI300X", "MI300X", 304),
)


def base_name(name: str) -> str:
    """The name in LITERATURE that covers this one: "hbm" for "hbm/A100/llm-foundry"."""
    while name not in LITERATURE:
        name = name.rpartition("/")[0]
    return name


def architecture(device: str) -> tuple[str, int]:
    """The architecture and multiprocessors of a device; 108 of one that is not listed."""
    for words, name, count in ARCHITECTURES:
        if device.startswith(words):
            return name, count
    return device, 108


@dataclass(frozen=True)
class Constants:
    """Constants as one device and software stack see them."""

    values: Mapping[str, float]
    architecture: str = ""
    stack: str = ""

    def __getitem__(self, name: str) -> float:
        return self._found[name]

    @functools.cached_property
    def _found(self) -> "_Found":
        return _Found(self.values, self.architecture, self.stack)


class _Found(dict[str, float]):
    def __init__(self, values: Mapping[str, float], architecture: str, stack: str) -> None:
        super().__init__()
        self._values, self._suffixes = values, (f"/{architecture}/{stack}", f"/{architecture}", "")

    def __missing__(self, name: str) -> float:
        # Leonardo's A100 is an A100 where nothing more special is known.
        plain = [s.replace("A100-64", "A100") for s in self._suffixes]
        suffixes = (*self._suffixes[:2], *plain)
        self[name] = next(self._values[name + s] for s in suffixes if name + s in self._values)
        return self[name]
