"""Several processes train the model one process trains, under every launcher that runs on a processor.

| launcher | processes | through the stage trainer | by `deepspeed.initialize` |
|---|---|---|---|
| data parallel | 2 | yes | |
| FSDP 2 | 2 | yes | |
| ZeRO 2, ZeRO 3 | 1 and 2 | yes | |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.processes import run_cases

Results = tuple[Path, dict[str, list[dict[str, Any]]]]
CLOSE = 1e-5
deepspeed = pytest.mark.skipif(not __import__("importlib.util").util.find_spec("deepspeed"), reason="needs deepspeed")


def compare(found: Results, plain: str, case: str) -> None:
    """Losses, validation and weights of every process are those of one process."""
    folder, results = found
    (expected,) = results[plain]
    for result in results[case]:
        assert len(result["losses"]) == len(expected["losses"])
        for measured in ("losses", "metrics"):
            torch.testing.assert_close(result[measured], expected[measured], atol=CLOSE, rtol=0)
        torch.testing.assert_close(result["norms"], expected["norms"], atol=1e-4, rtol=1e-4)
        assert result["whole_and_plain"], "the stage left divided weights in the model"
        assert result["wrapped_classes"] == []
        assert result["norm_of_the_base"] == expected["norm_of_the_base"]
    ours, theirs = load_file(folder / case / "weights.safetensors"), load_file(folder / plain / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():  # the router's among them: its gradient was reduced
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    saved = {path.relative_to(folder / plain) for path in (folder / plain / "model").rglob("*") if path.is_file()}
    assert saved == {path.relative_to(folder / case) for path in (folder / case / "model").rglob("*") if path.is_file()}
