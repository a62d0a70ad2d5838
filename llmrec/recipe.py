"""The recipe: one YAML file that says everything about a run. Unknown keys are errors with file, line and nearest name.

Reading order of a recipe: name, seed, dataset, item_features, item_tokenizer, encoder, llm, tuner, gate, prompt,
head, stages, evaluate, report.
`1e-4` is a float here (plain PyYAML reads text). No inheritance, no interpolation; `--set a.b=c` overrides one value.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from llmrec import discovery
from llmrec.discovery import nearest
from llmrec.errors import RecipeError
from llmrec.redaction import secrets_in


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class PartSpec(BaseModel):
    """A part chosen by name: `type` plus the options of that part (checked by `Recipe.resolve`)."""

    model_config = ConfigDict(extra="allow")
    type: str

    @property
    def options(self) -> dict[str, Any]:
        """Everything but `type`."""
        return dict(self.model_extra or {})


class EncoderSpec(PartSpec):
    """The sequence encoder.

    Args:
        pretrained: Run or encoder folder to take a trained encoder from; no encoder stage is needed then.
    """

    pretrained: str | None = None


class DatasetSpec(_Strict):
    """Raw data and how to prepare it, or a prepared folder.

    Args:
        source: Named data set, file, folder or "synthetic"; or a folder written by `llmrec prepare`.
        format: Source kind; null = recognised by file names.
        options: Options of the synthetic source.
        max_history: The latest events a model sees.
        label: Which actions are positive in pointwise tasks ("rating >= 4"); nothing is dropped. Null reads the column
            "label" of the data set.
    """

    source: str
    format: str | None = None
    name: str | None = None
    min_user_interactions: int = Field(default=1, ge=1)
    min_item_interactions: int = Field(default=1, ge=1)
    positive: str = "all"
    repeats: Literal["keep", "first", "last"] = "keep"
    split: str = "leave_one_out"
    columns: dict[str, str] = {}
    items: list[str] = []
    on_bad_rows: Literal["stop", "quarantine"] = "stop"
    options: dict[str, Any] = {}
    max_history: int = Field(default=50, ge=1)
    label: str | None = None


class ItemFeaturesSpec(_Strict):
    """What an item tokenizer, or a head, knows about the items.

    Args:
        text: Model of the texts: "minilm", a sentence-transformers id or folder, or "llm:NAME" for the mean of a
            language model's last states.
        levels: Level -> item text template; CoFiRec reads category, title and description, others all side by side.
        collaborative: Encoder whose item vectors are one more level: a counting one (als), or a trained one with
            `pretrained`.
        max_tokens: Longest text.
        revision: Hub revision of the text model.
        tokens: Also give heads the first n token ids of the level texts, for a text encoder that learns; 0 = no.
        image: One more level "image": "descriptors" (colours and textures, no model), or a hub id or folder of a
            vision model; null = no. Items without a picture lack the level.
        image_revision: Hub revision of the vision model.
    """

    text: str = "minilm"
    levels: dict[str, str] = {"text": "{title}"}
    collaborative: EncoderSpec | None = None
    max_tokens: int = Field(default=128, ge=1)
    revision: str | None = None
    tokens: int = Field(default=0, ge=0)
    # Left out of the record where unset, so that runs begun before there were such keys go on.
    image: str | None = Field(default=None, min_length=1, exclude_if=lambda value: value is None)
    image_revision: str | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _image_level(self) -> ItemFeaturesSpec:
        if self.image is not None and "image" in self.levels:
            raise ValueError("levels.image: found a text level of that name; expected another, as `image` makes one")
        if self.image_revision is not None and self.image in (None, "descriptors"):
            raise ValueError(f"image_revision: found image: {self.image or 'null'}; expected the hub id of a model")
        return self


class ItemTokenizerSpec(PartSpec):
    """The item tokenizer.

    Args:
        pretrained: Folder of `llmrec tokenize`, or a run, to take fitted codes from; nothing is fitted then.
    """

    pretrained: str | None = None


class LLMSpec(_Strict):
    """The language model.

    Args:
        model: Hub id, local folder, or a name `llmrec pull` knows.
        dtype: "auto" takes bfloat16 where the processor or GPU computes in it.
        quantize: 4-bit or 8-bit base weights (extra `quant`).
        revision: Hub revision.
        num_layers: Keep the first n decoder layers only; null keeps all.
    """

    model: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["4bit", "8bit"] | None = None
    revision: str | None = None
    num_layers: int | None = Field(default=None, ge=1)


class GateSpec(_Strict):
    """Where the expert weights of an instance-wise tuner come from: the frozen encoder, read for every batch."""

    provider: Literal["encoder"] = "encoder"
    freeze: bool = True
    precompute: bool = False


class PairSpec(_Strict):
    """What a question of style yes_no shows; see `llmrec.data.pairs.PairOptions` for the numbers.

    Args:
        summaries: Folder of `llmrec summarize` whose user texts stand in the questions; null = none.
        item_title: How items are named, in histories and as candidates: a template over item columns, such as
            "{title}[ ({release_year})]".
        item_text: More words on the candidate: a template over item columns ("{description}"), or "summary" for the
            item texts of `summaries`; null = none.
        pictures: Show the candidate's picture; takes a vision-language model.
        tune_vision: Let the adapter into the vision tower and the projector as well.
        show_history, max_text_tokens, max_preference_tokens, negatives, negative_kind, loss_on_prompt: As there.
    """

    summaries: str | None = None
    item_title: str = "{title}"
    item_text: str | None = None
    pictures: bool = False
    tune_vision: bool = False
    show_history: int = Field(default=10, ge=0)
    max_text_tokens: int = Field(default=64, ge=1)
    max_preference_tokens: int = Field(default=128, ge=1)
    negatives: int = Field(default=1, ge=0)
    negative_kind: Literal["uniform", "popularity"] = "uniform"
    loss_on_prompt: bool = False


class PromptSpec(_Strict):
    """What the LLM sees.

    Args:
        style: "text" (titles), "hybrid" (titles and projected item vectors), "item_slots" (one vector per item),
            "item_codes" (added tokens for the codes of an item tokenizer), "describe" (the picture of an item; a
            vision-language model learns to describe it, see `llmrec.training.describing`), "yes_no" (a question about
            one candidate, see `llmrec.llm.yes_no`).
        template: File below prompts/, for text, hybrid, describe and yes_no.
        variants: "all" phrasings in turn, or one number.
        candidates: Candidates listed in the prompt, the target included.
        slots: Where hybrid prompts carry item vectors.
        slot_position: hybrid only: an item's vector stands after its title (LLaRA) or before it (ours).
        chat_template: Wrap the prompt in the tokenizer's chat template.
        max_title_tokens: Titles are cut to this many tokens.
        max_length: Longest prompt in tokens; the oldest history items go first.
        curriculum: Hybrid prompts appear with a probability that grows from 0 to 1 over training (LLaRA).
        projector: Shape of the map from item vectors to token slots.
        slot_content: The item-table row; item_slots: the encoder's state or both; hybrid: row and encoder's score.
        residual: item_slots only: add the encoder's own state before scoring.
        instruction, similarity, item_bias, learn_scale: item_slots only, see `llmrec.llm.recommender`; item_codes
            knows instruction.
        tasks: item_codes only: task -> share of the training examples (`llmrec.data.code_tasks`); empty trains windows
            of codes instead.
        beams: item_codes only: width of the beam.
        pairs: yes_no only: what a question shows.
        answer: describe only: what is learned, with item columns in braces ("{categories}"). Pictures of the synthetic
            source also have shape, colour, pattern and lettering.
        held_out: describe only: share of pictures that are measured and not trained on.
        held_out_by: describe only: columns whose equal values stay on one side; none: equal pictures do.
    """

    style: Literal["text", "hybrid", "item_slots", "item_codes", "describe", "yes_no"] = "item_slots"
    template: str | None = None
    variants: Literal["all"] | int = "all"
    candidates: int | None = Field(default=None, ge=2)
    slots: list[Literal["history", "candidates", "user"]] = ["history", "candidates"]
    slot_position: Literal["after", "before"] = "after"
    chat_template: bool = False
    max_title_tokens: int | None = None
    max_length: int | None = None
    curriculum: bool = False
    projector: Literal["linear", "mlp"] = "mlp"
    slot_content: Literal["item", "state", "both", "score"] = "item"
    residual: bool = False
    instruction: str = ""
    similarity: Literal["dot", "cosine"] | None = None
    item_bias: bool = False
    learn_scale: bool = False
    tasks: dict[str, float] = {}
    beams: int = Field(default=20, ge=1)
    pairs: PairSpec | None = Field(default=None, exclude_if=lambda value: value is None)
    answer: str | None = None
    held_out: float = Field(default=0.2, gt=0, lt=1)
    held_out_by: list[str] = []

    @property
    def reads_titles(self) -> bool:
        """Whether asking takes titles: the styles in words."""
        return self.style in ("text", "hybrid", "yes_no")


class StageSpec(BaseModel):
    """One training stage; every other key is a name of transformers.TrainingArguments.

    Args:
        train: Which part learns; "llm" is the whole vision-language model of prompt.style describe.
        strategy: The objective.
        early_stopping_patience: Evaluations without improvement before the stage ends; null = never.
        metric: Validation metric for early stopping and for the best checkpoint.
        eval_users: Validate on this many users, or held-out pictures (seeded draw); null = all.
        max_examples: Train on this many examples (seeded draw); null = all.
        learning_rates: Factors on the learning rate per parameter group: projector, router, head, tuner.
    """

    model_config = ConfigDict(extra="allow")
    train: Literal["encoder", "tuner", "head", "llm"]
    strategy: PartSpec = PartSpec(type="next_item")
    early_stopping_patience: int | None = Field(default=None, ge=1)
    metric: str = "ndcg@10"
    eval_users: int | None = Field(default=None, ge=1)
    max_examples: int | None = Field(default=None, ge=1)
    learning_rates: dict[Literal["projector", "router", "head", "tuner"], float] = {}

    @property
    def training_arguments(self) -> dict[str, Any]:
        """The keys meant for transformers.TrainingArguments, old names replaced by today's."""
        return {RENAMED_ARGUMENTS.get(name, name): value for name, value in (self.model_extra or {}).items()}


