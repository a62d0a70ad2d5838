"""Entry of our methods into peft, by its three mapping dictionaries.

The public registration function of peft refuses every name outside a closed enumeration. The dictionaries it fills
accept a plain string, and everything that follows (wrapping, saving, loading, beam generation) looks methods up there.
A test pins the supported range, so a change of peft is noticed here first, with a message that names the range.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from llmrec.errors import LlmrecError

PEFT_RANGE = ">=0.21,<0.22"
_CONFIGS, _TUNERS, _PREFIXES = (
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
)


def bind(name: str, config_class: type, tuner_class: type) -> None:
    """Make a method known to peft under `name`; calling it again with the same classes changes nothing.

    Args:
        name: The `peft_type` written into adapter_config.json ("ILORA").
        config_class: Subclass of `peft.PeftConfig`.
        tuner_class: Subclass of peft's `BaseTuner`; its `prefix` is what peft searches parameter names for.

    Raises:
        LlmrecError: When peft no longer has the dictionaries, or another class holds the name.
    """
    entries: dict[str, Any] = {_CONFIGS: config_class, _TUNERS: tuner_class, _PREFIXES: _prefix_of(tuner_class)}
    mappings = {attribute: _mapping(attribute) for attribute in entries}
    for attribute, value in entries.items():
        held = mappings[attribute].get(name, value)
        if held is not value and _label(held) != _label(value):
            raise LlmrecError(f"peft already knows a method {name!r}: found {_label(held)}, expected {_label(value)}")
    for attribute, value in entries.items():
        mappings[attribute][name] = value


def _mapping(attribute: str) -> dict[Any, Any]:
    found = getattr(import_module("peft.mapping"), attribute, None)
    if not isinstance(found, dict):
        raise LlmrecError(
            f"peft {version('peft')} has no dictionary peft.mapping.{attribute}, through which llmrec adds its "
            f"methods; supported: peft{PEFT_RANGE}. Install it with: pip install 'peft{PEFT_RANGE}'"
        )
    return found


def _prefix_of(tuner_class: type) -> str:
    prefix = getattr(tuner_class, "prefix", None)
    if not isinstance(prefix, str):
        raise LlmrecError(
            f"{tuner_class.__name__} has no parameter prefix; supported: peft{PEFT_RANGE}, found {version('peft')}"
        )
    return prefix


def _label(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else repr(value)
