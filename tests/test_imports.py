"""`import llmrec` and `llmrec --help` are cheap: seen from a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llmrec
from llmrec.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "peft", "trl", "accelerate", "pandas", "pyarrow", "numpy", "ibis", "datasets")
SHOW_MODULES = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


def loaded_by(statement: str) -> set[str]:
    """Top-level modules a fresh interpreter holds after a statement."""
    code = f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    {statement}\n{SHOW_MODULES}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import llmrec",
        "import llmrec; dir(llmrec)",
        "import llmrec.cli; llmrec.cli.build_parser().format_help()",
        "import llmrec.errors, llmrec.interfaces, llmrec.paper, llmrec.assets",
    ],
)
def test_loads_nothing_heavy(statement: str) -> None:
    assert not loaded_by(statement) & set(HEAVY)


@pytest.mark.parametrize("verb", [verb for verb, _ in VERBS])
def test_a_verb_parses_its_flags_without_heavy_libraries(verb: str) -> None:
    statement = f"import llmrec.cli as c; c.build_verb_parser('{verb}', c.import_verb('{verb}')).format_help()"
    assert not loaded_by(statement) & set(HEAVY)


def test_import_time(record_property: pytest.FixtureRequest) -> None:
    """The budget is 0.3 s beyond the interpreter; the bound here leaves room for a busy machine."""
    best = min(_seconds("import llmrec") for _ in range(3)) - min(_seconds("pass") for _ in range(3))
    record_property("seconds", best)  # type: ignore[operator]
    assert best < 1.0


def _seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": ""})
    return time.perf_counter() - start


@pytest.mark.parametrize("name", llmrec.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(llmrec, name) is not None
    assert name in dir(llmrec)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="public names"):
        llmrec.no_such_name  # noqa: B018
