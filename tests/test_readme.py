"""Every command line of the README is one that the program understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmrec.assets import find_asset
from llmrec.cli import VERBS, build_verb_parser, import_verb

README = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\s*(?:\$ )?(?:\S*accelerate launch .*?-m |\S*python -m |\S*/)?llmrec\s+(.+)$")


def commands(text: str) -> list[list[str]]:
    """Words behind `llmrec` of every command line in the code blocks of a Markdown text."""
    found = []
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            match = _COMMAND.match(line)
            if match:
                words = shlex.split(match.group(1), comments=True)
                ends = [place for place, word in enumerate(words) if word in {"|", ">", "&&", ";", "&"}]
                found.append(words[: ends[0]] if ends else words)
    return found


def test_commands_are_found_in_all_spellings() -> None:
    text = (
        "```bash\n$ llmrec list encoder  # all\nllmrec train a.yaml \\\n  --out b > log\n"
        "accelerate launch --num_processes 2 -m llmrec train c.yaml\n.venv/bin/llmrec pull x\nllmrecs no\n```\n"
        "llmrec outside\n"
    )
    assert commands(text) == [
        ["list", "encoder"], ["train", "a.yaml", "--out", "b"], ["train", "c.yaml"], ["pull", "x"],
    ]  # fmt: skip


def test_the_readme_shows_commands() -> None:
    assert commands(README.read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", commands(README.read_text(encoding="utf-8")), ids=" ".join)
def test_a_command_of_the_readme_parses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    verb = words[0]
    if verb.startswith("-"):
        assert verb in {"--help", "--version"}
        return
    assert verb in dict(VERBS), f"there is no verb {verb}"
    try:
        args = build_verb_parser(verb, import_verb(verb)).parse_args(words[1:])
    except SystemExit as end:
        assert end.code == 0, f"llmrec {' '.join(words)}\n{capsys.readouterr().err}"
        return
    if verb in {"train", "check"} and args.recipe.startswith("recipes/"):
        assert find_asset("recipes", args.recipe).is_file()
