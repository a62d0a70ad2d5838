"""What a wheel holds: the package, its assets, and nothing else."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("llmrec", "prompts", "recipes", "accelerate_configs")
ASSETS = {"prompts": "*.jinja", "recipes": "*.yaml", "accelerate_configs": "*.yaml"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without network from a copy: a `build` folder of the checkout could smuggle old files in."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building without network needs setuptools (extra `test`)")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "-w", str(out), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("llmrec-*.whl")
    return built


def test_it_holds_every_module_and_asset(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llmrec").rglob("*.py")}
    for folder, pattern in ASSETS.items():
        files = (ROOT / folder).rglob(pattern)
        expected |= {f"llmrec/_assets/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert not expected - names


def test_it_holds_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"llmrec", "llmrec-0.1.0.dist-info"}
    kinds = {Path(name).suffix for name in names if name.startswith("llmrec/")}
    assert kinds <= {".py", ".typed", ".jinja", ".yaml", ".html", ".css", ".js"}


def test_the_license_is_inside(wheel: Path) -> None:
    assert any(name.endswith("LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_installed_assets_are_found(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from llmrec import assets, __file__; print(__file__, assets.find_asset('accelerate_configs', 'zero2'))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, asset = done.stdout.split()
    assert Path(package).is_relative_to(tmp_path) and Path(asset).is_relative_to(tmp_path)
    assert Path(asset).is_file()


def test_the_list_of_packages_is_complete() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "llmrec").rglob("__init__.py")}
    listed = {name.replace(".", "/") for name in settings["packages"] if "_assets" not in name}
    assert listed == folders


def test_versions_agree() -> None:
    import llmrec

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == llmrec.__version__


def test_constraints_are_exact_and_start_with_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    assert all(line.count("==") == 1 and "@" not in line and "+" not in line for line in pins)


def test_constraints_fulfil_the_declared_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    declared = list(project["dependencies"])
    for extra in ("deepspeed", "gguf", "quant", "report", "test", "text", "vision"):
        declared += project["optional-dependencies"][extra]
    for line in declared:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name != "setuptools":  # the build tool is no part of a frozen environment
            assert requirement.specifier.contains(pinned[name]), f"{line} against {pinned[name]}"
