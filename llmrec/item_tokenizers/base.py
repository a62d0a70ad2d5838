"""Base of item tokenizers: an item becomes a short code of M levels. One file of this folder per tokenizer.

A tokenizer is a dataclass of options plus fitted arrays; it is stored as `tokenizer.json` (options, level sizes,
report, fingerprint) and `codes.safetensors` (codes [I+1, M] and whatever arrays the subclass names in `_arrays`).
What several tokenizers need stands here as functions: `fused` (one vector per item), `kmeans`, `without_collisions`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrec.blocks.collisions import collision_groups, resolve
from llmrec.errors import CheckpointError, DataError, RecipeError

if TYPE_CHECKING:
    from typing import Self

    from llmrec.blocks.trie import PrefixTrie
    from llmrec.data.schema import ItemFeatures

CollisionPolicy = Literal["nearest_free", "append", "sinkhorn", "random", "none"]
"""What happens to items with one code: the nearest free last code, one more level that numbers them, last codes evened
out by Sinkhorn (leftovers stay shared), a random free last code, or nothing."""


@dataclass(frozen=True)
class FitReport:
    """What fitting found.

    Args:
        collisions: Items that share their code with another item before the collision policy acted.
        usage: Share of codes in use, per level.
        reconstruction: Mean squared reconstruction error, where the tokenizer reconstructs; else NaN.
        details: Further named figures: `perplexity_h` of level h (from 1, at most the level's size) and
            `largest_h` (share of items in its fullest code), `shared` (items with a shared code afterwards), others.
    """

    collisions: int
    usage: tuple[float, ...]
    reconstruction: float
    details: dict[str, float]


class ItemTokenizer(ABC):
    """Base class; subclasses are dataclasses, set `level_sizes`, `unique` and `codes` in `fit`, and extend `add`.

    Attributes:
        level_sizes: (M,) number of codes per level.
        unique: False when several items may share a code; `items_of` resolves.
        codes: [I+1, M] int64, row 0 is -1.
        report: What the last `fit` found; kept on saving, None before.
    """

    level_sizes: tuple[int, ...] = ()
    unique: bool = True
    codes: Tensor
    report: FitReport | None = None

    @abstractmethod
    def fit(self, items: ItemFeatures, *, seed: int) -> FitReport:
        """Learn codes for items 1..I from named feature levels."""

    @abstractmethod
    def add(self, items: ItemFeatures) -> None:
        """Give codes to the items beyond the current catalogue without changing existing ones."""

    def encode(self, item_ids: Tensor) -> Tensor:
        """[...] -> [..., M] int64; padding gives -1."""
        return self.codes.to(item_ids.device)[item_ids]

    def decode(self, codes: Tensor) -> Tensor:
        """[..., M] -> [...] item ids, 0 where no item has the code; the smallest id where several share it."""
        found = [int(items[0]) if len(items) else 0 for items in self.items_of(codes.reshape(-1, codes.shape[-1]))]
        return torch.tensor(found, dtype=torch.long, device=codes.device).reshape(codes.shape[:-1])

    def items_of(self, codes: Tensor) -> list[Tensor]:
        """[N, M] -> for each row the ids of all items with that code, ascending."""
        table = self.codes[1:].cpu().numpy()
        rows = np.ascontiguousarray(codes.cpu().numpy().astype(np.int64))
        _, group = np.unique(np.concatenate([table, rows]), axis=0, return_inverse=True)
        group = group.reshape(-1)
        owners, wanted = group[: len(table)], group[len(table) :]
        order = np.argsort(owners, kind="stable")
        start = np.searchsorted(owners[order], wanted, side="left")
        end = np.searchsorted(owners[order], wanted, side="right")
        return [torch.from_numpy(order[a:b] + 1) for a, b in zip(start, end, strict=True)]

    def trie(self) -> PrefixTrie:
        """The prefix trie of the catalogue, for decoding."""
        from llmrec.blocks.trie import PrefixTrie

        return PrefixTrie.build(self.codes, self.level_sizes)

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over level sizes and codes; models store it and refuse another."""
        return code_fingerprint(self.codes, self.level_sizes)

    def _arrays(self) -> dict[str, Tensor]:
        """Fitted tensors besides `codes` that loading must restore (as attributes of the same names)."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder (JSON and safetensors)."""
        if not is_dataclass(self):
            raise TypeError(f"{type(self).__name__} must be a dataclass: its fields are its options")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"codes": self.codes, **self._arrays()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "codes.safetensors")
        record = {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "options": asdict(self),
            "level_sizes": list(self.level_sizes),
            "unique": self.unique,
            "fingerprint": self.fingerprint,
            "report": None if self.report is None else asdict(self.report),
        }
        # Written last: a folder without it is an interrupted save.
        (folder / "tokenizer.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a folder written by `save_pretrained` of the same class.

        Raises:
            CheckpointError: Another class wrote it, or codes and fingerprint differ.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder}: found no tokenizer.json; expected a folder written by save_pretrained")
        record: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if record["class"].rpartition(".")[2] != cls.__qualname__:
            raise CheckpointError(f"{folder}: written by {record['class']}, asked for {cls.__qualname__}")
        known: set[str] = {f.name for f in fields(cls)} if is_dataclass(cls) else set()
        options = {name: value for name, value in record["options"].items() if name in known}
        tokenizer = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()})
        for name, value in load_file(folder / "codes.safetensors").items():
            setattr(tokenizer, name, value)
        tokenizer.level_sizes = tuple(record["level_sizes"])
        tokenizer.unique = record["unique"]
        if record.get("report") is not None:
            stored = record["report"]
            tokenizer.report = FitReport(**{**stored, "usage": tuple(stored["usage"])})
        if tokenizer.fingerprint != record["fingerprint"]:
            raise CheckpointError(
                f"{folder}: codes have fingerprint {tokenizer.fingerprint}, tokenizer.json says {record['fingerprint']}"
            )
        return tokenizer

    def _settle(
        self,
        raw: Tensor,
        sizes: tuple[int, ...],
        policy: CollisionPolicy,
        *,
        costs: Callable[[Tensor], Tensor],
        seed: int,
        reconstruction: float = float("nan"),
        details: dict[str, float] | None = None,
    ) -> FitReport:
        """Apply the collision policy to the codes [I, M] of a fit; sets `codes`, `level_sizes`, `unique`, `report`.

        Args:
            raw: Codes as assigned.
            sizes: Their level sizes.
            policy: See `CollisionPolicy`.
            costs: Rows [n] (from 0) -> [n, W of the last level], cost of each last code for these items.
            seed: For policy random.
            reconstruction, details: For the report.
        """
        group = collision_groups(raw)[0]
        collisions = int((torch.bincount(group)[group] > 1).sum())
        codes, self.level_sizes = without_collisions(raw, sizes, policy, costs=costs, seed=seed)
        self.codes = torch.cat([codes.new_full((1, codes.shape[1]), -1), codes])
        group = collision_groups(codes)[0]
        shared = int((torch.bincount(group)[group] > 1).sum())
        self.unique = shared == 0
        found = dict(details or {})
        usage = []
        for level, (column, size) in enumerate(zip(codes.T, self.level_sizes, strict=True), start=1):
            share = torch.bincount(column, minlength=size).double() / len(column)
            entropy = -(share * share.clamp(min=1e-300).log()).sum()
            usage.append(float((share > 0).double().mean()))
            found |= {f"perplexity_{level}": float(entropy.exp()), f"largest_{level}": float(share.max())}
        found["shared"] = float(shared)
        self.report = FitReport(collisions, tuple(usage), reconstruction, found)
        return self.report

    def _append(
        self, raw: Tensor, policy: CollisionPolicy, *, costs: Callable[[Tensor], Tensor], seed: int = 0
    ) -> None:
        """Add the codes [n, M] of new items, as assigned, after the catalogue; older codes stay as they are.

        Args:
            raw: Codes of the new items without the level that policy append adds.
            policy: As in fitting.
            costs: Rows of the new items (from 0) -> [n, W].
            seed: For policy random.
        """
        old = self.codes[1:]
        depth = raw.shape[1]
        codes, sizes = without_collisions(
            torch.cat([old[:, :depth], raw]),
            self.level_sizes[:depth],
            policy,
            costs=lambda rows: costs(rows - len(old)),
            seed=seed,
            kept=old,
        )
        if sizes[depth:] > self.level_sizes[depth:]:
            raise DataError(
                "a new item needs a number the last level does not have",
                found=f"{sizes[-1]} items with one code",
                expected=f"at most {self.level_sizes[-1]}",
                remedy="fit the tokenizer again with the new items",
            )
        self.codes = torch.cat([self.codes, codes[len(old) :]])
        group = collision_groups(self.codes[1:])[0]
        self.unique = bool((torch.bincount(group) == 1).all())


