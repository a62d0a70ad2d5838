"""Items and actions as one right-padded sequence of tokens."""

from __future__ import annotations

import torch

from llmrec.blocks.interleaving import (
    NEGATIVE,
    NO_ACTION,
    POSITIVE,
    action_ids,
    interleave,
    item_places,
    known_actions,
    token_lengths,
)
from llmrec.blocks.readout import padding_mask

ITEMS = torch.tensor([[5, 6, 7], [8, 9, 0], [4, 0, 0]])
LENGTHS = torch.tensor([3, 2, 1])
LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def test_items_stand_at_even_places_and_the_last_action_nowhere() -> None:
    tokens = interleave(ITEMS, -ITEMS)
    assert tokens.tolist() == [[5, -5, 6, -6, 7], [8, -8, 9, -9, 0], [4, -4, 0, 0, 0]]


def test_vectors_are_interleaved_like_ids_and_come_back() -> None:
    items, actions = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    tokens = interleave(items, actions)
    assert tokens.shape == (2, 7, 3)
    assert torch.equal(tokens[:, 1::2], actions[:, :-1])
    assert torch.equal(item_places(tokens), items)
    assert torch.equal(interleave(items[:, :1], actions[:, :1]), items[:, :1])


def test_actions_that_are_inputs_have_ids_and_the_asked_one_has_none() -> None:
    assert action_ids(LABELS, LENGTHS).tolist() == [
        [POSITIVE, NEGATIVE, NO_ACTION],
        [NEGATIVE, NO_ACTION, NO_ACTION],
        [NO_ACTION, NO_ACTION, NO_ACTION],
    ]


def test_the_asked_action_and_padding_are_not_read() -> None:
    changed = torch.where(known_actions(LENGTHS, 3), LABELS, 1 - LABELS)
    assert torch.equal(action_ids(changed, LENGTHS), action_ids(LABELS, LENGTHS))


def test_tokens_are_right_padded() -> None:
    """Real tokens are exactly the first 2 n - 1 of a row with n items."""
    tokens = interleave(ITEMS, ITEMS * known_actions(LENGTHS, 3))
    assert torch.equal(tokens > 0, padding_mask(token_lengths(LENGTHS), 5))
