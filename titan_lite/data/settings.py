"""The settings that determine a run's data, and that a resumed run must keep.

Does not import torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Data
from titan_lite.data.packing import RowMaker
from titan_lite.data.sources import Source


def data_settings(
    section: Data,
    sources: Sequence[Source],
    rows: RowMaker,
    *,
    seq_len: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the settings by their keys, for a checkpoint; small JSON.

    The tokenizer is compared by its fingerprint in the checkpoint's manifest.
    """
    identities = [source.identity for source in sources]
    mixed = section.sources
    return {
        "dataset": identities if mixed else identities[0],
        "data.sources": [
            [s.name, s.weight, s.text_field, *([s.tokens_field] if s.tokens_field else [])]
            for s in mixed
        ]
        or None,
        "training.seq_len": seq_len,
        "training.seed": seed,
        **rows.settings(),
        "data.num_streams": section.num_streams,
        "data.shuffle": section.shuffle,
        "data.shuffle_buffer": section.shuffle_buffer,
        "data.text_field": section.text_field,
        "data.tokens_field": section.tokens_field or None,
    }


def check_data_settings(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises ValueError naming each setting that differs from the checkpoint's."""
    if differing := changed_values(settings, saved):
        raise SettingError(
            ("checkpoint.load_step", *(key for key in differing if "." in key)),
            f"cannot resume with different data settings: {'; '.join(differing.values())}; restore "
            "the checkpoint's values; or, to start a new run from its weights, choose another "
            "job.dump_folder and set checkpoint.initial_load_path to the checkpoint's folder and "
            "checkpoint.initial_load_model_only = true",
        )


def changed_values(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, str]:
    """Returns a sentence with both values for each setting that differs from the saved one."""
    return {
        key: f"{key} was {saved.get(key)!r} and is {value!r}"
        for key, value in settings.items()
        if value != saved.get(key)
    }
