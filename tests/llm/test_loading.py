"""Loading language models from folders, and telling one from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmrec.errors import CheckpointError, RecipeError
from llmrec.llm.loading import (
    base_identity,
    choose_dtype,
    fast_bfloat16,
    load_language_model,
    module_fingerprint,
    own_device,
    tensor_fingerprint,
)
from tests.llm.tiny import llama, recommender, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_a_folder_loads_with_its_tokenizer(folder: Path) -> None:
    model, words = load_language_model(folder, dtype="float32")
    ids = torch.tensor([words("river stone")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, llama()(input_ids=ids).logits)
    assert not model.training and words.pad_token_id == model.config.pad_token_id
    assert model.config._attn_implementation == "sdpa"
    assert base_identity(model).name == str(folder)


def test_a_missing_padding_token_becomes_the_end_token(tmp_path: Path, folder: Path) -> None:
    words: Any = type(tokenizer()).from_pretrained(folder)
    words.pad_token = None
    llama().save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model, again = load_language_model(tmp_path)
    assert again.pad_token_id == again.eos_token_id == model.generation_config.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] == llama().get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtypes(folder: Path, dtype: Any, expected: torch.dtype) -> None:
    assert load_language_model(folder, dtype=dtype)[0].dtype == expected
    assert choose_dtype("auto") == (torch.bfloat16 if fast_bfloat16() else torch.float32)
    with pytest.raises(RecipeError, match="expected auto, float32 or bfloat16"):
        choose_dtype("float16")  # type: ignore[arg-type]


def test_a_rank_computes_on_its_own_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert own_device() == torch.device("cuda", 3)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert own_device() == torch.device("cpu")


def test_the_first_layers_are_kept_unchanged(folder: Path) -> None:
    model, _ = load_language_model(folder, dtype="float32", num_layers=1)
    whole = llama()
    assert len(model.model.layers) == model.config.num_hidden_layers == 1
    for name, weight in model.model.layers[0].named_parameters():
        torch.testing.assert_close(weight, whole.model.layers[0].get_parameter(name))
    for number in (0, 3):
        with pytest.raises(RecipeError, match="layers 1 to 2"):
            load_language_model(folder, num_layers=number)


def test_named_downloads_are_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec import downloads

    asked: list[str] = []
    monkeypatch.setattr(downloads, "NAMES", {"tiny": None})
    monkeypatch.setattr(downloads, "pull", lambda name: asked.append(name) or folder)
    model, _ = load_language_model("tiny")
    assert asked == ["tiny"] and base_identity(model).name == "tiny"


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_language_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_language_model(tmp_path)
    with pytest.raises(CheckpointError, match="nobody/no-such-model"):
        load_language_model("nobody/no-such-model")


def test_identity_sees_weights_and_layers_but_neither_dtype_nor_adapter() -> None:
    plain = base_identity(llama())
    assert plain.same_weights(base_identity(llama(dtype=torch.bfloat16)))
    assert plain.same_weights(base_identity(recommender(trained=True).model))
    assert not plain.same_weights(base_identity(llama(seed=3)))
    assert not plain.same_weights(base_identity(llama(num_hidden_layers=1)))
    merged = llama()
    with torch.no_grad():
        merged.model.layers[1].mlp.down_proj.weight.add_(0.01)
    assert not plain.same_weights(base_identity(merged))
    assert "2 layers" in str(plain)


def test_fingerprints_see_every_value() -> None:
    value = torch.arange(6.0)
    other = value.clone()
    other[5] += 1e-6 * 8
    assert tensor_fingerprint(value) == tensor_fingerprint(value.clone()) != tensor_fingerprint(other)
    assert tensor_fingerprint(value) != tensor_fingerprint(value.view(2, 3)) != tensor_fingerprint(value.double())
    assert tensor_fingerprint(torch.zeros(0)) and tensor_fingerprint(torch.tensor(True))
    layer = torch.nn.Linear(2, 2)
    before = module_fingerprint(layer)
    with torch.no_grad():
        layer.bias[0] += 1
    assert module_fingerprint(layer) != before