def code_fingerprint(codes: Tensor, level_sizes: Sequence[int]) -> str:
    """First 16 hex digits of a SHA-256 over level sizes and codes [I+1, M]."""
    digest = hashlib.sha256(repr(tuple(level_sizes)).encode())
    digest.update(codes.cpu().numpy().astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def without_collisions(
    codes: Tensor,
    sizes: tuple[int, ...],
    policy: CollisionPolicy,
    *,
    costs: Callable[[Tensor], Tensor],
    seed: int,
    kept: Tensor | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Codes [N, M] after a collision policy, and their level sizes; see `llmrec.blocks.collisions.resolve`.

    Raises:
        RecipeError: No such policy.
        DataError: More items share a prefix than the last level has codes.
    """
    if policy not in get_args(CollisionPolicy):
        known = ", ".join(get_args(CollisionPolicy))
        raise RecipeError(f"item_tokenizer.collisions: found {policy!r}, expected {known}")
    try:
        return resolve(codes, sizes, policy, costs=costs, seed=seed, kept=kept)
    except ValueError as error:
        raise DataError(
            f"the codes of this catalogue cannot be made unique: {error}",
            remedy="give the last level more codes, spread items evenly (rqkmeans: balanced), or choose collisions: "
            "append or none",
        ) from error


def fused(items: ItemFeatures, center: np.ndarray | None = None, scale: np.ndarray | None = None) -> np.ndarray:
    """[I, d] float32: all levels side by side, every dimension with mean 0 and variance 1, each level of equal power.

    Items that lack a level get zeros there, the mean of the others. `center` and `scale` [d] of an earlier catalogue
    put new items into the same space (`fused_statistics`).
    """
    if center is None or scale is None:
        center, scale = fused_statistics(items)
    columns = [np.where(mask[1:, None], values[1:], np.nan) for values, mask in items.values()]
    joined = (np.concatenate(columns, axis=1) - center) * scale
    return np.nan_to_num(joined, nan=0.0).astype(np.float32)


def fused_statistics(items: ItemFeatures) -> tuple[np.ndarray, np.ndarray]:
    """(center, scale) [d] of the levels side by side, over the items that have them.

    Raises:
        DataError: There is no level, or no item.
    """
    if not items or len(next(iter(items.values()))[0]) < 2:
        raise DataError("nothing to tokenise", found=f"levels {sorted(items)}", expected="at least one item and level")
    centers, scales = [], []
    for values, mask in items.values():
        present = values[1:][mask[1:]].astype(np.float64)
        width = values.shape[1]
        center = present.mean(0) if len(present) else np.zeros(width)
        deviation = present.std(0) if len(present) else np.zeros(width)
        centers.append(center)
        # A level of many dimensions is not more important than one of few.
        scales.append(np.where(deviation > 1e-9, 1.0 / np.maximum(deviation, 1e-9), 0.0) / np.sqrt(width))
    return np.concatenate(centers), np.concatenate(scales)


def kmeans(
    values: np.ndarray, k: int, *, seed: int, iterations: int = 100, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(centroids [k, d], labels [N]) by k-means++ and Lloyd iterations (scikit-learn).

    Fewer than k distinct rows give as many clusters; the other centroids are copies of them and stay unused.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    distinct = min(k, len(values))
    model = KMeans(distinct, init="k-means++", n_init=1, max_iter=iterations, random_state=seed % (2**32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: wanted, see above
        model.fit(np.asarray(values, dtype=np.float32), sample_weight=weights)
    centroids = np.resize(model.cluster_centers_, (k, values.shape[1])).astype(np.float32)
    return centroids, model.labels_.astype(np.int64)
