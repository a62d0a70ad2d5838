"""From a recipe to item codes: feature levels, the fitted item tokenizer, and what is checked when one is taken over.

FOLDER/tokenizer.json, codes.safetensors     the tokenizer (`llmrec.item_tokenizers.base`)
FOLDER/fit.json                              hashes of data set and item index, what it was fitted on, seconds
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec import discovery
from llmrec.data.catalogue import check_item_index, item_index
from llmrec.data.image_features import DESCRIPTORS, descriptor_level, image_level
from llmrec.data.item_features import COLLABORATIVE, TEXT_TOKENS, collaborative_level, text_levels, token_level
from llmrec.data.item_images import ItemImages
from llmrec.data.schema import IMAGE
from llmrec.downloads import cache_root
from llmrec.errors import CheckpointError, DataError
from llmrec.run_dir import write_json

if TYPE_CHECKING:
    import torch

    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.item_images import Image
    from llmrec.data.schema import ItemFeatures
    from llmrec.item_tokenizers.base import ItemTokenizer
    from llmrec.recipe import ItemFeaturesSpec, ItemTokenizerSpec

FIT = "fit.json"
Say = Callable[[str], None]


def make_item_features(
    spec: ItemFeaturesSpec, dataset: InteractionDataset, *, seed: int, device: torch.device | str = "cpu"
) -> ItemFeatures:
    """The levels a recipe asks for: texts by a model, item vectors of an encoder, and pictures.

    Raises:
        DataError: No item has a text at a level, or a picture where pictures are asked for.
        RecipeError: A template names a column the items lack.
        CheckpointError: The collaborative encoder was trained on another data set.
    """
    from llmrec.llm.embed_text import embed_texts, embedder_identity

    identity = f"{embedder_identity(spec.text, spec.revision)}/{spec.max_tokens}" if spec.levels else ""
    levels = text_levels(
        dataset,
        spec.levels,
        lambda texts: embed_texts(texts, spec.text, max_tokens=spec.max_tokens, device=device, revision=spec.revision),
        identity=identity,
        cache=cache_root() / "item-features",
    )
    if spec.collaborative is not None:
        levels[COLLABORATIVE] = _collaborative(spec, dataset, seed)
    if spec.image is not None:
        levels[IMAGE] = _pictures(spec, dataset, device)
    return levels


def _pictures(
    spec: ItemFeaturesSpec, dataset: InteractionDataset, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    images, cache, name = ItemImages(dataset.items), cache_root() / "item-features", spec.image
    assert name is not None
    if name == DESCRIPTORS:
        return descriptor_level(images, cache=cache)
    from llmrec.llm.embed_image import embed_images, image_embedder_identity

    def embed(pictures: Iterable[Image]) -> np.ndarray:
        return embed_images(pictures, name, device=device, revision=spec.image_revision)

    return image_level(images, embed, identity=image_embedder_identity(name, spec.image_revision), cache=cache)


def make_text_tokens(spec: ItemFeaturesSpec, dataset: InteractionDataset) -> ItemFeatures:
    """The level of token ids for heads with a text encoder of their own; empty where `tokens` is 0."""
    if not spec.tokens:
        return {}
    from llmrec.llm.embed_text import text_tokenizer

    tokenise = text_tokenizer(spec.text, spec.revision)
    template = " ".join(spec.levels.values())
    return {TEXT_TOKENS: token_level(dataset, template, tokenise, spec.tokens)}


def _collaborative(spec: ItemFeaturesSpec, dataset: InteractionDataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Item vectors learned from the training part of this very data set, so that no test pair is in the codes."""
    import torch

    given = spec.collaborative
    assert given is not None
    kind: Any = discovery.resolve("encoder", given.type)
    if given.pretrained is not None:
        source = Path(given.pretrained)
        folder = source / "encoder" if (source / "recipe.yaml").is_file() else source
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"item_features.collaborative.pretrained: {folder} holds no trained encoder")
        encoder = kind.from_pretrained(folder, use_safetensors=True).eval()
        if encoder.config.dataset_fingerprint != dataset.fingerprint:
            raise CheckpointError(
                f"{folder}: trained on data set {encoder.config.dataset_fingerprint}, this one is "
                f"{dataset.fingerprint}; train the encoder on this data set"
            )
    else:
        torch.manual_seed(seed)
        config = kind.config_class(num_items=dataset.num_items, num_users=dataset.num_users, **given.options)
        encoder = kind.from_context(config, dataset.context())
    with torch.no_grad():
        vectors = encoder.item_vectors().float().cpu().numpy()
    return collaborative_level(vectors, dataset.context().train_counts)


def fit_item_tokenizer(
    spec: ItemTokenizerSpec,
    features: ItemFeatures,
    dataset: InteractionDataset,
    folder: Path,
    *,
    seed: int,
    say: Say,
    seconds_before: float = 0.0,
) -> ItemTokenizer:
    """Fit a tokenizer on feature levels, say what came out, and store it.

    Args:
        spec: Type and options.
        features: Its levels.
        dataset: The catalogue.
        folder: Where it goes.
        seed: Of the fit.
        say: Told the report, one line.
        seconds_before: Time the features took, for the record.
    """
    tokenizer: Any = discovery.build("item_tokenizer", spec.type, spec.options)
    began = time.monotonic()
    report = tokenizer.fit(features, seed=seed)
    seconds = time.monotonic() - began
    tokenizer.save_pretrained(folder)
    write_json(
        folder / FIT,
        {
            "dataset": dataset.fingerprint,
            "item_index": item_index(dataset),
            "levels": {name: int(mask.sum()) for name, (_, mask) in features.items()},
            "feature_seconds": round(seconds_before, 1),
            "fit_seconds": round(seconds, 1),
        },
    )
    shared = int(report.details["shared"])
    say(
        f"item codes: {spec.type}, levels of {' x '.join(map(str, tokenizer.level_sizes))}, usage "
        f"{', '.join(f'{share:.0%}' for share in report.usage)}; {report.collisions:,} of {dataset.num_items:,} items "
        f"collided, {shared:,} still share a code ({seconds_before:.0f} s features, {seconds:.0f} s fit)"
    )
    return tokenizer


def load_item_tokenizer(type_name: str, folder: Path, dataset: InteractionDataset | None = None) -> ItemTokenizer:
    """A stored tokenizer, checked against a data set where one is given.

    Args:
        type_name: The recipe's `type`.
        folder: Folder of `llmrec tokenize`, or a run.
        dataset: The catalogue it must code.

    Raises:
        CheckpointError: It codes another catalogue; both hashes are named.
    """
    folder = folder / "item_tokenizer" if (folder / "recipe.yaml").is_file() else folder
    kind: Any = discovery.resolve("item_tokenizer", type_name)
    tokenizer: ItemTokenizer = kind.from_pretrained(folder)
    if dataset is None:
        return tokenizer
    if not (folder / FIT).is_file():
        raise CheckpointError(f"{folder}: found no {FIT}, which says whose items these codes are")
    record = json.loads((folder / FIT).read_text(encoding="utf-8"))
    check_item_index(str(folder), record["item_index"], dataset, titles=False)
    if record["dataset"] != dataset.fingerprint:
        raise CheckpointError(
            f"{folder}: codes of data set {record['dataset']}, found {dataset.fingerprint}; collaborative levels and "
            "splits belong together: fit the tokenizer on this data set"
        )
    if len(tokenizer.codes) != dataset.num_items + 1:
        raise DataError(f"{folder}: codes of {len(tokenizer.codes) - 1:,} items, expected {dataset.num_items:,}")
    return tokenizer
