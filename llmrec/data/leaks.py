"""Leak checks: can a model see what it is asked for?

Nine checks and a check of the order of histories, each a function that returns a `Finding`. A leak that belongs to
the declared protocol (future training events under leave_one_out, repeats where repeats are kept, a k-core over all
events) is a warning; any other is an error, and `llmrec inspect` then ends with exit status 1.

Prompt rows are records with `prompt` (text, or a list of chat messages) and, where known, `completion`, `user`,
`history`, `target`, `candidates`. Items and users in them are our ids when they are numbers and original ids when
they are text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.data.schema import ITEM, ORDER, RATING, SPLIT, SPLITS, TIMESTAMP, USER
from llmrec.data.sequences import CONTEXT_OF

if TYPE_CHECKING:
    from llmrec.data.dataset import InteractionDataset

Severity = Literal["ok", "warning", "error"]
CONTENT = "items"
"""What an artefact is "fitted on" when it reads item content only."""
_SHOWN = 3
_TEMPLATE_SAMPLE = 50


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        name: Name of the check.
        severity: "ok", "warning" (inherent to the declared protocol) or "error".
        count: Number of offending rows.
        detail: One line for people.
    """

    name: str
    severity: Severity
    count: int
    detail: str


@dataclass(frozen=True)
class CandidateLists:
    """Candidate lists to look at, one a row.

    Args:
        name: Where they come from.
        users, targets: Our ids, one a row; 0 where unknown.
        candidates: Our item ids; the target is one of them.
    """

    name: str
    users: Sequence[int] | np.ndarray
    targets: Sequence[int] | np.ndarray
    candidates: Sequence[Sequence[int]] | np.ndarray


def inspect_dataset(
    dataset: InteractionDataset,
    prompts: list[dict[str, Any]] | None = None,
    *,
    candidates: Sequence[CandidateLists] = (),
    artefacts: Mapping[str, Sequence[str]] | None = None,
) -> list[Finding]:
    """Run every check.

    Args:
        dataset: The data set.
        prompts: Rendered rows of an instruction file.
        candidates: Stored candidate lists.
        artefacts: What was fitted -> the splits it was fitted on ("items" for content only).
    """
    rows = prompts or []
    lists = [*candidates, *_lists_of_prompts(dataset, rows)]
    return [
        check_split_overlap(dataset),
        check_future_training(dataset),
        check_target_in_history(dataset, rows),
        check_answer_in_prompt(dataset, rows),
        check_candidate_positions(lists),
        check_duplicate_titles(dataset),
        check_core_filter(dataset),
        check_fitted_splits(dataset, artefacts or {}),
        check_negatives(dataset, lists),
        check_history_order(dataset),
    ]


def check_split_overlap(dataset: InteractionDataset) -> Finding:
    """1: the same (user, item, time) in more than one split."""
    name = "split_overlap"
    if "timestamps" not in dataset.fields:
        return Finding(name, "ok", 0, "no timestamps: repeats across splits are counted by target_in_history")
    columns = [dataset.column(c) for c in (USER, ITEM, TIMESTAMP)]
    order = np.lexsort([dataset.split_codes, *reversed(columns)])
    same = np.logical_and.reduce([np.diff(c[order]) == 0 for c in columns])
    count = int(np.sum(same & (np.diff(dataset.split_codes[order]) != 0)))
    if not count:
        return Finding(name, "ok", 0, "no (user, item, time) stands in two splits")
    text = f"{count} events share user, item and time with an event of another split"
    return Finding(name, _repeat_severity(dataset), count, text)


def check_future_training(dataset: InteractionDataset) -> Finding:
    """2: the share of training events later than the earliest test event."""
    name = "future_training_events"
    share = future_training_share(dataset.interactions)
    if share is None:
        return Finding(name, "ok", 0, "cannot be told: no timestamps, or no training or test events")
    count = round(share * int(np.sum(dataset.split_codes == SPLITS.index("train"))))
    severity: Severity = "ok" if not count else "error" if dataset.meta.split.startswith("temporal") else "warning"
    return Finding(name, severity, count, f"{share:.1%} of the training events are later than the earliest test event")


def future_training_share(interactions: pa.Table) -> float | None:
    """Share of training events later than the earliest test event; None where that cannot be told."""
    if TIMESTAMP not in interactions.column_names:
        return None
    split, times = interactions.column(SPLIT), interactions.column(TIMESTAMP)
    test, train = times.filter(pc.equal(split, "test")), times.filter(pc.equal(split, "train"))
    if not len(test) or not len(train):
        return None
    return pc.sum(pc.greater(train, pc.min(test))).as_py() / len(train)


