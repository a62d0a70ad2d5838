"""Runs a recipe: data set, encoder, stages, models, evaluation. Each step leaves a folder; a rerun skips what is done.

`llmrec train` is a thin shell around `run_recipe`. Randomness fans out from the recipe's seed: part n of the run
(encoder weights, adapter weights, stage n) starts from its own seed, so that adding a stage changes no earlier one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from llmrec import discovery
from llmrec.data.catalogue import item_index
from llmrec.data.dataset import InteractionDataset
from llmrec.data.item_text import title_texts
from llmrec.data.labels import event_labels, labelled_windows
from llmrec.data.sequences import SequenceCollator, prefix_examples
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.evaluation.evaluator import EvalResult, Evaluator, results_record
from llmrec.evaluation.pointwise import rate_results
from llmrec.evaluation.protocol import EvalProtocol, parse_protocol
from llmrec.evaluation.shards import ranks, wait_for_all
from llmrec.evaluation.slices import slices_record
from llmrec.llm.loading import name_processor_to_deepspeed, own_device
from llmrec.recipe import EvaluateSpec, Recipe, StageSpec, part_seed
from llmrec.recommender import (
    load_base_model,
    load_encoder,
    load_run_recipe,
    part_name,
    question_parts,
    system_name,
    tuner_options,
)
from llmrec.run_dir import RunDir, write_json, write_text
from llmrec.training.item_codes import (
    FIT,
    fit_item_tokenizer,
    load_item_tokenizer,
    make_item_features,
    make_text_tokens,
)
from llmrec.training.trainer import StageResult, train_stage

if TYPE_CHECKING:
    from llmrec.data.schema import ItemFeatures
    from llmrec.item_tokenizers.base import ItemTokenizer

Say = Callable[[str], None]


@dataclass
class Run:
    """A recipe at work: its folder, data set and parts.

    Args:
        recipe: What to do.
        folder: Where everything goes.
        dataset: The prepared data set.
        say: Told what happens, one line at a time.
        resume: "auto" goes on where an earlier run stopped, "never" trains anew.
        force: Go on although checkpoints belong to another recipe or data set.
        encoder: The sequence encoder once it exists.
        model: The LLM recommender or head once it exists.
        features: Feature levels of the items once they were made.
        item_tokenizer: The fitted item tokenizer once it exists.
        stages: Results of the stages.
    """

    recipe: Recipe
    folder: RunDir
    dataset: InteractionDataset
    say: Say
    resume: Literal["auto", "never"] = "auto"
    force: bool = False
    encoder: Any = None
    model: Any = None
    features: ItemFeatures | None = None
    item_tokenizer: ItemTokenizer | None = None
    stages: list[StageResult] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where models live: the accelerator of this process, or the processor."""
        return own_device()

    def seed_of(self, part: str) -> int:
        """Seed of one part of the run, derived from the recipe's seed and the part's name."""
        return part_seed(self.recipe.seed, part)


def run_recipe(
    recipe: Recipe,
    root: Path,
    *,
    say: Say = print,
    resume: Literal["auto", "never"] = "auto",
    force: bool = False,
    publish: Callable[[Path], object] | None = None,
) -> dict[str, Any]:
    """Do everything a recipe says and return the record of its evaluation.

    Args:
        recipe: A validated recipe.
        root: The run folder; made when missing.
        say: Told what happens.
        resume: See `Run`.
        force: See `Run`.
        publish: Called with the evaluated run where the recipe says report.push_to; `llmrec train` gives it.

    Raises:
        RecipeError: The recipe cannot be run, or the folder belongs to another one.
        DataError: The data cannot be prepared.
        CheckpointError: A checkpoint belongs to something else.
    """
    name_processor_to_deepspeed()
    recipe.resolve()
    if recipe.report.push_to is not None and publish is None:
        raise RecipeError("report.push_to: nothing is published from here; use `llmrec train`, or `llmrec push` later")
    folder = RunDir(root)
    _claim(folder, recipe, resume, force)
    dataset = prepare_dataset(recipe, folder, say)
    recipe.check_dataset(dataset.fields)
    run = Run(recipe, folder, dataset, say, resume, force)
    trained_on = {"dataset_fingerprint": dataset.fingerprint, "item_index": item_index(dataset)}
    folder.write_environment({"seed": recipe.seed, **trained_on})
    if recipe.describes:
        from llmrec.training.describing import run_describing

        return run_describing(run)
    _make_encoder(run)
    _make_item_tokenizer(run)
    for number, stage in enumerate(recipe.stages, start=1):
        run.stages.append(_run_stage(run, number, stage))
    if run.model is None and (recipe.llm is not None and recipe.prompt is not None):
        _make_model(run)  # a run without a tuner stage still measures the untuned model
        run.model.save_pretrained(folder.model)  # type: ignore[attr-defined]
    record = evaluate_run(run, recipe.evaluate)
    if publish is not None and recipe.report.push_to is not None and ranks().is_first:
        publish(root)
    return record


