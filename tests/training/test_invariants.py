"""What must not change a training run: how a step is divided, recomputed activations, data workers, processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from tests.conftest import ROOT
from tests.training.small import ITEMS, TinyEncoder, TinyStrategy, make_examples, make_stage, run_stage

THIRTY_STEPS = {"max_steps": 30, "save_strategy": "no", "learning_rate": 3e-3}


def trajectory(folder: Path, model: nn.Module, **options: Any) -> list[float]:
    """Losses of 30 steps of 8 examples, followed by the gradient norms."""
    run_stage(
        folder,
        model=model,
        strategy=TinyStrategy(noise=0.0),
        stage=make_stage(**{**THIRTY_STEPS, **options}),
        examples=make_examples(37),  # epochs end with a step of 5, which 8 x 1 cuts short
    )
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    return [line["loss"] for line in lines] + [line["grad_norm"] for line in lines]


def encoder() -> TinyEncoder:
    torch.manual_seed(3)
    return TinyEncoder(dropout=0.0)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_accumulation_is_the_mean_over_all_places(batch: int, tmp_path: Path) -> None:
    whole = trajectory(tmp_path / "whole", encoder(), per_device_train_batch_size=8)
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
    parts = trajectory(tmp_path / "parts", encoder(), **options)
    assert parts == pytest.approx(whole, rel=2e-4)
    assert whole[0] != pytest.approx(whole[29], rel=0.1)


class LlamaEncoder(nn.Module):
    """The inside of a language model as an encoder, so that activation checkpointing has layers to work on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.item_embedding = nn.Embedding(ITEMS + 1, 16)
        self.llm = LlamaModel(
            LlamaConfig(
                vocab_size=8,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                attention_dropout=0.1,
            )  # fmt: skip
        )

    def represent(self, batch: Any) -> Tensor:
        hidden = self.item_embedding(batch["item_ids"])
        return self.llm(inputs_embeds=hidden, use_cache=False).last_hidden_state

    def score(self, hidden: Tensor) -> Tensor:
        return hidden @ self.item_embedding.weight.T


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = trajectory(tmp_path / "plain", LlamaEncoder(), per_device_train_batch_size=8)
    model = LlamaEncoder()
    spared = trajectory(tmp_path / "spared", model, per_device_train_batch_size=8, activation_checkpointing=True)
    assert model.llm.layers[0].gradient_checkpointing
    assert spared == pytest.approx(plain, rel=1e-5)


def test_data_workers_change_nothing(tmp_path: Path) -> None:
    alone = trajectory(tmp_path / "0", encoder(), per_device_train_batch_size=8)
    helped = trajectory(tmp_path / "2", encoder(), per_device_train_batch_size=8, dataloader_num_workers=2)
    assert alone == helped


PROGRAM = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tests.training.small import TinyStrategy, make_stage, run_stage
from tests.training.test_invariants import encoder
folder, batch = Path(sys.argv[1]), int(sys.argv[2])
model = encoder()
stage = make_stage(per_device_train_batch_size=batch, save_strategy="epoch")
run_stage(folder, model=model, strategy=TinyStrategy(noise=0.0), stage=stage)
if int(__import__("os").environ.get("RANK", 0)) == 0:
    save_file({n: p.detach() for n, p in model.named_parameters()}, folder / "end.safetensors")
"""


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, batch, how in (("one", 4, []), ("two", 2, launch)):
        ran = subprocess.run(
            [sys.executable, *how, str(program), str(tmp_path / name), str(batch)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "end.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    random = load_file(tmp_path / "two" / "checkpoints" / "checkpoint-18" / "rng.safetensors")
    assert {"0.torch", "1.torch", "0.python", "1.numpy"} <= set(random)
