"""How a launcher divides the weights, and what that changes for a stage: nothing, FSDP 2 or DeepSpeed ZeRO.

Checkpoints hold what trains (adapters, projectors, routers, heads, encoders) and its optimizer state, which is small
beside a frozen language model. So it is gathered in every process, and the first one writes the same whole-or-absent
folder as without a launcher. A checkpoint says nothing of how weights were divided, and can be resumed under another
launcher.

    weights    loaded before they are divided; gathered for checkpoints; whole again when the stage ends (`release`)
    optimizer  gathered per parameter and named by its place in the groups; divided again after a resume
    gradients  sums over supervised places, divided by their number before the optimizer steps (`scale_gradients`)
    validation runs on whole weights (`whole`), so that processes may take different numbers of batches

Validation and evaluation therefore need the memory of one whole model in every process; training does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmrec.errors import RecipeError
from llmrec.strategies.base import TrainingStrategy
from llmrec.training.states import load_optimizer, optimizer_files

Files = tuple[dict[str, Tensor], dict[str, Any]]


class Sharding:
    """Whole weights in every process: one process, or data parallel.

    Args:
        loop: The `StageLoop`, right after its construction.
    """

    divides: ClassVar[bool] = False
    """Whether a process holds only a part of the weights or of the optimizer's state while it trains."""
    steps_in_backward: ClassVar[bool] = False
    """Whether the wrapper takes the optimizer's step inside `backward`."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop

    def configure(self) -> None:
        """Settings that must be right before the wrapper divides the weights.

        Raises:
            RecipeError: The launcher's settings cannot be kept.
        """

    def before_wrapping(self) -> None:
        """Called when all weights are in place, right before the wrapper divides them."""

    def wrapped(self, settle: Callable[[], Any]) -> None:
        """Called once the weights are divided; `settle` must run between the last gradient and the step."""

    def autocast_dtype(self) -> torch.dtype | None:
        """Compute type to apply around the model's forward, where the wrapper's own would change the weights."""
        return None

    def gather(self, parameter: Tensor) -> Tensor:
        """The whole value of a parameter, detached; every process takes part."""
        return parameter.detach()

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient, before clipping."""
        for parameter in self.loop.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def optimizer_state(self) -> Files:
        """The optimizer's whole state; see `optimizer_files`. Every process takes part."""
        return optimizer_files(self._optimizer())

    def load_optimizer(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Put back what `optimizer_state` took.

        Raises:
            CheckpointError: The groups are not those of this optimizer.
        """
        load_optimizer(self._optimizer(), tensors, rest)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Whole weights in every process while the context is open, without any communication inside."""
        yield

    def release(self) -> None:
        """End dividing: leave plain parameters with whole values in the model."""

    def _optimizer(self) -> Any:
        return getattr(self.loop.optimizer, "optimizer", self.loop.optimizer)


class Divided(Sharding, ABC):
    """What FSDP 2 and ZeRO share. Neither takes single numbers (scales, temperatures): those get one dimension."""

    divides = True

    def __init__(self, loop: Any) -> None:
        super().__init__(loop)
        self._single: list[str] = []
        self._single_ids: set[int] = set()

    def before_wrapping(self) -> None:
        """See the base class."""
        for name, parameter in self.loop.model.named_parameters():
            if parameter.dim() == 0:
                self._single.append(name)
                parameter.data = parameter.data.reshape(1)

    def wrapped(self, settle: Callable[[], Any]) -> None:
        """See the base class."""
        parameters = dict(self.loop.model.named_parameters())
        self._single_ids = {id(parameters[name]) for name in self._single}

    def gather(self, parameter: Tensor) -> Tensor:
        """See the base class."""
        return self._as_it_was(parameter, self._whole(parameter))

    @abstractmethod
    def _whole(self, parameter: Tensor) -> Tensor:
        """The whole value of a parameter, in the shape the wrapper keeps."""

    def _as_it_was(self, parameter: Tensor, value: Tensor) -> Tensor:
        return value.reshape(()) if id(parameter) in self._single_ids else value

    def _refuse_unfit(self, wrapper: str) -> None:
        """Refuse quantised weights, and hooks that read the model between steps, when it holds no whole weights."""
        if not all(parameter.is_floating_point() for parameter in self.loop.model.parameters()):
            raise RecipeError(
                f"llm.quantize: {wrapper} would divide quantised weights, which is not supported; use data parallel "
                "(accelerate_configs/multi_gpu.yaml), or weights that are not quantised"
            )
        own = type(self.loop.strategy)
        for name in ("on_step_end", "on_epoch_start"):
            if getattr(own, name) is not getattr(TrainingStrategy, name):
                raise RecipeError(
                    f"strategy {own.__name__} reads the model in {name}, between steps, when {wrapper} has divided its "
                    "weights; use data parallel (accelerate_configs/multi_gpu.yaml)"
                )


class Fsdp2(Divided):
    """PyTorch's `fully_shard`: parameters are DTensors outside of forward and backward."""

    def configure(self) -> None:
        """Second version only; weights keep their own types, and are not loaded a second time."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = self.loop.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise RecipeError("FSDP 1 flattens parameters; expected fsdp_version: 2 (accelerate_configs/fsdp2.yaml)")
        if plugin.activation_checkpointing:
            raise RecipeError(
                "fsdp_activation_checkpointing would recompute with the gates of another forward; set it to false and "
                "use activation_checkpointing: true in the stage"
            )
        if plugin.cpu_ram_efficient_loading:
            raise RecipeError(
                "fsdp_cpu_ram_efficient_loading leaves every process but the first without weights, and does not know "
                "stored buffers such as the item table; set it to false"
            )
        self._refuse_unfit("FSDP 2")
        # Projectors and routers compute in float32 on purpose; autocast takes care of the rest.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)

    def _whole(self, parameter: Tensor) -> Tensor:
        return _full(parameter.detach())

    def optimizer_state(self) -> Files:
        """See the base class."""
        tensors, rest = super().optimizer_state()
        parameters = self._trained()
        return {p: self._as_it_was(parameters[parameter_index(p)], _full(value)) for p, value in tensors.items()}, rest

    def load_optimizer(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """See the base class."""
        parameters = self._trained()
        shaped, divided = shaped_entries(tensors), {}
        for place, value in tensors.items():
            like = parameters[parameter_index(place)]
            divided[place] = _divide(value, like) if place.partition(".")[2] in shaped else value
        super().load_optimizer(divided, rest)

    def _trained(self) -> list[Tensor]:
        return [parameter for group in self._optimizer().param_groups for parameter in group["params"]]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See the base class."""
        modules = _fsdp_modules(self.loop.model)
        if modules:
            modules[0]._get_fsdp_state()._lazy_init()  # the first module is the root; a layer must not take its place
        for module in modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            again = bool(self.loop.accelerator.state.fsdp_plugin.reshard_after_forward)
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(again and module is not modules[0], recurse=False)

    def release(self) -> None:
        """See the base class."""
        modules = _fsdp_modules(self.loop.model)
        for module in modules:
            module.reshard()
        replace_parameters(self.loop.model, self.gather)
        for module in modules:
            state = module._get_fsdp_state()
            handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
            for group in state._fsdp_param_groups:
                handles += group._module_to_pre_save_state_dict_hook_handle.values()
                handles += group._module_to_pre_load_state_dict_hook_handle.values()
            for handle in handles:
                handle.remove()
            module.__class__ = type(module).__mro__[type(module)._orig_cls_mro_index]


def choose_sharding(loop: Any) -> Sharding:
    """How the launcher of this process divides weights.

    Args:
        loop: The `StageLoop`, right after its construction.
    """
    if loop.is_deepspeed_enabled:
        from llmrec.training.zero import Zero

        return Zero(loop)
    return Fsdp2(loop) if loop.is_fsdp_enabled else Sharding(loop)


def _full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _divide(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole value, divided like a parameter; no communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    whole = value.reshape(like.shape).to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def parameter_index(place: str) -> int:
    """Number of the parameter a tensor of the optimizer's state belongs to ("3.exp_avg")."""
    return int(place.partition(".")[0])


def shaped_entries(tensors: Mapping[str, Tensor]) -> set[str]:
    """Entries of the optimizer's state that have the parameter's shape ("exp_avg"), unlike a count of steps."""
    return {place.partition(".")[2] for place, value in tensors.items() if value.dim()}


def _fsdp_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def replace_parameters(model: nn.Module, value_of: Callable[[Tensor], Tensor]) -> None:
    """Put a plain parameter with the whole value in the place of each divided one; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    kept = list(model.parameters())  # ids stay theirs until all are replaced
    for parameter in kept:
        made[id(parameter)] = nn.Parameter(value_of(parameter), requires_grad=parameter.requires_grad)
    for module in model.modules():
        module._parameters = {
            name: None if parameter is None else made[id(parameter)] for name, parameter in module._parameters.items()
        }
