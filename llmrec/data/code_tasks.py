"""Training tasks for language models that speak item codes: next items, and titles and codes in both directions.

The tasks are the first three groups of LC-Rec (arXiv 2311.09049): a history to its next item, an item's title to its
code and back, and histories that mix the two. LC-Rec's remaining tasks need texts written by another model and are left
out. As there, an answer's tokens and the end-of-sequence token behind them are all that carries loss, and a phrasing
is drawn per example and epoch. Ours are the wordings, their number, the code ids behind the vocabulary
(`llmrec.data.code_prompts`) and the mix: an epoch shows every training history once, in one of the history tasks, and
as many catalogue examples as their shares ask for (LC-Rec runs every task over all its data, one of them cut down).

Everything random is keyed by (seed, example, epoch): task, phrasing and item of an example do not depend on workers, on
the order of access, on the subset it stands in or on a resumed run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmrec.data.code_phrasings import TASKS
from llmrec.data.code_prompts import ASKING, CodeAsker, CodePrompt, CodeTaskOptions
from llmrec.data.item_text import title_texts
from llmrec.data.prompt_encoder import IGNORED
from llmrec.data.prompt_tokens import filler_id
from llmrec.data.schema import TITLE
from llmrec.data.sequences import SequenceExamples, pad_right
from llmrec.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.schema import SequenceBatch

__all__ = ["ASKING", "TASKS", "CodeAsker", "CodePrompt", "CodeTaskCollator", "CodeTaskOptions", "CodeTasks"]

_TASK, _PHRASING, _ITEM = 0, 1, 2


class _Plan(NamedTuple):
    """What each example is in one epoch; [n] each: place in `CodeTasks.tasks`, place of the phrasing, answer's item."""

    task: np.ndarray
    phrasing: np.ndarray
    item: np.ndarray


