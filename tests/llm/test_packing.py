"""Packed rows: every token once, nothing seen of a neighbour, the loss and gradients of padded rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llmrec.data.item_text import title_texts
from llmrec.data.prepare import PrepareOptions, prepare_source
from llmrec.data.prompt_encoder import PromptOptions
from llmrec.downloads import cache_root
from llmrec.errors import RecipeError
from llmrec.llm.loading import load_language_model
from llmrec.llm.packing import arrange, check_isolation, pack, packed_states
from llmrec.llm.recommender import LLMRecommender
from llmrec.llm.rendering import PromptRenderer
from llmrec.recipe import StageSpec
from llmrec.tuners.ilora import ILoraTuner
from tests.llm.tiny import LENGTH, WIDTH, Renderer, encoder, llama, recommender, rows, tokenizer, with_answers

HISTORIES = [[1, 2, 3, 4, 5, 6, 7], [4, 5], [6], [7, 8, 9], [3, 2, 11, 12], [9]]
ANSWERS = [10, 14, 18, 3, 7, 5]


def made(model: LLMRecommender, left: bool = False) -> Any:
    return with_answers(model, model.collate(rows(HISTORIES)), ANSWERS, left)


def loss_and_gradients(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(11)
    loss = model.answer_loss(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_packing_changes_nothing(model: Any, batch: Any, tolerance: float = 1e-5) -> None:
    model.packing = False
    expected, gradients = loss_and_gradients(model, batch)
    model.use_packing()
    found, packed = loss_and_gradients(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert packed.keys() == gradients.keys() and any(bool(g.any()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("single_row", [True, False])
def test_every_token_stands_in_one_cell_with_its_own_position(left: bool, single_row: bool) -> None:
    lengths, longest = [7, 2, 5, 1, 3], 9
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = 1
    mask = mask if left else mask.flip(1)
    packed = pack(mask, width=8, single_row=single_row)
    real = mask.bool()
    cells = packed.cell[real]
    assert len(set(cells.tolist())) == sum(lengths)
    tokens = torch.arange(mask.numel()).view_as(mask)
    assert torch.equal(packed.source.flatten()[cells], tokens[real])
    assert torch.equal(packed.owner.flatten()[cells], torch.arange(len(lengths))[:, None].expand_as(mask)[real])
    assert torch.equal(packed.positions.flatten()[cells], (mask.cumsum(1) - 1)[real])
    if single_row:
        assert packed.source.shape == (1, sum(lengths))


def test_rows_never_cost_more_than_padding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = (1 + rng.lognormal(2, 1, rng.integers(1, 20))).astype(int).tolist()
        knee = int(rng.choice([1, 50, 5000]))
        found = arrange(lengths, knee)
        width = max(sum(lengths[b] for b in row) for row in found)
        assert sorted(b for row in found for b in row) == list(range(len(lengths))) and all(found)
        padded = len(lengths) * max(lengths) * (knee + max(lengths))
        assert len(found) * width * (knee + width) <= padded


def test_attention_keeps_rows_short() -> None:
    lengths = [40, *[30] * 7]
    assert len(arrange(lengths, knee=1_000_000)) == 1  # attention is nothing beside the rest: no cell is wasted
    assert len(arrange(lengths, knee=10)) == 8  # it is nearly everything: no row grows
    assert len(arrange([40, 20, 20], knee=100)) == 2  # no waste, and no row longer than the longest example


# Loss and gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("tuner", ["ilora", "lora"])
@pytest.mark.parametrize("style", ["text", "hybrid"])
def test_loss_and_gradients_are_those_of_padded_rows(style: str, tuner: str, left: bool) -> None:
    model = recommender(style, tuner, trained=True).train()
    assert_packing_changes_nothing(model, made(model, left))


def test_user_slots_and_text_only_steps_are_packed_alike() -> None:
    model: Any = recommender("hybrid", trained=True, user_slot=True, curriculum=True).train()
    batch = made(model)
    model.begin_step(0, 10)  # the curriculum starts with text
    assert model._text_now
    assert_packing_changes_nothing(model, batch)
    model.begin_step(10, 10)
    assert not model._text_now
    assert_packing_changes_nothing(model, batch)


def test_finished_gates_reach_their_own_examples() -> None:
    gates = torch.softmax(torch.randn(len(HISTORIES), 4, generator=torch.Generator().manual_seed(1)) * 3, -1)
    base = ILoraTuner.attach(llama(), ILoraTuner.configure({"r": 8, "lora_dropout": 0.0, "router": "none"}))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    source = encoder()
    source.gates = lambda batch: gates  # type: ignore[assignment]
    model = LLMRecommender.build(
        base, encoder=source, tokenizer=tokenizer(), renderer=Renderer(), style="text", max_history=LENGTH
    )
    assert_packing_changes_nothing(model.train(), made(model))


def test_noise_of_the_router_is_drawn_per_example() -> None:
    options = {"r": 8, "lora_dropout": 0.0, "logit_noise": 1.0}
    base = ILoraTuner.attach(llama(), ILoraTuner.configure(options, gate_dim=WIDTH))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = LLMRecommender.build(
        base, encoder=encoder(), tokenizer=tokenizer(), renderer=Renderer(), style="text", max_history=LENGTH
    )
    assert_packing_changes_nothing(model.train(), made(model))


def test_activation_checkpointing_recomputes_with_the_gates_of_its_own_rows() -> None:
    model = recommender("hybrid", trained=True).train()
    batch = made(model)
    _, expected = loss_and_gradients(model, batch)
    model.use_packing()  # type: ignore[operator]
    model.model.activation_checkpointing_enable()
    first: Any = model.answer_loss(batch)  # type: ignore[operator]
    with torch.no_grad():
        model.answer_loss(with_answers(model, model.collate(rows(HISTORIES[::-1])), ANSWERS, False))  # type: ignore[operator]
    model.zero_grad()
    first.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


# Isolation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", [None, "lora", "ilora"])
def test_an_example_does_not_change_its_neighbours(tuner: str | None) -> None:
    model = recommender("text", tuner, trained=tuner is not None)
    batch = made(model)
    mask, gates, embeds = batch["attention_mask"], model.sequence_gates(batch), model.embed(batch)  # type: ignore[operator]
    before = packed_states(model.backbone, embeds, mask, gates)
    assert len(pack(mask, model.backbone.width).source) < len(HISTORIES)  # rows are shared
    for changed in range(len(HISTORIES)):
        other = embeds.clone()
        other[changed] = torch.randn(other[changed].shape, generator=torch.Generator().manual_seed(changed))
        after = packed_states(model.backbone, other, mask, gates)
        moved = (after - before).abs().amax(-1) > 0
        real = mask.bool()
        assert bool(moved[changed][real[changed]].all())
        real[changed] = False
        assert not bool(moved[real].any())


def test_a_user_does_not_change_the_examples_of_others() -> None:
    model = recommender("hybrid", trained=True)
    batch = made(model)
    states = model.encoder.user_representation(batch)
    mask, embeds = batch["attention_mask"].bool(), model.embed(batch)  # type: ignore[operator]
    before = packed_states(model.backbone, embeds, mask.long(), {"user_repr": states})
    swapped = states.clone()
    swapped[2] = -states[2]
    moved = (packed_states(model.backbone, embeds, mask.long(), {"user_repr": swapped}) - before).abs().amax(-1) > 0
    assert bool(moved[2][mask[2]].all())
    mask[2] = False
    assert not bool(moved[mask].any())


@pytest.mark.parametrize(("dtype", "attention"), [("float32", "sdpa"), ("float32", "eager"), ("bfloat16", "sdpa")])
def test_back_ends_that_isolate_pass_the_check_and_nothing_else_moves(dtype: str, attention: str) -> None:
    model = recommender("text", trained=True, dtype=getattr(torch, dtype)).train()
    model.backbone.base.set_attn_implementation(attention)
    state = torch.get_rng_state()
    check_isolation(model.backbone)
    assert torch.equal(torch.get_rng_state(), state) and model.backbone.training and model.backbone.base.training
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def leaky() -> Iterator[str]:
    """An attention back-end that is causal but knows nothing of packed rows."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None

    AttentionInterface.register("leaky", attend)
    yield "leaky"
    AttentionInterface._global_mapping.pop("leaky")


