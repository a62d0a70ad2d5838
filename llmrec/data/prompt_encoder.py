"""History and candidates to one encoded prompt: render, tokenise, place slots, keep within the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmrec.data.prompt_tokens import PieceTokenizer
from llmrec.data.prompts import PromptTemplate, SlotPosition, SlotRef, render_next_item
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOT_KINDS = {"history": "history", "candidates": "candidate", "user": "user"}
IGNORED = -100


@dataclass(frozen=True)
class PromptOptions:
    """What a prompt shows and how long it may be.

    Args:
        template: Name or path of a prompt file.
        style: "text" (titles) or "hybrid" (a slot beside each title, filled by the model with the item's vector).
        variants: Phrasings in use: "all", one number or several.
        candidates: Length of the candidate list, target included; None asks an open question.
        slots: What has slots in hybrid style: "history", "candidates", "user".
        slot_position: An item's slot stands "after" its title (LLaRA) or "before" it (ours): the token behind the slot
            is then the first one of the title, which is what a model that picks by slot has to write.
        chat_template: Put the prompt in a user turn of the tokenizer's chat template.
        max_history: The latest so many items are shown.
        max_title_tokens: Longer titles are cut, in prompts and answers alike; None keeps them whole.
        max_length: Most tokens of prompt and answer together; the oldest history items give way. None has no limit.
        terminator: What ends an answer: "newline", "eos", or None for newline in plain prompts and eos in chats.
    """

    template: str
    style: Literal["text", "hybrid"] = "text"
    variants: Literal["all"] | int | Sequence[int] = "all"
    candidates: int | None = None
    slots: Sequence[str] = ("history", "candidates")
    slot_position: SlotPosition = "after"
    chat_template: bool = False
    max_history: int = 10
    max_title_tokens: int | None = None
    max_length: int | None = None
    terminator: Literal["newline", "eos"] | None = None

    def __post_init__(self) -> None:
        strange = [name for name in self.slots if name not in SLOT_KINDS]
        if strange:
            raise RecipeError(f"prompt.slots: found {', '.join(strange)}; expected a choice of {', '.join(SLOT_KINDS)}")
        for name, value, least in (
            ("candidates", self.candidates, 2),
            ("max_history", self.max_history, 1),
            ("max_title_tokens", self.max_title_tokens, 1),
            ("max_length", self.max_length, 1),
        ):
            if value is not None and value < least:
                raise RecipeError(f"prompt.{name} is {value}; expected at least {least}")
        for option, choice, known in (
            ("style", self.style, ("text", "hybrid")),
            ("slot_position", self.slot_position, ("after", "before")),
        ):
            if choice not in known:
                raise RecipeError(f"prompt.{option} is {choice!r}; expected {' or '.join(known)}")

    @property
    def slot_kinds(self) -> frozenset[str]:
        """Kinds of slots that become tokens; none in text style."""
        return frozenset(SLOT_KINDS[name] for name in self.slots) if self.style == "hybrid" else frozenset()

    def chosen_variants(self, template: PromptTemplate) -> tuple[int, ...]:
        """Numbers of the phrasings in use.

        Raises:
            RecipeError: The file has no such phrasing.
        """
        if self.variants == "all":
            return template.variants
        wanted = (self.variants,) if isinstance(self.variants, int) else tuple(int(v) for v in self.variants)
        unknown = [v for v in wanted if v not in template.variants]
        if unknown or not wanted:
            raise RecipeError(f"prompt.variants: found {wanted}; {template.path} has {template.variants}")
        return wanted


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, with or without its answer.

    Args:
        input_ids: [S] int64.
        token_labels: [S] int64, -100 outside the answer.
        item_slots: [S] int64, the item of each slot, `USER_SLOT` for the user, 0 for text.
        prompt_length: Tokens before the answer.
        dropped_items: History items left out to keep within `max_length`.
    """

    input_ids: np.ndarray
    token_labels: np.ndarray
    item_slots: np.ndarray
    prompt_length: int
    dropped_items: int


class PromptEncoder:
    """Encodes prompts of one template for one tokenizer.

    Text is always cut right behind an item, and where slots stand in front of titles there too, in every style. So the
    text of a hybrid prompt has the same tokens as the prompt without slots (LLaRA's text mode), and a title ends in the
    same tokens whether a comma, a line end or the answer's terminator follows.

    Args:
        titles: Text of every item, index = item id.
        options: See `PromptOptions`.
        tokenizer: Any tokenizer of transformers.
        template: The loaded template, if the caller has it already.
    """

    def __init__(
        self,
        titles: Sequence[str],
        options: PromptOptions,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | None = None,
    ) -> None:
        self.options = options
        self.template = template or PromptTemplate.load(options.template)
        self.variants = options.chosen_variants(self.template)
        terminator = options.terminator or ("eos" if options.chat_template else "newline")
        self.pieces = PieceTokenizer(tokenizer, options.chat_template, terminator)
        self.titles = list(titles)
        self._answer_room = 0
        if options.max_title_tokens is not None:
            self.titles = _cut_titles(self.titles, self.pieces, options.max_title_tokens)
        if options.max_length is not None:
            longest = max((len(ids) for ids in self.pieces.answers(self.titles[1:])), default=0)
            self._answer_room = longest + len(self.pieces.terminator)

    def encode(
        self,
        history: Sequence[int],
        candidates: Sequence[int] = (),
        *,
        variant: int | None = None,
        answer: int | None = None,
        hybrid: bool = True,
    ) -> EncodedPrompt:
        """One prompt, and the title of `answer` behind it.

        Args:
            history: Item ids, oldest first; the latest `max_history` are shown.
            candidates: Item ids in the order they are shown; zeros (padding) are left out. Options that ask an open
                question (`candidates` None) show none.
            variant: Number of the phrasing; the first in use by default.
            answer: Item whose title is the answer, or None for the prompt alone.
            hybrid: False leaves all slots out.

        Raises:
            DataError: Even with one history item the prompt is longer than `max_length` allows.
        """
        variant = self.variants[0] if variant is None else variant
        history = [int(item) for item in history][-self.options.max_history :]
        shown = [int(item) for item in candidates if item] if self.options.candidates is not None else []
        kinds: frozenset[str] = self.options.slot_kinds if hybrid else frozenset()
        ids, slots, dropped = self._fit(history, shown, variant, kinds)
        labels = [IGNORED] * len(ids)
        prompt_length = len(ids)
        if answer is not None:
            answer_ids = self.answer_ids(answer)
            ids, labels, slots = ids + answer_ids, labels + answer_ids, slots + [0] * len(answer_ids)
        return EncodedPrompt(
            input_ids=np.array(ids, dtype=np.int64),
            token_labels=np.array(labels, dtype=np.int64),
            item_slots=np.array(slots, dtype=np.int64),
            prompt_length=prompt_length,
            dropped_items=dropped,
        )

    def answer_ids(self, item: int) -> list[int]:
        """Title and terminator of an item, as they follow a prompt."""
        return self.pieces.answers([self.titles[item]])[0] + self.pieces.terminator

    def segments(
        self, history: Sequence[int], candidates: Sequence[int], variant: int, user_slot: bool
    ) -> list[str | SlotRef]:
        """Text pieces and slots of a prompt before tokenisation."""
        past, offered = ([(int(item), self.titles[int(item)]) for item in items] for items in (history, candidates))
        position = self.options.slot_position
        return render_next_item(self.template, variant, past, offered, user_slot=user_slot, slot_position=position)

    def _fit(
        self, history: list[int], candidates: list[int], variant: int, kinds: frozenset[str]
    ) -> tuple[list[int], list[int], int]:
        """The prompt with as many of the latest items as fit: its length grows with each item, so bisection works."""
        ids, slots = self._tokens(history, candidates, variant, kinds)
        if self.options.max_length is None:
            return ids, slots, 0
        room = self.options.max_length - self._answer_room
        if len(ids) <= room:
            return ids, slots, 0
        fits, too_many = 0, len(history)
        best: tuple[list[int], list[int]] | None = None
        while too_many - fits > 1:
            kept = (fits + too_many) // 2
            trial = self._tokens(history[-kept:], candidates, variant, kinds)
            if len(trial[0]) <= room:
                fits, best = kept, trial
            else:
                too_many = kept
        if best is None:
            shortest = len(self._tokens(history[-1:], candidates, variant, kinds)[0])
            raise DataError(
                "a prompt with a single history item does not fit",
                found=f"{shortest} tokens, and {self._answer_room} kept for the answer",
                expected=f"at most prompt.max_length = {self.options.max_length}",
                remedy="raise prompt.max_length, or lower prompt.candidates or prompt.max_title_tokens",
            )
        return *best, len(history) - fits

    def _tokens(
        self, history: list[int], candidates: list[int], variant: int, kinds: frozenset[str]
    ) -> tuple[list[int], list[int]]:
        segments = self.segments(history, candidates, variant, "user" in self.options.slots)
        encoded = iter(self.pieces.prompt_pieces([part for part in segments if isinstance(part, str)]))
        ids, slots = list(self.pieces.head), [0] * len(self.pieces.head)
        for part in segments:
            if isinstance(part, str):
                piece = next(encoded)
                ids += piece
                slots += [0] * len(piece)
            elif part.kind in kinds:
                ids.append(self.pieces.filler)
                slots.append(part.item_id)
        return ids + self.pieces.tail, slots + [0] * len(self.pieces.tail)


def _cut_titles(titles: list[str], pieces: PieceTokenizer, limit: int) -> list[str]:
    """Titles cut to at most `limit` tokens as answers; the longest head of the title that fits."""
    cut = list(titles)
    for item, ids in enumerate(pieces.answers(titles)):
        if len(ids) <= limit or not titles[item]:
            continue
        fits, too_long = 1, len(titles[item])
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(pieces.answers([titles[item][:middle]])[0]) <= limit:
                fits = middle
            else:
                too_long = middle
        cut[item] = titles[item][:fits].rstrip()
    return cut
