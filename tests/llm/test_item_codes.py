"""Items as added tokens: windows and prompts against slow references, gates that know no future, what is stored."""

from __future__ import annotations

import itertools
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmrec.data.code_prompts import CodeAsker, CodeTaskOptions
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.item_tokenizers.base import ItemTokenizer
from llmrec.llm.item_codes import ItemCodeRecommender
from llmrec.llm.recommender import LLMRecommender, RecommenderOptions
from llmrec.tuners.ilora import ILoraTuner
from llmrec.tuners.lora import LoraTuner
from tests.contracts.heads import SpelledTokenizer
from tests.llm.tiny import ITEMS, LENGTH, TITLES, WIDTH, encoder, llama, rows, tokenizer

SIZES = (3, 4, 5)
TEXT = "The user watched these films"
TUNERS = [None, "lora", "ilora"]


def spelled(table: Tensor, sizes: tuple[int, ...]) -> ItemTokenizer:
    """A tokenizer with given codes of items 1.. ."""
    made = SpelledTokenizer()
    made.codes = torch.cat([table.new_full((1, len(sizes)), -1), table])
    made.level_sizes, made.unique = sizes, len(table.unique(dim=0)) == len(table)
    return made


@cache
def item_codes(seed: int = 0) -> ItemTokenizer:
    """Different random codes of three levels; items 1 and 2 differ in the last code only, 3 and 4 in the last two."""
    every = torch.tensor(list(itertools.product(*map(range, SIZES))))
    every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))]
    first = [[0, 0, 1], [0, 0, 4], [1, 2, 0], [1, 3, 3]]
    others = [row for row in every.tolist() if row not in first]
    return spelled(torch.tensor([*first, *others][:ITEMS]), SIZES)


def recommender(
    tuner: str | None = "ilora", *, trained: bool = True, codes: ItemTokenizer | None = None, base: Any = None,
    titles: Any = TITLES, router: str = "linear", **options: Any,
) -> ItemCodeRecommender:  # fmt: skip
    """A recommender that speaks codes; with `trained` its adapter and rows differ from fresh ones."""
    base = llama() if base is None else base
    torch.manual_seed(1)
    if tuner is not None:
        kind: Any = {"ilora": ILoraTuner, "lora": LoraTuner}[tuner]
        more = {"router": router} if tuner == "ilora" else {}
        base = kind.attach(base, kind.configure({"r": 8, "lora_dropout": 0.0, **more}, gate_dim=WIDTH))
    made = LLMRecommender.build(
        base, encoder=encoder(), tokenizer=tokenizer(), item_tokenizer=codes or item_codes(), titles=titles,
        style="item_codes", max_history=LENGTH, **{"beams": ITEMS, **options},
    ).eval()  # fmt: skip
    assert isinstance(made, ItemCodeRecommender)
    if trained:
        for name, parameter in made.named_parameters():
            if "lora_B" in name or name.startswith("code_"):
                torch.nn.init.normal_(parameter, std=0.1 if "lora_B" in name else 0.3)
    return made


def asking(tuner: str | None = "ilora", **options: Any) -> ItemCodeRecommender:
    """A recommender of the tasks in words and codes."""
    codes, tasks = item_codes(), ("history_to_item", "item_to_title")
    mix = CodeTaskOptions(dict.fromkeys(tasks, 1.0))
    asker = CodeAsker(codes.codes.numpy(), codes.level_sizes, len(tokenizer()), tokenizer(), mix, TITLES)
    return recommender(tuner, renderer=asker, tasks=tasks, **options)


HISTORIES = [[5, 1, 17, 9, 3, 20, 11, 2], [12], [4, 8, 15], [16, 7]]


def batch_of(histories: list[list[int]] = HISTORIES, more: int = 0, fill: int = 0) -> Any:
    width = max(map(len, histories)) + more
    return {
        "item_ids": torch.tensor([row + [fill] * (width - len(row)) for row in histories]),
        "lengths": torch.tensor([len(row) for row in histories]),
    }


def windows(histories: list[list[int]] = HISTORIES) -> Any:
    """Every position supervised by the next event; the last target is item 6."""
    batch = batch_of(histories)
    following = [[*row[1:], 6] for row in histories]
    width = batch["item_ids"].shape[1]
    return {**batch, "targets": torch.tensor([row + [0] * (width - len(row)) for row in following])}


