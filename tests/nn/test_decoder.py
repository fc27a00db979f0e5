"""The guarantees of the decoder: causality, optional ends, a loss inside the head, one graph."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from titan_lite.models.args import DecoderArgs, RopeScaling
from titan_lite.models.llama import LLAMA
from titan_lite.nn.build_model import build_model
from titan_lite.nn.decoder import Decoder

ARGS = DecoderArgs(
    dim=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=48,
    vocab_size=64,
    max_seq_len=32,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16
    ),
)


def initialised(args: DecoderArgs = ARGS) -> Decoder:
    model = Decoder(args)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        model.init_parameter(name, parameter.data, torch.Generator().manual_seed(seed))
    return model


def random_tokens(S: int = 12, B: int = 2) -> Tensor:
    return torch.randint(ARGS.vocab_size, (B, S), generator=torch.Generator().manual_seed(7))


def test_no_logit_depends_on_a_later_token() -> None:
    model = initialised()
    embedded_BSD = model.tok_embeddings(random_tokens(S=8, B=1)).detach()
    model.tok_embeddings = None

    # dependence[t, s]: size of d logits[t] / d embedding[s].
    jacobian = torch.autograd.functional.jacobian(model, embedded_BSD)
    dependence = jacobian[0, :, :, 0].abs().amax(dim=(1, 3))

    assert (dependence.triu(diagonal=1) == 0).all()
    assert (dependence[torch.tril_indices(8, 8).unbind()] > 0).all()


def test_two_halves_with_children_removed_give_the_same_logits() -> None:
    whole = initialised()
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    first.norm = first.output = None
    second.tok_embeddings = None
    for name in whole.layers:
        del (second if int(name) < 2 else first).layers[name]

    tokens_BS = random_tokens()
    hidden_BSD = first(tokens_BS)

    assert hidden_BSD.shape == (2, 12, ARGS.dim)
    assert torch.equal(second(hidden_BSD), whole(tokens_BS))
    names = {*dict(first.named_parameters()), *dict(second.named_parameters())}
    assert names == set(dict(whole.named_parameters()))


def test_head_loss_gets_the_normalised_hidden_states_and_the_output_weight() -> None:
    model = initialised()
    tokens_BS = random_tokens()

    def head_loss(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        assert weight_VD is model.output.weight
        return (hidden_BSD @ weight_VD[: ARGS.vocab_size].T).logsumexp(-1).sum()

    expected = model(tokens_BS).logsumexp(-1).sum()
    torch.testing.assert_close(model(tokens_BS, head_loss), expected)


def test_a_meta_build_after_init_equals_a_direct_one() -> None:
    direct = initialised()
    with torch.device("meta"):
        model = Decoder(ARGS)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(torch.nan)
    model.load_state_dict(direct.state_dict())
    model.init_buffers("cpu")
    tokens_BS = random_tokens()
    assert torch.equal(model(tokens_BS), direct(tokens_BS))


def test_the_rope_tables_exist_once_and_are_not_saved() -> None:
    model = initialised()
    assert {name for name, _ in model.named_buffers()} == {"rope.cos_SR", "rope.sin_SR"}
    assert model.rope.cos_SR.shape == (ARGS.max_seq_len, ARGS.head_size)
    assert not any("rope" in name for name in model.state_dict())
    with torch.device("meta"):
        model = Decoder(ARGS)
    model.to_empty(device="cpu")
    assert all(block.attention.rope is model.rope for block in model.layers.values())


@pytest.mark.parametrize("seq_len", [1, 5, 32])
def test_any_length_up_to_the_longest_sees_the_same_past(seq_len: int) -> None:
    model = initialised()
    tokens_BS = random_tokens(S=32)
    torch.testing.assert_close(model(tokens_BS)[:, :seq_len], model(tokens_BS[:, :seq_len]))


def test_rotated_scores_depend_on_the_distance_only() -> None:
    rope = Decoder(replace(ARGS, rope_scaling=None)).rope
    q, k = torch.randn(2, 1, 1, 1, ARGS.head_size).expand(2, 1, 32, 1, ARGS.head_size)
    rotated_q, rotated_k = rope(q, k)
    scores = rotated_q[0, :, 0] @ rotated_k[0, :, 0].T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores.std() > 0.01


def test_one_compiled_graph_serves_all_blocks_forward_and_backward() -> None:
    graphs = []

    def counting_backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = initialised()
    tokens_BS = random_tokens()
    expected = model(tokens_BS)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    for block in model.layers.values():
        block.compile(fullgraph=True, backend=counting_backend)
    logits = model(tokens_BS)
    logits.sum().backward()

    assert len(graphs) == 1
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rotation_has_the_gradients_of_the_eager_one(dtype: torch.dtype) -> None:
    rope = build_model(LLAMA, LLAMA.flavors["debug"]).layers["0"].attention.rope

    def gradients(rotate: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 8, 4, rope.rotary_dim), (2, 8, 2, rope.rotary_dim)
        heads = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
        sum((out.float() ** 2 * out.float().cos()).sum() for out in rotate(*heads)).backward()
        return [head.grad for head in heads]

    compiled = gradients(torch.compile(rope, backend="aot_eager"))
    for expected, actual in zip(gradients(rope), compiled, strict=True):
        torch.testing.assert_close(actual, expected)


def test_fsdp2_mixed_precision_leaves_the_rope_tables_in_float32(one_process_group) -> None:
    with torch.device("meta"):
        model = Decoder(ARGS)
    seen = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.layers.values(), model):
        fully_shard(module, mesh=one_process_group, mp_policy=policy)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.to_local(), torch.Generator())
    model.init_buffers("cpu")
    for block in model.layers.values():
        block.attention.rope.register_forward_hook(
            lambda module, inputs, outputs: seen.append(
                (inputs[0].dtype, module.cos_SR.dtype, outputs[0].dtype)
            )
        )
    logits = model(random_tokens())
    logits.float().sum().backward()
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.bfloat16)}
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "build_path", ["titan_lite.nn.build_model", "titan_lite.nn.build_model:typo"]
)
def test_a_build_path_that_leads_nowhere_is_named(build_path: str) -> None:
    with pytest.raises(ValueError, match=f'an existing "module:function", got "{build_path}"'):
        build_model(replace(LLAMA, build=build_path), ARGS)
