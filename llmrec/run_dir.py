"""Names of the files in a run. A run folder alone is enough to reproduce, resume, report and publish.

```
RUN/
  recipe.yaml              the resolved recipe
  environment.json         versions, processor, threads, command
  dataset/                 the prepared data set (or dataset.json pointing at a shared one)
  encoder/                 trained sequence encoder (save_pretrained)
  item_tokenizer/          item codes: tokenizer.json, codes.safetensors, fit.json
  model/                   trained LLM recommender or head (save_pretrained)
  stages/1-encoder/        checkpoints/, log.jsonl, done.json
  evaluations/<protocol>/  predictions/<system>.parquet, metrics.json
  metrics.json             the evaluation the recipe asks for
  report.html
```
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llmrec.errors import DataError
from llmrec.redaction import redact_record

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "tokenizer.model", "spiece.model",
)  # fmt: skip
PUBLISHED_FILES = (
    "recipe.yaml",
    "environment.json",
    "metrics.json",
    "evaluations/*/metrics.json",
    "encoder/config.json",
    "encoder/*.safetensors",
    "encoder/*.safetensors.index.json",
    "item_tokenizer/tokenizer.json",
    "item_tokenizer/*.safetensors",
    "item_tokenizer/fit.json",
    "model/config.json",
    "model/recommender.json",
    "model/*.safetensors",
    "model/*.safetensors.index.json",
    "model/adapter/adapter_config.json",
    "model/adapter/adapter_model.safetensors",
    *(f"model/tokenizer/{name}" for name in _TOKENIZER),
)
"""Files of a run that may be published; nothing else is (no interactions, users, predictions, checkpoints, logs)."""
PUBLISHED_MADE = ("README.md", "dataset/items.parquet", "dataset/catalogue.json")
"""Files that are written for publishing: the card, and the items without the events."""

_VERSIONS_OF = ("llmrec", "torch", "transformers", "peft", "trl", "accelerate", "ibis-framework", "duckdb", "numpy")


@dataclass(frozen=True)
class RunDir:
    """Paths of one run; nothing is created before it is written."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """What it ran on."""
        return self.root / "environment.json"

    @property
    def encoder(self) -> Path:
        """The trained encoder."""
        return self.root / "encoder"

    @property
    def model(self) -> Path:
        """The trained LLM recommender or head."""
        return self.root / "model"

    @property
    def item_tokenizer(self) -> Path:
        """The fitted item tokenizer."""
        return self.root / "item_tokenizer"

    @property
    def metrics(self) -> Path:
        """The record of the recipe's own evaluation."""
        return self.root / "metrics.json"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.root / "report.html"

    @property
    def catalogue(self) -> Path:
        """The folder of items in a published run, which has no data set (`llmrec.data.catalogue`)."""
        return self.root / "dataset"

    def stage(self, number: int, part: str) -> Path:
        """Folder of stage `number` (from 1) that trains `part`."""
        return self.root / "stages" / f"{number}-{part}"

    def evaluation(self, slug: str) -> Path:
        """Folder of one evaluation protocol."""
        return self.root / "evaluations" / slug

    @property
    def dataset(self) -> Path:
        """The prepared data set: RUN/dataset, or the shared folder RUN/dataset.json names.

        Raises:
            DataError: The shared folder is gone, or dataset.json cannot be read.
        """
        pointer = self.root / "dataset.json"
        if not pointer.is_file():
            return self.root / "dataset"
        try:
            folder = Path(json.loads(pointer.read_text(encoding="utf-8"))["path"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "does not point at a data set",
                file=pointer,
                found=f"{type(error).__name__}: {error}",
                expected='{"path": ...}',
            ) from error
        folder = folder if folder.is_absolute() else (self.root / folder).resolve()
        if not folder.is_dir():
            raise DataError(
                "the data set of this run is gone", file=pointer, found=str(folder), expected="an existing folder"
            )
        return folder

    def point_to_dataset(self, folder: Path) -> None:
        """Record a shared data set folder, relative to the run where possible."""
        write_json(self.root / "dataset.json", {"path": os.path.relpath(folder.resolve(), self.root.resolve())})

    def write_environment(self, extra: dict[str, Any] | None = None) -> None:
        """Versions, machine and command; no environment variables, since those may hold secrets."""
        versions = {}
        for name in _VERSIONS_OF:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "not installed"
        record = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "versions": versions,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:2]],
            **(extra or {}),
        }
        write_json(self.environment, redact_record(record, homes=True))


def write_json(path: Path, record: Any) -> None:
    """Write JSON by a temporary file and an atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write text by a temporary file and an atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