def check_target_in_history(dataset: InteractionDataset, prompts: Sequence[dict[str, Any]] = ()) -> Finding:
    """3: a target that already stands in its own history (data set and prompt rows)."""
    name, count = "target_in_history", 0
    for split, context in CONTEXT_OF.items():
        if split != "train":
            count += _repeated_targets(dataset, split, context)
    for row in prompts:
        target = _item_of(dataset, row.get("target"))
        count += bool(target) and target in {_item_of(dataset, item) for item in row.get("history") or ()}
    if not count:
        return Finding(name, "ok", 0, "no target stands in its own history")
    declared = "repeats are declared" if _repeat_severity(dataset) == "warning" else "repeats are not declared"
    return Finding(name, _repeat_severity(dataset), count, f"{count} targets stand in their own history; {declared}")


def _repeated_targets(dataset: InteractionDataset, split: str, context: tuple[str, ...]) -> int:
    """Targets of a split whose item occurs earlier among the context events of the same user."""
    rows = np.flatnonzero(np.isin(dataset.split_codes, [SPLITS.index(c) for c in context]))
    users, items = dataset.column(USER)[rows], dataset.column(ITEM)[rows]
    order = np.lexsort([rows, items, users])
    repeated = np.zeros(len(rows), dtype=bool)
    repeated[order[1:]] = (np.diff(users[order]) == 0) & (np.diff(items[order]) == 0)
    return int(np.sum(repeated & (dataset.split_codes[rows] == SPLITS.index(split))))


def check_answer_in_prompt(dataset: InteractionDataset, prompts: Sequence[dict[str, Any]]) -> Finding:
    """4: target title, original id, semantic id or completion in the prompt, outside history and candidate list.

    Titles of history and candidates are blanked first, longest first, each as often as it is listed, so that
    "Alien" inside "Aliens" or inside a listed title is no leak. Words that stand in most other prompts too belong to
    the template.
    """
    name = "answer_in_prompt"
    if not prompts:
        return Finding(name, "ok", 0, "no prompts given (--prompts FILE.jsonl)")
    targets = [_item_of(dataset, row.get("target")) for row in prompts]
    texts = [_blank_listed(dataset, row) for row in prompts]
    leaks: list[str] = []
    for number, (row, target, text) in enumerate(zip(prompts, targets, texts, strict=True)):
        found = [answer for answer in _answers(dataset, row, target) if _stands_in(answer, text)]
        found = [answer for answer in found if not _is_template(answer, number, targets, texts)]
        if found:
            leaks.append(f"row {number + 1}: {found[0]!r}")
    if not leaks:
        return Finding(name, "ok", 0, f"{len(prompts)} prompts do not show their answer outside a list")
    return Finding(name, "error", len(leaks), f"the answer stands in the prompt; {'; '.join(leaks[:_SHOWN])}")


def _answers(dataset: InteractionDataset, row: Mapping[str, Any], target: int) -> list[str]:
    answers = [_text_of(row.get("completion"))]
    if target:
        key = dataset.item_keys[target]
        answers += [dataset.item_titles[target], "" if key.isdigit() and len(key) < 6 else key]
        if "semantic_id" in dataset.items.column_names:
            code = dataset.items.column("semantic_id")[target - 1].as_py()
            answers.append("".join(code) if isinstance(code, list) else str(code or ""))
    return [_flat(answer) for answer in answers if answer.strip()]


def _blank_listed(dataset: InteractionDataset, row: Mapping[str, Any]) -> str:
    text = _flat(_text_of(row.get("prompt")))
    listed = [_item_of(dataset, item) for name in ("history", "candidates") for item in row.get(name) or ()]
    for title in sorted((_flat(dataset.item_titles[item]) for item in listed if item), key=len, reverse=True):
        text = text.replace(title, " ", 1)
    return text


def _stands_in(answer: str, text: str) -> bool:
    return answer in text and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def _is_template(answer: str, number: int, targets: Sequence[int], texts: Sequence[str]) -> bool:
    sample = [i for i in range(min(len(texts), 4 * _TEMPLATE_SAMPLE)) if i != number]
    others = [texts[i] for i in sample if targets[i] != targets[number] or not targets[i]][:_TEMPLATE_SAMPLE]
    return bool(others) and 2 * sum(_stands_in(answer, text) for text in others) >= len(others)


