"""Base of continuous series models (activity curves that transforms steer). They do not recommend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SeriesModelConfig(PreTrainedConfig):
    """Fields every series model has: T steps of F values."""

    model_type = "llmrec_series"

    num_steps: int = 24
    num_features: int = 1


class SeriesModel(PreTrainedModel, ABC):
    """Base class of series models."""

    config_class = SeriesModelConfig
    base_model_prefix = "series"

    @abstractmethod
    def loss(self, series: Tensor, condition: Tensor | None, generator: torch.Generator) -> Tensor:
        """Scalar training loss of series [B, T, F] under a condition [B, c]."""

    @abstractmethod
    def sample(
        self,
        condition: Tensor | None,
        control: Callable[[Tensor, int], Tensor] | None,
        generator: torch.Generator,
        *,
        batch_size: int = 1,
    ) -> Tensor:
        """Series [B, T, F]; `control(estimate, step)` may shift the estimate at each sampling step."""
