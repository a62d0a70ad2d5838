"""Whether two forms of a model say the same: logits on fixed prompts, scores on real histories.

Tolerances are for the largest difference of any logit, with a floor and a share of the largest logit. In float32 only
the order of additions differs between an adapter beside its base and one merged into it (measured on 30 layers of width
576: 1.2e-4 at logits up to 37, all of the ten best tokens the same). In bfloat16 every merged weight is rounded once
more, to 8 bits (there: 1.3 to 2.6, 96% of the ten best tokens), so that check tells a wrong merge from a right one only
where the adapter does more than rounding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrec.errors import CheckFailed
from llmrec.llm.backbone import Backbone

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.llm.recommender import LLMRecommender

PROMPTS = (
    "The user has watched The Third Man, Casablanca and North by Northwest. The next film is",
    "1, 2, 3, 5, 8, 13,",
    "Question: which of these books would the reader choose next?\nAnswer:",
    "A recommender reads what happened, in order, and says what may come next: shoes, laces, polish,",
)
TOLERANCES = {"float32": (1e-4, 1e-5), "bfloat16": (0.1, 0.1)}
"""By dtype: the difference that is always allowed, and the share of the largest value."""
OVERLAPS = {"float32": 0.99, "bfloat16": 0.9}
TOP = 10


@dataclass(frozen=True)
class Parity:
    """How two models compare on the fixed prompts.

    Args:
        dtype: Type they compute in.
        max_abs_diff: Largest difference of any logit.
        largest_logit: Largest absolute logit of the first, for scale.
        top_k: How many of the best tokens are compared.
        top_k_overlap: Mean share of the best tokens both name, over all positions.
        tolerance: Largest difference allowed.
        min_overlap: Smallest overlap allowed.
        positions: Positions compared.
    """

    dtype: str
    max_abs_diff: float
    largest_logit: float
    top_k: int
    top_k_overlap: float
    tolerance: float
    min_overlap: float
    positions: int

    @property
    def holds(self) -> bool:
        """Whether both are the same model; a difference that is no number is none."""
        return self.max_abs_diff <= self.tolerance and self.top_k_overlap >= self.min_overlap

    def require(self, what: str) -> None:
        """Refuse a mismatch.

        Raises:
            CheckFailed: With the numbers.
        """
        if not self.holds:
            raise CheckFailed(
                f"{what}: logits differ by up to {self.max_abs_diff:.3g} ({self.tolerance:g} allowed in {self.dtype}) "
                f"and share {self.top_k_overlap:.1%} of the {self.top_k} best tokens (at least {self.min_overlap:.0%} "
                f"expected) on {self.positions} positions of fixed prompts"
            )


def allowed_difference(dtype: str, largest: float) -> float:
    """How far values may differ that are at most `largest` in size."""
    floor, share = TOLERANCES[dtype]
    return max(floor, share * largest)


@torch.no_grad()
def prompt_logits(model: Any, tokenizer: Any, gate: Tensor | None = None) -> list[Tensor]:
    """Logits of the fixed prompts, [S, V] float32 on the processor, one for each.

    Args:
        model: Plain causal language model or PeftModel.
        tokenizer: Its tokenizer.
        gate: [E] the same expert weights for every prompt, for adapters that ask for gates.
    """
    backbone = model if isinstance(model, Backbone) else Backbone(model)
    backbone.eval()
    device = backbone.embedding.weight.device
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
        gates = {} if gate is None else {"gates": gate.to(device)[None]}
        hidden = backbone(backbone.embed(ids), gates=gates).last_hidden_state
        found.append(backbone.logits(hidden)[0].cpu())
    return found


def compare_logits(first: list[Tensor], second: list[Tensor], dtype: torch.dtype) -> Parity:
    """Parity of two results of `prompt_logits`."""
    one, two = torch.cat(first), torch.cat(second)
    name = str(dtype).removeprefix("torch.")
    top, largest = min(TOP, one.shape[-1]), float(one.abs().max())
    return Parity(
        dtype=name,
        max_abs_diff=float((one - two).abs().max()),
        largest_logit=largest,
        top_k=top,
        top_k_overlap=_overlap(one, two, top),
        tolerance=allowed_difference(name, largest),
        min_overlap=OVERLAPS[name],
        positions=len(one),
    )


def compare_levels(first: list[Tensor], second: list[Tensor], dtype: torch.dtype) -> Parity:
    """Parity of log-probabilities of item codes, one [n, W] per level: the largest difference, the mean overlap."""
    levels = [compare_logits([one], [two], dtype) for one, two in zip(first, second, strict=True)]
    largest = max(level.largest_logit for level in levels)
    return replace(
        levels[0],
        max_abs_diff=float(torch.tensor([level.max_abs_diff for level in levels]).max()),  # keeps what is no number
        largest_logit=largest,
        top_k=max(level.top_k for level in levels),
        top_k_overlap=sum(level.top_k_overlap for level in levels) / len(levels),
        tolerance=allowed_difference(levels[0].dtype, largest),
        positions=sum(level.positions for level in levels),
    )


@dataclass(frozen=True)
class Shift:
    """How the scores of two recommenders differ on the same questions.

    Args:
        histories: How many histories of the data set were asked.
        scored: "the catalogue", or how many candidates.
        max_abs_diff: Largest difference of any score.
        mean_abs_diff: Mean difference.
        spread: Standard deviation of the first one's scores, for scale.
        top_1_same: Share of histories with the same best item.
        top_k: How many of the best items are compared.
        top_k_overlap: Mean share of them that both name.
    """

    histories: int
    scored: str
    max_abs_diff: float
    mean_abs_diff: float
    spread: float
    top_1_same: float
    top_k: int
    top_k_overlap: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_scores(first: Tensor, second: Tensor, recommender: LLMRecommender) -> Shift:
    """Shift between two results of `history_scores`."""
    whole = recommender.options.style == "item_slots"
    top = min(TOP, max(1, first.shape[1] // 2))
    difference = (first - second).abs()
    return Shift(
        histories=len(first),
        scored="the catalogue" if whole else f"{first.shape[1]} candidates",
        max_abs_diff=float(difference.max()),
        mean_abs_diff=float(difference.mean()),
        spread=float(first.std()),
        top_1_same=float((first.argmax(1) == second.argmax(1)).float().mean()),
        top_k=top,
        top_k_overlap=_overlap(first, second, top),
    )


def history_rows(recommender: LLMRecommender, dataset: InteractionDataset, count: int) -> list[dict[str, Any]]:
    """Real questions: `count` histories spread over the data set, with candidates where the style ranks such lists.

    Args:
        recommender: Says what a question holds.
        dataset: Where histories come from; the last split that has targets.
        count: How many, at most.

    Returns:
        Rows for `collate`; none where the data set has no events.
    """
    import numpy as np

    from llmrec.data.catalogue import ItemCatalogue
    from llmrec.data.negatives import candidate_lists

    if isinstance(dataset, ItemCatalogue):
        return []
    for split in ("test", "valid", "train"):
        examples = dataset.histories(split, recommender.options.max_history)  # type: ignore[arg-type]
        if len(examples):
            break
    else:
        return []
    examples = examples.subset(np.unique(np.linspace(0, len(examples) - 1, count).astype(int)))
    if recommender.options.style != "item_slots":
        listed = getattr(getattr(getattr(recommender, "renderer", None), "options", None), "candidates", None)
        size = listed or max(2, min(20, dataset.num_items // 2))
        examples = examples.with_candidates(np.asarray(candidate_lists(dataset, examples, size, "uniform", 0)))
    rows = [examples[n] for n in range(len(examples))]
    return [{**row, "targets": np.zeros_like(row["targets"])} for row in rows]


@torch.no_grad()
def history_scores(recommender: LLMRecommender, rows: list[dict[str, Any]], batch_size: int = 8) -> Tensor:
    """[n, I] scores of the catalogue, or [n, C] of the rows' candidates; float32 on the processor."""
    recommender.eval()
    device = recommender.item_table.device
    asked: Any = recommender
    found = []
    for start in range(0, len(rows), batch_size):
        batch: Any = recommender.collate(rows[start : start + batch_size])
        batch = {name: part.to(device) if torch.is_tensor(part) else part for name, part in batch.items()}
        if recommender.options.style == "item_slots":
            scores = asked.score_items(batch)[:, 1:]
        else:
            scores = recommender.score_candidates(batch)
        found.append(scores.float().cpu())
    return torch.cat(found)


def _overlap(first: Tensor, second: Tensor, top: int) -> float:
    one, two = first.topk(top, dim=-1).indices, second.topk(top, dim=-1).indices
    return float((one[:, :, None] == two[:, None, :]).any(-1).float().mean())
