"""The Trainer against a training loop in plain PyTorch, written out here by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.distributed import Workers
from tests.runs import build_trainer, read_metrics, whole
from titan_lite.models.registry import resolve
from titan_lite.nn.build_model import build_model
from titan_lite.optim.schedule import lr_factor

SETTINGS = (
    "--training.local_batch_size=4",
    "--training.max_norm=0.3",
    "--optimizer.weight_decay=0.3",
    "--optimizer.beta2=0.9",
)
# Warm-up to 1e-3 in 2 steps, then cosine to a tenth at step 20: some of it worked out by hand.
RATES = {1: 5e-4, 2: 1e-3, 11: 5.5e-4, 20: 1e-4}


def _train_both(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, float]], float]:
    trainer = build_trainer(folder, *SETTINGS)
    config = trainer.plan.config
    model: nn.Module = build_model(*resolve(config.model))
    model.load_state_dict({n: p.full_tensor() for n, p in trainer.built.model.named_parameters()})
    is_norm = {name: "norm" in name for name, _ in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if not is_norm[n]]},
            {"params": [p for n, p in model.named_parameters() if is_norm[n]], "weight_decay": 0},
        ],
        betas=(0.9, 0.9),
        weight_decay=0.3,
    )
    loader = trainer.data.build_loader()
    expected = []
    for step in range(1, 21):
        micro_batches = [next(loader), next(loader)]
        tokens = torch.cat([batch.inputs for batch in micro_batches])
        labels = torch.cat([batch.labels for batch in micro_batches])
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * lr_factor(step, config.lr_scheduler, 20)
        expected.append(
            {"loss": loss.item(), "grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}
        )
        optimizer.step()
        optimizer.zero_grad()
    loader.close()
    trainer.train()
    trainer.close()
    largest = max(
        np.abs(local - model.get_parameter(name).detach().numpy()).max()
        for name, local in whole(trainer.built.model).items()
    )
    return read_metrics(folder), expected, float(largest)


def test_the_trainer_trains_what_a_plain_loop_trains(one_process: Workers, tmp_path: Path) -> None:
    records, expected, largest_difference = one_process.run(_train_both, tmp_path)[0]
    # torch's own CPU norm, the reference here, is off by some 1e-5 (see parallel/gradients.py).
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("lr", 1e-12)):
        np.testing.assert_allclose(
            [record[key] for record in records],
            [record[key] for record in expected],
            rtol=tolerance,
            err_msg=key,
        )
    for step, rate in RATES.items():
        np.testing.assert_allclose(records[step - 1]["lr"], rate)
    assert largest_difference < 1e-5
