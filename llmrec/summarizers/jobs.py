"""The order in which texts are made: items first, then all users step by step, each text once.

Users advance together: step t of every user that has one is asked in batches before step t + 1 of anybody, so that a
recurrence that is serial per user is parallel over users. Batches are laid over the whole list before finished texts
are taken out of it, so a job that was killed and goes on asks the same batches as one that was not.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmrec.data.schema import TITLE
from llmrec.data.summaries import UserText
from llmrec.errors import DataError, RecipeError
from llmrec.summarizers.base import FAILED, OK, UNFINISHED, ItemContent, ItemLine, Summarizer, UserStep, Written
from llmrec.summarizers.store import TextStore

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.item_images import ItemImages
    from llmrec.llm.generating import Generator

PARTIAL = "partial"
"""Status of a user whose text lacks some blocks."""

Tell = Callable[[int, int], None]
"""Called after each batch: how many texts are settled by it, and how many of them were made just now."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class History:
    """What is read of a user before one held-out event.

    Args:
        user: Its id.
        split: Split of the held-out event.
        example: Row of the held-out event in the interactions table.
        items: Item ids, oldest first; the held-out event and everything after it are not among them.
    """

    user: int
    split: str
    example: int
    items: tuple[int, ...]


@dataclass
class Tally:
    """What a job cost and what it had to count.

    Args:
        asked: Texts made by this process.
        cached: Texts found finished.
        tokens: Tokens "prompt" and "new" of the texts made by this process.
        marks: "retried", "items_shortened", ... -> number of texts, of this process or of an earlier one.
        all_tokens: Tokens of all texts of the result, whoever made them.
    """

    asked: int = 0
    cached: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    marks: Counter[str] = field(default_factory=Counter)
    all_tokens: Counter[str] = field(default_factory=Counter)
    _met: set[str] = field(default_factory=set)

    def add(self, key: str, text: Written, *, fresh: bool) -> None:
        """Count a text, once however many items or users share it; what is unfinished is none."""
        if key in self._met or text.status == UNFINISHED:
            return
        self._met.add(key)
        cost = {"prompt": text.prompt_tokens, "new": text.new_tokens}
        self.marks.update(text.marks)
        self.all_tokens.update(cost)
        if fresh:
            self.asked += 1
            self.tokens.update(cost)
        else:
            self.cached += 1


