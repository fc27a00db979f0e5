"""Sequences that several ranks hold together train the model that one process trains."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from tests.distributed import Workers
from tests.parallel.test_activation_checkpoint import Operations
from tests.runs import build_trainer, train, train_traced
from titan_lite.config.activation_checkpoint import CHECKPOINT_MODES
from titan_lite.models.llama import LLAMA
from titan_lite.nn.attention import ScaledDotProductAttention
from titan_lite.nn.build_model import build_model
from titan_lite.nn.token_context import NO_CONTEXT, TokenContext
from titan_lite.parallel import context_attention
from titan_lite.parallel.activation_checkpoint import apply_activation_checkpoint
from titan_lite.parallel.context import (
    ShardedAttention,
    UlyssesAttention,
    apply_cp,
    check_cp,
    local_positions,
)

METHODS = ("ring", "all_gather", "ulysses")
CP2, CP4, TP2 = "parallel.cp=2", "parallel.cp=4", "parallel.tp=2"
ALL_GATHER, ULYSSES = "parallel.cp_method=all_gather", "parallel.cp_method=ulysses"
HALF_BATCH = "training.local_batch_size=4"
B, N, S, H = 2, 8, 32, 16
# float32: sums in another order. bfloat16: results of single pieces are rounded before they are
# merged, and everything by 2^-9 in the end; values are at most about 3.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _module(method: str, kernel: str = "flash") -> nn.Module:
    if method == "ulysses":
        return UlyssesAttention(ScaledDotProductAttention(causal=True), _world())
    return ShardedAttention(method, _world(), kernel)


def _attend(
    method: str, num_kv_heads: int, dtype: torch.dtype, kernel: str = "flash"
) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's part of the output and the gradients of q, k, v: of plain attention, and ours."""
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(B, S, heads, H, dtype=dtype).transpose(1, 2)
        for heads in (N, num_kv_heads, num_kv_heads, N)
    )
    positions = local_positions(method, S, dist.get_rank(), dist.get_world_size())
    whole = [tensor.float().requires_grad_() for tensor in (q, k, v)]
    out = scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
    expected = [out.detach(), *torch.autograd.grad(out, whole, grad.float())]
    local = [tensor[:, :, positions].requires_grad_() for tensor in (q, k, v)]
    out = _module(method, kernel)(*local, NO_CONTEXT)
    got = [out.detach(), *torch.autograd.grad(out, local, grad[:, :, positions])]
    assert all(tensor.dtype == dtype for tensor in got)
    return [tensor[:, :, positions] for tensor in expected], [tensor.float() for tensor in got]


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_the_output_and_gradients_of_plain_causal_attention(
    method: str, num_kv_heads: int, dtype: torch.dtype, workers: dict[int, Workers]
) -> None:
    tolerance = TOLERANCE[dtype]
    for expected, got in workers[4].run(_attend, method, num_kv_heads, dtype):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def _probabilities(q: Tensor, k: Tensor, lse: Tensor | None, is_causal: bool) -> tuple[Tensor, ...]:
    """exp(scores - log-sum-exp), and the log-sum-exp (B, N, S, 1), of the scores if not given."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True) if lse is None else lse
    return (scores - lse).exp(), lse


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, *rest: Any, **_: Any
) -> tuple[Any, ...]:
    assert (bias, with_lse) == (None, True)
    dropout, is_causal, _debug = (*rest, *(0.0, False, False)[len(rest) :])
    assert dropout == 0.0
    weights, lse = _probabilities(q.float(), k.float(), None, is_causal)
    out = weights @ v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    state = torch.zeros((), dtype=torch.int64)
    CALLS.append(f"forward, {'causal' if is_causal else 'all'}")
    return out.to(q.dtype), lse, None, None, q.shape[2], k.shape[2], state, state, None


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, **_: Any
) -> tuple[Tensor, ...]:
    *state, bias, q_starts, k_starts, max_q, max_k, dropout, is_causal = rest
    assert all(tensor.numel() == 1 for tensor in state)
    assert [tensor is None or tensor.numel() == 0 for tensor in (bias, q_starts, k_starts)]
    assert (max_q, max_k, dropout) == (q.shape[2], k.shape[2], 0.0)
    assert lse.shape == (*q.shape[:3], 1)
    assert lse.is_contiguous()
    repeats = q.shape[1] // k.shape[1]
    grad, wide_q, wide_v = grad.float(), q.float(), v.float().repeat_interleave(repeats, dim=1)
    weights, _ = _probabilities(wide_q, k.float(), lse, is_causal)
    of_scores = weights * (grad @ wide_v.mT - (grad * out.float()).sum(-1, keepdim=True))
    of_scores /= q.shape[-1] ** 0.5
    of_q = of_scores @ k.float().repeat_interleave(repeats, dim=1)
    of_k, of_v = (
        tensor.unflatten(1, (-1, repeats)).sum(2)
        for tensor in (of_scores.mT @ wide_q, weights.mT @ grad)
    )
    CALLS.append(f"backward, {'causal' if is_causal else 'all'}")
    return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype)


CALLS: list[str] = []


def _attend_by_cudnn(*args: Any) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """`_attend`, with plain operations instead of cuDNN's kernels, and their calls."""
    CALLS.clear()
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_cudnn_attention", _cudnn_forward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", _cudnn_backward, "CPU")
    try:
        return *_attend(*args, "cudnn"), list(CALLS)
    finally:
        library._destroy()


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_methods_that_merge_do_so_with_cudnn(method: str, workers: dict[int, Workers]) -> None:
    pieces = ["causal", "all"]
    for expected, got, calls in workers[2].run(_attend_by_cudnn, method, 2, torch.float32):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
        assert calls == [f"{way}, {piece}" for way in ("forward", "backward") for piece in pieces]


