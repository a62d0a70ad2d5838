"""Constrained beam search against exhaustive scoring, brute force and transformers' own beam search.

Two models: `Toy`, whose next logits depend on the row and on all codes before, and a small T5 (`TIGERHead`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitNormalization,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from llmrec.blocks.beam_search import (
    Normaliser,
    alive_nodes,
    beam_search,
    ranked_leaves,
    recommend_codes,
)
from llmrec.blocks.trie import PrefixTrie
from llmrec.heads.tiger import TIGERConfig, TIGERHead, _Speaker
from tests.blocks.test_trie import catalogue, drawn

WIDTH = 8


class Toy:
    """Logits of level l: tanh(row state + code vectors so far) O_l, which counts how often it is asked.

    Args:
        states: [B, WIDTH].
        sizes: Codes per level.
        extra: Further words of the vocabulary, for normaliser "given".
    """

    def __init__(self, states: Tensor, sizes: tuple[int, ...], extra: int = 0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.states, self.sizes, self.extra = states, sizes, extra
        self.codes = [torch.randn(size, WIDTH, generator=generator) for size in sizes]
        self.output = [2 * torch.randn(WIDTH, size + extra, generator=generator) for size in sizes]
        self.calls: list[tuple[int, ...]] = []

    def _logits(self, hidden: Tensor, level: int) -> Tensor:
        logits = torch.tanh(hidden) @ self.output[level]
        return logits.log_softmax(-1)[..., : self.sizes[level]] if self.extra else logits

    def first(self) -> Tensor:
        self.calls.append((len(self.states),))
        self.hidden = self.states[:, None]
        return self._logits(self.states, 0)

    def following(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        self.calls.append(tuple(codes.shape))
        before = self.hidden.gather(1, parents[..., None].expand(-1, -1, WIDTH))
        self.hidden = before + self.codes[level - 1][codes]
        return self._logits(self.hidden, level)

    def exhaustive(self, codes: Tensor, normaliser: Normaliser) -> Tensor:
        """[B, I] scores of all items' codes [I, M], one forward per level over all of them."""
        hidden = self.states[:, None].expand(-1, len(codes), -1)
        total = torch.zeros(hidden.shape[:2])
        for level, size in enumerate(self.sizes):
            logits = self._logits(hidden, level)
            if normaliser == "trie":
                same = (codes[:, None, :level] == codes[None, :, :level]).all(-1)  # items with the same prefix
                legal = (same.float() @ torch.nn.functional.one_hot(codes[:, level], size).float()) > 0
                logits = logits.masked_fill(~legal, float("-inf"))
            log_probs = logits if normaliser == "given" else logits.log_softmax(-1)
            total = total + log_probs.gather(2, codes[None, :, level, None].expand(len(hidden), -1, 1)).squeeze(2)
            hidden = hidden + self.codes[level][codes[:, level]]
        return total


def toy(sizes: tuple[int, ...], rows: int = 3, seed: int = 0, extra: int = 0) -> Toy:
    return Toy(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)), sizes, extra)


