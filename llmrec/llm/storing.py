"""What a saved LLM recommender holds, and the checks on loading it.

    adapter/                what peft saves: adapter_config.json, adapter_model.safetensors (experts and router)
    projector.safetensors   projector, output layer, scale, bias: everything trained outside the adapter
    recommender.json        options, also of the prompts; identity of the base model, hashes of encoder and item table
    tokenizer/              the tokenizer, when the recommender has one

Base weights, encoder weights, item vectors and titles are not stored: they are named by hash, and loading with others
fails, naming both. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmrec.errors import CheckpointError
from llmrec.llm.loading import (
    BaseIdentity,
    base_identity,
    load_language_model,
    module_fingerprint,
    tensor_fingerprint,
)
from llmrec.tuners.base import WEIGHTS_FILE, load_tuner

if TYPE_CHECKING:
    from llmrec.llm.recommender import LLMRecommender

RECORD, PROJECTOR, ADAPTER, TOKENIZER = "recommender.json", "projector.safetensors", "adapter", "tokenizer"
FORMAT = 1


def save_recommender(recommender: LLMRecommender, folder: Path) -> None:
    """Write a recommender to a folder; see the module."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = None if recommender.encoder is None else module_fingerprint(recommender.encoder)
    adapted = isinstance(recommender.model, PeftModel)
    if adapted:
        config = recommender.backbone.adapter_config
        if hasattr(config, "encoder_fingerprint"):
            config.encoder_fingerprint = encoder
        recommender.model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in recommender.own_state().items()}
    save_file(state, folder / PROJECTOR, metadata={"format": "pt"})
    if recommender.tokenizer is not None:
        recommender.tokenizer.save_pretrained(folder / TOKENIZER)
    record = {
        "format": FORMAT,
        "options": asdict(recommender.options),
        "prompt": _prompt_options(recommender),
        "base": asdict(base_identity(recommender.model)),
        "token_embeddings": _token_embeddings(recommender.model),
        "adapter": adapted,
        "encoder": encoder,
        "item_table": {
            "sha256": tensor_fingerprint(recommender.item_table),
            "shape": list(recommender.item_table.shape),
        },
    }
    # Written last: a folder without it is an interrupted save.
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_recommender(
    folder: Path,
    base_model: nn.Module | None,
    encoder: nn.Module | None,
    *,
    item_table: Tensor | None,
    tokenizer: Any,
    renderer: Any,
    titles: Sequence[str] | None,
    item_tokenizer: Any,
    pictures: Any = None,
    is_trainable: bool,
) -> LLMRecommender:
    """Put a saved recommender together; see `LLMRecommender.from_pretrained`."""
    from llmrec.llm.recommender import LLMRecommender

    record = read_record(folder)
    _check_encoder(folder, record, encoder)
    _check_codes(folder, record, item_tokenizer)
    expected = BaseIdentity(**record["base"])
    if base_model is None:
        base_model, loaded = load_language_model(
            expected.name, revision=expected.revision, num_layers=expected.num_layers
        )
        tokenizer = tokenizer or loaded
    _check_base(folder, record, base_model)
    if tokenizer is None and (folder / TOKENIZER).is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, trust_remote_code=False)
    if record["options"]["style"] == "yes_no":
        _check_questions(folder, record, renderer)
    elif renderer is None and titles is not None and record["prompt"] is not None:
        from llmrec.data.prompt_encoder import PromptOptions
        from llmrec.llm.rendering import PromptRenderer

        renderer = PromptRenderer(titles, PromptOptions(**record["prompt"]), tokenizer)
    model = load_tuner(base_model, folder / ADAPTER, is_trainable) if record["adapter"] else base_model
    if item_tokenizer is not None and record["options"].get("tasks"):
        renderer = _task_writer(record, item_tokenizer, base_model, tokenizer)
    recommender = LLMRecommender.build(
        model, encoder=encoder, item_table=item_table, tokenizer=tokenizer, renderer=renderer,
        item_tokenizer=item_tokenizer, pictures=pictures, **record["options"],
    )  # fmt: skip
    _check_items(folder, record, recommender.item_table)
    _load_projector(recommender, folder)
    if not is_trainable:
        recommender.requires_grad_(False)
    return recommender.eval()


def _prompt_options(recommender: LLMRecommender) -> dict[str, Any] | None:
    writer = getattr(recommender, "renderer", None) or getattr(recommender, "tasks", None)
    options = getattr(writer, "options", None)
    return asdict(options) if is_dataclass(options) and not isinstance(options, type) else None


