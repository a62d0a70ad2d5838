"""What somebody who distrusts the suite would try first; each row names the tests that try it.

| check | tests |
|---|---|
| 1 kill -9 during save, then rerun | tests/training/test_resume.py::test_killed_at_six_moments tests/training/test_resume.py::test_killed_at_more_moments tests/training/test_stages.py::test_a_killed_run_goes_on_to_the_same_weights |
| 2 corrupt the newest checkpoint | tests/training/test_resume.py::test_a_damaged_checkpoint_falls_back tests/training/test_resume.py::test_all_damaged_starts_again tests/training/test_resume.py::test_damaged_final_weights_are_made_again |
| 3 fill the disk | tests/training/test_disk.py::test_at_a_file_of_a_checkpoint |
| 4 run twice, compare hashes | tests/training/test_stages.py::test_two_runs_of_one_recipe_have_the_same_bytes |
| 5 wrong key in YAML | tests/test_recipe.py::test_mistakes_are_named_with_their_line tests/test_recipe.py::test_overrides_that_cannot_be |
| 6 `1e-4` in YAML | tests/test_recipe.py::test_scientific_notation_is_a_number |
| 7 swap the base model under an adapter | tests/llm/test_storing.py::test_strangers_are_refused_by_name tests/test_run_loading.py::test_another_base_model_is_refused |
| 8 swap the item catalogue under a model | tests/test_run_loading.py::test_a_run_over_a_swapped_data_set_is_refused tests/test_run_loading.py::test_items_of_another_run_are_refused tests/llm/test_storing.py::test_strangers_are_refused_by_name |
| 9 load an adapter without resizing | tests/test_trust.py::test_9_tokens_added_before_training_are_missed_at_loading tests/test_trust.py::test_9_an_adapter_with_embeddings_of_another_size |
| 10 pickle in the folder | tests/test_trust.py::test_10_a_pickle_alone_is_refused tests/test_trust.py::test_10_a_pickle_beside_good_files_is_never_opened tests/test_layering.py::test_nothing_is_pickled tests/training/test_trainer.py::test_nothing_in_the_folder_is_pickled |
| 11 token in the arguments, then push | tests/commands/test_push.py::test_a_planted_token_leaves_no_trace tests/reporting/test_hub.py::test_a_secret_in_a_file_stops_everything |
| 12 remote code model without the flag | tests/test_trust.py::test_12_code_beside_a_model_is_not_run tests/test_trust.py::test_12_nobody_is_asked_whether_to_run_it tests/test_trust.py::test_12_every_automatic_class_is_told_to_trust_nothing |
| 20 no network at all | tests/test_trust.py::test_20_the_smoke_recipe_needs_no_network |
"""  # noqa: E501

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmrec.cli import main
from llmrec.errors import CheckpointError
from llmrec.llm.loading import load_language_model
from llmrec.llm.recommender import LLMRecommender
from llmrec.recommender import Recommender
from llmrec.tuners.base import load_tuner
from llmrec.tuners.lora import LoraTuner
from tests.llm.tiny import Renderer, encoder, llama, tokenizer
from tests.runs import ROOT, train, words

ASKED = (*range(1, 13), 20)


# The table ------------------------------------------------------------------------------------------------------------


def table() -> dict[int, list[str]]:
    rows = re.findall(r"^\| (\d+) [^|]*\| ([^|]*) \|$", __doc__ or "", re.MULTILINE)
    return {int(number): tests.split() for number, tests in rows}


