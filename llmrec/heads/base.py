"""Base of generative heads: models that write the next item (its code, its vector, a trajectory).

One file of this folder per head: a config, a `GenerativeHead` subclass, a `PAPER` and one `register` line.
A head owns its objective; a `Recommender` by contract, and a gate provider or scorer where it can be one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from llmrec.blocks.trie import PrefixTrie
from llmrec.errors import CheckpointError, RecipeError
from llmrec.item_tokenizers.base import code_fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """What `forward` returns.

    Args:
        loss: Scalar, the mean over `count` supervised places.
        parts: Named scalars for the log.
        user_repr: The user state [B, d], where there is one.
        count: Supervised places of the batch; None counts as one.
    """

    loss: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    user_repr: Tensor | None = None
    count: int | None = None


class GenerativeHead(PreTrainedModel, ABC):
    """Base class of heads.

    Class attributes:
        uses: Batch fields the head cannot do without.
        needs_tokenizer: Whether `from_context` must be given an item tokenizer.
        reads_item_features: Whether `from_context` looks at the context's feature levels.
        supervises: "last": one target after each history; "all": windows with a target after every item.
    """

    config_class = GenerativeHeadConfig
    base_model_prefix = "head"
    main_input_name = "item_ids"

    uses: ClassVar[frozenset[str]] = frozenset()
    needs_tokenizer: ClassVar[bool] = False
    reads_item_features: ClassVar[bool] = False
    supervises: ClassVar[str] = "last"

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


class CodeHeadConfig(GenerativeHeadConfig):
    """Fields of heads that write item codes: `level_sizes`, codes per level; set from the item tokenizer."""

    model_type = "llmrec_code_head"

    level_sizes: list[int] | None = None


class CodeHead(GenerativeHead):
    """Base, named before `GenerativeHead`, of heads that write item codes.

    Buffers: `codes` [I+1, M], those of the item tokenizer; `popularity` [I+1], which orders items that share a code.
    """

    needs_tokenizer: ClassVar[bool] = True

    config: CodeHeadConfig
    codes: Tensor
    popularity: Tensor

    def __init__(self, config: CodeHeadConfig) -> None:
        super().__init__(config)
        rows = config.num_items + 1
        self.register_buffer("codes", torch.full((rows, len(config.level_sizes or [1])), -1))
        self.register_buffer("popularity", torch.zeros(rows))
        self._trie: PrefixTrie | None = None

    def take_codes(self, tokenizer: ItemTokenizer, context: DataContext) -> None:
        """Fill the buffers of a fresh head."""
        self.codes.copy_(tokenizer.codes)
        self.popularity.copy_(torch.from_numpy(context.train_counts))

    @property
    def trie(self) -> PrefixTrie:
        """The catalogue as a trie, on the head's device."""
        if self._trie is None or self._trie.code.device != self.codes.device:
            trie = PrefixTrie.build(self.codes.cpu(), tuple(self.config.level_sizes or ()), self.popularity.cpu())
            self._trie = trie.to(self.codes.device)
        return self._trie


def check_codes(config: GenerativeHeadConfig, tokenizer: ItemTokenizer | None) -> ItemTokenizer:
    """The tokenizer of a fresh head, whose fingerprint is noted in the config.

    Raises:
        RecipeError: There is none, or it codes another catalogue.
    """
    if tokenizer is None:
        raise RecipeError(f"head {config.model_type!r} writes item codes; add an `item_tokenizer` section")
    if len(tokenizer.codes) != config.num_items + 1:
        raise RecipeError(
            f"item_tokenizer: found codes of {len(tokenizer.codes) - 1:,} items, the data set has {config.num_items:,}"
        )
    config.item_index_fingerprint = tokenizer.fingerprint
    return tokenizer


def verify_codes(place: str, config: GenerativeHeadConfig, codes: Tensor, level_sizes: Sequence[int]) -> None:
    """Refuse codes other than those a model was trained to write.

    Args:
        place: Whose codes they are, for the message.
        config: Of the model.
        codes: [I+1, M] codes at hand.
        level_sizes: Their level sizes.

    Raises:
        CheckpointError: Naming both hashes.
    """
    found = code_fingerprint(codes, level_sizes)
    if found != config.item_index_fingerprint:
        raise CheckpointError(
            f"{place}: item codes {found}, the model was trained on the item codes {config.item_index_fingerprint}; "
            "its codes would mean other items. Use the item tokenizer it was trained with"
        )


def register(config_class: type[GenerativeHeadConfig], head_class: type[GenerativeHead]) -> None:
    """Make `AutoConfig` and `AutoModel` know a head."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, head_class, exist_ok=True)
