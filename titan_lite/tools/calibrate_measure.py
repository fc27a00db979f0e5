"""The measurements of titan-lite plan calibrate: kernels and collectives of this machine."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_lite.config.schema import Model
from titan_lite.models.plan import make_plan
from titan_lite.models.registry import families
from titan_lite.nn.attention import ScaledDotProductAttention
from titan_lite.nn.block import Block
from titan_lite.nn.build_model import build_model
from titan_lite.nn.rope import RotaryEmbedding
from titan_lite.nn.token_context import NO_CONTEXT
from titan_lite.parallel.tensor import apply_tp
from titan_lite.planner.job import Job
from titan_lite.planner.read import read_job
from titan_lite.planner.search import divisors
from titan_lite.runtime.collectives import all_gather_single, reduce_scatter_single
from titan_lite.runtime.distributed import (
    Process,
    all_reduce,
)
from titan_lite.training.loss import cross_entropy_sum

Work = Callable[[], object]
Seconds = dict[str, float]
ROUNDS, LAPS = 3, 5
# Share of the time budget for measuring; the rest is for start-up and for rounding of repetitions.
SHARE = 0.7
# `dim` of the model whose loss is measured.
LOSS_DIM = 64
# Blocks of the model that is measured as a whole.
BLOCKS = 2


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured kernels, which then take milliseconds on a kind of device.

    linears: (tokens, inputs, outputs). lengths: sequence lengths of attention. batches: tokens of
    the element-wise kernels. rings: bytes of the collectives.
    """

    dim: int
    linears: Sequence[tuple[int, int, int]]
    lengths: Sequence[int]
    batches: Sequence[int]
    vocabulary: int
    rings: Sequence[int]