def _claim(folder: RunDir, recipe: Recipe, resume: str, force: bool) -> None:
    """Write recipe.yaml, and refuse a folder that holds something else."""
    text = recipe.dump()
    if folder.recipe.is_file():
        before = load_run_recipe(folder).model_dump(mode="json")
        now = recipe.model_dump(mode="json")
        different = [key for key in now if now[key] != before.get(key) and key not in {"evaluate", "report", "name"}]
        if different and resume == "auto" and not force:
            raise RecipeError(
                f"{folder.root} holds a run of another recipe ({', '.join(different)} differ); "
                "give another --out, or --resume never to train anew"
            )
        if (folder.root / "dataset" / "meta.json").is_file() and {"dataset", "seed"} & set(different):
            raise RecipeError(f"{folder.root} holds data prepared by another recipe; give another --out")
    elif folder.root.is_dir() and any(folder.root.iterdir()):
        names = sorted(path.name for path in folder.root.iterdir())[:5]
        if not set(names) <= {"dataset", "dataset.json"}:
            raise RecipeError(
                f"{folder.root} is not empty and is no run (found {', '.join(names)}); give another --out"
            )
    write_text(folder.recipe, text)


def prepare_dataset(recipe: Recipe, folder: RunDir, say: Say) -> InteractionDataset:
    """The prepared data set of a recipe: an existing folder, or one prepared into the run."""
    from llmrec.data.card import write_folder
    from llmrec.data.prepare import PrepareOptions, prepare_source

    spec = recipe.dataset
    given = Path(spec.source)
    if (given / "meta.json").is_file():
        dataset = InteractionDataset.load(given)
        folder.point_to_dataset(given)
        say(f"data set {dataset.meta.name}: {given} (fingerprint {dataset.fingerprint})")
        return dataset
    if (folder.root / "dataset" / "meta.json").is_file():
        return InteractionDataset.load(folder.root / "dataset")
    options = PrepareOptions(
        min_user=spec.min_user_interactions,
        min_item=spec.min_item_interactions,
        positive=spec.positive,
        repeats=spec.repeats,
        split=spec.split,
        seed=recipe.seed,
        columns=spec.columns,
        items=tuple(Path(path) for path in spec.items),
        name=spec.name,
        format=spec.format,
        on_bad_rows=spec.on_bad_rows,
        source_options=spec.options,
    )
    if spec.options and spec.source != "synthetic":
        raise RecipeError("dataset.options belong to source: synthetic")
    preparation = prepare_source(spec.source, options, report=say)
    write_folder(preparation, folder.root / "dataset")
    dataset = preparation.dataset
    summary = dataset.summary()
    say(
        f"data set {summary['name']}: {summary['users']:,} users, {summary['items']:,} items, "
        f"{summary['interactions']:,} interactions, split {summary['split']} (fingerprint {summary['fingerprint']})"
    )
    for notice in dataset.meta.notes:
        say(f"  {notice}")
    return dataset