# Slow references -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def gate(model: ItemCodeRecommender, events: list[int]) -> Tensor:
    """[width] of what is known after some events, which the encoder reads on their own; zero before the first."""
    if not events:
        return torch.zeros(WIDTH)
    return model.encoder.user_representation(batch_of([events]))[0]


@torch.no_grad()
def states(model: ItemCodeRecommender, history: list[int], written: list[int]) -> Tensor:
    """[tokens, d] states after prefix, codes of the history and codes written so far, read alone without a cache."""
    depth = model.depth
    tokens, known = list(model.backbone.embed(model.prefix_ids)), [0] * len(model.prefix_ids)
    for number, item in enumerate(history):
        for level in range(depth):
            tokens.append(model.code_embedding.weight[model.offsets[level] + model.codes[item, level]])
            known.append(number + (level == depth - 1))
    for level, code in enumerate(written):
        tokens.append(model.code_embedding.weight[model.offsets[level] + code])
        known.append(len(history))
    gates = {}
    if model.backbone.gate_kind is not None:
        gates = {"user_repr": torch.stack([gate(model, history[:count]) for count in known])[None]}
    return model.backbone(torch.stack(tokens)[None], None, gates).last_hidden_state[0]


def output_rows(model: ItemCodeRecommender, level: int) -> Tensor:
    table = (model.code_embedding if model.code_output is None else model.code_output).weight
    return table[model.offsets[level] : model.offsets[level] + SIZES[level]]


@torch.no_grad()
def log_probability(model: ItemCodeRecommender, history: list[int], item: int) -> list[float]:
    """Of the code of each level."""
    codes = model.codes[item].tolist()
    found = []
    for level in range(model.depth):
        last = states(model, history, codes[:level])[-1]
        found.append(float((output_rows(model, level) @ last).log_softmax(0)[codes[level]]))
    return found


def exhaustive(model: ItemCodeRecommender, histories: list[list[int]]) -> Tensor:
    """[B, I]."""
    return torch.tensor([[sum(log_probability(model, h, i)) for i in range(1, ITEMS + 1)] for h in histories])


# Windows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("instruction", ["", TEXT])
def test_window_loss_equals_reading_every_prefix_on_its_own(tuner: str | None, instruction: str) -> None:
    model = recommender(tuner, instruction=instruction)
    assert len(model.prefix_ids) == len(tokenizer()(instruction)["input_ids"])
    batch = windows(HISTORIES[1:])
    loss, parts, count = model.window_loss(batch)
    expected = []
    for history, targets in zip(HISTORIES[1:], batch["targets"].tolist(), strict=True):
        for place in range(len(history)):
            expected.append([-value for value in log_probability(model, history[: place + 1], targets[place])])
    wanted = torch.tensor(expected)
    assert count == len(expected) == 6
    torch.testing.assert_close(loss, wanted.mean(), rtol=1e-4, atol=1e-4)
    assert list(parts) == ["level_1", "level_2", "level_3"]
    torch.testing.assert_close(torch.stack(list(parts.values())), wanted.mean(0), rtol=1e-4, atol=1e-4)


def test_only_supervised_places_count() -> None:
    model, batch = recommender(), windows(HISTORIES[2:])
    last = torch.zeros_like(batch["targets"])
    last[0, 2], last[1, 1] = 6, 6
    loss, _, count = model.window_loss({**batch, "targets": last})
    wanted = [-value for history in HISTORIES[2:] for value in log_probability(model, history, 6)]
    assert count == 2
    torch.testing.assert_close(loss, torch.tensor(wanted).mean(), rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="no target"):
        model.window_loss({**batch, "targets": torch.zeros_like(last)})


def test_the_window_does_not_depend_on_padding_or_neighbours() -> None:
    model = recommender()
    whole, _, count = model.window_loss(windows())
    parts = [model.window_loss(windows([row])) for row in HISTORIES]
    torch.testing.assert_close(whole, sum(loss * n for loss, _, n in parts) / count, rtol=1e-5, atol=1e-5)  # type: ignore
    strange = windows()
    strange["item_ids"] = torch.where(strange["item_ids"] > 0, strange["item_ids"], 13)
    torch.testing.assert_close(model.window_loss(strange)[0], whole, rtol=1e-5, atol=1e-5)