SIZES = {
    "cuda": Sizes(
        4096,
        ((4096, 4096, 4096), (8192, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096),
         (16384, 2048, 2048), (8192, 8192, 8192)),
        (2048, 8192, 32768),
        (16, 8192, 16384),
        65536,
        (2**20, 2**24, 2**28),
    ),
    "cpu": Sizes(
        256,
        ((512, 256, 256), (2048, 256, 256), (1024, 256, 768), (1024, 768, 256), (1024, 512, 1536),
         (1024, 1536, 512)),
        (256, 512, 1024, 2048),
        (16, 1024, 4096),
        4096,
        (2**14, 2**18, 2**22, 2**24),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Ring:
    """A collective over ranks that are `stride` apart, on `size` bytes."""

    operation: str
    ranks: int
    stride: int
    size: int

    def __str__(self) -> str:
        return f"{self.operation} of {self.size:,} bytes, ranks {self.ranks}, stride {self.stride}"


@dataclass(frozen=True)
class Machine:
    """The measured device, and how much is measured; equal on all ranks.

    per_node: processes of a node. budget: seconds for all measurements.
    """

    process: Process
    per_node: int
    budget: float

    @property
    def sizes(self) -> Sizes:
        """Sizes for this kind of device."""
        return SIZES[self.process.device.type]

    @property
    def dtype(self) -> torch.dtype:
        """The measured dtype: float32 on a CPU; bfloat16 on a GPU, or float16 without it."""
        if self.process.device.type == "cpu":
            return torch.float32
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16

    @property
    def other_dtype(self) -> torch.dtype:
        """The dtype of which only the peak is measured."""
        return torch.bfloat16 if self.dtype is torch.float32 else torch.float32

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks of the measured blocks, within a node."""
        return math.gcd(self.per_node, self.job().args.num_heads)

    def job(self) -> Job:
        """A job that runs the measured kernels."""
        dim = self.sizes.dim
        keys = {"dim": dim, "ffn_dim": 3 * dim, "num_heads": dim // 64, "num_kv_heads": dim // 64}
        overrides = [f"--model.{key}={value}" for key, value in keys.items()]
        plan = make_plan(None, overrides, 1, with_files=False)
        return dataclasses.replace(read_job(plan), width=self.dtype.itemsize)

    def rings(self) -> list[Ring]:
        """Collectives over every axis that a mesh of these processes can have."""
        world = self.process.world_size
        return [
            Ring(operation, ranks, stride, size)
            for ranks in divisors(world)[1:]
            for stride in sorted({1, world // ranks})
            for operation in ("all_gather", "reduce_scatter", "all_reduce")
            for size in self.sizes.rings
        ]

    def measure(self, cases: Mapping[str, Callable[[], Work]], share: float = 1.0) -> Seconds:
        """Returns the median seconds of each case, averaged over ranks. All ranks must call it.

        The cases take turns. share: part of the time budget.
        """
        laps: dict[str, list[float]] = {name: [] for name in cases}
        each = SHARE * share * self.budget / (max(1, len(cases)) * ROUNDS)
        for _ in range(ROUNDS):
            for name, make in cases.items():
                laps[name] += self._turn(make(), each)
        medians = [statistics.median(lap) for lap in laps.values()]
        total = torch.tensor(medians, dtype=torch.float64, device=self.process.device)
        means = all_reduce(total, "sum") / self.process.world_size
        return dict(zip(cases, means.tolist(), strict=True))

    def _turn(self, work: Work, budget: float) -> list[float]:
        self._lap(work, 1)
        once = torch.tensor(self._lap(work, 1), device=self.process.device)
        # All ranks must repeat a collective equally often.
        count = max(1, int(budget / LAPS / all_reduce(once, "max").item()))
        return [self._lap(work, count) for _ in range(LAPS)]

    def _lap(self, work: Work, count: int) -> float:
        on_gpu = self.process.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            work()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count


class Kernels:
    """The kernels to measure on one device. Each method makes its tensors, and returns the work."""

    def __init__(self, machine: Machine) -> None:
        self.sizes, self.dtype, self.other_dtype = machine.sizes, machine.dtype, machine.other_dtype
        self.device, self.args = machine.process.device, machine.job().args
        self.family = families()[Model().name]

    def cases(self) -> dict[str, Callable[[], Work]]:
        """Returns all kernels by name; each allocates its tensors when it is called."""
        cases: dict[str, Callable[[], Work]] = {"copy": self.copy, "optimizer": self.optimizer}
        for number, shape in enumerate(self.sizes.linears):
            cases[f"linear {number}"] = partial(self.linear, *shape, self.dtype)
            cases[f"other linear {number}"] = partial(self.linear, *shape, self.other_dtype)
        for length in self.sizes.lengths:
            for way in ("forward", "both"):
                cases[f"attention {way} {length}"] = partial(self.attention, length, way)
        for tokens in self.sizes.batches:
            cases[f"elementwise {tokens}"] = partial(self.elementwise, tokens)
        for tokens in self.sizes.batches[1:]:
            cases[f"blocks {tokens}"] = partial(self.blocks, tokens)
        return cases | {"loss": self.loss}

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, because a device draws less power for zeros."""
        numbers = torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
        return numbers.requires_grad_()

    def copy(self) -> Work:
        """A copy of as many bytes as the largest ring moves."""
        source = torch.randn(self.sizes.rings[-1] // 4, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def linear(self, M: int, K: int, N: int, dtype: torch.dtype) -> Work:
        """A linear layer's forward and backward."""
        x, weight = self.random(M, K, dtype=dtype), self.random(N, K, dtype=dtype)
        gradient = torch.randn(M, N, device=self.device, dtype=dtype)
        out = nn.functional.linear
        return lambda: torch.autograd.grad(out(x, weight), (x, weight), gradient)

    def attention(self, length: int, way: str) -> Work:
        """Causal attention of one sequence."""
        shape = 1, self.args.num_heads, length, self.args.head_size
        qkv, attend = (
            [self.random(*shape) for _ in range(3)],
            ScaledDotProductAttention(causal=True),
        )
        if way == "forward":
            return lambda: attend(*qkv, NO_CONTEXT)
        gradient = torch.randn(shape, device=self.device, dtype=self.dtype)
        return lambda: torch.autograd.grad(attend(*qkv, NO_CONTEXT), qkv, gradient)

    def elementwise(self, tokens: int) -> Work:
        """The element-wise kernels of a block, forward and backward."""
        args = dataclasses.replace(self.args, max_seq_len=tokens)
        rope = RotaryEmbedding(args).to(self.device)
        block = Block(args, rope).to(self.device, self.dtype)
        rope.init_buffers(self.device)
        x, gate, up = (self.random(1, tokens, n) for n in (args.dim, args.ffn_dim, args.ffn_dim))
        heads = [self.random(1, tokens, args.num_heads, args.head_size) for _ in range(2)]

        def work() -> None:
            h = x + block.attention_norm(x)
            outputs = (
                h + block.ffn_norm(h),
                nn.functional.silu(gate) * up,
                *block.attention.rope(*heads),
            )
            torch.autograd.grad(outputs, (x, gate, up, *heads), list(outputs))

        return work

    def blocks(self, tokens: int, mesh: DeviceMesh | None = None) -> Work:
        """Blocks of a model, forward and backward; with tensor parallel over `mesh`."""
        args = dataclasses.replace(self.args, num_layers=BLOCKS)
        model = build_model(self.family, args).to(self.device, self.dtype)
        model.init_buffers(self.device)
        ranks = 1
        if mesh is not None:
            apply_tp(model, mesh, self.family.tp_plan, sequence_parallel=True)
            ranks = mesh.size()
        length = self.sizes.lengths[0]
        x = self.random(tokens // length, length // ranks, args.dim)
        gradient = torch.randn_like(x)
        inputs = x, *model.layers.parameters()

        def work() -> None:
            torch.autograd.grad(model.run_blocks(x, NO_CONTEXT), inputs, gradient)

        return work

    def loss(self) -> Work:
        """The head and its cross-entropy, so narrow that the matmuls take little time."""
        tokens = self.sizes.batches[1]
        hidden, weight = self.random(tokens, LOSS_DIM), self.random(self.sizes.vocabulary, LOSS_DIM)
        labels = torch.arange(tokens, device=self.device) % self.sizes.vocabulary

        def work() -> None:
            loss = cross_entropy_sum(
                hidden, weight, labels=labels, num_chunks=1, vocab_size=self.sizes.vocabulary
            )
            torch.autograd.grad(loss, (hidden, weight))

        return work

    def optimizer(self) -> Work:
        """An optimizer's step, and the norm of its gradients."""
        with torch.device(self.device):
            layers = nn.Sequential(*(nn.Linear(*shape[1:]) for shape in self.sizes.linears))
        for parameter in layers.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(layers.parameters(), fused=True)

        def work() -> None:
            nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
            optimizer.step()

        return work


def exchanges(machine: Machine) -> dict[str, Callable[[], Work]]:
    """Returns the collectives to measure, by name. All ranks must call it."""
    process, groups = machine.process, {}
    for ranks in divisors(process.world_size)[1:]:
        shape = process.world_size // ranks, ranks
        mesh = init_device_mesh(process.device.type, shape, mesh_dim_names=("outer", "inner"))
        groups[ranks, 1] = mesh.get_group("inner")
        if shape[0] > 1:
            groups[shape[0], ranks] = mesh.get_group("outer")
    return {
        str(ring): partial(_exchange, ring, groups[ring.ranks, ring.stride], process.device)
        for ring in machine.rings()
    }


def tensor_parallel(machine: Machine, kernels: Kernels) -> dict[str, Callable[[], Work]]:
    """Returns blocks with tensor parallel over the ranks of a node. All ranks must call it."""
    t = machine.tp
    mesh = init_device_mesh(
        machine.process.device.type,
        (machine.process.world_size // t, t),
        mesh_dim_names=("outer", "tp"),
    )["tp"]
    return {
        f"blocks {tokens}, tp {t}": partial(kernels.blocks, tokens, mesh)
        for tokens in machine.sizes.batches[1:]
    }


def _exchange(ring: Ring, group: dist.ProcessGroup, device: torch.device) -> Work:
    part = torch.zeros(ring.size // 4 // ring.ranks, device=device)
    whole = torch.zeros(len(part) * ring.ranks, device=device)
    match ring.operation:
        case "all_gather":
            return lambda: all_gather_single(whole, part, group)
        case "reduce_scatter":
            return lambda: reduce_scatter_single(part, whole, group=group)
    return lambda: dist.all_reduce(whole, group=group)


def overlaps(machine: Machine, kernels: Kernels, seconds: Seconds) -> dict[str, Callable[[], Work]]:
    """Returns matmuls alone, and matmuls during an all-gather over all ranks."""
    process, sizes = machine.process, machine.sizes
    ring = Ring("all_gather", process.world_size, 1, sizes.rings[-1])
    count = math.ceil(1.5 * seconds[str(ring)] / seconds["linear 0"])
    part = torch.zeros(ring.size // 4 // ring.ranks, device=process.device)
    whole = torch.zeros(len(part) * ring.ranks, device=process.device)

    def products() -> Work:
        product = kernels.linear(*sizes.linears[0], kernels.dtype)
        return lambda: [product() for _ in range(count)]

    def overlapped() -> Work:
        several = products()

        def work() -> None:
            handle = all_gather_single(whole, part, async_op=True)
            several()
            handle.wait()

        return work

    return {"alone": products, "overlapped": overlapped}
