"""Item codes as ordinary tokens: what an export of the style item_codes adds to a merged model.

    model             token embeddings, and an output layer of its own where there is one, grown by sum of W_h rows: the
                      trained rows of the codes, level after level, behind the base model's V rows
    tokenizer         the codes as tokens of the same numbers (`llmrec.llm.code_tokens`)
    item_codes.json   first ids and sizes of the levels, fingerprint of the item tokenizer, what stands around the items
                      of a prompt, and the tokens of each item under its original id; no titles

Names, ids and log-probabilities of codes are compared in the folder as it is read back, with the adapter on its base.

The folder answers without llmrec, but nothing keeps such a server inside the catalogue: the trie and beams are ours.
Windows were trained level by level, so their scores are normalised within the level; those of tasks over the
vocabulary, as a plain beam search does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrec.errors import CheckFailed, RecipeError
from llmrec.llm.backbone import Backbone
from llmrec.llm.code_tokens import FORMAT, ITEM_CODES, LETTERS, CodeTokens, misnumbered, with_codes
from llmrec.llm.item_codes import ItemCodeRecommender
from llmrec.llm.parity import Parity, compare_levels
from llmrec.llm.recommender import LLMRecommender

PLAIN_CODES = (
    "a plain language model server can run it: items are ordinary tokens, in prompts and in answers. Nothing keeps "
    "such a server inside the catalogue: the mask that can write items only is llmrec's own (llmrec.llm.code_tokens)"
)


def grow(model: Any, recommender: ItemCodeRecommender, tokens: CodeTokens) -> None:
    """Append the code rows of a recommender to the layers of a merged model, in place.

    Raises:
        RecipeError: Input and output are tied in one of the two and not in the other.
    """
    own = recommender.code_output
    with torch.random.fork_rng(devices=[]):  # the first values of new rows are drawn, and replaced at once
        model.resize_token_embeddings(tokens.end, mean_resizing=False)
    table, layer = model.get_input_embeddings().weight, model.get_output_embeddings()
    if (layer.weight is table) is not (own is None):
        raise RecipeError("the merged model ties its output layer to its token embeddings otherwise than the base did")
    with torch.no_grad():
        table[tokens.first :] = recommender.code_embedding.weight.to(table)
        if own is not None:
            layer.weight[tokens.first :] = own.weight.to(layer.weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias[tokens.first :] = 0  # code logits were trained without one


def require_plain_layers(backbone: Backbone) -> None:
    """Refuse models that scale embeddings or logits outside the rows: codes were trained without that.

    Raises:
        RecipeError: Naming what the model does.
    """
    config = backbone.base.config.get_text_config(decoder=True)
    names = ("logits_scaling", "logit_scale", "final_logit_softcapping")
    found = [name for name in names if getattr(config, name, None) not in (None, 1)]
    ids = torch.arange(min(4, len(backbone.embedding.weight)), device=backbone.embedding.weight.device)
    if not torch.equal(backbone.embed(ids), backbone.embedding.weight[ids]):
        found.append("scaled token embeddings")
    if found:
        raise RecipeError(
            f"{type(backbone.base).__name__} has {', '.join(found)}; item codes were trained beside that, as rows of "
            "their own, and would be scaled inside its layers. Serve the run itself with llmrec"
        )


class MergedCodeRecommender(ItemCodeRecommender):
    """A recommender whose codes are tokens of its model: nothing of its own but the catalogue.

    Args:
        model: The grown model.
        trained: The recommender it was made of, for options, codes and prompts; its weights are not read.
        tokens: Where the codes stand.
    """

    def __init__(self, model: Any, trained: ItemCodeRecommender, tokens: CodeTokens) -> None:
        # Not the parent's: that makes tables of codes, and measures the vocabulary by the model's rows.
        LLMRecommender.__init__(self, model, trained.item_table, trained.options, None, trained.tokenizer)
        self.tokens = tokens
        self.level_sizes, self.offsets = trained.level_sizes, trained.offsets
        self.register_buffer("codes", trained.codes, persistent=False)
        self.register_buffer("prefix_ids", trained.prefix_ids, persistent=False)
        self._trie, self.tasks = trained._trie, trained.tasks

    @property
    def vocabulary(self) -> int:
        """V of the base model."""
        return self.tokens.first

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, d_llm]; words and codes stand in one table."""
        return self.backbone.embed(input_ids)

    def embed_codes(self, codes: Tensor, first_level: int = 0) -> Tensor:
        """Codes [..., m] of levels from `first_level` on -> [..., m, d_llm]."""
        starts = self.tokens.starts[first_level : first_level + codes.shape[-1]]
        return self.backbone.embed(codes.clamp(min=0) + torch.tensor(starts, device=codes.device))

    def level_logits(self, level: int, hidden: Tensor) -> Tensor:
        """[..., d_llm] -> [..., W_level] float32."""
        start = self.tokens.starts[level]
        return self.backbone.logits(hidden)[..., start : start + self.level_sizes[level]]

    def _all_logits(self, hidden: Tensor) -> Tensor:
        return self.backbone.logits(hidden)


