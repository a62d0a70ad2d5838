"""A causal language model that writes codes: the mask inside `generate`, and beams as a tree in their user's row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MistralConfig, MistralForCausalLM

from llmrec.blocks.beam_search import Normaliser, beam_search, recommend_codes
from llmrec.blocks.trie import PrefixTrie
from llmrec.errors import RecipeError
from llmrec.llm.backbone import Backbone
from llmrec.llm.constrained import CausalCodeSpeaker, TrieLogitsProcessor, runner
from tests.llm.tiny import WIDTH, llama, recommender, tokenizer

SIZES = (5, 4, 6)
VOCABULARY = len(tokenizer())
EOS = 1
LENGTHS = [6, 1, 3]


def codes(items: int = 30, seed: int = 0) -> Tensor:
    """[I+1, 3] random codes, duplicates included."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, size, (items,), generator=generator) for size in SIZES]
    return torch.cat([torch.full((1, 3), -1), torch.stack(columns, 1)])


def level_tokens(seed: int = 0) -> list[Tensor]:
    """Any tokens in any order; levels share some."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(40, generator=generator)[:size] + 100 for size in SIZES]


TRIE, TOKENS = PrefixTrie.build(codes(), SIZES), level_tokens()


def prompts(left: bool = True) -> tuple[Tensor, Tensor]:
    """Token ids and mask [3, 6], padded on one side with a token that would matter if it were read."""
    ids = torch.randint(2, 90, (3, 6), generator=torch.Generator().manual_seed(1))
    columns = torch.arange(6).expand(3, -1)
    length = torch.tensor(LENGTHS)[:, None]
    mask = (columns >= 6 - length) if left else (columns < length)
    return ids if left else torch.stack([row.roll(n) for row, n in zip(ids, LENGTHS, strict=True)]), mask.long()


class Counting:
    """A runner that notes the shape of every call."""

    def __init__(self, backbone: Backbone, gates: dict[str, Tensor] | None = None) -> None:
        self.run, self.shapes = runner(backbone, gates), list[tuple[int, ...]]()

    def __call__(self, inputs_embeds: Tensor, attention_mask: Tensor, *rest: Any) -> Any:
        self.shapes.append(tuple(inputs_embeds.shape[:2]))
        return self.run(inputs_embeds, attention_mask, *rest)


def speaker(
    backbone: Backbone, left: bool = True, gates: dict[str, Tensor] | None = None, normaliser: Normaliser = "given",
    rows: slice = slice(None), cut: int = 0,
) -> CausalCodeSpeaker:  # fmt: skip
    """Prompts `rows`, without their first `cut` columns."""
    ids, mask = prompts(left)

    def logits(level: int, hidden: Tensor) -> Tensor:
        found = backbone.logits(hidden)
        return (found.log_softmax(-1) if normaliser == "given" else found)[..., TOKENS[level]]

    return CausalCodeSpeaker(
        Counting(backbone, gates), backbone.embed(ids[rows, cut:]), mask[rows, cut:],
        lambda level, found: backbone.embed(TOKENS[level][found]), logits,
    )  # fmt: skip


@torch.no_grad()
def exhaustive(backbone: Backbone, gates: dict[str, Tensor] | None = None, normaliser: Normaliser = "given") -> Tensor:
    """[3, leaves] scores of all codes in the trie's order: every prompt + code is read on its own, without padding."""
    ids, mask = prompts()
    leaves = codes()[1:].unique(dim=0)
    words = torch.stack([TOKENS[level][leaves[:, level]] for level in range(3)], 1)
    total = torch.zeros(3, len(leaves))
    for row in range(3):
        prompt = ids[row][mask[row].bool()]
        own = {name: value[row : row + 1] for name, value in (gates or {}).items()}
        for leaf in range(len(leaves)):
            text = torch.cat([prompt, words[leaf]])[None]
            logs = backbone.logits(backbone(backbone.embed(text), None, own).last_hidden_state)[0, -4:-1]
            for level in range(3):
                known = logs[level] if normaliser == "given" else logs[level][TOKENS[level]]
                place = words[leaf, level] if normaliser == "given" else leaves[leaf, level]
                total[row, leaf] += known.log_softmax(-1)[place]
    return total


def agrees(found: Any, scores: Tensor, count: int) -> None:
    """Beams are the `count` best leaves of scores [3, leaves], in order."""
    best, order = scores.sort(dim=1, descending=True)
    assert (best.diff(dim=1).abs().min() > 1e-5) and torch.equal(found.leaves - TRIE.first_leaf, order[:, :count])
    torch.testing.assert_close(found.scores, best[:, :count], rtol=1e-5, atol=1e-5)


