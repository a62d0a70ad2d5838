"""What training an adapter needs of each device's memory, from the model's configuration alone.

    weights      base model, frozen: by dtype and quantisation; divided over the processes under ZeRO-3 and FSDP
    frozen       the sequence encoder and the item table, float32
    adapter      what trains (adapter, router, projector), float32; gradients the same again; Adam twice
    exchange     copies for talking to other processes: gradient buckets, or gathered layers under ZeRO-3 and FSDP
    activations  what a forward saves for backward
    logits       scores of the supervised places with the copies their loss makes

Nothing is loaded or computed. Sizes of weights are counted on the meta device. Activations are measured: one forward
of the real code, adapter, dropout and casts included, runs on tensors without storage, and the distinct storages that
autograd saves are added up. A layer of a quantised model counts like one of the compute dtype, since it saves the same.
Not counted: the driver's own memory (about half a GiB on a GPU), fragmentation, and short-lived copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmrec.llm.backbone import Backbone
from llmrec.llm.quantized import Quantize, prepare_quantised

Sharding = Literal["none", "zero0", "zero1", "zero2", "zero3", "fsdp"]

ADAPTER_BYTES = 4
BUCKET = 500_000_000
"""Elements of DeepSpeed's gradient bucket (`reduce_bucket_size`), allocated whole."""
LIVE = 1_000_000_000
"""Parameters ZeRO-3 may keep gathered (`stage3_max_live_parameters`)."""
OPTIMIZER_BYTES = (("8bit", 2), ("adam", 8), ("lion", 4), ("rmsprop", 4), ("adagrad", 4), ("sgd", 0), ("adafactor", 0))
"""State per trained parameter, by the first part of the optimizer's name that fits; others count like Adam."""


@dataclass(frozen=True)
class Setting:
    """How a stage trains.

    Args:
        batch: B, sequences per device and forward.
        length: S, tokens of a sequence.
        places: Supervised places of a batch.
        classes: Scores per place: tokens of the vocabulary, or items.
        score_copies: float32 copies of the scores that live at once in the loss and its gradient.
        slots: Item vectors projected in a batch.
        gate_dim: Width of the vectors an instance-wise tuner reads.
        gate_positions: One gate per token instead of one per sequence.
        dtype: Compute dtype.
        quantize: Base weights in "4bit" or "8bit".
        checkpointing: Activations are recomputed layer by layer.
        optimizer: Name of transformers.
        trained: Trained parameters outside the adapter (projector, output layer).
        frozen: Bytes of encoder and item table.
        processes: Devices that share the work.
        sharding: What they divide.
    """

    batch: int
    length: int
    places: int
    classes: int
    score_copies: int = 2
    slots: int = 0
    gate_dim: int = 1
    gate_positions: bool = False
    dtype: torch.dtype = torch.float32
    quantize: Quantize | None = None
    checkpointing: bool = False
    optimizer: str = "adamw_torch"
    trained: int = 0
    frozen: int = 0
    processes: int = 1
    sharding: Sharding = "none"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device; see the module.

    Args:
        kinds: Bytes of the whole base model by dtype or quantisation.
        parameters: Parameters of the base model.
        trained: Trained parameters.
    """

    weights: int
    frozen: int
    adapter: int
    gradients: int
    optimizer: int
    exchange: int
    activations: int
    logits: int
    kinds: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    trained: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, in the order of the module's table."""
        return {name: value for name, value in asdict(self).items() if name not in ("kinds", "parameters", "trained")}

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