def _make_encoder(run: Run) -> None:
    spec = run.recipe.encoder
    if spec is None:
        return
    trains = any(stage.train == "encoder" for stage in run.recipe.stages)
    if spec.pretrained is not None:
        if trains:
            raise RecipeError("encoder.pretrained and a stage that trains the encoder exclude each other")
        run.encoder = _pretrained_encoder(run, Path(spec.pretrained)).to(run.device)
        run.encoder.save_pretrained(run.folder.encoder)
        return
    encoder_class: Any = discovery.resolve("encoder", spec.type)
    if encoder_class.trainable and not trains:
        raise RecipeError(
            f"encoder {spec.type!r} would stay untrained: add a stage `train: encoder`, or encoder.pretrained: FOLDER"
        )
    features = _item_features(run) if encoder_class.reads_item_features else {}
    torch.manual_seed(run.seed_of("encoder"))
    config = encoder_class.config_class(
        num_items=run.dataset.num_items,
        num_users=run.dataset.num_users,
        max_history=run.recipe.encoder_positions,
        dataset_fingerprint=run.dataset.fingerprint,
        **spec.options,
    )
    run.encoder = encoder_class.from_context(config, run.dataset.context(features)).to(run.device)
    if not encoder_class.trainable:
        run.encoder.save_pretrained(run.folder.encoder)


def _pretrained_encoder(run: Run, source: Path) -> Any:
    folder = source / "encoder" if (source / "recipe.yaml").is_file() else source
    encoder = load_encoder(folder, run.recipe)
    found = encoder.config.dataset_fingerprint
    if encoder.config.num_items != run.dataset.num_items or found != run.dataset.fingerprint:
        raise CheckpointError(
            f"{folder}: trained on data set {found} with {encoder.config.num_items:,} items; this run has "
            f"{run.dataset.fingerprint} with {run.dataset.num_items:,}. Train the encoder on this data set"
        )
    run.say(f"encoder {run.recipe.encoder.type} from {source}")  # type: ignore[union-attr]
    return encoder


def _item_features(run: Run) -> ItemFeatures:
    """Feature levels of the items, made once."""
    spec = run.recipe.item_features
    if run.features is None and spec is not None:
        run.say(f"item features: {', '.join([*spec.levels, *(['collaborative'] if spec.collaborative else [])])}")
        run.features = make_item_features(spec, run.dataset, seed=run.seed_of("item_features"), device=run.device)
    return run.features or {}


def _make_item_tokenizer(run: Run) -> None:
    """The item tokenizer: of an earlier attempt, taken over, or fitted now."""
    spec, folder = run.recipe.item_tokenizer, run.folder.item_tokenizer
    if spec is None:
        return
    if spec.pretrained is not None:
        run.item_tokenizer = load_item_tokenizer(spec.type, Path(spec.pretrained), run.dataset)
        run.item_tokenizer.save_pretrained(folder)
        source = Path(spec.pretrained)
        source = source / folder.name if (source / "recipe.yaml").is_file() else source
        write_text(folder / FIT, (source / FIT).read_text(encoding="utf-8"))
        run.say(f"item codes from {spec.pretrained} (fingerprint {run.item_tokenizer.fingerprint})")
        return
    if (folder / FIT).is_file() and run.resume == "auto":  # written last
        run.item_tokenizer = load_item_tokenizer(spec.type, folder, run.dataset)
        return
    if ranks().is_first:
        began = time.monotonic()
        features = _item_features(run)
        fit_item_tokenizer(
            spec, features, run.dataset, folder, seed=run.seed_of("item_tokenizer"), say=run.say,
            seconds_before=time.monotonic() - began,
        )  # fmt: skip
    wait_for_all()
    run.item_tokenizer = load_item_tokenizer(spec.type, folder, run.dataset)


def _make_head(run: Run) -> None:
    """A fresh generative head over the data set and the item codes."""
    recipe = run.recipe
    assert recipe.head is not None
    kind: Any = discovery.resolve("head", recipe.head.type)
    features = dict(_item_features(run)) if kind.reads_item_features else {}
    if kind.reads_item_features and recipe.item_features is not None:
        features |= make_text_tokens(recipe.item_features, run.dataset)
    torch.manual_seed(run.seed_of("head"))
    config = kind.config_class(
        num_items=run.dataset.num_items,
        max_history=recipe.dataset.max_history,
        dataset_fingerprint=run.dataset.fingerprint,
        **recipe.head.options,
    )
    run.model = kind.from_context(config, run.dataset.context(features), run.item_tokenizer).to(run.device)


