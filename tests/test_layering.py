"""Directions of imports, and calls and names the package must not contain. There is no list of exceptions.

Three moments of an import are told apart: when the module is imported ("load"), inside a function ("run"), and only
for the type checker ("types").
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmrec"
FILES = sorted(PACKAGE.rglob("*.py"))
SUBPACKAGES = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}

# What each sub-package may import from llmrec besides root modules: "x" a whole package, "x.y" one module,
# "*.base" the base module of every package. "." stands for the package itself.
ALLOWED = {
    "blocks": {"."},
    "data": {"."},
    "encoders": {"encoders.base", "encoders.graph_base", "blocks", "data.schema", "data.graph"},
    "item_tokenizers": {"item_tokenizers.base", "blocks", "data.schema"},
    "series": {"series.base", "blocks", "data.schema"},
    "heads": {"heads.base", "blocks", "data.schema", "encoders.base", "item_tokenizers.base"},
    "tuners": {".", "blocks"},
    "llm": {".", "tuners", "data", "blocks", "item_tokenizers.base"},
    "summarizers": {".", "llm", "data"},
    "strategies": {".", "blocks", "encoders.base", "encoders.graph_base", "heads.base", "data.schema"},
    "evaluation": {".", "data", "blocks"},
    "training": {".", "strategies", "evaluation", "data", "llm", "*.base"},
    "transforms": {".", "data", "training", "strategies", "encoders.base", "heads.base", "series.base", "blocks"},
    "analysis": {".", "evaluation", "data"},
    "reporting": {".", "evaluation", "data"},
    "serving": {".", "data", "reporting"},
    "commands": SUBPACKAGES,
}
# Packages that may not use root modules either.
WITHOUT_ROOT = {"blocks"}
# Where a library may be imported, at any moment.
ONLY_IN = {
    "peft": {"tuners", "llm"},
    "trl": {"training"},
    "PIL": {"data.item_images", "llm.vision"},
    "deepspeed": {"training.zero"},
    "bitsandbytes": set(),
}
TORCH_AT_RUN_TIME_IN_DATA = {"data.sequences", "data.instructions"}
BANNED_NAMES = {"utils", "util", "common", "helpers", "core", "misc"}
BANNED_MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


@dataclass(frozen=True)
class Import:
    """One imported module: `target` is dotted, `moment` is "load", "run" or "types"."""

    file: Path
    line: int
    target: str
    moment: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target} ({self.moment})"


def module_of(path: Path) -> str:
    """Dotted name below llmrec: "data.sources.table", "cli"; a package is named by itself."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: Path) -> str:
    """The sub-package of a file, "" for root modules."""
    first = path.relative_to(PACKAGE).parts[0]
    return first if first in SUBPACKAGES else ""


def imports_of(path: Path) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, moment: str) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(path, node.lineno, alias.name, moment) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.extend(Import(path, node.lineno, target, moment) for target in _targets(path, node))
        elif isinstance(node, ast.Call):
            found.extend(Import(path, node.lineno, target, moment) for target in _import_call(node))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and moment == "load":
            for child in node.body:
                visit(child, "types")
            for child in node.orelse:
                visit(child, moment)
            return
        inner = "run" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else moment
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(path.read_text(encoding="utf-8")), "load")
    return found


def _targets(path: Path, node: ast.ImportFrom) -> list[str]:
    """`from a import b` imports a.b when that is a module of ours, else a."""
    base = node.module or ""
    if node.level:
        here = path.relative_to(ROOT).with_suffix("").parts
        anchor = here[: len(here) - node.level]
        base = ".".join([*anchor, *([base] if base else [])])
    if not base.startswith("llmrec"):
        return [base]
    places = [ROOT.joinpath(*f"{base}.{alias.name}".split(".")) for alias in node.names]
    return [
        f"{base}.{alias.name}" if place.with_suffix(".py").is_file() or place.is_dir() else base
        for alias, place in zip(node.names, places, strict=True)
    ]


def _import_call(node: ast.Call) -> Iterator[str]:
    """`import_module("x")` with a literal name."""
    name = ast.unparse(node.func).rsplit(".", 1)[-1]
    if name in ("import_module", "__import__") and node.args:
        if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            yield node.args[0].value


ALL_IMPORTS = [entry for path in FILES for entry in imports_of(path)]


def internal() -> Iterator[tuple[Import, str]]:
    """Imports of llmrec itself, with the target below llmrec ("" is the package's own __init__)."""
    for entry in ALL_IMPORTS:
        if entry.target == "llmrec" or entry.target.startswith("llmrec."):
            yield entry, entry.target.removeprefix("llmrec").removeprefix(".")


def external(library: str) -> Iterator[Import]:
    for entry in ALL_IMPORTS:
        if entry.target == library or entry.target.startswith(f"{library}."):
            yield entry


def allows(rule: str, package: str, target: str) -> bool:
    if rule == "*.base":
        return target.count(".") == 1 and target.endswith(".base")
    wanted = package if rule == "." else rule
    return target == wanted or target.startswith(f"{wanted}.")


def test_every_sub_package_has_a_rule() -> None:
    assert set(ALLOWED) == SUBPACKAGES


