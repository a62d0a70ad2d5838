"""Base of training strategies: the objective of one stage. One file of this folder per strategy.

A strategy is a dataclass whose fields are its options in a recipe (`strategy: {type: next_item, loss: bce}`).
It may keep pools, levels or averaged copies; what `state_dict` returns is stored in every checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from llmrec.data.schema import DataContext, SequenceBatch


@dataclass(frozen=True)
class TrainContext:
    """What a strategy may look at before training.

    Args:
        data: Training part of the data set.
        num_examples: Examples of one epoch.
        total_steps: Optimizer steps of the stage.
        seed: Seed of the stage.
    """

    data: DataContext
    num_examples: int
    total_steps: int
    seed: int


@dataclass(frozen=True)
class StepInfo:
    """Where training stands.

    Args:
        step: Optimizer steps done so far (global, survives a resume).
        total_steps: Optimizer steps of the stage.
        epoch: Epochs done, fractional.
        generator: Source of randomness of this step; a resumed run draws the same numbers.
    """

    step: int
    total_steps: int
    epoch: float
    generator: torch.Generator


@dataclass
class StepLoss:
    """Loss of one batch.

    Args:
        total: Scalar to minimise: the mean over `count` supervised places.
        parts: Named scalars for the log.
        count: Number of supervised places the mean was taken over.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    count: int = 1


class TrainingStrategy(ABC):
    """The objective of one stage; wraps any encoder, head or LLM recommender.

    Class attribute `uses`: batch fields the objective needs besides items and targets, such as {"labels"}.
    """

    uses: ClassVar[frozenset[str]] = frozenset()

    def prepare(self, context: TrainContext, model: nn.Module, generator: torch.Generator) -> None:  # noqa: B027
        """Called once before the first step: build pools, levels, teachers. The default does nothing."""

    @abstractmethod
    def loss(self, model: Any, batch: SequenceBatch, step: StepInfo) -> StepLoss:
        """Loss of a batch; called inside the module that is wrapped for distributed training."""

    def on_step_end(self, model: nn.Module, step: StepInfo) -> None:  # noqa: B027
        """Called after each optimizer step."""

    def on_epoch_start(self, model: nn.Module, step: StepInfo) -> None:  # noqa: B027
        """Called before each epoch."""

    def sampler(self, epoch: int) -> np.ndarray | None:
        """Order of example positions for an epoch, or None for a seeded shuffle."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors a resumed run needs; the default strategy has none."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: There is state to restore and the strategy does not know it.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, the checkpoint holds {sorted(state)}")