def _make_model(run: Run) -> None:
    """Base LLM, adapter and projector, fresh."""
    from llmrec.llm.recommender import LLMRecommender

    recipe, prompt = run.recipe, run.recipe.prompt
    assert prompt is not None
    model, tokenizer, processor = load_base_model(recipe)
    rows = int(model.get_input_embeddings().weight.shape[0])
    torch.manual_seed(run.seed_of("tuner"))
    if recipe.tuner is not None:
        tuner: Any = discovery.resolve("tuner", recipe.tuner.type)
        gate_dim = None if run.encoder is None else int(run.encoder.gate_dim)
        model = tuner.attach(model, tuner.configure(tuner_options(recipe, model), gate_dim=gate_dim))
    options: dict[str, Any] = {"style": prompt.style, "max_history": recipe.dataset.max_history}
    if prompt.style == "item_codes":
        options |= {"instruction": prompt.instruction, "tasks": tuple(sorted(prompt.tasks)), "beams": prompt.beams}
    elif prompt.style == "item_slots":
        names = ("projector", "slot_content", "residual", "instruction", "similarity", "item_bias", "learn_scale")
        options |= {name: getattr(prompt, name) for name in names}
    elif prompt.style != "yes_no":
        options |= {name: getattr(prompt, name) for name in ("projector", "curriculum")}
        options |= {"slot_content": prompt.slot_content} if prompt.style == "hybrid" else {}
    run.model = LLMRecommender.build(
        model,
        encoder=run.encoder,
        tokenizer=tokenizer,
        **_writers(run, tokenizer, processor, rows),
        **_codes(run),
        **options,
    ).to(run.device)


def _writers(run: Run, tokenizer: Any, processor: Any, rows: int) -> dict[str, Any]:
    """What writes the prompts of a style in words, as `LLMRecommender.build` takes it."""
    from llmrec.llm.rendering import PromptRenderer

    prompt = run.recipe.prompt
    if prompt is not None and prompt.tasks:
        return {"renderer": _code_tasks(run, tokenizer, rows)}
    if prompt is None or not prompt.reads_titles:
        return {}
    if prompt.style == "yes_no":
        return question_parts(run.recipe, run.dataset, tokenizer, processor)
    return {"renderer": PromptRenderer.from_recipe(run.recipe, run.dataset, tokenizer)}


def _codes(run: Run) -> dict[str, Any]:
    """What the style item_codes is built with besides the others."""
    if run.item_tokenizer is None:
        return {}
    titles = title_texts(run.dataset) if "titles" in run.dataset.fields else None
    return {"item_tokenizer": run.item_tokenizer, "titles": titles}


def _code_tasks(run: Run, tokenizer: Any, rows: int) -> Any:
    """Prompts and answers over words and codes; `rows` are the base model's token embeddings."""
    from llmrec.data.code_tasks import CodeTaskOptions, CodeTasks

    prompt, codes = run.recipe.prompt, run.item_tokenizer
    assert prompt is not None and codes is not None
    options = CodeTaskOptions(
        tasks=dict(prompt.tasks),
        max_history=run.recipe.dataset.max_history,
        max_title_tokens=prompt.max_title_tokens,
        max_length=prompt.max_length,
        variants=prompt.variants,
        chat_template=prompt.chat_template,
    )
    return CodeTasks(
        run.dataset, codes.codes.numpy(), codes.level_sizes, rows, tokenizer, options, seed=run.seed_of("prompts")
    )