# By all_gather, with documents: test_packing.py.
@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("--parallel.cp_method=ulysses", "--activation_checkpoint.mode=full"),
    ],
    ids=" ".join,
)
def test_compiled_blocks_are_one_graph_that_trains_the_same_model(
    settings: tuple[str, ...], workers: dict[int, Workers], tmp_path: Path
) -> None:
    settings = ("--training.steps=4", "--model.num_layers=3", f"--{CP2}", *settings)
    eager = workers[2].run(train, tmp_path / "eager", *settings)[0]
    compiled = workers[2].run(train_traced, tmp_path / "compiled", *settings)[0]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in compiled] == pytest.approx([r[key] for r in eager], rel=1e-5)
    applied = json.loads((tmp_path / "compiled" / "run.json").read_text())["applied"]
    assert (len(applied["modules"]["compiled"]), applied["compiled_graphs"]) == (3, 1)
    (method,) = [m for m in METHODS if f"--parallel.cp_method={m}" in settings] or ["ring"]
    assert len(applied["modules"][f"{method} attention over 2 ranks"]) == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_positions_of_all_ranks_are_those_of_the_sequence_and_equal_work(method: str) -> None:
    ranks = [local_positions(method, 64, rank, size=4) for rank in range(4)]
    assert sorted(torch.cat(ranks).tolist()) == list(range(64))
    # A token attends to itself and those before it; "ulysses" deals heads instead, all alike.
    work = {int((positions + 1).sum()) for positions in ranks}
    assert len(work) == 1 or method == "ulysses"
    if method == "ulysses":
        assert torch.cat(ranks).tolist() == list(range(64))


def _logits(method: str) -> tuple[Tensor, Tensor]:
    """Returns results for this rank's tokens, of whole and of distributed sequences."""
    args = dataclasses.replace(LLAMA.flavors["debug"], dim=64, ffn_dim=128, num_layers=2)
    torch.manual_seed(0)
    model = build_model(LLAMA, args)
    tokens = torch.randint(args.vocab_size, (B, S))
    with torch.no_grad():
        expected = model(tokens)
        apply_cp(model, _world(), method, lambda _: "flash")
        positions = local_positions(method, S, dist.get_rank(), dist.get_world_size())
        return expected[:, positions], model(tokens[:, positions], context=TokenContext(positions))


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_a_model_over_several_ranks_gives_each_token_its_logits(
    method: str, workers: dict[int, Workers]
) -> None:
    for expected, got in workers[4].run(_logits, method):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _what_the_model_gets(folder: Path, *overrides: str) -> dict[str, Any]:
    trainer = build_trainer(folder, *overrides)
    batch = next(trainer.data.batches)
    trainer.data.batches = itertools.chain([batch], trainer.data.batches)
    actual = {"whole": (batch.inputs, batch.labels)}

    def look(_model: nn.Module, inputs: Any, settings: dict[str, Any]) -> None:
        labels = settings["head_loss"].keywords["labels"]
        actual["part"] = (inputs[0], labels)
        actual["positions"] = settings["context"].positions_S

    trainer.built.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train_step(1)
    trainer.close()
    return actual


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_a_sequence_get_its_tokens_their_labels_and_positions(
    method: str, workers: dict[int, Workers], tmp_path: Path
) -> None:
    overrides = (f"--{CP2}", f"--{HALF_BATCH}", f"--parallel.cp_method={method}")
    ranks = workers[4].run(_what_the_model_gets, tmp_path, *overrides)
    for rank, actual in enumerate(ranks):
        positions = actual["positions"]
        assert positions.tolist() == local_positions(method, 64, rank % 2, 2).tolist()
        for part, whole in zip(actual["part"], actual["whole"], strict=True):
            assert torch.equal(part, whole[:, positions])
    # Ranks 0 and 1 hold the same sequences, 2 and 3 others.
    inputs = [actual["whole"][0] for actual in ranks]
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])


