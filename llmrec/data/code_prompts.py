"""Prompts in words and item codes: the options of a mix of tasks, and the token ids of prompts and answers.

Code c of level h is the token `code_base + offset[h] + c`, where `code_base` is the number of rows of the base model's
token embedding and `offset[h]` the sum of the sizes of the levels before h. A tokenizer gives only ids below it, and
items are placed as ids (`llmrec.data.code_phrasings`), so no text can turn into a code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from llmrec.data.code_phrasings import FOLDER, TASKS, Frame, Task, chosen_phrasings, read_frame
from llmrec.data.prompt_encoder import IGNORED
from llmrec.data.prompt_tokens import PieceTokenizer
from llmrec.data.prompts import PromptTemplate, plain_text
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKING = "history_to_item"
"""The task a trained model is asked with."""

DEFAULT_MIX = {"history_to_item": 1.0, "title_to_item": 0.25, "item_to_title": 0.25, "history_to_title": 0.25}
"""Ours; LC-Rec runs whole data sets of tasks and shortens one of them."""


@dataclass(frozen=True)
class CodeTaskOptions:
    """Which tasks, in which mix, and how long prompts may be.

    Args:
        tasks: Name of a prompt file of `prompts/item_codes/` -> its share of the mix, in any unit.
        max_history: The latest so many items are shown.
        max_title_tokens: Longer titles are cut, in prompts and answers alike; None keeps them whole.
        max_length: Most tokens of prompt and answer together; the oldest history items give way, answers stay whole.
        variants: Phrasings in use: "all", or the number of one.
        chat_template: Put prompts in a user turn of the tokenizer's chat template.

    Raises:
        RecipeError: An unknown task, a share that is no positive number, or a size below 1.
    """

    tasks: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    max_history: int = 20
    max_title_tokens: int | None = 32
    max_length: int | None = None
    variants: Literal["all"] | int = "all"
    chat_template: bool = False

    def __post_init__(self) -> None:
        known = ", ".join(TASKS)
        if not isinstance(self.tasks, Mapping) or not self.tasks:
            raise RecipeError(f"prompt.tasks: found {self.tasks!r}; expected a share for each of some of {known}")
        for name, share in self.tasks.items():
            if name not in TASKS:
                raise RecipeError(f"prompt.tasks: found {name!r}; expected some of {known}")
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
                raise RecipeError(
                    f"prompt.tasks.{name}: found {share!r}; expected a share above 0 (leave out a task without one)"
                )
        sizes = ("max_history", "max_title_tokens", "max_length", "variants")
        for name, value in ((name, getattr(self, name)) for name in sizes):
            if value is None and name in ("max_title_tokens", "max_length") or name == "variants" and value == "all":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"prompt.{name}: found {value!r}; expected a whole number of at least 1")


@dataclass(frozen=True)
class CodePrompt:
    """One prompt, with or without its answer.

    Args:
        input_ids: [S] int64.
        labels: [S] int64, -100 outside the answer.
        prompt_length: Tokens before the answer.
        dropped_items: History items left out to keep within `max_length`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    prompt_length: int
    dropped_items: int


class TaskSizes(NamedTuple):
    """Token counts of a task, from which the length of any of its prompts is a sum.

    Args:
        frame: [V] everything of each phrasing but items and what stands between them.
        separator: [V] tokens between two items.
        shown: [I+1] tokens of an item in the prompt, 0 where it cannot be shown.
        answer: [I+1] tokens of an item as the answer, terminator included.
    """

    frame: np.ndarray
    separator: np.ndarray
    shown: np.ndarray
    answer: np.ndarray


