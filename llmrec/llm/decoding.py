"""Answer text -> item: exact titles only.

An answer names an item when its first line equals the item's title, apart from letter case and white space. With
candidates only those count. A title that several allowed items share names none of them: no item is guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llmrec.errors import DataError


def normalise_title(text: str) -> str:
    """First line of the stripped text, in lower case, runs of white space as one blank."""
    lines = text.strip().splitlines()
    return " ".join(lines[0].split()).casefold() if lines else ""


class TitleIndex:
    """Items by title.

    Args:
        titles: Title of every item, index = item id; entry 0 is padding. Items without a title cannot be named.

    Raises:
        DataError: No item has a title.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        self._items: dict[str, list[int]] = {}
        for item, title in enumerate(titles):
            name = normalise_title(title)
            if item and name:
                self._items.setdefault(name, []).append(item)
        if not self._items:
            raise DataError(
                "no item has a title, so no answer can name one",
                remedy="prepare the data set with item titles, or use the style item_slots",
            )

    def item(self, answer: str, allowed: Collection[int] | None = None) -> int:
        """The one item an answer names, 0 for none.

        Args:
            answer: Raw text of a model.
            allowed: Items that count; all of them when left out.
        """
        named = self._items.get(normalise_title(answer), [])
        if allowed is not None:
            named = [item for item in named if item in allowed]
        return named[0] if len(named) == 1 else 0
