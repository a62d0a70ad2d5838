"""Readout: last states, alignment of padding, masking and ranking; multi-hot histories."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.blocks.multi_hot import multi_hot, running_multi_hot
from llmrec.blocks.readout import gather_last, left_align, mask_items, padding_mask, right_align, top_items

LENGTHS = torch.tensor([3, 1, 4])
ITEMS = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0], [1, 2, 3, 4]])


def test_gather_last_takes_the_last_real_state() -> None:
    hidden = torch.arange(24.0).view(3, 4, 2)
    assert gather_last(hidden, LENGTHS).tolist() == [[4, 5], [8, 9], [22, 23]]


def test_padding_mask_marks_real_positions() -> None:
    assert torch.equal(padding_mask(LENGTHS, 4), ITEMS > 0)


def test_left_align_moves_padding_to_the_left() -> None:
    assert left_align(ITEMS, LENGTHS).tolist() == [[0, 5, 6, 7], [0, 0, 0, 8], [1, 2, 3, 4]]
    states = torch.stack([ITEMS, -ITEMS], dim=-1).float()
    assert torch.equal(left_align(states, LENGTHS)[..., 1], -left_align(ITEMS, LENGTHS).float())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3))
def test_right_align_undoes_left_align(lengths: list[int], extra: int) -> None:
    width, sizes = max(lengths) + extra, torch.tensor(lengths)
    values = torch.rand(len(lengths), width, 2) + 1
    values = values * padding_mask(sizes, width)[..., None]
    moved = left_align(values, sizes)
    assert torch.equal(right_align(moved, sizes), values)
    assert torch.equal(moved[:, -1], gather_last(values, sizes))


def test_mask_items_hides_padding_and_seen_in_a_copy() -> None:
    scores = torch.ones(2, 5)
    masked = mask_items(scores, seen=torch.tensor([[2, 0], [4, 1]]))
    assert torch.isneginf(masked).tolist() == [[True, False, True, False, False], [True, True, False, False, True]]
    assert scores.min() == 1


def test_top_items_of_the_catalogue() -> None:
    scores = torch.tensor([[9.0, 1.0, 4.0, 3.0, 2.0]])
    item_ids, best, valid = top_items(scores, 3, seen=torch.tensor([[2, 0]]))
    assert item_ids.tolist() == [[3, 4, 1]] and best.tolist() == [[3, 2, 1]] and valid.all()


def test_top_items_pads_when_too_few_remain() -> None:
    item_ids, best, valid = top_items(torch.tensor([[0.0, 1.0, 2.0]]), 5, seen=torch.tensor([[2]]))
    assert item_ids.tolist() == [[1, 0, 0, 0, 0]]
    assert valid.tolist() == [[True, False, False, False, False]] and torch.isneginf(best[0, 1:]).all()


def test_top_items_among_candidates() -> None:
    candidates, scores = torch.tensor([[7, 3, 0, 9]]), torch.tensor([[1.0, 5.0, 99.0, 2.0]])
    item_ids, best, valid = top_items(scores, 4, seen=torch.tensor([[9, 0]]), candidates=candidates)
    assert item_ids.tolist() == [[3, 7, 0, 0]] and best[0, :2].tolist() == [5, 1]
    assert valid.tolist() == [[True, True, False, False]]


def test_multi_hot_marks_each_item_once_and_never_padding() -> None:
    items = torch.tensor([[2, 2, 4], [1, 0, 0]])
    assert multi_hot(items, 4).tolist() == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]


def test_running_multi_hot_ends_in_the_whole_history() -> None:
    items = torch.tensor([[2, 2, 4], [1, 0, 0]])
    running = running_multi_hot(items, 4)
    assert running[0].tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 1]]
    assert torch.equal(running[:, -1], multi_hot(items, 4))
