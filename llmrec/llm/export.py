"""A trained recommender as a plain language model: the adapter merged into its base, checked, and then moved in place.

    config.json, generation_config.json, *.safetensors, tokenizer files   a model of transformers, nothing of ours
    recommender/, encoder/   item_slots and hybrid: projector, output layer, options; the encoder they read
    item_codes.json          item_codes: codes are tokens of model and tokenizer (`llmrec.llm.export_codes`)
    llmrec_export.json       what was merged, the parity check, what was lost and by how much scores moved
    README.md                the same for people

The check reads the folder back and compares it with the adapter on its base. An instance-wise adapter has no one merged
model: with one fixed mixture for everybody the check compares with the adapter under that same mixture, and the
distance to the true model is measured on real histories and stated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from llmrec.errors import CheckFailed, RecipeError
from llmrec.llm.parity import (
    Parity,
    Shift,
    allowed_difference,
    compare_logits,
    compare_scores,
    history_scores,
    prompt_logits,
)
from llmrec.llm.storing import save_recommender

if TYPE_CHECKING:
    from llmrec.llm.export_codes import CodeExport
    from llmrec.llm.recommender import LLMRecommender

RECORD = "llmrec_export.json"
OWN_PARTS, ENCODER = "recommender", "encoder"
PLAIN = "a plain language model server can run it; prompts are made as in the run (see `example`)"
NOT_PLAIN = (
    "a plain language model server cannot run it: its inputs are projected item vectors, not only tokens. The merged "
    "weights need the projector in recommender/ and the encoder in encoder/ (LLMRecommender.from_pretrained)"
)


@dataclass(frozen=True)
class Exported:
    """What an export found.

    Args:
        parity: Merged model against base and adapter (under the fixed gate, where there is one).
        scores: Exported recommender against the trained one on real histories; None without histories.
        record: The content of llmrec_export.json.
    """

    parity: Parity
    scores: Shift | None
    record: dict[str, Any]


def export_recommender(
    recommender: LLMRecommender,
    out: Path,
    *,
    facts: dict[str, Any],
    rows: Sequence[dict[str, Any]] = (),
    trained_scores: Tensor | None = None,
    gate: Sequence[float] | str | None = None,
    item_keys: Sequence[str] | None = None,
) -> Exported:
    """Merge, save, check, and only then give the folder its name. The recommender is used up.

    Args:
        recommender: A loaded recommender with its renderer.
        out: The folder to make.
        facts: Written into the record: run, system, base model, why scores may differ.
        rows: Real questions (`parity.history_rows`).
        trained_scores: Scores of `rows` by the run as it was trained, where that is not `recommender`.
        gate: Fixed expert weights of an instance-wise adapter: "uniform" or E weights.
        item_keys: Original ids, index = item id; the style item_codes writes them beside their tokens.

    Raises:
        RecipeError: A gate is missing or given in vain, the folder is taken, or codes cannot become tokens.
        CheckFailed: The saved model is not the trained one; nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} exists and is not empty; give another --out")
    fixed = _fixed_gate(recommender, gate)
    tokenizer = _tokenizer(recommender)
    base, dtype = recommender.backbone.base, recommender.backbone.dtype
    expected = prompt_logits(recommender.backbone, tokenizer, fixed)
    scores = history_scores(recommender, list(rows)) if rows else None
    codes = _code_export(recommender, fixed, item_keys)
    merged = _merged(recommender, fixed)
    if codes is not None:
        codes.grow(merged)
    merged.llmrec_base_name = f"{getattr(base, 'llmrec_base_name', base.name_or_path)}, merged"
    with _appearing(out) as folder:
        merged.save_pretrained(folder)
        if codes is not None:
            codes.write(folder)
        else:
            tokenizer.save_pretrained(folder)
        if codes is None and recommender.options.style != "text":
            save_recommender(_rebuilt(recommender, merged), folder / OWN_PARTS)
            if recommender.encoder is not None:
                recommender.encoder.save_pretrained(folder / ENCODER)
        del merged, base
        recommender.backbone.model = None  # one copy of the weights at a time
        read = _read_back(folder, dtype, recommender.item_table.device)
        words = [part[:, : expected[0].shape[1]] for part in prompt_logits(read, tokenizer)]
        parity = compare_logits(expected, words, dtype)
        parity.require(f"the merged model is not the trained one, so {out} was not made")
        told = {} if codes is None else codes.told(rows, codes.check(folder, read, out))
        shift = None
        if scores is not None:
            reloaded = _reloaded(recommender, folder, read) if codes is None else codes.merged(read)
            now = history_scores(reloaded, list(rows))
            if fixed is None:
                _require_scores(scores, now, parity, out)
            shift = compare_scores(scores if trained_scores is None else trained_scores, now, recommender)
        record = _record(recommender, facts, fixed, parity, shift, list(rows)) | told
        (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_readme(record), encoding="utf-8")
    return Exported(parity, shift, record)


