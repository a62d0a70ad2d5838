"""The Python face of a trained run: original ids and titles in, ranked items with titles out.

    recommender = llmrec.Recommender.from_pretrained("runs/quickstart/ilora")
    for item in recommender.recommend([["50", "172"]], k=5)[0]:
        print(item.title, item.score, item.reasons)

It accepts every kind of run: counting baselines, sequence encoders and LLM recommenders; a folder, or the id of a run
on the Hub (`llmrec push`). A published run holds its items and no interactions; given the data set, it can do the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.run_dir import RunDir
from llmrec.run_loading import check_dataset, find_run, load_dataset, refuse_code

if TYPE_CHECKING:
    import numpy as np

    from llmrec.data.dataset import InteractionDataset
    from llmrec.recipe import Recipe

System = Literal["auto", "model", "encoder"]


@dataclass(frozen=True)
class Reason:
    """Why an item may have been recommended: a history item like it.

    Args:
        item: Original id of the history item.
        title: Its title.
        similarity: Cosine between the two item vectors of the system's item table.
        shared_users: Users with both items in the training data; None where the data are not at hand.
    """

    item: str
    title: str
    similarity: float
    shared_users: int | None

    def __str__(self) -> str:
        shared = "" if self.shared_users is None else f", {self.shared_users} users share both"
        return f"{self.title} (similarity {self.similarity:.2f}{shared})"


@dataclass(frozen=True)
class Recommendation:
    """One recommended item: original id, title, score of the system, and the nearest history items."""

    item: str
    title: str
    score: float
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class _History:
    """A history as a system reads it: item ids, and times in seconds where they are known."""

    items: list[int]
    times: list[int] | None = None


class Recommender:
    """A trained system with its data set.

    Args:
        system: Anything with `recommend(batch, k)`.
        dataset: The data set it was trained on (ids, titles, popularity).
        max_history: The latest events the system sees.
        name: Name of the system.
        item_vectors: [I+1, d] used for reasons, or None.
    """

    def __init__(
        self,
        system: Any,
        dataset: InteractionDataset,
        *,
        max_history: int,
        name: str,
        item_vectors: np.ndarray | None = None,
    ) -> None:
        self.system, self.dataset, self.name = system, dataset, name
        self.max_history = max_history
        self._vectors = item_vectors

    @classmethod
    def from_pretrained(
        cls,
        run: str | Path,
        *,
        system: System = "auto",
        revision: str | None = None,
        base_model: str | None = None,
        dataset: str | Path | None = None,
    ) -> Recommender:
        """Load a run.

        Args:
            run: A folder written by `llmrec train` or `llmrec quickstart`, or the Hub id of a published run.
            system: "model" (LLM or head), "encoder", or "auto": the model where there is one.
            revision: Branch, tag or commit of the Hub.
            base_model: Where the language model is, if not where the recipe says; it must be the same one.
            dataset: Folder of the data set, for a published run; it must be the one the run was trained on.

        Raises:
            CheckpointError: The folder is no finished run, or its parts do not belong together.
            HubError: No such repository or revision, or the Hub cannot be reached.
        """
        found = RunDir(find_run(run, revision))
        recipe = load_run_recipe(found)
        if not Path(run).is_dir():
            refuse_code(recipe, str(run))
        if base_model is not None and recipe.llm is not None:
            recipe.llm.model, recipe.llm.revision = base_model, None
        if recipe.evaluate.mode == "pointwise":
            raise CheckpointError(
                f"{run} learned to predict actions (evaluate.mode: pointwise), not to rank items: its scores of items "
                "were never trained. `llmrec evaluate` measures it; for recommendations train with strategy next_item"
            )
        data = load_dataset(found, dataset)
        loaded, name, encoder = load_system(found, recipe, data, system)
        vectors = None
        if encoder is not None and getattr(encoder, "trainable", False):
            vectors = encoder.item_vectors().detach().float().cpu().numpy()
        return cls(loaded, data, max_history=recipe.dataset.max_history, name=name, item_vectors=vectors)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        on_empty: Literal["error", "popular"] = "error",
        on_unknown: Literal["error", "skip"] = "error",
        allow_seen: bool | None = None,
        reasons: int = 0,
        batch_size: int = 64,
        times: Sequence[Sequence[int]] | None = None,
        at: int | None = None,
    ) -> list[list[Recommendation]]:
        """Ranked items for each history.

        Args:
            histories: Original item ids, oldest first.
            k: Items per history.
            on_empty: What an empty history means: an error, or the most popular items.
            on_unknown: What an id outside the catalogue means: an error, or leave it out.
            allow_seen: Also recommend items of the history; None follows the data set (repeats or not).
            reasons: Nearest history items to name per recommendation.
            batch_size: Histories per forward.
            times: For systems that read them: seconds of every event, in the shape of `histories`, never falling.
            at: Time of the question in seconds, for systems that read it.

        Returns:
            One list per history, best first.

        Raises:
            DataError: An empty history or an unknown id, unless told otherwise; times that are missing, too few or out
                of order.
        """
        encoded = self._encode_all(histories, on_unknown, times, at)
        self._check_empty(encoded, on_empty)
        answers: list[list[Recommendation]] = [[] for _ in encoded]
        filled = [number for number, history in enumerate(encoded) if history.items]
        for start in range(0, len(filled), batch_size):
            numbers = filled[start : start + batch_size]
            ranked = self._rank([encoded[n] for n in numbers], k, allow_seen, at)
            for number, row in zip(numbers, ranked, strict=True):
                answers[number] = [self._describe(item, score, encoded[number].items, reasons) for item, score in row]
        for number, history in enumerate(encoded):
            if not history.items:
                answers[number] = self.popular(k)
        return answers

    def rank(
        self,
        histories: Sequence[Sequence[str]],
        candidates: Sequence[Sequence[str]],
        *,
        on_unknown: Literal["error", "skip"] = "error",
        reasons: int = 0,
        batch_size: int = 64,
        times: Sequence[Sequence[int]] | None = None,
        at: int | None = None,
    ) -> list[list[Recommendation]]:
        """Given items, ranked for each history; items of the history are ranked like any other.

        Args:
            histories: Original item ids, oldest first.
            candidates: For each history the original ids of the items to rank.
            on_unknown: What an id of a history outside the catalogue means; one of the candidates is always an error.
            reasons: Nearest history items to name per item.
            batch_size: Histories per forward.
            times, at: As in `recommend`.

        Returns:
            One list per history with all its candidates, best first.

        Raises:
            DataError: An empty history or list, or an unknown id.
        """
        if len(histories) != len(candidates):
            raise DataError(
                "each history needs its own list of candidates",
                found=f"{len(candidates)} lists",
                expected=f"{len(histories)}",
            )
        encoded = self._encode_all(histories, on_unknown, times, at)
        self._check_empty(encoded, "error")
        pools = [self._pool(number, pool) for number, pool in enumerate(candidates)]
        answers: list[list[Recommendation]] = [[] for _ in encoded]
        # Prompts list their candidates, so a batch holds lists of one length and none is padded.
        for length in sorted({len(pool) for pool in pools}):
            like = [number for number, pool in enumerate(pools) if len(pool) == length]
            for start in range(0, len(like), batch_size):
                numbers = like[start : start + batch_size]
                ranked = self._rank_pools([encoded[n] for n in numbers], [pools[n] for n in numbers], at)
                for number, row in zip(numbers, ranked, strict=True):
                    shown = encoded[number].items
                    answers[number] = [self._describe(item, score, shown, reasons) for item, score in row]
        return answers

    def _pool(self, number: int, candidates: Sequence[str]) -> list[int]:
        ids = self.dataset.item_ids_of([str(item) for item in candidates]).tolist()
        unknown = [str(item) for item, found in zip(candidates, ids, strict=True) if not found]
        if unknown or not ids or len(set(ids)) < len(ids):
            raise DataError(
                f"the candidates of history {number} cannot be ranked",
                found=f"unknown items: {', '.join(unknown[:5])}" if unknown else "no items, or one of them twice",
                expected=f"different original item ids, such as {', '.join(self.dataset.item_keys[1:4])}",
            )
        return ids

    def _rank_pools(
        self, histories: list[_History], pools: list[list[int]], at: int | None
    ) -> list[list[tuple[int, float]]]:
        import numpy as np

        from llmrec.blocks.readout import ranked_candidates
        from llmrec.data.sequences import pad_right

        lists = [np.asarray(pool, dtype=np.int64) for pool in pools]
        batch = self._batch(histories, at, lists)
        batch["candidates"] = pad_right(lists)
        return ranked_candidates(self.system, batch)

    def popular(self, k: int) -> list[Recommendation]:
        """The k most frequent items of the training data; the score is the count."""
        import numpy as np

        counts = self.dataset.context().train_counts
        best = np.argsort(-counts[1:], kind="stable")[:k] + 1
        return [self._describe(int(item), float(counts[item]), [], 0) for item in best]

    def history_of(self, user: str) -> list[str]:
        """Original ids of a user's whole history, oldest first.

        Raises:
            DataError: No such user.
        """
        start, end = self._events_of(user)
        return [self.dataset.item_keys[item] for item in self.dataset.column("item")[start:end]]

    def times_of(self, user: str) -> list[int] | None:
        """Seconds of the events of `history_of`; None where the data set has only an order.

        Raises:
            DataError: No such user.
        """
        start, end = self._events_of(user)
        if "timestamps" not in self.dataset.fields:
            return None
        return [int(second) for second in self.dataset.column("timestamp")[start:end]]

    def _events_of(self, user: str) -> tuple[int, int]:
        number = self.dataset.user_id_of(user)
        start, end = self.dataset.user_offsets[number : number + 2]
        return int(start), int(end)

    @property
    def reads(self) -> frozenset[str]:
        """Fields the system cannot do without, besides the items of a history."""
        encoder = getattr(self.system, "encoder", None) or self.system
        return frozenset(getattr(encoder, "uses", ()))

    def _encode_all(
        self,
        histories: Sequence[Sequence[str]],
        on_unknown: str,
        times: Sequence[Sequence[int]] | None,
        at: int | None,
    ) -> list[_History]:
        reads = self.reads
        if "timestamps" in reads and times is None:
            raise DataError(
                f"{self.name} reads when the events of a history happened (timestamps)",
                found="histories without times",
                expected="seconds for every event",
                remedy="give `times`, on the command line --times SECONDS,SECONDS,..; or train with encoder.time: none",
            )
        if "target_timestamps" in reads and at is None:
            raise DataError(
                f"{self.name} answers for a moment in time (target_timestamps)",
                found="no time of the question",
                expected="seconds since 1970",
                remedy="give `at`, on the command line --at TIME",
            )
        if times is not None and len(times) != len(histories):
            raise DataError(
                "each history needs its own times", found=f"{len(times)} lists", expected=f"{len(histories)}"
            )
        return [
            self._encode(number, history, on_unknown, None if times is None else times[number])
            for number, history in enumerate(histories)
        ]

    def _encode(self, number: int, history: Sequence[str], on_unknown: str, times: Sequence[int] | None) -> _History:
        ids = self.dataset.item_ids_of([str(item) for item in history]).tolist()
        unknown = [str(item) for item, found in zip(history, ids, strict=True) if not found]
        if unknown and on_unknown == "error":
            raise DataError(
                f"history {number} names items that are not in the catalogue of {self.dataset.meta.name!r}",
                found=", ".join(unknown[:5]),
                expected=f"original item ids, such as {', '.join(self.dataset.item_keys[1:4])}",
                remedy="leave them out (--on-unknown skip) or prepare the data with these items",
            )
        known = [item for item in ids if item]
        if times is None:
            return _History(known)
        _check_times(number, len(ids), times)
        return _History(known, [int(second) for second, item in zip(times, ids, strict=True) if item])

    def _check_empty(self, encoded: list[_History], on_empty: str) -> None:
        empty = [number for number, history in enumerate(encoded) if not history.items]
        if empty and on_empty == "error":
            raise DataError(
                f"history {empty[0]} is empty",
                expected="at least one item of the catalogue",
                remedy="give a history, or ask for the most popular items (--on-empty popular)",
            )

    def _rank(
        self, histories: list[_History], k: int, allow_seen: bool | None, at: int | None
    ) -> list[list[tuple[int, float]]]:
        from llmrec.blocks.readout import ranked_rows

        allow = self.dataset.meta.has_repeats if allow_seen is None else allow_seen
        batch = self._batch(histories, at)
        if allow:
            batch.pop("seen", None)
        return ranked_rows(self.system, batch, k)

    def _batch(self, histories: list[_History], at: int | None, candidates: list[Any] | None = None) -> Any:
        """What the system reads; times are in it where they are known."""
        from llmrec.data.sequences import SequenceCollator

        rows = [self._row(history, at) for history in histories]
        if not hasattr(self.system, "collate"):
            return SequenceCollator(with_seen=True)(rows)
        if candidates is not None:
            rows = [{**row, "candidates": pool} for row, pool in zip(rows, candidates, strict=True)]
        return self.system.collate(rows)

    def _row(self, history: _History, at: int | None) -> dict[str, Any]:
        import numpy as np

        whole = np.asarray(history.items, dtype=np.int64)
        window = whole[-self.max_history :]
        row = {"user_id": 0, "example_id": 0, "item_ids": window, "targets": np.zeros_like(window), "seen": whole}
        if history.times is not None:
            row["timestamps"] = np.asarray(history.times, dtype=np.int64)[-self.max_history :]
        if at is not None:
            row["target_timestamp"] = at
        return row

    def _describe(self, item: int, score: float, history: list[int], reasons: int) -> Recommendation:
        return Recommendation(
            self.dataset.item_keys[item], self.dataset.item_titles[item], score, self._reasons(item, history, reasons)
        )

    def _reasons(self, item: int, history: list[int], count: int) -> tuple[Reason, ...]:
        import numpy as np

        if not count or not history or self._vectors is None:
            return ()
        unique = np.array(sorted(set(history) - {item}), dtype=np.int64)
        if not unique.size:
            return ()
        vectors = self._vectors / np.maximum(np.linalg.norm(self._vectors, axis=1, keepdims=True), 1e-12)
        similarity = vectors[unique] @ vectors[item]
        nearest = np.argsort(-similarity, kind="stable")[:count]
        shared = self._shared_users(item, [int(unique[n]) for n in nearest])
        return tuple(
            Reason(self.dataset.item_keys[unique[n]], self.dataset.item_titles[unique[n]], float(similarity[n]), count)
            for n, count in zip(nearest, shared, strict=True)
        )

    def _shared_users(self, item: int, others: list[int]) -> list[int | None]:
        """Users of the training data with `item` and each of the others; None where no events are at hand."""
        import numpy as np

        from llmrec.data.catalogue import ItemCatalogue

        if isinstance(self.dataset, ItemCatalogue):
            return [None] * len(others)
        users, items = self.dataset.context().train_edges
        with_item = np.unique(users[items == item])
        return [int(np.isin(np.unique(users[items == other]), with_item).sum()) for other in others]


def _check_times(number: int, events: int, times: Sequence[int]) -> None:
    if len(times) != events:
        raise DataError(
            f"history {number}: every event needs its time", found=f"{len(times)} times", expected=f"{events}"
        )
    for place in range(1, events):
        if times[place] < times[place - 1]:
            raise DataError(
                f"history {number}: events must be oldest first",
                found=f"time {times[place]} of event {place + 1} after {times[place - 1]}",
                expected="times that never fall",
                remedy="sort the history by time",
            )


def load_run_recipe(run: RunDir) -> Recipe:
    """The resolved recipe of a run.

    Raises:
        CheckpointError: The folder is not a run.
    """
    from llmrec.recipe import load_recipe

    if not run.recipe.is_file():
        raise CheckpointError(
            f"{run.root} is not a run: it has no {run.recipe.name}. `llmrec train RECIPE --out {run.root}` makes one"
        )
    return load_recipe(run.recipe)


def load_system(
    run: RunDir, recipe: Recipe, dataset: InteractionDataset, system: System = "auto"
) -> tuple[Any, str, Any]:
    """The system of a run: (recommender, its name, its encoder or None).

    Raises:
        CheckpointError: The asked part was not trained yet, or the data set is another one.
    """
    if recipe.describes:
        raise RecipeError(
            f"{run.root} taught a model to describe pictures; it ranks nothing. Its model writes texts of items: "
            f"llmrec summarize DIR --items item_vision --model {run.model} --out FOLDER"
        )
    check_dataset(run, recipe, dataset)
    encoder = load_encoder(run.encoder, recipe) if (run.encoder / "config.json").is_file() else None
    speaks = recipe.head is not None or (recipe.llm is not None and recipe.prompt is not None)
    wants_model = system == "model" or (system == "auto" and speaks)
    if not wants_model:
        if encoder is None or recipe.encoder is None:
            raise CheckpointError(f"{run.root}: no trained encoder in {run.encoder.name}/; train the recipe first")
        return encoder, part_name(recipe.encoder.type), encoder
    if recipe.head is not None:
        return load_head(run, recipe), system_name(recipe), encoder
    if not (run.model / "recommender.json").is_file():
        raise CheckpointError(f"{run.root}: no trained model in {run.model.name}/; train the recipe to its end first")
    from llmrec.llm.recommender import LLMRecommender

    titles, questions = None, {}
    base, tokenizer, processor = load_base_model(recipe)
    if recipe.prompt is not None and recipe.prompt.style == "yes_no":
        questions = question_parts(recipe, dataset, tokenizer, processor)
    elif recipe.prompt is not None and recipe.prompt.reads_titles:
        from llmrec.data.item_text import title_texts

        titles = title_texts(dataset)
    codes = load_codes(run, recipe) if recipe.prompt is not None and recipe.prompt.style == "item_codes" else None
    loaded: Any = LLMRecommender.from_pretrained(
        run.model, base, encoder, tokenizer=tokenizer, titles=titles, item_tokenizer=codes, **questions
    )
    return loaded, system_name(recipe), encoder


def load_base_model(recipe: Recipe) -> tuple[Any, Any, Any]:
    """The recipe's language model, tokenizer and, where it reads pictures, processor.

    Weights have the same type in training and afterwards.
    """
    llm, prompt = recipe.llm, recipe.prompt
    assert llm is not None
    options: dict[str, Any] = {
        "dtype": llm.dtype, "quantize": llm.quantize, "revision": llm.revision, "num_layers": llm.num_layers,
    }  # fmt: skip
    if prompt is not None and prompt.pairs is not None and prompt.pairs.pictures:
        from llmrec.llm.vision import load_vision_model

        model, processor = load_vision_model(llm.model, **options)
        return model, processor.tokenizer, processor
    from llmrec.llm.loading import load_language_model

    return *load_language_model(llm.model, **options), None


def tuner_options(recipe: Recipe, model: Any) -> dict[str, Any]:
    """Options of the recipe's tuner for a base model: in one that reads pictures, layers of the vision tower stay out.

    Names of layers, "all-linear" and no names become a pattern of the language model's layers, unless
    `prompt.pairs.tune_vision` lets the adapter in; a pattern stays what it is.
    """
    assert recipe.tuner is not None
    options = dict(recipe.tuner.options)
    pairs = None if recipe.prompt is None else recipe.prompt.pairs
    names = options.get("target_modules")
    if pairs is None or not pairs.pictures or pairs.tune_vision or (isinstance(names, str) and names != "all-linear"):
        return options
    from llmrec.llm.vision import language_targets

    return {
        **options,
        "target_modules": language_targets(model, None if names is None or isinstance(names, str) else names),
    }


def question_parts(
    recipe: Recipe, dataset: InteractionDataset, tokenizer: Any, processor: Any = None
) -> dict[str, Any]:
    """What `LLMRecommender.build` takes for style yes_no: {"renderer": ..., "pictures": ...}.

    Raises:
        CheckpointError: The summaries are of another data set.
        DataError: There are no summaries, or no pictures.
    """
    from llmrec.llm.rendering import pair_encoder

    pairs = recipe.prompt.pairs if recipe.prompt is not None else None
    given: dict[str, Any] = {}
    pictures = None
    if pairs is not None and pairs.summaries is not None:
        from llmrec.data.summaries import read_summaries

        summaries = read_summaries(pairs.summaries, dataset)
        given = {"item_texts": summaries.items, "preferences": summaries.by_target(dataset)}
    if pairs is not None and pairs.pictures:
        from llmrec.data.item_images import ItemImages
        from llmrec.llm.pictures import ItemPictures

        pictures = ItemPictures(ItemImages(dataset.items), processor)
        given["image_ids"] = pictures.ids
    return {"renderer": pair_encoder(recipe, dataset, tokenizer, **given), "pictures": pictures}


def load_encoder(folder: Path, recipe: Recipe) -> Any:
    """A saved encoder; the recipe's `type` is imported first, so that a fresh process knows outside encoders."""
    from llmrec import discovery

    if recipe.encoder is None:
        raise CheckpointError(f"{folder}: the recipe has no encoder section")
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"{folder} holds no trained encoder: expected config.json and model.safetensors (no other format is read)"
        )
    encoder = discovery.resolve("encoder", recipe.encoder.type).from_pretrained(folder, use_safetensors=True)  # type: ignore[attr-defined]
    return encoder.eval()


