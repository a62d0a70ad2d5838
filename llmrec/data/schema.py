"""Column names, batch layout and the other types every part of the suite agrees on.

Conventions: item 0 is padding, items are 1..I; user 0 is "nobody", users are 1..U. Batches are right padded,
oldest event first, with `lengths` >= 1. Timestamps are int64 seconds; events of equal time keep the order
of the source rows. Scores are float32 and masked items score -inf. The rank of a target is
1 + (number of items with a greater score) + (number with an equal score) / 2.

Nothing in this module imports torch at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    # The dtypes are meant; torch's own LongTensor and FloatTensor types are not what its functions are typed to return.
    LongTensor = Tensor
    FloatTensor = Tensor

USER, ITEM, ORDER, SPLIT = "user", "item", "order", "split"
TIMESTAMP, RATING, LABEL, DOMAIN = "timestamp", "rating", "label", "domain"
KEY, TITLE, DESCRIPTION, CATEGORIES, BRAND, IMAGE = "key", "title", "description", "categories", "brand", "image"

Split = Literal["train", "valid", "test", "test_lapse", "calibration", "history"]
SPLITS: tuple[str, ...] = get_args(Split)
"""`history` marks events that are only ever context: never a training target, never a test target."""

ItemFeatures = dict[str, tuple[np.ndarray, np.ndarray]]
"""Named levels ("category", "title", "description", "collaborative", "image"): values [I+1, d] and a mask [I+1]
that is False where an item lacks the level. Row 0 is padding."""


class SequenceBatch(TypedDict, total=False):
    """What a collator hands to a model. Every field but `item_ids` and `lengths` is optional.

    Shapes: B examples, L the longest history of the batch, T target steps, K negatives, C candidates,
    S the longest whole history.
    """

    item_ids: LongTensor  # [B, L] right padded with 0, oldest first
    lengths: LongTensor  # [B] >= 1
    user_ids: LongTensor  # [B]
    example_ids: LongTensor  # [B] stable index of the instance
    timestamps: LongTensor  # [B, L] seconds
    target_timestamps: LongTensor  # [B] the query time, for models that condition on it
    targets: LongTensor  # [B, L] the next item at each position, 0 = not supervised
    trajectory: LongTensor  # [B, T] the next T items
    labels: FloatTensor  # [B] or [B, L], pointwise tasks: 1 where the action at an event was positive, else 0
    negatives: LongTensor  # [B, L, K] or [K]
    candidates: LongTensor  # [B, C]
    seen: LongTensor  # [B, S] the WHOLE history, padded with 0; `item_ids` may be a shorter window of it
    features: dict[str, Tensor]  # [B, L, ...] or [B, ...]
    user_repr: FloatTensor  # [B, gate_dim] or [B, L, gate_dim]: precomputed gate input
    input_ids: LongTensor  # [B, S] rendered prompt (text and hybrid styles)
    attention_mask: LongTensor  # [B, S]
    token_labels: LongTensor  # [B, S] -100 outside the answer
    item_slots: LongTensor  # [B, S] item whose projected vector replaces the token, 0 = keep the token


@dataclass(frozen=True)
class Ranking:
    """Ranked items per row.

    Args:
        item_ids: LongTensor [B, k], best first, 0 where nothing was found.
        scores: FloatTensor [B, k], -inf where nothing was found.
        valid: BoolTensor [B, k], False where nothing was found or a generated answer names no item.
        texts: Raw generations, one a row, for systems that write text.
    """

    item_ids: LongTensor
    scores: FloatTensor
    valid: Tensor
    texts: list[str] | None = None


@dataclass(frozen=True)
class DataContext:
    """What a model may learn from before training starts: the training part of a data set, as plain arrays.

    Args:
        num_items: I; item ids are 1..I.
        num_users: U; user ids are 1..U.
        train_counts: [I+1] int64, training events per item, row 0 zero.
        train_edges: [2, N] int64, (user, item) of every training event in table order (repeats kept).
        item_features: Named feature levels, empty unless a recipe asks for some.
        fields: Optional fields the data set really has ("timestamps", "ratings", "titles", ...).
    """

    num_items: int
    num_users: int
    train_counts: np.ndarray
    train_edges: np.ndarray
    item_features: ItemFeatures = field(default_factory=dict)
    fields: frozenset[str] = frozenset()


JsonDict = dict[str, Any]