def _run_stage(run: Run, number: int, stage: StageSpec) -> StageResult:
    if stage.train == "head" and run.model is None:
        _make_head(run)
    if stage.train == "tuner" and run.model is None:
        _make_model(run)
    part = run.encoder if stage.train == "encoder" else run.model
    prompt = run.recipe.prompt
    prompted = stage.train == "tuner" and prompt is not None and (prompt.reads_titles or bool(prompt.tasks))
    strategy = discovery.build("strategy", stage.strategy.type, stage.strategy.options)
    labelled = "labels" in strategy.uses
    examples, collator = _prompted_data(run, stage) if prompted else _dense_data(run, part, labelled)
    if stage.max_examples is not None and stage.max_examples < len(examples):
        chosen = np.random.default_rng(run.seed_of(f"stage-{number}-examples")).permutation(len(examples))
        examples = examples.subset(np.sort(chosen[: stage.max_examples]))
    identity = {
        "dataset": run.dataset.fingerprint,
        "recipe": hashlib.sha256(_identity_text(run.recipe, number).encode()).hexdigest()[:16],
    }
    if run.item_tokenizer is not None:
        identity["item_codes"] = run.item_tokenizer.fingerprint
    result = train_stage(
        part,
        strategy,
        examples,
        collator,
        stage=stage,
        output_dir=run.folder.stage(number, stage.train),
        seed=run.seed_of(f"stage-{number}"),
        context=run.dataset.context(),
        evaluate=_validation(run, part, stage, labelled),
        identity=identity,
        resume=run.resume,
        force=run.force,
    )
    part.eval()
    part.save_pretrained(run.folder.encoder if stage.train == "encoder" else run.folder.model)
    return result


def _identity_text(recipe: Recipe, number: int) -> str:
    """What decides the weights of stage `number`: everything up to it, not evaluation, report or name."""
    record = recipe.model_dump(mode="json", exclude={"evaluate", "report", "name"})
    # Runs begun before there were such keys go on.
    if record["dataset"]["label"] is None:
        del record["dataset"]["label"]
    if record["item_features"] is None:
        del record["item_features"]
    if record["prompt"] is not None and record["prompt"]["style"] != "item_codes":
        del record["prompt"]["tasks"], record["prompt"]["beams"]
    if record["prompt"] is not None:  # only describing reads them, and it has no such stage
        del record["prompt"]["answer"], record["prompt"]["held_out"], record["prompt"]["held_out_by"]
    record["stages"] = record["stages"][:number]
    return repr(sorted(record.items()))


def _dense_data(run: Run, part: Any, labelled: bool) -> tuple[Any, Any]:
    max_history, rule = run.recipe.dataset.max_history, run.recipe.dataset.label
    dense = getattr(part, "supervises", "all") == "all"
    if labelled and dense and getattr(part, "causal", True):
        return labelled_windows(run.dataset, max_history, rule), SequenceCollator()
    if labelled:
        return prefix_examples(run.dataset, "train", max_history, event_labels(run.dataset, rule)), SequenceCollator()
    examples = run.dataset.windows(max_history) if dense else run.dataset.histories("train", max_history)
    return examples, SequenceCollator(with_seen=True)


def _prompted_data(run: Run, stage: StageSpec) -> tuple[Any, Any]:
    if run.recipe.prompt is not None and run.recipe.prompt.tasks:
        from llmrec.data.code_tasks import CodeTaskCollator

        return run.model.tasks, CodeTaskCollator(run.model.tokenizer)
    source = run.model if run.recipe.prompt is not None and run.recipe.prompt.style == "yes_no" else run.model.renderer
    return source.training_data(run.dataset, stage, seed=run.seed_of("prompts"))


def _validation(run: Run, part: Any, stage: StageSpec, labelled: bool) -> Callable[[], dict[str, float]] | None:
    """Validation metrics of a part as it stands, on all users or a seeded draw of them."""
    from llmrec.data.schema import SPLITS

    if not np.any(run.dataset.split_codes == SPLITS.index("valid")):
        return None
    never = stage.training_arguments.get("eval_strategy") == "no"  # and then nobody needs a summary
    known = run.dataset if stage.train == "encoder" or never else _asked_users(run, "valid")
    dataset = _some_users(known, stage.eval_users, run.seed_of("validation"))
    spec = run.recipe.evaluate
    cut = stage.metric.rpartition("@")[2]
    ks = sorted({*spec.ks, int(cut)}) if cut.isdigit() else spec.ks
    seeds = spec.seeds[:1]
    if stage.train == "encoder":
        spec = spec.model_copy(update={"protocol": "full"})  # an encoder can always be asked the harder question
    asked = {"mode": "pointwise", "label_rule": run.recipe.dataset.label} if labelled else {"mode": "score"}
    protocol = _protocol(spec, run.recipe.dataset.max_history, split="valid", seeds=seeds, ks=ks, **asked)

    def evaluate() -> dict[str, float]:
        result = Evaluator(protocol, spec.batch_size, run.device, progress=False).run(part, dataset)
        shown = {stage.metric, *spec.metrics} & set(result.metrics)
        return {name: float(result.metrics[name]["mean"]) for name in sorted(shown)}  # type: ignore[arg-type]

    return evaluate


