"""What may follow 800 beams of codes: a Python loop over rows against the prefix trie, 20,000 and up to 10^6 items."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PrefixConstrainedLogitsProcessor

from llmrec.blocks.beam_search import child_log_probs
from llmrec.blocks.trie import PrefixTrie
from llmrec.llm.constrained import TrieLogitsProcessor

ROWS, BEAMS, ITEMS, LEVELS, CODES, VOCABULARY = 800, 20, 20_000, 4, 256, 32_000
STEP = "per-row Python mask of generate / masked scores of our decoder, a step"
FLAT = "mask at nodes of 100 children: 10^6 items / 10^4 items"
MINIMUM = {STEP: 100.0}
MAXIMUM = {FLAT: 2.0}


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Processor time of a call, mean of several after one that warms up: waiting for a busy machine does not count.

    Calls of milliseconds and of seconds stand in one ratio here; the shortest wall time of the former would be taken
    between two interruptions, which the latter never escape.
    """
    call()
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def catalogue(items: int) -> tuple[Tensor, PrefixTrie]:
    """Random codes [I+1, 4] of 4 x 256, and their trie."""
    codes = torch.randint(0, CODES, (items + 1, LEVELS), generator=torch.Generator().manual_seed(0))
    codes[0] = -1
    return codes, PrefixTrie.build(codes, (CODES,) * LEVELS)


def beams(codes: Tensor) -> Tensor:
    """[800, 4] codes of random items."""
    return codes[torch.randint(1, len(codes), (ROWS,), generator=torch.Generator().manual_seed(1))]


def nested(codes: Tensor) -> dict[int, Any]:
    """The catalogue as dictionaries in dictionaries, tokens as keys (code c of level l is token 256 l + c)."""
    root: dict[int, Any] = {}
    for row in (codes[1:] + CODES * torch.arange(LEVELS)).tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})
    return root


def allowed_tokens(root: dict[int, Any]) -> Callable[[int, Tensor], list[int]]:
    """The usual `prefix_allowed_tokens_fn`."""

    def allowed(row: int, ids: Tensor) -> list[int]:
        node = root
        for token in ids.tolist():
            node = node[token]
        return list(node)

    return allowed


def figures_of_steps() -> dict[str, float]:
    """20,000 items, mean of the levels at which every beam stands at a node of its own."""
    codes, trie = catalogue(ITEMS)
    rows = beams(codes)
    tokens = rows + CODES * torch.arange(LEVELS)
    scores = torch.randn(ROWS, VOCABULARY).log_softmax(-1)
    allowed = allowed_tokens(nested(codes))
    python = PrefixConstrainedLogitsProcessor(allowed, BEAMS)
    ours = TrieLogitsProcessor(trie, list((torch.arange(CODES * LEVELS)).view(LEVELS, CODES)), 0)
    times = dict.fromkeys(("python", "processor", "decoder", "python table", "table"), 0.0)

    def table(ids: Tensor, level: int) -> Tensor:
        mask = torch.zeros(ROWS, CODES, dtype=torch.bool)
        for row in range(ROWS):
            mask[row, [token - CODES * level for token in allowed(row, ids[row])]] = True
        return mask

    for level in range(1, LEVELS):
        ids, nodes = tokens[:, :level], trie.find(rows[:, :level])
        logits = scores[:, CODES * level : CODES * (level + 1)].contiguous()

        def decoder(nodes: Tensor = nodes, level: int = level, logits: Tensor = logits) -> Tensor:
            _, found, real = trie.children(nodes, level)
            return child_log_probs(logits, found, real, "given")

        assert torch.equal(python(ids, scores), ours(ids, scores))
        assert torch.equal(decoder().isfinite().sum(1), python(ids, scores).isfinite().sum(1))
        assert torch.equal(table(ids, level), trie.allowed(nodes, level))
        times["python"] += cpu_seconds(partial(python, ids, scores), 3)
        times["processor"] += cpu_seconds(partial(ours, ids, scores), 5)
        times["decoder"] += cpu_seconds(decoder, 200)
        times["python table"] += cpu_seconds(partial(table, ids, level), 5)
        times["table"] += cpu_seconds(partial(trie.allowed, nodes, level), 200)
    return {
        STEP: times["python"] / times["decoder"],
        "the same in generate (32,000 tokens): Python / TrieLogitsProcessor": times["python"] / times["processor"],
        "table of one level [800, 256]: Python / trie.allowed": times["python table"] / times["table"],
        "masked scores of our decoder, ms a step": 1000 * times["decoder"] / (LEVELS - 1),
    }


def figures_of_size() -> dict[str, float]:
    """The mask in a small and in a large catalogue: once with equally many children, once with what 4 x 256 gives."""
    equal, drawn = [], []
    for items, levels in ((10_000, 2), (1_000_000, 3)):
        every = (
            torch.arange(items)[:, None] // 100 ** torch.arange(levels - 1, -1, -1) % 100
        )  # all codes of 2 or 3 x 100
        codes = torch.cat([torch.full((1, levels), -1), every])
        trie = PrefixTrie.build(codes, (100,) * levels)
        nodes = trie.find(beams(codes)[:, :-1])
        equal.append(cpu_seconds(partial(trie.allowed, nodes, levels - 1), 300))
        codes, trie = catalogue(items)
        rows = beams(codes)
        nodes_of = [trie.find(rows[:, :level]) for level in range(LEVELS)]
        drawn.append([cpu_seconds(partial(trie.allowed, nodes, level), 100) for level, nodes in enumerate(nodes_of)])
    small, large = drawn
    return {
        FLAT: equal[1] / equal[0],
        "mask, 4 x 256 random codes, mean of the levels: 10^6 items / 10^4 items": sum(large) / sum(small),
        "mask, second level of 4 x 256 (widest node 256 / 52): 10^6 items / 10^4 items": large[1] / small[1],
    }


def run() -> dict[str, float]:
    """Ratios of processor times; `MINIMUM` and `MAXIMUM` hold what they must reach. Masks are compared first."""
    return {**figures_of_steps(), **figures_of_size()}


if __name__ == "__main__":
    for name, value in run().items():
        aim = (
            f" (at least {MINIMUM[name]})"
            if name in MINIMUM
            else f" (at most {MAXIMUM[name]})"
            if name in MAXIMUM
            else ""
        )
        print(f"{name}: {value:.3g}{aim}")
