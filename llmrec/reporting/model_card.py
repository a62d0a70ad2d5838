"""The model card of a published run: what it is, how to load it, what was measured, on what data, and its limits.

Everything on it is read from the run folder. The front matter is what the Hub indexes (`ModelCardData`, with one
`EvalResult` per metric); a ranking of sampled candidates has a table of its own, with the warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmrec.downloads import NAMES
from llmrec.evaluation.protocol import FULL, SAMPLED_NOTE
from llmrec.evaluation.results import ANSWERS, EXACT_RANKS
from llmrec.recipe import Recipe, load_recipe
from llmrec.recommender import part_name, system_name
from llmrec.redaction import redact
from llmrec.reporting.sections import read_json
from llmrec.run_dir import RunDir

if TYPE_CHECKING:
    from llmrec.data.catalogue import ItemCatalogue

TEMPLATES = Path(__file__).parent / "templates"
_SHOWN_METRICS = 6
_MARKUP = re.compile(r"([\\`*_\[\]|])")


def render_card(folder: Path, repo: str, catalogue: ItemCatalogue, files: Sequence[tuple[str, int, str]] = ()) -> str:
    """The card of a run as Markdown with front matter.

    Args:
        folder: An evaluated run.
        repo: Repository it will be in, OWNER/NAME.
        catalogue: What is published of its data set.
        files: (path, bytes, SHA-256) of the files beside the card.

    Raises:
        DataError: A record of the run cannot be read.
    """
    run = RunDir(folder)
    recipe = load_recipe(run.recipe)
    evaluations = read_evaluations(run, recipe)
    trained = read_json(run.model / "recommender.json")
    base = _base(trained)
    environment = read_json(run.environment)
    body = _environment().get_template("model_card.jinja").render(
        name=recipe.name,
        repo=repo,
        what=_what(recipe, base),
        example=catalogue.item_keys[1:3],
        titles="titles" in catalogue.fields,
        reads_titles=recipe.prompt is not None and recipe.prompt.reads_titles,
        evaluations=evaluations,
        seed=recipe.seed,
        stages=_stages(run, recipe),
        data=_data_rows(catalogue),
        notices=catalogue.meta.notes,
        identity=_identity(trained, base, catalogue),
        environment=_hardware(environment),
        versions=sorted(environment.get("versions", {}).items()),
        files=[(path, f"{size:,}", digest) for path, size, digest in files],
        synthetic=catalogue.meta.source == "synthetic",
    )  # fmt: skip
    return redact(f"---\n{_front_matter(recipe, base, catalogue, evaluations)}\n---\n\n{body}", homes=True)


def hub_name(model: str) -> str | None:
    """The Hub id behind a base model's name, None for a folder or a model that is on no Hub."""
    if model in NAMES:
        return NAMES[model].hub_id
    return model if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) and not Path(model).exists() else None


def read_evaluations(run: RunDir, recipe: Recipe) -> list[dict[str, Any]]:
    """What was measured, one entry per question, full rankings first: label, fingerprint, users, columns, systems."""
    found = []
    for path in sorted(run.root.glob("evaluations/*/metrics.json")):
        record = read_json(path)
        models = record.get("models", {})
        own = system_name(recipe)
        if not models:
            continue
        values = models.get(own) or next(iter(models.values()))
        names = [name for name in recipe.evaluate.metrics if name in values] or list(values)[:_SHOWN_METRICS]
        sampled = record.get("protocol_fields", {}).get("candidates", FULL) != FULL
        order = sorted(models, key=lambda name: name != own)  # the run's own system first
        found.append(
            {
                "label": record["protocol"],
                "fingerprint": record["fingerprint"],
                "users": record["users"],
                "sampled": sampled,
                "warning": SAMPLED_NOTE if sampled else "",
                "names": names,
                "rows": [
                    [_marked(name, own, record), *(interval(models[name].get(m)) for m in names)] for name in order
                ],
                "own": {name: models[own][name] for name in names} if own in models else {},
                "split": record.get("protocol_fields", {}).get("split"),
            }
        )
    return sorted(found, key=lambda entry: (entry["sampled"], entry["label"]))


def interval(value: Mapping[str, float | None] | None) -> str:
    """A metric with its 95% interval, "0.1234 (0.1100 to 0.1370)"; statistics of the whole catalogue have none."""
    if value is None:
        return "–"
    bounds = "" if value["low"] is None else f" ({value['low']:.4f} to {value['high']:.4f})"
    return f"{value['mean']:.4f}{bounds}"


def _front_matter(
    recipe: Recipe, base: Mapping[str, Any], catalogue: ItemCatalogue, evaluations: Sequence[Mapping[str, Any]]
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="other",
            task_name="next-item recommendation",
            dataset_type=catalogue.meta.name,
            dataset_name=f"{catalogue.meta.name} ({entry['label']})",
            dataset_config=entry["fingerprint"],
            dataset_split=entry["split"],
            metric_type=metric,
            metric_value=round(value["mean"], 6),
            metric_name=f"{metric}, {entry['label']}",
            metric_args={"interval_95": [value["low"], value["high"]]},
        )
        for entry in evaluations
        for metric, value in entry["own"].items()
    ]
    tags = ["recommendation", "sequential-recommendation", system_name(recipe)]
    tags += [part_name(recipe.encoder.type)] if recipe.encoder is not None else []
    related = {"base_model": base["hub_id"], "base_model_relation": "adapter"} if base.get("hub_id") else {}
    data = ModelCardData(
        library_name="llmrec",
        pipeline_tag="other",  # the Hub knows no pipeline for recommending
        tags=sorted(set(tags)),
        datasets=[catalogue.meta.name],
        model_name=recipe.name,
        eval_results=results or None,
        **related,
    )
    return data.to_yaml().strip()


