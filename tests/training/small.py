"""A model, an objective and data small enough to train in a second, with dropout and with state to resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.data.schema import DataContext
from llmrec.data.sequences import SequenceCollator, SequenceExamples
from llmrec.recipe import StageSpec
from llmrec.strategies.base import StepInfo, StepLoss, TrainContext, TrainingStrategy
from llmrec.training.trainer import StageResult, train_stage

ITEMS, WIDTH = 12, 8
IDENTITY = {"recipe": "r1", "data": "d1", "encoder": "none", "base_model": "none"}


class TinyEncoder(nn.Module):
    """Item vectors, dropout, a recurrent layer, a frozen table and a buffer that counts forwards."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(ITEMS + 1, WIDTH, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.layer = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Parameter(torch.ones(1000), requires_grad=False)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.long))
        self.register_buffer("constant", torch.ones(3))

    def represent(self, batch: Any) -> Tensor:
        self.forwards += 1
        return self.norm(self.layer(self.dropout(self.item_embedding(batch["item_ids"])))[0])

    def score(self, hidden: Tensor) -> Tensor:
        return hidden @ self.item_embedding.weight.T


@dataclass
class TinyStrategy(TrainingStrategy):
    """Cross-entropy with noise from the step's generator, and an average of the item table as state."""

    noise: float = 0.1
    average: Tensor | None = None
    drawn: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)

    def prepare(self, context: TrainContext, model: Any, generator: torch.Generator) -> None:
        self.average = model.item_embedding.weight.detach().clone()

    def loss(self, model: Any, batch: Any, step: StepInfo) -> StepLoss:
        kept = batch["targets"] > 0
        logits = model.score(model.represent(batch)[kept])
        draw = torch.rand((), generator=step.generator)
        self.drawn.append(float(draw))
        total = F.cross_entropy(logits, batch["targets"][kept]) * (1 + self.noise * draw)
        return StepLoss(total, {"draw": draw}, int(kept.sum()))

    def on_step_end(self, model: Any, step: StepInfo) -> None:
        self.average.lerp_(model.item_embedding.weight.detach(), 0.1)

    def on_epoch_start(self, model: Any, step: StepInfo) -> None:
        self.epochs.append(step.step)
        with torch.no_grad():  # from the global generator on purpose: it must resume as well
            self.average += 0.01 * torch.rand_like(self.average)

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average = state["average"]


def make_examples(users: int = 24, seed: int = 0) -> SequenceExamples:
    """Histories in which items follow each other in a circle, most of the time; of different lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, users)
    first = np.cumsum(lengths) - lengths
    start = np.repeat(rng.integers(0, ITEMS, users), lengths)
    step = np.arange(lengths.sum()) - np.repeat(first, lengths)
    noise = rng.integers(0, ITEMS, lengths.sum()) * (rng.random(lengths.sum()) < 0.1)
    return SequenceExamples(
        items=(start + step + noise) % ITEMS + 1,
        timestamps=None,
        users=np.arange(1, users + 1),
        first=first,
        start=first,
        end=first + lengths - 1,
        example_ids=np.arange(users),
        dense=True,
    )


def make_context() -> DataContext:
    return DataContext(ITEMS, 24, np.ones(ITEMS + 1, dtype=np.int64), np.zeros((2, 0), dtype=np.int64))


def make_stage(**options: Any) -> StageSpec:
    """3 epochs of 6 steps; checkpoints every 4 steps, so both at and inside epochs."""
    defaults = {
        "train": "encoder",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 1,
        "warmup_steps": 2,
    }
    return StageSpec(**{**defaults, **options})


def run_stage(
    folder: Path,
    *,
    model: Any = None,
    strategy: Any = None,
    stage: StageSpec | None = None,
    examples: Any = None,
    evaluate: Any = None,
    seed: int = 7,
    **options: Any,
) -> tuple[StageResult, Any, Any]:
    """(result, model, strategy) of a stage on the small data."""
    if model is None:
        torch.manual_seed(1)
        model = TinyEncoder()
    strategy = strategy or TinyStrategy()
    result = train_stage(
        model,
        strategy,
        make_examples() if examples is None else examples,
        SequenceCollator(),
        stage=stage or make_stage(),
        output_dir=folder,
        seed=seed,
        context=make_context(),
        evaluate=None if evaluate is None else lambda: evaluate(model),
        identity=options.pop("identity", IDENTITY),
        **options,
    )
    return result, model, strategy


def weights(model: Any, strategy: Any) -> dict[str, Tensor]:
    """Everything a run ends with."""
    return {**{n: t.detach().clone() for n, t in model.state_dict().items()}, "strategy": strategy.average.clone()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
