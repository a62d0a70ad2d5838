"""Base of generative heads: models that write the next item (its code, its vector, a trajectory).

One file of this folder per head: a config, a `GenerativeHead` subclass, a `PAPER` and one `register` line.
A head owns its objective; a `Recommender` by contract, and a gate provider or scorer where it can be one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmrec.data.schema import DataContext, Ranking, SequenceBatch
    from llmrec.item_tokenizers.base import ItemTokenizer


class GenerativeHeadConfig(PreTrainedConfig):
    """Fields every head has.

    Args:
        num_items: I; set from the data set.
        max_history: The longest input history in items.
        dataset_fingerprint: Data set it was trained on; set on saving.
        item_index_fingerprint: Fingerprint of the item tokenizer whose codes it speaks, if any.
    """

    model_type = "llmrec_head"

    num_items: int = 1
    max_history: int = 20
    dataset_fingerprint: str | None = None
    item_index_fingerprint: str | None = None


@dataclass
class HeadOutput(ModelOutput):
    """What `forward` returns: a scalar loss, its named parts and, where there is one, the user state [B, d]."""

    loss: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    user_repr: Tensor | None = None


class GenerativeHead(PreTrainedModel, ABC):
    """Base class of heads.

    Class attributes:
        uses: Batch fields the head cannot do without.
        needs_tokenizer: Whether `from_context` must be given an item tokenizer.
    """

    config_class = GenerativeHeadConfig
    base_model_prefix = "head"
    main_input_name = "item_ids"

    uses: ClassVar[frozenset[str]] = frozenset()
    needs_tokenizer: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_context(
        cls, config: GenerativeHeadConfig, context: DataContext, tokenizer: ItemTokenizer | None = None
    ) -> GenerativeHead:
        """A fresh head for a data set (and an item tokenizer, for heads that emit codes)."""

    @abstractmethod
    def forward(self, batch: SequenceBatch) -> HeadOutput:
        """Training loss of a batch; `targets` or `trajectory` hold what comes next."""

    @abstractmethod
    def recommend(
        self,
        batch: SequenceBatch,
        k: int,
        *,
        beams: int | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Ranking:
        """The k best items; `beams` for code decoders, `steps` and `generator` for samplers."""


def register(config_class: type[GenerativeHeadConfig], head_class: type[GenerativeHead]) -> None:
    """Make `AutoConfig` and `AutoModel` know a head."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, head_class, exist_ok=True)