def test_a_back_end_that_leaks_is_refused(leaky: str) -> None:
    model: Any = recommender("text", trained=True)
    model.backbone.base.set_attn_implementation(leaky)
    with pytest.raises(RecipeError, match="'leaky' does not keep packed examples apart"):
        model.use_packing()
    assert not model.packing


def test_rows_that_are_not_told_apart_would_change_the_loss() -> None:
    """The comparison above is no tautology: without restarting positions the very same rows give other states."""
    model = recommender("text", "lora", trained=True)
    batch = made(model)
    packed = pack(batch["attention_mask"], model.backbone.width)
    embeds = model.embed(batch).flatten(0, 1)[packed.source]  # type: ignore[operator]
    with torch.no_grad():
        apart = model.backbone(embeds, None, {}, position_ids=packed.positions).last_hidden_state
        joined = model.backbone(embeds, None, {}).last_hidden_state
    later = packed.owner != packed.owner[:, :1]
    assert float((apart - joined)[later].abs().max()) > 0.1


@pytest.mark.slow
def test_a_real_model_on_real_prompts(test_data: Path) -> None:
    """Film titles, histories of 1 to 50 films, the first layers of a real model under iLoRA."""
    folder = cache_root() / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip("smollm2-135m is not cached; fetch it with `llmrec pull smollm2-135m`")
    base, words = load_language_model("smollm2-135m", "float32", num_layers=4)
    data = prepare_source(str(test_data / "ml-100k"), PrepareOptions()).dataset
    renderer = PromptRenderer(title_texts(data), PromptOptions("next_item/movie", "hybrid", max_history=50), words)
    tuner = ILoraTuner.attach(base, ILoraTuner.configure({"r": 8, "lora_dropout": 0.0}, gate_dim=WIDTH))
    model = LLMRecommender.build(
        tuner, encoder=encoder(items=data.num_items), tokenizer=words, renderer=renderer, style="hybrid",
        max_history=16,
    )  # fmt: skip
    for name, parameter in tuner.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    examples, collator = renderer.training_data(data, StageSpec(train="tuner"), seed=0)
    short = np.argsort(examples.lengths)[:: len(examples) // 8][:8]
    batch = collator([examples[int(i)] for i in short])
    batch["item_ids"], batch["lengths"] = batch["item_ids"][:, :16], batch["lengths"].clamp(max=16)
    assert_packing_changes_nothing(model.train(), batch)
