"""Recipes from end to end: outside encoders, prompts in words, reruns, sameness of two runs, kills."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrec.errors import DataError, RecipeError
from llmrec.recommender import Recommender
from llmrec.training.stages import evaluate_run, open_run, run_recipe
from tests.runs import ROOT, prompted_recipe, small_recipe, train, weights, words

MIXREC = '''
import torch
from torch import nn

from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, register


class MixRecConfig(SequenceEncoderConfig):
    model_type = "MODULE"

    hidden_size: int = 16


class MixRecEncoder(SequenceEncoder):
    """A linear map of the running mean of item vectors."""

    config_class = MixRecConfig

    def __init__(self, config):
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, item_ids, lengths, *, item_embeds=None, **features):
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        places = torch.arange(1, items.shape[1] + 1, device=items.device).view(1, -1, 1)
        hidden = self.mix(items.cumsum(1) / places)
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))


register(MixRecConfig, MixRecEncoder)
'''
ASK = """
import json, sys, llmrec
recommender = llmrec.Recommender.from_pretrained(sys.argv[1])
print(json.dumps([[i.item, i.score] for i in recommender.recommend([json.loads(sys.argv[2])], 5)[0]]))
"""


@pytest.fixture(scope="module")
def ilora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("ilora") / "run"
    return out, train("ilora", out)


@pytest.mark.parametrize("how", ["file", "dotted"])
def test_an_encoder_from_outside_trains_gates_and_loads_again(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"mixrec_{how}"
    path = tmp_path / "parts" / f"{module}.py"
    path.parent.mkdir()
    path.write_text(MIXREC.replace("MODULE", module), encoding="utf-8")
    monkeypatch.syspath_prepend(str(path.parent))
    name = f"{path}:MixRecEncoder" if how == "file" else f"{module}.MixRecEncoder"
    out = tmp_path / "run"
    record = train("ilora", out, f"encoder={{type: '{name}', hidden_size: 16}}")
    assert set(record["models"]) == {"popularity", "mixrecencoder", "ilora"}
    gates = list((out / "evaluations").rglob("gates.parquet"))
    assert gates, "the outside encoder gave no expert weights"
    recommender = Recommender.from_pretrained(out)
    history = recommender.history_of(recommender.dataset.user_keys[1])
    here = [[item.item, item.score] for item in recommender.recommend([history], 5)[0]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(path.parent)])}
    fresh = subprocess.run(
        [sys.executable, "-c", ASK, str(out), json.dumps(history)], env=env, capture_output=True, text=True, timeout=240
    )
    assert fresh.returncode == 0, fresh.stderr
    there = json.loads(fresh.stdout.splitlines()[-1])
    assert [item for item, _ in there] == [item for item, _ in here]
    assert [score for _, score in there] == pytest.approx([score for _, score in here], abs=1e-5)


@pytest.mark.parametrize(
    ("style", "mode", "encoder", "more"),
    [
        ("hybrid", "score", True, {}),
        ("hybrid", "generate", True, {"slots": ["history", "candidates", "user"], "curriculum": True}),
        ("text", "generate", True, {}),
        ("text", "score", False, {}),
    ],
)
def test_prompts_in_words_train_evaluate_and_load_again(
    style: str, mode: str, encoder: bool, more: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = prompted_recipe(style, mode=mode, encoder=encoder, **more)
    record = run_recipe(recipe, out, say=lambda line: None)
    own = "ilora" if encoder else "lora"
    assert record["users"] == 8 and own in record["models"]
    assert record["protocol_fields"]["mode"] == mode
    assert 0.0 <= record["models"][own]["hr@1"]["mean"] <= 1.0
    opened = open_run(out)
    again = evaluate_run(opened, opened.recipe.evaluate, primary=False)
    assert again["models"] == record["models"] and again["fingerprint"] == record["fingerprint"]
    recommender = Recommender.from_pretrained(out)
    with pytest.raises(DataError, match="list 20 candidates"):
        recommender.recommend([recommender.history_of(recommender.dataset.user_keys[1])], 3)


def test_generated_answers_do_not_stand_beside_scores(tmp_path: Path) -> None:
    """Counting baselines write no text: their scores are kept under a protocol of their own."""
    out = tmp_path / "run"
    record = run_recipe(prompted_recipe("hybrid", mode="generate"), out, say=lambda line: None)
    assert set(record["models"]) == {"ilora"}
    stored = {path.parent.name: json.loads(path.read_text()) for path in out.glob("evaluations/*/metrics.json")}
    others = [slug for slug in stored if slug != record["evaluation"]]
    assert [set(stored[slug]["models"]) for slug in others] == [{"popularity", "sasrec"}]


def test_open_questions_recommend_items_the_user_has_not_seen(tmp_path: Path) -> None:
    recipe = prompted_recipe("text", encoder=False, candidates=None)
    run_recipe(recipe, tmp_path / "run", say=lambda line: None)
    recommender = Recommender.from_pretrained(tmp_path / "run")
    history = recommender.history_of(recommender.dataset.user_keys[1])
    answers = recommender.recommend([history], 3)[0]
    assert len(answers) <= 3 and not {answer.item for answer in answers} & set(history)


def test_a_loaded_model_keeps_the_type_of_its_weights(
    ilora: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from llmrec.llm import loading

    monkeypatch.setattr(loading, "fast_bfloat16", lambda device="cpu": True)
    model = Recommender.from_pretrained(ilora[0]).system.model
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_a_finished_run_is_not_trained_again(ilora: tuple[Path, dict[str, Any]]) -> None:
    out, record = ilora
    marks = [*sorted(out.glob("stages/*/done.json")), *sorted(out.glob("stages/*/log.jsonl"))]
    assert len(marks) == 4
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in marks]
    files = weights(out)
    again = train("ilora", out)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in marks] == before
    assert again == record and weights(out) == files


@pytest.mark.parametrize("change", ["tuner.r=4", "seed=7", "stages.0.learning_rate=1e-3"])
def test_another_recipe_in_the_same_folder_is_refused(ilora: tuple[Path, dict[str, Any]], change: str) -> None:
    out = ilora[0]
    before = (out / "recipe.yaml").read_bytes()
    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        train("ilora", out, change)
    assert (out / "recipe.yaml").read_bytes() == before


def test_data_of_another_recipe_is_never_taken_over(ilora: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(RecipeError, match="data prepared by another recipe"):
        train("ilora", ilora[0], "dataset.options.users=50", resume="never")


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="thesis.txt"):
        train("sasrec", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_runs_of_one_recipe_have_the_same_bytes(ilora: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, record = ilora
    again = train("ilora", tmp_path / "again")
    assert len(weights(out)) == 2
    assert weights(tmp_path / "again") == weights(out)
    assert again["models"] == record["models"]


def test_parts_have_seeds_of_their_own(ilora: tuple[Path, dict[str, Any]]) -> None:
    run = open_run(ilora[0])
    seeds = [run.seed_of(part) for part in ("encoder", "tuner", "stage-1", "stage-2")]
    assert len(set(seeds)) == 4 and seeds == [run.seed_of(part) for part in ("encoder", "tuner", "stage-1", "stage-2")]


def test_going_on_from_a_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    """The first step after a resume rounds like the same step of an uninterrupted run."""
    more = ("stages.1.num_train_epochs=2", "stages.1.save_total_limit=9")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train("ilora", whole, *more)
    shutil.copytree(whole, cut)
    stage = cut / "stages" / "2-tuner"
    (stage / "done.json").unlink()
    steps = sorted(stage.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for folder in (stage / "checkpoints" / "final", *steps[1:]):
        shutil.rmtree(folder)
    train("ilora", cut, *more)
    assert len(steps) == 2 and weights(cut) == weights(whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(ilora: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    def inside(place: str) -> Callable[[Path], bool]:
        return lambda out: any(out.glob(place))

    more = ("stages.0.num_train_epochs=3", "stages.1.num_train_epochs=3")
    train("ilora", tmp_path / "whole", *more)
    moments = ["dataset/meta.json", "stages/1-encoder/checkpoints/checkpoint-*", "encoder/model.safetensors",
               "stages/2-tuner/checkpoints/checkpoint-*", "model/recommender.json"]  # fmt: skip
    for number, place in enumerate(moments):
        out = tmp_path / f"killed-{number}"
        _kill_when(words("ilora", out, *more), out, inside(place))
        assert not (out / "metrics.json").exists(), f"the run ended before it was killed at {place}"
        run_recipe(small_recipe("ilora", *more), out, say=lambda line: None)
        assert weights(out) == weights(tmp_path / "whole"), place


def _kill_when(command: list[str], out: Path, reached: Callable[[Path], bool]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmrec", *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 300
        while not reached(out):
            assert process.poll() is None, "the run ended before its moment came"
            assert time.monotonic() < end, "the run did not reach its moment"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
