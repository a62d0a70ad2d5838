from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from llmrec.data.dataset import InteractionDataset
from llmrec.data.schema import Ranking
from llmrec.errors import CheckFailed, DataError, RecipeError
from llmrec.evaluation.evaluator import Evaluator, print_results, results_record
from llmrec.evaluation.protocol import EvalProtocol, parse_protocol
from llmrec.evaluation.tables import SCHEMA, per_user
from tests.evaluation.small import (
    ListOnly,
    TableScorer,
    Writer,
    every_item,
    make_dataset,
    random_dataset,
    use_candidates,
)

FULL = EvalProtocol(ks=(1, 3, 10))


def run(system, data, protocol=FULL, **options):
    return Evaluator(protocol, progress=False, **options).run(system, data, name="system")


class Fixed:
    """The same scores for everybody."""

    def __init__(self, scores):
        self.scores = torch.tensor([float("-inf"), *scores])

    def score_items(self, batch):
        return self.scores.expand(len(batch["lengths"]), -1)


def slow_metrics(system, data, remove_seen, ks):
    """Every number again, user by user, by full sorting of the scores (no ties)."""
    examples = data.histories("test", 50)
    totals: dict[str, list[float]] = {f"{m}@{k}": [] for m in ("hr", "ndcg", "mrr") for k in ks}
    for i in range(len(examples)):
        row = examples[i]
        history, target = row["item_ids"], int(examples.targets[i])
        batch = {
            "item_ids": torch.tensor(history)[None],
            "lengths": torch.tensor([len(history)]),
            "user_ids": torch.tensor([row["user_id"]]),
        }
        scores = system.score_items(batch)[0].tolist()
        gone = set(row["seen"].tolist()) - {target} if remove_seen else set()
        order = sorted((n for n in range(1, len(scores)) if n not in gone), key=lambda n: -scores[n])
        rank = order.index(target) + 1
        for k in ks:
            totals[f"hr@{k}"].append(float(rank <= k))
            totals[f"ndcg@{k}"].append(1 / math.log2(rank + 1) if rank <= k else 0.0)
            totals[f"mrr@{k}"].append(1 / rank if rank <= k else 0.0)
    return {name: sum(values) / len(values) for name, values in totals.items()}


def test_worked_by_hand():
    data = make_dataset([[1, 2, 5], [3, 4, 1]], 5)
    result = run(Fixed([0.9, 0.8, 0.7, 0.1, 0.5]), data, EvalProtocol(ks=(1, 2)))
    # user 1, target 5, items 1 and 2 seen: 3 > 5 > 4 -> rank 2 of 3; user 2, target 1 -> rank 1 of 3
    table = result.predictions
    assert table.column("rank").to_pylist() == [2.0, 1.0] and table.column("num_ranked").to_pylist() == [3, 3]
    assert table.column("items").to_pylist() == [[3, 5], [1, 2]]
    assert table.column("user_key").to_pylist() == ["u1", "u2"]
    assert table.column("target_key").to_pylist() == ["i5", "i1"]
    assert table.column("example_id").to_pylist() == [2, 5]
    assert result.metrics["hr@1"]["mean"] == 0.5 and result.metrics["hr@2"]["mean"] == 1.0
    assert result.metrics["ndcg@2"]["mean"] == pytest.approx((1 / math.log2(3) + 1) / 2)
    assert result.metrics["mrr@2"]["mean"] == 0.75 and result.metrics["coverage@2"]["mean"] == pytest.approx(4 / 5)
    assert result.label == "full ranking, test, seen removed" and result.users == 2
    assert table.schema.equals(SCHEMA)


@pytest.mark.parametrize("remove_seen", [True, False])
@pytest.mark.parametrize("tests", [1, 3])
def test_agrees_with_a_slow_reference(remove_seen, tests):
    data = random_dataset(tests=tests)
    system = TableScorer(30)
    protocol = EvalProtocol(ks=(1, 3, 10), remove_seen=remove_seen)
    got = run(system, data, protocol, batch_size=7).metrics
    expected = slow_metrics(system, data, remove_seen, protocol.ks)
    assert {name: got[name]["mean"] for name in expected} == pytest.approx(expected)


