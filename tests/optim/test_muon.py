"""Muon against torch's in one process, and its layouts against one process, bit by bit."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed import Workers
from titan_lite.config.optimizers import Muon as Section
from titan_lite.config.optimizers import OptimizerGroup
from titan_lite.config.problems import SettingError
from titan_lite.models import roles
from titan_lite.models.family import Family
from titan_lite.models.llama import LLAMA
from titan_lite.models.registry import families
from titan_lite.nn.build_model import build_model
from titan_lite.optim import muon, muon_exchange
from titan_lite.optim.muon import Muon, build_muon
from titan_lite.optim.nonfinite import step_if
from titan_lite.optim.optimizer import OptimizerContext, Parameter, parameters_of

# Name, shape, and the dim that tensor parallel splits. Rows that 2 and 4 ranks do not divide, more
# ranks than rows, wide, tall and square ones, and a stack of experts.
MATRICES = {
    "layers.0.attention.wq.weight": ((10, 14), 0),
    "layers.0.attention.wo.weight": ((14, 10), 1),
    "layers.0.router.weight": ((3, 14), None),
    "layers.0.experts": ((5, 6, 14), None),
    # Sharded by rows, as where ranks do not divide the number of experts.
    "layers.1.few_experts": ((3, 12, 14), None),
    "layers.1.w1.weight": ((38, 14), 0),
    "layers.1.w2.weight": ((14, 38), 1),
    "layers.1.square.weight": ((12, 12), None),
}
LR, DECAY, STEPS = 0.02, 0.1, 3


def drawn(name: str, step: int) -> Tensor:
    """A parameter (step 0), or its gradient in a step."""
    shape, _ = MATRICES[name]
    seed = list(MATRICES).index(name) * 100 + step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def muon_by_hand(
    p: Tensor, gradients: list[Tensor], *, heads: int | None = None, dtype: Any = torch.float32
) -> Tensor:
    """Muon written out for one whole parameter, one matrix after the other."""
    average = torch.zeros_like(p)
    for gradient in gradients:
        average = average.lerp(gradient, 0.05)
        matrices = gradient.lerp(average, 0.95)
        if heads:
            matrices = matrices.view(heads, -1, p.shape[-1])
        rows, columns = matrices.shape[-2:]
        updates = []
        for matrix in matrices.view(-1, 1, rows, columns):
            x = matrix.to(dtype)
            x = x.mT if rows > columns else x
            x = x / x.norm().clamp(min=1e-7)
            for _ in range(5):
                a = x @ x.mT
                b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
                x = torch.baddbmm(x, b, x, beta=3.4445)
            updates.append(x.mT if rows > columns else x)
        update = torch.stack(updates).view_as(p).float()
        p = p * (1 - LR * DECAY)
        p = p.add(update, alpha=-LR * 0.2 * max(rows, columns) ** 0.5)
    return p


def muon_of(parameters: Mapping[str, nn.Parameter], **settings: Any) -> Muon:
    """Muon with settings of its section, or further arguments."""
    own = {key: settings.pop(key) for key in ("ns_dtype", "head_size", "ranks") if key in settings}
    section = Section(lr=LR, **settings)
    groups = [{"params": list(parameters.values()), "weight_decay": DECAY}]
    return Muon(groups, {p: name for name, p in parameters.items()}, section, **own)


def plain(**settings: Any) -> tuple[Muon, dict[str, nn.Parameter]]:
    """Muon of whole parameters."""
    parameters = {name: nn.Parameter(drawn(name, 0)) for name in MATRICES}
    return muon_of(parameters, **settings), parameters


def take(optimizer: Muon, parameters: Mapping[str, Tensor]) -> None:
    for number in range(1, STEPS + 1):
        for name, parameter in parameters.items():
            whole = drawn(name, number)
            parameter.grad = whole
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(
                    whole, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
        optimizer.step()


def gradients(name: str) -> list[Tensor]:
    return [drawn(name, step) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_takes_the_steps_written_out(dtype: torch.dtype) -> None:
    optimizer, parameters = plain(ns_dtype=dtype)
    take(optimizer, parameters)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, muon_by_hand(drawn(name, 0), gradients(name), dtype=dtype))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 1e-2)])
def test_equals_torch_optim_muon(
    dtype: torch.dtype, tolerance: float, adjust_lr: Any, nesterov: bool
) -> None:
    optimizer, parameters = plain(ns_dtype=dtype, adjust_lr=adjust_lr, nesterov=nesterov)
    names = [name for name in MATRICES if "experts" not in name]
    # Small ones, or the rounding of the weights would be more than that of their steps.
    peer = {name: nn.Parameter(drawn(name, 0) / 100) for name in names}
    for name in names:
        parameters[name].data = peer[name].detach().clone()
    reference = torch.optim.Muon(
        peer.values(), lr=LR, weight_decay=DECAY, adjust_lr_fn=adjust_lr, nesterov=nesterov
    )
    take(optimizer, parameters)
    with _bfloat16_is_float64() if dtype == torch.float64 else nullcontext():
        take(reference, peer)  # type: ignore[arg-type]
    for name in names:
        moved = (peer[name] - drawn(name, 0) / 100).norm()
        assert (parameters[name] - peer[name]).norm() <= tolerance * moved, name


@contextmanager
def _bfloat16_is_float64() -> Iterator[None]:
    """torch always orthogonalizes in bfloat16: here its own code in float64.

    The rounding of float32, which the iteration enlarges, depends on the processor.
    Torch 2.13 converts with bfloat16(), 2.15 with to(torch.bfloat16).
    """
    with (
        mock.patch.object(Tensor, "bfloat16", Tensor.double),
        mock.patch.object(torch, "bfloat16", torch.float64),
    ):
        yield


def test_heads_are_orthogonalized_one_by_one() -> None:
    name = "layers.0.attention.wq.weight"
    optimizer, parameters = plain(head_size=2)
    take(optimizer, parameters)
    assert torch.equal(parameters[name], muon_by_hand(drawn(name, 0), gradients(name), heads=5))


def test_gradients_are_divided_by_the_scale_that_clips_them() -> None:
    scaled, parameters = plain()
    scaled.divisor = torch.tensor(4.0)
    take(scaled, parameters)
    for name, parameter in parameters.items():
        divided = [gradient / 4 for gradient in gradients(name)]
        assert torch.equal(parameter, muon_by_hand(drawn(name, 0), divided))


def test_a_parameter_without_a_gradient_decays_and_keeps_its_momentum() -> None:
    name = "layers.1.square.weight"
    optimizer, parameters = plain()
    take(optimizer, parameters)
    parameters[name].grad = None
    optimizer.step()
    expected = muon_by_hand(drawn(name, 0), [*gradients(name), torch.zeros(12, 12)])
    assert torch.equal(parameters[name], expected)


def test_owners_share_the_work_and_the_costliest_matrix_comes_first() -> None:
    # m^2 n: 8000, 2000, 2000, 4000, 1000
    shapes = [(20, 20), (10, 20), (20, 10), (10, 40), (10, 10)]
    assert muon_exchange.assign_owners(shapes, 2) == [0, 1, 1, 1, 0]
    assert muon_exchange.assign_owners(shapes, 8) == [0, 2, 3, 1, 4]


def parameters_on_meta(family: Family, **settings: Any) -> tuple[Any, list[Parameter]]:
    """The args and parameters of a family's debug model."""
    args = family.flavors["debug"]
    with torch.device("meta"):
        model = build_model(family, args)
    section = Section(**settings)
    return args, list(parameters_of(model, section, family.tp_plan, tied_head=args.tied_head))