# No leak -------------------------------------------------------------------------------------------------------------


class Contexts(type(encoder())):  # type: ignore[misc]
    """An encoder with expert weights of its own, plainly different for every item."""

    def gates(self, batch: Any) -> Tensor:
        return (batch["item_ids"][..., None] * torch.tensor([1.0, 2.0, 3.0, 5.0])).sin().softmax(-1)


def with_contexts() -> ItemCodeRecommender:
    model = recommender(router="none")
    model.encoder.__class__ = Contexts
    return model


@pytest.mark.parametrize("kind", ["none", "lora", "ilora", "finished gates"])
@torch.no_grad()
def test_no_state_knows_an_item_before_it_is_complete(kind: str) -> None:
    """Items 1 and 2 share all codes but the last, 3 and 4 the first: states that write shared codes are the same."""
    model = with_contexts() if kind == "finished gates" else recommender(None if kind == "none" else kind)
    depth, place = model.depth, 2
    for one, other, shared in ((1, 2, 2), (3, 4, 1), (1, 3, 0)):
        assert int((model.codes[one] == model.codes[other]).cumprod(0).sum()) == shared
        found = []
        for item in (one, other):
            items = torch.tensor([[9, 14, item, 11, 7, 18]])
            found.append(model._window_states(items, batch_of([items[0, :-1].tolist()])))
        assert found[0].shape[1] == 6 * depth - 1
        # Token j writes code j + 1; the first that tells the items apart is the code behind the shared ones.
        same = place * depth + shared
        torch.testing.assert_close(found[0][:, :same], found[1][:, :same], rtol=0, atol=1e-6)
        assert float((found[0][:, same:] - found[1][:, same:]).abs().amax(-1).min()) > 1e-4


def test_gates_stand_where_the_events_they_know_are_complete() -> None:
    model, batch = recommender(instruction=TEXT), batch_of([[5, 9]])
    prefix = len(model.prefix_ids)
    gates = model._window_gates(batch, 8)["user_repr"][0]
    known = [gate(model, [5, 9][:count]) for count in (0, 1, 2)]
    assert gates.shape == (prefix + 8, WIDTH)
    for token, count in enumerate([0] * prefix + [0, 0, 1, 1, 1, 2, 2, 2]):
        torch.testing.assert_close(gates[token], known[count], rtol=1e-5, atol=1e-6)
    finished = with_contexts()._window_gates(batch, 8)["gates"][0]
    torch.testing.assert_close(finished[:2], torch.full((2, 4), 0.25))
    assert not torch.allclose(finished[2], finished[1]) and torch.equal(finished[2], finished[4])


def test_given_states_are_used_and_one_per_sequence_is_refused() -> None:
    model, batch = recommender(), windows()
    expected = model.window_loss(batch)[0]
    given = model.encoder.position_representations(batch)
    torch.testing.assert_close(model.window_loss({**batch, "user_repr": given})[0], expected)
    with pytest.raises(DataError, match="show later events"):
        model.window_loss({**batch, "user_repr": given[:, -1]})


def whole_grid() -> ItemTokenizer:
    """All codes of two levels, one for each item."""
    return spelled(torch.tensor(list(itertools.product(range(4), range(5)))), (4, 5))