def test_batch_size_changes_nothing(monkeypatch):
    data, system = random_dataset(), TableScorer(30, levels=4)
    whole = run(system, data)
    assert run(system, data, batch_size=3).predictions.column("rank").equals(whole.predictions.column("rank"))
    monkeypatch.setattr("llmrec.evaluation.evaluator.SCORE_BYTES", 12 * 31 * 2)
    system.batches.clear()
    again = run(system, data)
    assert again.predictions.column("rank").equals(whole.predictions.column("rank"))
    assert max(len(batch["lengths"]) for batch in system.batches) == 2


def test_numbering_of_users_changes_no_number():
    rng = np.random.default_rng(1)
    histories = [rng.permutation(np.arange(1, 21))[:6].tolist() for _ in range(25)]
    system = Fixed(rng.random(20))
    one = run(system, make_dataset(histories, 20)).metrics
    other = run(system, make_dataset([histories[i] for i in rng.permutation(25)], 20)).metrics
    for name, estimate in one.items():
        assert other[name] == pytest.approx(estimate), name


def test_full_ranking_is_candidate_ranking_with_every_item(monkeypatch):
    use_candidates(monkeypatch, every_item)
    data, system = random_dataset(), TableScorer(30, levels=5)
    full = run(system, data, EvalProtocol(ks=(1, 3, 10), remove_seen=False))
    sampled = run(system, data, parse_protocol("candidates-30", ks=(1, 3, 10)))
    assert sampled.predictions.column("rank").equals(full.predictions.column("rank"))
    for name in ("hr@3", "ndcg@10", "mrr@10"):
        assert sampled.metrics[name] == full.metrics[name]
    assert sampled.fingerprint != full.fingerprint and "coverage@10" not in sampled.metrics


def test_repeated_targets_stay_when_seen_items_go():
    data = make_dataset([[2, 1, 2]], 4, has_repeats=True)
    system = Fixed([0.9, 0.8, 0.7, 0.1])
    assert run(system, data).predictions.column("rank").to_pylist() == [2.0]  # kept by default: item 1 competes
    removed = run(system, data, EvalProtocol(ks=(1, 3), remove_seen=True)).predictions
    assert removed.column("rank").to_pylist() == [1.0] and removed.column("items").to_pylist() == [[2, 3, 4]]
    assert removed.column("num_ranked").to_pylist() == [3]


def test_a_list_gives_the_ranks_it_can():
    data, system = random_dataset(), TableScorer(30)
    exact, listed = run(system, data), run(ListOnly(system), data)
    for name in ("hr@1", "hr@10", "ndcg@10", "mrr@3", "coverage@10"):
        assert listed.metrics[name] == exact.metrics[name]
    assert listed.measured == "top-10 lists" and listed.label.endswith("by top-10 lists")
    assert listed.fingerprint == exact.fingerprint
    ranks = listed.predictions.column("rank")
    assert ranks.null_count == sum(rank > 10 for rank in exact.predictions.column("rank").to_pylist()) > 0


def test_lists_over_candidates(monkeypatch):
    use_candidates(monkeypatch, lambda d, e, size, kind, seed: np.stack([e.targets, *[e.targets % 30 + 1] * 1], axis=1))
    data, system = random_dataset(), TableScorer(30)
    protocol = parse_protocol("candidates-2", ks=(1,))
    listed, scored = run(ListOnly(system), data, protocol).metrics, run(system, data, protocol).metrics
    assert listed == {name: value for name, value in scored.items() if "auc" not in name}, "lists have no scores of all"


