"""The prefix trie holds the catalogue's codes and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmrec.blocks.trie import PrefixTrie


def catalogue(rows: list[tuple[int, ...]]) -> Tensor:
    """Codes [I+1, M] with the padding row."""
    codes = torch.tensor(rows)
    return torch.cat([torch.full_like(codes[:1], -1), codes])


def drawn(items: int, sizes: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random codes, duplicates included."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, size, (items,), generator=generator) for size in sizes]
    return catalogue(torch.stack(columns, 1).tolist())


def walked(trie: PrefixTrie) -> list[tuple[int, ...]]:
    """All sequences that can be written by following children from the root."""
    found: list[tuple[tuple[int, ...], int]] = [((), 0)]
    for level in range(trie.depth):
        following = []
        for prefix, node in found:
            nodes, codes, real = trie.children(torch.tensor(node), level)
            following += [((*prefix, int(c)), int(n)) for n, c, r in zip(nodes, codes, real, strict=True) if r]
        found = following
    return [code for code, _ in found]


def rejected_or_found(trie: PrefixTrie, codes: Tensor, sizes: tuple[int, ...]) -> None:
    """Every tuple over the alphabets is accepted if and only if an item has it, at every depth."""
    rows = {tuple(row) for row in codes[1:].tolist()}
    for depth in range(len(sizes) + 1):
        every = list(itertools.product(*[range(size) for size in sizes[:depth]]))
        nodes = trie.find(torch.tensor(every, dtype=torch.long).view(len(every), depth))
        prefixes = {row[:depth] for row in rows}
        assert [bool(node >= 0) for node in nodes] == [code in prefixes for code in every]
        assert len(nodes[nodes >= 0].unique()) == len(prefixes)


def test_accepts_every_code_and_rejects_every_other_tuple() -> None:
    sizes = (4, 4, 4)
    codes = drawn(30, sizes)
    rejected_or_found(PrefixTrie.build(codes, sizes), codes, sizes)


def test_csr_and_dense_forms_agree() -> None:
    sizes = (5, 3, 6)
    codes = drawn(40, sizes, seed=1)
    trie = PrefixTrie.build(codes, sizes)
    start = 0
    for level, size in enumerate(sizes):
        prefixes = codes[1:, :level].unique(dim=0) if level else codes[:1, :0]
        dense = torch.zeros(len(prefixes), size, dtype=torch.bool)
        for row, prefix in enumerate(prefixes):
            dense[row, codes[1:][(codes[1:, :level] == prefix).all(1), level]] = True
        nodes = trie.find(prefixes)
        assert nodes.tolist() == list(range(start, start + len(prefixes)))  # level by level, in the order of codes
        assert torch.equal(trie.allowed(nodes, level), dense)
        start += len(prefixes)
    assert start == trie.first_leaf and trie.num_leaves == len(codes[1:].unique(dim=0))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_can_be_written_is_the_set_of_codes(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    row = st.tuples(*[st.integers(0, size - 1) for size in sizes])
    rows = data.draw(st.lists(row, min_size=1, max_size=25))  # duplicates wanted
    trie = PrefixTrie.build(catalogue(rows), sizes)
    assert walked(trie) == sorted(set(rows))
    items, real = trie.items(trie.find(torch.tensor(rows)))
    for row_items, row_real, code in zip(items, real, rows, strict=True):
        assert row_items[row_real].tolist() == [i for i, other in enumerate(rows, start=1) if other == code]
        assert (row_items[~row_real] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_new_items_give_a_larger_trie_that_accepts_both(data: st.DataObject) -> None:
    row = st.tuples(*[st.integers(0, 3)] * 3)
    old, new = data.draw(st.lists(row, min_size=1, max_size=12)), data.draw(st.lists(row, min_size=1, max_size=6))
    before, after = (PrefixTrie.build(catalogue(rows), (4, 4, 4)) for rows in (old, old + new))
    assert set(walked(before)) <= set(walked(after)) == set(old) | set(new)
    for item, code in enumerate(old + new, start=1):
        items, real = after.items(after.find(torch.tensor(code)))
        assert item in items[real].tolist()


def test_one_item() -> None:
    trie = PrefixTrie.build(catalogue([(2, 0, 1)]), (4, 1, 3))
    assert (trie.widths, trie.num_leaves, trie.depth) == ((1, 1, 1), 1, 3)
    rejected_or_found(trie, catalogue([(2, 0, 1)]), (4, 1, 3))
    items, real = trie.items(trie.find(torch.tensor([[2, 0, 1], [2, 0, 2]])))
    assert items.tolist() == [[1], [0]] and real.tolist() == [[True], [False]]


def test_items_of_one_code_follow_their_priority() -> None:
    codes = catalogue([(0, 1), (1, 1), (0, 1), (0, 1)])
    by_id = PrefixTrie.build(codes, (2, 2))
    assert by_id.items(by_id.find(torch.tensor([0, 1])))[0].tolist() == [1, 3, 4]
    popular = PrefixTrie.build(codes, (2, 2), priority=torch.tensor([9.0, 1.0, 5.0, 3.0, 1.0]))
    items, real = popular.items(popular.find(torch.tensor([[0, 1], [1, 1]])))
    assert items.tolist() == [[3, 1, 4], [2, 0, 0]] and real.sum(1).tolist() == [3, 1]


def test_dead_nodes_lead_nowhere() -> None:
    trie = PrefixTrie.build(drawn(10, (3, 3)), (3, 3))
    dead = torch.tensor([-1, -1])
    for level in range(2):
        assert not trie.children(dead, level)[2].any() and not trie.allowed(dead, level).any()
        assert trie.follow(dead, torch.zeros(2, dtype=torch.long), level).tolist() == [-1, -1]
    assert not trie.items(dead)[1].any()
    assert trie.find(torch.tensor([[-1, 0], [0, -1]])).tolist() == [-1, -1]  # padding is no code


def test_any_shape_of_nodes() -> None:
    codes = drawn(30, (4, 4, 4), seed=2)
    trie = PrefixTrie.build(codes, (4, 4, 4))
    prefixes = codes[1:25, :2].view(2, 3, 4, 2)
    nodes = trie.find(prefixes)
    assert nodes.shape == (2, 3, 4)
    assert torch.equal(nodes.flatten(), trie.find(prefixes.view(-1, 2)))
    assert torch.equal(trie.follow(nodes, codes[1:25, 2].view(2, 3, 4), 2), trie.find(codes[1:25]).view(2, 3, 4))
    assert trie.allowed(nodes, 2).shape == (2, 3, 4, 4)


def test_order_of_items_does_not_matter_for_the_nodes() -> None:
    codes = drawn(50, (4, 4, 4), seed=3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)) + 1
    one, other = PrefixTrie.build(codes, (4, 4, 4)), PrefixTrie.build(codes[[0, *order.tolist()]], (4, 4, 4))
    assert torch.equal(one.code, other.code) and torch.equal(one.first_child, other.first_child)
    leaf = torch.repeat_interleave(torch.arange(one.num_leaves), one.leaf_start.diff())
    assert torch.equal(one.leaf_start, other.leaf_start)
    pairs = [torch.stack([leaf, items], 1).unique(dim=0) for items in (one.leaf_items, order[other.leaf_items - 1])]
    assert torch.equal(pairs[0], pairs[1])  # the same items at every leaf


@pytest.mark.parametrize("rows", [[(0, 3)], [(-1, 0)], [(0, 0), (2, 0)]])
def test_codes_outside_their_level_are_refused(rows: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="outside its level"):
        PrefixTrie.build(catalogue(rows), (2, 3))


def test_an_empty_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        PrefixTrie.build(torch.full((1, 2), -1), (2, 2))


def test_a_large_catalogue_needs_no_loop_over_items() -> None:
    codes = drawn(200_000, (256, 256, 256), seed=4)
    trie = PrefixTrie.build(codes, (256, 256, 256))
    chosen = torch.randint(1, 200_001, (500,), generator=torch.Generator().manual_seed(1))
    items, real = trie.items(trie.find(codes[chosen]))
    assert ((items == chosen[:, None]) & real).any(1).all()
    assert len(trie.leaf_items.unique()) == 200_000
