"""What every tuner file offers: a `Tuner` that maps recipe options to a peft configuration.

A tuner is a peft method. The name of its file is the recipe's `tuner.type` and, in capitals, the `peft_type` stored in
adapter_config.json, which is how `load_tuner` finds the file again.
"""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import safe_open
from torch import nn

from llmrec.errors import CheckpointError, RecipeError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class Tuner(ABC):
    """One way of adapting an LLM; one subclass per file.

    Attributes:
        needs_gates: The adapted model wants `user_repr` or `gates` with every forward and generate.
        options: Recipe options the tuner understands.
    """

    needs_gates: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def configure(
        cls, options: Mapping[str, Any], *, task_type: str | None = "CAUSAL_LM", gate_dim: int | None = None
    ) -> PeftConfig:
        """The peft configuration of a recipe's `tuner` section.

        Args:
            options: The section without its `type`.
            task_type: peft's task type; None for vision-language models.
            gate_dim: Width of the gate provider's vectors; None when there is no provider.

        Returns:
            A configuration for `attach`.

        Raises:
            RecipeError: For an unknown option or values that do not go together.
        """

    @classmethod
    def attach(cls, model: nn.Module, config: PeftConfig) -> PeftModel:
        """Wrap `model` in place; see `attach`."""
        return attach(model, config)

    @classmethod
    def check_options(cls, given: Iterable[str]) -> None:
        """Refuse unknown option names.

        Raises:
            RecipeError: Naming the unknown options and the known ones.
        """
        unknown = sorted(set(given) - set(cls.options))
        if unknown:
            raise RecipeError(f"tuner: unknown option {', '.join(unknown)}; known: {', '.join(cls.options)}")


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap a model with an adapter and make the adapter's own forward arguments known.

    Args:
        model: The base model; it is changed in place and its parameters are frozen.
        config: A configuration made by a tuner (or any peft configuration).

    Returns:
        The PeftModel.
    """
    with _old_name():
        wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    return accept_arguments(wrapped)  # type: ignore[arg-type]


@contextmanager
def _old_name() -> Iterator[None]:
    # peft 0.21 asks transformers 5.23 for `is_activation_checkpointing` by its old name, and every model warns.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def accept_arguments(model: PeftModel) -> PeftModel:
    """Let forward and generate take the tuner's own keywords (`user_repr`, `gates`) and keep them from the base model.

    Needed once after `get_peft_model` or `PeftModel.from_pretrained`; `attach` and `load_tuner` do it.
    """
    names: Iterable[str] = getattr(type(model.base_model), "forward_arguments", frozenset())
    model.special_peft_forward_args = set(model.special_peft_forward_args) | set(names)
    return model


def load_tuner(base: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter onto its base model.

    Args:
        base: The base model the adapter was trained on; changed in place.
        folder: What `save_pretrained` wrote.
        is_trainable: Keep the adapter trainable.

    Returns:
        The PeftModel, ready for forward and generate.

    Raises:
        CheckpointError: When files or weights are missing, or no tuner of that type exists.
    """
    folder = Path(folder)
    peft_type = _read_peft_type(folder)
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        _import_tuner(peft_type, folder)
    try:
        with _old_name():
            model = accept_arguments(PeftModel.from_pretrained(base, folder, is_trainable=is_trainable))
    except RuntimeError as error:  # sizes differ
        raise CheckpointError(
            f"{folder}: the adapter does not fit this base model ({' '.join(str(error).split())[:200]}); expected the "
            "model it was trained on, its token embeddings resized as they were then"
        ) from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as stored:
        found = set(stored.keys())
    missing = sorted(expected - found)
    surplus = sorted(key for key in found - expected if "lora_" in key)
    if missing or surplus:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit the model: missing {missing[:3]} ({len(missing)}), "
            f"not wanted {surplus[:3]} ({len(surplus)}); expected the adapter of this base model and configuration"
        )
    return model


def _read_peft_type(folder: Path) -> str:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: found no {name}; expected an adapter folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not JSON: {error}") from error
    peft_type = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(peft_type, str) or not peft_type:
        raise CheckpointError(f"{folder / CONFIG_FILE}: found peft_type {peft_type!r}, expected a name such as LORA")
    return peft_type


def _import_tuner(peft_type: str, folder: Path) -> None:
    module = f"llmrec.tuners.{peft_type.lower()}"
    if peft_type.isidentifier() and util.find_spec(module) is not None:
        import_module(module)
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: no tuner of type {peft_type!r}; import the package that defines it first, "
            f"known types: {', '.join(sorted(str(getattr(t, 'value', t)) for t in PEFT_TYPE_TO_TUNER_MAPPING))}"
        )


def check_lora_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options all LoRA tuners share.

    Returns:
        The options, unchanged.

    Raises:
        RecipeError: For a rank below 1, a dropout outside [0, 1) or an empty list of target modules.
    """
    rank = options.get("r", 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"tuner.r: found {rank!r}, expected a whole number of 1 or more")
    alpha = options.get("lora_alpha", 1)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        raise RecipeError(f"tuner.lora_alpha: found {alpha!r}, expected a number above 0")
    dropout = options.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise RecipeError(f"tuner.lora_dropout: found {dropout!r}, expected a number in [0, 1)")
    if not options.get("target_modules", "all-linear"):
        raise RecipeError("tuner.target_modules: found an empty list, expected module names or 'all-linear'")
    return dict(options)


@dataclass(frozen=True)
class TrainableReport:
    """Parameter counts of an adapted model.

    Args:
        trainable: Parameters that receive gradients.
        total: All parameters.
        parts: Trainable parameters by part: `experts` (lora_A, lora_B and the like), `router`, `other`.
    """

    trainable: int
    total: int
    parts: dict[str, int]

    @property
    def share(self) -> float:
        """Trainable part of all parameters, between 0 and 1."""
        return self.trainable / self.total if self.total else 0.0


def trainable_report(model: nn.Module) -> TrainableReport:
    """Count what an adapted model trains."""
    parts = {"experts": 0, "router": 0, "other": 0}
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            part = "router" if ".ilora_router." in name else "experts" if ".lora_" in name else "other"
            parts[part] += parameter.numel()
    return TrainableReport(trainable=sum(parts.values()), total=total, parts=parts)
