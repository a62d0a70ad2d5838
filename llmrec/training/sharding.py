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

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmrec.errors import RecipeError
from llmrec.strategies.base import TrainingStrategy
from llmrec.training.states import check_groups, load_optimizer, optimizer_files

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


class Divided(Sharding):
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

    def _whole(self, parameter: Tensor) -> Tensor:
        raise NotImplementedError

    def _as_it_was(self, parameter: Tensor, value: Tensor) -> Tensor:
        return value.reshape(()) if id(parameter) in self._single_ids else value

    def _refuse_hooks(self, wrapper: str) -> None:
        """A strategy's hooks read the model between steps, when it holds no whole weights."""
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
        self._refuse_hooks("FSDP 2")
        # Projectors and routers compute in float32 on purpose; autocast takes care of the rest.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)

    def _whole(self, parameter: Tensor) -> Tensor:
        return _full(parameter.detach())

    def optimizer_state(self) -> Files:
        """See the base class."""
        tensors, rest = super().optimizer_state()
        parameters = self._trained()
        return {p: self._as_it_was(parameters[_index(p)], _full(value)) for p, value in tensors.items()}, rest

    def load_optimizer(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """See the base class."""
        parameters = self._trained()
        shaped, divided = _shaped(tensors), {}
        for place, value in tensors.items():
            like = parameters[_index(place)]
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
        _replace_parameters(self.loop.model, self.gather)
        for module in modules:
            state = module._get_fsdp_state()
            handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
            for group in state._fsdp_param_groups:
                handles += group._module_to_pre_save_state_dict_hook_handle.values()
                handles += group._module_to_pre_load_state_dict_hook_handle.values()
            for handle in handles:
                handle.remove()
            module.__class__ = type(module).__mro__[type(module)._orig_cls_mro_index]


class Zero(Divided):
    """DeepSpeed ZeRO 1, 2 or 3: gradients and optimizer state are divided, with stage 3 the weights as well."""

    steps_in_backward = True

    def __init__(self, loop: Any) -> None:
        super().__init__(loop)
        self._autocast: torch.dtype | None = None

    def configure(self) -> None:
        """Keep every weight's own type, clip as the stage says, and refuse what the stage itself decides."""
        plugin = self.loop.accelerator.state.deepspeed_plugin
        config = plugin.deepspeed_config
        zero = config.get("zero_optimization", {})
        if zero.get("stage", 0) not in (1, 2, 3):
            raise RecipeError(
                f"DeepSpeed: found zero stage {zero.get('stage', 0)}, expected 1, 2 or 3; plain data parallel is "
                "accelerate_configs/multi_gpu.yaml"
            )
        for name in ("optimizer", "scheduler"):
            if name in config:
                raise RecipeError(f"DeepSpeed's configuration has a section {name!r}; the stage of the recipe names it")
        if _enabled(config, "fp16"):
            raise RecipeError("DeepSpeed: fp16 is not supported; expected mixed_precision: bf16 or no")
        if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
            raise RecipeError(
                "DeepSpeed: offload_optimizer is not supported, and only adapters train: their state is small; set "
                "offload_optimizer_device: none"
            )
        self._refuse_hooks("ZeRO")
        # DeepSpeed's bf16 casts the whole module, frozen encoder and item table included. Autocast does not.
        self._autocast = torch.bfloat16 if _enabled(config, "bf16") else None
        config["bf16"] = {"enabled": False}
        config["gradient_clipping"] = float(self.loop.args.max_grad_norm or 0.0)
        known = plugin.hf_ds_config  # transformers has compared the file with the stage's arguments before
        known._dtype = torch.float32
        known.mismatches = [line for line in known.mismatches if "bf16" not in line and "gradient_clipping" not in line]
        count = sum(parameter.numel() for parameter in self.loop.model.parameters() if parameter.requires_grad)
        zero.setdefault("reduce_bucket_size", max(count, 1))  # the default buffer holds 500 million numbers

    def wrapped(self, settle: Callable[[], Any]) -> None:
        """Settle the gradients between DeepSpeed's backward and its step, which it takes in one call."""
        super().wrapped(settle)
        self._engine = self.loop.model_wrapped
        self._zero = self._engine.optimizer
        step = self._engine.step

        def settled_step(*args: Any, **kwargs: Any) -> None:
            settle()
            step(*args, **kwargs)
            self._zero.loss_scale = 1.0

        self._engine.step = settled_step
        self._parameters = [p for group in self.loop.parameter_plan for p in group]

    def autocast_dtype(self) -> torch.dtype | None:
        """See the base class."""
        return self._autocast

    def scale_gradients(self, factor: float) -> None:
        """As if the loss had been scaled by 1 / factor, which the optimizer undoes before it clips."""
        self._zero.loss_scale = 1.0 / factor

    def _whole(self, parameter: Tensor) -> Tensor:
        if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
            return parameter.detach()  # not divided yet, or not any more
        if not parameter.requires_grad:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                return parameter.detach().clone()
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).to(parameter.dtype)

    def optimizer_state(self) -> Files:
        """See the base class."""
        from deepspeed.utils import safe_get_full_optimizer_state

        base = self._zero.optimizer
        kept = base.state.get(self._flat()[0], {})  # all parts have the same entries
        self._link()
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for index, parameter in enumerate(self._parameters):
            for name, value in kept.items():
                if not torch.is_tensor(value):
                    scalars[f"{index}.{name}"] = value
                elif value.dim() == 0:
                    tensors[f"{index}.{name}"] = value
                else:
                    whole = safe_get_full_optimizer_state(parameter, name)
                    tensors[f"{index}.{name}"] = self._as_it_was(parameter, whole)
        return tensors, {"kind": type(base).__name__, "scalars": scalars, "groups": self._groups()}

    def load_optimizer(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """See the base class."""
        from deepspeed.utils import safe_set_full_optimizer_state

        check_groups(rest["groups"], self._groups())
        base = self._zero.optimizer
        for group, stored in zip(base.param_groups, rest["groups"], strict=True):
            group.update({name: value for name, value in stored.items() if name != "params"})
        by_parameter: dict[int, dict[str, Any]] = {}
        for place, value in {**tensors, **rest["scalars"]}.items():
            index, _, name = place.partition(".")
            by_parameter.setdefault(int(index), {})[name] = value
        if not by_parameter:
            return
        shaped = _shaped(tensors)
        example = next(iter(by_parameter.values()))
        for flat in self._flat():
            base.state[flat] = {name: _empty(name in shaped, value, flat) for name, value in example.items()}
        self._link()
        for index, values in by_parameter.items():
            for name in shaped & values.keys():
                safe_set_full_optimizer_state(self._parameters[index], values[name].to(self.loop.args.device), name)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See the base class."""
        if not hasattr(self._zero, "parameter_offload"):
            yield  # ZeRO 1 and 2 leave the weights whole
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(self._engine):
            yield

    def release(self) -> None:
        """See the base class."""
        if not hasattr(self, "_engine"):
            return
        values = {id(p): self.gather(p).clone() for p in self.loop.model.parameters()}
        self._engine.destroy()
        _replace_parameters(self.loop.model, lambda parameter: values[id(parameter)])
        self.loop.model_wrapped, self.loop.deepspeed = self.loop.model, None

    def _link(self) -> None:
        """Let ZeRO 1 and 2 find the state of each parameter. DeepSpeed itself does so once, after the first group."""
        if not hasattr(self._zero, "parameter_offload"):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flat(self) -> list[Tensor]:
        """What the optimizer inside ZeRO works on: this process's part of each group."""
        if hasattr(self._zero, "parameter_offload"):
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _groups(self) -> list[dict[str, Any]]:
        groups, first = [], 0
        for group, parameters in zip(self._zero.optimizer.param_groups, self.loop.parameter_plan, strict=True):
            options = {name: value for name, value in group.items() if name != "params"}
            groups.append({**options, "params": list(range(first, first + len(parameters)))})
            first += len(parameters)
        return groups


def choose_sharding(loop: Any) -> Sharding:
    """How the launcher of this process divides weights.

    Args:
        loop: The `StageLoop`, right after its construction.
    """
    if loop.is_deepspeed_enabled:
        return Zero(loop)
    return Fsdp2(loop) if loop.is_fsdp_enabled else Sharding(loop)


def _enabled(config: Mapping[str, Any], section: str) -> bool:
    return (config.get(section) or {}).get("enabled") in (True, "true")


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


def _index(place: str) -> int:
    """Number of the parameter a tensor of the optimizer's state belongs to ("3.exp_avg")."""
    return int(place.partition(".")[0])


def _shaped(tensors: Mapping[str, Tensor]) -> set[str]:
    """Entries of the optimizer's state that have the parameter's shape ("exp_avg"), unlike a count of steps."""
    return {place.partition(".")[2] for place, value in tensors.items() if value.dim()}


def _empty(shaped: bool, value: Any, flat: Tensor) -> Any:
    if shaped:
        return torch.zeros_like(flat, dtype=value.dtype)
    return value.clone() if torch.is_tensor(value) else value


def _fsdp_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _replace_parameters(model: nn.Module, value_of: Callable[[Tensor], Tensor]) -> None:
    """Put a plain parameter with the whole value in the place of each divided one; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    kept = list(model.parameters())  # ids stay theirs until all are replaced
    for parameter in kept:
        made[id(parameter)] = nn.Parameter(value_of(parameter), requires_grad=parameter.requires_grad)
    for module in model.modules():
        module._parameters = {
            name: None if parameter is None else made[id(parameter)] for name, parameter in module._parameters.items()
        }