RENAMED_ARGUMENTS = {
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Argument names transformers dropped -> today's; accepted with a notice."""


class EvaluateSpec(_Strict):
    """What is measured at the end.

    Args:
        split: Which targets.
        protocol: "full" or "candidates-C" (the target counts).
        candidate_kind: How the C - 1 others are drawn.
        mode: "score" (likelihood or item scores), "generate" (free text) or "pointwise" (logit of each event's action).
        ks: Cut-offs.
        metrics: Metrics the printed table shows; all are stored.
        seeds: Draws of candidates.
        baselines: Counting baselines, and "encoder" for the run's own, measured beside the system on the same examples;
            for mode pointwise item_rate, user_rate and item_user_rate.
        max_users: Measure this many users (seeded draw); null = all. Said in the protocol label.
        slices: Parts of the examples to measure as well, such as "history<=5" or "target_events<=3"
            (`llmrec.evaluation.slices`).
    """

    split: Literal["valid", "test", "test_lapse"] = "test"
    protocol: str = "full"
    candidate_kind: Literal["uniform", "popularity"] = "uniform"
    mode: Literal["score", "generate", "pointwise"] = "score"
    ks: list[int] = [1, 5, 10, 20]
    metrics: list[str] = ["hr@10", "ndcg@10", "mrr@10"]
    seeds: list[int] = [42]
    remove_seen: bool | None = None
    baselines: list[str] = []
    max_users: int | None = Field(default=None, ge=1)
    slices: list[str] = []
    batch_size: int = Field(default=128, ge=1)

    @field_validator("slices")
    @classmethod
    def _one_spelling(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if value and info.data.get("mode") == "pointwise":
            raise ValueError("mode pointwise asks about events, not targets; expected mode score or generate")
        return list(dict.fromkeys(_slice_text(text) for text in value))


def _slice_text(text: str) -> str:
    from llmrec.evaluation.slices import parse_slice

    try:
        return str(parse_slice(text))
    except RecipeError as error:
        raise ValueError(str(error)) from error  # pydantic gathers these; `parse_recipe` adds file and line


class ReportSpec(_Strict):
    """What is written and sent at the end.

    Args:
        title: Headline of the report.
        push_to: Repository of the Hub, OWNER/NAME, that gets the evaluated run; made private where it does not exist.
    """

    title: str | None = None
    push_to: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


class Recipe(_Strict):
    """A whole run, validated. `resolve` also checks that every `type` exists and takes its options."""

    name: str
    seed: int = 42
    dataset: DatasetSpec
    transforms: list[PartSpec] = []
    item_features: ItemFeaturesSpec | None = None
    item_tokenizer: ItemTokenizerSpec | None = None
    encoder: EncoderSpec | None = None
    llm: LLMSpec | None = None
    tuner: PartSpec | None = None
    gate: GateSpec = GateSpec()
    prompt: PromptSpec | None = None
    head: PartSpec | None = None
    summarizer: PartSpec | None = None
    stages: list[StageSpec] = []
    evaluate: EvaluateSpec = EvaluateSpec()
    report: ReportSpec = ReportSpec()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("letters, digits, '.', '_' and '-' only, since it names a folder")
        return value

    def dump(self) -> str:
        """The resolved recipe as YAML.

        Raises:
            RecipeError: It holds a secret; a recipe is stored in every run.
        """
        record = self.model_dump(mode="json")
        _refuse_secrets(record, "recipe", {})
        return yaml.safe_dump(record, sort_keys=False, allow_unicode=True)

    def resolve(self, where: str = "") -> None:
        """Check every `type`, its options and the combination, before any model is loaded.

        Raises:
            RecipeError: Naming the part and what to change.
        """
        prefix = f"{where}: " if where else ""
        for kind in ("encoder", "tuner", "head", "item_tokenizer", "summarizer"):
            part = getattr(self, kind)
            if part is not None:
                discovery.check_options(kind, part.type, part.options, where=prefix)
        for part in self.transforms:
            discovery.check_options("transform", part.type, part.options, where=prefix)
        for stage in self.stages:
            discovery.build("strategy", stage.strategy.type, stage.strategy.options, where=prefix)
        # Values too, before item features are made: that takes minutes.
        if self.item_tokenizer is not None:
            discovery.build("item_tokenizer", self.item_tokenizer.type, self.item_tokenizer.options, where=prefix)
        if self.head is not None:
            head: Any = discovery.resolve("head", self.head.type)
            head.config_class(num_items=1, max_history=self.dataset.max_history, **self.head.options)
        self._check_combination(prefix)

    def _check_combination(self, prefix: str) -> None:
        trained = {stage.train for stage in self.stages}
        if "tuner" in trained and (self.llm is None or self.prompt is None):
            raise RecipeError(f"{prefix}a stage trains the tuner, but there is no `llm` or no `prompt` section")
        if "encoder" in trained and self.encoder is None:
            raise RecipeError(f"{prefix}a stage trains the encoder, but there is no `encoder` section")
        if "head" in trained and self.head is None:
            raise RecipeError(f"{prefix}a stage trains the head, but there is no `head` section")
        if self.tuner is not None and self.llm is None:
            raise RecipeError(f"{prefix}`tuner` needs an `llm` to tune")
        needs_encoder = self.prompt is not None and (
            self.prompt.style == "item_slots" or (self.prompt.style == "hybrid" and bool(self.prompt.slots))
        )
        if self.tuner is not None and self.encoder is None:
            gated = bool(getattr(discovery.resolve("tuner", self.tuner.type), "needs_gates", False))
            needs_encoder = needs_encoder or gated
        if needs_encoder and self.encoder is None:
            raise RecipeError(f"{prefix}item vectors and gates come from an encoder: add an `encoder` section")
        self._check_finished_gates(prefix)
        if self.prompt is not None and self.prompt.reads_titles and self.prompt.template is None:
            raise RecipeError(
                f"{prefix}prompt.style {self.prompt.style!r} needs prompt.template, such as "
                + ("pairwise/movie" if self.prompt.style == "yes_no" else "next_item/movie")
            )
        self._check_pairs(prefix)
        if self.llm is not None and self.llm.quantize and not _importable("bitsandbytes"):
            raise RecipeError(
                f"{prefix}llm.quantize: {self.llm.quantize} needs bitsandbytes; "
                "install it with: pip install 'llmrec[quant]'"
            )
        self._check_pointwise(prefix)
        self._check_describing(prefix)
        self._refuse_idle_sections(prefix)
        self._check_codes(prefix)
        asked_as_it_is = self.prompt is not None and self.prompt.style in ("text", "yes_no")
        if not self.stages and self.encoder is None and self.head is None and not (self.llm and asked_as_it_is):
            raise RecipeError(f"{prefix}nothing to do: add an `encoder` and `stages`")

    @property
    def encoder_positions(self) -> int:
        """Longest input of the encoder: an event is two tokens where actions stand between the items."""
        tokens = 2 if self.encoder is not None and self.encoder.options.get("action_tokens") else 1
        return self.dataset.max_history * tokens

    def _check_finished_gates(self, prefix: str) -> None:
        """A tuner without a router reads expert weights the encoder itself gives, as many as it has experts."""
        if self.tuner is None or self.encoder is None or self.tuner.options.get("router") != "none":
            return
        encoder: Any = discovery.resolve("encoder", self.encoder.type)
        if not hasattr(encoder, "gates"):
            raise RecipeError(
                f"{prefix}tuner.router: found none, but encoder {self.encoder.type!r} gives no expert weights of its "
                "own; expected a router (linear, mlp, resnet1d), or an encoder with `gates` (caseq)"
            )
        tuner: Any = discovery.resolve("tuner", self.tuner.type)
        experts = tuner.configure(self.tuner.options).num_experts
        given = None if self.encoder.pretrained else encoder.config_class(**self.encoder.options)
        count = getattr(given, "num_gates", experts)
        if count != experts:
            raise RecipeError(
                f"{prefix}tuner.num_experts: found {experts}, but encoder {self.encoder.type!r} weighs {count} "
                f"experts; expected num_experts: {count} and a rank r it divides"
            )

    def _check_pairs(self, prefix: str) -> None:
        """Style yes_no judges candidates, and its questions find what they show."""
        prompt = self.prompt
        if prompt is None or prompt.style != "yes_no":
            if prompt is not None and prompt.pairs is not None:
                raise RecipeError(f"{prefix}prompt.pairs: only style yes_no asks about pairs, found {prompt.style}")
            return
        if self.evaluate.protocol == "full" or self.evaluate.mode != "score":
            raise RecipeError(
                f"{prefix}evaluate: style yes_no judges given candidates by score; expected protocol: candidates-21 "
                f"(1 + 20) or another number, and mode: score; found {self.evaluate.protocol}, {self.evaluate.mode}"
            )
        pairs = prompt.pairs or PairSpec()
        if pairs.item_text == "summary" and pairs.summaries is None:
            raise RecipeError(f"{prefix}prompt.pairs.item_text: summary stands in prompt.pairs.summaries; name it")
        if pairs.tune_vision and not pairs.pictures:
            raise RecipeError(f"{prefix}prompt.pairs.tune_vision: no question shows a picture; set pictures: true")

    def _check_codes(self, prefix: str) -> None:
        """Item codes have a reader, a source, and the stage that learns them."""
        speaks = self.prompt is not None and self.prompt.style == "item_codes"
        needs = speaks
        if self.head is not None:
            kind: Any = discovery.resolve("head", self.head.type)
            needs = needs or kind.needs_tokenizer
            if self.llm is not None:
                raise RecipeError(f"{prefix}head and llm exclude each other: one run trains one system")
            if "head" not in {stage.train for stage in self.stages}:
                raise RecipeError(f"{prefix}head {self.head.type!r} would stay untrained: add a stage `train: head`")
        for number, stage in enumerate(self.stages):
            own = stage.train == "head" or (stage.train == "tuner" and speaks)
            if own and (stage.strategy.type != "next_item" or stage.strategy.options):
                raise RecipeError(
                    f"{prefix}stages.{number}.strategy: what writes item codes has its own objective, whose options "
                    f"stand in `{'head' if stage.train == 'head' else 'prompt'}`; remove the strategy"
                )
        if self.prompt is not None and self.prompt.tasks and not speaks:
            raise RecipeError(f"{prefix}prompt.tasks: only style item_codes trains tasks, found {self.prompt.style}")
        if needs and self.item_tokenizer is None:
            speaker = "prompt.style item_codes" if speaks else f"head {self.head.type!r}"  # type: ignore[union-attr]
            raise RecipeError(f"{prefix}{speaker} speaks item codes: add an `item_tokenizer` section, such as rqkmeans")
        if self.item_tokenizer is not None and not needs:
            raise RecipeError(f"{prefix}nothing reads the item codes: add a `head`, or prompt.style: item_codes")
        if self.item_features is not None and self.item_tokenizer is None and self.head is None:
            reader: Any = None
            if self.encoder is not None and not self.encoder.pretrained:
                reader = discovery.resolve("encoder", self.encoder.type)
            if reader is None or not reader.reads_item_features:
                raise RecipeError(
                    f"{prefix}nothing reads `item_features`: add an `item_tokenizer`, or an encoder that reads them "
                    "(ssr, lightgcn)"
                )
        if self.item_tokenizer is not None and self.item_features is None and self.item_tokenizer.pretrained is None:
            raise RecipeError(
                f"{prefix}an item tokenizer codes what is known of items: add `item_features`, "
                "or item_tokenizer.pretrained: FOLDER"
            )
        collaborative = None if self.item_features is None else self.item_features.collaborative
        if collaborative is not None:
            discovery.check_options("encoder", collaborative.type, collaborative.options, where=prefix)
            encoder: Any = discovery.resolve("encoder", collaborative.type)
            if encoder.trainable and collaborative.pretrained is None:
                raise RecipeError(
                    f"{prefix}item_features.collaborative: encoder {collaborative.type!r} has to be trained; expected "
                    "pretrained: RUN, or a counting encoder such as als"
                )

    @property
    def describes(self) -> bool:
        """Whether the run teaches a vision-language model to describe pictures, and ranks nothing."""
        return self.prompt is not None and self.prompt.style == "describe"

    def _check_describing(self, prefix: str) -> None:
        """Describing pictures takes a model, a question, an answer and one stage that trains the whole model."""
        trained = [stage.train for stage in self.stages]
        if not self.describes:
            given = self.prompt is not None and (self.prompt.answer is not None or bool(self.prompt.held_out_by))
            if "llm" in trained or given:
                raise RecipeError(f"{prefix}`train: llm`, answer and held_out_by belong to prompt.style: describe")
            return
        assert self.prompt is not None
        others = [n for n in ("encoder", "tuner", "head", "item_tokenizer", "item_features") if getattr(self, n)]
        if self.llm is None or trained != ["llm"] or others:
            raise RecipeError(
                f"{prefix}prompt.style describe trains a vision-language model and nothing else: expected `llm`, one "
                f"stage `train: llm`; found {', '.join([*others, *(f'train: {p}' for p in trained)]) or 'no stage'}"
            )
        if self.prompt.template is None or not re.search(r"{\w+}", self.prompt.answer or ""):
            raise RecipeError(
                f"{prefix}prompt.style describe needs prompt.template, such as summarize/item_brief, and prompt.answer "
                "with item columns in braces, such as '{categories}'"
            )
        stage = self.stages[0]
        if stage.metric not in ("described", "named") or stage.strategy != PartSpec(type="next_item"):
            raise RecipeError(
                f"{prefix}stages.0: found metric {stage.metric}; expected metric: described or named, and no strategy: "
                "the objective is the answer"
            )
        if self.llm.quantize:
            raise RecipeError(f"{prefix}llm.quantize: packed weights cannot be trained; remove it")

    def _check_pointwise(self, prefix: str) -> None:
        """Mode pointwise asks an encoder with action tokens about events of both kinds."""
        if self.evaluate.mode != "pointwise":
            return
        if self.llm is not None or self.encoder is None or not self.encoder.options.get("action_tokens"):
            raise RecipeError(
                f"{prefix}evaluate.mode pointwise asks an encoder for logits of actions: "
                "expected no `llm`, and encoder.action_tokens: true"
            )
        if self.dataset.positive != "all":
            raise RecipeError(
                f"{prefix}dataset.positive: found {self.dataset.positive!r}, which drops the negative actions that "
                f"mode pointwise asks about; expected positive: all and dataset.label: {self.dataset.positive!r}"
            )

    def _refuse_idle_sections(self, prefix: str) -> None:
        """Sections this release validates but does not act on yet must not be ignored in silence."""
        idle = [name for name in ("transforms", "summarizer") if getattr(self, name)]
        if idle:
            raise RecipeError(
                f"{prefix}this release does not run {', '.join(idle)} from a recipe yet; remove the section"
            )
        if not self.gate.freeze or self.gate.precompute:
            raise RecipeError(
                f"{prefix}gate: the encoder is frozen and read in the loop; expected freeze: true, precompute: false"
            )

    @staticmethod
    def _check_fields(part: str, uses: frozenset[str], fields: frozenset[str], optional_time: bool = False) -> None:
        needed = {name.removeprefix("target_") for name in uses} - _IN_EVERY_BATCH
        if missing := sorted(needed - fields):
            remedy = "prepare the data with them, or set encoder.time: none" if optional_time else "choose another part"
            raise RecipeError(
                f"{part} reads {', '.join(missing)}, and the data set has "
                f"{', '.join(sorted(fields)) or 'ids and order only'}; {remedy}"
            )

    def check_dataset(self, fields: frozenset[str]) -> None:
        """Check that a prepared data set carries what the parts need.

        Raises:
            RecipeError: Naming the part and the missing field.
        """
        if self.encoder is not None and not self.encoder.pretrained:
            kind: Any = discovery.resolve("encoder", self.encoder.type)
            config = kind.config_class(**self.encoder.options)
            self._check_fields(
                f"encoder {self.encoder.type!r}", kind.fields_read(config), fields, hasattr(config, "time")
            )
        if self.head is not None:
            head: Any = discovery.resolve("head", self.head.type)
            self._check_fields(f"head {self.head.type!r}", head.uses, fields)
        if self.prompt is not None and (self.prompt.reads_titles or self.prompt.tasks) and "titles" not in fields:
            reader = "prompt.tasks" if self.prompt.tasks else f"prompt.style {self.prompt.style!r}"
            raise RecipeError(f"{reader} needs item titles, and the data set has none")


_IN_EVERY_BATCH = frozenset({"item_ids", "lengths", "user_ids", "example_ids", "targets", "seen"})


def _importable(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a float and refuses duplicate keys, keys that are no plain value, and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            # A recipe says everything in its place; an alias could also contain itself or grow without bound.
            place = f"{self.name}:{event.start_mark.line + 1}"
            raise RecipeError(f"{place}: alias *{event.anchor}: write the value out here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            place = f"{self.name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{place}: a key must be a name, found a {key_node.id}")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise RecipeError(f"{place}: key {key!r} stands here a second time")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def part_seed(seed: int, part: str) -> int:
    """Seed of one part of a run (encoder, item_tokenizer, stage-1, ...), from the recipe's seed and the part's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{part}".encode()).digest()[:4], "little")


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe file.

    Args:
        path: YAML file.
        overrides: `a.b=value` texts; list positions are numbers (`stages.0.learning_rate=1e-3`).

    Raises:
        RecipeError: With file:line, what was found and the nearest known name.
    """
    raw, lines = read_recipe(path, overrides)
    if "sweep" in raw:
        raise RecipeError(f"{path}: holds a sweep, which is many runs; start it with: llmrec plan --sweep {path}")
    return parse_recipe(raw, where=str(path), lines=lines)


def read_recipe(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[tuple[Any, ...], int | str]]:
    """Plain values of a recipe file with its overrides, and the line of each key.

    Raises:
        RecipeError: The file is missing or no YAML mapping, or an override has no place.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no recipe {path}; `llmrec list recipes` shows those that come with the package")
    try:
        raw, node = _load_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected keys and values, found {type(raw).__name__}")
    lines = _key_lines(node)
    for override in overrides:
        place = apply_override(raw, override)
        lines = {known: line for known, line in lines.items() if known[: len(place)] != place}
        lines[place] = f"--set {override}"
    return raw, lines


def _load_yaml(text: str, name: str) -> tuple[Any, Any]:
    """The value and the node tree of a YAML text; `name` starts the messages."""
    loader = None
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        return (loader.construct_document(node) if node is not None else None), node
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # a character YAML forbids, or a date that does not exist
        raise RecipeError(f"{name}: not valid YAML: {str(error).partition(chr(10))[0]}") from error
    except RecursionError as error:
        raise RecipeError(f"{name}: nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def parse_recipe(
    raw: dict[str, Any], *, where: str = "recipe", lines: dict[tuple[Any, ...], int | str] | None = None
) -> Recipe:
    """Validate a recipe given as plain values.

    Raises:
        RecipeError: See `load_recipe`; also a value that is a secret.
    """
    _refuse_secrets(raw, where, lines or {})
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(item, where, lines or {}) for item in error.errors())) from error


def _refuse_secrets(raw: Any, where: str, lines: dict[tuple[Any, ...], int | str]) -> None:
    for place, kind in secrets_in(raw):
        known = next((place[:n] for n in range(len(place), -1, -1) if place[:n] in lines), None)
        line = None if known is None else lines[known]
        named = ".".join(map(str, place))
        source = "--set" if isinstance(line, str) else f"{where}:{line}" if line else where
        raise RecipeError(
            f"{source}: {named or 'a key'} holds a secret ({kind}); recipes are stored in runs and published. "
            "Remove it: tokens of the Hub come from HF_TOKEN or `hf auth login`, others from the environment"
        )


def _key_lines(node: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int | str]:
    found: dict[tuple[Any, ...], int | str] = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found.update(_key_lines(value, (*path, key.value)))
            found[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            found.update(_key_lines(value, (*path, number)))
    return found


def apply_override(raw: dict[str, Any], override: str) -> tuple[Any, ...]:
    """Put the value of an `a.b=value` text into plain values; returns the keys of its place.

    Raises:
        RecipeError: The text has no value, or the place does not exist.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"--set {override}: expected a.b=value")
    value, _ = _load_yaml(text, f"--set {override}")
    *sections, last = dotted.split(".")
    place: Any = raw
    keys: list[Any] = []
    for part in sections:
        keys.append(_key_in(place, part, override))
        if isinstance(place, dict) and place.get(keys[-1]) is None:
            place[keys[-1]] = {}
        place = place[keys[-1]]
        if not isinstance(place, dict | list):
            raise RecipeError(f"--set {override}: {part!r} is a value, not a section")
    keys.append(_key_in(place, last, override))
    place[keys[-1]] = value
    return tuple(keys)


def _key_in(place: dict[str, Any] | list[Any], part: str, override: str) -> str | int:
    if isinstance(place, dict):
        return part
    if not part.isdecimal() or int(part) >= len(place):
        raise RecipeError(f"--set {override}: the list has {len(place)} entries, {part!r} is not one of them")
    return int(part)


def _explain(item: Any, where: str, lines: dict[tuple[Any, ...], int | str]) -> str:
    loc = tuple(item["loc"])
    known = loc
    while known and known not in lines:
        known = known[:-1]
    line = lines.get(known)
    place = line if isinstance(line, str) else f"{where}:{line}" if line else where
    name = ".".join(map(str, loc))
    if item["type"] == "extra_forbidden":
        siblings = _field_names(loc[:-1])
        return f"{place}: unknown key {name!r}{nearest(str(loc[-1]), siblings)}; keys here: {', '.join(siblings)}"
    if item["type"] == "missing":
        return f"{place}: key {name!r} is missing"
    return f"{place}: {name}: {item['msg']}; found {item['input']!r}"


def _field_names(loc: tuple[Any, ...]) -> list[str]:
    model: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model is not None else None
        model = _model_in(field.annotation) if field is not None else None
    return list(model.model_fields) if model is not None else []


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is not None:
        return next((model for inner in get_args(annotation) if (model := _model_in(inner)) is not None), None)
    return None
