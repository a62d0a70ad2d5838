"""`LLMRecommender`: a language model, an item projector and a frozen sequence encoder as one recommender.

Five styles share this base. `item_slots` (E4SRec's shape, `llmrec.llm.item_slots`) reads one projected vector per
history item and scores the item table at every position. `text` and `hybrid` (LLaRA's shape, `llmrec.llm.prompted`)
write or score the title of the next item; hybrid prompts carry a projected vector behind each title. `item_codes`
(LC-Rec's shape, `llmrec.llm.item_codes`) reads and writes items as short codes of added tokens. `yes_no` (MLLM-MSR's
shape, `llmrec.llm.yes_no`) answers whether a user would like one item.

The encoder provides item vectors, gates for instance-wise tuners and, if asked for, states. It is frozen: it stays in
evaluation mode whatever `train()` says (dropout in it would be noise in the gates), and no gradient reaches it or the
item table. Base weights are never written; see `llmrec.llm.storing` for what a saved folder holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from llmrec.data.schema import Ranking
from llmrec.errors import DataError, RecipeError
from llmrec.llm.backbone import Backbone, GateArguments
from llmrec.llm.projector import ItemProjector, ProjectorKind, mean_token_norm

if TYPE_CHECKING:
    from llmrec.data.schema import SequenceBatch

Style = Literal["item_slots", "text", "hybrid", "item_codes", "yes_no"]
SlotContent = Literal["item", "state", "both", "score"]


@dataclass(frozen=True)
class RecommenderOptions:
    """How items enter and leave the language model.

    Args:
        style: "item_slots", "text", "hybrid", "item_codes" or "yes_no".
        max_history: The latest events shown.
        projector: "mlp" or "linear".
        slot_content: What an item's slot holds: the item-table row ("item"); in item_slots also the encoder's causal
            state at that position ("state") or both side by side ("both"); in hybrid also the row beside the score the
            encoder gives the item for this history ("score").
        instruction: Text in front of slots or codes; empty for none. Only item_slots and windows of item_codes.
        residual: Add the encoder's state to the output, whose layer then starts at zero: training starts exactly at
            the encoder's ranking and learns what the language model adds. Our design. Only item_slots.
        similarity: "dot" or "cosine" between output and item table; None follows the encoder with `residual`, else
            "dot". Only item_slots.
        item_bias: Add a learned bias per item. Only item_slots.
        learn_scale: Learn the factor scores are multiplied with. Only item_slots.
        user_slot: Prompts have a slot for the user; follows the renderer. Only hybrid.
        curriculum: Training starts with text-only prompts, hybrid ones become likelier (LLaRA). Only hybrid.
        length_normalise: Divide the log-likelihood of a title by its number of tokens. Only text and hybrid.
        max_new_tokens: Longest generated answer. Only text and hybrid.
        item_codes: Fingerprint of the item tokenizer. Only item_codes.
        level_sizes: Its codes per level. Only item_codes.
        tasks: Names of the tasks it trains on; empty for windows of codes. Only item_codes.
        beams: Width of the beam. Only item_codes.
    """

    style: Style = "item_slots"
    max_history: int = 50
    projector: ProjectorKind = "mlp"
    slot_content: SlotContent = "item"
    instruction: str = ""
    residual: bool = False
    similarity: Literal["dot", "cosine"] | None = None
    item_bias: bool = False
    learn_scale: bool = False
    user_slot: bool = False
    curriculum: bool = False
    length_normalise: bool = False
    max_new_tokens: int = 64
    item_codes: str | None = None
    level_sizes: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    beams: int = 20

    def __post_init__(self) -> None:
        for name, kind in (("style", Style), ("slot_content", SlotContent)):
            if getattr(self, name) not in get_args(kind):
                raise RecipeError(f"prompt.{name}: found {getattr(self, name)!r}, expected {', '.join(get_args(kind))}")
        if self.max_history < 1:
            raise RecipeError(f"max_history: found {self.max_history}, expected 1 or more")
        for name in ("level_sizes", "tasks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON knows lists only
        dense = ("residual", "similarity", "item_bias", "learn_scale")
        worded = ("length_normalise", "max_new_tokens")
        coded = ("item_codes", "level_sizes", "tasks", "beams")
        allowed = {"item_slots": ("instruction", *dense), "item_codes": ("instruction", *coded), "yes_no": ()}
        own = allowed.get(self.style, worded)
        self._refuse([name for name in ("instruction", *dense, *worded, *coded) if name not in own])
        contents = {"item_slots": ("item", "state", "both"), "hybrid": ("item", "score")}.get(self.style, ("item",))
        if self.slot_content not in contents:
            raise RecipeError(
                f"prompt.slot_content: found {self.slot_content}, expected {' or '.join(contents)} for {self.style}"
            )
        self._refuse(("user_slot", "curriculum") if self.style != "hybrid" else ())

    def _refuse(self, names: Sequence[str]) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        found = [name for name in names if getattr(self, name) != defaults[name]]
        if found:
            raise RecipeError(f"prompt: {', '.join(found)}: not an option of style {self.style}; leave it out")


class LLMRecommender(nn.Module, ABC):
    """Base of the styles; make one with `LLMRecommender.build`.

    Args:
        model: PeftModel (or plain causal language model, then frozen).
        item_table: [I+1, d_item] frozen item vectors, row 0 zero.
        options: See `RecommenderOptions`.
        encoder: Frozen provider of gates and states; any `SequenceEncoder`.
        tokenizer: The base model's tokenizer.

    Raises:
        RecipeError: A part is missing for these options.
    """

    item_table: Tensor

    def __init__(
        self,
        model: nn.Module,
        item_table: Tensor,
        options: RecommenderOptions,
        encoder: nn.Module | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.options, self.tokenizer = options, tokenizer
        self.backbone = Backbone(model)
        self.register_buffer("item_table", item_table.detach().clone().float())
        self.encoder: Any = None if encoder is None else encoder.requires_grad_(False).eval()
        if self.backbone.gate_kind is not None and encoder is None:
            raise RecipeError("the adapter reads gates, but no encoder was given; expected the gate provider")

    @classmethod
    def build(
        cls,
        model: nn.Module,
        *,
        encoder: nn.Module | None = None,
        item_table: Tensor | None = None,
        tokenizer: Any = None,
        renderer: Any = None,
        item_tokenizer: Any = None,
        titles: Sequence[str] | None = None,
        pictures: Any = None,
        **options: Any,
    ) -> LLMRecommender:
        """The recommender of a style.

        Args:
            model: PeftModel or plain causal language model.
            encoder: Frozen `SequenceEncoder`; needed for gates, states and, without `item_table`, item vectors.
            item_table: [I+1, d_item] instead of the encoder's `item_vectors()`.
            tokenizer: Needed for instruction, text and hybrid.
            renderer: Writes prompts (`PromptEncoder`); text and hybrid need it to recommend, not to train. For tasks of
                item_codes: `CodeTasks`; for yes_no: `PairEncoder`.
            item_tokenizer: Codes of the items; item_codes only.
            titles: Text of every item, for the first values of added tokens; item_codes only.
            pictures: Of the items, for yes_no questions that show them (`llmrec.llm.yes_no.Pictures`).
            **options: Fields of `RecommenderOptions`.

        Raises:
            RecipeError: Unknown or contradicting options, or a part is missing.
        """
        unknown = sorted(set(options) - {f.name for f in fields(RecommenderOptions)})
        if unknown:
            raise RecipeError(f"prompt: unknown option {', '.join(unknown)}")
        if "user" in getattr(getattr(renderer, "options", None), "slot_kinds", ()):
            options["user_slot"] = True
        if item_tokenizer is not None:
            options = {
                "item_codes": item_tokenizer.fingerprint, "level_sizes": tuple(item_tokenizer.level_sizes), **options
            }  # fmt: skip
        chosen = RecommenderOptions(**options)
        if chosen.style == "item_codes":
            from llmrec.llm.item_codes import ItemCodeRecommender

            if item_tokenizer is None:
                raise RecipeError("prompt.style item_codes: found no item tokenizer; expected the one it speaks")
            return ItemCodeRecommender(model, chosen, item_tokenizer, encoder, tokenizer, titles, renderer)
        if item_table is None and encoder is None and chosen.style in ("text", "yes_no") and renderer is not None:
            item_table = torch.zeros(len(renderer.titles), 0)  # prompts of titles alone hold no item vectors
        if item_table is None:
            if encoder is None:
                raise RecipeError("found neither an encoder nor an item table; expected item vectors for the slots")
            with torch.no_grad():
                item_table = encoder.item_vectors()  # type: ignore[operator]
        if chosen.style == "item_slots":
            from llmrec.llm.item_slots import ItemSlotRecommender

            return ItemSlotRecommender(model, item_table, chosen, encoder, tokenizer)
        if chosen.style == "yes_no":
            from llmrec.llm.yes_no import YesNoRecommender

            return YesNoRecommender(model, item_table, chosen, encoder, tokenizer, renderer, pictures)
        from llmrec.llm.prompted import PromptRecommender

        return PromptRecommender(model, item_table, chosen, encoder, tokenizer, renderer=renderer)

    # Parts ---------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The PeftModel (or plain model)."""
        return self.backbone.model

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_table) - 1

    @property
    def d_item(self) -> int:
        """Width of item vectors."""
        return int(self.item_table.shape[1])

    def train(self, mode: bool = True) -> Self:
        """Set training mode of everything but the frozen encoder."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def own_state(self) -> dict[str, Tensor]:
        """Tensors of this recommender outside base model, adapter, encoder and item table."""
        kept = ("backbone.", "encoder.", "item_table")
        return {name: value for name, value in self.state_dict().items() if not name.startswith(kept)}

    def _new_projector(self, d_in: int, vectors: Tensor | None) -> ItemProjector:
        projector = ItemProjector(d_in, self.backbone.width, self.options.projector)
        projector.to(self.item_table.device)
        if vectors is not None:
            projector.calibrate(vectors, mean_token_norm(self.backbone.embedding))
        return projector

    # Gates -----------------------------------------------------------------------------------------------------------

    def sequence_gates(self, batch: SequenceBatch) -> GateArguments:
        """One gate per sequence, for prompts with one answer: {"user_repr": [B, gate_dim]} or {"gates": [B, E]}."""
        kind = self.backbone.gate_kind
        if kind is None:
            return {}
        given = batch.get("user_repr")
        with torch.no_grad():
            if kind == "gates":
                value = self.encoder.gates(batch)
            else:
                value = self.encoder.user_representation(batch) if given is None else given
        return {kind: expect_dims(value, 2, "one gate per sequence, [B, width]")}

    # Recommending ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]]) -> SequenceBatch:
        """A batch for evaluation from rows of `SequenceExamples`."""

    @abstractmethod
    def score_candidates(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32 for `batch["candidates"]`, -inf at padding."""

    @abstractmethod
    def recommend(self, batch: SequenceBatch, k: int) -> Ranking:
        """The k best items per row; honours `seen` and `candidates`."""

    # Saving ----------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter, projector and identity of the frozen parts; see `llmrec.llm.storing`."""
        from llmrec.llm.storing import save_recommender

        save_recommender(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base_model: nn.Module | None = None,
        encoder: nn.Module | None = None,
        *,
        item_table: Tensor | None = None,
        tokenizer: Any = None,
        renderer: Any = None,
        titles: Sequence[str] | None = None,
        item_tokenizer: Any = None,
        pictures: Any = None,
        is_trainable: bool = False,
    ) -> LLMRecommender:
        """Load what `save_pretrained` wrote.

        Args:
            folder: The saved folder.
            base_model: The base model; loaded by its recorded id and revision when left out.
            encoder: The encoder it was trained with.
            item_table: [I+1, d_item] where the table did not come from the encoder.
            tokenizer: Instead of the saved one.
            renderer: Writes prompts; text and hybrid can recommend with it only.
            titles: Text of every item, index = item id: makes the renderer the recommender was saved with.
            item_tokenizer: The item tokenizer it was trained with; item_codes only.
            pictures: See `build`.
            is_trainable: Keep adapter and projector trainable.

        Raises:
            CheckpointError: The folder is damaged, or base model, encoder or item table are others.
        """
        from llmrec.llm.storing import load_recommender

        return load_recommender(
            Path(folder), base_model, encoder, item_table=item_table, tokenizer=tokenizer, renderer=renderer,
            titles=titles, item_tokenizer=item_tokenizer, pictures=pictures, is_trainable=is_trainable,
        )  # fmt: skip

    def restore(self, folder: str | Path) -> None:
        """Load saved adapter and projector weights into this recommender (resuming a run)."""
        from llmrec.llm.storing import restore_recommender

        restore_recommender(self, Path(folder))


def expect_dims(value: Tensor, dims: int, expected: str) -> Tensor:
    """The value itself, when it has that many dimensions.

    Raises:
        DataError: With its shape and what was expected.
    """
    if value.dim() != dims:
        raise DataError("gate inputs have the wrong shape", found=str(tuple(value.shape)), expected=expected)
    return value


def latest(rows: Sequence[dict[str, Any]], max_history: int) -> list[dict[str, Any]]:
    """Rows of `SequenceExamples` with their windows cut to the latest `max_history` events."""
    names = ("item_ids", "targets", "timestamps")
    return [{n: v[-max_history:] if n in names else v for n, v in row.items()} for row in rows]
