"""DeepSpeed ZeRO behind the interface of `llmrec.training.sharding`; the one place that imports deepspeed.

DeepSpeed takes gradients, clipping and the optimizer's step into its own hands. Its `safe_get_full_...` functions give
whole values back, parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmrec.errors import RecipeError
from llmrec.training.sharding import Divided, Files, replace_parameters, shaped_entries
from llmrec.training.states import check_groups


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
        self._refuse_unfit("ZeRO")
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
        shaped = shaped_entries(tensors)
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
        replace_parameters(self.loop.model, lambda parameter: values[id(parameter)])
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


def _enabled(config: Mapping[str, Any], section: str) -> bool:
    return (config.get(section) or {}).get("enabled") in (True, "true")


def _empty(shaped: bool, value: Any, flat: Tensor) -> Any:
    if shaped:
        return torch.zeros_like(flat, dtype=value.dtype)
    return value.clone() if torch.is_tensor(value) else value
