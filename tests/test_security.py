"""Files are data, and a run writes only into its folders."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from titan_lite.config.load import ConfigError
from titan_lite.data.tokenizer_files import load_tokenizer
from titan_lite.models.plan import make_plan


@pytest.mark.parametrize("folder", ["../elsewhere", "a/../../b", ".."])
def test_checkpoints_stay_in_the_run_folder_unless_the_path_is_absolute(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.folder .* is outside of job\.dump_folder"):
        make_plan(None, [f"--checkpoint.folder={folder}"], world_size=1)
    for allowed in ("/somewhere/else", "a/../b", "..b"):
        make_plan(None, [f"--checkpoint.folder={allowed}"], world_size=1)


def test_a_tilde_is_the_home_folder_and_no_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = make_plan(None, ["--job.dump_folder=~/runs", "--checkpoint.folder=~/elsewhere"], 1)
    assert plan.run_folder == tmp_path / "runs"
    assert plan.checkpoint_folder == tmp_path / "elsewhere"
    # As --job.dump_folder=$OUT where OUT is not set: all would be written to where it is started;
    # checkpoints without a separate folder, among the files of the run.
    for folder in ("job.dump_folder", "checkpoint.folder"):
        with pytest.raises(ConfigError, match=rf'{re.escape(folder)} .*is empty; set "\."'):
            make_plan(None, [f"--{folder}="], world_size=1)


def test_a_tokenizer_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "tokenizer.model").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match="is not a tokenizer: it is neither JSON nor"):
        load_tokenizer(tmp_path / "tokenizer.model")
    assert not (tmp_path / "ran").exists()
