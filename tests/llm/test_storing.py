"""Save, load, resume: equal outputs, no base weights on disk, and strangers refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmrec.errors import CheckpointError
from llmrec.llm.recommender import LLMRecommender
from tests.llm.tiny import ITEMS, TITLES, Renderer, encoder, llama, recommender, rows, tokenizer

HISTORIES, CANDIDATES = [[1, 2, 3], [4, 5]], [[10, 11, 12], [13, 14, 15]]


def scores(model: LLMRecommender) -> torch.Tensor:
    with torch.no_grad():
        return model.score_candidates(model.collate(rows(HISTORIES, CANDIDATES)))


def disturb(model: LLMRecommender) -> LLMRecommender:
    """Change everything that is saved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("tuner", ["ilora", "lora", None])
@pytest.mark.parametrize(
    "options",
    [
        {"style": "item_slots", "item_bias": True, "learn_scale": True, "instruction": "The user watched"},
        {"style": "item_slots", "residual": True, "slot_content": "both"},
        {"style": "text", "length_normalise": True},
        {"style": "hybrid", "user_slot": True},
    ],
    ids=["slots", "residual", "text", "hybrid"],
)
def test_loading_gives_equal_outputs(tuner: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    model = disturb(recommender(tuner=tuner, **options))
    expected = scores(model)
    model.save_pretrained(tmp_path)
    renderer = (
        None if options["style"] == "item_slots" else Renderer(options["style"] == "hybrid", "user_slot" in options)
    )
    again = LLMRecommender.from_pretrained(tmp_path, llama(), encoder(), renderer=renderer)
    torch.testing.assert_close(scores(again), expected, rtol=0, atol=0)
    assert type(again) is type(model) and not any(p.requires_grad for p in again.parameters())
    assert not again.training


def test_only_small_standard_files_are_written(tmp_path: Path) -> None:
    model = recommender("hybrid")
    model.save_pretrained(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"recommender.json", "projector.safetensors", "adapter/adapter_config.json"} <= files
    assert "tokenizer/tokenizer.json" in files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".jinja", ".md"}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name or "ilora_router" in name for name in stored)
    assert set(load_file(tmp_path / "projector.safetensors")) == set(model.own_state())
    assert not any(title in (tmp_path / "recommender.json").read_text() for title in TITLES[1:])


def test_strangers_are_refused_by_name(tmp_path: Path) -> None:
    recommender().save_pretrained(tmp_path)
    load = LLMRecommender.from_pretrained
    with pytest.raises(CheckpointError, match=r"base model .* found .*; expected the same weights"):
        load(tmp_path, llama(seed=9), encoder())
    with pytest.raises(CheckpointError, match="found .*1 layers"):
        load(tmp_path, llama(num_hidden_layers=1), encoder())
    with pytest.raises(CheckpointError, match=r"encoder [0-9a-f]{64}, found the encoder [0-9a-f]{64}"):
        load(tmp_path, llama(), encoder(seed=9))
    with pytest.raises(CheckpointError, match="found the encoder none"):
        load(tmp_path, llama())
    with pytest.raises(CheckpointError, match="item table .* shape"):
        load(tmp_path, llama(), encoder(), item_table=torch.randn(ITEMS + 1, 16))


def test_another_dtype_is_the_same_base(tmp_path: Path) -> None:
    model = disturb(recommender())
    model.save_pretrained(tmp_path)
    again = LLMRecommender.from_pretrained(tmp_path, llama(dtype=torch.bfloat16), encoder())
    assert float((scores(again) - scores(model)).abs().max()) < 0.1


def test_damage_is_reported(tmp_path: Path) -> None:
    model = recommender()
    with pytest.raises(CheckpointError, match="found no recommender.json"):
        LLMRecommender.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "recommender.json").read_text())
    (tmp_path / "projector.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="projector.safetensors is damaged"):
        LLMRecommender.from_pretrained(tmp_path, llama(), encoder())
    for text, message in (
        ("{", "not JSON"),
        ("{}", "expected the fields"),
        (json.dumps({**record, "format": 9}), "format 9"),
    ):
        (tmp_path / "recommender.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            LLMRecommender.from_pretrained(tmp_path, llama(), encoder())


def test_restoring_continues_a_run(tmp_path: Path) -> None:
    model = disturb(recommender(learn_scale=True))
    expected = scores(model)
    model.save_pretrained(tmp_path)
    fresh = recommender(learn_scale=True)
    assert float((scores(fresh) - expected).abs().max()) > 1e-3
    fresh.restore(tmp_path)
    torch.testing.assert_close(scores(fresh), expected, rtol=0, atol=0)
    assert any(p.requires_grad for p in fresh.parameters())
    with pytest.raises(CheckpointError, match="learn_scale differ"):
        recommender().restore(tmp_path)


def test_loading_for_further_training(tmp_path: Path) -> None:
    model = recommender("hybrid")
    model.save_pretrained(tmp_path)
    again = LLMRecommender.from_pretrained(tmp_path, llama(), encoder(), is_trainable=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == names


def test_prompts_are_remade_from_titles(tmp_path: Path) -> None:
    from llmrec.data.prompt_encoder import PromptEncoder, PromptOptions

    (tmp_path / "films.jinja").write_text(
        "{# variables: history; source: ours #}Watched: {{ history | join(', ') }}. Next:"
    )
    options = PromptOptions(template=str(tmp_path / "films.jinja"), style="hybrid", slots=("history",))
    model = recommender("hybrid")
    model.renderer = PromptEncoder(TITLES, options, tokenizer())  # type: ignore[assignment]
    made = [{k: v for k, v in row.items() if k != "candidates"} for row in rows(HISTORIES)]
    model.save_pretrained(tmp_path / "saved")
    again = LLMRecommender.from_pretrained(tmp_path / "saved", llama(), encoder(), titles=TITLES)
    torch.testing.assert_close(again.collate(made)["input_ids"], model.collate(made)["input_ids"])
    assert again.collate(made)["item_slots"].max() == 5