# The tree ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("normaliser", ["given", "level"])
def test_wide_beams_equal_reading_every_code_on_its_own(attention: str, left: bool, normaliser: Normaliser) -> None:
    backbone = Backbone(llama(attn_implementation=attention))
    found = beam_search(TRIE, speaker(backbone, left, normaliser=normaliser), TRIE.num_leaves, normaliser=normaliser)
    agrees(found, exhaustive(backbone, normaliser=normaliser), TRIE.num_leaves)


def test_more_beams_than_codes_leave_dead_ones() -> None:
    backbone = Backbone(llama())
    found = beam_search(TRIE, speaker(backbone), 200, normaliser="given")
    live = TRIE.num_leaves
    assert (found.leaves[:, live:] == -1).all() and torch.isneginf(found.scores[:, live:]).all()
    agrees(type(found)(found.leaves[:, :live], found.scores[:, :live], found.first_nodes), exhaustive(backbone), live)


class Uncached:
    """Reads prompt and prefix again for every beam."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, (self.ids, self.mask) = backbone, prompts()

    def first(self) -> Tensor:
        self.prefixes = torch.zeros(3, 1, 0, dtype=torch.long)
        return self._read(0)[:, 0]

    def following(self, level: int, found: Tensor, parents: Tensor) -> Tensor:
        index = parents[..., None].expand(-1, -1, level - 1)
        self.prefixes = torch.cat([self.prefixes.gather(1, index), TOKENS[level - 1][found][..., None]], 2)
        return self._read(level)

    def _read(self, level: int) -> Tensor:
        beams = self.prefixes.shape[1]
        text = torch.cat([self.ids.repeat_interleave(beams, 0), self.prefixes.flatten(0, 1)], 1)
        mask = torch.nn.functional.pad(self.mask.repeat_interleave(beams, 0), (0, level), value=1)
        last = self.backbone(self.backbone.embed(text), mask).last_hidden_state[:, -1]
        return self.backbone.logits(last).log_softmax(-1)[:, TOKENS[level]].view(3, beams, -1)


@pytest.mark.parametrize("beams", [1, 4, [2, 9, 3], [5, 1, 6], [5, 5, 5]])
@torch.no_grad()
def test_cached_equals_uncached(beams: int | list[int]) -> None:
    backbone = Backbone(llama())
    cached = beam_search(TRIE, speaker(backbone), beams, normaliser="given")
    again = beam_search(TRIE, Uncached(backbone), beams, normaliser="given")
    assert torch.equal(cached.leaves, again.leaves) and torch.equal(cached.first_nodes, again.first_nodes)
    torch.testing.assert_close(cached.scores, again.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [4, [3, 6, 5]])
def test_rows_do_not_depend_on_batch_or_padding(beams: int | list[int]) -> None:
    backbone = Backbone(llama())
    whole = beam_search(TRIE, speaker(backbone), beams, normaliser="given")
    for row, length in enumerate(LENGTHS):
        alone = speaker(backbone, rows=slice(row, row + 1), cut=6 - length)
        own = beam_search(TRIE, alone, beams, normaliser="given")
        assert torch.equal(own.leaves[0], whole.leaves[row])
        torch.testing.assert_close(own.scores[0], whole.scores[row], rtol=1e-5, atol=1e-5)
    right = beam_search(TRIE, speaker(backbone, left=False), beams, normaliser="given")
    assert torch.equal(right.leaves, whole.leaves)


def test_prompts_are_read_once_and_beams_are_columns_of_one_row() -> None:
    backbone = Backbone(llama())
    asked = speaker(backbone)
    for beams in (2, 4):
        asked.run.shapes.clear()  # type: ignore[attr-defined]
        beam_search(TRIE, asked, beams, normaliser="given")
        assert asked.run.shapes == [(3, 6), (3, beams), (3, beams)]  # type: ignore[attr-defined]
        assert asked._cache.get_seq_length() == 6 + 2 * beams and len(asked._cache.layers[0].keys) == 3


def test_a_speaker_can_be_asked_again() -> None:
    asked = speaker(Backbone(llama()))
    one, two = (beam_search(TRIE, asked, 5, normaliser="given") for _ in range(2))
    assert torch.equal(one.leaves, two.leaves) and torch.equal(one.scores, two.scores)


def test_seen_items_are_not_written() -> None:
    seen = torch.arange(1, 21).expand(3, -1)
    items, _, valid = recommend_codes(TRIE, speaker(Backbone(llama())), 10, 10, seen=seen, normaliser="given")
    assert valid.all() and (items.sort(1).values == torch.arange(21, 31)).all()


def test_gates_of_an_adapter_stay_with_their_user() -> None:
    backbone = recommender("text", "ilora", trained=True).backbone
    gates = {"user_repr": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))}
    found = beam_search(TRIE, speaker(backbone, gates=gates), TRIE.num_leaves, normaliser="given")
    agrees(found, exhaustive(backbone, gates), TRIE.num_leaves)
    other = {"user_repr": torch.cat([-gates["user_repr"][:1], gates["user_repr"][1:]])}
    moved = beam_search(TRIE, speaker(backbone, gates=other), TRIE.num_leaves, normaliser="given")
    assert (moved.scores[0] - found.scores[0]).abs().max() > 1e-3
    torch.testing.assert_close(moved.scores[1:], found.scores[1:])


def test_half_precision() -> None:
    backbone = recommender("text", "lora", dtype=torch.bfloat16, trained=True).backbone
    found = beam_search(TRIE, speaker(backbone), 5, normaliser="given")
    again = beam_search(TRIE, speaker(backbone, left=False), 5, normaliser="given")
    assert found.scores.dtype == torch.float32 and torch.isfinite(found.scores).all()
    torch.testing.assert_close(found.scores, again.scores, rtol=0.05, atol=0.2)


def mistral(window: int | None) -> Backbone:
    torch.manual_seed(0)
    return Backbone(
        MistralForCausalLM(
            MistralConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=64, vocab_size=VOCABULARY, initializer_range=0.1, sliding_window=window,
            )
        ).eval()
    )  # fmt: skip


def test_an_attention_window_must_hold_prompt_and_code() -> None:
    backbone = mistral(8)  # the longest prompt has 6 tokens, the last code is not read
    found = beam_search(TRIE, speaker(backbone), TRIE.num_leaves, normaliser="given")
    agrees(found, exhaustive(backbone), TRIE.num_leaves)
    with pytest.raises(RecipeError, match="found a prompt and code of 8 tokens, expected at most 7"):
        beam_search(TRIE, speaker(mistral(7)), 4, normaliser="given")


def test_attention_that_cannot_follow_a_tree_is_refused() -> None:
    backbone = Backbone(llama())
    backbone.base.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RecipeError, match="found 'flash_attention_2', item codes need sdpa or eager"):
        runner(backbone)


# Inside generate -----------------------------------------------------------------------------------------------------


def allowed_after(prefix: list[int]) -> list[int]:
    """Tokens that may follow tokens, written with loops."""
    rows = {tuple(int(TOKENS[level][row[level]]) for level in range(3)) for row in codes()[1:].tolist()}
    return sorted({row[len(prefix)] for row in rows if list(row[: len(prefix)]) == prefix and len(prefix) < 3})


def test_the_mask_leaves_the_continuations_of_the_catalogue() -> None:
    words = torch.stack([TOKENS[level][codes()[1:, level]] for level in range(3)], 1)
    processor = TrieLogitsProcessor(TRIE, TOKENS, 4, EOS)
    wrong = words.clone()
    wrong[::2, 0] = 7  # a token of no level
    wrong[1::2, 1] = words[1::2, 1].roll(1)
    for m in range(5):
        given = torch.nn.functional.pad(torch.cat([words, wrong]), (0, 1), value=EOS)[:, :m]
        ids = torch.cat([torch.full((60, 4), 9), given], 1)
        scores = torch.randn(60, VOCABULARY)
        masked = processor(ids, scores)
        assert torch.equal(masked[masked.isfinite()], scores[masked.isfinite()])
        for row, kept in zip(given.tolist(), masked.isfinite(), strict=True):
            assert kept.nonzero().flatten().tolist() == (allowed_after(row) or [EOS])


def test_without_an_end_token_a_row_outside_the_trie_has_no_continuation() -> None:
    processor = TrieLogitsProcessor(TRIE, TOKENS, 0)
    assert torch.isneginf(processor(torch.tensor([[7]]), torch.zeros(1, VOCABULARY))).all()
    whole = torch.stack([TOKENS[level][codes()[1, level]] for level in range(3)])[None]
    assert torch.isneginf(processor(whole, torch.zeros(1, VOCABULARY))).all()


def test_the_mask_keeps_no_state() -> None:
    processor = TrieLogitsProcessor(TRIE, TOKENS, 1)
    scores, start = torch.randn(1, VOCABULARY), torch.tensor([[0]])
    one = processor(start, scores)
    processor(torch.tensor([[0, int(TOKENS[0][0])]]), scores)
    assert torch.equal(processor(start, scores), one)
    with pytest.raises(ValueError, match="found 0 tokens, expected a prompt of 1"):
        processor(start[:, :0], scores)


def test_tokens_must_fit_the_trie() -> None:
    with pytest.raises(ValueError, match=r"found \(5, 4\) tokens per level, expected \(5, 4, 6\)"):
        TrieLogitsProcessor(TRIE, TOKENS[:2], 0)
    with pytest.raises(ValueError, match="a token twice in one level"):
        TrieLogitsProcessor(TRIE, [TOKENS[0], torch.tensor([3, 3, 4, 5]), TOKENS[2]], 0)


def generated(model: Any, beams: int, **options: Any) -> Any:
    ids, mask = prompts()
    settings: dict[str, Any] = dict(
        do_sample=False, num_beams=beams, num_return_sequences=beams, max_new_tokens=3, length_penalty=0.0,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    chosen = {name: options.pop(name) for name in ("eos_token_id", "max_new_tokens", "do_sample") if name in options}
    config = GenerationConfig(**{**settings, **chosen})
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)


def written(sequences: Tensor) -> Tensor:
    """Leaves of generated sequences, -1 where one is not in the catalogue."""
    columns = [(word[:, None] == TOKENS[level]).long().argmax(1) for level, word in enumerate(sequences[:, 6:9].T)]
    right = all(bool(torch.isin(word, TOKENS[level]).all()) for level, word in enumerate(sequences[:, 6:9].T))
    assert right
    return TRIE.find(torch.stack(columns, 1))


@pytest.mark.parametrize("beams", [2, 5, 60])
@pytest.mark.parametrize("way", ["processor", "prefix function"])
def test_beams_equal_generate_of_transformers(beams: int, way: str) -> None:
    model = llama()
    options: dict[str, Any] = {"logits_processor": LogitsProcessorList([TrieLogitsProcessor(TRIE, TOKENS, 6)])}
    if way == "prefix function":  # transformers asks it for surplus beams too, and wants some token for them
        options = {"prefix_allowed_tokens_fn": lambda row, ids: allowed_after(ids[6:].tolist()) or [EOS]}
    found = generated(model, beams, **options)
    ours = beam_search(TRIE, speaker(Backbone(model)), beams, normaliser="given")
    live = min(beams, TRIE.num_leaves)
    theirs = found.sequences_scores.view(3, beams)[:, :live]
    torch.testing.assert_close(ours.scores[:, :live], theirs, rtol=1e-5, atol=1e-5)
    best = found.sequences.view(3, beams, -1)[:, :live]
    assert torch.equal(ours.leaves[:, :live], written(best.flatten(0, 1)).view(3, live))


def test_greedy_and_sampled_answers_are_codes_and_end() -> None:
    model = llama()
    for sample in (False, True):
        torch.manual_seed(0)
        found = generated(
            model, 1, do_sample=sample, eos_token_id=EOS, max_new_tokens=9,
            logits_processor=LogitsProcessorList([TrieLogitsProcessor(TRIE, TOKENS, 6, EOS)]),
        )  # fmt: skip
        assert (written(found.sequences) >= TRIE.first_leaf).all()
        assert (found.sequences[:, 9] == EOS).all() and found.sequences.shape[1] == 10


def test_prompts_given_as_embeddings_have_no_columns() -> None:
    backbone = Backbone(llama())
    ids, mask = prompts()
    processor = LogitsProcessorList([TrieLogitsProcessor(TRIE, TOKENS, 0)])
    config = GenerationConfig(
        do_sample=False, num_beams=4, num_return_sequences=4, max_new_tokens=3, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    found = backbone.model.generate(
        inputs_embeds=backbone.embed(ids), attention_mask=mask, generation_config=config, logits_processor=processor
    )
    ours = beam_search(TRIE, speaker(backbone), 4, normaliser="given")
    torch.testing.assert_close(found.sequences_scores.view(3, 4), ours.scores, rtol=1e-5, atol=1e-5)
