"""A family's debug flavor, or transformers' own model of it, in a bare loop of this process."""

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.manifest import DEVICE
from titan_lite.checkpoint.hf_layout import HFModel
from titan_lite.config.load import load_config
from titan_lite.data.loader import Batch, DataLoader
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.models.family import Family
from titan_lite.models.hf_config import hf_config_from_args
from titan_lite.models.registry import families
from titan_lite.nn.build_model import build_model
from titan_lite.nn.document_attention import dense_mask
from titan_lite.nn.token_context import TokenContext
from titan_lite.training.objective import OBJECTIVES

OURS, THEIRS = "titan_lite", "transformers"


def their_model(family: Family, source: nn.Module) -> nn.Module:
    """Builds transformers' model from the debug flavor's config.json, with `source`'s weights."""
    import transformers

    transformers.logging.disable_progress_bar()
    args, hf = family.flavors["debug"], family.hf_config
    assert hf is not None
    state = source.state_dict()
    weights = {
        name: tensor.join([state[part] for part in tensor.parts])
        for name, tensor in HFModel.of(family, args).tensors.items()
    }
    model_class: Any = getattr(transformers, hf.architecture)
    described = hf_config_from_args(args, hf, dtype="float32")
    # No KV cache, since nothing is generated.
    config = model_class.config_class(**described, use_cache=False)
    model: nn.Module = model_class.from_pretrained(None, config=config, state_dict=weights)
    return model


class Loop:
    """The bare loop of this process."""

    model: nn.Module
    is_theirs: bool
    optimizer: torch.optim.Optimizer
    loader: DataLoader
    dtype: torch.dtype


def start(side: str, name: str, preset: Path, dtype: str, shape: tuple[int, int]) -> None:
    """Builds a side's model, with weights and batches (samples, tokens) that both sides share.

    The batches are the preset's, except for their shape.
    """
    family = families()[name]
    args = family.flavors["debug"]
    generator = torch.Generator().manual_seed(0)
    model = build_model(family, args)
    for key, parameter in model.named_parameters():
        model.init_parameter(key, parameter, generator)
    Loop.is_theirs, Loop.dtype = side == THEIRS, getattr(torch, dtype)
    Loop.model = (their_model(family, model) if Loop.is_theirs else model).to(DEVICE)
    # Turns dropout off, the only thing that depends on the mode.
    Loop.model.eval()
    Loop.optimizer = torch.optim.AdamW(Loop.model.parameters(), lr=1e-3, fused=True)
    samples, seq_len = shape
    config = load_config(preset, [f"--training.seq_len={seq_len}"]).config
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    Loop.loader = DataLoader(
        config.data,
        seq_len=seq_len,
        seed=config.training.seed,
        local_batch_size=samples,
        batch_rank=0,
        batch_degree=1,
        tokenizer=tokenizer,
        rows=OBJECTIVES[family.objective](config).row_maker(tokenizer),
    )


def take_turn(steps: int) -> tuple[float, float]:
    """Returns the seconds of a turn, and the loss of its last step."""
    batches = [on_device(next(Loop.loader)) for _ in range(steps)]
    # It would prepare batches during the measurement.
    Loop.loader.close()
    begin = time.perf_counter()
    for batch in batches:
        with _autocast():
            loss = _their_loss(batch) if Loop.is_theirs else _our_loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(Loop.model.parameters(), 1.0)
        Loop.optimizer.step()
        Loop.optimizer.zero_grad()
    last = loss.item()
    return time.perf_counter() - begin, last


def on_device(batch: Batch) -> Batch:
    """Copies the batch to the device."""
    tensors = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
    return Batch(**{name: tensor.to(DEVICE) for name, tensor in tensors.items()})


def _our_loss(batch: Batch) -> Tensor:
    def head_loss(*linear: Tensor) -> Tensor:
        return _mean_loss(F.linear(*linear), batch.labels)

    if batch.documents is None:
        return Loop.model(batch.inputs, head_loss)
    assert batch.pair_labels is not None
    places = torch.arange(batch.inputs.shape[1], device=DEVICE)
    mask = dense_mask(batch.documents, places, Loop.dtype, causal=False)
    return Loop.model(
        batch.inputs,
        head_loss,
        context=TokenContext(mask=mask, token_types_BS=batch.token_types),
        pair_loss=partial(_mean_loss, labels=batch.pair_labels),
    )


def _their_loss(batch: Batch) -> Tensor:
    if batch.documents is None:
        return _mean_loss(Loop.model(batch.inputs).logits, batch.labels)
    assert batch.pair_labels is not None
    output = Loop.model(
        batch.inputs,
        # Padding is document 1.
        attention_mask=1 - batch.documents,
        token_type_ids=batch.token_types,
    )
    pairs = _mean_loss(output.seq_relationship_logits, batch.pair_labels)
    return _mean_loss(output.prediction_logits, batch.labels) + pairs


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def _autocast() -> Any:
    if Loop.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(DEVICE.type, Loop.dtype)