def estimate(config: Any, setting: Setting, attach: Callable[[Any], Any] | None = None) -> MemoryEstimate:
    """Memory per device of a stage.

    Args:
        config: Configuration of the base model, cut to its layers.
        setting: How it trains.
        attach: Puts the adapter onto a model on the meta device; None for no adapter.
    """
    from llmrec.llm.vision import auto_class

    with torch.device("meta"):
        model: Any = auto_class(config).from_config(
            config, dtype=setting.dtype, attn_implementation="sdpa", trust_remote_code=False
        )
        packed = _packed_layers(model) if setting.quantize else []
        parameters = sum(p.numel() for p in model.parameters())
        if setting.quantize:
            prepare_quantised(model, setting.dtype)
        kinds = weight_bytes(model, packed, setting.quantize)
        largest = _largest_block(model)
        adapted = attach(model) if attach is not None else model.requires_grad_(False)
    trained = setting.trained + sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    width, layers = int(model.get_input_embeddings().weight.shape[-1]), int(config.get_text_config().num_hidden_layers)
    saved = saved_bytes(adapted, setting, [*packed] if setting.quantize == "8bit" else [])
    if setting.checkpointing:
        # Every layer keeps its input, and one layer at a time is recomputed.
        saved = layers * setting.batch * setting.length * width * setting.dtype.itemsize + saved // layers
    state = next((size for part, size in OPTIMIZER_BYTES if part in setting.optimizer), 8)
    whole = sum(kinds.values())
    shards = setting.processes
    divides = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}.get(setting.sharding, 0)
    gradients = trained * ADAPTER_BYTES // (shards if divides >= 2 else 1)
    casts = 0 if setting.dtype == torch.float32 else setting.dtype.itemsize
    return MemoryEstimate(
        weights=whole // (shards if divides >= 3 else 1),
        frozen=setting.frozen,
        adapter=trained * ADAPTER_BYTES // (shards if divides >= 3 else 1),
        gradients=gradients,
        optimizer=trained * state // (shards if divides >= 1 else 1),
        exchange=_exchange(setting, whole, gradients, largest),
        activations=saved + 16 * setting.slots * width,
        logits=setting.places * setting.classes * (4 * setting.score_copies + casts),
        kinds=kinds,
        parameters=parameters,
        trained=trained,
    )


def _packed_layers(model: nn.Module) -> list[nn.Linear]:
    """Linear layers that transformers quantises on loading: all but the output layer and what is tied to it."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    return [m for name, m in model.named_modules() if type(m) is nn.Linear and should_convert_module(name, kept)]


def weight_bytes(model: nn.Module, packed: list[nn.Linear], quantize: Quantize | None) -> dict[str, int]:
    """Bytes of parameters and buffers by dtype; layers in `packed` count as quantised."""
    kinds: dict[str, int] = {}
    weights = {id(layer.weight) for layer in packed}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in weights:
            name, size = str(quantize), _packed_bytes(tensor, quantize)
        else:
            name, size = str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.element_size()
        kinds[name] = kinds.get(name, 0) + size
    return kinds


def _packed_bytes(weight: Tensor, quantize: Quantize | None) -> int:
    if quantize == "8bit":
        return weight.numel() + 4 * weight.shape[0]
    # Half a byte each, a float32 scale for 64 of them, and the table of 16 values.
    return (weight.numel() + 1) // 2 + 4 * -(-weight.numel() // 64) + 64


def _largest_block(model: Any) -> tuple[int, int]:
    """Bytes of the largest decoder layer, and of everything outside the layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    outside = sum(p.numel() * p.element_size() for p in model.parameters()) - sum(sizes)
    return max(sizes, default=0), outside


def _exchange(setting: Setting, weights: int, gradients: int, largest: tuple[int, int]) -> int:
    block, outside = largest
    if setting.sharding == "none":
        return gradients if setting.processes > 1 else 0  # buckets of DistributedDataParallel
    if setting.sharding == "fsdp":
        return 2 * block + outside if setting.processes > 1 else 0  # this layer, the next one, and what has no layer
    bucket = BUCKET * setting.dtype.itemsize
    live = min(weights, LIVE * setting.dtype.itemsize) if setting.sharding == "zero3" else 0
    return bucket + live


# Activations ---------------------------------------------------------------------------------------------------------


def saved_bytes(model: Any, setting: Setting, keeps_input: list[nn.Linear]) -> int:
    """Bytes autograd saves in one forward of the decoder.

    Args:
        model: On the meta device, with its adapter; its tensors are replaced.
        setting: See `Setting`.
        keeps_input: Layers whose product keeps its input for backward (8-bit layers do, although they are frozen).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        _give_fake_tensors(model)
        for layer in keeps_input:
            layer.weight.requires_grad_(True)
        backbone = Backbone(model.train())
        shape = (setting.batch, setting.length)
        gates = {}
        if backbone.gate_kind is not None:
            where = shape if setting.gate_positions else shape[:1]
            gates[backbone.gate_kind] = torch.zeros(*where, setting.gate_dim)
        embeds = torch.zeros(*shape, backbone.width, dtype=backbone.dtype).requires_grad_()
        with SavedStorage(model) as saved:
            backbone(embeds, gates=gates)
    return saved.bytes


class SavedStorage:
    """Context that adds up the distinct storages saved for backward, a model's own tensors left out."""

    def __init__(self, model: nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._seen: dict[int, Any] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Size of what was saved."""
        return sum(storage.nbytes() for storage in self._seen.values())

    def __enter__(self) -> SavedStorage:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._seen[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor


def _give_fake_tensors(model: nn.Module) -> None:
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
