from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmrec.blocks.beam_search import beam_search, recommend_codes
from llmrec.data.schema import DataContext, ItemFeatures, SequenceBatch
from llmrec.errors import DataError, RecipeError
from llmrec.heads.cobra import COBRAConfig, COBRAHead, _Speaker, beam_fusion
from llmrec.item_tokenizers.base import ItemTokenizer
from tests.contracts.heads import ITEMS, GenerativeHeadContract, SpelledTokenizer, cyclic_context, longer

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64, "dropout": 0.0, "beams": 12, "neighbours": 12,
}  # fmt: skip


def words(num_items: int) -> ItemFeatures:
    """Two to four token ids a text, another text for every item; item 1 has none."""
    values = np.zeros((num_items + 1, 4), dtype=np.float32)
    for item in range(2, num_items + 1):
        values[item] = [100 + item, 200 + item % 3, (item % 2) * 300, (item % 2) * 301]
    return {"text_tokens": (values, values.any(1))}


def vectors(num_items: int) -> ItemFeatures:
    """Random vectors of sixteen values."""
    values = np.random.default_rng(0).normal(size=(num_items + 1, 16)).astype(np.float32)
    return {"text": (values, np.arange(num_items + 1) > 0)}


def tokenizer_of(codes: list[list[int]], sizes: tuple[int, ...]) -> ItemTokenizer:
    """A tokenizer with given codes of items 1.., which need not be unique."""
    tokenizer = SpelledTokenizer()
    tokenizer.codes = torch.tensor([[-1] * len(sizes), *codes])
    tokenizer.level_sizes, tokenizer.unique = sizes, len({tuple(code) for code in codes}) == len(codes)
    return tokenizer


def buckets(num_items: int) -> ItemTokenizer:
    """Codes of two levels that about three items share."""
    return tokenizer_of([[item % 3, item * 7 % 4] for item in range(num_items)], (3, 4))


def head_of(
    tokenizer: ItemTokenizer, features: Callable[[int], ItemFeatures] = words, spread: float = 3.0, **options: Any
) -> COBRAHead:
    """A random head whose outputs are spread wide enough to tell apart."""
    torch.manual_seed(0)
    num_items = len(tokenizer.codes) - 1
    config = COBRAConfig(num_items=num_items, **{**SMALL, "beams": 200, "neighbours": 200, **options})
    context = replace(cyclic_context(num_items), item_features=features(num_items))
    head = COBRAHead.from_context(config, context, tokenizer).eval()
    with torch.no_grad():
        for output in head.code_outputs:
            output.weight.mul_(spread)
    return head


def batch_of(rows: list[list[int]], targets: list[list[int]] | None = None) -> SequenceBatch:
    """Right padded histories."""
    width = max(map(len, rows))
    batch = {
        "item_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "lengths": torch.tensor([len(row) for row in rows]),
    }
    if targets is not None:
        batch["targets"] = torch.tensor([row + [0] * (width - len(row)) for row in targets])
    return batch  # type: ignore[return-value]


@torch.no_grad()
def written_out(head: COBRAHead, history: list[int]) -> tuple[Tensor, Tensor]:
    """phi of each item's code [I] and cos(v^, v) of each item [I]: one sequence per item, no cache, no padding."""
    items = torch.arange(1, head.config.num_items + 1)
    sequences = torch.cat([torch.tensor(history).expand(len(items), -1), items[:, None]], 1)
    states = head.predictions(head.decode(head.embed(sequences, head.encode(sequences.flatten()).unflatten(
        0, sequences.shape
    ))[:, :-1]))[:, -1]  # fmt: skip
    phi = sum(
        head.code_logits(states[:, level], level).log_softmax(-1).gather(1, head.codes[items, level, None]).squeeze(1)
        for level in range(head.config.depth)
    )
    return phi, (head.dense_vectors(states[:, -1]) * F.normalize(head.encode(items), dim=-1)).sum(-1)  # type: ignore


def bucket_of(head: COBRAHead) -> list[tuple[int, ...]]:
    return [tuple(code) for code in head.codes.tolist()]


class COBRAContract(GenerativeHeadContract):
    head_class = COBRAHead
    options: ClassVar[dict[str, Any]] = SMALL
    overfit_steps, overfit_learning_rate = 80, 2e-3  # tokens of texts start small: larger steps merge items

    def context(self) -> DataContext:
        return replace(cyclic_context(), item_features=words(ITEMS))


class TestCOBRA(COBRAContract):
    """Unique codes, light encoder."""