def _asked_users(run: Run, split: str) -> InteractionDataset:
    """The users that can be asked about: where questions show summaries, those that have one in front of the split."""
    known = getattr(getattr(run.model, "renderer", None), "preferences", None)
    if known is None:
        return run.dataset
    examples = run.dataset.histories(split, 1)  # type: ignore[arg-type]
    targets = zip(examples.users.tolist(), (examples.end - examples.first).tolist(), strict=True)
    users = np.unique(examples.users[[target in known for target in targets]])
    if not len(users):
        raise DataError(
            f"no user has a summary in front of split {split!r}",
            expected="summaries of this split",
            remedy=f"run `llmrec summarize` with --split {split} as well",
        )
    if len(users) == len(np.unique(examples.users)):
        return run.dataset
    keep = np.isin(run.dataset.column("user"), users)
    return run.dataset.with_interactions(
        run.dataset.interactions.filter(keep), f"{len(users):,} users with a summary in front of split {split}"
    )


def _some_users(dataset: InteractionDataset, count: int | None, seed: int) -> InteractionDataset:
    if count is None or count >= dataset.num_users:
        return dataset
    users = np.random.default_rng(seed).permutation(np.arange(1, dataset.num_users + 1))[:count]
    keep = np.isin(dataset.column("user"), users)
    return dataset.with_interactions(dataset.interactions.filter(keep), f"{count:,} users drawn with seed {seed}")


def _protocol(spec: EvaluateSpec, max_history: int, **changes: Any) -> EvalProtocol:
    fields: dict[str, Any] = {
        "split": spec.split, "kind": spec.candidate_kind, "ks": tuple(spec.ks), "remove_seen": spec.remove_seen,
        "mode": spec.mode, "seeds": tuple(spec.seeds), "max_history": max_history,
    }  # fmt: skip
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return parse_protocol(spec.protocol, **{**fields, **changes})


def evaluate_run(run: Run, spec: EvaluateSpec, *, primary: bool = True) -> dict[str, Any]:
    """Measure the run's system and the baselines on the same examples; write predictions, metrics.json and gates.

    Args:
        run: A trained run.
        spec: What to measure.
        primary: Whether this is the recipe's own evaluation, whose record goes to RUN/metrics.json.

    Returns:
        The record of all systems measured under the system's own protocol.
    """
    rule = {"label_rule": run.recipe.dataset.label} if spec.mode == "pointwise" else {}
    protocol = _protocol(spec, run.recipe.dataset.max_history, **rule)
    dataset = _some_users(_asked_users(run, spec.split), spec.max_users, run.recipe.seed)
    evaluator = Evaluator(protocol, spec.batch_size, run.device)
    results: dict[str, EvalResult] = {}
    systems: dict[str, Any] = {}
    if spec.mode == "pointwise":
        results |= rate_results(spec.baselines, dataset, protocol.resolve(dataset), train=run.dataset)
    else:
        systems |= _baselines(run, spec)
    systems[system_name(run.recipe)] = run.model if run.model is not None else run.encoder
    for name, system in systems.items():
        chosen = evaluator
        if spec.mode == "generate" and not hasattr(system, "renderer"):
            # Baselines write no text; they are measured by their scores on the same candidates.
            chosen = Evaluator(
                _protocol(spec, run.recipe.dataset.max_history, mode="score"), spec.batch_size, run.device
            )
        run.say(f"evaluating {name}: {chosen.protocol.label()}")
        results[name] = chosen.run(system, dataset, name=name)
    return _store_evaluation(run, results, primary, dataset, spec.slices)