def test_the_target_never_reaches_the_system():
    data, system = random_dataset(tests=2), TableScorer(30)
    run(system, data)
    for batch in system.batches:
        assert not batch["targets"].any()
        for number, row in zip(batch["example_ids"].tolist(), batch["seen"].tolist(), strict=True):
            before = data.column("order")[number]
            assert sum(item > 0 for item in row) == before  # earlier events only


def test_own_collate_is_used_and_seen_items_are_added():
    data = random_dataset()

    class Own(TableScorer):
        def collate(self, rows):
            return {
                "item_ids": torch.tensor([[row["item_ids"][-1]] for row in rows]),
                "lengths": torch.ones(len(rows), dtype=torch.long),
                "user_ids": torch.tensor([row["user_id"] for row in rows]),
            }

    own, plain = run(Own(30), data), run(TableScorer(30), data)
    assert own.metrics == plain.metrics


def test_modules_are_evaluated_without_dropout_and_left_as_they_were():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.live = torch.nn.Dropout(0.5).eval(), torch.nn.Dropout(0.5)

        def score_items(self, batch):
            assert not self.live.training and not torch.is_grad_enabled()
            return self.live(torch.ones(len(batch["lengths"]), 31))

    net = Net()
    assert not net.frozen.training and net.live.training
    assert set(run(net, random_dataset()).predictions.column("rank").to_pylist()) <= {x / 2 for x in range(61)}
    assert net.training and net.live.training and not net.frozen.training


def test_several_draws_are_averaged_within_users(monkeypatch):
    def draw(data, examples, size, kind, seed):
        rng = np.random.default_rng(seed)
        others = [rng.permutation([n for n in range(1, 31) if n != t])[: size - 1] for t in examples.targets]
        return np.c_[examples.targets, np.stack(others)]

    use_candidates(monkeypatch, draw)
    data, system = random_dataset(), TableScorer(30)
    protocol = parse_protocol("candidates-5", ks=(1, 2), seeds=(1, 2, 3))
    result = run(system, data, protocol)
    singles = [Evaluator(protocol, progress=False).run(system, data, seed=s) for s in (1, 2, 3)]
    assert result.predictions.num_rows == 120 and result.users == 40
    assert result.metrics["hr@1"]["mean"] == pytest.approx(np.mean([r.metrics["hr@1"]["mean"] for r in singles]))
    assert len({r.fingerprint for r in (result, *singles)}) == 4
    keys, values = per_user(result.predictions, "hr@1")
    assert len(keys) == 40 and values.mean() == pytest.approx(result.metrics["hr@1"]["mean"])


def test_generated_answers(monkeypatch):
    titles = ["Heat", "Alien", "Toy Story", "Casablanca", "Vertigo"]
    data = make_dataset([[1, 2, 5], [3, 4, 1], [2, 3, 4], [1, 4, 2]], 5, titles=titles)
    use_candidates(monkeypatch, lambda d, e, size, kind, seed: np.c_[e.targets, e.targets % 5 + 1])
    answers = {2: "I say vertigo.", 5: "Alien", 8: "no idea", 11: "Alien"}
    result = run(Writer(answers), data, parse_protocol("candidates-2", mode="generate"))
    # correct, the other candidate, invalid, exact
    assert result.metrics["hr@1"]["mean"] == 0.5 and result.metrics["valid_ratio"]["mean"] == 0.75
    assert result.metrics["exact_match"]["mean"] == 0.25
    assert set(result.metrics) == {"hr@1", "valid_ratio", "exact_match"}
    assert result.predictions.column("text").to_pylist() == list(answers.values())
    assert result.predictions.column("items").to_pylist() == [[5], [2], [], [2]]
    assert result.predictions.column("rank").to_pylist() == [1.0, None, None, 1.0]
    assert result.label == "candidates-2 (uniform, seed 42), test, generate"


def test_a_scorer_may_answer_under_the_generating_protocol(monkeypatch):
    use_candidates(monkeypatch, every_item)
    data, system = random_dataset(), TableScorer(30)
    answered = run(system, data, parse_protocol("candidates-30", mode="generate"))
    scored = run(system, data, parse_protocol("candidates-30", ks=(1,)))
    assert answered.metrics["hr@1"] == scored.metrics["hr@1"] and answered.metrics["valid_ratio"]["mean"] == 1.0


