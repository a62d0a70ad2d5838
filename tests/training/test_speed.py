"""Switches that make steps faster: what they change (nothing but speed), and where they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrec.errors import RecipeError
from llmrec.llm.recommender import LLMRecommender
from llmrec.llm.rendering import PromptRenderer
from llmrec.strategies.next_item import NextItem
from llmrec.training import speed
from llmrec.training.speed import SpeedOptions, speed_up
from llmrec.training.trainer import train_stage
from llmrec.tuners.ilora import ILoraTuner
from tests.llm.test_rendering import films, recipe
from tests.llm.tiny import WIDTH, encoder, llama, recommender, tokenizer
from tests.training.small import IDENTITY, make_context, make_stage

STAGE = {
    "train": "tuner", "per_device_train_batch_size": 4, "max_steps": 4, "save_strategy": "no", "learning_rate": 1e-3,
    "warmup_steps": 0,
}  # fmt: skip


def train(folder: Path, style: str, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of four steps of an instance-wise tuner over prompts."""
    data = films()
    renderer = PromptRenderer.from_recipe(recipe(folder.parent, style=style), data, tokenizer())
    base = ILoraTuner.attach(llama(), ILoraTuner.configure({"r": 4, "lora_dropout": 0.0}, gate_dim=WIDTH))
    model = LLMRecommender.build(
        base, encoder=encoder(), tokenizer=tokenizer(), renderer=renderer, style=style, max_history=4
    )
    stage = make_stage(**{**STAGE, **options})
    examples, collator = renderer.training_data(data, stage, seed=1)
    train_stage(
        model, NextItem(), examples, collator, stage=stage, output_dir=folder, seed=3, context=make_context(),
        evaluate=None, identity=IDENTITY,
    )  # fmt: skip
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in log], {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("style", ["text", "hybrid"])  # through trl's trainer, and through ours
def test_packing_takes_the_same_steps(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.llm import prompted

    calls = []
    real = prompted.packed_states
    monkeypatch.setattr(prompted, "packed_states", lambda *given: calls.append(1) or real(*given))
    plain, ended = train(tmp_path / "plain", style)
    assert not calls
    packed, also = train(tmp_path / "packed", style, packing=True)
    assert len(calls) == 4
    assert packed == pytest.approx(plain, abs=1e-5) and len(set(plain)) == 4
    for name, tensor in ended.items():
        torch.testing.assert_close(also[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("style", ["text", "hybrid"])
def test_packing_groups_and_recomputes_together(style: str, tmp_path: Path) -> None:
    """Grouped batches, packed rows and recomputed activations, all at once, end where grouped batches alone end."""
    grouped = {"train_sampling_strategy": "group_by_length"}
    _, ended = train(tmp_path / "plain", style, **grouped)
    _, also = train(tmp_path / "all", style, packing=True, activation_checkpointing=True, **grouped)
    for name, tensor in ended.items():
        torch.testing.assert_close(also[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_switches_are_read_from_a_stage() -> None:
    assert SpeedOptions.of(make_stage()) == SpeedOptions()
    assert SpeedOptions.of(make_stage(packing=True, torch_compile=False)) == SpeedOptions(packing=True)
    with pytest.raises(RecipeError, match="packing: found 'yes', expected true or false"):
        SpeedOptions.of(make_stage(packing="yes"))


@pytest.mark.parametrize("switch", ["packing", "torch_compile", "use_liger_kernel"])
def test_encoders_are_refused(switch: str) -> None:
    with pytest.raises(RecipeError, match=f"{switch}: found SASRecEncoder"):
        speed_up(encoder(), SpeedOptions(**{switch: True}))


def test_windows_of_items_are_not_packed() -> None:
    with pytest.raises(RecipeError, match="group_by_length"):
        speed_up(recommender("item_slots"), SpeedOptions(packing=True))


def test_liger_is_refused_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import liger

    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(RecipeError, match="pip install liger-kernel"):
        speed_up(recommender("text"), SpeedOptions(use_liger_kernel=True))


def test_liger_gets_the_language_model_and_leaves_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import liger

    given: list[Any] = []
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda *what: given.extend(what))
    model = recommender("text")
    speed_up(model, SpeedOptions(use_liger_kernel=True))
    assert given[0] is model.backbone.base
    assert given[1] == {"fused_linear_cross_entropy": False, "cross_entropy": False}


def test_compiled_layers_cannot_recompute_with_gates() -> None:
    both = SpeedOptions(torch_compile=True)
    with pytest.raises(RecipeError, match=r"torch\.compile cannot trace such a context"):
        speed_up(recommender("text", "ilora"), both, checkpointing=True)


def test_the_reason_for_that_refusal_still_holds() -> None:
    """Once torch.compile takes a `context_fn` of ours, the refusal above has to go."""
    model = recommender("text", "ilora")
    contexts = model.model.base_model.gate_state.checkpoint_contexts

    def recomputed(x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(torch.sin, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    with pytest.raises(Exception, match="context_fn"):
        torch.compile(recomputed, backend="eager", fullgraph=True)(torch.ones(2, requires_grad=True))


def test_a_machine_without_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match=r"found no C\+\+ compiler"):
        speed_up(recommender("text", "lora"), SpeedOptions(torch_compile=True))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_are_the_same_steps(tmp_path: Path) -> None:
    """Gates are inputs of the compiled code: other users in every step, one compilation."""
    plain, ended = train(tmp_path / "plain", "hybrid")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, also = train(tmp_path / "compiled", "hybrid", torch_compile=True, packing=True)
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] >= 1 and not counters["graph_break"]
    assert compiled == pytest.approx(plain, abs=1e-4)
    for name, tensor in ended.items():
        torch.testing.assert_close(also[name], tensor, rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_is_asked_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.llm.test_prompted import CANDIDATES, HISTORIES
    from tests.llm.tiny import rows

    model = recommender("hybrid", trained=True)
    expected = model.score_candidates(model.collate(rows(HISTORIES, CANDIDATES)))
    speed_up(model, SpeedOptions(torch_compile=True))
    torch._dynamo.utils.counters.clear()
    found = model.score_candidates(model.collate(rows(HISTORIES, CANDIDATES)))
    assert torch.equal(found, expected) and not torch._dynamo.utils.counters["frames"]