class CodeExport:
    """The codes' share of an export, from what the trained recommender says to the check of the folder.

    Args:
        recommender: As trained, before its adapter is merged.
        gate: [E] the fixed mixture, where the adapter asks for gates.
        item_keys: Original ids, index = item id.

    Raises:
        RecipeError: Tokenizer or model cannot hold the codes, or there are no original ids.
    """

    def __init__(self, recommender: ItemCodeRecommender, gate: Tensor | None, item_keys: Sequence[str] | None) -> None:
        if item_keys is None or len(item_keys) != len(recommender.codes):
            found = "none" if item_keys is None else len(item_keys)
            raise RecipeError(f"item_keys: found {found}, expected {len(recommender.codes)} (the first is padding)")
        require_plain_layers(recommender.backbone)
        self.recommender, self.item_keys = recommender, item_keys
        self.tokens = CodeTokens(recommender.vocabulary, recommender.level_sizes)
        self.tokenizer, self.fillers = with_codes(recommender.tokenizer, self.tokens)
        self.prompts = self._fixed_prompts()
        self.expected = trained_log_probs(recommender, self.prompts, gate)

    def grow(self, model: Any) -> None:
        """Append the code rows to a merged model."""
        grow(model, self.recommender, self.tokens)

    def write(self, folder: Path) -> None:
        """The tokenizer and item_codes.json."""
        self.tokenizer.save_pretrained(folder)
        names, table = self.tokens.names, self.tokens.ids(self.recommender.codes).tolist()
        items = {
            key: [names[token - self.tokens.first] for token in row]
            for key, row in zip(self.item_keys[1:], table[1:], strict=True)
        }
        record = {**self.record(), "prompt": self._frame(), "answer": self._answer(), "items": items}
        (folder / ITEM_CODES).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")

    def check(self, folder: Path, model: Any, out: Path) -> Parity:
        """Compare the folder, read back, with the recommender as it was trained.

        Raises:
            CheckFailed: Ids or log-probabilities of codes differ.
        """
        from transformers import AutoTokenizer

        wrong = misnumbered(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), self.tokens)
        if wrong is not None:
            raise CheckFailed(f"the saved tokenizer numbers item codes otherwise, so {out} was not made: {wrong}")
        tasks = bool(self.recommender.options.tasks)
        found = exported_log_probs(model, self.prompts, self.tokens, tasks)
        parity = compare_levels(self.expected, found, model.dtype)
        parity.require(f"the exported model writes other item codes than the trained one, so {out} was not made")
        return parity

    def merged(self, model: Any) -> MergedCodeRecommender:
        """The recommender over the exported model."""
        return MergedCodeRecommender(model, self.recommender, self.tokens).eval()

    def record(self) -> dict[str, Any]:
        """Where the codes stand, for item_codes.json and the record of the export."""
        levels = zip(LETTERS, self.tokens.level_sizes, self.tokens.starts, strict=False)
        return {
            "format": FORMAT,
            "item_tokenizer": self.recommender.options.item_codes,
            "level_sizes": list(self.tokens.level_sizes),
            "first_token_id": self.tokens.first,
            "levels": [{"letter": name, "size": size, "first_token_id": start} for name, size, start in levels],
            "filler_tokens": self.fillers,
            "items_share_codes": self.recommender._trie.num_leaves < len(self.item_keys) - 1,
            "normalised": "vocabulary" if self.recommender.options.tasks else "level",
        }

    def told(self, rows: Sequence[dict[str, Any]], parity: Parity) -> dict[str, Any]:
        """What the record of the export says of a checked folder.

        Args:
            rows: Real questions, the first of which is shown; there may be none.
            parity: What `check` found.
        """
        what = "log-probabilities of codes after fixed prompts, this folder against base and adapter"
        codes = {**self.record(), "parity": {"what": what, **asdict(parity)}}
        shown = {"example": self._example(rows[0])} if rows else {}
        return {"plain_server": PLAIN_CODES, "item_codes": codes, **shown}

    def _example(self, row: dict[str, Any]) -> dict[str, Any]:
        """One real prompt, as token ids and as text."""
        ids = self._prompt_ids(row["item_ids"]).tolist()
        return {"prompt_token_ids": ids, "prompt": self.tokenizer.decode(ids), **self._answer()}

    def _answer(self) -> dict[str, Any]:
        tasks, depth = bool(self.recommender.options.tasks), len(self.tokens.level_sizes)
        stop = [int(self.tokenizer.eos_token_id)] if tasks else []
        return {"max_new_tokens": depth + len(stop), "stop_token_ids": stop}

    def _prompt_ids(self, items: Sequence[int]) -> Tensor:
        """[S] token ids of the prompt of a history."""
        recommender = self.recommender
        shown = [int(item) for item in items][-recommender.options.max_history :]
        if recommender.options.tasks:
            return torch.as_tensor(recommender._asker.encode_history(shown))
        return torch.cat([recommender.prefix_ids, self.tokens.ids(recommender.codes[shown]).flatten()]).cpu()

    def _fixed_prompts(self) -> list[Tensor]:
        """Histories of several lengths over the whole catalogue, each with all but the last code of one more item."""
        items, longest = len(self.item_keys) - 1, self.recommender.options.max_history
        prompts = []
        for number, length in enumerate(sorted({1, min(2, longest), (longest + 1) // 2, longest})):
            path = [1 + (number + place * (items // 3 + 1)) % items for place in range(length + 1)]
            following = self.tokens.ids(self.recommender.codes[path[-1]])[:-1].cpu()
            prompts.append(torch.cat([self._prompt_ids(path[:-1]), following]))
        return prompts

    def _frame(self) -> dict[str, Any]:
        """Token ids around the items of a prompt, found by writing prompts of one and of two items."""
        one, two = (self._prompt_ids(items) for items in ([1], [1, 1]))
        depth, codes = len(self.tokens.level_sizes), (two >= self.tokens.first).nonzero().flatten()
        first, last = int(codes[0]), int(codes[-1])
        longest, limit = self.recommender.options.max_history, None
        if self.recommender.options.tasks:
            asked = self.recommender._asker.options
            longest, limit = min(longest, asked.max_history), asked.max_length
        return {
            "before": one[:first].tolist(),
            "between": two[first + depth : last + 1 - depth].tolist(),
            "after": two[last + 1 :].tolist(),
            "max_items": longest if len(codes) > depth else 1,  # where two never fit, what parts them was not seen
            "max_length": limit,
        }


def readme_lines(record: dict[str, Any]) -> list[str]:
    """What people read about the codes of an export.

    Args:
        record: The content of llmrec_export.json.
    """
    codes = record["item_codes"]
    parity, levels = codes["parity"], codes["levels"]
    names = ", ".join(
        f"`<{level['letter']}_0>` to `<{level['letter']}_{level['size'] - 1}>` are the tokens from "
        f"{level['first_token_id']} on"
        for level in levels
    )
    lines = [
        "", "## Items", "",
        f"An item is {len(levels)} tokens, one of each level: {names}. `{ITEM_CODES}` holds the tokens of every item "
        "and what stands around the items of a prompt. Text that contains such a name reads as the code.", "",
        f"Checked against base and adapter in {parity['dtype']}: log-probabilities of codes differ by at most "
        f"{parity['max_abs_diff']:.3g} (tolerance {parity['tolerance']:g}), {parity['top_k_overlap']:.1%} of the "
        f"{parity['top_k']} best codes agree. They are normalised over the {codes['normalised']}.", "",
        "```python",
        "from llmrec.llm.code_tokens import ExportedCodes", "",
        "codes = ExportedCodes.read(folder)  # its docstring shows how to ask for items of the catalogue only",
        "```",
    ]  # fmt: skip
    if codes["filler_tokens"]:
        lines += ["", f"{codes['filler_tokens']} tokens `<|unused_N|>` fill ids that the base model has and its "
                  "tokenizer lacks."]  # fmt: skip
    if codes["items_share_codes"]:
        lines += ["", "Some items share their codes: an answer may name several."]
    return lines


@torch.no_grad()
def trained_log_probs(recommender: ItemCodeRecommender, prompts: list[Tensor], gate: Tensor | None) -> list[Tensor]:
    """What a recommender says of the codes that come last: per level [n, W], float32 on the processor.

    Args:
        recommender: With its adapter.
        prompts: Token ids, the last M - 1 of them codes of the answer.
        gate: [E] the same expert weights for every prompt, for adapters that ask for gates.
    """
    recommender.eval()
    device, depth = recommender.item_table.device, recommender.depth
    gates = {} if gate is None else {"gates": gate.to(device)[None]}
    rows = []
    for ids in prompts:
        embeds = recommender.embed(ids.to(device)[None])
        hidden = recommender.backbone(embeds, gates=gates).last_hidden_state[0, -depth:]
        spoken = [recommender._spoken(level, hidden[level]) for level in range(depth)]
        rows.append(spoken if recommender.options.tasks else [logits.log_softmax(-1) for logits in spoken])
    return [torch.stack(level).cpu() for level in zip(*rows, strict=True)]


@torch.no_grad()
def exported_log_probs(model: Any, prompts: list[Tensor], tokens: CodeTokens, tasks: bool) -> list[Tensor]:
    """The same of a plain causal language model, by its own forward; `tasks`: normalised over the vocabulary."""
    rows = []
    for ids in prompts:
        answered = model(input_ids=ids.to(model.device)[None], use_cache=False).logits[0]
        logits = answered[-len(tokens.level_sizes) :].float()
        whole = logits.log_softmax(-1) if tasks else logits
        levels = zip(whole, tokens.starts, tokens.level_sizes, strict=True)
        found = [row[start : start + size] for row, start, size in levels]
        rows.append(found if tasks else [part.log_softmax(-1) for part in found])
    return [torch.stack(level).cpu() for level in zip(*rows, strict=True)]
