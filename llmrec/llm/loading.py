"""Language models from the hub, a local folder or a named download, and what identifies them.

    model, tokenizer = load_language_model("smollm2-135m", dtype="auto", num_layers=12)

A name is taken for a local folder first, then for a named download (`llmrec pull`), then for a hub id. Code that comes
with a model is never run. `base_identity` says which base model an adapter belongs to: id, revision, and a fingerprint
of configuration and sampled weights that is the same for every dtype, with or without an adapter around the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmrec.errors import CheckpointError, RecipeError
from llmrec.llm.quantized import Quantize, prepare_quantised, quantised_arguments

Dtype = Literal["auto", "float32", "bfloat16"]

_SAMPLED_ROWS = 64
_CONFIG_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
)  # fmt: skip


def load_language_model(
    name_or_path: str | Path,
    dtype: Dtype = "auto",
    quantize: Quantize | None = None,
    revision: str | None = None,
    *,
    num_layers: int | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """A causal language model of transformers with its tokenizer.

    Args:
        name_or_path: Local folder, name of `llmrec pull`, or hub id.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the processor or accelerator computes in it, else
            float32 (a processor without such instructions is several times slower in bfloat16).
        quantize: "4bit" (NF4) or "8bit" weights by bitsandbytes.
        revision: Commit, tag or branch of the hub.
        num_layers: Keep only the first decoder layers: a smaller, faster model whose remaining layers are untouched.
            Its final hidden states are those of a layer that was not trained to be the last, so train an adapter.
        device: Where the weights go and the model computes. None: it will compute on `own_device()`; quantised weights,
            whose layout belongs to one kind of device, are made there, all others wait on the processor to be moved.

    Returns:
        The model, in evaluation mode, and the tokenizer, which has a padding token (the end-of-text token where the
        model has none of its own).

    Raises:
        CheckpointError: Nothing of that name can be loaded.
        DependencyError: Quantised weights without bitsandbytes.
        RecipeError: An option is out of range, or the launcher divides weights that are quantised.
    """
    name_processor_to_deepspeed()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    target = locate(name_or_path)
    home = own_device() if device is None else torch.device(device)
    compute = choose_dtype(dtype, home)
    extra = quantised_arguments(quantize, compute, home)
    try:
        config = AutoConfig.from_pretrained(target, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(target, revision=revision, trust_remote_code=False)
        keep_layers(config, num_layers)
        with quiet(num_layers is not None):
            model: Any = AutoModelForCausalLM.from_pretrained(
                target, config=config, revision=revision, dtype=compute, attn_implementation="sdpa",
                trust_remote_code=False, use_safetensors=True, **extra,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the language model {str(name_or_path)!r} could not be loaded: {str(error).strip().splitlines()[0]}\n"
            "  expected: a folder with config.json, safetensors weights and a tokenizer, a name of `llmrec pull`, or a "
            "hub id that is reachable or cached"
        ) from error
    if quantize is not None:
        prepare_quantised(model, compute)
    elif device is not None:
        model = model.to(device)
    add_padding(model, tokenizer)
    model.llmrec_base_name = str(name_or_path)
    return model.eval(), tokenizer


def name_processor_to_deepspeed() -> None:
    """Choose for DeepSpeed where there is no accelerator.

    transformers imports it, where it is installed, whenever a model is saved; left to itself it would warn of its
    choice on standard output, which belongs to results.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def own_device() -> torch.device:
    """The accelerator of this process (one per rank under a launcher), or the processor."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda", torch.cuda.current_device() if rank is None else int(rank))


def choose_dtype(dtype: Dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype "auto" stands for on a device, or the named one.

    Raises:
        RecipeError: Another word.
    """
    if dtype == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    if dtype not in ("float32", "bfloat16"):
        raise RecipeError(f"llm.dtype: found {dtype!r}, expected auto, float32 or bfloat16")
    return getattr(torch, dtype)


