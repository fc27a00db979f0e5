"""Every file in train_configs/ loads, passes all rules at its world size, and builds its model."""

import re
from pathlib import Path

import pytest
import torch

from titan_lite.config.load import load_config
from titan_lite.config.problems import FIELDS
from titan_lite.models.plan import make_plan
from titan_lite.nn.build_model import build_model
from titan_lite.planner.counts import num_params

FOLDER = Path(__file__).parent.parent / "train_configs"
PRESETS = sorted(FOLDER.glob("*.toml"))
PAGE = FOLDER.parent / "docs/published_runs.md"
# Commands of published rows: preset, world size, overrides.
ROWS = re.findall(
    r"^titan-lite config train_configs/(\S+) --world-size (\d+)(.*)$",
    PAGE.read_text(),
    re.MULTILINE,
)
# Billions of parameters that a preset is known by.
SIZES = {
    "llama2_7b": 6.74,
    "llama2_70b_tp4_pp8": 68.98,
    "llama2_70b_tp8_pp8_32k": 68.98,
    "llama2_70b_tp8_pp8_64k": 68.98,
    "llama3_8b": 8.03,
    "llama3_8b_cp8_256k": 8.03,
    "llama3_70b": 70.55,
    "llama3_405b": 405.85,
    "llama3_405b_pp": 405.85,
    "llama2_7b_tp4": 6.74,
    "internlm_7b": 7.32,
    "internlm_7b_1024": 7.32,
    "internlm_7b_ac": 7.32,
    "internlm_7b_ac_1024": 7.32,
    "internlm_7b_tp2": 7.32,
    "internlm_7b_tp2_1024": 7.32,
    "internlm_7b_zero1": 7.32,
    "internlm_7b_zero2_8k": 7.32,
    "qwen_14b_zero2": 14.17,
    "qwen_14b_zero2_8k": 14.17,
    "gpt_175b_fsdp": 175.2,
    "gpt_175b_tp8_pp8": 174.62,
    "gpt_1t_fsdp": 1009.3,
    "gpt_1t_tp8_pp64": 1008.04,
    "qwen3_30b_a3b": 30.53,
    "qwen3_30b_a3b_64": 30.53,
    "mixtral_8x22b": 140.63,
    "deepseek_v3": 671.03,
    "megatron_bert_base_512": 0.14,
    "megatron_bert_base_2048": 0.14,
    "megatron_bert_large_tp4": 0.37,
}


def test_there_are_presets() -> None:
    assert {"debug", "debug_bert", "debug_moe", *SIZES} == {path.stem for path in PRESETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_valid_and_builds_its_model_on_meta(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (match,) = re.findall(r"^# Processes: (\d+)$", path.read_text(), re.MULTILINE)
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_text("")
    overrides = []
    if load_config(path).config.data.tokenizer_path:
        overrides = [f"--data.tokenizer_path={tokenizer}"]
    plan = make_plan(path, overrides, int(match))
    assert not caplog.records, "a preset has no setting without effect"
    with torch.device("meta"):
        model = build_model(plan.family, plan.args)
    assert model.num_parameters == num_params(plan.args)
    if path.stem in SIZES:
        assert round(model.num_parameters / 1e9, 2) == SIZES[path.stem]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_names_the_schema_beside_it(path: Path) -> None:
    assert path.read_text().startswith("#:schema ./schema.json\n")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_its_hardware_layout_and_source_first(path: Path) -> None:
    head = path.read_text().split("\n\n")[0]
    for word in ("# Hardware: ", "# Layout: ", "# Source: ", "# Processes: "):
        assert word in head


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_writes_only_what_differs(path: Path) -> None:
    loaded = load_config(path)
    text = path.read_text()
    extends = re.search(r'^extends = "(.+)"$', text, re.MULTILINE)
    base = load_config(FOLDER / extends[1] if extends else None)
    for dotted, origin in loaded.origins.items():
        section, _, key = dotted.partition(".")
        if origin == str(path):
            value = getattr(getattr(loaded.config, section), key)
            default = FIELDS[section][key].default
            assert value != getattr(getattr(base.config, section), key, default), dotted


@pytest.mark.parametrize(("preset", "world_size", "overrides"), ROWS)
def test_the_keys_that_make_a_published_row_of_a_preset_pass_all_rules(
    preset: str, world_size: str, overrides: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_text("")
    words = [*overrides.split(), f"--data.tokenizer_path={tokenizer}"]
    make_plan(FOLDER / preset, words, int(world_size))
    assert not caplog.records, "no setting without effect"


def test_every_preset_has_its_place_on_the_page_of_published_runs() -> None:
    linked = re.findall(r"\(\.\./train_configs/(\w+)\.toml\)", PAGE.read_text())
    assert {*linked} == {*SIZES}
    assert ROWS
