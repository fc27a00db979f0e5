"""Exports a run's last checkpoint for Hugging Face transformers."""

import logging
from pathlib import Path

from titan_lite.checkpoint.hf import DCPToHF
from titan_lite.data.export_check import README, export_report
from titan_lite.data.hf_documents import hf_documents
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.models.plan import Plan
from titan_lite.runtime.writing import writing

logger = logging.getLogger(__name__)


def export_hf(plan: Plan, checkpoint: Path, tokenizer: Tokenizer, rank: int) -> None:
    """Writes a checkpoint to hf/ in the folder of the checkpoints; collective."""
    family, args, data = plan.family, plan.args, plan.config.data
    assert family.hf_config is not None
    ema = plan.config.ema
    # With last_save_model_only, the saved weights are the averages already.
    takes_average = ema.enable and ema.export and not plan.config.checkpoint.last_save_model_only
    export = DCPToHF(checkpoint, family, args, average=takes_average)
    target = checkpoint.with_name("hf")
    hf_files = hf_documents(args, family.hf_config, tokenizer, dtype=export.dtype)
    if rank == 0:
        # run_train.sh checks this before training, too, and rejects a run whose exported tokenizer
        # gives other ids, unless checkpoint.allow_export_mismatch = true.
        report = export_report(hf_files, tokenizer, data, of_pairs=not args.causal)
        hf_files[README] = report.readme()
        logger.log(logging.INFO if report.is_same else logging.WARNING, "%s", report.sentence)
    with writing(target):
        export.write(target, hf_files)
    logger.info("Hugging Face model written to %s", target)
