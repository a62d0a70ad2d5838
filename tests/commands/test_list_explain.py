"""`llmrec list` and `llmrec explain`: every kind, every name, readable and as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmrec import cli, discovery
from llmrec.assets import SUFFIXES

PARTS = [(kind, name) for kind in discovery.KINDS for name in discovery.names(kind)]


def spoken(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_kinds_count_what_they_list(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = spoken(capsys, "list")["entries"]
    assert {"systems", "encoders", "sources", "downloads", *SUFFIXES} <= {entry["kind"] for entry in kinds}
    for entry in kinds:
        assert len(spoken(capsys, "list", entry["kind"])["entries"]) == entry["entries"], entry["kind"]


def test_singular_and_plural_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert spoken(capsys, "list", "encoder")["entries"] == spoken(capsys, "list", "encoders")["entries"]


def test_every_part_has_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in discovery.KINDS:
        assert all(entry["summary"] for entry in spoken(capsys, "list", kind)["entries"]), kind


def test_unknown_names_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "nothing"]) == 2
    assert "encoders" in capsys.readouterr().err
    assert cli.main(["explain", "encoder", "sasrek"]) == 2
    assert "sasrec" in capsys.readouterr().err
    assert cli.main(["explain", "system", "nobody"]) == 2
    assert "SASRec" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_is_explained(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = spoken(capsys, "explain", kind, name)
    assert told["class"].startswith(f"llmrec.{discovery.KINDS[kind].replace('/', '.')}.{name}.")
    assert told["summary"]
    assert cli.main(["explain", kind, name]) == 0
    shown = capsys.readouterr().out
    assert all(option["name"] in shown for option in told["options"])


def test_explained_options_have_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    options = {option["name"]: option for option in spoken(capsys, "explain", "encoder", "sasrec")["options"]}
    assert options["hidden_size"]["type"] == "int" and isinstance(options["hidden_size"]["default"], int)


def test_systems_are_found_in_any_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    told = spoken(capsys, "explain", "system", "i-lora")
    assert told["system"] == "iLoRA" and "llmrec/tuners/ilora.py" in told["files"]
    assert told["paper"]["venue"]
