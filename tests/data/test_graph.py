"""The user-item graph: training edges only, normalisation, content neighbours, and content as signals."""

from __future__ import annotations

import numpy as np
import pytest

from llmrec.data.graph import UserItemGraph, content_signals, nearest_items
from llmrec.data.schema import DataContext
from llmrec.errors import DataError, RecipeError
from tests.data.tables import dataset_of

EVENTS = [
    (1, 1, "train"), (1, 2, "train"), (1, 1, "train"), (1, 5, "valid"), (1, 4, "test"),
    (2, 2, "train"), (2, 3, "train"), (2, 5, "test"),
    (3, 4, "history"), (3, 1, "train"), (3, 2, "valid"),
]  # fmt: skip


def context_of(users: int, items: int, *pairs: tuple[int, int]) -> DataContext:
    edges = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return DataContext(items, users, np.bincount(edges[1], minlength=items + 1), edges)


def test_edges_are_the_training_events_once() -> None:
    graph = UserItemGraph.from_context(dataset_of(EVENTS).context())
    assert graph.edges.T.tolist() == [[1, 1], [1, 2], [2, 2], [2, 3], [3, 1]]
    assert graph.item_degrees.tolist() == [0, 2, 2, 1, 0, 0], "items met only later have no edge"
    assert graph.degrees[:3].tolist() == [2, 2, 1] and graph.num_nodes == 8


def test_changing_later_events_changes_nothing() -> None:
    other = {2: 3, 4: 5, 5: 4}
    moved = [(user, item if split == "train" else other[item], split) for user, item, split in EVENTS]
    contexts = [dataset_of(events).context() for events in (EVENTS, moved)]
    first, second = (UserItemGraph.from_context(context) for context in contexts)
    assert (first.normalised != second.normalised).nnz == 0


def test_normalisation_is_the_formula() -> None:
    graph = UserItemGraph.from_context(context_of(2, 3, (1, 1), (1, 2), (2, 2)))
    dense = np.zeros((5, 5))
    for user, item, degrees in ((0, 2, 2 * 1), (0, 3, 2 * 2), (1, 3, 1 * 2)):
        dense[user, item] = dense[item, user] = degrees**-0.5
    np.testing.assert_allclose(graph.normalised.toarray(), dense, atol=1e-12)
    assert np.abs(np.linalg.eigvalsh(graph.normalised.toarray())).max() <= 1 + 1e-12
    assert not graph.normalised.toarray()[4].any(), "a node without an edge has a row of zeros"


@pytest.mark.parametrize("pair", [(0, 1), (3, 1), (1, 0), (1, 4)])
def test_edges_of_nobody_are_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="that does not exist"):
        UserItemGraph.from_context(DataContext(3, 2, np.zeros(4), np.array([[1, pair[0]], [1, pair[1]]])))


def test_a_graph_without_edges_is_refused() -> None:
    with pytest.raises(DataError, match="no training event"):
        UserItemGraph.from_context(context_of(2, 3))


def test_nearest_items_are_those_of_largest_cosine() -> None:
    angles = np.array([0.0, 0.0, 0.1, 0.3, 1.5, 1.6])  # item 0 is padding
    values = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = np.array([False, True, True, True, True, False])
    found = nearest_items({"text": (values, mask)}, 1).toarray()
    assert {tuple(pair) for pair in np.argwhere(found)} == {(1, 2), (2, 1), (2, 3), (3, 2), (3, 4), (4, 3)}
    assert found[1, 2] == pytest.approx(np.cos(0.1)) and (found == found.T).all()
    assert not found[5].any(), "an item without the level has no neighbour"


def test_levels_are_weighted() -> None:
    rng = np.random.default_rng(0)
    features = {name: (np.abs(rng.standard_normal((7, 3))), np.arange(7) > 0) for name in ("text", "image")}
    both = nearest_items(features, 2, {"text": 0.9, "image": 0.1})
    apart = [nearest_items({name: features[name]}, 2, {name: 1.0}) for name in ("text", "image")]
    np.testing.assert_allclose(both.toarray(), (0.9 * apart[0] + 0.1 * apart[1]).toarray())
    with pytest.raises(RecipeError, match="sound"):
        nearest_items(features, 2, {"sound": 1.0})
    with pytest.raises(RecipeError, match="item_features"):
        nearest_items({}, 2)


def test_neighbours_tie_cold_items_to_the_graph() -> None:
    context = context_of(2, 3, (1, 1), (2, 2))
    features = {"text": (np.array([[0, 0], [1, 0], [0, 1], [1, 0.1]]), np.arange(4) > 0)}
    graph = UserItemGraph.from_context(context)
    tied = graph.with_neighbours(features, 1)
    assert graph.item_degrees[3] == 0 and tied.item_degrees[3] > 0
    assert np.abs(np.linalg.eigvalsh(tied.normalised.toarray())).max() <= 1 + 1e-12
    assert (tied.adjacency[:2, 2:] != graph.adjacency[:2, 2:]).nnz == 0, "user edges stay as they are"


def test_signals_are_centred_unit_rows_of_few_directions() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((30, 8)) * np.array([9, 5, 1, 1, 1, 1, 1, 1]) + 3
    mask = np.arange(30) % 7 > 0
    signal, present = content_signals({"text": (values, mask)}, 2)["text"]
    assert signal.shape == (30, 2) and signal.dtype == np.float32 and (present == mask).all()
    np.testing.assert_allclose(np.linalg.norm(signal, axis=1), mask, atol=1e-6)
    centred = values[mask] - values[mask].mean(0)
    expected = centred[:, :2] / np.linalg.norm(centred[:, :2], axis=1, keepdims=True)
    cosines = np.abs((signal[mask] @ np.linalg.lstsq(signal[mask], expected, rcond=None)[0] * expected).sum(1))
    assert np.median(cosines) > 0.95, "the directions of largest spread are kept"


def test_what_stands_in_the_place_of_a_missing_level_plays_no_part() -> None:
    rng = np.random.default_rng(2)
    values, mask = rng.standard_normal((12, 6)), np.arange(12) % 5 > 0
    garbage = np.where(mask[:, None], values, 1e6)
    for width in (3, 6):
        first, second = (content_signals({"t": (given, mask)}, width)["t"][0] for given in (values, garbage))
        assert (first == second).all()


def test_a_level_nobody_has_is_refused() -> None:
    with pytest.raises(DataError, match="'text'"):
        content_signals({"text": (np.ones((4, 2)), np.zeros(4, dtype=bool))}, 2)
