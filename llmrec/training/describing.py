"""Teaching a vision-language model to describe the pictures of a catalogue (`prompt.style: describe`).

    (picture, question, answer): "Describe the picture." -> "star blue"

An example is an item with a picture whose answer template can be filled from its columns. Only the answer and the
end-of-text token are learned. Pictures with equal values of `prompt.held_out_by` (equal bytes where none are named)
stay together: either all are trained on or none, so held-out pictures show combinations that were never seen. Measured
on these by greedy generation: `described`, the share of descriptions that name every wanted word, and `named`, the
share of wanted words that are named. RUN/model becomes a plain folder of transformers that `load_vision_model` reads.

Ours, from no paper: MLLM-MSR and its like start from pretrained models; this makes one that can be had anywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.data.dataset import InteractionDataset
from llmrec.data.item_images import ItemImages
from llmrec.data.item_text import level_texts
from llmrec.data.prompts import PromptTemplate
from llmrec.data.sources.looks import look_of
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.evaluation.intervals import bootstrap_means
from llmrec.evaluation.shards import ranks, wait_for_all
from llmrec.llm.generating import Reply, Request, TransformersGenerator
from llmrec.llm.vision import IGNORED, VisionPrompt, count_features, encode_prompts, load_vision_model, to_model
from llmrec.run_dir import write_json
from llmrec.strategies.next_item import NextItem
from llmrec.training.trainer import train_stage

if TYPE_CHECKING:
    from llmrec.recipe import Recipe, StageSpec
    from llmrec.training.stages import Run

DESCRIBED, NAMED = "described", "named"
_LOOKS = ("shape", "colour", "pattern", "lettering")
_SPARE_TOKENS = 4  # room behind the longest answer, so that a wrong one is not cut into a right one
_BATCH = 64


@dataclass(frozen=True)
class PictureExample:
    """A picture with its description.

    Args:
        item: Item id.
        picture: Encoded.
        answer: The description to learn.
        wanted: What a description must name.
    """

    item: int
    picture: bytes
    answer: str
    wanted: tuple[str, ...]


class PictureExamples:
    """Examples by position, decoded when they are collated."""

    def __init__(self, examples: Sequence[PictureExample]) -> None:
        self._examples = list(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> PictureExample:
        return self._examples[index]

    def subset(self, positions: np.ndarray) -> PictureExamples:
        """The examples at these positions."""
        return PictureExamples([self._examples[position] for position in positions.tolist()])


class PictureCollator:
    """Examples -> one batch of tokens, labels and pixels.

    Args:
        processor: Of the model.
        question: What stands behind every picture.
        max_length: Longest row in tokens; None takes any.
    """

    def __init__(self, processor: Any, question: str, max_length: int | None = None) -> None:
        self.processor, self.question, self.max_length = processor, question, max_length

    def __call__(self, rows: Sequence[PictureExample]) -> dict[str, Tensor]:
        prompts = [VisionPrompt(self.question, (row.picture,)) for row in rows]
        return encode_prompts(self.processor, prompts, [row.answer for row in rows], max_length=self.max_length)


class PictureDescriber(nn.Module):
    """A vision-language model as something the training loop takes: an `AnswerModel`.

    Args:
        model: An image-text-to-text model of transformers; all its weights train.
        processor: Its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor

    def answer_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the answer tokens; output logits are computed from the first of them on."""
        inputs = to_model(batch, self.model)
        labels = inputs.pop("labels")
        first = int((labels != IGNORED).any(dim=0).nonzero()[0])
        kept = labels.shape[1] - first + 1
        logits = self.model(**inputs, use_cache=False, logits_to_keep=kept).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, first:].flatten(), ignore_index=IGNORED)

    def describe(self, pictures: Sequence[bytes], question: str, max_new_tokens: int) -> list[str]:
        """Greedy descriptions; a picture the model says nothing about gets an empty one."""
        writer = TransformersGenerator(self.model, self.processor, max_new_tokens=max_new_tokens, batch_size=_BATCH)
        answers = writer.generate([Request(question, (picture,)) for picture in pictures])
        return [answer.text if isinstance(answer, Reply) else "" for answer in answers]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and processor as transformers does, so that any of its users can load them."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def picture_examples(recipe: Recipe, dataset: InteractionDataset) -> tuple[PictureExamples, PictureExamples]:
    """(trained on, held out) of the items that have a picture and every field of the answer.

    Raises:
        RecipeError: The answer or `held_out_by` names an unknown column, or one side is empty.
    """
    prompt = recipe.prompt
    assert prompt is not None and prompt.answer is not None
    fields = list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(prompt.answer) if name))
    known = _with_looks(recipe, dataset)
    answers = level_texts(known, prompt.answer)
    values = {name: level_texts(known, f"{{{name}}}") for name in {*fields, *prompt.held_out_by}}
    pictures = ItemImages(known.items)
    sides: tuple[list[PictureExample], list[PictureExample]] = ([], [])
    for item in np.flatnonzero(pictures.mask).tolist():
        wanted = tuple(values[name][item] for name in fields)
        picture = pictures.data(item)
        if picture is None or not all(wanted):
            continue
        key = [values[name][item] for name in prompt.held_out_by] or [hashlib.sha256(picture).hexdigest()]
        side = _is_held_out(recipe.seed, key, prompt.held_out)
        sides[side].append(PictureExample(item, picture, answers[item], wanted))
    for chosen, what in zip(sides, ("train on", "hold out"), strict=True):
        if not chosen:
            raise RecipeError(
                f"prompt: there are no pictures to {what} ({len(sides[0])} to train on, {len(sides[1])} held out); "
                f"expected items with a picture and {', '.join(fields)}, and a share prompt.held_out that leaves both"
            )
    return PictureExamples(sides[0]), PictureExamples(sides[1])


def _is_held_out(seed: int, key: Sequence[str], share: float) -> bool:
    digest = hashlib.sha256(repr((seed, list(key))).encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


def _with_looks(recipe: Recipe, dataset: InteractionDataset) -> InteractionDataset:
    """Drawn items know what was drawn; it is added here alone, so that no text of an item ever shows it."""
    options = recipe.dataset.options
    if recipe.dataset.source != "synthetic" or not options.get("visual_taste"):
        return dataset
    looks = [look_of(int(key[1:]), int(options.get("seed", 0))) for key in dataset.item_keys[1:]]
    stored = ItemImages(dataset.items).data(1)
    if stored != looks[0].draw():
        raise DataError("the pictures are not those of dataset.options.seed", expected="the data set of this recipe")
    items = dataset.items
    for name in _LOOKS:
        items = items.append_column(name, pa.array([getattr(look, name) for look in looks], pa.string()))
    return dataclasses.replace(dataset, items=items)


def question_of(recipe: Recipe) -> str:
    """The question of a recipe: its prompt file, filled as the summarizer `item_vision` fills it by default."""
    prompt = recipe.prompt
    assert prompt is not None and prompt.template is not None
    template = PromptTemplate.load(prompt.template)
    values = {"noun": "item", "known": "", "again": False}
    variant = template.variants[0] if prompt.variants == "all" else prompt.variants
    return template.render(variant, **{name: values.get(name, "") for name in template.variables})


def words_named(description: str, wanted: Sequence[str]) -> float:
    """Share of the words in `wanted` that a description names, whatever the letter case."""
    said = set(re.findall(r"\w+", description.lower()))
    words = {word for value in wanted for word in re.findall(r"\w+", value.lower())}
    return len(words & said) / max(1, len(words))


def judge(
    describer: PictureDescriber, examples: PictureExamples, question: str, longest: int
) -> tuple[list[str], np.ndarray]:
    """Descriptions of pictures, and [n, 2]: whether each names everything wanted, and the share it names."""
    rows = [examples[i] for i in range(len(examples))]
    told = describer.describe([row.picture for row in rows], question, longest)
    shares = np.array([words_named(text, row.wanted) for text, row in zip(told, rows, strict=True)])
    return told, np.stack([(shares == 1).astype(np.float64), shares], axis=1)


def run_describing(run: Run) -> dict[str, Any]:
    """Train and measure what a recipe with `prompt.style: describe` asks for.

    Args:
        run: The recipe with its folder and prepared data set.

    Returns:
        The record of the held-out pictures, also in RUN/metrics.json; descriptions are in evaluations/described/.

    Raises:
        RecipeError: There is nothing to train on, or to measure with.
        CheckpointError: Placeholders and image features of the model differ.
    """
    recipe = run.recipe
    assert recipe.llm is not None
    spec, stage = recipe.llm, recipe.stages[0]
    train, held_out = picture_examples(recipe, run.dataset)
    question = question_of(recipe)
    model, processor = load_vision_model(
        spec.model, spec.dtype, revision=spec.revision, num_layers=spec.num_layers, device=run.device
    )
    describer = PictureDescriber(model, processor)
    collator = PictureCollator(processor, question, recipe.prompt.max_length if recipe.prompt else None)
    _check_placeholders(model, collator([train[0]]))
    run.say(f"pictures: {len(train):,} to train on, {len(held_out):,} held out; question: {question}")
    longest = _longest(processor, [*train._examples, *held_out._examples])
    train_stage(
        describer, NextItem(), _drawn(run, stage.max_examples, train, "examples"), collator,
        stage=stage, output_dir=run.folder.stage(1, stage.train), seed=run.seed_of("stage-1"),
        context=run.dataset.context(), evaluate=_validation(run, describer, held_out, question, longest),
        identity=_identity(run, stage, processor, question), resume=run.resume, force=run.force,
    )  # fmt: skip
    describer.eval()
    if ranks().is_first:
        describer.save_pretrained(run.folder.model)
    wait_for_all()
    return _measure(run, describer, held_out, question, longest)


def descriptions_table(record: Mapping[str, Any], metrics: Sequence[str] | None = None) -> Any:
    """A record of `run_describing` as a table of rich; `metrics` are the rows, by default all."""
    from rich.table import Table

    table = Table(caption=f"descriptions of {record['pictures']} held-out pictures, 95% intervals")
    for title in ("metric", "mean", "low", "high"):
        table.add_column(title)
    for name in record["metrics"] if metrics is None else [name for name in metrics if name in record["metrics"]]:
        found = record["metrics"][name]
        table.add_row(name, *(f"{found[part]:.4f}" for part in ("mean", "low", "high")))
    return table


def _check_placeholders(model: Any, batch: dict[str, Tensor]) -> None:
    placeholders, features = count_features(model, batch)
    if placeholders != features or not features:
        raise CheckpointError(
            f"the processor writes {placeholders} placeholders for a picture, the model makes {features} features; "
            "expected as many. Processor and model do not belong together"
        )


def _identity(run: Run, stage: StageSpec, processor: Any, question: str) -> dict[str, str]:
    """What checkpoints belong to; the recipe without what is measured, and the words of the question."""
    record = run.recipe.model_dump(mode="json", exclude={"evaluate", "report", "name"})
    text = repr(sorted(record.items())) + question
    return {
        "dataset": run.dataset.fingerprint,
        "recipe": hashlib.sha256(text.encode()).hexdigest()[:16],
        "vocabulary": hashlib.sha256(repr(sorted(processor.tokenizer.get_vocab().items())).encode()).hexdigest()[:16],
    }


def _longest(processor: Any, examples: Sequence[PictureExample]) -> int:
    """New tokens a description may have."""
    texts = sorted({example.answer for example in examples})
    return max(len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]) + _SPARE_TOKENS


def _drawn(run: Run, count: int | None, examples: PictureExamples, what: str) -> PictureExamples:
    """All examples, or a seeded draw of them."""
    if count is None or count >= len(examples):
        return examples
    order = np.random.default_rng(run.seed_of(f"describe-{what}")).permutation(len(examples))
    return examples.subset(np.sort(order[:count]))


def _validation(
    run: Run, describer: PictureDescriber, held_out: PictureExamples, question: str, longest: int
) -> Callable[[], dict[str, float]]:
    shown = _drawn(run, run.recipe.stages[0].eval_users, held_out, "validation")

    def evaluate() -> dict[str, float]:
        means = judge(describer, shown, question, longest)[1].mean(axis=0)
        return {DESCRIBED: float(means[0]), NAMED: float(means[1])}

    return evaluate


@torch.no_grad()
def _measure(
    run: Run, describer: PictureDescriber, held_out: PictureExamples, question: str, longest: int
) -> dict[str, Any]:
    """All held-out pictures described; the texts as Parquet, the shares with 95% intervals as JSON."""
    import pyarrow.parquet as pq

    run.say(f"describing {len(held_out):,} held-out pictures")
    told, found = judge(describer, held_out, question, longest)
    intervals = bootstrap_means(found, run.recipe.seed)
    record: dict[str, Any] = {
        "pictures": len(held_out),
        "question": question,
        "metrics": {name: interval.to_dict() for name, interval in zip((DESCRIBED, NAMED), intervals, strict=True)},
        "seed": run.recipe.seed,
    }
    if ranks().is_first:
        folder = run.folder.evaluation(DESCRIBED)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [held_out[i] for i in range(len(held_out))]
        columns = {
            "item": [run.dataset.item_keys[row.item] for row in rows],
            "answer": [row.answer for row in rows],
            "description": told,
            NAMED: found[:, 1],
        }
        pq.write_table(pa.table(columns), folder / "descriptions.parquet")
        write_json(run.folder.metrics, record)
    wait_for_all()
    return record