def check_candidate_positions(lists: Sequence[CandidateLists]) -> Finding:
    """5: chi-square test of the target's place in its candidate list against a uniform draw.

    Each group of lists is judged alone (prompts often repeat stored lists); an error is a p-value below 0.001 divided
    by the number of groups.
    """
    name = "candidate_positions"
    judged = [(group, *_position_test(group)) for group in lists]
    known = [entry for entry in judged if entry[1]]
    if not known:
        return Finding(name, "ok", 0, "no candidate lists to look at")
    biased = [(group, number, p) for group, number, p, _ in known if p is not None and p < 1e-3 / len(known)]
    text = "; ".join(f"{group.name}: {about}" for group, *_, about in known)
    return Finding(name, "error" if biased else "ok", sum(number for _, number, _ in biased), text)


def _position_test(group: CandidateLists) -> tuple[int, float | None, str]:
    """Number of lists, p-value (None when too few lists) and a line about them."""
    from scipy.stats import chisquare

    sizes: list[int] = []
    places: list[int] = []
    for target, row in zip(group.targets, group.candidates, strict=True):
        where = np.flatnonzero(np.asarray(row) == target)
        if target and len(where):
            sizes.append(len(row))
            places.append(int(where[0]))
    if not sizes:
        return 0, None, "none"
    width = max(sizes)
    observed = np.bincount(places, minlength=width)
    # a list of n places expects 1/n of a target at each of them: sum over lists, place by place
    shares = np.bincount(sizes, minlength=width + 1) / np.maximum(1, np.arange(width + 1))
    expected = np.cumsum(shares[::-1])[::-1][1:]
    if width < 2 or expected.min() < 5:
        return len(sizes), None, f"{len(sizes)} lists are too few to judge {width} places"
    p = float(chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)
    first = observed[0] / len(sizes)
    return len(sizes), p, f"{len(sizes)} lists of up to {width}, target first in {first:.1%}, p = {p:.2g}"


def check_duplicate_titles(dataset: InteractionDataset) -> Finding:
    """6: items of one normalised title, which no answer in words can tell apart (a property of the source: warning)."""
    name = "duplicate_titles"
    if "titles" not in dataset.fields:
        return Finding(name, "ok", 0, "the items have no titles")
    groups: dict[str, list[int]] = {}
    for item, title in enumerate(dataset.items.column("title").to_pylist(), start=1):
        if title and _normal(title):
            groups.setdefault(_normal(title), []).append(item)
    same = [group for group in groups.values() if len(group) > 1]
    count = sum(map(len, same))
    if not count:
        return Finding(name, "ok", 0, "all titles differ")
    shown = "; ".join(repr(dataset.item_titles[group[0]]) for group in same[:_SHOWN])
    return Finding(name, "warning", count, f"{count} items share {len(same)} normalised titles, such as {shown}")


def check_core_filter(dataset: InteractionDataset) -> Finding:
    """7: whether minimum counts were applied to all events (test events then decided who is in) or to training ones."""
    filters = dataset.meta.filters
    least = {n: filters.get(n, 1) for n in ("min_user", "min_item")}
    if max(least.values()) <= 1:
        return Finding("core_filter", "ok", 0, "no minimum counts were applied")
    on = filters.get("core_on", "all")
    text = f"min_user {least['min_user']}, min_item {least['min_item']} counted on {on} events"
    return Finding("core_filter", "ok" if on == "train" else "warning", 0 if on == "train" else 1, text)


def check_fitted_splits(dataset: InteractionDataset, artefacts: Mapping[str, Sequence[str]]) -> Finding:
    """8: popularity statistics, encoders or item tokenizers fitted on more than the training split.

    Item columns that equal event counts or mean ratings over all splits are found by comparing values.
    """
    bad = [f"{n} was fitted on {', '.join(on)}" for n, on in sorted(artefacts.items()) if set(on) - {"train", CONTENT}]
    bad += [f"item column {column!r} equals {what} over all splits" for column, what in _statistics_of_all(dataset)]
    if bad:
        return Finding("fitted_splits", "error", len(bad), "; ".join(bad[:_SHOWN]))
    text = f"{len(artefacts)} artefacts and all item columns know training events only"
    return Finding("fitted_splits", "ok", 0, text)