def _base(trained: Mapping[str, Any]) -> dict[str, Any]:
    base = dict(trained.get("base", {}))
    return {**base, "hub_id": hub_name(base["name"])} if base else {}


def _what(recipe: Recipe, base: Mapping[str, Any]) -> str:
    encoder = "" if recipe.encoder is None else part_name(recipe.encoder.type)
    if recipe.llm is None or recipe.prompt is None:
        return f"The sequence encoder {_plain(encoder)}: a user's history in, ranked items out."
    tuner = "no adapter" if recipe.tuner is None else f"the adapter {part_name(recipe.tuner.type)}"
    style = {
        "item_slots": "one vector per item of the history",
        "item_codes": "added tokens: the code of each item of the history",
        "text": "the titles of the history",
        "yes_no": "a question about one candidate, with what is known of the user",
        "describe": "pictures of items",
        "hybrid": "titles, each followed by an item vector",
    }[recipe.prompt.style]
    name = base.get("hub_id") or base.get("name") or recipe.llm.model
    guided = f", with vectors and gates of the encoder {_plain(encoder)}" if encoder else ""
    return f"The language model {_plain(name)} with {_plain(tuner)}; it reads {style}{guided}."


def _identity(trained: Mapping[str, Any], base: Mapping[str, Any], catalogue: ItemCatalogue) -> list[tuple[str, Any]]:
    index = catalogue.stored["item_index"]
    rows: list[tuple[str, Any]] = [("data set", catalogue.fingerprint)]
    rows += [("item index (ids in order)", index["keys"]), ("item titles", index["titles"] or "none")]
    if trained:
        rows += [("encoder", trained["encoder"] or "none"), ("item vectors", trained["item_table"]["sha256"])]
        rows += [
            ("base model", base["hub_id"] or base["name"]),
            ("base model revision", base["revision"] or "not recorded; weights are compared by hash"),
            ("base model weights (sampled)", base["linears"] or base["embeddings"]),
            ("base model layers", base["num_layers"]),
        ]
    return rows


def _data_rows(catalogue: ItemCatalogue) -> list[tuple[str, Any]]:
    summary, meta = catalogue.summary(), catalogue.meta
    lengths = summary["history_length"]
    return [
        ("name", meta.name),
        ("users", summary["users"]),
        ("items", summary["items"]),
        ("interactions", summary["interactions"]),
        ("density", f"{summary['density']:.4%}"),
        ("events per user", f"{lengths['min']} to {lengths['max']}, median {lengths['median']:g}"),
        ("positive events", meta.positive),
        ("repeated events", meta.repeats),
        ("filters", ", ".join(f"{name} = {value}" for name, value in meta.filters.items()) or "none"),
        ("order of equal times", meta.tie_rule),
        ("split rule", meta.split),
        ("events per split", ", ".join(f"{name} {count:,}" for name, count in summary["splits"].items())),
        ("fingerprint", catalogue.fingerprint),
    ]


def _stages(run: RunDir, recipe: Recipe) -> list[list[Any]]:
    rows = []
    for number, stage in enumerate(recipe.stages, start=1):
        done = read_json(run.stage(number, stage.train) / "done.json")
        arguments = {"learning_rate": "–", "per_device_train_batch_size": "–", **stage.training_arguments}
        best = done.get("best_metric")
        rows.append(
            [number, stage.train, stage.strategy.type, done.get("steps", "–"), f"{done.get('epochs', 0):g}",
             arguments["learning_rate"], arguments["per_device_train_batch_size"],
             "–" if best is None else f"{stage.metric} {best:.4f}", f"{done.get('seconds', 0):,.0f}"]
        )  # fmt: skip
    return rows


def _hardware(environment: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What it ran on; no names of hosts, users or folders."""
    shown = {
        "system": str(environment.get("platform", "unknown")).partition("-")[0],
        "processor": environment.get("processor") or "unknown",
        "cores": environment.get("cores"),
        "threads": environment.get("threads") or "default",
        "accelerator": environment.get("accelerator") or environment.get("device"),
        "Python": environment.get("python"),
    }
    return [(name, value) for name, value in shown.items() if value is not None]


def _marked(name: str, own: str, record: Mapping[str, Any]) -> str:
    measured = record.get("measured", {}).get(name, EXACT_RANKS)
    lists = "" if measured in (EXACT_RANKS, ANSWERS) else f" (by {measured})"
    return f"{name}{' (this run)' if name == own else ''}{lists}"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False,  # Markdown: `_plain` takes the place of HTML escaping
    )  # fmt: skip
    environment.globals["table"] = _table
    environment.filters["plain"] = _plain
    return environment


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [[_plain(head) for head in heads], ["---"] * len(heads)]
    lines += [[_plain(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    """Text without markup of its own: it stays in its cell and starts no tag, link or emphasis."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return _MARKUP.sub(r"\\\1", " ".join(text.split())).replace("<", "&lt;")