def names_of(path: Path) -> set[str]:
    """Test functions of a file, those of classes as Class::name; the file is read, not run."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + each.name for each in inner if isinstance(each, ast.FunctionDef)}
    return found


def test_every_check_names_tests_that_exist() -> None:
    assert tuple(sorted(table())) == ASKED
    for number, tests in table().items():
        assert tests, f"check {number} names no test"
        for test in tests:
            file, _, name = test.partition("::")
            assert name.rpartition("::")[2].startswith("test_"), test
            assert name in names_of(ROOT / file), f"check {number}: there is no test {test}"


# 9 --------------------------------------------------------------------------------------------------------------------


def test_9_tokens_added_before_training_are_missed_at_loading(tmp_path: Path) -> None:
    more = copy.deepcopy(tokenizer())
    more.add_tokens(["<first>", "<second>"])
    base = llama()
    base.resize_token_embeddings(len(more), mean_resizing=False)
    model = LLMRecommender.build(
        LoraTuner.attach(base, LoraTuner.configure({"r": 2})),
        encoder=encoder(), tokenizer=more, renderer=Renderer(), style="text", max_history=8,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    rows, fewer = len(more), len(tokenizer())
    with pytest.raises(CheckpointError, match=rf"{rows} token embeddings, found {fewer}.*resize_token_embeddings"):
        LLMRecommender.from_pretrained(tmp_path, llama(), encoder(), tokenizer=more, renderer=Renderer())
    resized = llama()
    resized.resize_token_embeddings(rows, mean_resizing=False)
    LLMRecommender.from_pretrained(tmp_path, resized, encoder(), tokenizer=more, renderer=Renderer())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_9_an_adapter_with_embeddings_of_another_size(tmp_path: Path) -> None:
    base = llama()
    base.resize_token_embeddings(len(tokenizer()) + 2, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this base model.*size mismatch"):
        load_tuner(llama(), tmp_path)


# 10 -------------------------------------------------------------------------------------------------------------------

PICKLES = (
    "pytorch_model.bin", "model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "model.pt", "model.pkl", "tokenizer.pkl", "projector.pt",
)  # fmt: skip


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def plant(folder: Path, mark: Path, names: tuple[str, ...] = PICKLES) -> None:
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))


class Watch:
    """Files that Python opens and names that a pickle asks for, while it is on; a hook cannot be taken off again."""

    def __init__(self) -> None:
        self.on, self.opened, self.asked = False, list[str](), list[str]()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.opened.append(Path(os.fsdecode(arguments[0])).name)
        elif self.on and event == "pickle.find_class":
            self.asked.append(f"{arguments[0]}.{arguments[1]}")

    def __enter__(self) -> Watch:
        self.on, self.opened, self.asked = True, [], []
        return self

    def __exit__(self, *exception: object) -> None:
        self.on = False


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, so that files can be planted beside the base model."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LLMREC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trust") / "run"
    train("ilora", out)
    return out


@pytest.mark.parametrize(
    ("folder", "weights"),
    [
        ("encoder", "model.safetensors"),
        ("model", "projector.safetensors"),
        ("model/adapter", "adapter_model.safetensors"),
    ],
)
def test_10_a_pickle_alone_is_refused(folder: str, weights: str, run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / folder / weights).unlink()
    plant(copied / folder, tmp_path / "mark")
    with pytest.raises(CheckpointError, match=re.escape(weights)):
        Recommender.from_pretrained(copied)
    assert not (tmp_path / "mark").exists()


def test_10_a_base_model_of_pickles_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(llama().state_dict(), tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="(?s)could not be loaded.*safetensors weights"):
        load_language_model(tmp_path / "base")
    plant(tmp_path / "base", tmp_path / "mark")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_language_model(tmp_path / "base")
    assert not (tmp_path / "mark").exists()


def test_10_a_pickle_beside_good_files_is_never_opened(run: Path, cache: Path, tmp_path: Path, watch: Watch) -> None:
    copied, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(run, copied)
    folders = [copied, *(path for path in copied.rglob("*") if path.is_dir())]
    base = cache / "tiny-llama"
    assert {"encoder", "model", "adapter", "final"} <= {folder.name for folder in folders} and base.is_dir()
    for folder in (*folders, base):
        plant(folder, mark)
    with watch:
        recommender = Recommender.from_pretrained(copied)
        assert recommender.recommend([recommender.history_of(recommender.dataset.user_keys[1])], 3)[0]
        train("ilora", copied)
    assert not set(PICKLES) & set(watch.opened) and not mark.exists()
    assert "adapter_config.json" in watch.opened and watch.asked == []
    with watch, (copied / PICKLES[0]).open("rb") as file:
        pickle.load(file)
    assert PICKLES[0] in watch.opened and watch.asked and mark.is_dir(), "the trap itself must work"


# 12 -------------------------------------------------------------------------------------------------------------------


def model_with_code(folder: Path, kind: str) -> Path:
    """A model whose configuration names a Python file beside it, which leaves a mark when it is run."""
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "canary.py").write_text(f"import os\nos.mkdir({str(folder / 'mark')!r})\n", encoding="utf-8")
    for file, names in (
        ("config.json", {"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["canary.Slow", "canary.Fast"]}),
        ("generation_config.json", {"AutoModelForCausalLM": "canary.Model"}),
    ):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        content |= {"auto_map": names} | ({"model_type": kind} if file == "config.json" else {})
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_12_code_beside_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail(f"a question was asked: {text}"))
    known, unknown = model_with_code(tmp_path / "known", "llama"), model_with_code(tmp_path / "unknown", "nobody-knows")
    model, _ = load_language_model(known)
    assert type(model).__module__.startswith("transformers.models.llama")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_language_model(unknown)
    assert not (known / "mark").exists() and not (unknown / "mark").exists()


def test_12_nobody_is_asked_whether_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person, or the next line of a script's standard input, might say yes."""
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    folder = model_with_code(tmp_path / "unknown", "nobody-knows")
    recipe = ROOT / "recipes" / "smoke" / "lora.yaml"
    assert main(["check", str(recipe), "--set", f"llm.model={folder}"]) == 2
    assert "custom code" not in capsys.readouterr().out
    assert not (folder / "mark").exists()


def test_12_every_automatic_class_is_told_to_trust_nothing() -> None:
    """Without the argument transformers asks the terminal; `True` stands nowhere (tests/test_layering.py)."""
    seen = 0
    for path in sorted((ROOT / "llmrec").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func)):
                told = {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert told.get("trust_remote_code") == "False", f"{path.relative_to(ROOT)}:{node.lineno}"
                seen += 1
    assert seen >= 4


# 20 -------------------------------------------------------------------------------------------------------------------

NO_SOCKETS = """
import json, sys

asked = []

def refuse(event, arguments):
    if event.startswith("socket.") and event not in ("socket.gethostname", "socket.__new__"):
        asked.append([event, repr(arguments[1:])])
        raise OSError("there is no network")

sys.addaudithook(refuse)
from llmrec.cli import main

status = main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(asked))
sys.exit(status)
"""


@pytest.mark.slow
def test_20_the_smoke_recipe_needs_no_network(tmp_path: Path) -> None:
    """Nothing is cached, the Hub is not told to be offline, every socket is refused: trained, measured and asked."""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment |= {"LLMREC_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
    out = tmp_path / "run"
    for command in (words("ilora", out), ["recommend", str(out), "--user", "u1", "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", NO_SOCKETS, str(tmp_path / "asked.json"), *command],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((tmp_path / "asked.json").read_text()) == [], "something looked for the network"
    assert (out / "metrics.json").is_file()
