"""`llmrec check` finds what is wrong before anything is loaded."""

from __future__ import annotations

import json

import pytest

from llmrec.cli import main


def check(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["check", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_parameters_of_a_smoke_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    record = check(capsys, "smoke/sasrec")
    assert record["name"] == "smoke-sasrec"
    larger = check(capsys, "smoke/sasrec", "--set", "encoder.hidden_size=64")
    assert 0 < record["encoder parameters"] < larger["encoder parameters"]  # type: ignore[operator]


def test_a_prompt_in_words_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    record = check(capsys, "smoke/lora", "--set", "prompt={style: text, template: next_item/movie, candidates: 3}")
    prompt = str(record["prompt"])
    assert all(f"title {number}" in prompt for number in range(1, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.0.learning_rat=1", "learning_rate"),
        ("stages.0.output_dir=x", "the run folder decides it"),
        ("stages.1.lr_scheduler_type=wavy", "stages.1"),
        ("tuner.rank=8", "rank"),
        ("encoder.type=sasrek", "sasrec"),
        ("sed=1", "seed"),
        ("prompt={style: text}", "prompt.template"),
        ("llm=null", "llm"),
    ],
)
def test_what_cannot_be_ends_with_2(change: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "smoke/ilora", "--set", change]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_recipe_has_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "smoke/ilorra"]) == 2
    assert "smoke/ilora" in capsys.readouterr().err