def _flops(method: str) -> int:
    local = [torch.zeros(B, N, S // dist.get_world_size(), H, requires_grad=True) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        _module(method)(*local, NO_CONTEXT).sum().backward()
    return counter.get_total_flops()


@pytest.mark.distributed
# "ulysses" calls torch's own operators, whose FLOPs torch counts.
@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_torch_counts_an_even_share_of_the_flops_on_each_rank(
    method: str, workers: dict[int, Workers]
) -> None:
    shape = (B, N, S, H)
    whole = sdpa_flop_count(shape, shape, shape)
    whole += sdpa_backward_flop_count(shape, shape, shape, shape)
    assert workers[4].run(_flops, method) == [whole // 4] * 4


def _repeated_attentions(method: str, mode: str) -> int:
    """Attentions in the backward pass of a checkpointed model."""
    group = _world()
    args = dataclasses.replace(LLAMA.flavors["debug"], dim=64, ffn_dim=128, num_layers=3)
    model = build_model(LLAMA, args)
    apply_cp(model, group, method, lambda _: "flash")
    apply_activation_checkpoint(model, CHECKPOINT_MODES.variants[mode]())
    positions = local_positions(method, S, group.rank(), group.size())
    loss = model(positions.unsqueeze(0), context=TokenContext(positions)).sum()
    with Operations() as operations:
        loss.backward()
    return operations.counts["attention"]


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_a_kept_attention_is_not_repeated(method: str, workers: dict[int, Workers]) -> None:
    assert workers[2].run(_repeated_attentions, method, "full") == [3, 3]
    assert workers[2].run(_repeated_attentions, method, "selective_op") == [0, 0]


def test_methods_that_merge_need_a_dtype_that_flash_attention_takes() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r'"ring" requires flash attention, which does not'):
        check_cp("ring", cuda, "float32")
    check_cp("ulysses", cuda, "float32")
    check_cp("all_gather", cuda, "bfloat16")
    check_cp("ring", cpu, "float32")


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_the_operators_of_cuda_are_called_as_they_are_declared(kernel: str) -> None:
    with FakeTensorMode():
        q, k, v = (
            torch.empty(1, heads, 8, H, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)
        )
        kv = torch.stack((k, v))
        out, lse = context_attention._attend(q, kv, True, kernel)
        grads = context_attention._attend_backward(out, q, kv, out, lse, True, kernel)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.distributed
def test_float8_and_context_parallel_round_as_one_process_does(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    float8 = ("--training.steps=4", "--float8.recipe=rowwise", "--float8.emulate=true")
    expected = workers[1].run(train, tmp_path / "one", *float8)[0]
    got = workers[4].run(train, tmp_path / "cp", *float8, f"--{CP2}", f"--{TP2}")[0]
    # One scale per row, that is per token: whichever rank has it.
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in got] == pytest.approx([r[key] for r in expected], rel=1e-5)


@pytest.mark.distributed
def test_a_run_resumes_at_another_degree_and_method(
    workers: dict[int, Workers], tmp_path: Path
) -> None:
    settings = ("--checkpoint.enable=true", "--lr_scheduler.decay_type=constant")
    three, six = ((*settings, f"--training.steps={steps}") for steps in (3, 6))
    expected = workers[1].run(train, tmp_path / "one", *six)[0]
    workers[2].run(train, tmp_path / "cp", *three, f"--{CP2}")
    got = workers[4].run(train, tmp_path / "cp", *six, f"--{CP4}", f"--{ULYSSES}")[0]
    assert [record["step"] for record in got] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "tokens"):
        assert [r[key] for r in got[3:]] == pytest.approx([r[key] for r in expected[3:]], rel=1e-5)