def test_broken_systems_are_refused(monkeypatch):
    data = random_dataset()
    with pytest.raises(DataError, match="NaN"):
        run(Fixed([float("nan")] * 30), data)
    with pytest.raises(DataError, match="wrong shape"):
        run(Fixed([1.0] * 12), data)
    with pytest.raises(DataError, match="no target"):
        run(Fixed([1.0] * 30), data, EvalProtocol(split="valid"))
    use_candidates(monkeypatch, lambda d, e, size, kind, seed: np.stack([e.targets] * 2, axis=1))
    with pytest.raises(DataError, match="exactly once"):
        run(TableScorer(30), data, parse_protocol("candidates-2", ks=(1,)))

    class Short:
        def recommend(self, batch, k):
            return Ranking(torch.ones(1, k, dtype=torch.long), torch.zeros(1, k), torch.ones(1, k, dtype=torch.bool))

    with pytest.raises(DataError, match="recommend returned"):
        run(Short(), data)


def test_saved_tables_carry_their_protocol(tmp_path):
    data = random_dataset()
    result = run(TableScorer(30), data)
    record = result.save(tmp_path, "sasrec")
    table = pq.read_table(tmp_path / "predictions" / "sasrec.parquet")
    info = json.loads(table.schema.metadata[b"llmrec"])
    assert info["fingerprint"] == result.fingerprint and info["system"] == "sasrec"
    assert EvalProtocol.from_dict(info["protocol"]) == result.protocol
    assert record == json.loads(json.dumps(record)) and record["models"]["sasrec"] == result.metrics
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["sasrec.parquet"]
    with pytest.raises(RecipeError, match="system name"):
        result.save(tmp_path, "../other")


def test_numbers_of_different_questions_never_share_a_table(monkeypatch):
    use_candidates(monkeypatch, every_item)
    data: InteractionDataset = random_dataset()
    full, sampled = run(TableScorer(30), data), run(TableScorer(30), data, parse_protocol("candidates-30"))
    with pytest.raises(CheckFailed, match="must not share a table") as caught:
        results_record({"a": full, "b": sampled})
    assert full.fingerprint in str(caught.value) and sampled.fingerprint in str(caught.value)
    assert "warning" in results_record({"b": sampled}) and "warning" not in results_record({"a": full})


def test_printed_table_names_protocol_fingerprint_and_interval():
    data = random_dataset()
    results = {"a [x]": run(TableScorer(30), data), "b": run(ListOnly(TableScorer(30, seed=1)), data)}
    console = Console(record=True, width=200, file=open("/dev/null", "w"))
    print_results(results_record(results), console)
    text = console.export_text()
    estimate = results["b"].metrics["ndcg@10"]
    for part in ("a [x]", "b (by top-10 lists)", "full ranking, test, seen removed", results["b"].fingerprint):
        assert part in text
    assert f"{estimate['mean']:.4f}" in text and f"{estimate['low']:.4f}-{estimate['high']:.4f}" in text


def test_real_draws_of_candidates():
    data, system = random_dataset(num_items=60), TableScorer(60)
    protocol = parse_protocol("candidates-20", seeds=(1, 2))
    result = run(system, data, protocol)
    assert run(system, data, protocol).predictions.equals(result.predictions)
    assert result.predictions.column("num_ranked").unique().to_pylist() == [20]
    assert (
        1
        <= min(result.predictions.column("rank").to_pylist())
        <= max(result.predictions.column("rank").to_pylist())
        <= 20
    )
    assert result.predictions.slice(0, 40).column("rank") != result.predictions.slice(40).column("rank")
    # a random system hits one time in twenty at 1, ten times in twenty at 10
    assert abs(result.metrics["hr@10"]["mean"] - 0.5) < 0.2
