"""Pictures through tiny vision models: which output is the vector, what identifies it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from llmrec.data.item_images import decode_image, draw_item
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.llm.embed_image import embed_images, image_embedder_identity

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                         "image_size": 16, "patch_size": 8}  # fmt: skip
PICTURES = [decode_image(draw_item(n, n, n)) for n in range(5)]


def saved(folder: Path, model: Any, seed: int = 0) -> str:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("models") / "vit", ViTModel(ViTConfig(**SIZES)))


def prepared() -> torch.Tensor:
    """What ViT's processor makes of the pictures, by hand: 16 x 16, from -1 to 1."""
    small = [np.asarray(picture.resize((16, 16), 2), dtype=np.float32) / 127.5 - 1 for picture in PICTURES]
    return torch.tensor(np.stack(small)).permute(0, 3, 1, 2)


def test_a_vision_model_gives_its_pooled_output(vit: str) -> None:
    vectors = embed_images(PICTURES, vit, batch_size=2)
    assert vectors.shape == (5, 16) and vectors.dtype == np.float32
    with torch.no_grad():
        expected = ViTModel.from_pretrained(vit)(pixel_values=prepared()).pooler_output.numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    assert np.ptp(vectors, axis=0).max() > 0.01
    np.testing.assert_allclose(embed_images(iter(PICTURES), vit, batch_size=5), vectors, atol=1e-5)


def test_a_pooler_that_was_never_trained_is_not_used(tmp_path: Path) -> None:
    """A classifier is stored without a pooler; transformers would draw one at random at every loading."""
    folder = saved(tmp_path / "classifier", ViTForImageClassification(ViTConfig(**SIZES)))
    first, second = embed_images(PICTURES, folder), embed_images(PICTURES, folder)
    np.testing.assert_array_equal(first, second)
    with torch.no_grad():
        states = ViTModel.from_pretrained(folder, add_pooling_layer=False)(pixel_values=prepared()).last_hidden_state
    np.testing.assert_allclose(first, states.mean(1).numpy(), atol=1e-4)


def test_a_model_of_two_towers_gives_the_projected_image(tmp_path: Path) -> None:
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 9,
    }
    config = CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=6)
    folder = saved(tmp_path / "clip", CLIPModel(config))
    assert embed_images(PICTURES, folder).shape == (5, 6)


def test_identity_is_that_of_weights_and_preparation(vit: str, tmp_path: Path) -> None:
    identity = image_embedder_identity(vit)
    assert identity.startswith("image:vit@sha256:")
    same = saved(tmp_path / "a" / "vit", ViTModel(ViTConfig(**SIZES)))
    assert image_embedder_identity(same) == identity, "a copy elsewhere is the same model"
    assert image_embedder_identity(saved(tmp_path / "b" / "vit", ViTModel(ViTConfig(**SIZES)), seed=1)) != identity
    settings = Path(same) / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"image_mean": [0.4, 0.4, 0.4]}))
    assert image_embedder_identity(same) != identity


def test_what_is_refused(vit: str, tmp_path: Path) -> None:
    for wrong, options, error, message in (
        ([], {}, DataError, "no pictures"),
        (PICTURES, {"batch_size": 0}, RecipeError, "batch_size 0"),
        (PICTURES, {"revision": "main"}, RecipeError, "not an id of the hub"),
    ):
        with pytest.raises(error, match=message):
            embed_images(wrong, vit, **options)  # type: ignore[arg-type]
    for name in ("./nothing", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such folder"):
            embed_images(PICTURES, name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="could not be loaded"):
        embed_images(PICTURES, str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="no \\*.safetensors"):
        image_embedder_identity(str(tmp_path / "empty"))


def test_weights_that_are_missing_or_no_numbers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(saved(tmp_path / "vit", ViTModel(ViTConfig(**SIZES))))
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "layernorm" in key and "weight" in key)
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="found no weights for"):
        embed_images(PICTURES, str(folder))
    save_file({**weights, name: weights[name] * float("nan")}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="5 of 5 image vectors hold NaN"):
        embed_images(PICTURES, str(folder))