def parse_gate(text: str | None) -> list[float] | str | None:
    """ "uniform", a JSON file with E weights (a list, or {"gate": [...]}), or weights between commas.

    Raises:
        RecipeError: None of them.
    """
    if text is None or text == "uniform":
        return text
    try:
        values: Any = text.split(",")
        if Path(text).suffix == ".json":
            content = json.loads(Path(text).read_text(encoding="utf-8"))
            values = content.get("gate") if isinstance(content, dict) else content
        return [float(value) for value in values]
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(
            f"--gate: found {text!r} ({error}); expected uniform, weights such as 0.4,0.3,0.2,0.1, or a JSON file with "
            "a list of weights"
        ) from error


def refuse_gate(num_experts: int | None, gated: bool, gate: Any) -> None:
    """Refuse an instance-wise adapter without a fixed gate, and a gate nothing reads.

    Raises:
        RecipeError: Saying what to give instead.
    """
    if gated and gate is None:
        raise RecipeError(
            "the adapter is instance-wise: its weights differ from user to user, so no one merged model does what it "
            "does. Serve the run itself, or merge one fixed mixture of its experts for everybody: --gate uniform, "
            f"--gate with {num_experts} weights (w1,w2,..) or --gate FILE.json; the export then states what that loses"
        )
    if not gated and gate is not None:
        raise RecipeError("--gate: the adapter has no gates, its weights are the same for everybody; leave --gate out")


def _fixed_gate(recommender: LLMRecommender, gate: Sequence[float] | str | None) -> Tensor | None:
    config = recommender.backbone.adapter_config
    gated = recommender.backbone.gate_kind is not None
    refuse_gate(getattr(config, "num_experts", None), gated, gate)
    if gate is None:
        return None
    from llmrec.tuners.gate_state import fixed_gate

    return fixed_gate(gate, int(config.num_experts))


def _code_export(
    recommender: LLMRecommender, fixed: Tensor | None, item_keys: Sequence[str] | None
) -> CodeExport | None:
    if recommender.options.style != "item_codes":
        return None
    from llmrec.llm.export_codes import CodeExport

    return CodeExport(recommender, fixed, item_keys)  # type: ignore[arg-type]


def _tokenizer(recommender: LLMRecommender) -> Any:
    if recommender.tokenizer is None:
        raise RecipeError("the recommender has no tokenizer; expected the base model's, to save and to check with")
    return recommender.tokenizer


def _merged(recommender: LLMRecommender, fixed: Tensor | None) -> Any:
    model = recommender.model
    if not isinstance(model, PeftModel):
        return model
    if fixed is None:
        return model.merge_and_unload(safe_merge=True)
    merge: Any = model.base_model
    return merge.merge_and_unload(safe_merge=True, gate=fixed)


def _rebuilt(recommender: LLMRecommender, model: Any) -> LLMRecommender:
    """The recommender over a merged model, with its own projector, output layer and biases."""
    made = type(recommender).build(
        model,
        encoder=recommender.encoder,
        item_table=recommender.item_table,
        tokenizer=recommender.tokenizer,
        renderer=getattr(recommender, "renderer", None),
        **asdict(recommender.options),
    )
    made.to(recommender.item_table.device)
    state = made.own_state()
    with torch.no_grad():
        for name, value in recommender.own_state().items():
            state[name].copy_(value)
    return made.eval()


