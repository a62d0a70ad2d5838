"""A saved and resumed iLoRA stage against one without checkpoints, on the quick start's item-slot shape."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.data.schema import DataContext
from llmrec.data.sequences import SequenceCollator, SequenceExamples
from llmrec.encoders.sasrec import SASRecConfig, SASRecEncoder
from llmrec.llm.recommender import LLMRecommender
from llmrec.recipe import StageSpec
from llmrec.strategies.base import StepInfo
from llmrec.strategies.next_item import NextItem
from llmrec.training import resuming
from llmrec.training.trainer import train_stage
from llmrec.tuners.ilora import ILoraTuner

ITEMS, USERS, LENGTH, BATCH, EVERY = 1_682, 64, 50, 8, 50
MAXIMUM = {"first step resumed / fresh": 1.5, "saving every 50 steps / not saving": 1.05}


class Timed(NextItem):
    """Notes when steps end."""

    def __init__(self) -> None:
        super().__init__(mask_history=True)
        self.ends: list[float] = []

    def on_step_end(self, model: Any, step: StepInfo) -> None:
        """Look at the clock."""
        self.ends.append(time.perf_counter())


def recommender() -> LLMRecommender:
    """Twelve layers of SmolLM2-135M's shape with random weights, adapted and gated as in the quick start."""
    torch.manual_seed(0)
    config = SASRecConfig(num_items=ITEMS, hidden_size=64, num_layers=2, num_heads=2, max_history=LENGTH)
    encoder = SASRecEncoder(config)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576, num_hidden_layers=12, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
            vocab_size=1_000,
        )
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"r": 8, "num_experts": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": targets}
    adapted = ILoraTuner.attach(base, ILoraTuner.configure(options, gate_dim=64))
    return LLMRecommender.build(adapted, encoder=encoder, max_history=LENGTH, slot_content="both", residual=True)


def examples() -> SequenceExamples:
    """Full histories of random items."""
    first = np.arange(USERS) * (LENGTH + 1)
    items = np.random.default_rng(0).integers(1, ITEMS + 1, USERS * (LENGTH + 1))
    return SequenceExamples(
        items=items, timestamps=None, users=np.arange(1, USERS + 1), first=first, start=first, end=first + LENGTH,
        example_ids=np.arange(USERS), dense=True,
    )  # fmt: skip


def train(folder: Path, steps: int) -> Timed:
    """Train, or go on, with a checkpoint every two steps; the strategy knows when steps ended."""
    strategy = Timed()
    arguments = {"max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": 5e-4,
                 "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}  # fmt: skip
    stage = StageSpec.model_validate({"train": "tuner", **arguments})
    context = DataContext(ITEMS, USERS, np.ones(ITEMS + 1, dtype=np.int64), np.zeros((2, 0), dtype=np.int64))
    model = recommender()
    strategy.ends.append(time.perf_counter())
    train_stage(
        model, strategy, examples(), SequenceCollator(with_seen=True), stage=stage, output_dir=folder, seed=1,
        context=context, evaluate=None, identity={},
    )  # fmt: skip
    return strategy


def run() -> dict[str, float]:
    """Ratios of times, lower is better; `MAXIMUM` holds what they may reach."""
    root = Path(tempfile.mkdtemp(prefix="llmrec-bench-"))
    saving: list[float] = []
    save = resuming.AtomicCheckpoints._save_checkpoint

    def timed(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        save(self, *args)
        saving.append(time.perf_counter() - start)

    resuming.AtomicCheckpoints._save_checkpoint = timed  # type: ignore[method-assign, assignment]
    try:
        train(root / "warm", 1)
        fresh = [train(root / f"fresh-{n}", 6) for n in range(2)]
        resumed = []
        for number in range(3):
            shutil.copytree(root / "fresh-0", root / f"resumed-{number}")
            for name in ("checkpoints/checkpoint-6", "checkpoints/final"):
                shutil.rmtree(root / f"resumed-{number}" / name)
            (root / f"resumed-{number}" / "done.json").unlink()
            resumed.append(train(root / f"resumed-{number}", 6))
    finally:
        resuming.AtomicCheckpoints._save_checkpoint = save  # type: ignore[method-assign]
        shutil.rmtree(root)
    first = {name: min(one.ends[1] - one.ends[0] for one in runs) for name, runs in (("f", fresh), ("r", resumed))}
    # Steps 2 and 4 are followed by a save; 3 and 5 are not, so their successors start right after them.
    step = median(one.ends[n] - one.ends[n - 1] for one in fresh for n in (2, 4, 6))
    return {
        "first step resumed / fresh": first["r"] / first["f"],
        "saving every 50 steps / not saving": 1 + median(saving) / (EVERY * step),
        "seconds of a save": median(saving),
        "seconds of a step": step,
    }


if __name__ == "__main__":
    for name, figure in run().items():
        print(f"{name}: {figure:.3f}" + (f" (at most {MAXIMUM[name]:.2f})" if name in MAXIMUM else ""))