def matrices_of(family: Family, **settings: Any) -> set[str]:
    """Names of the parameters that Muon orthogonalizes."""
    args, parameters = parameters_on_meta(family, **settings)
    context = OptimizerContext(ranks=None, param_dtype=torch.float32, args=args)
    optimizer = build_muon(Section(**settings), parameters, context)
    chosen = {id(entry.parameter) for entry in optimizer.local}
    return {p.name for p in parameters if id(p.tensor) in chosen}


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_the_matrices_of_blocks_are_orthogonalized_and_nothing_else(family: Family) -> None:
    _, parameters = parameters_on_meta(family)
    of_blocks = {p.name for p in parameters if p.tensor.ndim > 1 and p.name.startswith("layers.")}
    assert matrices_of(family) == of_blocks
    # A head that is taken for a matrix does not go unnoticed.
    with mock.patch.dict(roles.KINDS, head="matrix", vocab="matrix"):
        assert matrices_of(family) > of_blocks


def test_groups_choose_the_algorithm() -> None:
    groups = [
        OptimizerGroup(pattern="output.weight", algorithm="muon"),
        OptimizerGroup(pattern="layers.*.wo.weight", algorithm="adamw"),
    ]
    chosen = matrices_of(LLAMA, groups=groups)
    assert "output.weight" in chosen
    assert not any(".wo." in name for name in chosen)
    norms = [OptimizerGroup(pattern="norm.weight", algorithm="muon")]
    with pytest.raises(SettingError, match=r'"muon" requires matrices, but norm.weight has 1 dim'):
        matrices_of(LLAMA, groups=norms)


