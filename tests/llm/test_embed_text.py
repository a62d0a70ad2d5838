"""Text vectors: against transformers called by hand, and what must not change them."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

import llmrec.llm.embed_text as embed_text
from llmrec.downloads import cache_root
from llmrec.errors import CheckpointError, DataError, DependencyError, RecipeError
from llmrec.llm.embed_text import embed_texts, embedder_identity, mean_of_states
from tests.llm.tiny import TITLES, llama, tokenizer

needs_sentences = pytest.mark.skipif(
    find_spec("sentence_transformers") is None, reason="needs sentence-transformers (extra text)"
)
TEXTS = [TITLES[3], TITLES[1], "The user watched these films", TITLES[3], TITLES[12]]
WIDTH = 32


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    llama(initializer_range=0.5).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer with mean pooling, in the layout of sentence-transformers."""
    folder = tmp_path_factory.mktemp("sentences") / "tiny-bert"
    (folder / "1_Pooling").mkdir(parents=True)
    words = sorted({word for text in TEXTS for word in text.lower().split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, vocab_size=len(vocabulary), initializer_range=0.5,
    )  # fmt: skip
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 30, "do_lower_case": False}))
    return folder


def by_hand(folder: Path, text: str, max_tokens: int = 128) -> np.ndarray:
    """Mean of the last hidden states of one text alone: no batch, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :max_tokens]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    return states[0].mean(0).numpy()


# Language models -----------------------------------------------------------------------------------------------------


def test_language_model_gives_the_mean_of_last_hidden_states(language_model: Path) -> None:
    vectors = embed_texts(TEXTS, f"llm:{language_model}", batch_size=2)
    assert vectors.shape == (5, WIDTH) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, by_hand(language_model, text), rtol=1e-4, atol=1e-5)
    assert np.array_equal(vectors[0], vectors[3]) and np.abs(vectors[0] - vectors[1]).max() > 1e-2


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_padding_never_matters(positions: str, tmp_path: Path) -> None:
    """Side of the tokenizer, company in the batch and order of the texts; also with absolute positions."""
    if positions == "rotary":
        llama(initializer_range=0.5).save_pretrained(tmp_path)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = dict(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5)
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), **sizes)).save_pretrained(tmp_path)
    found = []
    for side in ("left", "right"):
        _save_tokenizer(tmp_path, side)
        for batch_size in (1, 3, 64):
            found.append(embed_texts(TEXTS, f"llm:{tmp_path}", batch_size=batch_size))
    found.append(embed_texts(TEXTS[::-1], f"llm:{tmp_path}")[::-1])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-5)


def _save_tokenizer(folder: Path, side: str) -> None:
    words = tokenizer()
    before, words.padding_side, words.truncation_side = (words.padding_side, words.truncation_side), side, side
    words.save_pretrained(folder)
    words.padding_side, words.truncation_side = before


def test_long_texts_keep_their_beginning(language_model: Path) -> None:
    text = " ".join(TITLES[1:])
    cut = embed_texts([text], f"llm:{language_model}", max_tokens=7)[0]
    np.testing.assert_allclose(cut, by_hand(language_model, text, 7), rtol=1e-4, atol=1e-5)
    whole = embed_texts([text], f"llm:{language_model}")[0]
    assert np.abs(cut - whole).max() > 1e-3
    long = " ".join([text] * 30)  # beyond the model's 256 positions
    at_limit = embed_texts([long], f"llm:{language_model}", max_tokens=10_000)[0]
    np.testing.assert_allclose(at_limit, by_hand(language_model, long, 256), rtol=1e-3, atol=1e-4)


def test_equal_texts_are_computed_once(language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def counted(lm: Any, tokens: Any, pad_token_id: int) -> torch.Tensor:
        rows.append(len(tokens))
        return mean_of_states(lm, tokens, pad_token_id)

    monkeypatch.setattr(embed_text, "mean_of_states", counted)
    vectors = embed_texts(TEXTS * 5, f"llm:{language_model}", batch_size=3)
    assert sum(rows) == 4 and max(rows) == 3
    assert np.array_equal(vectors[:5], vectors[5:10])


def test_a_text_without_tokens_has_a_zero_vector(language_model: Path) -> None:
    vectors = embed_texts(["", TITLES[1]], f"llm:{language_model}", batch_size=1)
    assert not vectors[0].any()
    np.testing.assert_allclose(vectors[1], by_hand(language_model, TITLES[1]), rtol=1e-4, atol=1e-5)


def test_a_named_download_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    vectors = embed_texts(["abc", "another"], "llm:tiny-llama")  # made on the spot
    np.testing.assert_allclose(vectors[0], by_hand(tmp_path / "tiny-llama", "abc"), rtol=1e-4, atol=1e-5)
    assert embedder_identity("llm:tiny-llama").startswith("llm:tiny-llama@sha256:")


def test_damaged_weights_are_noticed(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="2 of 2 text vectors hold NaN"):
        embed_texts(["river", "stone"], f"llm:{tmp_path}")


# Sentence models -----------------------------------------------------------------------------------------------------


@needs_sentences
def test_sentence_model_pools_its_token_states(sentence_model: Path) -> None:
    vectors = embed_texts(TEXTS, str(sentence_model), batch_size=2)
    assert vectors.shape == (5, WIDTH) and vectors.dtype == np.float32
    model, words = BertModel.from_pretrained(sentence_model).eval(), AutoTokenizer.from_pretrained(sentence_model)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            states = model(**words(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(vector, states.mean(0).numpy(), rtol=1e-4, atol=1e-5)


@needs_sentences
def test_sentence_model_obeys_the_smaller_limit(sentence_model: Path) -> None:
    text = "old river stone night paper glass"
    cut = embed_texts([text, "old river"], str(sentence_model), max_tokens=4)  # [CLS] old river [SEP]
    np.testing.assert_allclose(cut[0], cut[1], rtol=1e-4, atol=1e-5)
    own = embed_texts([" ".join(["old"] * 28), " ".join(["old"] * 40)], str(sentence_model), max_tokens=1000)
    np.testing.assert_allclose(own[0], own[1], rtol=1e-4, atol=1e-5)


@needs_sentences
def test_code_and_pickles_of_a_model_are_refused(sentence_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sentence_model, folder)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "own_code.py").write_text("raise RuntimeError('this code was run')")
    modules[1]["type"] = "own_code.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="could not be loaded"):
        embed_texts(["river"], str(folder))
    shutil.rmtree(folder)
    shutil.copytree(sentence_model, folder)
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="2_Dense/pytorch_model.bin: found pickled weights"):
        embed_texts(["river"], str(folder))


def test_a_missing_library_names_its_extra(sentence_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DependencyError, match=r"llmrec\[text\].*llm:NAME"):
        embed_texts(["river"], str(sentence_model))


@needs_sentences
def test_minilm_finds_what_is_alike() -> None:
    if not (cache_root() / "minilm" / "source.json").is_file():
        pytest.skip("minilm is not cached; fetch it with `llmrec pull minilm`")
    texts = ["Star Wars (1977). Space battle", "The Empire Strikes Back. Space opera", "Cinderella, a fairy tale"]
    vectors = embed_texts(texts, "minilm")
    assert vectors.shape == (3, 384)
    alike = vectors @ vectors.T
    assert alike[0, 1] > alike[0, 2] + 0.1
    assert embedder_identity("minilm").startswith("minilm@sha256:")


# Identity and refusals -----------------------------------------------------------------------------------------------


def test_identity_follows_the_weights(language_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / language_model.name
    shutil.copytree(language_model, copy)
    (copy / "README.md").write_text("another copy")
    identity = embedder_identity(f"llm:{language_model}")
    assert embedder_identity(f"llm:{copy}") == identity and identity.startswith(f"llm:{language_model.name}@sha256:")
    assert str(language_model.parent) not in identity
    assert embedder_identity(str(copy)) != identity  # pooled by sentence-transformers: another vector
    changed = llama(initializer_range=0.5)
    with torch.no_grad():
        changed.model.norm.weight[0] += 0.5
    changed.save_pretrained(copy)
    assert embedder_identity(f"llm:{copy}") != identity


def test_identity_of_a_hub_id_is_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: list[tuple[Any, ...]] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(tmp_path / "snapshots" / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert embedder_identity("some/model", "main") == f"some/model@{commit}"
    assert embedder_identity("llm:some/model") == f"llm:some/model@{commit}"
    assert asked == [("some/model", "main"), ("some/model", None)]


@needs_sentences
def test_unknown_models_are_refused(tmp_path: Path) -> None:
    for call in (lambda name: embed_texts(["river"], name), embedder_identity):
        with pytest.raises(CheckpointError, match="no such folder"):
            call("./nowhere")
        with pytest.raises(CheckpointError, match="nobody/nothing"):
            call("nobody/nothing")
    with pytest.raises(CheckpointError, match="nothing"):
        embed_texts(["river"], "llm:nobody/nothing")
    with pytest.raises(CheckpointError, match=r"found no \*.safetensors"):
        embedder_identity(str(tmp_path))


def test_wrong_options_are_refused(language_model: Path) -> None:
    model = f"llm:{language_model}"
    with pytest.raises(DataError, match="no texts"):
        embed_texts([], model)
    with pytest.raises(RecipeError, match="batch_size 0"):
        embed_texts(["river"], model, batch_size=0)
    with pytest.raises(RecipeError, match="max_tokens 0"):
        embed_texts(["river"], model, max_tokens=0)
    for call in (lambda: embed_texts(["river"], model, revision="main"), lambda: embedder_identity(model, "main")):
        with pytest.raises(RecipeError, match="revision 'main'"):
            call()


def test_nothing_is_drawn_where_there_is_no_terminal(language_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    embed_texts(TEXTS, f"llm:{language_model}")
    written = capfd.readouterr()
    assert written.out == "" and "embed texts" not in written.err
