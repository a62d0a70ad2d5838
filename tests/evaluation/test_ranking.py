from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.errors import DataError
from llmrec.evaluation.ranking import (
    RankCounter,
    rank_by_count,
    rank_in_chunks,
    rank_of_column,
    top_k,
)

INF = float("inf")


def slow_rank(scores: list[float], target: int, exclude: set[int]) -> float:
    """The definition, one item at a time; scores[0] belongs to padding."""
    greater = equal = 0
    for item in range(1, len(scores)):
        if item == target or (item in exclude and item != target):
            continue
        greater += scores[item] > scores[target]
        equal += scores[item] == scores[target]
    return 1 + greater + equal / 2


@st.composite
def ranking_cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, items, seen = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(0, 6))
    value = st.sampled_from([-INF, -1.5, 0.0, 0.25, 1.0, 7.0]) | st.floats(-3, 3, width=32)  # few values: many ties
    scores = [[draw(value) for _ in range(items + 1)] for _ in range(rows)]
    targets = [draw(st.integers(1, items)) for _ in range(rows)]
    exclude = [[draw(st.integers(0, items)) for _ in range(seen)] for _ in range(rows)]
    return torch.tensor(scores), torch.tensor(targets), torch.tensor(exclude, dtype=torch.long).reshape(rows, seen)


@settings(max_examples=150, deadline=None)
@given(ranking_cases(), st.integers(1, 5))
def test_ranks_agree_with_the_definition(case, chunk):
    scores, targets, exclude = case
    expected = [
        slow_rank(row.tolist(), int(target), set(gone.tolist()))
        for row, target, gone in zip(scores, targets, exclude, strict=True)
    ]
    assert rank_by_count(scores, targets, exclude).tolist() == expected
    by_chunks = rank_in_chunks(lambda a, b: scores[:, a:b], targets, scores.shape[1] - 1, exclude, chunk=chunk)
    assert by_chunks.tolist() == expected


def test_hand_worked_ranks():
    scores = torch.tensor([[9.0, 0.5, 0.9, 0.5, 0.1], [9.0, 1.0, 1.0, 1.0, 1.0]])
    # row 0, target 1: item 2 is greater, item 3 is equal -> 2.5; row 1: three equal others -> 2.5
    assert rank_by_count(scores, torch.tensor([1, 4])).tolist() == [2.5, 2.5]
    # item 2 seen -> 1.5; two of the three equal others seen (one named twice) -> 1.5
    assert rank_by_count(scores, torch.tensor([1, 4]), torch.tensor([[2, 0, 0], [1, 1, 2]])).tolist() == [1.5, 1.5]


def test_a_repeated_target_still_competes():
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert rank_by_count(scores, torch.tensor([2]), torch.tensor([[2, 1]])).tolist() == [1.0]


def test_a_constant_model_gets_the_middle_rank():
    assert rank_by_count(torch.zeros(1, 102), torch.tensor([17])).tolist() == [51.0]


def test_half_precision_scores_are_compared_as_float32():
    scores = torch.randn(4, 60).to(torch.bfloat16)
    targets = torch.tensor([1, 2, 3, 4])
    assert torch.equal(rank_by_count(scores, targets), rank_by_count(scores.float(), targets))


def test_scores_are_left_untouched():
    scores, seen = torch.randn(3, 9), torch.tensor([[1], [2], [3]])
    before = scores.clone()
    rank_by_count(scores, torch.tensor([4, 5, 6]), seen)
    top_k(scores, 3, seen)
    assert torch.equal(scores, before)


def test_blocks_of_rows_give_the_same_ranks(monkeypatch):
    scores, targets = torch.randn(50, 40), torch.randint(1, 40, (50,))
    whole = rank_by_count(scores, targets)
    monkeypatch.setattr("llmrec.evaluation.ranking._ROW_BYTES", 600)
    monkeypatch.setattr("llmrec.evaluation.ranking._EXACT_FLOAT_COUNT", 7)
    assert torch.equal(rank_by_count(scores, targets), whole)


@pytest.mark.parametrize("position", [(0, 3), (1, 1)])
def test_nan_scores_are_refused(position):
    scores = torch.zeros(2, 5)
    scores[position] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        rank_by_count(scores, torch.tensor([1, 1]))
    with pytest.raises(DataError, match="NaN"):
        top_k(scores, 2)


def test_nan_in_the_padding_column_is_ignored():
    scores = torch.tensor([[float("nan"), 1.0, 2.0]])
    assert rank_by_count(scores, torch.tensor([1])).tolist() == [2.0]
    assert top_k(scores, 2)[0].tolist() == [[2, 1]]


@pytest.mark.parametrize("target", [0, 5, -1])
def test_targets_outside_the_catalogue_are_refused(target):
    with pytest.raises(DataError, match="outside the catalogue"):
        rank_by_count(torch.zeros(1, 5), torch.tensor([target]))


def test_candidate_columns():
    scores = torch.tensor([[0.3, 0.7, 0.7, 9.0], [0.1, 0.2, 0.3, 0.4]])
    valid = torch.tensor([[True, True, True, False], [True] * 4])
    assert rank_of_column(scores, torch.tensor([1, 0]), valid).tolist() == [1.5, 4.0]


def test_counter_memory_is_that_of_a_chunk():
    asked = []

    def score(first: int, last: int) -> torch.Tensor:
        asked.append(last - first)
        return torch.arange(first, last, dtype=torch.float32)[None, :].expand(2, -1)

    ranks = rank_in_chunks(score, torch.tensor([1, 1000]), 1000, chunk=64)
    assert ranks.tolist() == [1000.0, 1.0] and max(asked) == 64
    assert RankCounter(torch.zeros(2), torch.tensor([1, 2])).ranks().tolist() == [0.5, 0.5]  # nothing added yet


def test_top_k_lists():
    scores = torch.tensor([[99.0, 1.0, 5.0, 3.0], [99.0, 4.0, 5.0, 6.0]])
    items, best = top_k(scores, 2, torch.tensor([[2, 0], [3, 2]]), keep=torch.tensor([1, 3]))
    assert items.tolist() == [[3, 1], [3, 1]] and best.tolist() == [[3.0, 1.0], [6.0, 4.0]]
    items, best = top_k(scores, 5, torch.tensor([[1, 2], [1, 2]]))
    assert items.tolist() == [[3, 0, 0, 0, 0]] * 2 and best[0, 1:].tolist() == [-INF] * 4
