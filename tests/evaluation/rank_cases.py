"""What the processes of test_shards.py do; see `tests.training.processes`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.cli import main
from llmrec.commands import user_shards
from llmrec.data.dataset import InteractionDataset
from llmrec.evaluation.found import Found
from llmrec.evaluation.shards import exchange, joined, ranks
from tests.runs import train

CASES = ("alone", "two", "five")
PARTS = [np.array(part) for part in ([4, 0], [1, 5], [2], [3])]


def prepare(folder: Path) -> None:
    """One run, copied for each case; 20 users in three shards, and a single user."""
    run = folder / "run"
    train("sasrec", run, "evaluate.batch_size=16")
    for name in CASES:
        shutil.copytree(run, folder / "runs" / name)
    users = InteractionDataset.load(run / "dataset").user_keys[1:21]
    (folder / "many.txt").write_text("\n".join(users))
    (folder / "one.txt").write_text(users[0])
    user_shards.SHARD = 8


def run(case: str, folder: Path) -> dict[str, Any]:
    """Recommend for many users and for one, evaluate, and exchange texts, all in one group of processes."""
    top, trained = folder.parent, str(folder.parent / "runs" / case)
    with joined() as here:
        statuses = [
            main(["recommend", trained, "--users", str(top / f"{name}.txt"), "-k", "3", "--out", str(folder / name)])
            for name in ("many", "one")
        ]
        words = ["--split", "valid", "--protocol", "candidates-10", "--slice", "history<=4"]
        statuses.append(main(["evaluate", trained, *words]))
        texts = exchanged_texts()
    return {"rank": here.index, "count": here.count, "statuses": statuses, "texts": texts}


def exchanged_texts() -> list[str] | None:
    """Texts of six rows of which each process wrote its own."""
    found = Found.empty(6, 2)
    found.texts = [""] * 6
    for part in ranks().own(PARTS):
        for row in part:
            found.texts[row] = "ä" * int(row)
            found.ranks[row], found.scores[row] = row, -row
    exchange(found, PARTS)
    assert found.ranks.tolist() == list(range(6)) and found.scores[:, 1].tolist() == [-n for n in range(6)]
    return found.texts