def fast_bfloat16(device: str | torch.device = "cpu") -> bool:
    """Whether the device multiplies bfloat16 matrices by instructions of its own."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(encoding="utf-8"), re.MULTILINE)
    return bool(flags) and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.group(1).split()))  # type: ignore[union-attr]


def locate(name_or_path: str | Path) -> str:
    """What transformers is told to load: the folder, the download of that name, or the hub id itself.

    Raises:
        CheckpointError: It reads like a folder, and there is none.
    """
    name = str(name_or_path)
    if Path(name).is_dir():
        return name
    from llmrec import downloads

    if name in downloads.NAMES:
        return str(downloads.pull(name))
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: no such folder; expected a saved model, a name of `llmrec pull` or a hub id")
    return name


def keep_layers(config: Any, num_layers: int | None) -> None:
    """Cut a configuration to its first decoder layers, in place.

    Raises:
        RecipeError: There are not so many.
    """
    if num_layers is None:
        return
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise RecipeError(f"llm.num_layers: found {num_layers}, the model has layers 1 to {config.num_hidden_layers}")
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


@contextmanager
def quiet(needed: bool) -> Iterator[None]:
    """Keep transformers from reporting layers that were left out on purpose."""
    # The layers left out are reported as unexpected weights, which is what was asked for.
    from transformers.utils import logging

    before = logging.get_verbosity()
    if needed:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def add_padding(model: Any, tokenizer: Any) -> None:
    """Give a tokenizer without padding its end-of-text token for it, and tell the model.

    Raises:
        CheckpointError: It has neither.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise CheckpointError("the tokenizer has neither a padding nor an end-of-text token; expected one of them")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


# Identity ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model this is.

    Args:
        name: Hub id, folder or named download it was loaded by.
        revision: Commit of the hub, where known.
        shape: Hash of the architecture's sizes; truncated models differ here.
        embeddings: Hash of sampled token embeddings and of all norms, rounded to bfloat16.
        linears: Hash of sampled linear weights, rounded to bfloat16; None for quantised weights.
        num_layers: Decoder layers.
    """

    name: str
    revision: str | None
    shape: str
    embeddings: str
    linears: str | None
    num_layers: int

    def same_weights(self, other: BaseIdentity) -> bool:
        """Whether both are one model; linear weights count where both are known."""
        linear = None in (self.linears, other.linears) or self.linears == other.linears
        return self.shape == other.shape and self.embeddings == other.embeddings and linear

    def __str__(self) -> str:
        commit = f" at {self.revision[:12]}" if self.revision else ""
        marks = "-".join((part or "quantised")[:8] for part in (self.shape, self.embeddings, self.linears))
        return f"{self.name}{commit} ({self.num_layers} layers, {marks})"


def base_identity(model: nn.Module) -> BaseIdentity:
    """Identity of a base model, taken through an adapter where there is one; reads a sample of each weight."""
    outer: Any = model
    base = outer.get_base_model() if hasattr(outer, "peft_config") else outer
    config = base.config
    text = config.get_text_config()  # of models that read pictures too, the language model's part
    shape = json.dumps({key: getattr(text, key, None) for key in _CONFIG_KEYS}, sort_keys=True)
    soft, hard, quantised = hashlib.sha256(), hashlib.sha256(), False
    for name, weight in _base_weights(base):
        if not weight.is_floating_point() or type(weight) is not nn.Parameter:
            quantised = True
        elif weight.dim() == 1 or "embed" in name:
            _feed(soft, name, weight)
        else:
            _feed(hard, name, weight)
    return BaseIdentity(
        name=getattr(base, "llmrec_base_name", None) or str(base.name_or_path or type(base).__name__),
        revision=getattr(config, "_commit_hash", None),
        shape=hashlib.sha256(shape.encode()).hexdigest(),
        embeddings=soft.hexdigest(),
        linears=None if quantised else hard.hexdigest(),
        num_layers=int(text.num_hidden_layers),
    )


def _base_weights(base: nn.Module) -> list[tuple[str, Tensor]]:
    """Base weights under the names they have without an adapter, sorted by name."""
    adapter = re.compile(r"\.(lora_|ilora_|modules_to_save|trainable_tokens)")
    named = {
        name.replace(".base_layer.", "."): weight
        for name, weight in base.named_parameters()
        if not adapter.search(name)
    }
    return sorted(named.items())


def _feed(digest: Any, name: str, weight: Tensor) -> None:
    rows = weight.detach()
    if rows.dim() > 1:
        rows = rows[:_SAMPLED_ROWS]
    sample = rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    digest.update(name.encode())
    digest.update(sample.tobytes())


def module_fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, types and bytes of a module's whole state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor_fingerprint(value).encode())
    return digest.hexdigest()


def tensor_fingerprint(value: Tensor) -> str:
    """SHA-256 over type, shape and bytes of a tensor."""
    plain = value.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
