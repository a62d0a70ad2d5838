"""Language models that speak items: every item is M added tokens, and the next item is written code by code.

    windows   [begin] s_1^1 .. s_1^M s_2^1 .. s_L^M      every code of every target is supervised in one pass
    tasks     prompts and answers in words and codes      LC-Rec's alignment tasks (`llmrec.data.code_tasks`)
    asking    read the history once, then exact beam search in the prefix trie; beams of a user share its cache

The added tokens are rows of a table of this recommender, behind the base model's vocabulary: token V + offset_h + c is
code c of level h. Only these rows train, base embeddings stay as they are, the adapter holds no copy of them, and
loading resizes nothing. Rows start at the mean embedding of the words in the titles of their items (ours; LC-Rec
resizes the embedding matrix), and serve input and output where the base model ties its two, else there are two tables.

Windows are ours, for processors: LC-Rec trains prompts. Logits compete within their level there, over the vocabulary
and all codes with tasks; asking uses the same normaliser as training.

Gates are causal. In windows the token s_t^k carries the encoder's state of the latest event that is complete when the
next code is written: after event t for the last code of item t, after event t - 1 for the others, whose next code
belongs to t itself; a zero vector (finished gates: uniform) before the first. A prompt has one gate, as in the style
text. Batches of windows are right padded: causal attention alone keeps padding out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.blocks.beam_search import recommend_codes
from llmrec.blocks.readout import top_items
from llmrec.data.schema import Ranking
from llmrec.errors import DataError, RecipeError
from llmrec.llm.backbone import GateArguments
from llmrec.llm.constrained import CausalCodeSpeaker, runner
from llmrec.llm.recommender import LLMRecommender, RecommenderOptions, latest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmrec.data.schema import SequenceBatch
    from llmrec.item_tokenizers.base import ItemTokenizer

IGNORED = -100


class ItemCodeRecommender(LLMRecommender):
    """See the module; a `CandidateScorer` and, for batches of tasks, an `AnswerModel`.

    Args:
        model: PeftModel, or a plain causal language model, then frozen.
        options: See `RecommenderOptions`; `level_sizes` and `item_codes` are those of the item tokenizer.
        item_tokenizer: The codes.
        encoder: Frozen provider of gates, where the adapter wants them.
        tokenizer: The base model's.
        titles: Text of every item, for the first values of the added rows; None draws them.
        tasks: Writes prompts (`CodeTasks`), where training used tasks; asking needs it then.

    Raises:
        RecipeError: The codes are not those the options name.
    """

    codes: Tensor
    prefix_ids: Tensor

    def __init__(
        self,
        model: nn.Module,
        options: RecommenderOptions,
        item_tokenizer: ItemTokenizer,
        encoder: nn.Module | None = None,
        tokenizer: Any = None,
        titles: Sequence[str] | None = None,
        tasks: Any = None,
    ) -> None:
        super().__init__(model, torch.zeros(len(item_tokenizer.codes), 0), options, encoder, tokenizer)
        if options.item_codes != item_tokenizer.fingerprint:
            raise RecipeError(
                f"item codes {item_tokenizer.fingerprint}, expected {options.item_codes}: another item tokenizer"
            )
        device = self.backbone.embedding.weight.device
        self.level_sizes = tuple(options.level_sizes)
        self.offsets = [sum(self.level_sizes[:level]) for level in range(self.depth)]
        self.register_buffer("codes", item_tokenizer.codes.to(device), persistent=False)
        self._trie = item_tokenizer.trie().to(device)
        rows = self._first_rows(titles)
        self.code_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
        tied = self.backbone.base.get_output_embeddings().weight is self.backbone.embedding.weight
        self.code_output = None if tied else nn.Embedding.from_pretrained(rows.clone(), freeze=False)
        begin = getattr(tokenizer, "bos_token_id", None)
        prefix = [] if begin is None else [int(begin)]
        if options.instruction:
            prefix = list(tokenizer(options.instruction)["input_ids"])
        self.register_buffer("prefix_ids", torch.tensor(prefix, dtype=torch.long, device=device), persistent=False)
        self.tasks = tasks

    @property
    def depth(self) -> int:
        """M."""
        return len(self.level_sizes)

    @property
    def vocabulary(self) -> int:
        """V, the base model's tokens; codes are numbered behind them."""
        return int(self.backbone.embedding.weight.shape[0])

    @torch.no_grad()
    def _first_rows(self, titles: Sequence[str] | None) -> Tensor:
        """[sum of level sizes, d_llm] float32: mean title embedding of each code's items, and a little noise."""
        table = self.backbone.embedding.weight.detach().float()
        spread = table.std()
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(sum(self.level_sizes), table.shape[1], generator=generator).to(table.device) * spread
        if titles is None or self.tokenizer is None:
            return rows
        vectors = table.new_zeros(len(titles), table.shape[1])
        for item, ids in enumerate(self.tokenizer([t or " " for t in titles], add_special_tokens=False)["input_ids"]):
            if ids:
                vectors[item] = table[ids].mean(0)
        index = (self.codes[1:] + torch.tensor(self.offsets, device=table.device)).flatten()
        total = torch.zeros_like(rows).index_add_(0, index, vectors[1:].repeat_interleave(self.depth, 0))
        count = torch.bincount(index, minlength=len(rows))[:, None]
        return torch.where(count > 0, total / count.clamp(min=1) + 0.2 * rows, rows)

    # Tokens ----------------------------------------------------------------------------------------------------------

    def embed_codes(self, codes: Tensor, first_level: int = 0) -> Tensor:
        """Codes [..., m] of levels from `first_level` on -> [..., m, d_llm] in the base model's type."""
        levels = self.offsets[first_level : first_level + codes.shape[-1]]
        rows = codes.clamp(min=0) + torch.tensor(levels, device=codes.device)
        return self.code_embedding(rows).to(self.backbone.dtype)

    def level_logits(self, level: int, hidden: Tensor) -> Tensor:
        """[..., d_llm] -> [..., W_level] float32."""
        start = self.offsets[level]
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self._output_rows()[start : start + self.level_sizes[level]].T

    def _output_rows(self) -> Tensor:
        return (self.code_embedding if self.code_output is None else self.code_output).weight.float()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Tokens of words and codes [B, S] -> [B, S, d_llm]."""
        words = self.backbone.embed(input_ids.clamp(max=self.vocabulary - 1))
        coded = input_ids >= self.vocabulary
        rows = self.code_embedding((input_ids - self.vocabulary).clamp(min=0)).to(words.dtype)
        return torch.where(coded[..., None], rows, words)

    # Training on windows ---------------------------------------------------------------------------------------------

    def window_loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor], int]:
        """Mean cross-entropy over the codes of all targets of a window batch, its parts per level, their number.

        Args:
            batch: `item_ids` [B, L], `lengths`, `targets` [B, L] (0 = not supervised).

        Raises:
            DataError: No target.
        """
        targets = batch["targets"]
        wanted = targets > 0
        if not bool(wanted.any()):
            raise DataError("the batch has no target")
        items = F.pad(batch["item_ids"], (0, 1))
        items[:, 1:] = torch.where(wanted, targets, items[:, 1:])
        hidden = self._window_states(items, batch)
        depth = self.depth
        # The last code of item t and all but the last of item t + 1 are M tokens in a row: they write item t + 1.
        writing = hidden[:, depth - 1 :].unflatten(1, (-1, depth))[wanted]  # [n, M, d]
        codes = self.codes[targets[wanted]]
        losses = [F.cross_entropy(self.level_logits(h, writing[:, h]), codes[:, h]) for h in range(depth)]
        parts = {f"level_{level}": loss.detach() for level, loss in enumerate(losses, start=1)}
        return torch.stack(losses).mean(), parts, int(wanted.sum())

    def _window_states(self, items: Tensor, batch: SequenceBatch) -> Tensor:
        """[B, (L + 1) M - 1, d] states of the codes of items [B, L + 1], of which the last code is not read."""
        embeds = self.embed_codes(self.codes[items]).flatten(1, 2)[:, :-1]
        prefix = self.backbone.embed(self.prefix_ids).expand(len(items), -1, -1)
        gates = self._window_gates(batch, embeds.shape[1])
        hidden = self.backbone(torch.cat([prefix, embeds], 1), gates=gates).last_hidden_state
        return hidden[:, len(self.prefix_ids) :]

    def _window_gates(self, batch: SequenceBatch, tokens: int) -> GateArguments:
        """Gates [B, prefix + tokens, width]; token j (from 0) knows (j + 1) // M events."""
        kind = self.backbone.gate_kind
        if kind is None:
            return {}
        states = self._event_gates(batch)
        known = (torch.arange(tokens, device=states.device) + 1) // self.depth
        before = states[:, :1].expand(-1, len(self.prefix_ids), -1)
        return {kind: torch.cat([before, states[:, known.clamp(max=states.shape[1] - 1)]], 1)}

    @torch.no_grad()
    def _event_gates(self, batch: SequenceBatch) -> Tensor:
        """[B, L + 1, width]: what gates may know after 0, 1, .. L events."""
        if self.backbone.gate_kind == "gates":
            states = getattr(self.encoder, "position_gates", self.encoder.gates)(batch)
            first = states.new_full((len(states), 1, states.shape[-1]), 1.0 / states.shape[-1])
        else:
            given = batch.get("user_repr")
            states = self.encoder.position_representations(batch) if given is None else given
            first = states.new_zeros(len(states), 1, states.shape[-1])
        if states.dim() != 3:
            raise DataError(
                "gate inputs have the wrong shape", found=str(tuple(states.shape)),
                expected="one gate per event, [B, L, width]: a gate per sequence would show later events",
            )  # fmt: skip
        return torch.cat([first, states], 1)

    # Training on tasks -----------------------------------------------------------------------------------------------

    def answer_loss(self, batch: SequenceBatch) -> Tensor:
        """Mean cross-entropy over the answer tokens of a batch of tasks; words and codes compete with one another."""
        labels = batch["token_labels"][:, 1:]
        wanted = labels != IGNORED
        if not bool(wanted.any()):
            raise DataError("no token of the batch is part of an answer", remedy="raise prompt.max_length")
        states = self.backbone(self.embed(batch["input_ids"]), None, self.sequence_gates(batch)).last_hidden_state
        return F.cross_entropy(self._all_logits(states[:, :-1][wanted]), labels[wanted])

    def _all_logits(self, hidden: Tensor) -> Tensor:
        """[..., V + sum of level sizes] float32."""
        codes = hidden.float() @ self._output_rows().T
        return torch.cat([self.backbone.logits(hidden), codes], -1)

    # Recommending ----------------------------------------------------------------------------------------------------

    def collate(self, rows: list[dict[str, Any]]) -> SequenceBatch:
        """Right padded histories; with tasks also their prompts."""
        from llmrec.data.sequences import SequenceCollator, pad_right

        rows = latest(rows, self.options.max_history)
        batch = SequenceCollator(with_seen=True)(rows)
        if self.options.tasks:
            prompts = [self._asker.encode_history(row["item_ids"]) for row in rows]
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            batch["input_ids"] = pad_right(prompts)
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch

    @property
    def _asker(self) -> Any:
        if self.tasks is None:
            raise RecipeError("prompt.tasks: the recommender was built without what writes its prompts")
        return self.tasks

    def _read(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, GateArguments, Tensor | None]:
        """(prompt [B, S, d], its mask, its gates, gates [B, 1, width] of what is written afterwards)."""
        if self.options.tasks:
            return self.embed(batch["input_ids"]), batch["attention_mask"], self.sequence_gates(batch), None
        item_ids, lengths = batch["item_ids"], batch["lengths"]
        embeds = self.embed_codes(self.codes[item_ids]).flatten(1, 2)
        prefix = self.backbone.embed(self.prefix_ids).expand(len(item_ids), -1, -1)
        tokens = torch.arange(embeds.shape[1], device=embeds.device) < (lengths * self.depth)[:, None]
        mask = torch.cat([tokens.new_ones(len(tokens), len(self.prefix_ids)), tokens], 1)
        gates, after = self._window_gates(batch, embeds.shape[1]), None
        if gates:
            states = self._event_gates(batch)
            after = states[torch.arange(len(states), device=states.device), lengths][:, None]
        return torch.cat([prefix, embeds], 1), mask.long(), gates, after

    def _speaker(self, batch: SequenceBatch) -> CausalCodeSpeaker:
        prompt, mask, gates, after = self._read(batch)
        read, kind = runner(self.backbone, gates), self.backbone.gate_kind

        def run(
            inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any, level: int
        ) -> tuple[Tensor, Any]:
            call = (inputs_embeds, attention_mask, position_ids, past_key_values, level)
            if level == 0 or kind is None or after is None:
                return read(*call)
            return runner(self.backbone, {kind: after.expand(-1, inputs_embeds.shape[1], -1)})(*call)

        return CausalCodeSpeaker(run, prompt, mask, self._embed_level, self._spoken)

    def _embed_level(self, level: int, codes: Tensor) -> Tensor:
        return self.embed_codes(codes[..., None], level).squeeze(-2)

    def _spoken(self, level: int, hidden: Tensor) -> Tensor:
        """What the beam search reads: logits of the level, or log-probabilities over words and all codes."""
        if not self.options.tasks:
            return self.level_logits(level, hidden)
        scores = self._all_logits(hidden).log_softmax(-1)
        start = self.vocabulary + self.offsets[level]
        return scores[..., start : start + self.level_sizes[level]]

    @torch.no_grad()
    def recommend(self, batch: SequenceBatch, k: int, beams: int | None = None) -> Ranking:
        """The k best items per row; honours `seen` and `candidates`."""
        if "candidates" in batch:
            scores = self.score_candidates(batch)
            return Ranking(*top_items(scores, k, seen=batch.get("seen"), candidates=batch["candidates"]))
        found = recommend_codes(
            self._trie,
            self._speaker(batch),
            k,
            max(k, beams or self.options.beams),
            seen=batch.get("seen"),
            normaliser="given" if self.options.tasks else "level",
        )
        return Ranking(*found)

    @torch.no_grad()
    def score_candidates(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32 log-probabilities of the candidates' codes, exactly; -inf at padding.

        Candidates are walked as beams are: the history is read once, and each level is one pass for all of them.
        """
        candidates = batch["candidates"]
        codes, speaker = self.codes[candidates].clamp(min=0), self._speaker(batch)
        own = torch.arange(candidates.shape[1], device=candidates.device).expand_as(candidates)
        scores = torch.zeros(candidates.shape, device=candidates.device)
        for level in range(self.depth):
            if level == 0:
                logits = speaker.first()[:, None].expand(-1, candidates.shape[1], -1)
            else:
                logits = speaker.following(level, codes[..., level - 1], own if level > 1 else torch.zeros_like(own))
            found = logits if self.options.tasks else logits.log_softmax(-1)
            scores = scores + found.gather(-1, codes[..., level, None]).squeeze(-1)
        return scores.masked_fill(candidates == 0, float("-inf"))
