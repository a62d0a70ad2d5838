"""AUC over candidate lists, per list and pooled (card mllm-msr, 10.7), beside hit rates and reciprocal ranks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmrec.errors import RecipeError
from llmrec.evaluation.evaluator import Evaluator
from llmrec.evaluation.metrics import auc, list_auc
from llmrec.evaluation.protocol import EvalProtocol
from llmrec.evaluation.results import check_metric
from llmrec.evaluation.tables import metric_values
from tests.evaluation.small import ListOnly, TableScorer, random_dataset

DATA = random_dataset(users=60, num_items=40)
PROTOCOL = EvalProtocol(candidates="candidates-21", ks=(1, 5))


class Judge:
    """Scores candidates by a rule that may know the target."""

    def __init__(self, rule: Any) -> None:
        examples = DATA.histories("test", 50)
        self.targets = dict(zip(examples.users.tolist(), examples.targets.tolist(), strict=True))
        self.rule = rule

    def score_candidates(self, batch: Any) -> Tensor:
        targets = torch.tensor([self.targets[user] for user in batch["user_ids"].tolist()])
        return self.rule(batch, (batch["candidates"] == targets[:, None]).float())


def measured(rule: Any) -> dict[str, float]:
    result = Evaluator(PROTOCOL, progress=False).run(Judge(rule), DATA, name="judge")  # type: ignore[arg-type]
    return {name: float(value["mean"]) for name, value in result.metrics.items()}  # type: ignore[arg-type]


def test_7_perfect_constant_and_reversed_scorers() -> None:
    perfect, constant, worst = (measured(rule) for rule in (
        lambda batch, target: target, lambda batch, target: target * 0, lambda batch, target: -target,
    ))  # fmt: skip
    assert perfect["auc"] == perfect["pooled_auc"] == perfect["hr@5"] == perfect["mrr@5"] == 1
    assert constant["auc"] == constant["pooled_auc"] == 0.5
    assert constant["hr@5"] == 0, "ties count by half: the target stands at place 11 of 21"
    assert worst["auc"] == worst["pooled_auc"] == worst["hr@5"] == worst["mrr@5"] == 0


def test_pooled_asks_whether_scores_of_different_users_mean_the_same() -> None:
    """Perfect in every list, but each user on a scale of its own."""
    found = measured(lambda batch, target: target + 10.0 * batch["user_ids"][:, None])
    assert found["auc"] == 1 and found["pooled_auc"] < 0.6


def test_values_equal_the_definition_whatever_the_order_of_users() -> None:
    def noise(batch: Any, target: Tensor) -> Tensor:
        # Equal for equal (user, item), so the order of rows and columns cannot matter.
        keys = batch["user_ids"][:, None] * 1009 + batch["candidates"] * 31
        return torch.sin(keys.float()) + target

    result = Evaluator(PROTOCOL, progress=False).run(Judge(noise), DATA, name="judge")  # type: ignore[arg-type]
    lists = [(row["items"], row["scores"], row["target"]) for row in result.predictions.to_pylist()]
    own, scores, labels = [], [], []
    for items, values, target in lists:
        right = np.array(items) == target
        own.append(auc(np.array(values), right.astype(int))[0])
        scores += values
        labels += right.astype(int).tolist()
    np.testing.assert_allclose(metric_values(result.predictions, "auc"), own)
    np.testing.assert_allclose(result.metrics["auc"]["mean"], np.mean(own))
    np.testing.assert_allclose(result.metrics["pooled_auc"]["mean"], auc(np.array(scores), np.array(labels))[0])
    small = Evaluator(PROTOCOL, batch_size=7, progress=False).run(Judge(noise), DATA, name="judge")  # type: ignore[arg-type]
    assert json.dumps(small.metrics) == json.dumps(result.metrics)


def test_list_auc_by_hand() -> None:
    np.testing.assert_allclose(list_auc(np.array([1.0, 2.5, 5.0]), np.array([5, 5, 5])), [1.0, 0.625, 0.0])


def test_only_scored_candidates_have_it() -> None:
    full = Evaluator(EvalProtocol(ks=(5,)), progress=False).run(TableScorer(40), DATA, name="table")
    listed = Evaluator(PROTOCOL, progress=False).run(ListOnly(TableScorer(40)), DATA, name="lists")
    for result in (full, listed):
        assert "auc" not in result.metrics and "pooled_auc" not in result.metrics
        with pytest.raises(RecipeError, match="for lists of scored candidates"):
            check_metric(result, "auc")
