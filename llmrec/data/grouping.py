"""Order of examples in which batches hold examples of similar length, so that little of a batch is padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmrec.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

BLOCK = 50
"""Groups sorted together: more means less padding, fewer means batches nearer to a plain shuffle."""


def grouped_order(lengths: ArrayLike, group: int, generator: np.random.Generator) -> np.ndarray:
    """A shuffle whose consecutive groups hold examples of similar length.

    Examples are shuffled, blocks of `BLOCK` groups are sorted by length and cut into groups, and the groups are
    shuffled. The group with the longest example comes first, so that a shortage of memory shows in the first step.
    What does not fill a group keeps its place at the end; groups of all processes therefore stay aligned.

    Args:
        lengths: [n], in any unit.
        group: Examples that are computed side by side: batch size times processes.
        generator: Of the epoch; the order depends on nothing else.

    Returns:
        [n] int64 positions, each once.

    Raises:
        DataError: A group has no examples.
    """
    if group < 1:
        raise DataError("groups of examples are empty", found=f"group = {group}", expected="1 or more")
    sizes = np.asarray(lengths)
    order = generator.permutation(len(sizes))
    full = len(order) // group * group
    if not full:
        return order
    head = order[:full]
    block = np.arange(full) // (group * BLOCK)
    groups = head[np.lexsort((sizes[head], block))].reshape(-1, group)
    groups = groups[generator.permutation(len(groups))]
    first = int(sizes[groups].max(axis=1).argmax())
    groups[[0, first]] = groups[[first, 0]]
    return np.concatenate([groups.reshape(-1), order[full:]])