def train(model: ItemCodeRecommender, steps: int, rate: float = 5e-3) -> float:
    """Mean loss of the last steps on fresh uniform items."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(steps):
        items = torch.randint(1, ITEMS + 1, (64, 4), generator=torch.Generator().manual_seed(1000 + step))
        batch: Any = {"item_ids": items[:, :3], "lengths": torch.full((64,), 3), "targets": items[:, 1:]}
        loss = model.window_loss(batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return sum(losses[-steps // 3 :]) / len(losses[-steps // 3 :])


def test_gates_learn_nothing_from_noise() -> None:
    """Fresh uniform items cannot be predicted below ln I nats, two codes each."""
    model = recommender(trained=False, codes=whole_grid())
    assert train(model, 90) >= math.log(ITEMS) / 2 - 0.01


@pytest.mark.slow
def test_gates_of_the_event_being_written_would_give_it_away() -> None:
    """The measure above can fail: gates one event too far ahead are learned from."""
    model = recommender(trained=False, codes=whole_grid())
    honest = model._event_gates

    def ahead(batch: Any) -> Tensor:
        found = honest(batch)
        return torch.cat([found[:, 1:], found[:, -1:]], 1)

    model._event_gates = ahead  # type: ignore[method-assign]
    assert train(model, 240) < math.log(ITEMS) / 2 - 0.05


# What trains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_code_rows_and_adapter_train_and_nothing_else(tied: bool) -> None:
    model = recommender(base=llama(tie_word_embeddings=tied))
    assert (model.code_output is None) == tied
    before = model.backbone.embedding.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=0.1)
    model.window_loss(windows())[0].backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ilora_router" in name or name.startswith("code_"):
            assert parameter.grad is not None and bool(parameter.grad.any()), name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name
    written = model.code_embedding.weight if model.code_output is None else model.code_output.weight
    assert written.grad is not None and bool(written.grad.any(1).all()), "every code competes, so every row learns"
    optimizer.step()
    assert torch.equal(model.backbone.embedding.weight, before)
    assert len(model.own_state()) == (1 if tied else 2)


def test_a_plain_model_is_frozen_and_its_rows_train() -> None:
    model = recommender(None).train()
    model.window_loss(windows())[0].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"code_embedding.weight", "code_output.weight"}


def test_rows_start_at_the_titles_of_their_items() -> None:
    drawn, named = recommender(trained=False, titles=None), recommender(trained=False)
    table = named.backbone.embedding.weight.detach()
    noise = drawn.code_embedding.weight.detach()
    assert float(noise.std()) == pytest.approx(float(table.std()), rel=0.1)
    for level, code in ((0, 1), (2, 4)):
        items = [item for item in range(1, ITEMS + 1) if int(named.codes[item, level]) == code]
        words = [table[tokenizer()(TITLES[item], add_special_tokens=False)["input_ids"]].mean(0) for item in items]
        row = named.offsets[level] + code
        expected = torch.stack(words).mean(0) + 0.2 * noise[row]
        torch.testing.assert_close(named.code_embedding.weight[row].detach(), expected, rtol=1e-4, atol=1e-5)
    assert named.code_output is not None
    assert torch.equal(named.code_output.weight, named.code_embedding.weight)
    assert named.code_output.weight.data_ptr() != named.code_embedding.weight.data_ptr()


def test_learns_a_cycle() -> None:
    model = recommender("lora", trained=False)
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        walk = (torch.randint(0, ITEMS, (16, 1), generator=generator) + torch.arange(6)) % ITEMS + 1
        batch: Any = {"item_ids": walk[:, :-1], "lengths": torch.full((16,), 5), "targets": walk[:, 1:]}
        model.window_loss(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    starts = [[(start + step) % ITEMS + 1 for step in range(4)] for start in range(ITEMS)]
    best = model.eval().recommend(batch_of(starts), 1).item_ids[:, 0].tolist()
    assert sum(item == start[-1] % ITEMS + 1 for item, start in zip(best, starts, strict=True)) >= 18


# Recommending --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("instruction", ["", TEXT])
def test_recommend_equals_reading_every_item_on_its_own(tuner: str | None, instruction: str) -> None:
    """The history is read once and beams are a tree: the scores are those of whole forwards without a cache."""
    model, histories = recommender(tuner, instruction=instruction), [HISTORIES[2], HISTORIES[1]]
    expected = exhaustive(model, histories)
    found = model.recommend(batch_of(histories), ITEMS)
    assert bool(found.valid.all()) and found.scores.dtype == torch.float32
    best, order = expected.sort(1, descending=True)
    torch.testing.assert_close(found.scores, best, rtol=1e-4, atol=1e-4)
    assert float(best.diff(dim=1).abs().min()) < 1e-4 or torch.equal(found.item_ids, order + 1)
    torch.testing.assert_close(expected.gather(1, found.item_ids - 1), found.scores, rtol=1e-4, atol=1e-4)
    listed = torch.arange(1, ITEMS + 1).expand(2, -1)
    scores = model.score_candidates({**batch_of(histories), "candidates": listed})
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def everything(model: ItemCodeRecommender, batch: Any) -> Tensor:
    return model.score_candidates({**batch, "candidates": torch.arange(1, ITEMS + 1).expand(len(batch["lengths"]), -1)})


@pytest.mark.parametrize("beams", [4, ITEMS])
def test_a_row_does_not_depend_on_padding_or_neighbours(beams: int) -> None:
    model = recommender(beams=beams)
    whole = model.recommend(batch_of(), 4)
    for given in (batch_of(more=3), batch_of(more=1, fill=13)):
        found = model.recommend(given, 4)
        assert torch.equal(found.item_ids, whole.item_ids)
        torch.testing.assert_close(found.scores, whole.scores, rtol=1e-4, atol=1e-4)
    for row, history in enumerate(HISTORIES):
        alone = model.recommend(batch_of([history]), 4)
        assert torch.equal(alone.item_ids[0], whole.item_ids[row])
        torch.testing.assert_close(alone.scores[0], whole.scores[row], rtol=1e-4, atol=1e-4)


def test_more_beams_than_items_one_event_and_items_once() -> None:
    model = recommender()
    for beams in (1, 3, ITEMS, 500):
        found = model.recommend(batch_of([[12], [3]]), ITEMS if beams >= ITEMS else beams, beams=beams)
        for ids, real in zip(found.item_ids, found.valid, strict=True):
            items = ids[real].tolist()
            assert items and len(set(items)) == len(items) and set(items) <= set(range(1, ITEMS + 1))
        assert beams < ITEMS or bool(found.valid.all())
    more = model.recommend(batch_of([[12]]), ITEMS + 5)
    assert int(more.valid.sum()) == ITEMS and not more.item_ids[0, ITEMS:].any()


def test_a_catalogue_of_one_item() -> None:
    model = recommender(codes=spelled(torch.tensor([[1, 0]]), (2, 3)), titles=["", "red river"])
    found = model.recommend(batch_of([[1]]), 3)
    assert found.item_ids.tolist() == [[1, 0, 0]] and found.valid.tolist() == [[True, False, False]]


def test_seen_items_and_candidates() -> None:
    model, batch = recommender(), batch_of()
    scores = everything(model, batch)
    seen = torch.tensor([[1, 2, 0], [3, 0, 0], [20, 19, 18], [0, 0, 0]])
    found = model.recommend({**batch, "seen": seen}, ITEMS)
    for row, ids in enumerate(found.item_ids):
        left = set(range(1, ITEMS + 1)) - set(seen[row].tolist())
        assert set(ids[found.valid[row]].tolist()) == left
    candidates = torch.tensor([[7, 2, 0, 11]] * 4)
    chosen = model.score_candidates({**batch, "candidates": candidates})
    assert bool(torch.isinf(chosen[:, 2]).all())
    torch.testing.assert_close(chosen[:, [0, 1, 3]], scores[:, [6, 1, 10]], rtol=1e-4, atol=1e-4)
    ranked = model.recommend({**batch, "candidates": candidates, "seen": torch.tensor([[11]] * 4)}, 4)
    assert [set(ids[real].tolist()) for ids, real in zip(ranked.item_ids, ranked.valid, strict=True)] == [{7, 2}] * 4


def test_items_with_one_code_are_credited_one_by_one() -> None:
    table = item_codes().codes[1:].clone()
    table[6] = table[2]
    model = recommender(codes=spelled(table, SIZES))
    found = model.recommend(batch_of(), ITEMS)
    assert torch.equal(found.item_ids.sort(1).values, torch.arange(1, ITEMS + 1).expand(4, -1))
    for ids, scores in zip(found.item_ids.tolist(), found.scores, strict=True):
        assert abs(ids.index(3) - ids.index(7)) == 1 and float(scores[ids.index(3)]) == float(scores[ids.index(7)])


def test_half_precision() -> None:
    model, exact = recommender(base=llama(dtype=torch.bfloat16)), recommender()
    loss = model.window_loss(windows())[0].detach()
    assert loss.dtype == torch.float32 and model.code_embedding.weight.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact.window_loss(windows())[0].detach()), abs=0.1)
    found = everything(model, batch_of())
    assert found.dtype == torch.float32 and float((found - everything(exact, batch_of())).abs().max()) < 0.5


def test_collate_keeps_the_latest_events() -> None:
    model, long = recommender(), list(range(1, LENGTH + 4))
    made = model.collate(rows([long, [5, 6]]))
    assert made["item_ids"][0].tolist() == long[-LENGTH:] and made["lengths"].tolist() == [LENGTH, 2]
    found = model.recommend(made, 3)
    assert not set(found.item_ids[0].tolist()) & set(long) and "input_ids" not in made


# Tasks ---------------------------------------------------------------------------------------------------------------


def task_batch(model: ItemCodeRecommender) -> tuple[Any, list[tuple[Any, list[int]]]]:
    """Three prompts with answers, right padded, and each prompt by itself."""
    asked = [("history_to_item", [5, 1, 17], 6), ("item_to_title", [9], 9), ("history_to_item", [3], 12)]
    made = [model.tasks.encode(task, items, answer) for task, items, answer in asked]
    width = max(len(prompt.input_ids) for prompt in made)

    def padded(values: Any, fill: int) -> list[int]:
        return [*values.tolist(), *[fill] * (width - len(values))]

    batch = {
        **batch_of([items for _, items, _ in asked]),
        "input_ids": torch.tensor([padded(prompt.input_ids, 0) for prompt in made]),
        "token_labels": torch.tensor([padded(prompt.labels, -100) for prompt in made]),
    }
    return batch, [(prompt, items) for prompt, (_, items, _) in zip(made, asked, strict=True)]


@torch.no_grad()
def worded_logits(model: ItemCodeRecommender, ids: list[int], history: list[int]) -> Tensor:
    """[S, V + codes] of one sequence of words and codes, with the gate of its history."""
    base = len(tokenizer())
    table = torch.cat([model.backbone.embedding.weight, model.code_embedding.weight])
    gates = {} if model.backbone.gate_kind is None else {"user_repr": gate(model, history)[None]}
    hidden = model.backbone(table[torch.tensor(ids)][None], None, gates).last_hidden_state[0]
    codes = model.code_embedding if model.code_output is None else model.code_output
    assert model.vocabulary == base
    return torch.cat([hidden @ model.backbone.base.get_output_embeddings().weight.T, hidden @ codes.weight.T], 1)


@pytest.mark.parametrize("tuner", TUNERS)
def test_answer_loss_equals_reading_each_prompt_alone(tuner: str | None) -> None:
    model = asking(tuner)
    batch, prompts = task_batch(model)
    expected = []
    for prompt, history in prompts:
        ids = prompt.input_ids.tolist()
        logs = worded_logits(model, ids, history).log_softmax(-1)
        expected += [-float(logs[place - 1, ids[place]]) for place in range(prompt.prompt_length, len(ids))]
    loss = model.answer_loss(batch)
    torch.testing.assert_close(loss, torch.tensor(expected).mean(), rtol=1e-4, atol=1e-4)
    assert int((batch["token_labels"] != -100).sum()) == len(expected)
    with pytest.raises(DataError, match="no token of the batch"):
        model.answer_loss({**batch, "token_labels": torch.full_like(batch["token_labels"], -100)})


def test_asking_with_tasks_scores_codes_among_all_words() -> None:
    model, histories = asking(), [[4, 8, 15], [12]]
    starts = [len(tokenizer()) + offset for offset in model.offsets]
    batch = model.collate(rows(histories))
    expected = torch.zeros(2, ITEMS)
    for row, history in enumerate(histories):
        prompt = model.tasks.encode_history(history).tolist()
        for item in range(1, ITEMS + 1):
            code = [start + int(c) for start, c in zip(starts, model.codes[item], strict=True)]
            logs = worded_logits(model, prompt + code, history).log_softmax(-1)
            expected[row, item - 1] = sum(logs[len(prompt) - 1 + level, code[level]] for level in range(3))
    batch.pop("seen", None)  # type: ignore[misc]
    found = model.recommend(batch, ITEMS)
    torch.testing.assert_close(found.scores, expected.sort(1, descending=True).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scores, expected.gather(1, found.item_ids - 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(everything(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_tasks_train_code_rows_and_no_base_embedding() -> None:
    model = asking()
    model.train().answer_loss(task_batch(model)[0]).backward()
    assert model.code_output is not None and model.code_output.weight.grad is not None
    assert bool(model.code_output.weight.grad.any(1).all()) and model.code_embedding.weight.grad is not None
    assert model.backbone.embedding.weight.grad is None


def test_asking_tasks_without_their_writer_is_refused() -> None:
    model = asking()
    model.tasks = None
    with pytest.raises(RecipeError, match="without what writes its prompts"):
        model.collate(rows([[1]]))


# Saving --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_saved_folder_holds_code_rows_once_and_no_base_embeddings(tied: bool, tmp_path: Path) -> None:
    model = recommender(base=llama(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name or "ilora_router" in name for name in adapter)
    assert not any(value.shape[0] == len(tokenizer()) for value in adapter.values())
    own = load_file(tmp_path / "projector.safetensors")
    assert set(own) == {"code_embedding.weight", *([] if tied else ["code_output.weight"])}
    assert all(value.shape == (sum(SIZES), 32) for value in own.values())
    options = json.loads((tmp_path / "recommender.json").read_text())["options"]
    assert options["item_codes"] == item_codes().fingerprint and options["level_sizes"] == list(SIZES)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("kind", ["windows", "instruction", "tasks"])
def test_loading_gives_equal_outputs(tuner: str | None, kind: str, tmp_path: Path) -> None:
    model = asking(tuner) if kind == "tasks" else recommender(tuner, instruction=TEXT if kind == "instruction" else "")
    expected = model.recommend(model.collate(rows(HISTORIES)), 5)
    model.save_pretrained(tmp_path)
    again = LLMRecommender.from_pretrained(tmp_path, llama(), encoder(), item_tokenizer=item_codes())
    assert isinstance(again, ItemCodeRecommender) and not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    found = again.recommend(again.collate(rows(HISTORIES)), 5)
    assert torch.equal(found.item_ids, expected.item_ids) and torch.equal(found.scores, expected.scores)
    assert again.options == model.options
    trainable = LLMRecommender.from_pretrained(
        tmp_path, llama(), encoder(), item_tokenizer=item_codes(), is_trainable=True
    )
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in trainable.named_parameters() if parameter.requires_grad} == names


def test_restoring_continues_a_run(tmp_path: Path) -> None:
    model, fresh = recommender(), recommender(trained=False)
    model.save_pretrained(tmp_path)
    expected = everything(model, batch_of())
    assert float((everything(fresh, batch_of()) - expected).abs().max()) > 1e-2
    fresh.restore(tmp_path)
    assert torch.equal(everything(fresh, batch_of()), expected)
    with pytest.raises(CheckpointError, match="item_codes differ"):
        recommender(codes=item_codes(3)).restore(tmp_path)


def test_other_item_codes_are_refused_with_both_hashes(tmp_path: Path) -> None:
    recommender().save_pretrained(tmp_path)
    own, other = item_codes(), item_codes(3)
    assert own.fingerprint != other.fingerprint
    with pytest.raises(CheckpointError, match=f"codes {own.fingerprint}, found the item codes {other.fingerprint}"):
        LLMRecommender.from_pretrained(tmp_path, llama(), encoder(), item_tokenizer=other)
    with pytest.raises(CheckpointError, match=f"item codes {own.fingerprint}, found the item codes none"):
        LLMRecommender.from_pretrained(tmp_path, llama(), encoder())
    with pytest.raises(RecipeError, match=f"item codes {other.fingerprint}, expected {own.fingerprint}"):
        recommender(codes=other, item_codes=own.fingerprint)
    resized = llama()
    resized.resize_token_embeddings(len(tokenizer()) + 7)
    with pytest.raises(CheckpointError, match=f"{len(tokenizer())} token embeddings, found {len(tokenizer()) + 7}"):
        LLMRecommender.from_pretrained(tmp_path, resized, encoder(), item_tokenizer=own)


def test_options_of_other_styles_are_refused() -> None:
    with pytest.raises(RecipeError, match="found no item tokenizer"):
        LLMRecommender.build(llama(), encoder=encoder(), style="item_codes")
    with pytest.raises(RecipeError, match="residual: not an option of style item_codes"):
        recommender(residual=True)
    with pytest.raises(RecipeError, match="beams: not an option of style item_slots"):
        RecommenderOptions(style="item_slots", beams=7)
