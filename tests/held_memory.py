"""Bytes that tensors really hold: what estimates of memory are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def tensor_bytes(tensors: Any) -> int:
    """Bytes of distinct storages, the parts of quantised weights included."""
    found: dict[int, int] = {}
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        parts = [tensor, *([state.absmax, state.code] if state is not None else []), getattr(tensor, "SCB", None)]
        for part in parts:
            if torch.is_tensor(part):
                found[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
    return sum(found.values())


class Peak(TorchDispatchMode):
    """Largest sum of storages alive at once, those of a model left out; sampled after every operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bytes = 0
        self._own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._own:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return out