class CodeTasks:
    """Prompts and answers of a mix of tasks; a map-style data set whose memory is O(events).

    Each training history gives one example an epoch, whose task is drawn among the history tasks by their shares.
    Catalogue tasks have as many examples as their share beside that of the history tasks asks for (without a history
    task: the one with the largest share has one per item); they run through the items in a new order each time, so no
    item comes twice before every other came once. Where titles are missing, histories take a task that needs none, so
    the mix holds the shares only as far as titles do; a history that suits no task is left out.

    A row has `input_ids` and `labels` [S] int64 (-100 outside the answer), `example_id` (the target's row in the
    interactions, or a number behind all rows), `user_id` (0 for catalogue tasks), `item_ids` [L] (the history, or the
    item itself), `task`, `target`, `phrasing`, `prompt_length` and `dropped_items`.

    Args:
        dataset: Supplies training histories and titles.
        codes: [I+1, M] codes of the items; row 0 is padding.
        level_sizes: M numbers of codes.
        code_base: First id behind the base model's vocabulary; code c of level h is `code_base + offset[h] + c`.
        tokenizer: The base model's.
        options: See `CodeTaskOptions`.
        titles: Text of every item, index = item id, empty where there is none; by default `title_texts(dataset)` of
            the items that have a title (a key says nothing in words).
        seed: Of all draws.
        examples: Histories of the training split; by default `dataset.histories("train", max_history)`.

    Attributes:
        asker: What writes the prompts.
        tasks: Names of the tasks in use.

    Raises:
        RecipeError: Options, tokenizer and data do not fit together.
        DataError: The codes are those of another catalogue.
    """

    def __init__(
        self,
        dataset: InteractionDataset,
        codes: np.ndarray,
        level_sizes: Sequence[int],
        code_base: int,
        tokenizer: PreTrainedTokenizerBase,
        options: CodeTaskOptions,
        *,
        titles: list[str] | None = None,
        seed: int = 0,
        examples: SequenceExamples | None = None,
    ) -> None:
        if len(codes) != dataset.num_items + 1:
            raise DataError("codes of another catalogue", found=len(codes), expected=f"{dataset.num_items + 1} (I + 1)")
        titles = _known_titles(dataset) if titles is None else titles
        self.asker = CodeAsker(codes, level_sizes, code_base, tokenizer, options, titles)
        self.options, self.seed, self.epoch = options, seed, 0
        self.tasks = tuple(name for name in TASKS if name in options.tasks)
        self._titled = np.flatnonzero(self.asker.has_title)
        wordy = [name for name in self.tasks if TASKS[name].needs_titles]
        if wordy and not len(self._titled):
            raise RecipeError(f"prompt.tasks: {', '.join(wordy)} need titles, but no item has one; leave them out")
        histories = dataset.histories("train", options.max_history) if examples is None else examples
        self._take_histories(histories)
        self._first_free = dataset.interactions.num_rows
        self._index = np.arange(len(self.examples) + sum(self._catalogue_counts.values()))
        self._drawn: _Plan | None = None
        if not len(self._index):
            raise RecipeError(
                f"prompt.tasks: {', '.join(self.tasks)} have no example in data set {dataset.meta.name!r}"
            )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row; see the class."""
        place, plan = int(self._index[index]), self._plan
        task, target = self.tasks[int(plan.task[place])], int(plan.item[place])
        if place < len(self.examples):
            source = self.examples[place]
            row = {name: source[name] for name in ("example_id", "user_id", "item_ids")}
        else:
            row = {
                "example_id": self._first_free + place - len(self.examples),
                "user_id": 0,
                "item_ids": np.array([target], dtype=np.int64),
            }
        phrasing = int(plan.phrasing[place])
        encoded = self.asker.encode(task, row["item_ids"], target, phrasing=phrasing)
        return row | vars(encoded) | {"task": task, "target": target, "phrasing": phrasing}

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, tokens of each example in this epoch; with `max_length` an upper estimate of shortened prompts.

        A sum of stored counts: nothing is rendered or tokenised.
        """
        plan = self._plan
        found = np.zeros(len(plan.task), dtype=np.int64)
        for number, name in enumerate(self.tasks):
            at, sizes = np.flatnonzero(plan.task == number), self.asker.sizes(name)
            item, phrasing = plan.item[at], plan.phrasing[at]
            if TASKS[name].from_history:
                shown = sizes.shown[self.examples.items]
                tokens, items = (np.concatenate([[0], np.cumsum(counts)]) for counts in (shown, shown > 0))
                start, end = self.examples.start[at], self.examples.end[at]
                between = sizes.separator[phrasing] * (items[end] - items[start] - 1)
                body = tokens[end] - tokens[start] + between
            else:
                body = sizes.shown[item]
            found[at] = sizes.frame[phrasing] + body + sizes.answer[item]
        found = found[self._index]
        return found if self.options.max_length is None else np.minimum(found, self.options.max_length)

    def mix(self) -> dict[str, int]:
        """Number of examples of each task in this epoch."""
        counts = np.bincount(self._plan.task[self._index], minlength=len(self.tasks))
        return dict(zip(self.tasks, counts.tolist(), strict=True))

    def subset(self, index: np.ndarray | Sequence[int]) -> CodeTasks:
        """The examples at the given positions, in that order; each stays what it was."""
        chosen = copy.copy(self)
        chosen._index = self._index[np.asarray(index)]
        return chosen

    def set_epoch(self, epoch: int) -> None:
        """Draw other tasks, phrasings and catalogue items from now on."""
        if epoch != self.epoch:
            self.epoch, self._drawn = epoch, None

    def encode_history(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `CodeAsker.encode_history`."""
        return self.asker.encode_history(history)

    def _take_histories(self, examples: SequenceExamples) -> None:
        """Keep the histories that suit a task, and count the catalogue examples beside them."""
        if examples.dense or examples.labels is not None:
            raise RecipeError("code tasks need one next item per example: use dataset.histories")
        names = [name for name in self.tasks if TASKS[name].from_history]
        start = np.maximum(examples.start, examples.end - self.options.max_history)
        examples = replace(examples, start=start)
        titled = self.asker.has_title
        shown = np.concatenate([[0], np.cumsum(titled[examples.items])])
        suits = np.ones((len(examples), len(names)), dtype=bool)
        for column, name in enumerate(names):
            if TASKS[name].answers == "titles":
                suits[:, column] = titled[examples.targets]
            elif TASKS[name].shows == "titles":
                suits[:, column] = shown[examples.end] > shown[examples.start]
        kept = np.flatnonzero(suits.any(1))
        self.examples, self._suits = examples.subset(kept), suits[kept]
        shares = self.options.tasks
        beside = sum(shares[name] for name in names)
        unit = len(kept) / beside if names else len(self._titled) / max(shares.values())
        self._catalogue_counts = {
            name: round(unit * shares[name]) for name in self.tasks if not TASKS[name].from_history
        }

    @property
    def _plan(self) -> _Plan:
        if self._drawn is None:
            self._drawn = _joined([self._history_plan(), *map(self._catalogue_plan, self._catalogue_counts)])
        return self._drawn

    def _history_plan(self) -> _Plan:
        names = [name for name in self.tasks if TASKS[name].from_history]
        if not names or not len(self.examples):
            return _Plan(*(np.zeros(0, dtype=np.int64) for _ in _Plan._fields))
        sums = np.cumsum(self._suits * np.array([self.options.tasks[name] for name in names]), axis=1)
        total, keys = sums[:, -1], self.examples.example_ids
        drawn = np.minimum(self._uniform(_TASK, keys) * total, np.nextafter(total, 0))
        chosen = (sums <= drawn[:, None]).sum(1)
        task = np.array([self.tasks.index(name) for name in names], dtype=np.int64)[chosen]
        wordings = np.array([len(self.asker.variants(name)) for name in names])[chosen]
        phrasing = (self._uniform(_PHRASING, keys) * wordings).astype(np.int64)
        return _Plan(task, phrasing, self.examples.targets)

    def _catalogue_plan(self, name: str) -> _Plan:
        count, number = self._catalogue_counts[name], list(TASKS).index(name)
        generator = self._generator(_ITEM, number)
        rounds = [generator.permutation(self._titled) for _ in range(-(-count // len(self._titled)))]
        item = np.concatenate([*rounds, np.zeros(0, dtype=np.int64)])[:count]
        drawn = self._generator(_PHRASING, number).random(count)
        phrasing = (drawn * len(self.asker.variants(name))).astype(np.int64)
        return _Plan(np.full(count, self.tasks.index(name), dtype=np.int64), phrasing, item)

    def _generator(self, purpose: int, stream: int = len(TASKS)) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, purpose, stream])

    def _uniform(self, purpose: int, keys: np.ndarray) -> np.ndarray:
        """[n] numbers in [0, 1), one for each key; that of a key does not depend on which others are asked for."""
        return self._generator(purpose).random(int(keys.max()) + 1)[keys]


def _joined(plans: Sequence[_Plan]) -> _Plan:
    return _Plan(*(np.concatenate(parts) for parts in zip(*plans, strict=True)))


def _known_titles(dataset: InteractionDataset) -> list[str]:
    """Texts of the items that have a title; empty for the others."""
    if TITLE not in dataset.items.column_names:
        return [""] * (dataset.num_items + 1)
    titles = ["", *dataset.items.column(TITLE).to_pylist()]
    return [text if str(title or "").strip() else "" for text, title in zip(title_texts(dataset), titles, strict=True)]


@dataclass
class CodeTaskCollator:
    """Pads rows of `CodeTasks` on the right into a `SequenceBatch`.

    The batch has input_ids, attention_mask and token_labels [B, S], and for encoders that give gates item_ids [B, L],
    lengths, user_ids and example_ids [B].

    Args:
        tokenizer: The one of the rows; its padding (or else end-of-sequence) id fills up input_ids.
        extras: Called with (rows, batch) to add fields, such as precomputed user vectors.
    """

    tokenizer: PreTrainedTokenizerBase
    extras: Callable[[list[dict[str, Any]], SequenceBatch], None] | None = None

    def __post_init__(self) -> None:
        self._filler = filler_id(self.tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> SequenceBatch:
        batch: SequenceBatch = {
            "input_ids": pad_right([row["input_ids"] for row in rows], self._filler),
            "attention_mask": pad_right([np.ones(len(row["input_ids"]), dtype=np.int64) for row in rows]),
            "token_labels": pad_right([row["labels"] for row in rows], IGNORED),
            "item_ids": pad_right([row["item_ids"] for row in rows]),
            "lengths": _vector([len(row["item_ids"]) for row in rows]),
            "user_ids": _vector([row["user_id"] for row in rows]),
            "example_ids": _vector([row["example_id"] for row in rows]),
        }
        if self.extras is not None:
            self.extras(rows, batch)
        return batch


def _vector(values: list[int]) -> Any:
    """LongTensor [B]."""
    return pad_right([np.array(values, dtype=np.int64)])[0]
