"""What `llmrec check` says about memory: a recipe and a launcher profile as a `Setting`, and the estimate as a table.

Only configurations are read: of a local folder, a named download or a cached hub id. Nothing is fetched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.commands.launch import Profile
from llmrec.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from llmrec.llm.memory import MemoryEstimate, Setting
    from llmrec.recipe import PromptSpec, Recipe, StageSpec

CODE_LEVELS, CODES_OF_A_LEVEL = 4, 256
TITLE_TOKENS, FRAME_TOKENS, PICTURE_TOKENS = 10, 64, 2880
"""Assumed where a recipe sets no limit: tokens of a title, of a prompt around its items, and of a picture (the most
that LLaVA-NeXT makes of one)."""


@dataclass(frozen=True)
class SideParts:
    """What stands beside the language model.

    Args:
        items: Size of the catalogue; None until the data set is prepared.
        encoder: Parameters of the sequence encoder, its item table included.
        gate_dim: Width of its states.
        item_dim: Width of its item vectors.
    """

    items: int | None
    encoder: int
    gate_dim: int
    item_dim: int


def read_side_parts(recipe: Recipe) -> SideParts:
    """Sizes of encoder and catalogue, from an encoder on the meta device."""
    import torch

    from llmrec import discovery

    items = _items(recipe)
    if recipe.encoder is None:
        return SideParts(items, 0, 0, 0)
    kind: Any = discovery.resolve("encoder", recipe.encoder.type)
    if not kind.trainable:
        return SideParts(items, 0, 0, 0)
    options = {"num_items": items or 1, "max_history": recipe.encoder_positions, **recipe.encoder.options}
    with torch.device("meta"), torch.no_grad():
        encoder = kind(kind.config_class(**options))
        width = int(encoder.item_vectors().shape[1])
    return SideParts(items, sum(p.numel() for p in encoder.parameters()), int(encoder.gate_dim), width)


def _items(recipe: Recipe) -> int | None:
    """Size of the catalogue, where the data set is prepared already or made up."""
    from llmrec.data.dataset import InteractionDataset

    source = Path(recipe.dataset.source)
    if (source / "meta.json").is_file():
        return InteractionDataset.load(source).num_items
    return int(recipe.dataset.options.get("items", 200)) if recipe.dataset.source == "synthetic" else None


def read_base_config(recipe: Recipe) -> tuple[Any, str]:
    """The base model's configuration, cut to the recipe's layers; or None and why it cannot be read.

    Raises:
        RecipeError: The model has fewer layers than the recipe keeps.
        CheckpointError: The configuration is damaged, or belongs to a model that brings its own code.
    """
    from transformers import AutoConfig

    from llmrec.downloads import NAMES, cache_root
    from llmrec.llm.loading import keep_layers

    assert recipe.llm is not None
    name = recipe.llm.model
    source, remedy = name, f"fetch it with: hf download {name} config.json"
    if name in NAMES and not Path(name).is_dir():
        source, remedy = str(cache_root() / name), f"fetch it with: llmrec pull {name}"
    try:
        config = AutoConfig.from_pretrained(
            source, revision=recipe.llm.revision, local_files_only=True, trust_remote_code=False
        )
    except OSError:
        return None, f"the configuration of {name} is neither in a folder nor in the cache; {remedy}"
    except ValueError as error:
        raise CheckpointError(f"the configuration of {name} cannot be read: {str(error).splitlines()[0]}") from error
    keep_layers(config.get_text_config(), recipe.llm.num_layers)
    return config, ""


def estimate_memory(
    recipe: Recipe, arguments: list[Any], config: Any, side: SideParts, profile: Profile | None
) -> dict[str, Any]:
    """The record of the most demanding stage that trains the tuner; empty when none does.

    Args:
        recipe: The recipe.
        arguments: TrainingArguments of its stages.
        config: Of the base model.
        side: See `SideParts`.
        profile: The launcher's, or None for one process.
    """
    from llmrec.llm.memory import estimate

    found: list[dict[str, Any]] = []
    for number, (stage, args) in enumerate(zip(recipe.stages, arguments, strict=True), start=1):
        if stage.train == "tuner":
            setting = stage_setting(recipe, stage, args, config, side, profile)
            guessed = estimate(config, setting, partial(_attach, recipe, setting.gate_dim))
            found.append({"stage": f"{number}-tuner", **_record(recipe, setting, guessed, side, profile)})
    return max(found, key=lambda record: record["total"], default={})


def _attach(recipe: Recipe, gate_dim: int, model: Any) -> Any:
    from llmrec import discovery

    if recipe.tuner is None:
        return model.requires_grad_(False)
    from llmrec.recommender import tuner_options

    tuner: Any = discovery.resolve("tuner", recipe.tuner.type)
    options = tuner_options(recipe, model)
    if options.get("router") == "none":
        options |= {"router": "linear"}  # finished gates are checked by their values, which do not exist here
    return tuner.attach(model, tuner.configure(options, gate_dim=gate_dim))


def stage_setting(
    recipe: Recipe, stage: StageSpec, args: Any, config: Any, side: SideParts, profile: Profile | None
) -> Setting:
    """How a stage uses a device, with assumptions where the recipe sets no limit."""
    from llmrec.llm.memory import Setting

    prompt, llm = recipe.prompt, recipe.llm
    assert prompt is not None and llm is not None
    _check_room_for_pictures(prompt, config)
    text = config.get_text_config()
    windows = prompt.style == "item_codes" and not prompt.tasks
    dense = prompt.style == "item_slots" or windows
    if windows:
        sizes = _window_sizes(recipe)
    else:
        sizes = _worded_sizes(recipe, int(text.vocab_size)) if not dense else _dense_sizes(recipe, stage, side)
    batch = int(args.per_device_train_batch_size)
    return Setting(
        batch=batch,
        length=sizes["length"],
        places=batch * sizes["places"],
        classes=sizes["classes"],
        score_copies=3 if dense else 2,  # masking the history makes one more
        slots=batch * sizes["slots"],
        gate_dim=side.gate_dim or 1,
        gate_positions=dense,
        dtype=_dtype(recipe, profile),
        quantize=llm.quantize,
        checkpointing=bool(args.activation_checkpointing),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        trained=_trained_beside(recipe, side, int(text.hidden_size)),
        frozen=4 * (side.encoder + ((side.items or 0) + 1) * side.item_dim),
        processes=1 if profile is None else profile.processes,
        sharding="none" if profile is None else profile.sharding,  # type: ignore[arg-type]
    )


def _dense_sizes(recipe: Recipe, stage: StageSpec, side: SideParts) -> dict[str, int]:
    from llmrec import discovery

    assert recipe.prompt is not None
    history = recipe.dataset.max_history
    strategy: Any = discovery.build("strategy", stage.strategy.type, stage.strategy.options)
    sampled = getattr(strategy, "objective", "full_softmax") != "full_softmax"
    classes = strategy.negatives + 1 if sampled else (side.items or 0) + 1
    instruction = -(-len(recipe.prompt.instruction) // 3)  # characters of a token, on the safe side
    return {"length": history + instruction, "places": history, "slots": history, "classes": classes}


def _window_sizes(recipe: Recipe) -> dict[str, int]:
    """Windows of codes: every item is CODE_LEVELS tokens, each scored against the codes of its level."""
    tokens = (recipe.dataset.max_history + 1) * CODE_LEVELS
    return {"length": tokens, "places": tokens, "slots": tokens, "classes": CODES_OF_A_LEVEL}


def _worded_sizes(recipe: Recipe, vocabulary: int) -> dict[str, int]:
    prompt = recipe.prompt
    assert prompt is not None
    title = prompt.max_title_tokens or TITLE_TOKENS
    if prompt.style == "yes_no":
        return {"length": prompt.max_length or _question_tokens(prompt, title), "places": 2, "slots": 0,
                "classes": vocabulary}  # fmt: skip
    shown = recipe.dataset.max_history + (prompt.candidates or 0)
    length = prompt.max_length or FRAME_TOKENS + shown * (title + 2)
    slots = shown if prompt.style == "hybrid" else 0
    return {"length": length, "places": title + 1, "slots": slots, "classes": vocabulary}


def _check_room_for_pictures(prompt: PromptSpec, config: Any) -> None:
    if prompt.pairs is None or not prompt.pairs.pictures or prompt.max_length is None:
        return
    least = getattr(config, "image_seq_length", 0)  # of one tile; a picture may be cut into several
    if prompt.max_length <= least:
        raise RecipeError(
            f"prompt.max_length: found {prompt.max_length}, expected more than the {least} tokens that a picture takes "
            f"at least with a model of type {config.model_type!r}: pictures are never cut; leave max_length out"
        )


def _question_tokens(prompt: PromptSpec, title: int) -> int:
    """Tokens of a question of style yes_no, where all it may show is as long as it may be."""
    from llmrec.recipe import PairSpec

    pairs = prompt.pairs or PairSpec()
    texts = pairs.max_text_tokens if pairs.item_text is not None else 0
    texts += pairs.max_preference_tokens if pairs.summaries is not None else 0
    return FRAME_TOKENS + (pairs.show_history + 1) * (title + 2) + texts + (PICTURE_TOKENS if pairs.pictures else 0)


def _trained_beside(recipe: Recipe, side: SideParts, width: int) -> int:
    """Trained parameters of the recommender outside the adapter."""
    import torch

    from llmrec.llm.projector import ItemProjector

    prompt = recipe.prompt
    assert prompt is not None
    if prompt.style in ("text", "yes_no"):
        return 0
    if prompt.style == "item_codes":
        return CODE_LEVELS * CODES_OF_A_LEVEL * width
    inputs = {"item": side.item_dim, "state": side.gate_dim, "both": side.item_dim + side.gate_dim}
    widths = [inputs.get(prompt.slot_content, side.item_dim + 1)]
    if prompt.style == "hybrid" and "user" in prompt.slots:
        widths.append(side.gate_dim)
    with torch.device("meta"):
        projectors = [ItemProjector(inner, width, prompt.projector) for inner in widths]
    trained = sum(p.numel() for projector in projectors for p in projector.parameters())
    if prompt.style == "item_slots":
        trained += (width + 1) * side.item_dim + ((side.items or 0) + 1 if prompt.item_bias else 0)
    return trained


def _dtype(recipe: Recipe, profile: Profile | None) -> Any:
    import torch

    from llmrec.llm.loading import choose_dtype, own_device

    assert recipe.llm is not None
    if profile is not None and not profile.use_cpu:
        return torch.float32 if recipe.llm.dtype == "float32" else torch.bfloat16
    return choose_dtype(recipe.llm.dtype, own_device() if profile is None else "cpu")


def _record(
    recipe: Recipe, setting: Setting, guessed: MemoryEstimate, side: SideParts, profile: Profile | None
) -> dict[str, Any]:
    notes = []
    if recipe.prompt is not None and recipe.prompt.reads_titles and recipe.prompt.max_length is None:
        notes.append(f"prompt.max_length is not set: {setting.length} tokens are assumed")
    if recipe.prompt is not None and recipe.prompt.style == "item_codes":
        notes.append(f"item codes of {CODE_LEVELS} x {CODES_OF_A_LEVEL} are assumed")
    if side.items is None:
        notes.append("the data set is not prepared: item vectors and item scores are not counted")
    if setting.sharding in ("zero3", "fsdp"):
        whole = show_bytes(sum(guessed.kinds.values()))
        notes.append(f"validation, saving and evaluation hold the whole weights in every process: {whole}")
    available = device_memory(profile)
    if available is not None and guessed.total > available:
        notes.append(f"more than the {show_bytes(available)} a process has here")
    return {
        "processes": setting.processes,
        "sharding": setting.sharding,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "quantize": setting.quantize,
        "batch": setting.batch,
        "length": setting.length,
        "supervised_places": setting.places,
        "activation_checkpointing": setting.checkpointing,
        "weights_by_kind": guessed.kinds,
        "bytes": guessed.parts,
        "total": guessed.total,
        "available": available,
        "notes": notes,
    }


def device_memory(profile: Profile | None) -> int | None:
    """Bytes of the accelerator a process gets, or its share of the machine's memory; None when it cannot be known."""
    import torch

    if torch.cuda.is_available() and (profile is None or not profile.use_cpu):
        return int(torch.cuda.get_device_properties(0).total_memory)
    if (profile is not None and not profile.use_cpu) or not hasattr(os, "sysconf"):
        return None
    share = 1 if profile is None else -(-profile.processes // profile.machines)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // share


def memory_rows(memory: dict[str, Any]) -> list[list[str]]:
    """Lines of the table: part, size, what it is made of."""
    kinds = ", ".join(f"{name} {show_bytes(size)}" for name, size in memory["weights_by_kind"].items())
    where = f"batch {memory['batch']} of {memory['length']} tokens"
    if memory["activation_checkpointing"]:
        where += ", recomputed layer by layer"
    about = {
        "weights": kinds if memory["sharding"] in ("none", "zero0", "zero1", "zero2") else f"share of {kinds}",
        "frozen": "encoder, item table",
        "optimizer": f"{memory['processes']} processes, divides: {memory['sharding']}",
        "activations": where,
        "logits": f"{memory['supervised_places']:,} supervised places",
    }
    rows = [[name, show_bytes(size), about.get(name, "")] for name, size in memory["bytes"].items()]
    return [*rows, ["sum", show_bytes(memory["total"]), "; ".join(memory["notes"])]]


def show_bytes(size: int) -> str:
    """A size for people: "3.4 GiB", "17.0 MiB"."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.1f} {units[0]}" if units[0] != "B" else f"{size} B"
