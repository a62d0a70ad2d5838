"""Slices: what a text means, which rows lie inside, and that their metrics are those of a table filtered by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from llmrec.data.dataset import InteractionDataset
from llmrec.data.prepare import PrepareOptions, prepare_source
from llmrec.errors import DataError, RecipeError
from llmrec.evaluation.evaluator import Evaluator
from llmrec.evaluation.protocol import EvalProtocol, parse_protocol
from llmrec.evaluation.results import EvalResult, print_results, results_record, summarise
from llmrec.evaluation.slices import parse_slice, row_counts, slices_record
from llmrec.recipe import Recipe, parse_recipe
from tests.evaluation.small import TableScorer, Writer, make_dataset, random_dataset, use_candidates

PROTOCOL = EvalProtocol(ks=(1, 10), max_history=3)  # shorter than most histories


@pytest.fixture(scope="module")
def data() -> InteractionDataset:
    options = {"users": 80, "items": 30, "events_per_user": 12}
    return prepare_source("synthetic", PrepareOptions(split="leave_one_out", source_options=options)).dataset


@pytest.fixture(scope="module")
def results(data: InteractionDataset) -> dict[str, EvalResult]:
    systems = {"one": TableScorer(data.num_items), "two": TableScorer(data.num_items, seed=1)}
    return {name: Evaluator(PROTOCOL, progress=False).run(one, data, name=name) for name, one in systems.items()}


def counts_of(result: EvalResult, data: InteractionDataset) -> dict[str, np.ndarray]:
    return row_counts(result.predictions, data.histories("test", 2), data.context().train_counts)


def slow_counts(data: InteractionDataset, example: int) -> tuple[int, int]:
    """(history, target_events) of one event, by walking through all events."""
    users, items, orders = (data.column(name) for name in ("user", "item", "order"))
    splits = data.interactions.column("split").to_pylist()
    rows = range(len(users))
    before = sum(users[row] == users[example] and orders[row] < orders[example] for row in rows)
    return before, sum(items[row] == items[example] and splits[row] == "train" for row in rows)


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("history<=5", "history<=5"),
        ("  target_events  ==  03 ", "target_events==3"),
        ("history > 5  and  history<10 and target_events>=0", "history>5 and history<10 and target_events>=0"),
    ],
)
def test_texts(text: str, spelled: str) -> None:
    assert str(parse_slice(text)) == spelled and parse_slice(spelled) == parse_slice(text)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "''"),
        ("histry<=5", "'histry<=5'"),
        ("history=5", "'history=5'"),
        ("history!=5", "'history!=5'"),
        ("history<=5.5", "'history<=5.5'"),
        ("history<=-1", "'history<=-1'"),
        ("history<=five", "'history<=five'"),
        ("history", "'history'"),
        ("5>=history", "'5>=history'"),
        ("history<=5 and", "'history<=5 and'"),
        ("history<=5 or history>9", "'history<=5 or history>9'"),
        ("history<=5 and item>3", "'item>3'"),
        ("history<=" + "9" * 19, "9999"),
    ],
)
def test_what_is_no_slice(text: str, wrong: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_slice(text)
    for part in (f"slice {text!r}", wrong, "history or target_events", "<= < >= > ==", "whole number", "' and '"):
        assert part in str(caught.value)


def test_rows_against_a_slow_reference(data: InteractionDataset, results: dict[str, EvalResult]) -> None:
    counts = counts_of(results["one"], data)
    examples = results["one"].predictions.column("example_id").to_pylist()
    expected = [slow_counts(data, example) for example in examples]
    assert list(zip(counts["history"].tolist(), counts["target_events"].tolist(), strict=True)) == expected
    assert counts["history"].max() > PROTOCOL.max_history, "histories are counted whole"
    for text, inside in {
        "history<=7": [h <= 7 for h, _ in expected],
        "history<7": [h < 7 for h, _ in expected],
        "target_events==15": [t == 15 for _, t in expected],
        "history>6 and target_events>=18": [h > 6 and t >= 18 for h, t in expected],
        "target_events>15 and target_events<20": [15 < t < 20 for _, t in expected],
    }.items():
        assert 0 < sum(inside) < len(expected) and parse_slice(text).holds(counts).tolist() == inside, text


def test_the_validation_event_is_history_of_a_test_target() -> None:
    data = make_dataset([[1, 2, 3, 4]], 4)
    splits = pa.array(["train", "train", "valid", "test"])
    data = replace(data, interactions=data.interactions.set_column(3, "split", splits))
    for split, history in (("valid", 2), ("test", 3)):
        result = Evaluator(EvalProtocol(split=split, ks=(1,)), progress=False).run(TableScorer(4), data)
        counts = row_counts(result.predictions, data.histories(split, 50), data.context().train_counts)
        assert counts["history"].tolist() == [history] and counts["target_events"].tolist() == [0]


def test_metrics_are_those_of_a_table_filtered_by_hand(
    data: InteractionDataset, results: dict[str, EvalResult]
) -> None:
    record = slices_record(results, ["history <= 7"], data, data.context().train_counts)
    (text,) = record
    part = record[text]
    for name, result in results.items():
        rows = [slow_counts(data, e)[0] <= 7 for e in result.predictions.column("example_id").to_pylist()]
        table = result.predictions.filter(pa.array(rows))
        assert part["models"][name] == summarise(table, PROTOCOL)
        assert part["examples"] == len(table) and part["users"] == len(set(table.column("user").to_pylist()))
        assert set(part["models"][name]) == {f"{kind}@{k}" for kind in ("hr", "ndcg", "mrr") for k in (1, 10)}
    assert text == "history<=7" and list(part["models"]) == ["one", "two"]


def test_slices_of_all_examples_add_up_to_the_whole(data: InteractionDataset, results: dict[str, EvalResult]) -> None:
    texts = ["history<=6", "history>6 and history<=9", "history>9"]
    parts = slices_record(results, texts, data, data.context().train_counts).values()
    whole = results_record(results)
    assert all(part["examples"] for part in parts)
    for total in ("examples", "users"):  # one test target a user
        assert sum(part[total] for part in parts) == whole[total] == 80
    for name, result in results.items():
        for metric in ("hr@10", "ndcg@10", "mrr@10"):
            total = sum(part["examples"] * part["models"][name][metric]["mean"] for part in parts)
            assert total / 80 == pytest.approx(result.metrics[metric]["mean"])


def test_users_with_several_targets_and_several_draws() -> None:
    data = random_dataset(tests=2)
    protocol = parse_protocol("candidates-5", ks=(1,), seeds=(1, 2))
    results = {"one": Evaluator(protocol, progress=False).run(TableScorer(30), data)}
    counts = counts_of(results["one"], data)
    part = slices_record(results, ["history>=0"], data, data.context().train_counts)["history>=0"]
    assert part["examples"] == len(counts["history"]) == 160 and part["users"] == 40
    assert part["models"]["one"] == results["one"].metrics and "pooled_auc" in part["models"]["one"]
    short = slices_record(results, ["history<=2"], data, data.context().train_counts)["history<=2"]
    assert short["examples"] == 2 * short["users"], "of two targets of a user only the first is that early"


def test_generated_answers_keep_exact_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = ["Heat", "Alien", "Toy Story", "Casablanca", "Vertigo"]
    data = make_dataset([[1, 2, 5], [3, 4, 2, 1], [2, 3, 4]], 5, titles=titles)
    use_candidates(monkeypatch, lambda d, e, size, kind, seed: np.c_[e.targets, e.targets % 5 + 1])
    answers = Writer({2: "Vertigo", 6: "Heat", 9: "no idea"})
    results = {"w": Evaluator(parse_protocol("candidates-2", mode="generate"), progress=False).run(answers, data)}
    part = slices_record(results, ["history==2"], data, data.context().train_counts)["history==2"]
    means = {name: value["mean"] for name, value in part["models"]["w"].items()}
    assert means == {"hr@1": 0.5, "valid_ratio": 0.5, "exact_match": 0.5} and part["examples"] == 2


def test_an_empty_slice_is_said_in_words(data: InteractionDataset, results: dict[str, EvalResult]) -> None:
    parts = slices_record(results, ["history>500", "history>7"], data, data.context().train_counts)
    assert parts["history>500"] == {"examples": 0, "users": 0, "models": {}}
    console = Console(record=True, width=200, file=open("/dev/null", "w"))
    print_results({**results_record(results), "slices": parts}, console, ["ndcg@10", "coverage@10"])
    text = console.export_text()
    assert "slice history>500: no example of split test lies in it" in text
    assert f"slice history>7: {parts['history>7']['users']} users" in text
    assert f"{parts['history>7']['models']['two']['ndcg@10']['mean']:.4f}" in text and text.count("coverage@10") == 1


def test_a_table_of_other_targets_is_refused(data: InteractionDataset, results: dict[str, EvalResult]) -> None:
    table = results["one"].predictions
    wrong = replace(results["one"], predictions=table.set_column(3, "target", pa.array([1] * len(table), pa.int64())))
    with pytest.raises(DataError, match="targets are not those"):
        slices_record({"one": wrong}, ["history>0"], data, data.context().train_counts)


def recipe(**evaluate: object) -> Recipe:
    encoder = {"type": "sasrec", "action_tokens": True}
    return parse_recipe({"name": "x", "dataset": {"source": "synthetic"}, "encoder": encoder, "evaluate": evaluate})


def test_recipes_read_slices() -> None:
    found = recipe(slices=["history <= 5", "history<=5", "target_events<3"])
    assert found.evaluate.slices == ["history<=5", "target_events<3"] and recipe().evaluate.slices == []
    assert recipe(slices=["history<=5"], mode="generate").evaluate.slices == ["history<=5"]
    with pytest.raises(RecipeError, match=r"evaluate\.slices: .*'age<5' is no condition"):
        recipe(slices=["age<5"])


def test_pointwise_slices_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.slices: .*pointwise asks about events.*mode score or generate"):
        recipe(mode="pointwise", slices=["history<=5"])