def _reloaded(recommender: LLMRecommender, folder: Path, model: Any) -> LLMRecommender:
    if recommender.options.style == "text":
        return _rebuilt(recommender, model)
    loaded = type(recommender).from_pretrained(
        folder / OWN_PARTS,
        model,
        recommender.encoder,
        item_table=recommender.item_table,
        tokenizer=recommender.tokenizer,
        renderer=getattr(recommender, "renderer", None),
    )
    return loaded.to(recommender.item_table.device)


def _read_back(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, use_safetensors=True
    )
    return model.to(device).eval()


def _require_scores(trained: Tensor, exported: Tensor, parity: Parity, out: Path) -> None:
    """The recommender around the model has to agree as well; scores have a scale of their own."""
    allowed = allowed_difference(parity.dtype, float(trained.abs().max()))
    found = float((trained - exported).abs().max())
    if not found <= allowed:
        raise CheckFailed(
            f"the exported recommender is not the trained one, so {out} was not made: scores of real histories differ "
            f"by up to {found:.3g} ({allowed:.3g} allowed in {parity.dtype})"
        )


def _record(
    recommender: LLMRecommender,
    facts: dict[str, Any],
    fixed: Tensor | None,
    parity: Parity,
    shift: Shift | None,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    plain = recommender.options.style == "text"
    record = {
        **facts,
        "style": recommender.options.style,
        "plain_server": PLAIN if plain else NOT_PLAIN,
        "gate": None if fixed is None else [round(float(weight), 6) for weight in fixed],
        "lost": None,
        "parity": {"what": "logits of fixed prompts, this folder against base and adapter", **asdict(parity)},
        "scores": None if shift is None else {"what": "this export against the run", **shift.to_dict()},
    }
    if fixed is not None:
        record["lost"] = "one mixture of experts for everybody: the weights no longer follow the user's history"
    if plain and rows:
        record["example"] = _example(recommender, rows[0])
    return record


def _example(recommender: Any, row: dict[str, Any]) -> dict[str, Any]:
    """One real prompt as a server is asked: tokens, since text cut at other places may give others."""
    prompt = recommender.renderer.encode(row["item_ids"], row.get("candidates", ()))
    ids = [int(token) for token in prompt.input_ids]
    return {
        "prompt_token_ids": ids,
        "prompt": recommender.tokenizer.decode(ids),
        "stop_token_ids": [int(recommender.renderer.answer_ids(1)[-1])],
    }


def _readme(record: dict[str, Any]) -> str:
    parity, scores = record["parity"], record["scores"]
    lines = [
        "---", "library_name: transformers", "base_model_relation: merge", "tags: [recommendation]", "---", "",
        f"# {record['system']}, merged", "",
        f"The adapter of a recommender trained by llmrec on the data set `{record['dataset']}`, merged into "
        f"`{record['base_model']}`. Style {record['style']}: {record['plain_server']}.", "",
        f"Checked against base and adapter in {parity['dtype']}: logits of fixed prompts differ by at most "
        f"{parity['max_abs_diff']:.3g} (tolerance {parity['tolerance']:g}), {parity['top_k_overlap']:.1%} of the "
        f"{parity['top_k']} best tokens agree.",
    ]  # fmt: skip
    if record["gate"] is not None:
        lines += ["", f"**Lost**: {record['lost']}. The mixture is {record['gate']}."]
    if record.get("quantised") is not None:
        lines += ["", f"**Differs**: {record['quantised']}."]
    if scores is not None:
        lines += ["", f"Against the run as trained, on {scores['histories']} real histories with {scores['scored']} "
                  f"scored: scores differ by {scores['mean_abs_diff']:.3g} on average, {scores['max_abs_diff']:.3g} at "
                  f"most (standard deviation {scores['spread']:.3g}); {scores['top_1_same']:.1%} keep the best item, "
                  f"{scores['top_k_overlap']:.1%} of the {scores['top_k']} best items agree."]  # fmt: skip
    if record["style"] == "item_codes":
        from llmrec.llm.export_codes import readme_lines

        lines += readme_lines(record)
    return "\n".join([*lines, "", f"`{RECORD}` holds all numbers.", ""])


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that gets its name when everything inside it is written and checked, and is deleted otherwise."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
