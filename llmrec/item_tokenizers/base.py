"""Base of item tokenizers: an item becomes a short code of M levels. One file of this folder per tokenizer.

A tokenizer is a dataclass of options plus fitted arrays; it is stored as `tokenizer.json` (options, level sizes,
fingerprint) and `codes.safetensors` (codes [I+1, M] and whatever arrays the subclass names in `_arrays`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrec.errors import CheckpointError

if TYPE_CHECKING:
    from typing import Self

    from llmrec.data.schema import ItemFeatures


@dataclass(frozen=True)
class FitReport:
    """What fitting found.

    Args:
        collisions: Items that share their code with another item before the collision policy acted.
        usage: Share of codes in use, per level.
        reconstruction: Mean squared reconstruction error, where the tokenizer reconstructs; else NaN.
        details: Further named figures.
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
    """

    level_sizes: tuple[int, ...] = ()
    unique: bool = True
    codes: Tensor

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
        found = [items[0] if len(items) else 0 for items in self.items_of(codes.reshape(-1, codes.shape[-1]))]
        return torch.tensor([int(item) for item in found], device=codes.device).reshape(codes.shape[:-1])

    def items_of(self, codes: Tensor) -> list[Tensor]:
        """[N, M] -> for each row the ids of all items with that code, ascending."""
        index: dict[bytes, list[int]] = {}
        table = self.codes.cpu().numpy()
        for item in range(1, len(table)):
            index.setdefault(table[item].tobytes(), []).append(item)
        rows = np.ascontiguousarray(codes.cpu().numpy().astype(np.int64))
        return [torch.tensor(index.get(row.tobytes(), []), dtype=torch.long) for row in rows]

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over level sizes and codes; models store it and refuse another."""
        digest = hashlib.sha256(repr(self.level_sizes).encode())
        digest.update(self.codes.cpu().numpy().astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

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
        }
        (folder / "tokenizer.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a folder written by `save_pretrained` of the same class.

        Raises:
            CheckpointError: Another class wrote it, or codes and fingerprint differ.
        """
        folder = Path(folder)
        record: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if record["class"].rpartition(".")[2] != cls.__qualname__:
            raise CheckpointError(f"{folder}: written by {record['class']}, asked for {cls.__qualname__}")
        known: set[str] = {f.name for f in fields(cls)} if is_dataclass(cls) else set()
        tokenizer = cls(**{name: value for name, value in record["options"].items() if name in known})
        for name, value in load_file(folder / "codes.safetensors").items():
            setattr(tokenizer, name, value)
        tokenizer.level_sizes = tuple(record["level_sizes"])
        tokenizer.unique = record["unique"]
        if tokenizer.fingerprint != record["fingerprint"]:
            raise CheckpointError(
                f"{folder}: codes have fingerprint {tokenizer.fingerprint}, tokenizer.json says {record['fingerprint']}"
            )
        return tokenizer
