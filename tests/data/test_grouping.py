"""Order of examples by similar length, and the cheap lengths of prompts it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmrec.data.grouping import BLOCK, grouped_order
from llmrec.data.instructions import InstructionExamples, PromptOptions
from llmrec.errors import DataError, RecipeError
from tests.data.tables import dataset_of
from tests.fixtures.tokenizers import tiny_bpe_tokenizer

TITLES = ["Rain", "The very long winter of an old river", "Stone", "Night of paper and glass", "Blue", "A green red"]


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.minimum(50, 1 + np.random.default_rng(seed).lognormal(1.5, 1.0, count)).astype(np.int64)


def cells(lengths: np.ndarray, order: np.ndarray, batch: int) -> int:
    """Places of all padded batches."""
    return sum(len(part) * int(lengths[part].max()) for part in np.split(order, range(batch, len(order), batch)))


@pytest.mark.parametrize(("count", "group"), [(1000, 8), (1003, 8), (7, 8), (8, 8), (1, 1), (0, 4), (801, 2)])
def test_every_example_once(count: int, group: int) -> None:
    order = grouped_order(drawn(count), group, np.random.default_rng(3))
    assert sorted(order.tolist()) == list(range(count))


def test_the_order_follows_the_generator_alone() -> None:
    lengths = drawn(500)
    orders = [grouped_order(lengths, 8, np.random.default_rng([3, epoch])) for epoch in (0, 0, 1)]
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()


def test_batches_are_nearly_free_of_padding_and_not_sorted() -> None:
    lengths = drawn(4003)
    order = grouped_order(lengths, 16, np.random.default_rng(0))
    plain = np.random.default_rng(0).permutation(len(lengths))
    total = int(lengths.sum())
    assert cells(lengths, order, 16) < 1.1 * total
    assert cells(lengths, plain, 16) > 2 * total
    longest = [int(lengths[part].max()) for part in np.split(order, range(16, len(order), 16))]
    assert longest[0] == lengths[order[: len(order) // 16 * 16]].max()  # a shortage of memory shows at once
    assert abs(np.corrcoef(np.arange(len(longest) - 1), longest[:-1])[0, 1]) < 0.2


def test_what_fills_no_group_stays_at_the_end_in_shuffled_order() -> None:
    lengths = drawn(8 * BLOCK + 5)
    shuffled = np.random.default_rng(4).permutation(len(lengths))
    assert grouped_order(lengths, 8, np.random.default_rng(4))[-5:].tolist() == shuffled[-5:].tolist()


def test_groups_reach_over_the_processes_of_a_step() -> None:
    # Process p takes batches p, p + 2, ...: batches 2i and 2i + 1 are computed at the same time.
    lengths, batch, processes = drawn(1600), 8, 2
    order = grouped_order(lengths, batch * processes, np.random.default_rng(1)).reshape(-1, processes, batch)
    longest = lengths[order].max(axis=-1)
    waits = np.abs(longest[:, 0] - longest[:, 1])
    assert waits.mean() < 1.0 and np.median(waits) == 0


def test_empty_groups_are_refused() -> None:
    with pytest.raises(DataError, match="expected 1 or more|empty"):
        grouped_order(drawn(4), 0, np.random.default_rng(0))


def prompts(tmp_path: Path, style: str = "text", **options: object) -> InstructionExamples:
    path = tmp_path / "films.jinja"
    path.write_text("{# variables: history; source: ours #}Watched: {{ history | join(', ') }}. Next:")
    events = [(user, (5 * user + n) % 6 + 1, "train") for user in range(1, 7) for n in range(2 + user)]
    data = dataset_of(events, titles=TITLES)
    chosen = PromptOptions(template=str(path), style=style, **options)  # type: ignore[arg-type]
    tokenizer = tiny_bpe_tokenizer([*TITLES, "Watched: Next:"])
    return InstructionExamples(data, data.histories("train", 20), chosen, tokenizer=tokenizer)


@pytest.mark.parametrize("style", ["text", "hybrid"])
@pytest.mark.parametrize("max_history", [3, 20])
def test_lengths_of_prompts_are_those_of_their_tokens_but_for_a_constant(
    style: str, max_history: int, tmp_path: Path
) -> None:
    examples = prompts(tmp_path, style, slots=("history",), max_history=max_history)
    real = np.array([len(examples[i]["input_ids"]) for i in range(len(examples))])
    assert len(set(real.tolist())) > 5
    assert len(set((real - examples.lengths).tolist())) == 1
    part = examples.subset([4, 2])
    assert part.lengths.tolist() == examples.lengths[[4, 2]].tolist()


def test_lengths_know_the_limit_and_need_a_tokenizer(tmp_path: Path) -> None:
    examples = prompts(tmp_path, max_length=40)
    assert examples.lengths.max() == 40
    examples.tokenizer = None
    with pytest.raises(RecipeError, match="give the tokenizer"):
        _ = examples.lengths