def _statistics_of_all(dataset: InteractionDataset) -> Iterable[tuple[str, str]]:
    items, train = dataset.column(ITEM), dataset.split_codes == SPLITS.index("train")
    totals = {"event counts": (_per_item(dataset, items, None), _per_item(dataset, items[train], None))}
    if "ratings" in dataset.fields:
        ratings = dataset.column(RATING).astype(np.float64)
        means = (_per_item(dataset, items, ratings), _per_item(dataset, items[train], ratings[train]))
        totals["mean ratings"] = means
    for column in dataset.items.column_names:
        kind = dataset.items.schema.field(column).type
        if column == ITEM or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            continue
        values = dataset.items.column(column).cast(pa.float64(), safe=False).to_numpy()
        for what, (over_all, over_train) in totals.items():
            differ = not np.allclose(over_all, over_train, rtol=1e-5, equal_nan=True)
            if differ and np.allclose(values, over_all, rtol=1e-5):
                yield column, what


def _per_item(dataset: InteractionDataset, items: np.ndarray, values: np.ndarray | None) -> np.ndarray:
    counts = np.bincount(items, minlength=dataset.num_items + 1)[1:].astype(np.float64)
    if values is None:
        return counts
    sums = np.bincount(items, weights=values, minlength=dataset.num_items + 1)[1:]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def check_negatives(dataset: InteractionDataset, lists: Sequence[CandidateLists]) -> Finding:
    """9: candidates besides the target that the user really chose, in any split, and lists without their target."""
    name, wrong, missing, total = "negatives", 0, 0, 0
    width = dataset.num_items + 1
    positives = np.unique(dataset.column(USER).astype(np.int64) * width + dataset.column(ITEM))
    for group in lists:
        if not len(group.candidates):
            continue
        lengths = np.array([len(row) for row in group.candidates])
        flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in group.candidates])
        users, targets = (np.repeat(np.asarray(v, dtype=np.int64), lengths) for v in (group.users, group.targets))
        is_target = flat == targets
        wrong += int(np.sum(np.isin(users * width + flat, positives) & ~is_target & (users > 0)))
        rows = np.repeat(np.arange(len(lengths)), lengths)
        hits = np.bincount(rows, weights=is_target, minlength=len(lengths))
        missing += int(np.sum((hits != 1) & (np.asarray(group.targets) > 0)))
        total += len(lengths)
    if not total:
        return Finding(name, "ok", 0, "no candidate lists to look at")
    if not wrong + missing:
        return Finding(name, "ok", 0, f"{total} candidate lists hold their target once and no other item of the user")
    text = f"{wrong} negatives are items the user chose; {missing} lists do not hold their target exactly once"
    return Finding(name, "error", wrong + missing, text)


def check_history_order(dataset: InteractionDataset) -> Finding:
    """Events that stand after a later one in their user's history: a prefix would then contain the future."""
    name = "history_order"
    if "timestamps" not in dataset.fields:
        return Finding(name, "ok", 0, "no timestamps: the order column is taken at its word")
    user, time = dataset.column(USER), dataset.column(TIMESTAMP)
    count = int(np.sum((np.diff(user) == 0) & (np.diff(time) < 0)))
    if count:
        return Finding(name, "error", count, f"{count} events are earlier than the event before them (column {ORDER})")
    return Finding(name, "ok", 0, "every history runs forward in time")


def _lists_of_prompts(dataset: InteractionDataset, rows: Sequence[dict[str, Any]]) -> list[CandidateLists]:
    rows = [row for row in rows if row.get("candidates") and len(row["candidates"]) > 1]
    if not rows:
        return []
    users = [_user_of(dataset, row.get("user")) for row in rows]
    targets = [_item_of(dataset, row.get("target")) for row in rows]
    lists = [[_item_of(dataset, item) for item in row["candidates"]] for row in rows]
    return [CandidateLists("prompts", users, targets, lists)]


def _item_of(dataset: InteractionDataset, value: Any) -> int:
    if isinstance(value, str):
        return int(dataset.item_ids_of([value])[0])
    return value if isinstance(value, int) and 0 < value <= dataset.num_items else 0


def _user_of(dataset: InteractionDataset, value: Any) -> int:
    if isinstance(value, str):
        return dataset.user_id_of(value)
    return value if isinstance(value, int) and 0 < value <= dataset.num_users else 0


def _text_of(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(str(m.get("content", "")) if isinstance(m, dict) else str(m) for m in value)
    return str(value or "")


def _flat(text: str) -> str:
    """Text as it is compared: prompts may write titles with other spaces or letter case than the catalogue."""
    return " ".join(text.split()).casefold()


def _normal(title: str) -> str:
    letters = unicodedata.normalize("NFKD", title).casefold()
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return re.sub(r"[\W_]+", " ", plain).strip()


def _repeat_severity(dataset: InteractionDataset) -> Severity:
    return "warning" if dataset.meta.repeats == "keep" and dataset.meta.has_repeats else "error"
