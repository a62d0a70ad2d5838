"""Exports: the folder says what base and adapter say, or it does not appear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrec.errors import CheckFailed, DataError, RecipeError
from llmrec.llm import export
from llmrec.llm.export import export_recommender, parse_gate
from llmrec.llm.parity import compare_logits, history_scores, prompt_logits
from llmrec.llm.recommender import LLMRecommender
from tests.llm.tiny import Renderer, encoder, llama, recommender, rows, tokenizer

FACTS = {"system": "x", "base_model": "tiny", "dataset": "d", "quantised": None}
HISTORIES, CANDIDATES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]], [[10, 11, 12], [13, 14, 15], [1, 2, 3]]
SLOTS: dict[str, Any] = {"style": "item_slots", "instruction": "The user watched", "item_bias": True}
GATE = [0.7, 0.1, 0.1, 0.1]


def made(tuner: str | None, **options: Any) -> LLMRecommender:
    """A recommender whose every own weight differs from its start."""
    model = recommender(tuner=tuner, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def questions(style: str) -> list[dict[str, Any]]:
    return rows(HISTORIES, None if style == "item_slots" else CANDIDATES)


def test_a_merged_lora_says_the_same_in_plain_transformers(tmp_path: Path) -> None:
    model = made("lora", style="text")
    prompts = [tokenizer()(text, return_tensors="pt")["input_ids"] for text in ("watched: red blue", "next:")]
    with torch.no_grad():
        adapted = [model.model(ids).logits for ids in prompts]
        with model.model.disable_adapter():
            plain = [model.model(ids).logits for ids in prompts]
    done = export_recommender(model, tmp_path / "out", facts=FACTS, rows=questions("text"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert names("watched: red blue")["input_ids"] == prompts[0][0].tolist()
    with torch.no_grad():
        for ids, one, other in zip(prompts, adapted, plain, strict=True):
            torch.testing.assert_close(again(ids).logits, one, rtol=0, atol=1e-4)
            assert (one - other).abs().max() > 1e-2, "the adapter has to matter"
    assert done.parity.holds and done.parity.max_abs_diff <= 1e-4 and done.parity.top_k_overlap >= 0.99
    assert done.scores is not None and done.scores.top_1_same == 1.0
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= present
    assert not present & {"recommender", "encoder", "adapter_config.json"}
    record = json.loads((tmp_path / "out" / export.RECORD).read_text())
    assert record["example"]["prompt_token_ids"] == Renderer().encode([1, 2, 3]).input_ids.tolist()
    assert record["gate"] is None and record["lost"] is None


@pytest.mark.parametrize(
    ("tuner", "options"),
    [("lora", SLOTS), ("lora", {"style": "hybrid", "user_slot": True}), (None, SLOTS)],
    ids=["slots", "hybrid", "untuned"],
)
def test_projector_and_encoder_come_along(tuner: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    model, asked = made(tuner, **options), questions(options["style"])
    expected = history_scores(model, asked)
    done = export_recommender(model, tmp_path / "out", facts=FACTS, rows=asked)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = LLMRecommender.from_pretrained(
        tmp_path / "out" / "recommender",
        base,
        type(encoder()).from_pretrained(tmp_path / "out" / "encoder"),
        renderer=getattr(model, "renderer", None),
    )
    assert not isinstance(again.model, PeftModel)
    torch.testing.assert_close(history_scores(again, asked), expected, rtol=0, atol=1e-4)
    assert "cannot run it" in done.record["plain_server"]
    assert "cannot run it" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("gate", ["uniform", GATE], ids=["uniform", "weights"])
@pytest.mark.parametrize("style", ["item_slots", "text"])
def test_a_fixed_gate_is_checked_and_its_loss_is_stated(style: str, gate: Any, tmp_path: Path) -> None:
    model = made("ilora", **({"style": "text"} if style == "text" else SLOTS))
    with torch.no_grad():  # a router that tells users apart
        for parameter in model.model.base_model.ilora_router.parameters():
            parameter.mul_(20)
    trained = history_scores(model, questions(style))
    weights = torch.tensor([GATE if gate is GATE else [0.25] * 4])
    ids = tokenizer()("watched: red blue", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        fixed = model.model(ids, gates=weights).logits
    done = export_recommender(model, tmp_path / "out", facts=FACTS, rows=questions(style), gate=gate)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, fixed, rtol=0, atol=1e-4)
    assert done.parity.holds and done.record["gate"] == pytest.approx(weights[0].tolist())
    assert done.scores is not None and done.scores.max_abs_diff > 1e-3, "users lose their own weights"
    assert done.scores.histories == len(trained) and "no longer follow" in (tmp_path / "out" / "README.md").read_text()


def test_a_missing_gate_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"differ from user to user.*--gate uniform.*with 4 weights"):
        export_recommender(made("ilora", **SLOTS), tmp_path / "out", facts=FACTS)
    with pytest.raises(RecipeError, match="no gates"):
        export_recommender(made("lora", **SLOTS), tmp_path / "out", facts=FACTS, gate="uniform")
    with pytest.raises(DataError, match="no weights"):
        export_recommender(made("ilora", **SLOTS), tmp_path / "out", facts=FACTS, gate=[1.0, 1.0, 0.0, 0.0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["model", "projector"])
def test_a_wrong_merge_leaves_nothing(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("lora", **SLOTS)
    if part == "model":
        real: Any = export._merged

        def wrong(*args: Any) -> nn.Module:
            merged = real(*args)
            with torch.no_grad():
                merged.model.layers[0].mlp.up_proj.weight.mul_(1.01)
            return merged

        monkeypatch.setattr(export, "_merged", wrong)
        message = r"logits differ by up to .* of the 10 best tokens"
    else:
        monkeypatch.setattr(LLMRecommender, "own_state", lambda self: {})
        message = "scores of real histories differ"
    with pytest.raises(CheckFailed, match=message):
        export_recommender(model, tmp_path / "out", facts=FACTS, rows=questions("item_slots"))
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RecipeError, match="not empty"):
        export_recommender(made("lora", **SLOTS), tmp_path, facts=FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_bfloat16_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    model = made("lora", style="text", dtype=torch.bfloat16)
    done = export_recommender(model, tmp_path / "out", facts=FACTS)
    assert done.parity.dtype == "bfloat16" and done.parity.tolerance > 1e-4 and done.scores is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_parity_sees_other_models_and_missing_numbers() -> None:
    first, second = (prompt_logits(llama(seed), tokenizer()) for seed in (0, 1))
    assert compare_logits(first, first, torch.float32).holds
    assert not compare_logits(first, second, torch.float32).holds
    assert not compare_logits(first, second, torch.bfloat16).holds
    assert not compare_logits(first, [part * float("nan") for part in first], torch.float32).holds


def test_gates_from_words_and_files(tmp_path: Path) -> None:
    assert parse_gate(None) is None and parse_gate("uniform") == "uniform"
    assert parse_gate("0.7,0.1,0.1,0.1") == GATE
    for content in (GATE, {"gate": GATE}):
        (tmp_path / "gate.json").write_text(json.dumps(content))
        assert parse_gate(str(tmp_path / "gate.json")) == GATE
    for wrong in ("even", "0.5;0.5", str(tmp_path / "none.json")):
        with pytest.raises(RecipeError, match="--gate"):
            parse_gate(wrong)
