"""Base of sequence encoders: history of item ids -> states; one file of this folder per encoder.

An encoder file holds a config, a `SequenceEncoder` subclass with `forward`, a `PAPER` and one registration line
(`register(MyConfig, MyEncoder)`). Encoders compute representations, not losses: objectives live in
`llmrec.strategies`. By inheritance an encoder is a `GateProvider`, a `CatalogueScorer` and a `DenseScorer`.

Shapes: item_ids [B, L] right padded with 0, lengths [B] >= 1, hidden [B, L, d], scores [B, I+1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from llmrec.blocks.event_times import query_times
from llmrec.blocks.interleaving import POSITIVE, action_ids, interleave, item_places, known_actions, token_lengths
from llmrec.blocks.multi_hot import multi_hot, running_multi_hot
from llmrec.blocks.readout import gather_last, top_items
from llmrec.data.schema import Ranking
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from typing import Self

    from llmrec.data.schema import DataContext, SequenceBatch


class SequenceEncoderConfig(PreTrainedConfig):
    """Fields every encoder has; subclasses add their own as annotated class attributes with defaults.

    Args:
        num_items: I; set from the data set.
        num_users: U, for the few encoders with a user table; set from the data set.
        hidden_size: d, width of hidden states and item vectors.
        max_history: The longest input; longer histories keep their latest events.
        dropout: Dropout probability.
        similarity: "dot", or "cosine" (both sides L2-normalised).
        temperature: Scores are divided by it; leave at 1 for "dot".
        initializer_range: Standard deviation of normal initial weights.
        action_tokens: Add an action embedding and a head for `score_actions`; max_history then counts tokens, 2L for L
            events.
        dataset_fingerprint: Data set the encoder was trained on; set on saving.
    """

    model_type = "llmrec_encoder"

    num_items: int = 1
    num_users: int = 0
    hidden_size: int = 64
    max_history: int = 50
    dropout: float = 0.1
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float = 1.0
    initializer_range: float = 0.02
    action_tokens: bool = False
    dataset_fingerprint: str | None = None


@dataclass
class EncoderOutput(ModelOutput):
    """What `forward` returns.

    Args:
        hidden: [B, L, d], one state per position.
        user_repr: [B, d], the state after the last event.
        auxiliary: A scalar the encoder adds to whatever objective trains it, already weighted by its own options
            (a KL term, a consistency loss). Only while training; None otherwise.
        parts: Diagnostics, named scalars or tensors; scalars go to the training log.
    """

    hidden: Tensor = None  # type: ignore[assignment]  # ModelOutput wants defaults; every encoder gives both
    user_repr: Tensor = None  # type: ignore[assignment]
    auxiliary: Tensor | None = None
    parts: dict[str, Tensor] | None = None


class SequenceEncoder(PreTrainedModel, ABC):
    """Base class; subclasses define `forward` and, for a tied item table, an attribute `item_embedding`.

    Class attributes:
        uses: Batch fields the encoder cannot do without, such as {"timestamps"}; `Recipe.check_dataset` compares them
            with a data set. Where options decide, the class says so in `fields_read`, and an instance has its own set.
        optional: Batch fields it takes when they are there.
        causal: Whether state t depends on events <= t only.
        supervises: "all" positions can be supervised, or only the "last".
        trainable: False for counting baselines, which are complete after `from_context`.
        reads_item_features: Whether `from_context` looks at the context's feature levels.
    """

    config_class = SequenceEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "item_ids"
    _supports_sdpa = True

    uses: frozenset[str] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset()
    causal: ClassVar[bool] = True
    supervises: ClassVar[Literal["all", "last"]] = "all"
    trainable: ClassVar[bool] = True
    reads_item_features: ClassVar[bool] = False

    item_embedding: nn.Embedding

    def __init__(self, config: SequenceEncoderConfig) -> None:
        super().__init__(config)
        self.uses = self.fields_read(config)
        if config.action_tokens:
            self.action_embedding = nn.Embedding(POSITIVE + 1, config.hidden_size, padding_idx=0)
            self.action_head = nn.Linear(config.hidden_size, 1)

    @classmethod
    def fields_read(cls, config: SequenceEncoderConfig) -> frozenset[str]:
        """`uses` of an encoder with these options."""
        return cls.uses

    @classmethod
    def from_context(cls, config: SequenceEncoderConfig, context: DataContext) -> Self:
        """A fresh encoder for a data set; counts, graphs and levels it needs become persistent buffers."""
        return cls(config)

    @abstractmethod
    def forward(
        self, item_ids: Tensor, lengths: Tensor, *, item_embeds: Tensor | None = None, **features: Tensor
    ) -> EncoderOutput:
        """States of a batch.

        Args:
            item_ids: [B, L] right padded with 0.
            lengths: [B].
            item_embeds: [B, L, d] used instead of the item table (distilled or mixed inputs).
            **features: The batch fields named in `uses` and `optional`.
        """

    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, initializer_range) weights, zero biases, unit norms, zero padding row."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                nn.init.zeros_(bias)

    def inputs(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Arguments of `forward` taken from a batch.

        Raises:
            KeyError: The batch lacks a field of `uses`.
        """
        fields: dict[str, Any] = {"item_ids": batch["item_ids"], "lengths": batch["lengths"]}
        for name in sorted(self.uses):
            if name not in batch:
                raise KeyError(f"{type(self).__name__} needs batch[{name!r}]; the batch has {sorted(batch)}")
            fields[name] = batch[name]  # type: ignore[literal-required]
        fields.update({name: batch[name] for name in sorted(self.optional) if name in batch})  # type: ignore[literal-required]
        return fields

    @property
    def gate_dim(self) -> int:
        """Width of the vectors handed to a router."""
        return int(self.config.hidden_size)

    def encode(self, batch: SequenceBatch) -> EncoderOutput:
        """`forward` on the fields of a batch."""
        output: EncoderOutput = self(**self.inputs(batch))
        return output

    def user_representation(self, batch: SequenceBatch) -> Tensor:
        """[B, d]: the state after the last event."""
        return self.encode(batch).user_repr

    def position_representations(self, batch: SequenceBatch) -> Tensor:
        """[B, L, d], causal states.

        Raises:
            TypeError: The encoder is not causal, so its states would leak later events.
        """
        if not self.causal:
            raise TypeError(f"{type(self).__name__} is not causal: per-position gates would see later events")
        return self.encode(batch).hidden

    def represent(self, batch: SequenceBatch) -> Tensor:
        """[B, L, d] hidden states, ready for `score`."""
        return self.encode(batch).hidden

    def item_vectors(self) -> Tensor:
        """[I+1, d] table items are scored against; row 0 is zero."""
        weight = self.item_embedding.weight
        keep = torch.ones(len(weight), 1, dtype=weight.dtype, device=weight.device)
        keep[0] = 0
        return weight * keep

    def score(self, user_repr: Tensor, item_ids: Tensor | None = None) -> Tensor:
        """[..., d] -> [..., I+1]; with item_ids [..., C] or [C] -> [..., C]. Padding is not masked here."""
        if item_ids is None or item_ids.dim() == 1:
            table = self.item_vectors() if item_ids is None else self.item_embedding.weight[item_ids]
            if self.config.similarity == "cosine":
                user_repr, table = F.normalize(user_repr, dim=-1), F.normalize(table, dim=-1)
            return user_repr @ table.to(user_repr.dtype).T / self.config.temperature
        table = self.item_vectors()[item_ids].to(user_repr.dtype)  # [..., C, d]
        if self.config.similarity == "cosine":
            user_repr, table = F.normalize(user_repr, dim=-1), F.normalize(table, dim=-1)
        return (table * user_repr.unsqueeze(-2)).sum(-1) / self.config.temperature

    def score_items(self, batch: SequenceBatch) -> Tensor:
        """[B, I+1] float32, column 0 -inf; seen items are not masked here."""
        scores = self.score(self.user_representation(batch)).float()
        return scores.index_fill(1, torch.zeros(1, dtype=torch.long, device=scores.device), float("-inf"))

    def score_candidates(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32, -inf at padding candidates."""
        scores = self.score(self.user_representation(batch), batch["candidates"]).float()
        return scores.masked_fill(batch["candidates"] == 0, float("-inf"))

    def recommend(self, batch: SequenceBatch, k: int) -> Ranking:
        """The k best items per row; honours `seen` and `candidates`."""
        candidates = batch.get("candidates")
        scores = self.score_items(batch) if candidates is None else self.score_candidates(batch)
        return Ranking(*top_items(scores, k, seen=batch.get("seen"), candidates=candidates))

    def encode_actions(self, batch: SequenceBatch) -> EncoderOutput:
        """States at the items of the token sequence i1, a1, i2, ..., iL; see `llmrec.blocks.interleaving`.

        Args:
            batch: `labels` [B, L] are the actions; a row's last one is not read.

        Returns:
            `hidden` [B, L, d]: a causal state t has seen items 1..t and actions 1..t-1.

        Raises:
            RecipeError: The encoder was built without `action_tokens`.
        """
        if not self.config.action_tokens:
            raise RecipeError(f"{type(self).__name__} has no action tokens; set encoder.action_tokens: true")
        item_ids, lengths, labels = batch["item_ids"], batch["lengths"], batch["labels"]
        known = known_actions(lengths, item_ids.shape[1])
        tokens: SequenceBatch = {**batch, "lengths": token_lengths(lengths)}
        tokens["item_ids"] = interleave(item_ids, item_ids * known)
        if "timestamps" in batch:  # an action happens when its item is shown
            tokens["timestamps"] = interleave(batch["timestamps"], batch["timestamps"] * known)
            tokens["target_timestamps"] = gather_last(batch["timestamps"], lengths)
        actions = self.action_embedding(action_ids(labels, lengths))
        output: EncoderOutput = self(
            **self.inputs(tokens), item_embeds=interleave(self.item_embedding(item_ids), actions)
        )
        output.hidden = item_places(output.hidden)
        return output

    def score_actions(self, batch: SequenceBatch) -> Tensor:
        """[B, L] float32 logits that the action at each item is positive, its own label unseen."""
        hidden = self.encode_actions(batch).hidden
        return self.action_head(hidden).squeeze(-1).float()

    @staticmethod
    def last_state(hidden: Tensor, lengths: Tensor) -> Tensor:
        """[B, L, d], [B] -> [B, d]."""
        return gather_last(hidden, lengths)


class TimeAwareConfig(SequenceEncoderConfig):
    """Options of encoders that read when events happened.

    Args:
        time: What state i knows of time besides the times of events <= i. "target": the time of the event it predicts
            (the query time for the latest state), as HSTU and the FuXi encoders are published; "last": nothing more,
            so that models without times compete on equal terms; "none": no time channel, for data sets that have only
            an order.
    """

    time: Literal["target", "last", "none"] = "target"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.time not in ("target", "last", "none"):
            raise RecipeError(f"encoder.time: found {self.time!r}, expected target, last or none")


class TimeAware:
    """Mixin, before `SequenceEncoder`, of encoders with a `TimeAwareConfig`: asks for the fields its option needs."""

    config: TimeAwareConfig

    uses: frozenset[str]

    @classmethod
    def fields_read(cls, config: SequenceEncoderConfig) -> frozenset[str]:
        """The times the option asks for."""
        assert isinstance(config, TimeAwareConfig)
        needs = {"target": ("timestamps", "target_timestamps"), "last": ("timestamps",), "none": ()}
        return frozenset(needs[config.time])

    def query_times(
        self, lengths: Tensor, timestamps: Tensor | None, target_timestamps: Tensor | None
    ) -> Tensor | None:
        """[B, L] int64, the time each state is asked at (see `TimeAwareConfig.time`); None without a time channel."""
        if self.config.time == "none":
            return None
        if timestamps is None or (self.config.time == "target" and target_timestamps is None):
            raise KeyError(f"{type(self).__name__} with time: {self.config.time} needs {', '.join(sorted(self.uses))}")
        return query_times(timestamps, lengths, target_timestamps if self.config.time == "target" else None)


class MultiHotHistories:
    """Mixin, before `SequenceEncoder`, of models that hold only buffers and whose state is the multi-hot history."""

    optional: ClassVar[frozenset[str]] = frozenset({"seen"})
    trainable: ClassVar[bool] = False

    config: SequenceEncoderConfig

    def forward(
        self,
        item_ids: Tensor,
        lengths: Tensor,
        *,
        item_embeds: Tensor | None = None,
        seen: Tensor | None = None,
        **features: Tensor,
    ) -> EncoderOutput:
        """Multi-hot histories; `user_repr` reads `seen` where it is given."""
        hidden = running_multi_hot(item_ids, self.config.num_items)
        user_repr = multi_hot(item_ids if seen is None else seen, self.config.num_items)
        return EncoderOutput(hidden=hidden, user_repr=user_repr)

    @property
    def gate_dim(self) -> int:
        """I + 1, the width of a multi-hot history."""
        return self.config.num_items + 1

    @property
    def device(self) -> torch.device:
        """Where the buffers are; there are no parameters to ask."""
        return self._values.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self._values.dtype

    @property
    def _values(self) -> Tensor:
        buffers: Iterator[Tensor] = self.buffers()  # type: ignore[attr-defined]
        return next(buffer for buffer in buffers if buffer.is_floating_point())

    def user_representation(self, batch: SequenceBatch) -> Tensor:
        """[B, I+1], without the states of single positions, which are I times larger than the history."""
        return multi_hot(batch.get("seen", batch["item_ids"]), self.config.num_items)


def check_history(item_ids: Tensor, max_history: int) -> None:
    """Refuse a batch that is longer than an encoder's positions.

    Raises:
        DataError: With both lengths.
    """
    if item_ids.shape[1] > max_history:
        raise DataError(
            "the batch is longer than the encoder's positions",
            found=f"{item_ids.shape[1]} events",
            expected=f"at most max_history = {max_history}",
            remedy="keep the latest events, or train the encoder with a larger max_history",
        )


def check_same_catalogue(config: SequenceEncoderConfig, context: DataContext) -> None:
    """Refuse training events of another catalogue.

    Raises:
        DataError: With both sizes.
    """
    if context.num_items != config.num_items:
        raise DataError(
            "the training events belong to another catalogue",
            found=f"{context.num_items} items",
            expected=f"num_items = {config.num_items}",
        )


def register(config_class: type[SequenceEncoderConfig], encoder_class: type[SequenceEncoder]) -> None:
    """Make `AutoConfig` and `AutoModel` know an encoder; called once at the end of each encoder file."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, encoder_class, exist_ok=True)
