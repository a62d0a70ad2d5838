"""A finished run written by hand, with everything a run folder holds beside what may be published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llmrec.data.catalogue import item_index
from llmrec.data.dataset import InteractionDataset
from llmrec.recipe import parse_recipe
from llmrec.run_dir import RunDir, write_json, write_text
from tests.data.tables import dataset_of

EVENTS = [
    (user, user + step, split) for user in (1, 2, 3) for step, split in enumerate(("train", "train", "valid", "test"))
]
TITLES = ["Alpha", "Beta | <b>bold</b>", "Gamma [x](y)", "Delta", "Epsilon", "Zeta"]
HOME = "/home/" + "somebody"
ENCODER, STYLE = {"type": "sasrec", "hidden_size": 8}, {"style": "item_slots"}
ALLOWED = {
    "README.md", "recipe.yaml", "environment.json", "metrics.json", "evaluations/test-full/metrics.json",
    "evaluations/test-candidates-5-uniform/metrics.json", "encoder/config.json", "encoder/model.safetensors",
    "dataset/items.parquet", "dataset/catalogue.json",
}  # fmt: skip
ALLOWED_MODEL = {
    "model/recommender.json", "model/projector.safetensors", "model/adapter/adapter_config.json",
    "model/adapter/adapter_model.safetensors", "model/tokenizer/tokenizer.json",
}  # fmt: skip


def write_run(folder: Path, *, model: bool = False, base: str = "owner/base-model", **recipe: Any) -> Path:
    """A run of sasrec, and with `model` of iLoRA on a language model called `base`."""
    run, data = RunDir(folder), dataset()
    raw: dict[str, Any] = {
        "name": "hand-made",
        "dataset": {"source": "synthetic", "max_history": 5},
        "encoder": ENCODER,
        "stages": [{"train": "encoder", "learning_rate": 0.01}],
        "evaluate": {"metrics": ["hr@10", "ndcg@10"], "baselines": ["popularity"]},
        **recipe,
    }
    if model:
        raw |= {"llm": {"model": base}, "tuner": {"type": "ilora", "num_experts": 2, "r": 4}, "prompt": STYLE}
        raw |= {name: recipe[name] for name in ("prompt",) if name in recipe}
    write_text(run.recipe, parse_recipe(raw).dump())
    run.write_environment({"dataset_fingerprint": data.fingerprint, "item_index": item_index(data), "seed": 42})
    data.save(folder / "dataset")
    write_json(run.encoder / "config.json", {"dataset_fingerprint": data.fingerprint, "model_type": "llmrec_sasrec"})
    weights(run.encoder / "model.safetensors")
    if model:
        _write_model(run, base)
    name = "ilora" if model else "sasrec"
    for slug, candidates in (("test-full", "full"), ("test-candidates-5-uniform", "candidates-5")):
        write_json(run.evaluation(slug) / "metrics.json", evaluation(name, candidates, data))
    write_json(run.metrics, evaluation(name, "full", data))
    write_json(run.stage(1, "encoder") / "done.json", {"steps": 7, "epochs": 1.0, "best_metric": 0.25, "seconds": 3.2})
    _write_what_stays(run)
    return folder


def dataset() -> InteractionDataset:
    """Three users, six items with titles, and a notice about a leak."""
    notes = ("leave_one_out: 50% of the training events are later than the earliest test event",)
    return dataset_of(EVENTS, titles=TITLES, meta={"filters": {"min_user": 2}, "notes": notes, "name": "hand|made"})


def evaluation(name: str, candidates: str, data: InteractionDataset) -> dict[str, Any]:
    """A record of metrics.json."""
    better, worse = (
        {"hr@10": {"mean": mean, "low": mean - 0.05, "high": mean + 0.05},
         "ndcg@10": {"mean": mean / 2, "low": mean / 2 - 0.05, "high": mean / 2 + 0.05}}
        for mean in ((0.4, 0.2) if candidates == "full" else (0.9, 0.8))
    )  # fmt: skip
    return {
        "protocol": "full ranking, test, seen removed" if candidates == "full" else f"{candidates} (uniform, seed 42)",
        "protocol_fields": {"split": "test", "candidates": candidates},
        "fingerprint": "0123456789ab" if candidates == "full" else "ba9876543210",
        "dataset": data.fingerprint,
        "users": 3,
        "models": {"popularity": worse, name: better},
        "measured": {"popularity": "exact ranks", name: "exact ranks"},
    }


def weights(path: Path) -> None:
    """A file of weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.arange(12, dtype=np.float32).reshape(3, 4)}, path)


def _write_model(run: RunDir, base: str) -> None:
    identity = {"name": base, "revision": "c" * 40, "shape": "s", "embeddings": "e" * 64, "linears": "l" * 64}
    record = {"base": {**identity, "num_layers": 2}, "encoder": "f" * 64, "item_table": {"sha256": "a" * 64}}
    write_json(run.model / "recommender.json", record)
    weights(run.model / "projector.safetensors")
    adapter = {"peft_type": "ILORA", "base_model_name_or_path": f"{HOME}/.cache/base-model"}
    write_json(run.model / "adapter" / "adapter_config.json", adapter)
    weights(run.model / "adapter" / "adapter_model.safetensors")
    write_json(run.model / "tokenizer" / "tokenizer.json", {"model": {"vocab": {"a": 0}}})


def _write_what_stays(run: RunDir) -> None:
    """Files a run holds, or somebody left in it, that are nobody's business."""
    for name in (
        "report.html", "notes.txt", "training_args.bin", "encoder/pytorch_model.bin", "encoder/optimizer.pt",
        "model/adapter/README.md", "model/adapter/adapter_model.bin", "model/tokenizer/private.json",
        "evaluations/test-full/predictions/sasrec.parquet", "evaluations/test-full/gates.parquet",
        "stages/1-encoder/log.jsonl", "stages/1-encoder/checkpoints/final/trainable.safetensors",
        "dataset/rejected.csv",
    ):  # fmt: skip
        path = run.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"user": "user-1"}), encoding="utf-8")
