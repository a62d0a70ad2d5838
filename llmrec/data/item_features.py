"""Feature levels of items for item tokenizers and heads: texts become vectors, vectors are kept in the cache.

A level is (values [I+1, d] float32, mask [I+1]); the mask is False where an item lacks the level. Models that make
vectors are given as functions, so that this module knows none. Text vectors depend on model and texts alone and are
cached under a fingerprint of both; collaborative vectors come from the training part of the data set and are not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llmrec.data.item_text import level_texts
from llmrec.errors import DataError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset
    from llmrec.data.schema import ItemFeatures

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts [n] -> vectors [n, d] float32."""

COLLABORATIVE, TEXT_TOKENS = "collaborative", "text_tokens"


def text_levels(
    dataset: InteractionDataset,
    templates: Mapping[str, str],
    embed: Embed,
    *,
    identity: str,
    cache: Path | None,
) -> ItemFeatures:
    """One level per template, embedded; read from the cache where model and texts are those of an earlier call.

    Args:
        dataset: Supplies the texts.
        templates: Level -> item text template.
        embed: The text model.
        identity: What tells this model from others: name, weights, lengths.
        cache: Folder of the cache; None computes anew.

    Raises:
        DataError: No item has any text at a level.
    """
    levels: ItemFeatures = {}
    for name, template in templates.items():
        texts = level_texts(dataset, template)
        mask = np.array([bool(text) for text in texts])
        if not mask.any():
            raise DataError(
                f"no item of {dataset.meta.name!r} has a text at level {name!r}",
                found=f"template {template!r} empty for all {dataset.num_items:,} items",
                expected="a template over columns the items have, or no such level",
            )
        present = [text for text in texts if text]
        encoded = (text.encode() for text in present)
        vectors = cached_vectors(encoded, partial(embed, present), identity=identity, cache=cache)
        levels[name] = (spread(vectors, mask), mask)
    return levels


def cached_vectors(
    contents: Iterable[bytes], make: Callable[[], np.ndarray], *, identity: str, cache: Path | None
) -> np.ndarray:
    """Vectors [n, d] float32 of contents, read from the cache where model and contents are those of an earlier call.

    Args:
        contents: What the vectors are of, or a digest of each, in order.
        make: Makes the vectors.
        identity: What tells this model from others.
        cache: Folder of the cache; None computes anew.
    """
    path = None if cache is None else cache / f"{_key(identity, contents)}.safetensors"
    vectors = _read(path)
    if vectors is None:
        vectors = np.asarray(make(), dtype=np.float32)
        _write(path, vectors)
    return vectors


def spread(vectors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Vectors [n, d] at the n places of a mask [I+1]; zeros elsewhere, which the mask says are nothing."""
    values = np.zeros((len(mask), vectors.shape[1]), dtype=np.float32)
    values[mask] = vectors
    return values


def collaborative_level(vectors: np.ndarray, train_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A level of item vectors [I+1, d] learned from interactions; items without training events lack it."""
    mask = np.asarray(train_counts) > 0
    mask[0] = False
    return np.asarray(vectors, dtype=np.float32), mask


def token_level(
    dataset: InteractionDataset, template: str, tokenise: Callable[[Sequence[str]], list[list[int]]], longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [I+1, longest] of the items' texts, cut and padded with 0 on the right, for heads with a text encoder.

    Args:
        dataset: Supplies the texts.
        template: Item text template.
        tokenise: Texts -> ids; id 0 must be padding.
        longest: Most tokens of a text.
    """
    texts = level_texts(dataset, template)
    values = np.zeros((len(texts), longest), dtype=np.int64)
    for item, ids in enumerate(tokenise(texts[1:]), start=1):
        values[item, : min(longest, len(ids))] = ids[:longest]
    return values, np.asarray(values.any(axis=1))


def _key(identity: str, contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256(identity.encode())
    for content in contents:
        digest.update(b"\0" + content)
    return digest.hexdigest()[:32]


def _read(path: Path | None) -> np.ndarray | None:
    """Vectors of an earlier call; None where there are none or the file is damaged, so that it is made anew."""
    if path is None or not path.is_file():
        return None
    try:
        return load_file(path)["vectors"]
    except (SafetensorError, KeyError):
        return None


def _write(path: Path | None, vectors: np.ndarray) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"vectors": np.ascontiguousarray(vectors)}, partial)
    os.replace(partial, path)