def load_codes(run: RunDir, recipe: Recipe) -> Any:
    """The item tokenizer of a run."""
    from llmrec import discovery

    assert recipe.item_tokenizer is not None
    kind: Any = discovery.resolve("item_tokenizer", recipe.item_tokenizer.type)
    return kind.from_pretrained(run.item_tokenizer)


def load_head(run: RunDir, recipe: Recipe) -> Any:
    """The generative head of a run, its codes compared with those of the item tokenizer beside it.

    Raises:
        CheckpointError: It was not trained yet, or the codes are others; both hashes are named.
    """
    from llmrec import discovery
    from llmrec.heads.base import verify_codes

    assert recipe.head is not None
    if not (run.model / "config.json").is_file() or not (run.model / "model.safetensors").is_file():
        raise CheckpointError(f"{run.root}: no trained head in {run.model.name}/; train the recipe to its end first")
    head: Any = discovery.resolve("head", recipe.head.type).from_pretrained(run.model, use_safetensors=True)  # type: ignore[attr-defined]
    if head.config.item_index_fingerprint is not None and recipe.item_tokenizer is not None:
        verify_codes(str(run.model), head.config, head.codes, head.config.level_sizes)
        tokenizer = load_codes(run, recipe)
        verify_codes(str(run.item_tokenizer), head.config, tokenizer.codes, tokenizer.level_sizes)
    return head.eval()


def part_name(type_name: str) -> str:
    """Short name of a `type`: "sasrec" for sasrec, mypackage.SASRec and parts/mine.py:SASRec alike."""
    return type_name.rpartition(":")[2].rpartition(".")[2].lower()


def system_name(recipe: Recipe) -> str:
    """Short name of what a recipe trains, used for prediction files and tables."""
    if recipe.llm is not None and recipe.prompt is not None:
        return part_name(recipe.tuner.type) if recipe.tuner is not None else "llm"
    if recipe.head is not None:
        return part_name(recipe.head.type)
    assert recipe.encoder is not None
    return part_name(recipe.encoder.type)
