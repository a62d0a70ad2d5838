"""iLoRA: instance-wise LoRA, one set of low-rank experts mixed per user (NeurIPS 2024).

Every LoRA module of rank r is cut into E experts that share the rank; a router turns a representation of the user's
history into E softmax weights g, and the same weights drive every adapted layer:

    y = W0 x + b + (E alpha / r) sum_e g_e B_e A_e dropout(x)              [B, S, d_in] -> [B, S, d_out]

The paper's release builds one output per expert. We use the equal form in rank space: with z = A dropout(x), [B, S, r],

    y = W0 x + b + (alpha / r) B (z * repeat_interleave(E g, r / E))

which adds one product on [B, S, r], keeps the weights and keys of plain LoRA, and works over quantised layers; uniform
gates give plain LoRA exactly. Ours as well: gates per position ([B, S, E], for objectives that supervise several
positions, where one gate per sequence would show later targets to earlier positions), the LayerNorm before the router,
and that a missing gate is an error. The router is saved in the adapter folder beside the experts.

Gates arrive as `user_repr` ([B, gate_dim] or [B, S, gate_dim]) or finished as `gates` ([B, E] or [B, S, E]) with every
forward and generate. For FSDP use `activation_checkpointing_enable` of the model, not FSDP's own wrapper, whenever two
forwards come before one backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NoReturn

import torch
from peft import LoraConfig, LoraModel, PeftConfig
from torch import Tensor, nn

from llmrec.blocks.gating import Router, check_router_options
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.paper import Paper
from llmrec.tuners.base import Tuner, check_lora_options
from llmrec.tuners.binding import bind
from llmrec.tuners.checkpointing import adopt_checkpointing, check_checkpoint_options
from llmrec.tuners.gate_state import (
    GatedLinear,
    Gates,
    GateState,
    checked_gates,
    expand_gates,
    expansion_factor,
    fixed_gate,
)

PAPER = Paper(
    title="iLoRA: Customizing Language Models with Instance-wise LoRA for Sequential Recommendation",
    venue="NeurIPS 2024",
    system="iLoRA",
)
PEFT_TYPE = "ILORA"
DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}
NO_MERGE = (
    "iLoRA weights differ from user to user and cannot be merged; for one fixed mixture call "
    "merge_and_unload(gate='uniform') or merge_and_unload(gate=tensor of E weights)"
)
UNSUPPORTED_FIELDS = ("target_parameters", "megatron_config", "alora_invocation_tokens", "lora_bias")


@dataclass
class ILoraConfig(LoraConfig):
    """Configuration of iLoRA: a `LoraConfig` whose rank r is shared by `num_experts` experts.

    Args:
        num_experts: E; must divide r and every value of rank_pattern.
        gate_dim: Width of the representation the router reads; not needed for router "none".
        router: `linear`, `mlp`, `resnet1d`, or `none` when finished gates are passed with every call.
        router_norm: `layer_norm` or `none`; left out, linear and mlp normalise and resnet1d does not.
        logit_noise: Standard deviation of Gaussian noise on the router's logits in training.
        encoder_fingerprint: Identity of the encoder whose representations the router was trained on.

    Raises:
        RecipeError: When values do not go together, or ask for a variant of LoRA that cannot be gated.
    """

    num_experts: int = field(default=4, metadata={"help": "Number of experts E that share the rank."})
    gate_dim: int | None = field(default=None, metadata={"help": "Width of the vectors the router reads."})
    router: str = field(default="linear", metadata={"help": "linear, mlp, resnet1d or none."})
    router_norm: str | None = field(default=None, metadata={"help": "layer_norm or none."})
    logit_noise: float = field(default=0.0, metadata={"help": "Noise on router logits, training only."})
    encoder_fingerprint: str | None = field(default=None, metadata={"help": "Encoder the router belongs to."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        self.check()

    def check(self) -> None:
        """Refuse what cannot work; called again when the adapter is put into a model."""
        gated = self.router != "none"
        try:
            check_router_options(
                self.gate_dim if gated else 1, self.num_experts, self.router if gated else "linear", self.router_norm,
                self.logit_noise,
            )  # fmt: skip
        except ValueError as error:
            raise RecipeError(f"tuner: {error}") from error
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": rank for k, rank in (self.rank_pattern or {}).items()}}
        for place, rank in ranks.items():
            if rank % self.num_experts:
                raise RecipeError(
                    f"{place}: found {rank}, which {self.num_experts} experts cannot share; "
                    f"expected a multiple of num_experts"
                )
        variants = [f.name for f in fields(self) if f.metadata.get("is_lora_variant")]
        asked = [name for name in (*variants, *UNSUPPORTED_FIELDS) if getattr(self, name, None)]
        if asked:
            raise RecipeError(f"iLoRA cannot gate this variant of LoRA: found {', '.join(asked)}; leave it out")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise RecipeError(
                f"init_lora_weights: found {self.init_lora_weights!r}, expected True, False or 'gaussian': "
                "initialisations that change the base weights do not survive gating"
            )


class ILoraModel(LoraModel):
    """peft's LoRA model with a router per adapter and gated `lora_A` modules.

    Attributes:
        ilora_router: Router of each adapter (none for router "none").
        gate_state: Gates of the running forward, shared by the layers.
    """

    peft_config: dict[str, ILoraConfig]  # type: ignore[assignment]
    uses_shared_state = True
    forward_arguments: ClassVar[frozenset[str]] = frozenset({"user_repr", "gates"})

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.ilora_router = nn.ModuleDict()
        self.gate_state = GateState()
        self._merge_allowed = False
        # Looked through in every training step, so collected once.
        self._checkpointable = tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing"))

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        if not isinstance(config, ILoraConfig):
            raise RecipeError(f"found a {type(config).__name__}, expected ILoraConfig for every adapter of the model")
        super()._check_new_adapter_config(config)
        config.check()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the experts as peft does, then the adapter's router; other routers keep their trainability."""
        before = {name: [p.requires_grad for p in router.parameters()] for name, router in self.ilora_router.items()}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for name, flags in before.items():
            for parameter, flag in zip(self.ilora_router[name].parameters(), flags, strict=True):
                parameter.requires_grad = flag
        config = self.peft_config[adapter_name]
        if config.router == "none" or config.gate_dim is None:
            return
        router = Router(config.gate_dim, config.num_experts, config.router, config.router_norm, config.logit_noise)
        device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
        if device is not None and not any(p.is_meta for p in router.parameters()):
            router.to(device)
        router.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        self.ilora_router[adapter_name] = router.train(self.training)

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: ILoraConfig, adapter_name: str, target: Any, target_name: str, parent: nn.Module, *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        inner = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(inner, (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)):
            raise RecipeError(
                f"target_modules: {target_name!r} is a {type(inner).__name__}, expected linear projections only"
            )
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
        layer = getattr(parent, target_name)
        lora_a = layer.lora_A[adapter_name] if adapter_name in layer.lora_A else None
        if type(lora_a) is not nn.Linear or layer.r[adapter_name] % lora_config.num_experts:
            raise RecipeError(
                f"target_modules: {target_name!r} became {type(layer).__name__} of rank {layer.r.get(adapter_name)}, "
                f"expected a linear layer whose rank {lora_config.num_experts} experts can share"
            )
        GatedLinear.convert(lora_a, self.gate_state, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter(s); their routers become trainable unless `inference_mode`."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, router in self.ilora_router.items():
            router.requires_grad_(name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of experts and routers."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.ilora_router:
                self.ilora_router[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove experts and router of an adapter."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.ilora_router:
            del self.ilora_router[adapter_name]

    # Gates ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        user_repr, gates = kwargs.pop("user_repr", None), kwargs.pop("gates", None)
        if kwargs.get("adapter_names") is not None:
            raise DataError(
                "adapter_names picks another adapter per row, which iLoRA does not support",
                remedy="call set_adapter and run one adapter per batch; users differ by their gates",
            )
        if self.training:
            adopt_checkpointing(self._checkpointable, self.gate_state)
        factor = expansion_factor(kwargs, getattr(self.model, "generation_config", None))
        opened = {name: Gates(self.compute_gates(name, user_repr, gates), factor) for name in self.active_adapters}
        if torch.is_grad_enabled():
            self.gate_state.foresee(self.model.modules(), opened)
        with self.gate_state.opened(opened), super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def compute_gates(self, adapter: str, user_repr: Tensor | None = None, gates: Tensor | None = None) -> Tensor:
        """Expert weights of an adapter.

        Args:
            adapter: Name of the adapter.
            user_repr: [B, gate_dim] or [B, S, gate_dim], goes through the router.
            gates: [B, E] or [B, S, E], taken as they are.

        Returns:
            [B, E] or [B, S, E], float32.

        Raises:
            DataError: When neither or both are given, or shapes and values do not fit.
        """
        config = self.peft_config[adapter]
        if (user_repr is None) == (gates is None):
            found = "neither" if gates is None else "both"
            raise DataError(
                f"the adapter {adapter!r} needs gates",
                found=f"{found} of user_repr and gates",
                expected="exactly one of them with every forward and generate",
                remedy="pass user_repr=[B, gate_dim] of the gate provider, or run inside disable_adapter()",
            )
        if gates is not None:
            return checked_gates(gates, config.num_experts)
        assert user_repr is not None
        if adapter not in self.ilora_router:
            raise DataError("the adapter has no router", found="user_repr", expected="finished gates [B, E]")
        if user_repr.dim() not in (2, 3) or user_repr.shape[-1] != config.gate_dim:
            raise DataError(
                "user_repr has the wrong shape",
                found=str(tuple(user_repr.shape)),
                expected=f"[B, {config.gate_dim}] or [B, S, {config.gate_dim}]",
            )
        return self.ilora_router[adapter](user_repr)

    @property
    def last_gates(self) -> Tensor | None:
        """Gates of the latest forward or generate, detached: [B, E] or [B, S, E] float32 (first active adapter)."""
        kept = self.gate_state.last
        return next((kept[name].weights.detach() for name in self.active_adapters if name in kept), None)

    # Activation checkpointing, parallelism ---------------------------------------------------------------------------

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Enable activation checkpointing whose recompute sees the gates of its own forward.

        Args:
            activation_checkpointing_kwargs: As in transformers; `use_reentrant` may only be False.
            every_n_layers: Checkpoint every n-th decoder layer.
            offload: Keep saved activations in host memory.

        Raises:
            RecipeError: For use_reentrant=True or a context_fn of your own.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        check_checkpoint_options(options)
        self.model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=options, every_n_layers=every_n_layers, offload=offload
        )
        adopt_checkpointing(self._checkpointable, self.gate_state)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RecipeError(
            "torch.nn.DataParallel was found around an iLoRA model: its replicas would share one set of gates; "
            "use DistributedDataParallel (llmrec train --launcher multi_gpu) or a single device"
        )

    # Merging, saving -------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        if not self._merge_allowed:
            raise RecipeError(NO_MERGE)
        super()._check_merge_allowed()

    def merge_and_unload(  # type: ignore[override]
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        gate: Tensor | Sequence[float] | str | None = None,
    ) -> nn.Module:
        """Merge the experts under one fixed gate and return the base model.

        Args:
            progressbar: Show progress.
            safe_merge: Check merged weights for NaN.
            adapter_names: Adapters to merge; the active ones when left out.
            gate: "uniform", or E weights that sum to 1 (for example the mean gate of a group of users).

        Raises:
            RecipeError: Without a gate.
        """
        if gate is None:
            raise RecipeError(NO_MERGE)
        names = list(adapter_names or self.active_adapters)
        fixed = {name: fixed_gate(gate, self.peft_config[name].num_experts) for name in names}
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, GatedLinear) and module.gate_adapter in fixed:
                    scale = expand_gates(fixed[module.gate_adapter], module.out_features)
                    module.weight.mul_(scale.to(module.weight).unsqueeze(-1))
        self._merge_allowed = True
        try:
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)
        finally:
            self._merge_allowed = False

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: weighted sums of gated adapters have no router."""
        raise RecipeError("iLoRA adapters cannot be combined into a weighted adapter; expected one adapter at a time")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # peft strips the name only from the last two parts of a key, and a router has deeper keys.
        head, mark, tail = key.partition(f".ilora_router.{adapter_name}.")
        if mark:
            return f"{head}.ilora_router.{tail}"
        return super()._remove_adapter_name_from_key(key, adapter_name)


def check_encoder(config: PeftConfig, fingerprint: str | None) -> None:
    """Refuse an adapter whose router was trained on another encoder.

    Args:
        config: Configuration of the loaded adapter.
        fingerprint: Fingerprint of the encoder at hand.

    Raises:
        CheckpointError: Naming both fingerprints when they differ.
    """
    expected = getattr(config, "encoder_fingerprint", None)
    if expected is not None and expected != fingerprint:
        raise CheckpointError(
            f"the adapter was trained with the encoder {expected}, found the encoder {fingerprint}; "
            "its router would read vectors of another space. Load the encoder saved beside the adapter"
        )


class ILoraTuner(Tuner):
    """iLoRA. Options: those of LoRA without variants, and num_experts, router, router_norm, logit_noise."""

    needs_gates = True
    options = (
        "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora",
        "num_experts", "router", "router_norm", "logit_noise",
    )  # fmt: skip

    @classmethod
    def configure(
        cls, options: Mapping[str, Any], *, task_type: str | None = "CAUSAL_LM", gate_dim: int | None = None
    ) -> PeftConfig:
        """See `Tuner.configure`; `gate_dim` is needed unless router is "none". Defaults are those of the release."""
        cls.check_options(options)
        chosen = {**DEFAULTS, **check_lora_options(options)}
        return ILoraConfig(task_type=task_type, gate_dim=gate_dim, **chosen)  # type: ignore[arg-type]


bind(PEFT_TYPE, ILoraConfig, ILoraModel)
