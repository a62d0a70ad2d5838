"""`llmrec quickstart --smoke` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrec.assets import asset_names
from llmrec.commands import quickstart
from tests.runs import ROOT

LIMIT_SECONDS = 90


def test_its_recipes_are_shipped() -> None:
    assert {*quickstart.RECIPES.values(), *quickstart.SMOKE_RECIPES.values()} <= set(asset_names("recipes"))


@pytest.mark.slow
def test_the_smoke_path_ends_with_a_table_and_a_report(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "llmrec", "quickstart", "--smoke", "--out", "smoke"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "smoke" / "metrics.json").read_text())
    assert {"protocol", "users", "seed", "models"} <= set(record)
    assert record["users"] == 300 and record["seed"] == 42
    assert set(record["models"]) == {"popularity", "itemknn", "sasrec", "lora", "ilora"}
    for values in record["models"].values():
        for metric in ("ndcg@10", "hr@10"):
            assert set(values[metric]) == {"mean", "low", "high"}
            assert 0.0 <= values[metric]["low"] <= values[metric]["mean"] <= values[metric]["high"] <= 1.0
    assert "<html" in (tmp_path / "smoke" / "report.html").read_text(encoding="utf-8").lower()
    assert seconds < LIMIT_SECONDS