@pytest.mark.parametrize(
    ("param_dtype", "ns_dtype", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_newton_schulz_is_as_precise_as_the_parameters_or_as_set(
    param_dtype: torch.dtype, ns_dtype: Any, expected: torch.dtype
) -> None:
    args, parameters = parameters_on_meta(LLAMA)
    context = OptimizerContext(ranks=None, param_dtype=param_dtype, args=args)
    assert build_muon(Section(ns_dtype=ns_dtype), parameters, context).ns_dtype == expected


def test_a_skipped_step_leaves_matrices_and_the_rest_alone_and_loaded_state_counts() -> None:
    def built() -> tuple[Muon, list[nn.Parameter]]:
        tensors = [nn.Parameter(drawn("layers.1.square.weight", 0)), nn.Parameter(torch.ones(3))]
        rest = {"lr_factor": 1.0, "weight_decay": 0.0, "algorithm": ""}
        kinds: list[Any] = ["matrix", "vector"]
        parameters = [
            Parameter(name=f"p{n}", tensor=tensor, kind=kind, **rest)
            for n, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True))
        ]
        args = LLAMA.flavors["debug"]
        context = OptimizerContext(ranks=None, param_dtype=torch.float32, args=args)
        return build_muon(Section(lr=LR), parameters, context), tensors

    def step(optimizer: Muon, tensors: list[nn.Parameter], value: float) -> None:
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, value)
        step_if(optimizer, torch.tensor(value).isfinite(), torch.tensor(2.0))

    skipping, tensors = built()
    straight, expected = built()
    step(skipping, tensors, 1.0)
    step(skipping, tensors, torch.nan)
    step(straight, expected, 1.0)
    again, loaded = built()
    again.load_state_dict(skipping.state_dict())
    for old, new in zip(tensors, loaded, strict=True):
        new.data.copy_(old)
    for optimizer, parameters in ((straight, expected), (again, loaded)):
        step(optimizer, parameters, 3.0)
    for got, wanted in zip(loaded, expected, strict=True):
        assert torch.equal(got, wanted)


# Layouts of 4 processes: sizes of the mesh's axes, pp first.
LAYOUTS = {
    "fsdp 4": (1, 1, 4, 1),
    "fsdp 2 x tp 2": (1, 1, 2, 2),
    "hsdp 2x2": (1, 2, 2, 1),
    "hsdp 2x1 x tp 2": (1, 2, 1, 2),
    "pp 2 x fsdp 2": (2, 1, 2, 1),
}
OF_TWO = {"fsdp 2": (1, 1, 2, 1), "tp 2": (1, 1, 1, 2), "pp 2": (2, 1, 1, 1)}