def test_sub_packages_import_downwards_only() -> None:
    wrong = []
    for entry, target in internal():
        package = package_of(entry.file)
        if not package or target == module_of(entry.file):
            continue
        if target.split(".")[0] not in SUBPACKAGES:
            if package in WITHOUT_ROOT:
                wrong.append(str(entry))
        elif not any(allows(rule, package, target) for rule in ALLOWED[package]):
            wrong.append(f"{entry}; {package} may import: {', '.join(sorted(ALLOWED[package]))}")
    assert not wrong, "\n".join(wrong)


def test_root_modules_import_no_sub_package_when_loaded() -> None:
    wrong = [
        str(entry)
        for entry, target in internal()
        if not package_of(entry.file) and entry.moment == "load" and target.split(".")[0] in SUBPACKAGES
    ]
    assert not wrong, "\n".join(wrong)


def test_commands_import_heavy_parts_inside_functions_only() -> None:
    wrong = [
        str(entry)
        for entry, target in internal()
        if package_of(entry.file) == "commands"
        and entry.moment == "load"
        and target.split(".")[0] in SUBPACKAGES - {"commands"}
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_stays_where_it_belongs() -> None:
    wrong = []
    for entry in external("torch"):
        package, module = package_of(entry.file), module_of(entry.file)
        banned_when = {
            "": {"load", "run"},
            "reporting": {"load", "run"},
            "commands": {"load"},
            "data": {"load"} if module in TORCH_AT_RUN_TIME_IN_DATA else {"load", "run"},
        }
        if entry.moment in banned_when.get(package, set()):
            wrong.append(str(entry))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_stays_where_it_belongs(library: str) -> None:
    wrong = [
        str(entry)
        for entry in external(library)
        if package_of(entry.file) not in ONLY_IN[library] and module_of(entry.file) not in ONLY_IN[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_blocks_use_torch_alone() -> None:
    known = {*sys.stdlib_module_names, "torch", "llmrec"}
    wrong = [
        str(entry)
        for entry in ALL_IMPORTS
        if package_of(entry.file) == "blocks" and entry.target.split(".")[0] not in known
    ]
    assert not wrong, "\n".join(wrong)


def test_blocks_name_at_least_two_users() -> None:
    """A block's docstring says who uses it: "Used by: sasrec, hstu." or "Planned users: ..."."""
    wrong = []
    for path in sorted((PACKAGE / "blocks").glob("*.py")):
        if path.name == "__init__.py":
            continue
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        named = re.search(r"(?is)\b(?:used by|users?\b[^\n:]*:)\s*:?\s*(.+?)(?:\n\s*\n|$)", text)
        users = re.split(r",|;|\band\b|\bor\b", named.group(1)) if named else []
        if len([user for user in users if user.strip()]) < 2:
            wrong.append(path.name)
    assert not wrong, f"docstrings that name fewer than two users after 'Used by' or 'Users:': {wrong}"


def test_names_have_a_subject() -> None:
    wrong = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.stem in BANNED_NAMES]
    assert not wrong


def test_nothing_is_pickled() -> None:
    wrong = [str(entry) for entry in ALL_IMPORTS if entry.target.split(".")[0] in BANNED_MODULES]
    assert not wrong, "\n".join(wrong)


def test_no_dangerous_call() -> None:
    wrong = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (reason := dangerous(node, tree)):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {reason}")
    assert not wrong, "\n".join(wrong)


def dangerous(node: ast.Call, tree: ast.Module) -> str:
    """Why a call must not be in the package, or ""."""
    name = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg}
    if name in ("eval", "exec", "torch.load", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"):
        return f"calls {name}"
    if name == "yaml.load" and keywords.get("Loader") not in _safe_loaders(tree):
        return "calls yaml.load without a loader derived from yaml.SafeLoader"
    for flag in ("shell", "trust_remote_code", "allow_pickle"):
        if keywords.get(flag, "False") != "False":
            return f"passes {flag}={keywords[flag]}"
    if keywords.get("weights_only") == "False":
        return "passes weights_only=False"
    return ""


def _safe_loaders(tree: ast.Module) -> set[str]:
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & safe:
            safe.add(node.name)
    return safe


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_a_planted_call(source: str) -> None:
    tree = ast.parse(source)
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    assert dangerous(call, tree)


def test_the_search_sees_all_moments(tmp_path: Path) -> None:
    planted = PACKAGE / "encoders" / "planted.py"  # a name only: the text comes from the temporary folder
    source = (
        "from typing import TYPE_CHECKING\nimport torch\nfrom llmrec.encoders import base\n"
        "if TYPE_CHECKING:\n    from llmrec.llm import loading\n"
        "def f():\n    import importlib\n    from llmrec.training.trainer import RecTrainer\n"
        "    importlib.import_module('peft.tuners')\n"
    )
    copy = tmp_path / "planted.py"
    copy.write_text(source)
    moments = {entry.target: entry.moment for entry in imports_of(copy)}
    assert moments["torch"] == "load"
    assert moments["llmrec.encoders.base"] == "load"
    assert moments["peft.tuners"] == "run"
    assert moments["llmrec.training.trainer"] == "run"
    assert [moment for target, moment in moments.items() if target.startswith("llmrec.llm")] == ["types"]
    assert package_of(planted) == "encoders"
    assert not any(allows(rule, "encoders", "training.trainer") for rule in ALLOWED["encoders"])
    assert not any(allows(rule, "encoders", "encoders.hstu") for rule in ALLOWED["encoders"])
