"""Kind + name -> class. The file name is the registration: `encoder: {type: sasrec}` is llmrec/encoders/sasrec.py.

A `type` is a file name of the kind's folder, a dotted path (`mypackage.mixrec.MixRecEncoder`), or a file with a class
(`parts/mixrec.py:MixRecEncoder`). Listing reads docstrings with `ast`; only `resolve` imports.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from llmrec.errors import RecipeError
from llmrec.paper import Paper

KINDS: dict[str, str] = {
    "encoder": "encoders",
    "tuner": "tuners",
    "head": "heads",
    "item_tokenizer": "item_tokenizers",
    "strategy": "strategies",
    "transform": "transforms",
    "summarizer": "summarizers",
    "series": "series",
    "source": "data/sources",
}
"""Kind -> folder below the package."""

_BASES = {
    "encoder": "SequenceEncoder",
    "tuner": "Tuner",
    "head": "GenerativeHead",
    "item_tokenizer": "ItemTokenizer",
    "strategy": "TrainingStrategy",
    "transform": "DataTransform",
    "summarizer": "Summarizer",
    "series": "SeriesModel",
    "source": "Source",
}
_ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Option:
    """One option of a part: its name, annotation as text, default (None where required) and help line."""

    name: str
    annotation: str
    default: Any
    help: str = ""


def _folder_module(kind: str) -> str:
    if kind not in KINDS:
        raise RecipeError(f"no kind {kind!r}{nearest(kind, list(KINDS))}; kinds: {', '.join(KINDS)}")
    return "llmrec." + KINDS[kind].replace("/", ".")


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def names(kind: str) -> dict[str, str]:
    """Name -> first docstring line of every part of a kind, without importing any of them."""
    _folder_module(kind)
    found = {}
    for path in sorted((_ROOT / KINDS[kind]).glob("*.py")):
        tree = _parsed(path)
        if path.stem != "__init__" and not path.stem.endswith("base") and _defines(tree, kind):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def _defines(tree: ast.Module, kind: str) -> bool:
    """Whether a class of the module names the kind's base, or a config-like parent that leads to it, as its base."""
    for node in tree.body:
        bases = node.bases if isinstance(node, ast.ClassDef) else []
        if _BASES[kind] in [ast.unparse(base).rpartition(".")[2] for base in bases]:
            return True
    return False


def resolve(kind: str, type_name: str) -> type:
    """The class behind a `type`.

    Raises:
        RecipeError: No such part, or it is not of this kind.
    """
    module, class_name = _import_type(kind, type_name)
    base = getattr(importlib.import_module(f"{_folder_module(kind)}.base"), _BASES[kind])
    if class_name is not None:
        found = getattr(module, class_name, None)
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise RecipeError(
                f"{kind} type {type_name!r}: {class_name} is not a subclass of {base.__module__}.{base.__name__}"
            )
        return found
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise RecipeError(
            f"{kind} type {type_name!r}: {module.__name__} defines {len(classes)} subclasses of {base.__name__}, "
            "expected one"
        )
    return classes[0]


def _import_type(kind: str, type_name: str) -> tuple[ModuleType, str | None]:
    folder = _folder_module(kind)
    path, colon, class_name = type_name.rpartition(":")
    if colon and path.isprintable():
        return _import_file(Path(path)), class_name
    if "." in type_name and all(part.isidentifier() for part in type_name.split(".")):
        module_name, _, class_name = type_name.rpartition(".")
        try:
            return importlib.import_module(module_name), class_name
        except ImportError as error:
            raise RecipeError(
                f"{kind} type {type_name!r}: cannot import {module_name!r} ({error}); is its folder on PYTHONPATH?"
            ) from error
    known = names(kind)
    if type_name not in known:
        raise RecipeError(
            f"no {kind} {type_name!r}{nearest(type_name, list(known))}; "
            f"known: {', '.join(known) or 'none yet'}; or give a dotted path or path/to/file.py:Class"
        )
    return importlib.import_module(f"{folder}.{type_name}"), None


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise RecipeError(f"no file {path}; a type path/to/file.py:Class names an existing Python file")
    # The name carries a hash of the path, so that two files of the same name do not shadow each other.
    name = f"llmrec_outside_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]  # else a second attempt would find the half that ran
        raise RecipeError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def options(kind: str, type_name: str) -> list[Option]:
    """What a recipe may say about a part."""
    found = resolve(kind, type_name)
    if kind in {"encoder", "head", "series"}:
        return _config_options(found.config_class)  # type: ignore[attr-defined]
    if kind == "tuner":
        defaults = getattr(sys.modules[found.__module__], "DEFAULTS", {})
        return [Option(name, "", defaults.get(name)) for name in found.options]  # type: ignore[attr-defined]
    if is_dataclass(found):
        return [Option(f.name, _text(f.type), _default(f)) for f in fields(found) if f.init]
    parameters = list(inspect.signature(found).parameters.values()) if "__init__" in _members(found) else []
    return [Option(p.name, _text(p.annotation), None if p.default is p.empty else p.default) for p in parameters]


def _members(found: type) -> set[str]:
    """Names a class or its parents define, those of `object` left out."""
    return {name for parent in found.__mro__[:-1] for name in vars(parent)}


def _config_options(config_class: Any) -> list[Option]:
    from transformers import PreTrainedConfig

    # num_items, num_users and fingerprints come from the data set, never from a recipe.
    hidden = {f.name for f in fields(PreTrainedConfig)} | {
        "num_items", "num_users", "dataset_fingerprint", "item_index_fingerprint",
    }  # fmt: skip
    return [Option(f.name, _text(f.type), _default(f)) for f in fields(config_class) if f.name not in hidden]


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _default(item: Any) -> Any:
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else None


def check_options(kind: str, type_name: str, given: dict[str, Any], *, where: str = "") -> None:
    """Refuse options a part does not know, naming the nearest.

    Raises:
        RecipeError: Unknown option; the message starts with `where`.
    """
    known = [option.name for option in options(kind, type_name)]
    for name in given:
        if name not in known:
            raise RecipeError(
                f"{where}{kind} {type_name!r} has no option {name!r}{nearest(name, known)}; options: {', '.join(known)}"
            )


def build(kind: str, type_name: str, given: dict[str, Any], *, where: str = "") -> Any:
    """An instance of a dataclass part (strategy, transform, summarizer, item tokenizer, source) with checked options.

    Raises:
        RecipeError: Unknown option or wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    check_options(kind, type_name, given, where=where)
    found = resolve(kind, type_name)
    if not is_dataclass(found):
        try:
            inspect.signature(found).bind(**given)
        except TypeError as error:
            raise RecipeError(f"{where}{kind} {type_name!r}: {error}") from error
        return found(**given)
    try:
        return TypeAdapter(found).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise RecipeError(
            f"{where}{kind} {type_name!r}, option {name!r}: {first['msg']}; found {first['input']!r}"
        ) from error


@cache
def papers() -> dict[str, list[tuple[str, Paper]]]:
    """System -> the files that carry its `PAPER`, without importing them."""
    found: dict[str, list[tuple[str, Paper]]] = {}
    for path in sorted(_ROOT.rglob("*.py")):
        for node in _parsed(path).body:
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
                continue
            if ast.unparse(node.targets[0]) == "PAPER":
                record = Paper(**{str(word.arg): ast.literal_eval(word.value) for word in node.value.keywords})
                system = record.system or path.stem
                found.setdefault(system, []).append((path.relative_to(_ROOT.parent).as_posix(), record))
    return found


def nearest(name: str, known: list[str]) -> str:
    """ "; did you mean 'x'?" or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
