"""Texts as vectors: the text side of item features.

    vectors = embed_texts(["The Matrix. Action, Sci-Fi", ...], "minilm")         # [N, d] float32

| `model` | vector of a text |
|---|---|
| `minilm` | the named download (`llmrec pull minilm`), 384 values |
| a sentence-transformers id of the hub, or a local folder | whatever its modules compute |
| `llm:NAME` | mean over the text's tokens of a causal language model's last hidden states; NAME as in `llm.base` |

The mean of last hidden states is what LC-Rec (arXiv 2311.09049) and LETTER (arXiv 2405.07314) take from a LLaMA.
Code that comes with a model is never run and only safetensors weights are read.

`embedder_identity` says in one line which weights made the vectors, for the key of a cache; what else changes them
(the texts, `max_tokens`) belongs in the key as well. Batch size, device and order of the texts only change rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import CheckpointError, DataError, DependencyError, RecipeError
from llmrec.llm.loading import load_language_model, own_device

LLM_PREFIX = "llm:"
# What decides a vector. Other files of a folder (read-me, source of a download) differ between copies of one model.
_DECIDING = frozenset(
    {
        "config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.txt",
        "vocab.json", "merges.txt", "added_tokens.json",
    }
)  # fmt: skip
_SENTENCE_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_EXPORTS = ["onnx/*", "openvino/*"]
_HASH_CHUNK = 1 << 22


def embed_texts(
    texts: Sequence[str],
    model: str,
    *,
    batch_size: int = 64,
    max_tokens: int = 128,
    device: str | torch.device | None = None,
    progress: bool = True,
    revision: str | None = None,
) -> np.ndarray:
    """One vector a text; equal texts are computed once and get equal vectors.

    Args:
        texts: N texts, at least one. An empty text is embedded like any other; with `llm:` and a tokenizer that adds
            no token of its own there is nothing to average, and its vector is zero.
        model: See the table of this module.
        batch_size: Texts in one forward pass.
        max_tokens: Longer texts keep their beginning. The model's own limit holds too where it is smaller.
        device: Where to compute. None: the accelerator of this process, or the processor.
        progress: Show a bar on standard error when that is a terminal.
        revision: Commit, tag or branch, for hub ids.

    Returns:
        [N, d] float32, in the order of `texts`.

    Raises:
        CheckpointError: Nothing of that name can be loaded safely, or its vectors are not finite.
        DataError: No texts.
        DependencyError: sentence-transformers is missing.
        RecipeError: An option is out of range.
    """
    if not len(texts):
        raise DataError("no texts to embed", found="an empty list", expected="at least one text")
    if batch_size < 1 or max_tokens < 1:
        raise RecipeError(
            f"text embeddings: found batch_size {batch_size} and max_tokens {max_tokens}, expected both from 1"
        )
    _check_revision(model, revision)
    home = own_device() if device is None else torch.device(device)
    distinct = list(dict.fromkeys(texts))
    embed = _embed_by_language_model if model.startswith(LLM_PREFIX) else _embed_by_sentence_model
    vectors = embed(distinct, model, revision, batch_size, max_tokens, home, progress)
    if not np.isfinite(vectors).all():
        wrong = int((~np.isfinite(vectors)).any(1).sum())
        raise CheckpointError(
            f"{model}: {wrong} of {len(distinct)} text vectors hold NaN or infinity; expected finite values. The "
            "weights are damaged, or overflow in the type they are stored in"
        )
    place = {text: row for row, text in enumerate(distinct)}
    return vectors[[place[text] for text in texts]]


def embedder_identity(model: str, revision: str | None = None) -> str:
    """Which weights `embed_texts` would use: the name and a commit of the hub or a fingerprint of the files.

    Args:
        model: As for `embed_texts`.
        revision: As for `embed_texts`.

    Returns:
        "NAME@COMMIT" for hub ids; "NAME@sha256:DIGEST" for named downloads and for folders, which go by their last
        part, so that a copy elsewhere is the same model. An `llm:` in front stays.

    Raises:
        CheckpointError: There is no such model.
        RecipeError: A revision of something that is not on the hub.
    """
    _check_revision(model, revision)
    kind = LLM_PREFIX if model.startswith(LLM_PREFIX) else ""
    name = model.removeprefix(LLM_PREFIX)
    folder = _local_folder(name)
    if folder is None:
        snapshot = _from_hub(name, revision, ["config.json", "modules.json"])
        return f"{kind}{name}@{snapshot.name}"
    shown = name if not Path(name).is_dir() else Path(name).resolve().name
    return f"{kind}{shown}@sha256:{_fingerprint(folder)}"


def text_tokenizer(model: str, revision: str | None = None) -> Callable[[Sequence[str]], list[list[int]]]:
    """Texts -> token ids of a text model's tokenizer without special tokens, each raised by one: id 0 is padding.

    Args:
        model, revision: As for `embed_texts`.
    """
    from transformers import AutoTokenizer

    _check_revision(model, revision)
    name = model.removeprefix(LLM_PREFIX)
    folder = _local_folder(name) or _from_hub(name, revision, _SENTENCE_FILES)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def tokenise(texts: Sequence[str]) -> list[list[int]]:
        found = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [[token + 1 for token in ids] for ids in found]

    return tokenise


# Sentence models -----------------------------------------------------------------------------------------------------


def _embed_by_sentence_model(
    texts: list[str], model: str, revision: str | None, batch_size: int, max_tokens: int, device: torch.device,
    progress: bool,
) -> np.ndarray:  # fmt: skip
    encoder = _load_sentence_model(model, revision, device)
    own = encoder.max_seq_length
    if own is None or (math.isfinite(own) and own > max_tokens):  # infinite: a bag of words without a limit to set
        encoder.max_seq_length = max_tokens
    found: list[np.ndarray | None] = [None] * len(texts)
    for rows in _batches([len(text) for text in texts], batch_size, progress):
        part = encoder.encode(
            [texts[row] for row in rows], batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True
        )
        for row, vector in zip(rows, part, strict=True):
            found[row] = np.asarray(vector, dtype=np.float32)
    return np.stack(found)  # type: ignore[arg-type]


def _load_sentence_model(model: str, revision: str | None, device: torch.device) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise DependencyError(
            "sentence_transformers", extra="text", purpose=f"text embeddings by {model!r}",
            also="or take a language model's: llm:NAME",
        ) from error  # fmt: skip
    folder = _local_folder(model) or _from_hub(model, revision, _SENTENCE_FILES)
    _refuse_pickled_parts(folder)
    # As stored on accelerators; processors are slow, or rounded differently from one to the next, below float32.
    dtype = "float32" if device.type == "cpu" else "auto"
    try:
        encoder = SentenceTransformer(
            str(folder), device=str(device), trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": dtype},
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise _not_loadable(model, error) from error
    return encoder.eval()


def _refuse_pickled_parts(folder: Path) -> None:
    """Parts other than the transformer fall back to pickled weights; refuse them before anything is loaded."""
    for pickled in sorted(folder.rglob("pytorch_model*.bin")):
        if not any(pickled.parent.glob("*.safetensors")):
            raise CheckpointError(
                f"{pickled}: found pickled weights, expected safetensors; save the model again by a current "
                "sentence-transformers, which writes model.safetensors"
            )


# Language models -----------------------------------------------------------------------------------------------------


def _embed_by_language_model(
    texts: list[str], model: str, revision: str | None, batch_size: int, max_tokens: int, device: torch.device,
    progress: bool,
) -> np.ndarray:  # fmt: skip
    dtype: Any = "float32" if device.type == "cpu" else "auto"
    lm, tokenizer = load_language_model(model.removeprefix(LLM_PREFIX), dtype, revision=revision, device=device)
    tokenizer.truncation_side = "right"
    limit = min(max_tokens, int(getattr(lm.config, "max_position_embeddings", None) or max_tokens))
    tokens = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    vectors = np.zeros((len(texts), lm.config.get_text_config().hidden_size), dtype=np.float32)
    for rows in _batches([len(ids) for ids in tokens], batch_size, progress):
        filled = [row for row in rows if tokens[row]]
        if filled:
            means = mean_of_states(lm, [tokens[row] for row in filled], int(tokenizer.pad_token_id))
            vectors[filled] = means.cpu().numpy()
    return vectors


@torch.no_grad()
def mean_of_states(lm: Any, tokens: Sequence[Sequence[int]], pad_token_id: int) -> Tensor:
    """Mean of a causal language model's last hidden states over each text's tokens.

    Padded on the right here, whichever side the tokenizer prefers: positions then count from 0 in every row, and
    causal attention cannot reach the padding.

    Args:
        lm: A causal language model of transformers.
        tokens: B texts of at least one token id each.
        pad_token_id: Fills shorter rows; its states are left out of the mean.

    Returns:
        [B, d] float32 on the model's device.
    """
    width = max(len(ids) for ids in tokens)
    lengths = torch.tensor([len(ids) for ids in tokens])
    padded = torch.tensor([[*ids, *[pad_token_id] * (width - len(ids))] for ids in tokens])
    mask = (torch.arange(width) < lengths[:, None]).long().to(lm.device)
    body = lm.get_decoder()
    states = body(input_ids=padded.to(lm.device), attention_mask=mask, use_cache=False).last_hidden_state.float()
    return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


# Names and files -----------------------------------------------------------------------------------------------------


def _batches(lengths: Sequence[int], batch_size: int, progress: bool) -> Iterator[list[int]]:
    """Rows in groups of similar length, longest first: little padding, and memory runs out at once or never."""
    from rich.console import Console
    from rich.progress import track

    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    parts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    console = Console(stderr=True)
    hide = not (progress and console.is_terminal)
    yield from track(parts, description="embed texts", console=console, transient=True, disable=hide)


def _local_folder(name: str) -> Path | None:
    """The folder of a local model or a named download; None for what must be an id of the hub."""
    from llmrec import downloads

    if Path(name).is_dir():
        return Path(name)
    if name in downloads.NAMES:
        return downloads.pull(name)
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(
            f"{name!r}: no such folder; expected minilm, a folder or hub id of sentence-transformers, or llm:NAME"
        )
    return None


def _check_revision(model: str, revision: str | None) -> None:
    from llmrec import downloads

    name = model.removeprefix(LLM_PREFIX)
    if revision is not None and (Path(name).is_dir() or name in downloads.NAMES):
        raise RecipeError(
            f"text embeddings: found revision {revision!r} with {model!r}, which is not an id of the hub; leave "
            "the revision out"
        )


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Snapshot folder of a hub id, named by its commit; pickled weights are never fetched."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_EXPORTS)
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error) from error
    return Path(found)


def _not_loadable(model: str, error: Exception) -> CheckpointError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"the text encoder {model!r} could not be loaded: {first}\n"
        "  expected: minilm, a folder or a reachable or cached hub id of a sentence-transformers model with "
        "safetensors weights, or llm:NAME for a causal language model"
    )


def _fingerprint(folder: Path) -> str:
    """SHA-256 (32 hex digits) over names and bytes of the files that decide a vector."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and (path.suffix == ".safetensors" or path.name in _DECIDING)
    )
    if not any(path.suffix == ".safetensors" for path in files):
        raise CheckpointError(f"{folder}: found no *.safetensors; expected the folder of a saved model")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:32]
