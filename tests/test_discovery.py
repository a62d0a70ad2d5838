"""Names to classes: files of the package, dotted paths, and files anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmrec import discovery
from llmrec.discovery import build, check_options, names, nearest, options, papers, resolve
from llmrec.encoders.sasrec import SASRecEncoder
from llmrec.errors import RecipeError
from llmrec.strategies.next_item import NextItem
from llmrec.tuners.ilora import ILoraTuner

TRANSFORM = """\
from __future__ import annotations
from dataclasses import dataclass
from llmrec.transforms.base import DataTransform

@dataclass
class Keep(DataTransform):
    \"\"\"Changes nothing.\"\"\"
    share: float = 0.5
    names: tuple[str, ...] = ()

    def __call__(self, dataset, context):
        raise NotImplementedError

class Plain(DataTransform):
    def __init__(self, size, shape="round"):
        self.size = size
    def __call__(self, dataset, context):
        raise NotImplementedError
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "keep.py"
    path.write_text(TRANSFORM, encoding="utf-8")
    return path


def test_files_are_the_register() -> None:
    assert set(names("encoder")) >= {"sasrec"} and set(names("tuner")) >= {"lora", "ilora"}
    assert not {"base", "graph_base"} & set(names("encoder")) and "binding" not in names("tuner")
    assert names("encoder")["sasrec"].startswith("SASRec")
    for kind in discovery.KINDS:
        assert all(summary for summary in names(kind).values()), kind


@pytest.mark.parametrize("kind", list(discovery.KINDS))
def test_every_listed_part_resolves_and_tells_its_options(kind: str) -> None:
    for name in names(kind):
        assert resolve(kind, name).__module__.endswith(f".{name}")
        assert all(option.name.isidentifier() for option in options(kind, name))


def test_listing_imports_nothing() -> None:
    code = (
        "import sys; from llmrec import discovery as d; [d.names(k) for k in d.KINDS]; d.papers(); "
        "sys.exit('torch' in sys.modules or 'llmrec.encoders.sasrec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_resolve_by_name_and_dotted_path() -> None:
    assert resolve("encoder", "sasrec") is SASRecEncoder and resolve("tuner", "ilora") is ILoraTuner
    assert resolve("encoder", "llmrec.encoders.sasrec.SASRecEncoder") is SASRecEncoder
    with pytest.raises(RecipeError, match="not a subclass of llmrec.encoders.base.SequenceEncoder"):
        resolve("encoder", "llmrec.tuners.ilora.ILoraTuner")
    with pytest.raises(RecipeError, match="Missing is not a subclass"):
        resolve("encoder", "llmrec.encoders.sasrec.Missing")


@pytest.mark.parametrize(
    ("kind", "type_name", "expected"),
    [
        ("encoder", "sasrek", "did you mean 'sasrec'\\?"),
        ("encoder", "base", "no encoder 'base'"),
        ("encoder", "", "no encoder ''"),
        ("encoder", "nosuchpackage.module.Class", "cannot import 'nosuchpackage.module'"),
        ("encoder", ".Class", "no encoder '.Class'"),
        ("encoder", "..sasrec.X", "no encoder"),
        ("encoder", "../sasrec", "no encoder"),
        ("encoder", "a.", "no encoder"),
        ("encoder", "nothing/here.py:Class", "no file .*nothing/here.py"),
        ("encoder", ":Class", "no file"),
        ("encoder", "\0:Class", "no encoder"),
        ("encodr", "sasrec", "no kind 'encodr'; did you mean 'encoder'"),
    ],
)
def test_types_that_do_not_exist(kind: str, type_name: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        resolve(kind, type_name)


def test_a_file_anywhere(outside: Path) -> None:
    found = resolve("transform", f"{outside}:Keep")
    assert found.__name__ == "Keep" and resolve("transform", f"{outside}:Keep") is found
    assert [option.name for option in options("transform", f"{outside}:Keep")] == ["share", "names"]
    with pytest.raises(RecipeError, match="Lose is not a subclass"):
        resolve("transform", f"{outside}:Lose")
    twin = outside.parent / "other" / "keep.py"
    twin.parent.mkdir()
    twin.write_text(TRANSFORM, encoding="utf-8")
    assert resolve("transform", f"{twin}:Keep") is not found


def test_a_relative_file(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outside.parent)
    assert resolve("transform", "keep.py:Keep") is resolve("transform", f"{outside}:Keep")


@pytest.mark.parametrize("text", ["def broken(:\n", "import no_such_library_at_all\n", "raise ValueError('no')\n"])
def test_a_file_that_fails_fails_every_time(tmp_path: Path, text: str) -> None:
    path = tmp_path / "faulty.py"
    path.write_text(text, encoding="utf-8")
    for _ in range(2):
        with pytest.raises(RecipeError, match="cannot be imported"):
            resolve("transform", f"{path}:Keep")
    path.write_text(TRANSFORM, encoding="utf-8")
    assert resolve("transform", f"{path}:Keep").__name__ == "Keep"


def test_options_and_their_check() -> None:
    known = {option.name: option for option in options("encoder", "sasrec")}
    assert known["num_heads"].default == 2 and "num_items" not in known and "torch_dtype" not in known
    check_options("encoder", "sasrec", {"hidden_size": 8})
    with pytest.raises(RecipeError, match=r"^x: encoder 'sasrec' has no option 'num_head'; did you mean 'num_heads'\?"):
        check_options("encoder", "sasrec", {"num_head": 8}, where="x: ")
    with pytest.raises(RecipeError, match="no option 'num_items'"):
        check_options("encoder", "sasrec", {"num_items": 8})
    assert {"r", "lora_alpha"} <= {option.name for option in options("tuner", "ilora")}


def test_build(outside: Path) -> None:
    assert isinstance(build("strategy", "next_item", {}), NextItem)
    kept = build("transform", f"{outside}:Keep", {"share": 1, "names": ["a"]})
    assert kept.share == 1.0 and kept.names == ("a",)
    with pytest.raises(RecipeError, match="option 'share'.*found 'half'"):
        build("transform", f"{outside}:Keep", {"share": "half"})
    with pytest.raises(RecipeError, match="no option 'shape'"):
        build("transform", f"{outside}:Keep", {"shape": 1})
    assert build("transform", f"{outside}:Plain", {"size": 3}).size == 3
    with pytest.raises(RecipeError, match="size"):
        build("transform", f"{outside}:Plain", {})


def test_papers_are_found_without_imports() -> None:
    file, paper = papers()["SASRec"][0]
    assert file == "llmrec/encoders/sasrec.py" and paper.venue == "ICDM 2018" and "1808.09781" in paper.citation()


def test_nearest() -> None:
    assert nearest("sasrek", ["ease", "sasrec"]) == "; did you mean 'sasrec'?"
    assert nearest("zzzz", ["ease", "sasrec"]) == "" and nearest("x", []) == ""