def _store_evaluation(
    run: Run, results: dict[str, EvalResult], primary: bool, dataset: InteractionDataset, slices: list[str]
) -> dict[str, Any]:
    """Write each protocol's predictions and metrics; the record of the system's own protocol goes to metrics.json."""
    own = results[system_name(run.recipe)]
    record: dict[str, Any] = {}
    for slug in sorted({result.protocol.slug for result in results.values()}):
        group = {name: result for name, result in results.items() if result.protocol.slug == slug}
        folder = run.folder.evaluation(slug)
        merged = {**results_record(group), "evaluation": slug, "seed": run.recipe.seed}
        if slices:  # training events are counted in the whole data set, of which `dataset` can be a draw of users
            merged["slices"] = slices_record(group, slices, dataset, run.dataset.context().train_counts)
        if ranks().is_first:
            for name, result in group.items():
                result.save(folder, name)
            write_json(folder / "metrics.json", merged)
        if slug == own.protocol.slug:
            record = merged
    if primary and ranks().is_first:
        write_json(run.folder.metrics, record)
    _store_gates(run, own.protocol)
    _store_bands(run, own.protocol)
    wait_for_all()
    return record


def _baselines(run: Run, spec: EvaluateSpec) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in spec.baselines:
        if name == "encoder":
            if run.encoder is None or run.model is None:
                raise RecipeError(
                    "evaluate.baselines: 'encoder' means the encoder beside an LLM; this run has only one of them"
                )
            found[part_name(run.recipe.encoder.type)] = run.encoder  # type: ignore[union-attr]
            continue
        baseline: Any = discovery.resolve("encoder", name)
        if baseline.trainable:
            raise RecipeError(f"evaluate.baselines: {name!r} has to be trained; give it a recipe of its own")
        context = run.dataset.context()
        config = baseline.config_class(num_items=context.num_items, max_history=run.recipe.dataset.max_history)
        found[part_name(name)] = baseline.from_context(config, context).to(run.device)
    return found


@torch.inference_mode()
def _store_gates(run: Run, protocol: EvalProtocol) -> None:
    """Expert weights of every evaluated user after the whole history, for the report."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    inner: Any = getattr(getattr(run.model, "model", None), "base_model", None)
    if inner is None or not hasattr(inner, "compute_gates"):
        return
    examples = run.dataset.histories(protocol.split, run.recipe.dataset.max_history)  # type: ignore[arg-type]
    rows: list[torch.Tensor] = []
    for start in range(0, len(examples), 256):
        batch = SequenceCollator()([examples[i] for i in range(start, min(start + 256, len(examples)))])
        batch = {name: value.to(run.device) for name, value in batch.items()}  # type: ignore[attr-defined, assignment]
        rows.append(_gates_after(run, inner, batch).float().cpu())
    if not ranks().is_first:
        return
    gates = torch.cat(rows).numpy()
    columns: dict[str, Any] = {"user": examples.users, **{f"gate_{e}": gates[:, e] for e in range(gates.shape[1])}}
    path = run.folder.evaluation(protocol.resolve(run.dataset).slug) / "gates.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _store_bands(run: Run, protocol: EvalProtocol) -> None:
    """How much each spectral band of a graph encoder contributes, for the report."""
    if run.model is None and hasattr(run.encoder, "band_diagnostics") and ranks().is_first:
        folder = run.folder.evaluation(protocol.resolve(run.dataset).slug)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "bands.json", {"bands": run.encoder.band_diagnostics()})


def _gates_after(run: Run, inner: Any, batch: Any) -> torch.Tensor:
    """[B, E] expert weights after the whole history, by the router or by the encoder itself."""
    if run.model.backbone.gate_kind != "gates":
        return inner.compute_gates("default", run.encoder.user_representation(batch))
    weights = inner.compute_gates("default", gates=run.encoder.gates(batch))
    return weights if weights.dim() == 2 else run.encoder.last_state(weights, batch["lengths"])


def open_run(root: Path, *, say: Say = print) -> Run:
    """A finished run with its parts loaded, for evaluating it again."""
    folder = RunDir(root)
    recipe = load_run_recipe(folder)
    from llmrec.recommender import load_system

    dataset = InteractionDataset.load(folder.dataset)
    run = Run(recipe, folder, dataset, say)
    system, _, run.encoder = load_system(folder, recipe, dataset)
    run.model = None if system is run.encoder else system
    if run.encoder is not None:
        run.encoder.to(run.device)
    if run.model is not None:
        run.model.to(run.device)
    return run