def held_out_histories(
    dataset: InteractionDataset,
    splits: Sequence[str],
    *,
    max_history: int,
    block_size: int,
    limit: int | None = None,
    seed: int = 0,
) -> list[History]:
    """The histories of users before a held-out event of each split.

    Where a user has several targets in a split, the first is held out, so the text is safe for the later ones too; of
    "train" it is the last. A longer history than `max_history` begins at a whole block, so that the blocks of a user's
    earlier splits are found in the cache.

    Args:
        dataset: The data set.
        splits: "train", "valid", "test", ...
        max_history: Most events read.
        block_size: Events of a block.
        limit: Most users; drawn by a hash of seed and original id, so a greater limit keeps the users of a smaller one.
        seed: Seed of that draw.

    Raises:
        RecipeError: `max_history` is shorter than a block.
        DataError: No user has an event before a target of these splits.
    """
    if max_history < block_size:
        raise RecipeError(f"max_history: found {max_history}, expected at least block_size, {block_size}")
    found: list[History] = []
    for split in splits:
        examples = dataset.histories(split, dataset.interactions.num_rows)  # type: ignore[arg-type]
        for row in _one_each(examples.users, last=split == "train"):
            first, end = int(examples.first[row]), int(examples.end[row])
            whole = max(0, -(-(end - first - max_history) // block_size)) * block_size
            items = tuple(int(item) for item in examples.items[first + whole : end])
            found.append(History(int(examples.users[row]), split, int(examples.example_ids[row]), items))
    if not found:
        raise DataError(
            f"no user of {dataset.meta.name!r} has an event before a target of {', '.join(splits)}",
            expected=f"splits among {', '.join(dataset.summary()['splits'])}",
        )
    if limit is not None:
        keys = dataset.user_keys
        users = {history.user for history in found}
        drawn = set(sorted(users, key=lambda u: hashlib.sha256(f"{seed}/{keys[u]}".encode()).digest())[:limit])
        found = [history for history in found if history.user in drawn]
    return sorted(found, key=lambda history: (history.user, history.example))


def _one_each(users: np.ndarray, *, last: bool) -> Iterator[int]:
    """Index of the first, or last, example of every user; examples of a user stand together."""
    if not len(users):
        return
    change = np.flatnonzero(users[1:] != users[:-1])
    yield from (int(row) for row in (np.r_[change, len(users) - 1] if last else np.r_[0, change + 1]))


def write_item_texts(
    dataset: InteractionDataset,
    wanted: Iterable[int],
    summarizer: Summarizer,
    generator: Generator | None,
    store: TextStore,
    *,
    batch: int,
    tell: Tell,
    tally: Tally,
) -> dict[int, Written]:
    """Item id -> outcome for all wanted items.

    Args:
        dataset: The data set.
        wanted: Item ids.
        summarizer: Writes the texts.
        generator: The model, for a summarizer that needs one.
        store: Finished texts.
        batch: Items asked at once.
        tell: Progress.
        tally: Is added to.
    """
    version, words = summarizer.version(generator), summarizer.item_words(dataset)
    images = _images(dataset) if summarizer.reads_images else None
    outcomes: dict[int, Written] = {}
    for chunk in _chunks(sorted(set(wanted)), batch):
        contents = [_content(item, words[item], images) for item in chunk]
        keyed = {item: summarizer.item_key(content, version) for item, content in zip(chunk, contents, strict=True)}
        todo = {keyed[content.item]: content for content in contents if keyed[content.item] not in store}
        fresh = _made(todo, lambda some: summarizer.write_items(some, generator), store)
        for item, key in keyed.items():
            outcomes[item] = fresh[key] if key in fresh else store[key]
            tally.add(key, outcomes[item], fresh=key in fresh)
        tell(len(chunk), len(fresh))
    return outcomes


def write_user_texts(
    histories: Sequence[History],
    lines: Sequence[ItemLine],
    summarizer: Summarizer,
    generator: Generator | None,
    store: TextStore,
    *,
    batch: int,
    tell: Tell,
    tally: Tally,
) -> list[UserText]:
    """The text of every history, in their order.

    Args:
        histories: What is read.
        lines: Every item as a prompt shows it, index = item id.
        summarizer, generator, store, batch, tell, tally: As for `write_item_texts`.
    """
    version = summarizer.version(generator)
    spans = [summarizer.spans(len(history.items)) for history in histories]
    states = [Written("") for _ in histories]
    troubles: list[list[Written]] = [[] for _ in histories]
    for number in range(max(map(len, spans), default=0)):
        steps: dict[int, UserStep] = {}
        for row, history in enumerate(histories):
            if number < len(spans[row]) and states[row].status != UNFINISHED:
                start, end = spans[row][number]
                steps[row] = UserStep(states[row].text, tuple(lines[item] for item in history.items[start:end]))
        keys = {row: summarizer.user_key(step, version) for row, step in steps.items()}
        step_of = {keys[row]: step for row, step in steps.items()}
        sharing: dict[str, list[int]] = {}
        for row, key in keys.items():
            sharing.setdefault(key, []).append(row)
        for chunk in _chunks(list(step_of), batch):
            todo = {key: step_of[key] for key in chunk if key not in store}
            fresh = _made(todo, lambda some: summarizer.write_users(some, generator), store)
            for key in chunk:
                done = fresh[key] if key in fresh else store[key]
                tally.add(key, done, fresh=key in fresh)
                for row in sharing[key]:
                    states[row] = done
                    troubles[row] += [done] if done.status != OK else []
            tell(sum(len(sharing[key]) for key in chunk), len(fresh))
    return [_user_text(history, states[row], len(spans[row]), troubles[row]) for row, history in enumerate(histories)]


def untitled(dataset: InteractionDataset, items: Iterable[int]) -> int:
    """How many items have no title and go by their key."""
    if TITLE not in dataset.items.column_names:
        return len(set(items))
    titles = dataset.items.column(TITLE).to_pylist()
    return sum(not (titles[item - 1] or "").strip() for item in set(items))


def _user_text(history: History, last: Written, blocks: int, troubles: Sequence[Written]) -> UserText:
    status, reason = OK, ""
    if last.status == UNFINISHED:
        status, reason = UNFINISHED, last.reason
    elif troubles:
        status, reason = PARTIAL if last.text else FAILED, troubles[0].reason
    return UserText(history.user, history.split, history.example, len(history.items), last.text, blocks, status, reason)


def _made(
    todo: Mapping[str, _T], write: Callable[[Sequence[_T]], list[Written]], store: TextStore
) -> dict[str, Written]:
    if not todo:
        return {}
    written = dict(zip(todo, write(list(todo.values())), strict=True))
    store.append(written)
    return written


def _images(dataset: InteractionDataset) -> ItemImages:
    from llmrec.data.item_images import ItemImages

    return ItemImages(dataset.items)


def _content(item: int, words: str, images: ItemImages | None) -> ItemContent:
    if images is None:
        return ItemContent(item, words)
    try:
        return ItemContent(item, words, images.data(item))
    except DataError as error:
        return ItemContent(item, words, None, " ".join(str(error).split()))


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