def sharded(sizes: tuple[int, ...], **settings: Any) -> tuple[Muon, dict[str, Any]]:
    """Muon of this rank's shards in a layout; of a pipeline's stages each has one block."""
    model = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    stages = init_device_mesh(
        "cpu", (sizes[0], dist.get_world_size() // sizes[0]), mesh_dim_names=("pp", "stage")
    )
    stage = f"layers.{stages.get_local_rank('pp')}." if sizes[0] > 1 else "layers."
    modules: dict[str, nn.Module] = {}
    for name, (_, dim) in MATRICES.items():
        if not name.startswith(stage):
            continue
        module = modules[name] = nn.Module()
        module.weight = nn.Parameter(drawn(name, 0))
        if sizes[3] > 1:
            placement = Replicate() if dim is None else Shard(dim)
            module.weight = nn.Parameter(
                distribute_tensor(module.weight, model["tp"], [placement], src_data_rank=None)
            )
        fsdp = model["dp_replicate", "fsdp"] if sizes[1] > 1 else model["fsdp"]
        by_rows = "few" in name
        fully_shard(module, mesh=fsdp, shard_placement_fn=lambda _, dim=by_rows: Shard(int(dim)))
    parameters = {name: module.weight for name, module in modules.items()}
    return muon_of(parameters, ranks=stages.get_group("stage"), **settings), parameters


def wrong(sizes: tuple[int, ...], plant: str = "nothing", **settings: Any) -> list[str]:
    """Names of this rank's parameters that differ in any bit from those of one process.

    "sent" is among them where an element travels to its owner more often than once.
    """
    sent = torch.zeros(())
    exchange = dist.all_to_all_single

    def count(received: Tensor, pieces: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.add_(pieces.numel())
        return exchange(received, pieces, *arguments, **options)

    with PLANTS[plant](), mock.patch.object(dist, "all_to_all_single", count):
        optimizer, parameters = sharded(sizes, **settings)
        take(optimizer, parameters)
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, torch.nan)
        step_if(optimizer, torch.tensor(False), None)
        optimizer.is_finite = torch.tensor(True)
        take(optimizer, parameters)
    names, expected_to_be_sent = [], torch.zeros(())
    for name, parameter in parameters.items():
        expected = muon_by_hand(drawn(name, 0), gradients(name) * 2)
        if not torch.equal(parameter.full_tensor(), expected):
            names.append(name)
        has_whole = "experts" in name and not ("few" in name and sizes[2] > 1)
        if not has_whole and math.prod(sizes[1:]) > 1:
            once = parameter.numel() * sizes[0] / dist.get_world_size()
            expected_to_be_sent += (2 * STEPS + 1) * (once + parameter.to_local().numel())
    dist.all_reduce(sent)
    dist.all_reduce(expected_to_be_sent)
    return [*names, *(["sent"] if sent != expected_to_be_sent else [])]


def around_apply(before: Callable[..., Any]) -> AbstractContextManager[Any]:
    apply = Muon._apply

    def planted(self: Muon, entry: Any, update: Tensor) -> None:
        apply(self, before(self, entry, update), update)

    return mock.patch.object(Muon, "_apply", planted)


def decay_by_adjusted_lr(self: Muon, entry: Any, _: Tensor) -> Any:
    factor = muon.lr_factor(entry.shape, self.section.adjust_lr)
    self.param_groups[entry.group]["weight_decay"] = DECAY * factor
    return entry


def keep_momentum_of_skipped_steps() -> AbstractContextManager[Any]:
    direction = Muon._direction

    def planted(self: Muon, entry: Any) -> Tensor:
        with mock.patch.object(self, "is_finite", None):
            return direction(self, entry)

    return mock.patch.object(Muon, "_direction", planted)


# Faults put in on purpose; each is noticed in a layout of four processes.
PLANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "shards orthogonalized by themselves": lambda: mock.patch.object(
        muon, "_is_whole", return_value=True
    ),
    "learning rate adjusted by the shard's shape": lambda: around_apply(
        lambda _, entry, update: dataclasses.replace(entry, shape=update.shape)
    ),
    "learning rate adjusted by experts and rows": lambda: mock.patch.object(
        muon, "lr_factor", lambda shape, adjust, f=muon.lr_factor: f(shape[:2], adjust)
    ),
    "decay by the adjusted learning rate": lambda: around_apply(decay_by_adjusted_lr),
    "momentum of a skipped step": keep_momentum_of_skipped_steps,
    "replicas send as well": lambda: mock.patch.object(
        muon_exchange.Matrix, "senders", property(lambda self: range(len(self.boxes)))
    ),
}
EVERYTHING = set(MATRICES)
CAUGHT_BY = {
    "nothing": set(),
    "shards orthogonalized by themselves": EVERYTHING - {"layers.0.experts"} | {"sent"},
    # A split of rows may leave the longer side the same.
    "learning rate adjusted by the shard's shape": {
        "layers.0.attention.wo.weight",
        "layers.1.w1.weight",
    },
    "learning rate adjusted by experts and rows": {"layers.0.experts", "layers.1.few_experts"},
    "decay by the adjusted learning rate": EVERYTHING,
    "momentum of a skipped step": EVERYTHING,
    "replicas send as well": {"sent"},
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [*LAYOUTS, *OF_TWO])
def test_a_layout_takes_the_steps_of_one_process(
    layout: str, workers: Mapping[int, Workers]
) -> None:
    sizes = (LAYOUTS | OF_TWO)[layout]
    assert workers[math.prod(sizes)].run(wrong, sizes) == [[]] * math.prod(sizes)


@pytest.mark.distributed
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_caught(plant: str, workers: Mapping[int, Workers]) -> None:
    results = workers[4].run(wrong, LAYOUTS["hsdp 2x2"], plant)
    assert set().union(*results) == CAUGHT_BY[plant]
