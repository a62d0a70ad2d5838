"""Base of summarizers: items and users -> texts written by a (multimodal) LLM. One file per summarizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset


class Summarizer(ABC):
    """Base class; a summarizer is a dataclass whose fields are its options."""

    @abstractmethod
    def items(self, dataset: InteractionDataset) -> dict[int, str]:
        """A text per item id."""

    @abstractmethod
    def update(self, previous: list[str], events: list[list[str]]) -> list[str]:
        """New user summaries [B] from the previous ones [B] ("" at first) and the texts of new events, oldest first."""
