"""The JSON schema that the presets name and editors check a file with; the page of all keys."""

import json
from pathlib import Path

import pytest

from titan_lite.cli import main
from titan_lite.models.registry import families

ROOT = Path(__file__).parent.parent.parent
FILE, PAGE = ROOT / "train_configs/schema.json", ROOT / "docs/configuration.md"


def test_the_file_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    # Parsed: pydantic writes some bounds as 0, others as 0.0, by its version.
    assert json.loads(capsys.readouterr().out) == json.loads(FILE.read_text()), (
        "run: titan-lite config --schema > train_configs/schema.json"
    )


def test_the_page_of_all_keys_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "--docs"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), (
        "run: titan-lite config --docs > docs/configuration.md"
    )
    words = " ".join(PAGE.read_text().split())
    assert "- `loss_parallel`: true or false; default `true`. Under tensor parallel, " in words
    assert "gather each chunk's logits on every rank. Needs parallel.tp > 1." in words


def test_an_editor_offers_names_and_flavors_and_refuses_others_where_it_knows_all() -> None:
    schema = json.loads(FILE.read_text())
    offered = schema["properties"]["model"]["properties"]
    known = schema["then"]["properties"]["model"]
    names = list(families())
    assert "llama" in names
    assert offered["name"]["anyOf"] == [{"enum": names}, {"type": "string"}]
    assert known["properties"]["name"] == {"enum": names}
    by_name = {
        rule["if"]["properties"]["name"]["const"]: rule["then"]["properties"]["flavor"]["enum"]
        for rule in known["allOf"]
    }
    assert by_name == {name: list(family.flavors) for name, family in families().items()}
    assert {*known["properties"]["flavor"]["enum"]} == {f for fs in by_name.values() for f in fs}
    # Plugins may register others, and a base file may name a family or plugins.
    unknown = schema["if"]["not"]["anyOf"]
    assert unknown[0] == {"required": ["extends"]}
    assert unknown[1]["properties"]["job"] == {"required": ["plugins"]}
