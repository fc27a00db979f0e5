"""Chunked linear cross-entropy against torch's own."""

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from tests.distributed import Workers
from titan_lite.data.packing import IGNORED
from titan_lite.training.loss import cross_entropy_sum, pair_cross_entropy_sum


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_BSD = torch.randn(2, 7, 16, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    labels_BS = torch.randint(50, (2, 7), generator=generator)
    labels_BS[0, 3:5] = IGNORED
    return hidden_BSD, weight_VD, labels_BS


@pytest.mark.parametrize("num_chunks", [1, 3, 8, 14, 100])
def test_loss_and_gradients_equal_torch_for_any_number_of_chunks(num_chunks: int) -> None:
    hidden, weight, labels = _inputs()
    loss = cross_entropy_sum(
        hidden, weight, labels=labels, num_chunks=num_chunks, vocab_size=len(weight)
    )
    (loss / 3).backward()
    got = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    logits = (hidden @ weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    (expected / 3).backward()

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, (hidden.grad, weight.grad), rtol=1e-5, atol=1e-6)


def test_loss_of_bfloat16_inputs_is_float32_and_its_gradients_are_bfloat16() -> None:
    hidden, weight, labels = _inputs(torch.bfloat16)
    loss = cross_entropy_sum(hidden, weight, labels=labels, num_chunks=4, vocab_size=len(weight))
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_a_batch_without_valid_tokens_has_loss_and_gradients_of_zero() -> None:
    hidden, weight, labels = _inputs()
    loss = cross_entropy_sum(
        hidden,
        weight,
        labels=torch.full_like(labels, IGNORED),
        num_chunks=2,
        vocab_size=len(weight),
    )
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_gradients_can_be_asked_for_one_after_the_other() -> None:
    hidden, weight, labels = _inputs()
    loss = (
        cross_entropy_sum(hidden, weight, labels=labels, num_chunks=4, vocab_size=len(weight)) / 3
    )
    (grad_hidden,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (grad_weight,) = torch.autograd.grad(loss, weight)
    again = (
        cross_entropy_sum(hidden, weight, labels=labels, num_chunks=4, vocab_size=len(weight)) / 3
    )
    torch.testing.assert_close(
        (grad_hidden, grad_weight), torch.autograd.grad(again, (hidden, weight))
    )


def test_a_factor_scales_the_loss_and_reaches_gradients_before_they_are_rounded() -> None:
    # float16 has nothing between 0 and 6e-8: probabilities of 1 / 50 times 1e-7 would be lost.
    hidden, weight, labels = _inputs(torch.float16)
    options = {"num_chunks": 4, "vocab_size": len(weight)}
    plain = cross_entropy_sum(hidden, weight, labels=labels, **options)
    factor = torch.tensor(1e-7 * 65536)
    scaled = cross_entropy_sum(hidden, weight, labels=labels, factor=factor, **options)
    torch.testing.assert_close(scaled, plain * factor)
    (plain * 1e-7).backward()
    assert hidden.grad is not None
    lost = (hidden.grad == 0).float().mean()
    hidden.grad = None
    scaled.backward()
    assert lost > 0.3
    assert (hidden.grad == 0).float().mean() < 0.25  # The tokens that are not counted: 2 of 14.


def test_gradients_of_chunks_are_added_inside_the_matmul_in_float32_where_a_device_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The operator that only CUDA has, by its description."""
    products: list[torch.Size] = []

    def addmm(sum: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, **settings: Tensor) -> Tensor:
        assert (sum.dtype, a.dtype, b.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        assert dtype == torch.float32
        assert settings["out"] is sum or settings["out"].data_ptr() == sum.data_ptr()
        products.append(a.shape)
        return settings["out"].copy_(sum + a.float() @ b.float())

    def gradient(dtype: torch.dtype) -> Tensor:
        hidden, weight, labels = _inputs(torch.bfloat16)
        hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        loss = cross_entropy_sum(hidden, weight, labels=labels, num_chunks=7, vocab_size=50)
        return torch.autograd.grad(loss, weight)[0]

    expected, rounded = gradient(torch.float32), gradient(torch.bfloat16)
    monkeypatch.setattr("titan_lite.training.loss.ACCUMULATING_DEVICES", ("cpu",))
    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    try:
        accumulated = gradient(torch.bfloat16)
    finally:
        library._destroy()
    assert products == [torch.Size([50, 2])] * 7
    torch.testing.assert_close(accumulated.float(), expected, rtol=2e-2, atol=2e-2)
    # Else each chunk's product is rounded to 8 bits.
    error, error_of_rounded = ((g - expected).abs().mean() for g in (accumulated, rounded))
    assert error < error_of_rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_compiled_it_computes_the_same(dtype: torch.dtype) -> None:
    def loss_and_gradients(compile: bool) -> tuple[Tensor, ...]:
        hidden, weight, labels = _inputs(dtype)
        options = {"num_chunks": 4, "vocab_size": 48, "factor": torch.tensor(0.3)}
        labels = labels.clamp(max=47)
        loss = cross_entropy_sum(hidden, weight, labels=labels, compile=compile, **options)
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return loss, hidden.grad, weight.grad

    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    eager, compiled = loss_and_gradients(False), loss_and_gradients(True)
    # 14 tokens in chunks of 4, 4, 4 and 2.
    assert counters["unique_graphs"] == before + 2
    torch.testing.assert_close(compiled, eager)


def test_compiled_it_has_no_graph_for_each_number_of_labelled_rows() -> None:
    torch._dynamo.reset()
    counters, graphs = torch._dynamo.utils.counters["stats"], []
    before = counters["unique_graphs"]
    for number in (9, 11, 5, 6, 10, 13):
        hidden, weight, labels = _inputs()
        options = {"num_chunks": 4, "vocab_size": 48, "labelled_indices": torch.arange(number)}
        losses = []
        for compile in (False, True):
            loss = cross_entropy_sum(
                hidden, weight, labels=labels.clamp(max=47), compile=compile, **options
            )
            losses.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
        torch.testing.assert_close(*losses)
        graphs.append(counters["unique_graphs"] - before)
    # One for whole chunks, one for a last chunk of one row, one for other last chunks.
    assert graphs == [2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(("max_bytes", "num_chunks"), [(10**9, 1), (14 * 50 * 4 // 3, 4), (99, 8)])
def test_auto_takes_as_few_chunks_as_hold_and_at_most_8(
    monkeypatch: pytest.MonkeyPatch, max_bytes: int, num_chunks: int
) -> None:
    monkeypatch.setattr("titan_lite.config.schema.AUTO_CHUNK_BYTES", max_bytes)
    hidden, weight, labels = _inputs()
    with torch.no_grad(), torch.profiler.profile() as profiler:
        cross_entropy_sum(hidden, weight, labels=labels, num_chunks="auto", vocab_size=50)
    products = [event for event in profiler.events() if event.name == "aten::mm"]
    # 14 tokens in chunks of 14, 4 and 2.
    assert len(products) == {1: 1, 4: 4, 8: 7}[num_chunks]


def test_full_logits_never_exist() -> None:
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    labels = torch.randint(1000, (512,))
    with torch.profiler.profile(profile_memory=True) as profiler:
        cross_entropy_sum(
            hidden, weight, labels=labels, num_chunks=8, vocab_size=len(weight)
        ).backward()
    largest = max(
        (event.cpu_memory_usage for event in profiler.events() if event.name == "aten::mm"),
    )
    assert largest <= 512 // 8 * 1000 * 4
    with torch.no_grad():
        assert (
            cross_entropy_sum(hidden, weight, labels=labels, num_chunks=8, vocab_size=len(weight))
            > 0
        )


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("selects", [False, True])
def test_with_a_bias_and_with_labelled_rows_alone_it_equals_torch(
    num_chunks: int, selects: bool
) -> None:
    hidden, weight, labels = _inputs()
    labels[1, ::2] = IGNORED
    bias = torch.randn(50, requires_grad=True)
    # The last two rows pad the vocabulary.
    labels = labels.where(labels == IGNORED, labels.clamp(max=47))
    indices = (labels != IGNORED).flatten().nonzero().squeeze(1) if selects else None
    factor = torch.tensor(0.3)
    options = {"num_chunks": num_chunks, "vocab_size": 48, "factor": factor}
    loss = cross_entropy_sum(
        hidden, weight, bias, labels=labels, labelled_indices=indices, **options
    )
    got = torch.autograd.grad(loss / 3, (hidden, weight, bias))

    logits = (hidden @ weight.T + bias)[..., :48].flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum") * factor
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected / 3, (hidden, weight, bias))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert not got[2][48:].any()


def test_selected_rows_are_cut_into_chunks_of_the_size_that_all_would_have() -> None:
    hidden, weight, labels = _inputs()
    indices = torch.tensor([0, 8, 9, 13, 2])
    with torch.profiler.profile() as profiler:
        cross_entropy_sum(
            hidden, weight, labels=labels, labelled_indices=indices, num_chunks=4, vocab_size=50
        )
    # 14 tokens give chunks of 4. These 5 need two, each with matmuls for logits and for hidden.
    products = [event for event in profiler.events() if event.name == "aten::mm"]
    assert len(products) == 4
    nothing = cross_entropy_sum(
        hidden, weight, labels=labels, labelled_indices=indices[:0], num_chunks=4, vocab_size=50
    )
    grads = torch.autograd.grad(nothing, (hidden, weight))
    assert nothing == 0
    assert not any(grad.any() for grad in grads)


def test_the_loss_of_pairs_equals_torch_and_counts_those_classified_correctly() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.5], [9.0, 0.0]], requires_grad=True)
    labels, sums = torch.tensor([0, 1, 1, IGNORED]), torch.ones(2)
    loss = pair_cross_entropy_sum(logits, labels=labels, factor=torch.tensor(0.25), sums=sums)
    expected = F.cross_entropy(logits[:3], labels[:3], reduction="sum")
    torch.testing.assert_close(loss, expected / 4)
    torch.testing.assert_close(sums, torch.stack([1 + expected.detach(), torch.tensor(3.0)]))
    (grad,) = torch.autograd.grad(loss, logits)
    assert not grad[3].any()


def _over_a_split_vocabulary(num_chunks: int, loss_parallel: bool) -> list[tuple[Tensor, ...]]:
    """Loss and whole gradients, with all positions and with the labelled ones alone."""
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight, labels = _inputs()
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(50, generator=generator, requires_grad=True)
    labelled = (labels != IGNORED).flatten().nonzero().squeeze(1)
    actual = []
    for indices in (None, labelled):
        whole = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
        parts = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (weight, bias)]
        loss = cross_entropy_sum(
            whole,
            *parts,
            labels=labels,
            labelled_indices=indices,
            num_chunks=num_chunks,
            vocab_size=50,
            loss_parallel=loss_parallel,
        )
        grads = torch.autograd.grad(loss, (whole, *parts))
        actual.append((loss.detach(), *(grad.full_tensor() for grad in grads)))
    return actual


@pytest.mark.distributed
@pytest.mark.parametrize("loss_parallel", [True, False])
def test_a_split_vocabulary_with_a_bias_gives_the_same(
    loss_parallel: bool, workers: dict[int, Workers]
) -> None:
    hidden, weight, labels = _inputs()
    bias = torch.randn(50, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits = (hidden @ weight.T + bias).flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    expected = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias)))
    for both in workers[2].run(_over_a_split_vocabulary, 4, loss_parallel):
        for got in both:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
