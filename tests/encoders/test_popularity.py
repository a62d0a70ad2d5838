"""Popularity: the contract, exact counts, and the known figure on MovieLens-100K."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.encoders.popularity import PopularityConfig, PopularityEncoder
from llmrec.errors import DataError
from tests.contracts.encoders import EncoderContract, cyclic_context
from tests.encoders.movielens import ITEMS, histories, ndcg_at_10, train_context


class TestPopularity(EncoderContract):
    config = PopularityConfig(num_items=24)
    encoder_class = PopularityEncoder

    def test_scores_are_the_training_counts_even_in_bfloat16(self) -> None:
        counts = np.r_[0, 1000 + np.arange(24)]
        context = dataclasses.replace(self.context(), train_counts=counts)
        model = PopularityEncoder.from_context(self.config, context).to(torch.bfloat16)
        assert self.scores(model, self.batch())[0, 1:].tolist() == counts[1:].tolist()
        assert model.recommend(self.batch(), 3).item_ids[0].tolist() == [24, 23, 22]

    def test_counts_of_another_catalogue_are_refused(self) -> None:
        with pytest.raises(DataError, match="another catalogue"):
            PopularityEncoder.from_context(self.config, cyclic_context(30))


def test_movielens_figure(test_data: Path) -> None:
    walks = histories(test_data)
    model = PopularityEncoder.from_context(PopularityConfig(num_items=ITEMS), train_context(walks))
    assert ndcg_at_10(model, walks) == pytest.approx(0.044, abs=0.001)