class TestCOBRAWithSharedCodes(COBRAContract):
    options: ClassVar[dict[str, Any]] = {**SMALL, "dense_softmax": "cluster"}

    def tokenizer(self) -> ItemTokenizer:
        return buckets(ITEMS)

    def context(self) -> DataContext:
        return replace(cyclic_context(), item_features=vectors(ITEMS))


class TestSparseOnly(COBRAContract):
    options: ClassVar[dict[str, Any]] = {**SMALL, "mode": "sparse"}

    def context(self) -> DataContext:
        return cyclic_context()


class TestDenseOnly(COBRAContract):
    options: ClassVar[dict[str, Any]] = {**SMALL, "mode": "dense"}


# The properties of the method card, by number -------------------------------------------------------------------------


def test_1_causality() -> None:
    head, items = head_of(buckets(20)), torch.tensor([[3, 5, 7, 2]])

    def predictions() -> Tensor:
        with torch.no_grad():
            table = head.encode(items.flatten()).unflatten(0, items.shape)
            return head.predictions(head.decode(head.embed(items, table)[:, :-1]))[0]  # [3, 3, D]

    before = predictions()
    for level in range(2):
        kept = head.codes[7, level].clone()
        head.codes[7, level] = (kept + 1) % 3
        after = predictions()
        changed = (after != before).any(-1)
        # Item 7 is predicted by row 1: entry j has read j of its codes.
        assert not changed[0].any() and not changed[1, : level + 1].any()
        assert changed[1, level + 1 :].all() and changed[2].all()
        head.codes[7, level] = kept
    head.text_ids[7] = head.text_ids[8]
    changed = (predictions() != before).any(-1)
    assert not changed[:2].any() and changed[2].all()


def test_2_the_vector_depends_on_its_code_and_on_nothing_later() -> None:
    head, items = head_of(buckets(20)), torch.tensor([[3, 5, 7, 2]])
    x = head.embed(items, head.encode(items.flatten()).unflatten(0, items.shape)).detach().requires_grad_()
    predicted = head.dense_vectors(head.predictions(head.decode(x[:, :-1]))[0, 1, -1])  # of item 7, tokens 6 and 7
    predicted[0].backward()
    assert x.grad is not None
    assert (x.grad[0, :8].abs().amax(-1) > 0).all() and not x.grad[0, 8:].any()


def test_3_psi_0_ties_inside_a_code_and_leaves_the_order_of_codes() -> None:
    head, batch = head_of(buckets(20), psi=0.0, dense_softmax="cluster"), batch_of([[3, 5, 7]])
    found = head.recommend(batch, 20)
    per_item = dict(zip(found.item_ids[0].tolist(), found.scores[0].tolist(), strict=True))
    code = bucket_of(head)
    groups: dict[tuple[int, ...], set[float]] = {}
    for item, score in per_item.items():
        groups.setdefault(code[item], set()).add(round(score, 5))
    assert len(per_item) == 20 and any(code.count(key) > 1 for key in groups)
    assert all(len(scores) == 1 for scores in groups.values())
    # Sparse generation: Phi x (items of the code) is softmax(tau phi).
    phi, _ = written_out(head, [3, 5, 7])
    counts = torch.tensor([float(code.count(code[item])) for item in range(1, 21)])
    found_phi = torch.tensor([per_item[item] for item in range(1, 21)]) + counts.log()
    torch.testing.assert_close(found_phi - found_phi[0], 0.9 * (phi - phi[0]), atol=1e-4, rtol=1e-4)


def test_3_tau_0_ranks_by_cosines_only() -> None:
    head, batch = head_of(buckets(20), tau=0.0, dense_softmax="global"), batch_of([[3, 5, 7]])
    _, cosines = written_out(head, [3, 5, 7])
    found = head.recommend(batch, 20)
    assert found.item_ids[0].tolist() == (cosines.argsort(descending=True) + 1).tolist()
    with torch.no_grad():
        head.code_outputs[0].weight.neg_()
    assert torch.equal(head.recommend(batch, 20).item_ids, found.item_ids)


def test_3_a_large_tau_takes_the_best_code_until_its_items_run_out() -> None:
    head, batch = head_of(buckets(20), tau=1e4), batch_of([[3, 5, 7]])
    phi, cosines = written_out(head, [3, 5, 7])
    expected = sorted(range(20), key=lambda item: (-round(float(phi[item]), 4), -float(cosines[item])))
    assert head.recommend(batch, 20).item_ids[0].tolist() == [item + 1 for item in expected]
    head.config.mode = "no_fusion"  # the same order by definition
    found = head.recommend(batch, 20)
    assert found.item_ids[0].tolist() == [item + 1 for item in expected]
    assert (found.scores[0, :-1] >= found.scores[0, 1:]).all()


