"""torchtitan's Trainer in this process: the run that `start` describes, in turns."""

import dataclasses
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from titan_lite.config.schema import Config
from titan_lite.data.assets import bundled_asset
from titan_lite.data.hf_documents import hf_documents
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.models.args import DecoderArgs
from titan_lite.models.registry import resolve


class Peer:
    """The run of this process, between its turns."""

    trainer: Any
    batches: Iterator[Any]
    turn: int


def start(packages: str, folder: str, config: Config, turn: int) -> int:
    """Builds torchtitan's trainer for the model, batch and dtypes of `config`; returns parameters.

    packages: the folder with torchtitan. Turns of `turn` steps are logged at their end.
    """
    sys.path.append(packages)
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/datasets"
    if not torch.cuda.is_available():
        take_cpu()
    from torchtitan.protocols.train_spec import get_train_spec, register_train_spec
    from torchtitan.tools.logging import init_logger
    from torchtitan.train import Trainer

    init_logger()
    _, args = resolve(config.model)
    spec = get_train_spec("llama3")
    model_args = {"same": their_args(type(spec.model_args["8B"]), args)}
    register_train_spec("same", dataclasses.replace(spec, model_args=model_args))
    Peer.trainer = Trainer(their_config(config, prepare_data(Path(folder), config), turn))
    Peer.batches = Peer.trainer.batch_generator(Peer.trainer.dataloader)
    Peer.turn = turn
    return sum(p.numel() for part in Peer.trainer.model_parts for p in part.parameters())


def take_turn() -> None:
    """Trains for one turn, as torchtitan's Trainer.train does."""
    trainer = Peer.trainer
    for _ in range(Peer.turn):
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(Peer.batches)


def finish() -> None:
    """Ends the run."""
    Peer.trainer.close()


def take_cpu() -> None:
    """Patches torchtitan, which requires an accelerator, to use the CPU; before its import."""
    device = types.SimpleNamespace(
        **vars(torch.cpu)
        | {
            "set_device": lambda device: None,
            "current_device": lambda: 0,
            "get_device_name": lambda device: "cpu",
            "get_device_properties": lambda device: types.SimpleNamespace(total_memory=2**34),
            "reset_peak_memory_stats": lambda: None,
            "empty_cache": lambda: None,
            "memory_stats": lambda device: {},
        }
    )
    private: Any = torch._utils
    private._get_available_device_type = lambda: "cpu"
    private._get_device_module = lambda kind: device
    set_factor = FSDPModule.set_gradient_divide_factor

    def set_factor_of_sums(module: FSDPModule, factor: float) -> None:
        # gloo cannot multiply in a reduction.
        set_factor(module, factor)
        module.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = set_factor_of_sums  # type: ignore[method-assign]


def their_args(kind: type, args: DecoderArgs) -> Any:
    """Returns torchtitan's arguments of the model."""
    return kind(
        dim=args.dim,
        n_layers=args.num_layers,
        n_heads=args.num_heads,
        n_kv_heads=args.num_kv_heads,
        vocab_size=args.vocab_size,
        # torchtitan rounds 8/3 of the width times this factor down.
        ffn_dim_multiplier=(args.ffn_dim + 0.5) / (8 * args.dim // 3),
        multiple_of=1,
        norm_eps=args.norm_eps,
        rope_theta=args.rope_theta,
    )


def their_config(config: Config, folder: Path, turn: int) -> Any:
    """Returns torchtitan's configuration, which has no loss chunks."""
    from torchtitan.config import JobConfig

    job = JobConfig()
    job.job.dump_folder = str(folder)
    job.model.name, job.model.flavor = "same", "same"
    job.model.hf_assets_path = str(folder)
    job.metrics.log_freq = turn
    job.optimizer.lr = config.optimizer.lr
    job.lr_scheduler.warmup_steps = config.lr_scheduler.warmup_steps
    job.training.steps = config.training.steps
    job.training.local_batch_size = config.training.local_batch_size
    job.training.seq_len = config.training.seq_len
    job.training.max_norm = config.training.max_norm
    job.training.mixed_precision_param = config.training.param_dtype
    job.training.dataset_path = str(folder / "corpus")
    job.activation_checkpoint.mode = "none"
    job.compile.enable = config.compile.enable
    return job


def prepare_data(folder: Path, config: Config) -> Path:
    """Writes the bundled corpus and tokenizer in torchtitan's format, for this rank."""
    own = folder / os.environ["RANK"]
    (own / "corpus").mkdir(parents=True)
    (own / "corpus" / "data.json").symlink_to(bundled_asset("corpus/train.jsonl"))
    family, args = resolve(config.model)
    assert family.hf_config is not None
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    documents = hf_documents(args, family.hf_config, tokenizer, dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / name).write_text(json.dumps(documents[name]))
    return own