def restore_recommender(recommender: LLMRecommender, folder: Path) -> None:
    """Load saved weights into a recommender of the same parts.

    Raises:
        CheckpointError: It was saved over other parts or with other options.
    """
    record = read_record(folder)
    found = json.loads(json.dumps(asdict(recommender.options)))
    defaults = json.loads(json.dumps({f.name: f.default for f in fields(recommender.options)}))
    stored = {**defaults, **record["options"]}  # folders of before know fewer options
    if found != stored:
        different = sorted(key for key in found if found[key] != stored.get(key))
        raise CheckpointError(f"{folder}: saved with other options: {', '.join(different)} differ")
    _check_encoder(folder, record, recommender.encoder)
    _check_base(folder, record, recommender.model)
    _check_items(folder, record, recommender.item_table)
    if record["adapter"]:
        result: Any = set_peft_model_state_dict(recommender.model, _read_tensors(folder / ADAPTER / WEIGHTS_FILE))
        if result.unexpected_keys:
            raise CheckpointError(
                f"{folder / ADAPTER}: weights {result.unexpected_keys[:3]} have no place in the adapter"
            )
    _load_projector(recommender, folder)


def read_record(folder: Path) -> dict[str, Any]:
    """recommender.json of a folder, checked for the fields loading needs.

    Raises:
        CheckpointError: Missing, damaged, or of a newer format.
    """
    path = folder / RECORD
    if not path.is_file():
        raise CheckpointError(f"{folder}: found no {RECORD}; expected a folder written by save_pretrained")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    needed = {"format", "options", "prompt", "base", "adapter", "encoder", "item_table"}
    if not isinstance(record, dict) or needed - record.keys():
        raise CheckpointError(f"{path}: expected the fields {', '.join(sorted(needed))}")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path}: found format {record['format']!r}, this version reads format {FORMAT}")
    if not isinstance(record["base"], dict) or {f.name for f in fields(BaseIdentity)} != record["base"].keys():
        raise CheckpointError(f"{path}: the identity of the base model is incomplete")
    return record


def _check_base(folder: Path, record: dict[str, Any], model: nn.Module) -> None:
    expected, found = BaseIdentity(**record["base"]), base_identity(model)
    if not expected.same_weights(found):
        raise CheckpointError(
            f"{folder} was trained on the base model {expected}, found {found}; expected the same weights"
        )
    # The identity reads the first rows only, so it does not see added tokens. Folders of before have no number.
    rows, here = record.get("token_embeddings"), _token_embeddings(model)
    if rows not in (None, here):
        raise CheckpointError(
            f"{folder} was trained on {rows} token embeddings, found {here}; "
            f"resize the base model first: model.resize_token_embeddings({rows})"
        )


def _token_embeddings(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _check_encoder(folder: Path, record: dict[str, Any], encoder: nn.Module | None) -> None:
    expected = record["encoder"]
    found = None if encoder is None else module_fingerprint(encoder)
    if expected != found:
        raise CheckpointError(
            f"{folder} was trained with the encoder {expected or 'none'}, found the encoder {found or 'none'}; "
            "load the encoder saved beside it"
        )


def _check_codes(folder: Path, record: dict[str, Any], item_tokenizer: Any) -> None:
    expected = record["options"].get("item_codes")
    found = None if item_tokenizer is None else item_tokenizer.fingerprint
    if expected != found:
        raise CheckpointError(
            f"{folder} was trained on the item codes {expected or 'none'}, found the item codes {found or 'none'}; "
            "load the item tokenizer saved beside it"
        )


def _check_questions(folder: Path, record: dict[str, Any], renderer: Any) -> None:
    """Questions show texts and summaries beside titles, so their writer is given and has to ask as before."""
    found = None if renderer is None else json.loads(json.dumps(asdict(renderer.options)))
    if found != record["prompt"]:
        raise CheckpointError(
            f"{folder} was trained on questions with the options {record['prompt']}, found {found or 'no renderer'}; "
            "give the PairEncoder of the same recipe"
        )


def _task_writer(record: dict[str, Any], item_tokenizer: Any, base_model: Any, tokenizer: Any) -> Any:
    """What writes the prompts of a recommender trained on tasks; asking needs codes, no titles."""
    from llmrec.data.code_prompts import CodeAsker, CodeTaskOptions

    options = CodeTaskOptions(**record["prompt"])
    return CodeAsker(
        item_tokenizer.codes.numpy(), item_tokenizer.level_sizes, _token_embeddings(base_model), tokenizer, options
    )


def _check_items(folder: Path, record: dict[str, Any], table: Tensor) -> None:
    expected, found = record["item_table"], tensor_fingerprint(table)
    if expected["sha256"] != found:
        raise CheckpointError(
            f"{folder} was trained with the item table {expected['sha256']} of shape {expected['shape']}, found "
            f"{found} of shape {list(table.shape)}; expected the item vectors of the same encoder and data set"
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; expected a folder written by save_pretrained")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


@torch.no_grad()
def _load_projector(recommender: LLMRecommender, folder: Path) -> None:
    stored, own = _read_tensors(folder / PROJECTOR), recommender.own_state()
    wrong = sorted(
        n for n in stored.keys() | own.keys() if n not in own or n not in stored or stored[n].shape != own[n].shape
    )
    if wrong:
        raise CheckpointError(f"{folder / PROJECTOR} does not fit the recommender: {', '.join(wrong[:5])} differ")
    for name, value in own.items():
        value.copy_(stored[name])