def test_4_unique_codes_with_one_neighbour_are_beam_search() -> None:
    head = head_of(SpelledTokenizer().spell(14), neighbours=1, dense_softmax="cluster")
    batch = batch_of([[3, 5, 7], [1], [12, 2]])
    expected = recommend_codes(head.trie, _Speaker(head, head._read(batch)), 14, 200)
    found = head.recommend(batch, 14)
    assert torch.equal(found.item_ids, expected[0]) and found.valid.all()
    torch.testing.assert_close(found.scores, (0.9 * expected[1]).log_softmax(-1))


def test_5_one_code_is_dense_retrieval() -> None:
    head = head_of(tokenizer_of([[0]] * 9, (1,)))
    batch = batch_of([[3, 5], [8, 1]], [[5, 2], [1, 4]])
    output = head(batch)
    assert float(output.parts["sparse"]) == 0.0 and float(output.parts["dense"]) > 0
    found = head.recommend(batch, 9)
    for row, history in enumerate(([3, 5], [8, 1])):
        _, cosines = written_out(head, history)
        assert found.item_ids[row].tolist() == (cosines.argsort(descending=True) + 1).tolist()


@pytest.mark.parametrize(("beams", "neighbours"), [(3, 1), (2, 5), (40, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_6_items_are_of_the_catalogue_once_and_of_their_code(seed: int, beams: int, neighbours: int) -> None:
    draw = np.random.default_rng(seed)
    codes = np.stack([draw.integers(0, 4, 30), draw.integers(0, 5, 30)], 1).tolist()
    head = head_of(tokenizer_of(codes, (4, 5)), beams=beams, neighbours=neighbours)
    batch = batch_of([draw.integers(1, 31, 4).tolist() for _ in range(3)])
    found = head.recommend(batch, 8)
    assert found.valid.all() and (found.scores[:, :-1] >= found.scores[:, 1:]).all()
    for row in found.item_ids.tolist():
        assert len(set(row)) == 8 and set(row) <= set(range(1, 31))
    speaker = _Speaker(head, head._read(batch))
    leaves = beam_search(head.trie, speaker, beams).leaves
    items, cosines = head._neighbours(speaker, leaves, None)
    for row_items, row_leaves in zip(items.tolist(), leaves.tolist(), strict=True):
        for inside, leaf in zip(row_items, row_leaves, strict=True):
            assert all(int(head.trie.find(head.codes[item])) == leaf for item in inside if item)
    assert torch.equal(items > 0, torch.isfinite(cosines))


@pytest.mark.parametrize("features", [words, vectors])
@pytest.mark.parametrize("detached", [False, True])
def test_7_paths_of_the_encoders_gradient(
    detached: bool, features: Callable[[int], ItemFeatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = head_of(buckets(12), features, detach_dense_target=detached).train()
    kept: list[Tensor] = []

    def encode(item_ids: Tensor) -> Tensor:
        kept.append(COBRAHead.encode(head, item_ids))
        kept[0].retain_grad()
        return kept[0]

    monkeypatch.setattr(head, "encode", encode)
    monkeypatch.setattr(head, "sparse_loss", lambda states, items: torch.zeros(()))
    head(batch_of([[2], [5]], [[7], [9]])).loss.backward()
    grad = kept[0].grad  # of items 2, 5, 7, 9
    assert grad is not None and grad[:2].any(1).all(), "no gradient through the histories"
    assert grad[2:].any(1).tolist() == [not detached] * 2, "targets"
    assert any(p.grad is not None and p.grad.any() for p in head.encoder.parameters())


@pytest.mark.parametrize("domain", ["cluster", "global"])
def test_8_cached_decoding_equals_whole_sequences(domain: str) -> None:
    head = head_of(buckets(25), num_layers=2, dense_softmax=domain)
    draw = np.random.default_rng(1)
    rows = [draw.integers(1, 26, length).tolist() for length in draw.permutation(20) + 1]
    batch = batch_of(rows)
    found = head.recommend(batch, 25)
    assert found.valid.all()
    for row, history in enumerate(rows):
        phi, cosines = written_out(head, history)
        _, first, code = np.unique(head.codes[1:].numpy(), axis=0, return_index=True, return_inverse=True)
        one_code = torch.as_tensor(code[:, None] == code if domain == "cluster" else np.ones((25, 25), dtype=bool))
        rivals = torch.where(one_code, 16 * cosines, -torch.inf).logsumexp(1)
        expected = 0.9 * phi - (0.9 * phi[first]).logsumexp(0) + 16 * cosines - rivals  # each code counts once
        torch.testing.assert_close(found.scores[row], expected[found.item_ids[row] - 1], atol=1e-5, rtol=1e-5)
        assert (expected.argsort(descending=True) + 1).tolist() == found.item_ids[row].tolist()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = head.recommend(longer({name: value[order] for name, value in batch.items()}), 25)  # type: ignore
    assert torch.equal(shuffled.item_ids, found.item_ids[order])
    torch.testing.assert_close(shuffled.scores, found.scores[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [2, 4])
def test_8_narrow_beams_continue_their_own_parents(beams: int) -> None:
    """The vector of each finished beam is that of its code, whatever order the beams came in."""
    tokenizer = tokenizer_of(np.random.default_rng(3).integers(0, 3, (30, 3)).tolist(), (3, 3, 3))
    head, rows = head_of(tokenizer), [[3, 5, 7], [11], [28, 2, 9, 9]]
    speaker = _Speaker(head, head._read(batch_of(rows)))
    items, cosines = head._neighbours(speaker, beam_search(head.trie, speaker, beams).leaves, None)
    for row, history in enumerate(rows):
        _, expected = written_out(head, history)
        real = items[row] > 0
        torch.testing.assert_close(cosines[row][real], expected[items[row][real] - 1], atol=1e-5, rtol=1e-5)


def test_9_in_batch_loss() -> None:
    head = head_of(buckets(12))
    assert float(head(batch_of([[2]], [[7]])).parts["dense"]) == 0.0
    rows, targets = [[2, 3], [5, 6], [9, 2]], [[3, 4], [6, 7], [2, 11]]
    once, twice = head(batch_of(rows, targets)), head(batch_of(rows * 2, targets * 2))
    assert float(once.parts["dense"]) > 0 and (once.count, twice.count) == (6, 12)
    torch.testing.assert_close(twice.loss, once.loss)
    # One target on several rows is no negative of itself.
    assert float(head(batch_of([[2], [5], [9]], [[7], [7], [7]])).parts["dense"]) == 0.0


def test_10_both_halves_are_needed() -> None:
    """Eight buckets of sixteen items: the next item lies in the next bucket and has the most similar text."""
    draw = np.random.default_rng(0)
    kinds = draw.normal(size=(16, 12))
    text = np.zeros((129, 12), dtype=np.float32)
    text[1:] = (kinds[None] + 0.1 * draw.normal(size=(8, 16, 12))).reshape(128, 12)
    bucket = np.repeat(np.arange(8), 16)
    unit = text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-9)
    following = np.zeros(129, dtype=np.int64)
    for item in range(1, 129):
        inside = np.flatnonzero(bucket == (3 * bucket[item - 1] + 1) % 8) + 1
        following[item] = inside[np.argmax(unit[inside] @ unit[item])]
    context = replace(cyclic_context(128), item_features={"text": (text, np.arange(129) > 0)})
    tokenizer = tokenizer_of(bucket[:, None].tolist(), (8,))
    recall = {}
    for mode in ("full", "dense", "sparse"):
        torch.manual_seed(0)
        options = {**SMALL, "hidden_size": 32, "max_history": 2, "mode": mode}
        head = COBRAHead.from_context(COBRAConfig(num_items=128, **options), context, tokenizer).train()
        optimiser = torch.optim.AdamW(head.parameters(), 5e-3)
        for _ in range(150):
            first = torch.from_numpy(draw.integers(1, 97, 64))  # the last two buckets are never the first of a walk
            walk = torch.stack([first, torch.from_numpy(following)[first]], 1)
            batch = {"item_ids": walk, "lengths": torch.full((64,), 2), "targets": torch.from_numpy(following)[walk]}
            optimiser.zero_grad()
            head(batch).loss.backward()
            optimiser.step()
        asked = torch.arange(1, 129)[:, None]
        found = head.eval().recommend({"item_ids": asked, "lengths": torch.ones(128, dtype=torch.long)}, 1)
        recall[mode] = float((found.item_ids[:, 0] == torch.from_numpy(following)[1:]).float().mean())
    assert recall["full"] > recall["dense"] + 0.2 and recall["full"] > recall["sparse"] + 0.2, recall


# Edges ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "dense", "sparse", "no_fusion"])
def test_a_catalogue_of_one_item(mode: str) -> None:
    head = head_of(tokenizer_of([[0, 0]], (4, 4)), mode=mode)
    assert torch.isfinite(head(batch_of([[1]], [[1]])).loss)
    found = head.recommend(batch_of([[1], [1, 1]]), 3)
    assert found.item_ids.tolist() == [[1, 0, 0]] * 2 and found.valid.tolist() == [[True, False, False]] * 2
    nothing = head.recommend({**batch_of([[1]]), "seen": torch.tensor([[1]])}, 2)
    assert not nothing.valid.any() and torch.isneginf(nothing.scores).all()


def test_a_beam_wider_than_the_catalogue_finds_all_of_it_for_one_event() -> None:
    head = head_of(buckets(12))
    found = head.recommend(batch_of([[4]]), 20, beams=5000)
    assert sorted(found.item_ids[0].tolist()) == [0] * 8 + list(range(1, 13))


@pytest.mark.parametrize("domain", ["global", "cluster"])
def test_more_items_than_the_union_holds_are_filled_up_behind_it(domain: str) -> None:
    tokenizer = tokenizer_of([[item % 3] for item in range(12)], (3,))
    few = head_of(tokenizer, neighbours=1, dense_softmax=domain).recommend(batch_of([[4, 2]]), 3)
    all_of_them = head_of(tokenizer, neighbours=1, dense_softmax=domain).recommend(batch_of([[4, 2]]), 12)
    assert sorted(item % 3 for item in few.item_ids[0].tolist()) == [0, 1, 2], "one item of each code"
    assert all_of_them.item_ids[0, :3].tolist() == few.item_ids[0].tolist()
    assert sorted(all_of_them.item_ids[0].tolist()) == list(range(1, 13))
    assert (all_of_them.scores[0, :-1] >= all_of_them.scores[0, 1:]).all()


def test_padding_of_the_batch_is_not_supervised() -> None:
    head = head_of(buckets(12))
    alone = [head(batch_of([row], [target])) for row, target in (([2, 3, 4], [3, 4, 5]), ([9], [10]))]
    both = head(batch_of([[2, 3, 4], [9]], [[3, 4, 5], [10]]))
    assert both.count == 4
    expected = (3 * alone[0].parts["sparse"] + alone[1].parts["sparse"]) / 4
    torch.testing.assert_close(both.parts["sparse"], expected)


def test_scores_of_candidates_are_those_of_the_ranking() -> None:
    head = head_of(buckets(12), neighbours=1, beams=1, dense_softmax="global")
    candidates = torch.tensor([[2, 5, 8, 11, 0], [1, 4, 7, 10, 12]])
    batch = {**batch_of([[3, 5], [7]]), "candidates": candidates}
    scores, found = head.score_candidates(batch), head.recommend(batch, 5)
    assert torch.isneginf(scores).tolist() == (candidates == 0).tolist()
    order = scores.argsort(1, descending=True)
    assert torch.equal(candidates.gather(1, order), found.item_ids)
    for row, history in enumerate(([3, 5], [7])):
        phi, cosines = written_out(head, history)
        expected = 0.9 * phi + 16 * cosines
        real = candidates[row][candidates[row] > 0]
        wanted = expected[real - 1] - expected[real[0] - 1]
        torch.testing.assert_close(scores[row, : len(real)] - scores[row, 0], wanted, atol=1e-4, rtol=1e-4)


def test_vectors_follow_an_optimizer_that_leaves_no_trace() -> None:
    """Fused kernels do not count their changes; training in between is what tells."""
    head = head_of(buckets(12)).eval()
    before = head.catalogue()[0]
    head.train()
    optimiser = torch.optim.AdamW(head.parameters(), 0.1, fused=True)
    head(batch_of([[2, 3]], [[3, 4]])).loss.backward()
    optimiser.step()
    head.eval()
    assert not torch.equal(head.catalogue()[0], before)
    torch.testing.assert_close(head.catalogue()[0], head.encode(torch.arange(13)))


def test_vectors_of_the_catalogue_follow_the_weights() -> None:
    head = head_of(buckets(12)).eval()
    first = head.catalogue()[0]
    assert head.catalogue()[0] is first, "the same weights need no second pass"
    state = {name: value.clone() for name, value in head.state_dict().items()}
    optimiser = torch.optim.SGD(head.parameters(), 0.5)
    head(batch_of([[2, 3]], [[3, 4]])).loss.backward()
    optimiser.step()
    trained = head.catalogue()[0]
    assert not torch.allclose(trained, first)
    torch.testing.assert_close(trained, head.encode(torch.arange(13)))
    head.load_state_dict(state)
    torch.testing.assert_close(head.catalogue()[0], first)
    for parameter in head.encoder.parameters():
        parameter.data.zero_()  # not counted as another version
    assert not head.train().eval().catalogue()[0].any()


def test_catalogue_vectors_have_no_dropout() -> None:
    head = head_of(buckets(12), dropout=0.5).train()
    found = head.catalogue()[0]
    assert head.encoder.training and torch.equal(found, head.eval().catalogue()[0])


def test_the_first_steps_train_the_codes_alone() -> None:
    head, batch = head_of(buckets(12), sparse_only_share=0.25), batch_of([[2], [5]], [[7], [9]])
    losses = []
    for step in range(4):
        head.begin_step(step, 4)
        output = head(batch)
        losses.append(float(output.loss.detach() - output.parts["sparse"]))
    assert losses[0] == 0.0 and losses[1] == pytest.approx(float(output.parts["dense"])) == losses[3] > 0
    head.begin_step(0, 4)
    head(batch).loss.backward()
    assert all(p.grad is not None for p in head.parameters())


def test_beam_fusion_by_hand() -> None:
    codes = torch.tensor([[0.0, -1.0, float("-inf")]])
    cosines = torch.tensor([[[0.5, 0.1], [0.9, float("-inf")], [0.3, 0.2]]])
    p = torch.tensor([0.0, -2.0]).softmax(0)
    cluster = beam_fusion(codes, cosines, tau=2.0, psi=10.0, domain="cluster").exp()
    q = torch.tensor([5.0, 1.0]).softmax(0)
    expected = torch.tensor([[[p[0] * q[0], p[0] * q[1]], [p[1], 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(cluster, expected)
    union = torch.tensor([5.0, 1.0, 9.0]).softmax(0)
    expected = torch.tensor([[[p[0] * union[0], p[0] * union[1]], [p[1] * union[2], 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(beam_fusion(codes, cosines, tau=2.0, psi=10.0, domain="global").exp(), expected)


def test_the_text_encoder_is_chosen_by_the_levels_there_are() -> None:
    def both(num_items: int) -> ItemFeatures:
        return {**words(num_items), **vectors(num_items)}

    assert head_of(buckets(12), both).config.text_encoder == "light"
    assert head_of(buckets(12), vectors).config.text_encoder == "embedding"
    assert head_of(buckets(12), both, text_encoder="embedding").text_vectors.shape == (13, 16)
    with pytest.raises(RecipeError, match=r"title.*'text'"):
        head_of(buckets(12), lambda n: {"title": vectors(n)["text"]})
    with pytest.raises(RecipeError, match=r"text_tokens.*light"):
        head_of(buckets(12), vectors, text_encoder="light")
    with pytest.raises(RecipeError, match="found 5 items, expected 12"):
        head_of(buckets(12), lambda n: words(5))
    with pytest.raises(RecipeError, match="token ids"):
        head_of(buckets(12), lambda n: {"text_tokens": vectors(n)["text"]})


def test_padding_of_a_text_does_not_matter() -> None:
    head = head_of(buckets(12))
    together, alone = head.encode(torch.tensor([1, 2, 3])), [head.encode(torch.tensor([item])) for item in (1, 2, 3)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert torch.isfinite(together).all() and head.config.text_vocab < 40


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "both"}, {"dense_softmax": "all"}, {"text_encoder": "bert"}, {"beams": 0}, {"neighbours": 0},
        {"tau": -1.0}, {"psi": -1.0}, {"dense_temperature": 0.0}, {"num_heads": 3}, {"sparse_only_share": 1.5},
        {"mode": "dense", "sparse_only_share": 0.1},
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"head\.{list(options)[-1]}: found"):
        COBRAConfig(**options)


def test_what_the_head_cannot_read_is_refused() -> None:
    head = head_of(buckets(12), max_history=3)
    with pytest.raises(DataError, match="at most max_history = 3"):
        head.recommend(batch_of([[1, 2, 3, 4]]), 1)
    with pytest.raises(DataError, match="not the next item"):
        head(batch_of([[1, 2]], [[3, 4]]))