def brute_force(scores: Tensor, k: int, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [B, k] and scores by sorting all items; scores [B, I], allowed [B, I]."""
    scores = scores.masked_fill(~allowed, float("-inf"))
    scores = torch.nn.functional.pad(scores, (0, max(0, k - scores.shape[1])), value=float("-inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    best = scores.gather(1, order)
    return (order + 1).masked_fill(torch.isneginf(best), 0), best


@pytest.mark.parametrize("normaliser", ["level", "trie", "given"])
def test_wide_beams_equal_exhaustive_scoring(normaliser: Normaliser) -> None:
    sizes = (5, 4, 6)
    codes = drawn(40, sizes)[1:].unique(dim=0)
    speaker = toy(sizes, extra=9 if normaliser == "given" else 0)
    trie = PrefixTrie.build(catalogue(codes.tolist()), sizes)
    items, scores, valid = recommend_codes(trie, speaker, len(codes), len(codes), normaliser=normaliser)
    wanted, best = brute_force(speaker.exhaustive(codes, normaliser), len(codes), torch.ones(3, len(codes)).bool())
    assert torch.equal(items, wanted) and valid.all()
    torch.testing.assert_close(scores, best, rtol=1e-5, atol=1e-5)
    if normaliser == "trie":
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))  # legal codes share the whole probability


@pytest.mark.parametrize("beams", [1, 2, 5, 9, [3, 7, 4], [1, 8, 2]])
def test_narrow_beams_equal_a_search_written_with_lists(beams: int | list[int]) -> None:
    sizes = (5, 4, 6)
    codes = drawn(60, sizes, seed=2)[1:]
    speaker = toy(sizes)
    trie = PrefixTrie.build(catalogue(codes.tolist()), sizes)
    found = beam_search(trie, speaker, beams)
    widths = [beams] * 3 if isinstance(beams, int) else beams
    for row, state in enumerate(speaker.states):
        live: list[tuple[tuple[int, ...], float, Tensor]] = [((), 0.0, state)]
        for level, width in enumerate(widths):
            grown = []
            for prefix, score, hidden in live:
                log_probs = speaker._logits(hidden, level).log_softmax(-1)
                legal = codes[(codes[:, :level] == torch.tensor(prefix, dtype=torch.long)).all(1), level].unique()
                for code in legal.tolist():
                    grown.append(((*prefix, code), score + float(log_probs[code]), hidden + speaker.codes[level][code]))
            live = sorted(grown, key=lambda beam: -beam[1])[:width]
            if level == 0:
                firsts = [prefix for prefix, _, _ in live]
        assert found.leaves[row].tolist() == trie.find(torch.tensor([prefix for prefix, _, _ in live])).tolist()
        assert found.first_nodes[row].tolist() == trie.find(torch.tensor(firsts)).tolist()
        torch.testing.assert_close(found.scores[row], torch.tensor([s for _, s, _ in live]), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_illegal_and_no_duplicate_codes(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    row = st.tuples(*[st.integers(0, size - 1) for size in sizes])
    rows = data.draw(st.lists(row, min_size=1, max_size=20))
    beams = data.draw(st.integers(1, 30))  # often more than first codes, and than codes at all
    trie = PrefixTrie.build(catalogue(rows), sizes)
    found = beam_search(trie, toy(sizes, seed=data.draw(st.integers(0, 9))), beams)
    for leaves, scores in zip(found.leaves, found.scores, strict=True):
        live = leaves[leaves >= 0]
        assert len(live.unique()) == len(live) and (live >= trie.first_leaf).all()
        assert torch.equal(torch.isfinite(scores), leaves >= 0)
        assert (scores[1:] <= scores[:-1]).all()
        if beams >= len(set(rows)):
            assert len(live) == len(set(rows))


def test_dead_beams_never_wake_up() -> None:
    # Two first codes for five beams; the first has one item, so that at level 1 only three beams live.
    trie = PrefixTrie.build(catalogue([(0, 0, 0), (1, 0, 0), (1, 2, 0)]), (2, 3, 1))
    speaker = toy((2, 3, 1))
    found = beam_search(trie, speaker, 5)
    assert (found.leaves >= 0).sum(1).tolist() == [3, 3, 3]
    assert found.first_nodes.shape == (3, 2) and speaker.calls == [
        (3,),
        (3, 2),
        (3, 4),
    ]  # two nodes with two children at most
    items, scores, valid = ranked_leaves(trie, found, 5)
    assert valid.sum(1).tolist() == [3, 3, 3] and (items[:, 3:] == 0).all() and torch.isneginf(scores[:, 3:]).all()
    assert items[:, :3].sort(1).values.tolist() == [[1, 2, 3]] * 3


def test_a_catalogue_of_one_item() -> None:
    trie = PrefixTrie.build(catalogue([(1, 0, 2)]), (3, 1, 4))
    speaker = toy((3, 1, 4))
    items, scores, valid = recommend_codes(trie, speaker, 3, 10)
    assert items.tolist() == [[1, 0, 0]] * 3 and valid.tolist() == [[True, False, False]] * 3
    wanted = speaker.exhaustive(torch.tensor([[1, 0, 2]]), "level")
    torch.testing.assert_close(scores[:, :1], wanted, rtol=1e-5, atol=1e-5)
    assert recommend_codes(trie, speaker, 2, 2, seen=torch.ones(3, 1, dtype=torch.long))[2].sum() == 0


def test_items_that_share_a_code_stand_together_in_order_of_popularity() -> None:
    rows = [(0, 0), (1, 1), (0, 0), (1, 0), (0, 0)]
    trie = PrefixTrie.build(catalogue(rows), (2, 2), priority=torch.tensor([0.0, 1, 9, 5, 2, 3]))
    items, scores, valid = recommend_codes(trie, toy((2, 2)), 9, 4)
    for row_items, row_scores in zip(items, scores, strict=True):
        ids = row_items.tolist()
        assert Counter(ids) == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 0: 4}
        place = ids.index(3)
        assert ids[place : place + 3] == [3, 5, 1] and row_scores[place : place + 3].unique().numel() == 1
    assert valid.sum(1).tolist() == [5, 5, 5]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_seen_items_and_candidates_equal_brute_force(data: st.DataObject) -> None:
    sizes, count = (4, 3, 4), data.draw(st.integers(1, 20))
    codes = drawn(count, sizes, seed=data.draw(st.integers(0, 99)))  # duplicates included
    ids = st.lists(st.lists(st.integers(0, count), min_size=4, max_size=4), min_size=3, max_size=3)
    seen = data.draw(st.one_of(st.none(), ids.map(torch.tensor)))
    candidates = data.draw(st.one_of(st.none(), ids.map(torch.tensor)))
    trie = PrefixTrie.build(codes, sizes)
    allowed = torch.zeros(3, count, dtype=torch.bool)
    for row in range(3):
        for item in range(1, count + 1):
            kept = candidates is None or item in candidates[row].tolist()
            allowed[row, item - 1] = kept and (seen is None or item not in seen[row].tolist())
    speaker = toy(sizes)
    items, scores, valid = recommend_codes(trie, speaker, count, count, seen=seen, candidates=candidates)
    wanted, best = brute_force(speaker.exhaustive(codes[1:], "level"), count, allowed)
    torch.testing.assert_close(scores, best, rtol=1e-5, atol=1e-5)
    assert torch.equal(valid, torch.isfinite(best))
    assert [set(row) for row in items.tolist()] == [set(row) for row in wanted.tolist()]  # ties may change places
    alive = alive_nodes(trie, seen, candidates)
    assert (alive is None) == (seen is None and candidates is None)
    if alive is not None:
        for depth in range(4):
            for row in range(3):
                left = {tuple(code) for code in codes[1:][allowed[row], :depth].tolist()}
                every = codes[1:, :depth].unique(dim=0) if depth else codes[:1, :0]
                nodes = trie.find(every)
                assert alive[row, nodes].tolist() == [tuple(code) in left for code in every.tolist()]


def test_seen_items_take_no_beams() -> None:
    sizes = (4, 4, 4)
    codes = drawn(50, sizes, seed=5)[1:].unique(dim=0)
    trie, speaker = PrefixTrie.build(catalogue(codes.tolist()), sizes), toy(sizes)
    best = speaker.exhaustive(codes, "level").argsort(1, descending=True) + 1
    seen = best[:, :-2]  # all but the two items the model likes least
    items, _, valid = recommend_codes(trie, speaker, 2, 2, seen=seen)
    assert valid.all() and torch.equal(items, best[:, -2:])


def test_rows_do_not_depend_on_their_batch() -> None:
    sizes = (4, 4, 4)
    codes = drawn(50, sizes, seed=6)
    trie = PrefixTrie.build(codes, sizes)
    states, seen = torch.randn(6, WIDTH), torch.randint(0, 51, (6, 5))
    whole = recommend_codes(trie, Toy(states, sizes), 10, 6, seen=seen)
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    moved = recommend_codes(trie, Toy(states[order], sizes), 10, 6, seen=seen[order])
    alone = [recommend_codes(trie, Toy(states[i : i + 1], sizes), 10, 6, seen=seen[i : i + 1]) for i in range(6)]
    for part in range(3):
        torch.testing.assert_close(moved[part], whole[part][order])
        torch.testing.assert_close(torch.cat([found[part] for found in alone]), whole[part])


@pytest.mark.parametrize("levels", [2, 3, 5])
@pytest.mark.parametrize("beams", [4, 8])
def test_calls_grow_with_levels_and_beams_and_not_with_items(levels: int, beams: int) -> None:
    sizes = (8,) * levels
    calls = []
    for items in (1_000, 20_000):
        speaker = toy(sizes)
        beam_search(PrefixTrie.build(drawn(items, sizes), sizes), speaker, beams)
        calls.append(speaker.calls)
    assert calls[0] == calls[1] == [(3,)] + [(3, beams)] * (levels - 1)


@pytest.mark.parametrize("beams", [0, [2, 2], [2, 0, 2], []])
def test_other_widths_are_refused(beams: Any) -> None:
    with pytest.raises(ValueError, match="expected a positive number or one for each of 3 levels"):
        beam_search(PrefixTrie.build(drawn(9, (3, 3, 3)), (3, 3, 3)), toy((3, 3, 3)), beams)


# A T5 ----------------------------------------------------------------------------------------------------------------

ITEMS, SIZES = 30, (5, 4, 6)
VARIANTS: dict[str, dict[str, Any]] = {
    "level": {},
    "vocabulary": {"output": "vocabulary"},
    "cofirec": {"level_embeddings": True, "item_positions": True},
}


def head(**options: Any) -> TIGERHead:
    torch.manual_seed(0)
    config = TIGERConfig(
        num_items=ITEMS, max_history=6, hidden_size=32, num_layers=1, num_heads=2, d_kv=16, d_ff=64, dropout=0.0,
        level_sizes=list(SIZES), **options,
    )  # fmt: skip
    made = TIGERHead(config).eval()
    made.codes.copy_(drawn(ITEMS, SIZES, seed=1))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)  # fresh weights give nearly equal scores
    return made


def batch(width: int = 6) -> Any:
    lengths = torch.tensor([6, 1, 4])
    items = torch.randint(1, ITEMS + 1, (3, 6), generator=torch.Generator().manual_seed(0))
    items = items * (torch.arange(6) < lengths[:, None])
    return {"item_ids": torch.nn.functional.pad(items, (0, width - 6)), "lengths": lengths}


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("beams", [ITEMS, 3 * ITEMS])
def test_t5_with_wide_beams_equals_scoring_every_item(name: str, beams: int) -> None:
    model, given_batch = head(**VARIANTS[name]), batch()
    exact = model.score_candidates({**given_batch, "candidates": torch.arange(1, ITEMS + 1).expand(3, -1)})
    ranking = model.recommend(given_batch, ITEMS, beams=beams)
    assert ranking.valid.all() and (exact.max(1).values - exact.min(1).values > 1).all()
    torch.testing.assert_close(ranking.scores, exact.sort(1, descending=True).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranking.scores, exact.gather(1, ranking.item_ids - 1), rtol=1e-5, atol=1e-5)
    assert (ranking.item_ids.sort(1).values == torch.arange(1, ITEMS + 1)).all()


def test_t5_with_codes_of_one_level() -> None:
    config = TIGERConfig(num_items=4, max_history=6, hidden_size=16, num_layers=1, num_heads=2, level_sizes=[6])
    model = TIGERHead(config).eval()
    model.codes.copy_(torch.tensor([[-1], [5], [0], [3], [2]]))
    items = {"item_ids": torch.tensor([[1, 2], [3, 0]]), "lengths": torch.tensor([2, 1])}
    exact = model.score_candidates({**items, "candidates": torch.arange(1, 5).expand(2, -1)})  # type: ignore[typeddict-item]
    ranking = model.recommend(items, 4)  # type: ignore[arg-type]
    torch.testing.assert_close(ranking.scores, exact.gather(1, ranking.item_ids - 1), rtol=1e-5, atol=1e-5)


class Uncached:
    """Writes the same codes by running the whole decoder on every prefix again."""

    def __init__(self, model: TIGERHead, given_batch: Any) -> None:
        self.model, (self.states, self.mask) = model, model.read(given_batch)

    def first(self) -> Tensor:
        self.prefixes = torch.zeros(len(self.states), 1, 0, dtype=torch.long)
        return self._logits(0)[:, 0]

    def following(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        index = parents[..., None].expand(-1, -1, self.prefixes.shape[2])
        self.prefixes = torch.cat([self.prefixes.gather(1, index), codes[..., None]], 2)
        return self._logits(level)

    def _logits(self, level: int) -> Tensor:
        rows, beams, _ = self.prefixes.shape
        whole = torch.nn.functional.pad(self.prefixes.flatten(0, 1), (0, len(SIZES) - level))  # later codes: not read
        hidden = self.model._teacher_forced(
            self.states.repeat_interleave(beams, 0), self.mask.repeat_interleave(beams, 0), whole
        )
        return self.model.logits(hidden[:, level], level).view(rows, beams, -1)


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("beams", [4, [2, 7, 3], [5, 5, 5]])
@torch.no_grad()
def test_t5_cached_equals_uncached(name: str, beams: int | list[int]) -> None:
    model, given_batch = head(**VARIANTS[name]), batch()
    cached = beam_search(model.trie, _Speaker(model, *model.read(given_batch)), beams, normaliser=model.normaliser)
    again = beam_search(model.trie, Uncached(model, given_batch), beams, normaliser=model.normaliser)
    assert torch.equal(cached.leaves, again.leaves) and torch.equal(cached.first_nodes, again.first_nodes)
    torch.testing.assert_close(cached.scores, again.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_t5_does_not_depend_on_batch_or_padding(name: str) -> None:
    model, given_batch = head(**VARIANTS[name]), batch()
    whole = model.recommend(given_batch, 8, beams=5)
    for row in range(3):
        length = int(given_batch["lengths"][row])
        alone = {"item_ids": given_batch["item_ids"][row : row + 1, :length], "lengths": given_batch["lengths"][[row]]}
        own = model.recommend(alone, 8, beams=5)
        assert torch.equal(own.item_ids[0], whole.item_ids[row])
        torch.testing.assert_close(own.scores[0], whole.scores[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3, ITEMS])
@torch.no_grad()
def test_t5_equals_generate_of_transformers(beams: int) -> None:
    from llmrec.llm.constrained import TrieLogitsProcessor

    model, given_batch = head(output="vocabulary"), batch()
    states, mask = model.read(given_batch)
    reference = T5ForConditionalGeneration(model.transformer.config).eval()
    reference.load_state_dict(model.transformer.state_dict(), strict=False)
    reference.tie_weights()
    tokens = [torch.arange(size) + offset for size, offset in zip(SIZES, model.config.offsets, strict=True)]
    processors = [
        SuppressTokensLogitsProcessor([0, 1]),
        LogitNormalization(),
        TrieLogitsProcessor(model.trie, tokens, 1),
    ]
    found = reference.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=mask.long(),
        logits_processor=LogitsProcessorList(processors),
        generation_config=GenerationConfig(
            do_sample=False, num_beams=beams, num_return_sequences=beams, max_new_tokens=3, length_penalty=0.0,
            decoder_start_token_id=1, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        ),
    )  # fmt: skip
    codes = (found.sequences[:, 1:] - torch.tensor(model.config.offsets)).view(3, beams, 3)
    ours = beam_search(model.trie, _Speaker(model, states, mask), beams, normaliser="given")
    for row in range(3):
        live = ours.leaves[row] >= 0
        assert ours.leaves[row][live].tolist() == model.trie.find(codes[row])[: int(live.sum())].tolist()
        if beams > 1:  # greedy decoding of transformers gives no scores of sequences
            theirs = found.sequences_scores.view(3, beams)[row][: int(live.sum())]
            torch.testing.assert_close(ours.scores[row][live], theirs, rtol=1e-5, atol=1e-5)
