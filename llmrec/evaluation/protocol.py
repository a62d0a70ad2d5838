"""`EvalProtocol`: what is asked of a system, in one value that is printed with every number.

Two numbers may be compared when the same question was asked: same targets, same rivals, same handling of seen items.
The fingerprint is a hash over exactly that. It leaves out the cuts (each number carries its own, "ndcg@10") and the
history window (how much of the past a model reads is the model's affair); with full ranking it also leaves out the
candidate rule and its seeds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from llmrec.data.schema import SPLITS
from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset

CandidateKind = Literal["uniform", "popularity"]
Mode = Literal["score", "generate", "pointwise"]
KINDS: tuple[str, ...] = get_args(CandidateKind)
MODES: tuple[str, ...] = get_args(Mode)
FULL = "full"
SAMPLED_NOTE = "sampled candidates overstate accuracy and can reorder systems; never compare them with full ranking"

_CANDIDATES = re.compile(r"candidates-(\d+)(?:-([a-z]+))?")


@dataclass(frozen=True)
class EvalProtocol:
    """The question put to a system.

    Args:
        split: Split whose events are the targets.
        candidates: "full" (the whole catalogue) or "candidates-C": the target and C - 1 drawn items.
        kind: How the C - 1 items are drawn, "uniform" or "popularity".
        ks: Cuts of the metrics, ascending.
        remove_seen: Whether items of the history are taken out of a full ranking; None follows the data set.
        mode: "score" ranks by scores or lists, "generate" asks for one answer, "pointwise" asks for the logit that the
            action at each event is positive, given all earlier events and their actions.
        seeds: Draws of candidates.
        max_history: Latest events given to the system.
        label_rule: Pointwise only: which actions are positive ("rating >= 4"); None reads the column "label".

    Raises:
        RecipeError: A value that has no meaning.
    """

    split: str = "test"
    candidates: str = FULL
    kind: CandidateKind = "uniform"
    ks: tuple[int, ...] = (1, 5, 10, 20)
    remove_seen: bool | None = None
    mode: Mode = "score"
    seeds: tuple[int, ...] = (42,)
    max_history: int = 50
    label_rule: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ks", tuple(sorted({int(k) for k in self.ks})))
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(int(seed) for seed in self.seeds)))
        problems = [
            (self.split not in SPLITS, f"split {self.split!r} is not one of {', '.join(SPLITS)}"),
            (self.kind not in KINDS, f"candidate kind {self.kind!r} is not one of {', '.join(KINDS)}"),
            (self.mode not in MODES, f"mode {self.mode!r} is not one of {', '.join(MODES)}"),
            (not self.ks or min(self.ks, default=0) < 1, f"ks {self.ks} must be cuts of at least 1"),
            (not self.seeds, "seeds must name at least one draw of candidates"),
            (self.max_history < 1, f"max_history {self.max_history} must be at least 1"),
            (
                self.mode == "pointwise" and self.candidates != FULL,
                f"candidates {self.candidates!r} have no meaning for mode 'pointwise', which asks about each event",
            ),
            (
                self.mode != "pointwise" and self.label_rule is not None,
                f"label_rule {self.label_rule!r} has no meaning for mode {self.mode!r}",
            ),
        ]
        for wrong, message in problems:
            if wrong:
                raise RecipeError(f"protocol: {message}")
        size = self.num_candidates
        if size is not None and self.mode == "score" and min(self.ks) >= size:
            raise RecipeError(f"protocol: every cut of {self.ks} holds all {size} candidates; choose a k below {size}")

    @property
    def num_candidates(self) -> int | None:
        """C, the target included; None for full ranking.

        Raises:
            RecipeError: `candidates` is neither "full" nor "candidates-C" with C >= 2.
        """
        if self.candidates == FULL:
            return None
        match = re.fullmatch(r"candidates-(\d+)", self.candidates)
        if match is None or int(match[1]) < 2:
            raise RecipeError(
                f"protocol: candidates {self.candidates!r} is not known; expected 'full' or 'candidates-C' with C >= 2 "
                "(candidates-20 is the target and 19 others)"
            )
        return int(match[1])

    @property
    def cuts(self) -> tuple[int, ...]:
        """The cuts that say something: below C with candidates, 1 for a single generated answer."""
        if self.mode == "generate":
            return (1,)
        size = self.num_candidates
        return self.ks if size is None else tuple(k for k in self.ks if k < size)

    @property
    def slug(self) -> str:
        """Folder name of an evaluation, such as "test-full" or "test-candidates-20-uniform-generate"."""
        if self.mode == "pointwise":
            return f"{self.split}-pointwise"
        parts = [self.split, self.candidates]
        if self.num_candidates is not None:
            parts.append(self.kind)
        elif self.remove_seen is not None:
            parts.append("seen-removed" if self.remove_seen else "seen-kept")
        if self.mode == "generate":
            parts.append("generate")
        return "-".join(parts)

    def resolve(self, dataset: InteractionDataset) -> EvalProtocol:
        """The same protocol with the data set's default filled in for `remove_seen`."""
        return self if self.remove_seen is not None else replace(self, remove_seen=dataset.meta.remove_seen)

    def label(self) -> str:
        """One line for people, such as "full ranking, test, seen removed"."""
        if self.mode == "pointwise":
            return f"pointwise actions ({self.label_rule or 'column label'}), {self.split}"
        if self.num_candidates is None:
            seen = {None: "seen items as the data set says", True: "seen removed", False: "seen kept"}[self.remove_seen]
            label = f"full ranking, {self.split}, {seen}"
            return label if self.mode == "score" else f"{label}, generate"
        seeds = f"seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}"
        return f"{self.candidates} ({self.kind}, {seeds}), {self.split}, {self.mode}"

    def fingerprint(self, dataset: InteractionDataset) -> str:
        """First 12 hex digits of a SHA-256 over the question and the data set's fingerprint."""
        return self.fingerprint_of(dataset.fingerprint, remove_seen=dataset.meta.remove_seen)

    def fingerprint_of(self, dataset_fingerprint: str, *, remove_seen: bool) -> str:
        """`fingerprint` from a recorded data set fingerprint; `remove_seen` is the default when None is set."""
        question: dict[str, Any] = {"split": self.split, "candidates": self.candidates, "mode": self.mode}
        if self.mode == "pointwise":
            question["label_rule"] = self.label_rule
        elif self.num_candidates is None:
            question["remove_seen"] = remove_seen if self.remove_seen is None else self.remove_seen
        else:
            question |= {"kind": self.kind, "seeds": list(self.seeds)}
        text = json.dumps({"dataset": dataset_fingerprint, **question}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; `from_dict` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EvalProtocol:
        """A protocol from `to_dict`.

        Raises:
            RecipeError: Unknown fields.
        """
        unknown = sorted(set(record) - set(cls.__dataclass_fields__))
        if unknown:
            raise RecipeError(f"protocol: unknown fields {unknown}; known: {', '.join(cls.__dataclass_fields__)}")
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in record.items()}
        return cls(**fields)


def parse_protocol(text: str, **fields: Any) -> EvalProtocol:
    """A protocol from its short name and other fields.

    Args:
        text: "full", "candidates-20" or "candidates-20-popularity".
        fields: Other fields of `EvalProtocol` (split, ks, seeds, mode, ...).

    Raises:
        RecipeError: The name or a field is unknown, or `kind` is given twice and differs.
    """
    name, match = text.strip().lower(), _CANDIDATES.fullmatch(text.strip().lower())
    if match is not None and match[2] is not None:
        name = f"candidates-{match[1]}"
        if fields.get("kind", match[2]) != match[2]:
            raise RecipeError(f"protocol {text!r} says {match[2]} candidates, the recipe says {fields['kind']}")
        fields = {**fields, "kind": match[2]}
    return EvalProtocol.from_dict({"candidates": name, **fields})
