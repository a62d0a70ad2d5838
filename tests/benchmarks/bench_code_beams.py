"""Beams of item codes after prompts of 200 tokens: `generate` with a prefix function against a tree in each row."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from llmrec.blocks.beam_search import Beams, beam_search
from llmrec.blocks.trie import PrefixTrie
from llmrec.llm.backbone import Backbone
from llmrec.llm.constrained import CausalCodeSpeaker, TrieLogitsProcessor, runner
from tests.benchmarks.bench_trie_mask import allowed_tokens, cpu_seconds

USERS, PROMPT, ITEMS, LEVELS, CODES, VOCABULARY, WIDE = 4, 200, 20_000, 3, 256, 8_000, 200
RATIO = "generate with a prefix function / ours, {} beams"
INVALID = f"share of {WIDE} beams a user that are no item, or twice there: {{}}"
MINIMUM = {RATIO.format(20): 5.0, RATIO.format(50): 5.0}
MAXIMUM = {INVALID.format("ours"): 0.0, INVALID.format("generate with our mask"): 0.0}


def model() -> Backbone:
    """A random language model, large enough that matrix products and not calls take the time."""
    torch.manual_seed(0)
    return Backbone(
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=512, vocab_size=VOCABULARY,
            )
        ).eval()
    )  # fmt: skip


def catalogue() -> tuple[Tensor, PrefixTrie, list[Tensor]]:
    """Codes [I+1, 3], their trie, and the tokens of each level."""
    codes = torch.randint(0, CODES, (ITEMS + 1, LEVELS), generator=torch.Generator().manual_seed(0))
    codes[0] = -1
    trie = PrefixTrie.build(codes, (CODES,) * LEVELS)
    return codes, trie, list(torch.arange(LEVELS * CODES).view(LEVELS, CODES) + 1_000)


def library(backbone: Backbone, prompts: Tensor, beams: int, **constraint: object) -> tuple[Tensor, Tensor]:
    """Tokens [B, M, 3] and scores [B, M] of transformers' beam search."""
    found = backbone.model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=GenerationConfig(
            do_sample=False, num_beams=beams, num_return_sequences=beams, max_new_tokens=LEVELS, length_penalty=0.0,
            pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        ),
        **constraint,
    )  # fmt: skip
    return found.sequences[:, PROMPT:].view(-1, beams, LEVELS), found.sequences_scores.view(-1, beams)


def ours(backbone: Backbone, prompts: Tensor, beams: int, trie: PrefixTrie, tokens: list[Tensor]) -> Beams:
    """The same search with prompts read once, probabilities over the whole vocabulary as in the library."""
    speaker = CausalCodeSpeaker(
        runner(backbone),
        backbone.embed(prompts),
        torch.ones_like(prompts),
        lambda level, codes: backbone.embed(tokens[level][codes]),
        lambda level, hidden: backbone.logits(hidden).log_softmax(-1)[..., tokens[level]],
    )
    return beam_search(trie, speaker, beams, normaliser="given")


def invalid(found: list[list[tuple[int, ...]]], codes: Tensor) -> float:
    """Share of the beams of all users whose code no item has, or which another beam of the user has too."""
    known = {tuple(row) for row in codes[1:].tolist()}
    wrong = sum(len(row) - len(known & set(row)) for row in found)
    return wrong / sum(map(len, found))


def run() -> dict[str, float]:
    """Ratios of processor times, and shares; `MINIMUM` and `MAXIMUM` hold the aims. Results are compared first."""
    backbone, (codes, trie, tokens) = model(), catalogue()
    prompts = torch.randint(0, 1_000, (USERS, PROMPT), generator=torch.Generator().manual_seed(0))
    words = torch.stack([tokens[level][codes[1:, level]] for level in range(LEVELS)], 1)
    root: dict = {}
    for row in words.tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})
    following = allowed_tokens(root)
    function = {"prefix_allowed_tokens_fn": lambda row, ids: following(row, ids[PROMPT:])}
    starts = torch.stack([level[0] for level in tokens])
    figures = {}
    for beams in (20, 50):
        written, scores = library(backbone, prompts, beams, **function)
        found = ours(backbone, prompts, beams, trie, tokens)
        # Neighbours whose scores differ by rounding alone may change places: the sets must agree.
        assert torch.equal(trie.find(written - starts).sort(1).values, found.leaves.sort(1).values)
        torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-4)
        slow = cpu_seconds(partial(library, backbone, prompts, beams, **function), 2)
        fast = cpu_seconds(partial(ours, backbone, prompts, beams, trie, tokens), 10)
        figures[RATIO.format(beams)] = slow / fast
    found = ours(backbone, prompts, WIDE, trie, tokens)
    items, _ = trie.items(found.leaves)
    own = [[tuple(code) for code in codes[row].tolist()] for row in items[..., 0]]
    figures[INVALID.format("ours")] = invalid(own, codes)
    mask = LogitsProcessorList([TrieLogitsProcessor(trie, tokens, PROMPT)])
    written, _ = library(backbone, prompts[:1], WIDE, logits_processor=mask)
    figures[INVALID.format("generate with our mask")] = invalid(
        [[tuple(code) for code in row] for row in (written - starts).tolist()], codes
    )
    return figures


if __name__ == "__main__":
    for name, value in run().items():
        aim = f"at least {MINIMUM[name]}" if name in MINIMUM else f"at most {MAXIMUM[name]}"
        print(f"{name}: {value:.3g} ({aim})")
