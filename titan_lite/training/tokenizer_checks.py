"""Checks that the tokenizer fits the model and the weights to start from. Does not import torch."""

import logging
from pathlib import Path

from titan_lite.checkpoint.manifest import TOKENIZER_FOLDER
from titan_lite.checkpoint.state import Start
from titan_lite.config.problems import SettingError, literal
from titan_lite.config.schema import Checkpoint, Data
from titan_lite.data.masked_lm import require_mask_id
from titan_lite.data.tokenizer import Tokenizer
from titan_lite.data.tokenizer_files import files_in, load_tokenizer
from titan_lite.models.plan import Plan

logger = logging.getLogger(__name__)

# Published models pad their vocabularies by at most 2.4 % (DeepSeek-V2: 102,400 for 100,015).
LEAST_FILLED = 0.9


def fitting_tokenizer(section: Data, plan: Plan) -> Tokenizer:
    """Returns the run's tokenizer; ValueError if it does not fit the model."""
    tokenizer, vocab_size = load_tokenizer(section.tokenizer_path), plan.args.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise SettingError(
            ("data.tokenizer_path", "model.vocab_size"),
            f"{_name(section.tokenizer_path)} has {tokenizer.vocab_size:,} tokens, more than the "
            f"model's vocabulary of {vocab_size:,}: set model.vocab_size = {tokenizer.vocab_size} "
            "or set data.tokenizer_path to the model's tokenizer",
        )
    filled = tokenizer.vocab_size / vocab_size
    if filled < LEAST_FILLED and not section.allow_tokenizer_mismatch:
        raise SettingError(
            ("data.tokenizer_path", "model.vocab_size"),
            f"{_name(section.tokenizer_path)} has {tokenizer.vocab_size:,} tokens, {filled:.1%} of "
            f"the model's vocabulary of {vocab_size:,}; at least {LEAST_FILLED:.0%} is required. "
            "Set data.tokenizer_path to the model's tokenizer, or model.vocab_size = "
            f"{tokenizer.vocab_size}, or data.allow_tokenizer_mismatch = true to train with it",
        )
    if plan.family.objective == "masked_lm":
        require_mask_id(tokenizer)
    return tokenizer


def check_tokenizer_of_weights(
    section: Data, checkpoint: Checkpoint, tokenizer: Tokenizer, start: Start
) -> None:
    """Raises ValueError if the tokenizer is not that of the weights to start from."""
    if start.source is not None:
        manifest = start.manifest
        assert manifest is not None
        path = manifest.config.get("data", {}).get("tokenizer_path", "")
        if (start.source / TOKENIZER_FOLDER).is_dir():
            path = str(start.source / TOKENIZER_FOLDER)
        origin, expected = start.source, [manifest.tokenizer] if manifest.tokenizer else []
    elif path := checkpoint.initial_load_hf:
        origin, expected = Path(path).expanduser(), []
        for file in files_in(origin):
            try:
                expected.append(load_tokenizer(file).fingerprint)
            except ValueError as error:
                logger.warning("data.tokenizer_path is not compared with %s: %s", file, error)
    else:
        return
    if not expected or tokenizer.fingerprint in expected:
        return
    continues_data = start.source is not None and start.content == "run"
    if section.allow_tokenizer_mismatch and not continues_data:
        return
    name = _name(section.tokenizer_path)
    remedy = "; a run that resumes cannot change its tokenizer"
    if not continues_data:
        remedy = f", or set data.allow_tokenizer_mismatch = true to train with {name}"
    raise ValueError(
        f"{name} gives other ids than the tokenizer of {origin} "
        f"(fingerprint {tokenizer.fingerprint}, not {expected[0]}): set data.tokenizer_path = "
        f"{literal(path)}{remedy}"
    )


def _name(tokenizer_path: str) -> str:
    return tokenizer_path or "the bundled tokenizer"