class _Rows(NamedTuple):
    """Token ids of all items, one row after the other."""

    flat: np.ndarray
    starts: np.ndarray

    def of(self, item: int) -> np.ndarray:
        """Ids of one item."""
        return self.flat[self.starts[item] : self.starts[item + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[I+1] int64."""
        return np.diff(self.starts)


class CodeAsker:
    """Asks in words and codes: prompts and answers of all tasks, for one tokenizer and one catalogue; needs no events.

    Args:
        codes: [I+1, M] codes of the items; row 0 is padding and never read.
        level_sizes: M numbers of codes.
        code_base: First id behind the base model's vocabulary.
        tokenizer: Any tokenizer of transformers.
        options: See `CodeTaskOptions`.
        titles: Text of every item, index = item id, empty where there is none. None: no title is known, which is
            enough for asking.

    Attributes:
        has_title: [I+1] bool.

    Raises:
        RecipeError: The tokenizer has ids of `code_base` and above, or no end-of-sequence token; a phrasing does not
            exist; `max_length` has no room for a single item and its answer.
        DataError: Codes, level sizes and titles do not belong together.
    """

    def __init__(
        self,
        codes: np.ndarray,
        level_sizes: Sequence[int],
        code_base: int,
        tokenizer: PreTrainedTokenizerBase,
        options: CodeTaskOptions,
        titles: Sequence[str] | None = None,
    ) -> None:
        self.options, self.code_base = options, int(code_base)
        highest = max(tokenizer.get_vocab().values())
        if highest >= self.code_base:
            raise RecipeError(f"code_base is {self.code_base}, but the tokenizer has ids up to {highest}")
        self._tokens = self.code_base + _checked_codes(codes, level_sizes)
        self.pieces = PieceTokenizer(tokenizer, options.chat_template, "eos")
        self._end = np.array(self.pieces.terminator, dtype=np.int64)
        names = dict.fromkeys([ASKING, *options.tasks])
        templates = {name: PromptTemplate.load(f"{FOLDER}/{name}") for name in names}
        self._variants = {name: chosen_phrasings(template, options.variants) for name, template in templates.items()}
        self._frames = {
            name: [read_frame(template, variant, TASKS[name], self.pieces) for variant in self._variants[name]]
            for name, template in templates.items()
        }
        self._read_titles([""] * len(self._tokens) if titles is None else [plain_text(title) for title in titles])
        if options.max_length is not None:
            for name in names:
                self._check_room(name, options.max_length)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self._tokens) - 1

    def variants(self, task: str) -> tuple[int, ...]:
        """Numbers of a task's phrasings in use."""
        return self._variants[task]

    def encode_history(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """[S] int64: the prompt that asks for the item after a history, first phrasing in use, without its answer.

        Args:
            history: Item ids, oldest first; the latest `max_history` are shown.
        """
        return self.encode(ASKING, history).input_ids

    def encode(
        self, task: str, items: Sequence[int] | np.ndarray, answer: int | None = None, *, phrasing: int = 0
    ) -> CodePrompt:
        """One prompt and its answer.

        Args:
            task: One of the options' tasks, or `ASKING`.
            items: What is shown: a history, oldest first, or a single item. Items without a title are left out of
                histories of titles.
            answer: The item that is the answer; None for the prompt alone, with room kept for the longest answer.
            phrasing: Place in `variants(task)`.

        Raises:
            DataError: An item is not in the catalogue or lacks the title it needs, or nothing is left to show.
        """
        kind, frame = TASKS[task], self._frames[task][phrasing]
        shown = np.asarray(items, dtype=np.int64)[-self.options.max_history :]
        self._check_items(shown if answer is None else np.append(shown, answer))
        if kind.shows == "titles":
            shown = shown[self.has_title[shown]]
        response = None if answer is None else self.answer_ids(task, answer)
        sizes = self.sizes(task)
        kept = len(shown)
        if self.options.max_length is not None:
            room = self.options.max_length - (int(sizes.answer.max()) if response is None else len(response))
            latest = np.cumsum(sizes.shown[shown][::-1] + sizes.separator[phrasing]) - sizes.separator[phrasing]
            kept = int((latest + sizes.frame[phrasing] <= room).sum())
        if not kept:
            raise DataError(f"a prompt of task {task} has nothing to show", found=f"items {list(items)[:8]}")
        ids = self._joined(kind, frame, shown[len(shown) - kept :])
        whole = ids if response is None else np.concatenate([ids, response])
        labels = whole.copy()
        labels[: len(ids)] = IGNORED
        return CodePrompt(whole, labels, len(ids), len(shown) - kept)

    def answer_ids(self, task: str, item: int) -> np.ndarray:
        """[n] int64: an item as the answer of a task, the terminator at its end; M + 1 ids where codes are asked for.

        Raises:
            DataError: The task asks for a title and the item has none.
        """
        if TASKS[task].answers == "codes":
            return np.concatenate([self._tokens[item], self._end])
        if not self.has_title[item]:
            raise DataError(f"item {item} has no title, which task {task} asks for")
        return np.concatenate([self._answers.of(item), self._end])

    def sizes(self, task: str) -> TaskSizes:
        """Token counts of a task."""
        kind, frames = TASKS[task], self._frames[task]
        depth = np.full(len(self._tokens), self._tokens.shape[1], dtype=np.int64)
        return TaskSizes(
            frame=np.array([len(frame.before) + len(frame.after) for frame in frames], dtype=np.int64),
            separator=np.array([len(frame.separator) for frame in frames], dtype=np.int64),
            shown=depth if kind.shows == "codes" else self._titles.lengths,
            answer=(depth if kind.answers == "codes" else self._answers.lengths) + len(self._end),
        )

    def _joined(self, kind: Task, frame: Frame, items: np.ndarray) -> np.ndarray:
        parts = [frame.before]
        for item in items.tolist():
            parts += [self._tokens[item] if kind.shows == "codes" else self._titles.of(item), frame.separator]
        return np.concatenate([*parts[:-1], frame.after])

    def _read_titles(self, titles: list[str]) -> None:
        """Tokens of all titles as they stand in prompts and behind them; a chat may want another lead there."""
        if len(titles) != len(self._tokens):
            raise DataError("one title per item is needed", found=len(titles), expected=f"{len(self._tokens)} (I + 1)")
        known = [item for item, title in enumerate(titles) if title and item]
        texts = [titles[item] for item in known]
        # The empty piece takes the place of the start of a prompt; what follows it continues one.
        inside = self.pieces.prompt_pieces(["", *(f" {text}" for text in texts)])[1:]
        self._titles = self._rows(known, inside)
        self._answers = self._rows(known, self.pieces.answers(texts)) if self.options.chat_template else self._titles
        self.has_title = (self._titles.lengths > 0) & (self._answers.lengths > 0)

    def _rows(self, items: list[int], ids: list[list[int]]) -> _Rows:
        limit = self.options.max_title_tokens
        if limit is not None:
            ids = [row if len(row) <= limit else self._cut(row, limit) for row in ids]
        lengths = np.zeros(len(self._tokens), dtype=np.int64)
        lengths[items] = [len(row) for row in ids]
        flat = np.fromiter((token for row in ids for token in row), dtype=np.int64, count=int(lengths.sum()))
        return _Rows(flat, np.concatenate([[0], np.cumsum(lengths)]))

    def _cut(self, ids: list[int], limit: int) -> list[int]:
        """The first tokens of a title, without the head of a character whose end is cut off."""
        kept = ids[:limit]
        while kept and str(self.pieces.tokenizer.decode(kept)).endswith("\ufffd"):
            kept.pop()
        return kept or ids[:limit]

    def _check_items(self, items: np.ndarray) -> None:
        if len(items) and (items.min() < 1 or items.max() > self.num_items):
            strange = items[(items < 1) | (items > self.num_items)]
            raise DataError("items without codes", found=strange[:8].tolist(), expected=f"ids 1..{self.num_items}")

    def _check_room(self, task: str, limit: int) -> None:
        sizes = self.sizes(task)
        needed = int(sizes.frame.max() + sizes.shown.max() + sizes.answer.max())
        if needed > limit:
            raise RecipeError(
                f"prompt.max_length is {limit}; task {task} needs {needed} tokens for a single item and its answer: "
                "raise prompt.max_length, or lower prompt.max_title_tokens"
            )


def _checked_codes(codes: np.ndarray, level_sizes: Sequence[int]) -> np.ndarray:
    """Codes [I+1, M] int64 with the offsets of their levels added."""
    table, sizes = np.array(codes, dtype=np.int64), np.array(list(level_sizes), dtype=np.int64)
    if table.ndim != 2 or not table.shape[1] or table.shape[1] != len(sizes):
        raise DataError("codes and level sizes disagree", found=f"codes {table.shape}, {len(sizes)} level sizes")
    if np.any(table[1:] < 0) or np.any(table[1:] >= sizes):
        raise DataError(
            "codes outside their levels",
            found=f"up to {table[1:].max(0).tolist()}, from {table[1:].min(0).tolist()}",
            expected=f"0 to below {sizes.tolist()}",
        )
    table[0] = 0
    return table + np.concatenate([[0], np.cumsum(sizes)[:-1]])
