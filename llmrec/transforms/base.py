"""Base of data transforms: data set -> data set(s). One file of this folder per transform.

A transform is a dataclass whose fields are its options. Some train helper models; they find what they need in the
`TransformContext` and must be resumable from its `work_dir`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset


@dataclass(frozen=True)
class TransformContext:
    """What a transform may use.

    Args:
        work_dir: Folder for intermediate files; kept on failure so that `resume` can go on.
        seed: Seed of everything random.
        encoder_spec: Recipe part of the encoder to train inside, where the transform needs one.
        checkpoints: Folders of models trained before, by name.
        resume: Go on from `work_dir` instead of starting again.
    """

    work_dir: Path
    seed: int
    encoder_spec: Mapping[str, Any] | None = None
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    resume: bool = False


@dataclass(frozen=True)
class TransformResult:
    """What a transform made.

    Args:
        datasets: Named results; a single result is called "dataset".
        report: Named figures (events added, removed, changed, ...).
    """

    datasets: Mapping[str, InteractionDataset]
    report: Mapping[str, float]


class DataTransform(ABC):
    """Base class; a transform must not change valid or test events and says in the note what it did."""

    @abstractmethod
    def __call__(self, dataset: InteractionDataset, context: TransformContext) -> TransformResult:
        """Transform a data set."""
