"""Pictures of items inside prompts that are written piece by piece: their tokens, and what the model reads for them.

A processor repeats the placeholder of a picture as often as the vision tower has features for it, and some put marks
around it. `ItemPictures` asks the processor about the picture alone, so that the tokens can stand anywhere in a prompt
and nothing else of the prompt can be cut or changed by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrec.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from llmrec.data.item_images import ItemImages

_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


class ItemPictures:
    """Pictures of a catalogue for one vision-language model (`llmrec.llm.yes_no.Pictures`).

    Args:
        images: Of the items.
        processor: Of the model.

    Raises:
        CheckpointError: The processor has no token for pictures.
    """

    def __init__(self, images: ItemImages, processor: Any) -> None:
        self._images, self._processor = images, processor
        token = getattr(processor, "image_token", None)
        if not isinstance(token, str):
            raise CheckpointError(f"{type(processor).__name__} has no image_token; expected a processor of pictures")
        self._token = token
        self._mask = images.mask
        self._ids = lru_cache(maxsize=None)(self._read_ids)

    def ids(self, item: int) -> list[int]:
        """Tokens that stand for the picture of an item, none where it has no picture."""
        return list(self._ids(item)) if self._mask[item] else []

    def _read_ids(self, item: int) -> tuple[int, ...]:
        ids: list[int] = self._process([item])["input_ids"][0].tolist()
        return tuple(ids)

    def inputs(self, items: Sequence[int]) -> dict[str, Tensor]:
        """What the model reads besides tokens for the pictures of items, in that order."""
        return {name: value for name, value in self._process(items).items() if name not in _OF_TOKENS}

    def _process(self, items: Sequence[int]) -> dict[str, Tensor]:
        pictures = []
        for item in items:
            picture = self._images[item]
            if picture is None:
                raise DataError("an item has no picture", found=f"item {item}", expected="items with pictures")
            pictures.append([picture])
        made = self._processor(
            text=[self._token] * len(pictures), images=pictures, padding=True, return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        return {name: value for name, value in made.items() if torch.is_tensor(value)}
