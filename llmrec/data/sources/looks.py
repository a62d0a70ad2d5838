"""Looks of synthetic items, and shoppers who go by a look that only the picture shows.

Our design, from no paper. Every item has a shape, a colour, a pattern behind it and a letter below it, drawn from its
number and the seed alone; title, description, category and brand know nothing of them. A share of the users prefers
one shape or one colour. Each of their events is, with probability `LOOK`, an item of that look (every such item as
likely as another, none twice), otherwise what a user without a look would do.

A user with a drift prefers another value (another colour, or another shape) in the second half of the history, and
still goes back to the first one in `RETURN` of the events by look: what came early keeps its worth, and few late
events alone say less than late events after a summary of the early ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from llmrec.data.item_images import COLOURS, PATTERNS, SHAPES, draw_item

LOOK, RETURN = 0.8, 0.25
ATTRIBUTES = ("shape", "colour")
LETTERS = "ABEFHKLMNPRSTXYZ"


@dataclass(frozen=True)
class Look:
    """What the picture of an item shows, in words.

    Args:
        shape: One of `item_images.SHAPES`.
        colour: Name of one of `item_images.COLOURS`.
        pattern: One of `item_images.PATTERNS`, the ground.
        lettering: The letter below the shape.
    """

    shape: str
    colour: str
    pattern: str
    lettering: str

    @property
    def codes(self) -> tuple[int, int]:
        """Numbers of shape and colour, in the order of `ATTRIBUTES`."""
        return SHAPES.index(self.shape), [name for name, _ in COLOURS].index(self.colour)

    def draw(self) -> bytes:
        """The picture, a PNG."""
        return draw_item(*self.codes, PATTERNS.index(self.pattern), self.lettering)


def look_of(item: int, seed: int) -> Look:
    """The look of a synthetic item of a data set with `visual_taste`; it depends on these two numbers alone.

    Args:
        item: The number in the original id: 17 for "i17" (from 1).
        seed: Seed of the source.
    """
    draws = hashlib.sha256(f"llmrec-look/{seed}/{item}".encode()).digest()
    return Look(
        SHAPES[draws[0] % len(SHAPES)],
        COLOURS[draws[1] % len(COLOURS)][0],
        PATTERNS[draws[2] % len(PATTERNS)],
        LETTERS[draws[3] % len(LETTERS)],
    )


def look_codes(items: int, seed: int) -> np.ndarray:
    """Shape and colour of items 1..n as numbers [n, 2]."""
    return np.array([look_of(item, seed).codes for item in range(1, items + 1)], dtype=np.int64)


@dataclass(frozen=True)
class Tastes:
    """What users go by, index = user number - 1; -1 stands for no look.

    Args:
        attribute: [U] index into `ATTRIBUTES`.
        first: [U] preferred value in the first half of the history.
        second: [U] preferred value in the second half; other than `first` for users with a drift.
    """

    attribute: np.ndarray
    first: np.ndarray
    second: np.ndarray


def draw_tastes(generator: np.random.Generator, users: int, looks: np.ndarray, share: float, drift: float) -> Tastes:
    """Who prefers what.

    Args:
        generator: Random numbers.
        users: U.
        looks: Shape and colour of every item, [I, 2].
        share: Share of the users with a look, rounded to whole users.
        drift: Share of those whose look changes.
    """
    visual = generator.permutation(users)[: round(share * users)]
    attribute, first = np.full(users, -1, dtype=np.int64), np.full(users, -1, dtype=np.int64)
    attribute[visual] = generator.integers(len(ATTRIBUTES), size=len(visual))
    # The look of some item, so that there is one.
    first[visual] = looks[generator.integers(len(looks), size=len(visual)), attribute[visual]]
    second = first.copy()
    for user in visual[: round(drift * len(visual))]:
        others = looks[looks[:, attribute[user]] != first[user], attribute[user]]
        if len(others):
            second[user] = others[generator.integers(len(others))]
    return Tastes(attribute, first, second)


class LookWalk:
    """Events of users who go by a look, laid over the events of users who do not; one call for each step.

    Args:
        generator: Random numbers.
        tastes: Who prefers what.
        looks: Shape and colour of every item, [I, 2].
        steps: Most steps.
        length: Events a history shall have; its second half begins at event length // 2.
    """

    def __init__(
        self, generator: np.random.Generator, tastes: Tastes, looks: np.ndarray, steps: int, length: int
    ) -> None:
        self._generator, self._tastes, self._looks, self._half = generator, tastes, looks, length // 2
        values = (tastes.first, tastes.second)
        self._orders = [_orders(generator, looks, tastes.attribute, value, steps) for value in values]
        self._used = np.zeros((2, len(tastes.attribute)), dtype=np.int64)
        self._events = np.zeros(len(tastes.attribute), dtype=np.int64)

    def step(self, habit: np.ndarray, history: np.ndarray) -> np.ndarray:
        """Items [U] of the next step.

        Args:
            habit: [U] what the users would take without a look.
            history: [U, S] items of the steps before.
        """
        users = np.arange(len(habit))
        by_look = (self._tastes.attribute >= 0) & (self._generator.random(len(habit)) < LOOK)
        back = self._generator.random(len(habit)) < RETURN
        drifts = self._tastes.first != self._tastes.second
        late = (drifts & (self._events >= self._half) & ~back).astype(np.int64)
        place = np.minimum(self._used[late, users], self._orders[0].shape[1] - 1)
        chosen = np.where(late == 1, self._orders[1][users, place], self._orders[0][users, place])
        left = self._used[late, users] < self._orders[0].shape[1]
        taken = by_look & left & (chosen >= 0)
        self._used[late[taken], users[taken]] += 1
        items = np.where(taken, chosen, habit)
        self._events += ~(history == items[:, None]).any(axis=1)
        return items

    def liked(self, user: np.ndarray, item: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        """[N] whether items (from 0) are of a look their users ever prefer; `otherwise` for users without a look."""
        attribute = self._tastes.attribute[user]
        value = self._looks[item, np.maximum(attribute, 0)]
        looks = (value == self._tastes.first[user]) | (value == self._tastes.second[user])
        return np.where(attribute >= 0, looks, otherwise)


def _orders(
    generator: np.random.Generator, looks: np.ndarray, attribute: np.ndarray, value: np.ndarray, width: int
) -> np.ndarray:
    """Items of each user's look in an order of his own, [U, width], -1 where there are no more."""
    orders = np.full((len(attribute), width), -1, dtype=np.int64)
    for a in range(len(ATTRIBUTES)):
        for v in np.unique(value[attribute == a]):
            users, items = np.flatnonzero((attribute == a) & (value == v)), np.flatnonzero(looks[:, a] == v)
            shuffled = generator.permuted(np.tile(items, (len(users), 1)), axis=1)[:, :width]
            orders[users, : shuffled.shape[1]] = shuffled
    return orders
