"""MovieLens-100K, leave-one-out, and NDCG@10 over the whole catalogue, written without the package's own data code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from llmrec.data.schema import DataContext, SequenceBatch
from llmrec.encoders.base import SequenceEncoder

ITEMS, USERS = 1682, 943


def histories(test_data: Path) -> list[np.ndarray]:
    """Items of each user in order of time, equal times in order of the source rows."""
    path = test_data / "ml-100k" / "interactions.parquet"
    table = pq.read_table(path).sort_by([(name, "ascending") for name in ("user_id", "timestamp", "src_row")])
    users, items = table["user_id"].to_numpy(), table["item_id"].to_numpy().astype(np.int64)
    return np.split(items, np.flatnonzero(np.diff(users)) + 1)


def train_context(walks: list[np.ndarray]) -> DataContext:
    """Everything but the last two events of each user."""
    items = np.concatenate([walk[:-2] for walk in walks])
    users = np.repeat(np.arange(1, USERS + 1), [len(walk) - 2 for walk in walks])
    return DataContext(ITEMS, USERS, np.bincount(items, minlength=ITEMS + 1), np.stack([users, items]))


def ndcg_at_10(model: SequenceEncoder, walks: list[np.ndarray], max_history: int = 50) -> float:
    """Test NDCG@10: the last event of all 943 users, seen items removed, the rest of the catalogue ranked."""
    gains = []
    for walk in walks:
        history, target = torch.from_numpy(walk[:-1])[None], int(walk[-1])
        window = history[:, -max_history:]
        batch: SequenceBatch = {"item_ids": window, "lengths": torch.tensor([window.shape[1]]), "seen": history}  # type: ignore[typeddict-item]
        place = (model.recommend(batch, 10).item_ids[0] == target).nonzero()
        gains.append(1 / np.log2(int(place) + 2) if len(place) else 0.0)
    return float(np.mean(gains))
