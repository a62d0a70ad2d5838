"""The state of a run as tensors and plain values: weights that train, optimizer, schedule, random numbers.

Each state becomes a safetensors file plus JSON, so that a checkpoint can be read without trusting it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from llmrec.errors import CheckpointError


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file; every tensor is copied, so that shared memory is no obstacle."""
    return save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})


def unpack(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def pack_json(value: Any) -> bytes:
    """Plain values as JSON; tuples keep their kind (`restore_tuples`)."""
    return json.dumps(_mark_tuples(value), indent=1).encode()


def unpack_json(path: Path) -> Any:
    """Read what `pack_json` wrote.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        return _restore_tuples(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _mark_tuples(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_mark_tuples(part) for part in value]}
    if isinstance(value, list):
        return [_mark_tuples(part) for part in value]
    if isinstance(value, dict):
        return {str(name): _mark_tuples(part) for name, part in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return value


def _restore_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore_tuples(part) for part in value]
    if isinstance(value, dict):
        if set(value) == {"tuple"}:
            return tuple(_restore_tuples(part) for part in value["tuple"])
        return {name: _restore_tuples(part) for name, part in value.items()}
    return value


class TrainableState:
    """The tensors of a model that training changes: parameters with gradients, and buffers that are not what they were.

    Frozen weights (a base LLM) never enter a checkpoint.

    Args:
        module: The model, as it stands before the first step.
        gather: Whole value of a parameter that a launcher has divided; every process takes part.
    """

    def __init__(self, module: nn.Module, gather: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
        self.module, self.gather = module, gather
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._initial = {name: _fingerprint(buffer) for name, buffer in module.named_buffers()}
        self._unchanged = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}

    def tensors(self) -> dict[str, Tensor]:
        """Name -> whole tensor (not copied where weights are not divided)."""
        parameters, buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        changed = [name for name, buffer in buffers.items() if self._has_changed(name, buffer)]
        gathered = {name: self.gather(parameters[name]) for name in self.names}
        return {**gathered, **{name: buffers[name] for name in changed}}

    def _has_changed(self, name: str, buffer: Tensor) -> bool:
        known, version = self._unchanged.get(name, (None, -1))
        if buffer is known and buffer._version == version:
            return False  # never written to: no need to look at large tables
        if self._initial.get(name) != _fingerprint(buffer):
            return True
        self._unchanged[name] = (buffer, buffer._version)
        return False

    def copy(self) -> dict[str, Tensor]:
        """The tensors, copied to the processor's memory."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Put tensors back into whole weights: before a launcher divides them, or after it released them.

        Raises:
            CheckpointError: Names or shapes do not fit the model.
        """
        targets = {**dict(self.module.named_buffers()), **dict(self.module.named_parameters())}
        missing = sorted(set(self.names) - set(tensors))
        unknown = sorted(set(tensors) - set(targets))
        if missing or unknown:
            raise CheckpointError(f"{where} does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if targets[name].shape != tensor.shape:
                    raise CheckpointError(
                        f"{where}: {name} has shape {tuple(tensor.shape)}, expected {tuple(targets[name].shape)}"
                    )
                targets[name].copy_(tensor)

    def signature(self) -> str:
        """Hash of the names and shapes of what trains."""
        shapes = dict(self.module.named_parameters())
        text = "\n".join(f"{name} {tuple(shapes[name].shape)}" for name in self.names)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fingerprint(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def optimizer_files(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as (tensors, everything else)."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    return tensors, {"kind": type(optimizer).__name__, "scalars": scalars, "groups": state["param_groups"]}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put back what `optimizer_files` took.

    Raises:
        CheckpointError: The groups are not those of this optimizer.
    """
    check_groups(rest["groups"], optimizer.param_groups)
    state: dict[int, dict[str, Any]] = {}
    for place, value in {**tensors, **rest["scalars"]}.items():
        index, _, name = place.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})


def check_groups(stored: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse parameter groups of other names or sizes.

    Raises:
        CheckpointError: Naming both.
    """
    found = [(group.get("name"), len(group["params"])) for group in stored]
    expected = [(group.get("name"), len(group["params"])) for group in groups]
    if found != expected:
        raise CheckpointError(f"optimizer state: found groups {found}, expected {expected}")


def rng_tensors(device: torch.device | None = None) -> dict[str, Tensor]:
    """States of the global generators of Python, NumPy and torch, as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    none = float("nan")
    tensors = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([none if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys, dtype=np.int64), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def set_rng(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Restore what `rng_tensors` took."""
    version, *words = tensors["python"].tolist()
    gauss = float(tensors["python_gauss"])
    random.setstate((version, tuple(words), None if np.isnan(gauss) else gauss))
    *keys, position, has_gauss = tensors["numpy"].tolist()
    cached = float(tensors["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"].cpu())
    if "cuda" in tensors and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"].cpu(), device)


@contextmanager
def kept_rng(device: torch.device | None = None) -> Iterator[None]:
    """Leave the global generators as they were, whatever happens inside."""
    before = rng_tensors(device)
    try:
        yield
    finally:
        set_rng(before, device)


def derived_generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on the numbers alone, so a resumed run draws what the first one drew."""
    words = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(2, np.uint64)
    generator = torch.Generator()
    generator.manual_seed(int(words[0] >> np.uint64(1)))
    return generator
