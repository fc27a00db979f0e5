"""Complete or absent: a damaged checkpoint is reported with the file, and not resumed from.

Checkpoints of a few bytes: what these tests are about does not look into the files.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from titan_lite import cli
from titan_lite.checkpoint.manifest import (
    CheckpointManifest,
    read_manifest,
    write_manifest,
    write_text,
)
from titan_lite.checkpoint.state import (
    RunState,
    check_excluded,
    delete_old,
    find_start,
    newest_below,
    retire_later_steps,
    saved_steps,
)
from titan_lite.config.problems import SettingError
from titan_lite.config.schema import Checkpoint
from titan_lite.models.plan import make_plan
from titan_lite.runtime.stored_files import DamagedError, damaged_files
from titan_lite.training.meta_model import open_hf_weights

SECTION = Checkpoint(enable=True)


def make_checkpoint(folder: Path, step: int, content: str = "run") -> Path:
    checkpoint = folder / f"step-{step}"
    checkpoint.mkdir(parents=True)
    state = json.dumps(dataclasses.asdict(RunState(step=step, tokens=100 * step)))
    files = {
        "run_state.json": write_text(checkpoint / "run_state.json", state),
        "__0_0.distcp": write_text(checkpoint / "__0_0.distcp", "weights " * 100),
    }
    manifest = CheckpointManifest(
        step=step,
        content=content,
        world_size=4,
        layout={"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2},
        versions={"titan_lite": "0", "torch": "2.13.0", "python": "3.11.0"},
        config={"job": {"description": "a test"}},
        files=files,
    )
    write_manifest(checkpoint, manifest)
    return checkpoint


def _cut_short(checkpoint: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])


def flip_a_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def _flip_the_manifest(checkpoint: Path) -> None:
    content = (checkpoint / "manifest.json").read_bytes()
    # In the description, where any text is valid.
    flip_a_bit(checkpoint / "manifest.json", content.index(b"a test"))


def _other_format(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))


def _rename(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("moved"))
    make_checkpoint(checkpoint.parent, 12)
    (checkpoint.parent / "step-12").rename(checkpoint)


DAMAGES = {
    r"step-8/__0_0.distcp is damaged: it has 799 bytes, expected 800": _cut_short,
    r"step-8/run_state.json is missing": lambda folder: (folder / "run_state.json").unlink(),
    r"step-8 has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    r"step-8/manifest.json is damaged: .*checksum": _flip_the_manifest,
    r"step-8/manifest.json is damaged: JSONDecodeError": lambda folder: (
        folder / "manifest.json"
    ).write_text("{"),
    r"step-8/manifest.json is damaged: TypeError": lambda folder: (
        folder / "manifest.json"
    ).write_text("[]"),
    # The size stays the same.
    r"step-8/run_state.json is damaged: its checksum is": lambda folder: flip_a_bit(
        folder / "run_state.json", 3
    ),
    r"step-8/manifest.json has format 9; this version of titan_lite reads 1": _other_format,
    r"step-8 is a checkpoint of step 12, not of the step in its name": _rename,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_newest_complete_one_is_resumed_from(
    message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, damaged = make_checkpoint(tmp_path, 4), make_checkpoint(tmp_path, 8)
    DAMAGES[message](damaged)
    start = find_start(SECTION, tmp_path)
    assert (start.source, start.state.step, start.state.tokens) == (good, 4, 400)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"Skipped a checkpoint: {damaged}")
    with pytest.raises(ValueError, match=message):
        find_start(SECTION.model_copy(update={"load_step": 8}), tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"no checkpoint in .* is complete: .*{message}.*; 4 is bad.*start from step 0",
    ):
        find_start(SECTION, tmp_path, {good: DamagedError("4 is bad")})


def test_a_checkpoint_that_was_never_completed_is_not_resumed_from(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 4)
    make_checkpoint(tmp_path, 8).rename(tmp_path / "step-8.incomplete")
    assert find_start(SECTION, tmp_path).own_step == 4


def test_a_missing_step_is_an_error_that_names_those_found(tmp_path: Path) -> None:
    for step in (4, 12, 8):
        make_checkpoint(tmp_path, step)
    with pytest.raises(ValueError, match=r"no checkpoint of step 5 in .*steps found: 4, 8, 12"):
        find_start(SECTION.model_copy(update={"load_step": 5}), tmp_path)


def test_a_flipped_bit_is_found_by_reading(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 4)
    manifest = read_manifest(checkpoint)
    assert damaged_files(checkpoint, manifest.files, manifest.files) == []
    flip_a_bit(checkpoint / "__0_0.distcp", 300)
    (sentence,) = damaged_files(checkpoint, manifest.files, manifest.files)
    assert sentence.startswith(f"{checkpoint}/__0_0.distcp is damaged: its checksum is ")


def test_no_run_goes_on_from_weights_only(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 4)
    weights = make_checkpoint(tmp_path, 8, content="model")
    with pytest.raises(
        ValueError, match=rf"{weights} contains only weights .*another job.dump_folder"
    ):
        find_start(SECTION, tmp_path)
    # Unless no step is left to do.
    start = find_start(SECTION, tmp_path, last_step=8)
    assert (start.source, start.content, start.own_step) == (weights, "model", 8)
    other = {"initial_load_path": str(weights)}
    start = find_start(SECTION.model_copy(update=other), tmp_path / "another run")
    assert (start.source, start.content, start.state.step) == (weights, "model", 0)
    both = SECTION.model_copy(update=other | {"initial_load_model_only": False})
    with pytest.raises(ValueError, match=r"only weights, .*initial_load_model_only = true"):
        find_start(both, tmp_path / "another run")


def test_an_initial_checkpoint_counts_only_where_the_run_has_none_of_its_own(
    tmp_path: Path,
) -> None:
    initial = make_checkpoint(tmp_path / "other", 12)
    section = SECTION.model_copy(
        update={"initial_load_path": str(initial), "initial_load_model_only": False}
    )
    own = tmp_path / "own"
    start = find_start(section, own)
    assert (start.source, start.state.step, start.own_step) == (initial, 12, 0)
    make_checkpoint(own, 4)
    assert find_start(section, own).source == own / "step-4"
    assert find_start(section.model_copy(update={"load_step": 0}), own).source == initial
    whole_folder = section.model_copy(update={"initial_load_path": str(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"must name one checkpoint, for example .*/step-12"):
        find_start(whole_folder, tmp_path / "no own")


def test_an_exclusion_that_matches_nothing_is_an_error_that_names_the_nearest() -> None:
    names = ["tok_embeddings.weight", "layers.0.norm.weight", "output.weight"]
    check_excluded(["output.*", "layers.?.norm.weight"], names)
    with pytest.raises(ValueError, match=r'"outptu.weight" matches no parameter.*"output.weight"'):
        check_excluded(["output.*", "outptu.weight"], names)


def test_the_latest_are_kept_and_every_so_many_steps_for_ever(tmp_path: Path) -> None:
    for step in range(2, 15, 2):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step-20.incomplete").mkdir()
    (tmp_path / "step-22.incomplete").touch()
    delete_old(SECTION.model_copy(update={"keep_latest_k": 2, "keep_every": 6}), tmp_path)
    assert saved_steps(tmp_path) == [6, 12, 14]
    assert not list(tmp_path.glob("*.incomplete"))
    delete_old(SECTION.model_copy(update={"keep_latest_k": 0}), tmp_path)
    assert saved_steps(tmp_path) == [6, 12, 14]


def test_of_a_link_to_an_old_checkpoint_only_the_link_is_deleted(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "own"
    for step in (4, 6, 8):
        make_checkpoint(folder, step)
    (folder / "step-4").rename(elsewhere)
    (folder / "step-4").symlink_to(elsewhere)
    delete_old(SECTION.model_copy(update={"keep_latest_k": 1}), folder)
    assert [path.name for path in folder.iterdir()] == ["step-8"]
    assert read_manifest(elsewhere).step == 4


def test_folders_whose_names_are_not_those_of_steps_are_no_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 4)
    for name in ("step-007", "step-9 (copy)", "step-\N{ARABIC-INDIC DIGIT NINE}", "step--5"):
        (tmp_path / name).mkdir()
    assert saved_steps(tmp_path) == [4]
    assert retire_later_steps(tmp_path, 4) is None


def test_the_newest_checkpoint_below_is_named_where_one_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 12, 8):
        make_checkpoint(tmp_path / "runs" / "first" / "checkpoint", step)
    # Not complete, and no checkpoint.
    (tmp_path / "runs" / "first" / "checkpoint" / "step-16").mkdir()
    newest = tmp_path / "runs" / "first" / "checkpoint" / "step-12"
    for folder in (newest.parent, newest.parent.parent, tmp_path / "runs"):
        section = Checkpoint(enable=True, initial_load_path=str(folder))
        message = f"checkpoint.initial_load_path: must name one checkpoint, for example {newest}"
        with pytest.raises(ValueError, match=re.escape(message)):
            find_start(section, tmp_path / "new")
    assert newest_below(newest) is None
    assert newest_below(tmp_path / "none") is None
    assert cli.main(["checkpoint", "verify", str(tmp_path / "runs")]) == 2
    assert f"; the newest further below is {newest}" in capsys.readouterr().err


def test_a_hugging_face_model_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    section = Checkpoint(enable=True, initial_load_path=str(tmp_path))
    with pytest.raises(SettingError) as error:
        find_start(section, tmp_path / "new")
    assert str(error.value) == (
        f"checkpoint.initial_load_path: {tmp_path} is a Hugging Face model: set "
        "checkpoint.initial_load_hf to it instead"
    )


@pytest.mark.parametrize("name", ["step-12", ""])
def test_a_checkpoint_is_told_from_a_hugging_face_model(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 12)
    plan = make_plan(None, [f"--checkpoint.initial_load_hf={tmp_path / name}"])
    with pytest.raises(SettingError) as error:
        open_hf_weights(plan)
    assert str(error.value) == (
        f"checkpoint.initial_load_hf: {tmp_path / name} is, or contains, a checkpoint of "
        "titan_lite, not Hugging Face weights: set "
        f'checkpoint.initial_load_path = "{checkpoint}" instead'
    )


def test_the_command_lists_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "checkpoint"
    for step in (4, 8):
        make_checkpoint(folder, step)
    for arguments, word in ((["ls", tmp_path / "run"], "complete"), (["verify", folder], "verifi")):
        assert cli.main(["checkpoint", *map(str, arguments)]) == 0
        lines = capsys.readouterr().out.splitlines()
        size = str(read_manifest(folder / "step-4").bytes)
        assert lines[1].split()[:4] == ["step-4", "run", size, "B"]
        assert all("dp_shard 2 x tp 2" in line and word in line for line in lines[1:])
    flip_a_bit(folder / "step-8" / "__0_0.distcp", 5)
    (folder / "step-12.incomplete").mkdir()
    assert cli.main(["checkpoint", "ls", str(folder / "step-8")]) == 0
    assert cli.main(["checkpoint", "ls", str(folder)]) == 1
    assert "step-12.incomplete has no manifest.json" in capsys.readouterr().out
    assert cli.main(["checkpoint", "verify", str(folder)]) == 1
    assert "step-8/__0_0.distcp is damaged" in capsys.readouterr().out
    assert cli.main(["checkpoint", "ls", str(tmp_path)]) == 2
    message = f"titan-lite: {tmp_path}: no checkpoint in this folder, nor in checkpoint/ below"
    assert message in capsys.readouterr().err
