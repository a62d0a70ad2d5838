"""Beam search that cannot leave the catalogue: every beam stands at a node of the prefix trie.

Users: `heads.tiger`, `heads.cobra`, `llm.item_codes`.

    step h:  total = score + log p_h(child | beam) for the children of each beam's node;  top M over all of them

The model is asked once per level for all beams of all rows; it keeps its own cache and is told which beam each new one
continues. No sampling, no length penalty (all codes have one length), sums in float32, so beams that cover the
catalogue give the order of exhaustive scoring. Rows with fewer legal codes than beams carry dead beams (node -1, score
-inf), never duplicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from llmrec.blocks.trie import PrefixTrie

Normaliser = Literal["level", "trie", "given"]
"""Over what probabilities sum to one: the alphabet of the level, the legal children (renormalised), or whatever the
model did itself (a language model's whole vocabulary)."""


class CodeSpeaker(Protocol):
    """A model that writes codes level by level for a batch it has already read."""

    def first(self) -> Tensor:
        """[B, W_0] logits (log-probabilities for normaliser "given") of the first level."""
        ...

    def following(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """[B, M, W_level] for level >= 1.

        Args:
            level: The level to score.
            codes: [B, M] the code each beam has just taken at level - 1 (0 for dead beams).
            parents: [B, M] the beam of the call before that it continues; all 0 at level 1.
        """
        ...


@dataclass(frozen=True)
class Beams:
    """Finished beams, best first.

    Args:
        leaves: [B, M] leaf nodes, -1 where a beam is dead.
        scores: [B, M] float32 log-probabilities, -inf where dead.
        first_nodes: [B, M_0] the nodes of the first level that stayed in the beam, for its recall.
    """

    leaves: Tensor
    scores: Tensor
    first_nodes: Tensor


@torch.no_grad()
def beam_search(
    trie: PrefixTrie,
    speaker: CodeSpeaker,
    beams: int | Sequence[int],
    *,
    normaliser: Normaliser = "level",
    alive: Tensor | None = None,
) -> Beams:
    """The best codes of the catalogue for every row.

    Args:
        trie: The catalogue.
        speaker: The model after reading the batch.
        beams: M, or one width per level.
        normaliser: See `Normaliser`.
        alive: [B, nodes] bool, nodes a row may use (`alive_nodes`); None for all.
    """
    widths = [beams] * trie.depth if isinstance(beams, int) else list(beams)
    if len(widths) != trie.depth or min(widths) < 1:
        raise ValueError(f"beams: found {beams}, expected a positive number or one for each of {trie.depth} levels")
    logits = speaker.first().unsqueeze(1)
    rows = len(logits)
    nodes = torch.zeros(rows, 1, dtype=torch.long, device=logits.device)
    scores = torch.zeros(rows, 1, dtype=torch.float32, device=logits.device)
    for level, width in enumerate(widths):
        found, codes, real = trie.children(nodes, level)
        if alive is not None:
            real = real & alive.gather(1, found.flatten(1)).view_as(real)
        total = scores.unsqueeze(-1) + child_log_probs(logits, codes, real, normaliser)
        scores, best = total.flatten(1).topk(min(width, total[0].numel()), dim=1)
        nodes = found.flatten(1).gather(1, best).masked_fill(torch.isneginf(scores), -1)
        if level == 0:
            first_nodes = nodes
        if level + 1 < trie.depth:
            taken = codes.flatten(1).gather(1, best).masked_fill(nodes < 0, 0)
            logits = speaker.following(level + 1, taken, best // codes.shape[-1])
    return Beams(nodes, scores, first_nodes)


def child_log_probs(logits: Tensor, codes: Tensor, real: Tensor, normaliser: Normaliser) -> Tensor:
    """[..., K] float32 log-probabilities of children: logits [..., W], their codes [..., K]; -inf where not real."""
    logits = logits.float()
    if normaliser == "level":
        logits = logits - logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, codes).masked_fill(~real, float("-inf"))
    if normaliser == "trie":
        total = chosen.logsumexp(-1, keepdim=True)
        chosen = chosen - total.masked_fill(torch.isneginf(total), 0.0)
    return chosen


def alive_nodes(trie: PrefixTrie, seen: Tensor | None, candidates: Tensor | None) -> Tensor | None:
    """[B, nodes] bool: nodes with an item left for the row, or None where nothing is ruled out.

    Args:
        trie: The catalogue.
        seen: [B, S] items never to recommend, 0 = none.
        candidates: [B, C] the only items to recommend, 0 = none.
    """
    allowed = allowed_items(len(trie.leaf_items), seen, candidates)
    if allowed is None:
        return None
    left = _any_in_ranges(allowed[:, trie.leaf_items], trie.leaf_start)
    parts, end = [left], trie.first_leaf
    for level in reversed(range(trie.depth)):
        start = end - _nodes_of(trie, level)
        ranges = trie.first_child[start : end + 1]
        parts.append(_any_in_ranges(parts[-1], ranges - ranges[0]))
        end = start
    return torch.cat(parts[::-1], dim=1)


def _nodes_of(trie: PrefixTrie, level: int) -> int:
    """Nodes at a level counted from the root, which is level 0."""
    start, end = 0, 1
    for _ in range(level):
        start, end = end, int(trie.first_child[end])
    return end - start


def _any_in_ranges(flags: Tensor, bounds: Tensor) -> Tensor:
    """[B, N] bool, bounds [n + 1] -> [B, n]: whether any flag of the range is set."""
    counts = torch.nn.functional.pad(flags.cumsum(1, dtype=torch.int32), (1, 0))
    return counts[:, bounds[1:]] > counts[:, bounds[:-1]]


def allowed_items(num_items: int, seen: Tensor | None, candidates: Tensor | None) -> Tensor | None:
    """[B, I+1] bool: items a row may be given (column 0 False), or None where all are."""
    if seen is None and candidates is None:
        return None
    given = candidates if candidates is not None else seen
    assert given is not None
    allowed = torch.ones(len(given), num_items + 1, dtype=torch.bool, device=given.device)
    if candidates is not None:
        allowed = torch.zeros_like(allowed).scatter_(1, candidates, True)
    if seen is not None:
        allowed.scatter_(1, seen, False)
    allowed[:, 0] = False
    return allowed


def ranked_leaves(
    trie: PrefixTrie, beams: Beams, k: int, *, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Items of finished beams: ids [B, k], scores [B, k], valid [B, k]; each item once.

    Items that share a leaf stand one after the other in the trie's order with the leaf's score; `allowed` [B, I+1]
    leaves out those a row may not get.
    """
    items, real = trie.items(beams.leaves)
    if allowed is not None:
        real = real & allowed.gather(1, items.flatten(1)).view_as(real)
    scores = beams.scores.unsqueeze(-1).expand_as(items).masked_fill(~real, float("-inf")).flatten(1)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    scores, items = scores.gather(1, order), items.flatten(1).gather(1, order)
    if scores.shape[1] < k:
        missing = (0, k - scores.shape[1])
        scores = torch.nn.functional.pad(scores, missing, value=float("-inf"))
        items = torch.nn.functional.pad(items, missing)
    valid = torch.isfinite(scores)
    return items.masked_fill(~valid, 0), scores, valid


def recommend_codes(
    trie: PrefixTrie,
    speaker: CodeSpeaker,
    k: int,
    beams: int | Sequence[int],
    *,
    seen: Tensor | None = None,
    candidates: Tensor | None = None,
    normaliser: Normaliser = "level",
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best items: ids [B, k], log-probabilities [B, k], valid [B, k]; honours `seen` and `candidates`.

    Prefixes without an item the row may get are closed from the start, so seen items take no beams.
    """
    allowed = allowed_items(len(trie.leaf_items), seen, candidates)
    found = beam_search(trie, speaker, beams, normaliser=normaliser, alive=alive_nodes(trie, seen, candidates))
    return ranked_leaves(trie, found, k, allowed=allowed)
