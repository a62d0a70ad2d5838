"""Runs of the smoke recipes, made so small that each takes seconds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llmrec.recipe import Recipe, load_recipe, parse_recipe
from llmrec.training.stages import run_recipe

ROOT = Path(__file__).resolve().parent.parent
DATA = ["dataset.options={users: 60, items: 30, events_per_user: 8}", "dataset.max_history=12"]
ENCODER = ["stages.0.num_train_epochs=1"]
TUNER = ["stages.1.num_train_epochs=1"]


def overrides(name: str) -> list[str]:
    """What makes recipes/smoke/<name>.yaml small."""
    return DATA + ENCODER + ([] if name == "sasrec" else TUNER)


def small_recipe(name: str, *more: str) -> Recipe:
    """A smoke recipe, made small."""
    return load_recipe(ROOT / "recipes" / "smoke" / f"{name}.yaml", [*overrides(name), *more])


def words(name: str, out: Path, *more: str) -> list[str]:
    """The command line of the same run."""
    sets = [word for one in (*overrides(name), *more) for word in ("--set", one)]
    return ["train", str(ROOT / "recipes" / "smoke" / f"{name}.yaml"), *sets, "--out", str(out)]


def train(name: str, out: Path, *more: str, **options: Any) -> dict[str, Any]:
    """Train a small run and give its record."""
    return run_recipe(small_recipe(name, *more), out, say=lambda line: None, **options)


def prompted_recipe(style: str, *, mode: str = "score", encoder: bool = True, **prompt: Any) -> Recipe:
    """Two steps of a recommender that answers in words, measured among 20 candidates."""
    raw: dict[str, Any] = {
        "name": "words", "seed": 1,
        "dataset": {"source": "synthetic", "max_history": 6,
                    "options": {"users": 40, "items": 30, "events_per_user": 8}},
        "llm": {"model": "tiny-llama", "dtype": "float32"},
        "tuner": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "prompt": {"style": style, "template": "next_item/movie", "candidates": 20, **prompt},
        "stages": [{"train": "tuner", "max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "no",
                    "learning_rate": 1e-3}],
        "evaluate": {"protocol": "candidates-20", "mode": mode, "max_users": 8},
    }  # fmt: skip
    if encoder:
        raw["tuner"] |= {"type": "ilora", "num_experts": 2}
        raw["encoder"] = {"type": "sasrec", "hidden_size": 16, "num_layers": 1, "num_heads": 2}
        raw["stages"].insert(0, {"train": "encoder", "max_steps": 2, "eval_strategy": "no"})
        raw["evaluate"]["baselines"] = ["popularity", "encoder"]
    return parse_recipe(raw)


def weights(run: Path) -> dict[str, str]:
    """SHA-256 of the trained files of a run's model."""
    files = sorted((run / "model").rglob("*.safetensors"))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
