"""Pictures as vectors by a vision model of transformers: the image side of item features.

    vectors = embed_images(pictures, "openai/clip-vit-base-patch32")         # [N, d] float32

| model (as AutoModel loads it) | vector of a picture |
|---|---|
| image and text in one space (CLIP, SigLIP, ...) | the projected image vector |
| vision model (ViT, DINOv2, ConvNeXT, ...) | its pooled output; without a stored pooler the mean of its last states |
| vision-language model with a `vision_tower` (LLaVA, ...) | the same of the tower |

Code that comes with a model is never run and only safetensors weights are read. Pictures are prepared by the model's
own image processor in its Pillow form, so torchvision is not needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.llm.loading import own_device

if TYPE_CHECKING:
    from llmrec.data.item_images import Image

_FILES = ["*.json", "*.safetensors"]
_DECIDING = ("config.json", "preprocessor_config.json", "processor_config.json")


def embed_images(
    images: Iterable[Image],
    model: str,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> np.ndarray:
    """One vector a picture.

    Args:
        images: RGB pictures, at least one; read as they are needed, a batch at a time.
        model: Hub id or local folder.
        batch_size: Pictures in one forward pass.
        device: Where to compute. None: the accelerator of this process, or the processor.
        revision: Commit, tag or branch, for hub ids.
        progress: Show a bar on standard error when that is a terminal.

    Returns:
        [N, d] float32.

    Raises:
        CheckpointError: Nothing of that name can be loaded safely, it gives no image vector, or not a finite one.
        DataError: No pictures.
        RecipeError: An option is out of range.
    """
    if batch_size < 1:
        raise RecipeError(f"image embeddings: found batch_size {batch_size}, expected at least 1")
    home = own_device() if device is None else torch.device(device)
    network, processor, has_pooler = _load(model, revision, home)
    parts = []
    for batch in _batches(images, batch_size, progress):
        inputs = processor(images=batch, return_tensors="pt")
        with torch.no_grad():
            found = _pooled(network, inputs["pixel_values"].to(home, network.dtype), model, has_pooler)
        parts.append(found.float().cpu().numpy())
    if not parts:
        raise DataError("no pictures to embed", found="none", expected="at least one picture")
    vectors = np.concatenate(parts)
    if not np.isfinite(vectors).all():
        wrong = int((~np.isfinite(vectors)).any(1).sum())
        raise CheckpointError(
            f"{model}: {wrong} of {len(vectors)} image vectors hold NaN or infinity; expected finite values. The "
            "weights are damaged, or overflow in the type they are stored in"
        )
    return vectors


def image_embedder_identity(model: str, revision: str | None = None) -> str:
    """Which weights and preparation `embed_images` would use, for the key of a cache.

    Returns:
        "image:NAME@COMMIT" for hub ids, "image:NAME@sha256:DIGEST" for folders, which go by their last part.

    Raises:
        CheckpointError: There is no such model.
        RecipeError: A revision of a folder.
    """
    folder = _folder(model, revision)
    if not Path(model).is_dir():
        return f"image:{model}@{folder.name}"
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{folder}: found no *.safetensors; expected the folder of a saved model")
    for path in [*weights, *(folder / name for name in _DECIDING if (folder / name).is_file())]:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return f"image:{folder.resolve().name}@sha256:{digest.hexdigest()[:32]}"


def _folder(model: str, revision: str | None) -> Path:
    """The folder of a local model, or a snapshot named by its commit; pickled weights are never fetched."""
    if Path(model).is_dir():
        if revision is not None:
            raise RecipeError(
                f"image embeddings: found revision {revision!r} with {model!r}, which is not an id of the hub; leave "
                "the revision out"
            )
        return Path(model)
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model!r}: no such folder; expected a folder or hub id of a vision model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        raise _not_loadable(model, error) from error


def _load(model: str, revision: str | None, device: torch.device) -> tuple[Any, Any, bool]:
    """Model, image processor, and whether the stored weights have what the model pools by."""
    from transformers import AutoImageProcessor, AutoModel

    folder = _folder(model, revision)
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        network, info = AutoModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _not_loadable(model, error) from error
    missing = sorted(info["missing_keys"])
    if drawn := [key for key in missing if "pooler" not in key]:
        raise CheckpointError(f"{model}: found no weights for {', '.join(drawn[:3])}; expected all, not random ones")
    # A classifier is often stored without one, and transformers draws it at random.
    return network.to(device).eval(), processor, not missing


def _pooled(network: Any, pixels: Tensor, name: str, has_pooler: bool) -> Tensor:
    """Vectors [B, d] of prepared pictures [B, ...]."""
    if hasattr(network, "vision_tower"):
        network = network.vision_tower
    if hasattr(network, "get_image_features"):
        found = network.get_image_features(pixel_values=pixels)
    else:
        found = network(pixel_values=pixels)
    if not isinstance(found, Tensor):
        pooled = getattr(found, "pooler_output", None) if has_pooler else None
        found = found.last_hidden_state if pooled is None else pooled
    if found.shape[0] != len(pixels) or found.dim() < 2:
        raise CheckpointError(
            f"{name}: found vectors {tuple(found.shape)} for {len(pixels)} pictures; expected one each"
        )
    if found.dim() == 3:  # states of patches
        return found.mean(1)
    return found.flatten(1) if found.shape[2:].numel() == 1 else found.flatten(2).mean(2)  # maps of channels


def _batches(images: Iterable[Image], size: int, progress: bool) -> Iterator[list[Image]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hide = not (progress and console.is_terminal)
    rest = iter(track(images, "embed pictures", console=console, transient=True, disable=hide))
    while batch := list(islice(rest, size)):
        yield batch


def _not_loadable(model: str, error: Exception) -> CheckpointError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"the vision model {model!r} could not be loaded: {first}\n"
        "  expected: descriptors, or a folder or a reachable or cached hub id of a vision model of transformers with "
        "safetensors weights and an image processor"
    )
