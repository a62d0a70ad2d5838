"""TIGER: a small encoder-decoder reads the codes of a history and writes the code of the next item.

    encoder input   s_1^1 .. s_1^H  s_2^1 .. s_T^H       codes of the last T items, one token per level
    decoder         [start] s^1 .. s^{H-1}  ->  s^1 .. s^H     P(item | history) = prod_h P(s^h | s^{<h}, history)
    loss            - mean over levels of log softmax(z_h / tau)[s^h]        tau: LETTER's temperature, 1 = TIGER

The paper's: codes as input and output, a T5 trained from scratch, beam search, the user token (off by default: later
ablations found it useless). The network is transformers' T5; embedding rows are one table with an offset per level,
shared between input and output with T5's scale d^-1/2. CoFiRec's decoding is this head with `level_embeddings` and
`item_positions`: emb(t, k) = E_id[s_t^k] + E_level[k] + E_pos[t], the next item at position T_max.

Departures: logits compete within their level (`output: level`) unless `output: vocabulary` asks for HF's softmax over
all codes; decoding is exact beam search in the prefix trie (`llmrec.blocks.beam_search`), so no invalid item is ever
written, and results are items, not codes: items that share a code are ranked by popularity. `random_crop` draws a
contiguous part of the history for every example (GRID's expansion into all sub-sequences, drawn instead of listed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5Model

from llmrec.blocks.beam_search import recommend_codes
from llmrec.blocks.readout import padding_mask, top_items
from llmrec.data.schema import Ranking
from llmrec.errors import RecipeError
from llmrec.heads.base import (
    CodeHead,
    CodeHeadConfig,
    GenerativeHead,
    GenerativeHeadConfig,
    HeadOutput,
    check_codes,
    register,
)
from llmrec.paper import Paper

if TYPE_CHECKING:
    from llmrec.data.schema import DataContext, SequenceBatch
    from llmrec.item_tokenizers.base import ItemTokenizer

PAPER = Paper(
    title="Recommender Systems with Generative Retrieval", venue="NeurIPS 2023", url_id="2305.05065", system="TIGER"
)


class TIGERConfig(CodeHeadConfig):
    """Options of the head.

    Args:
        hidden_size: d_model.
        num_layers: Layers of the encoder.
        num_decoder_layers: Layers of the decoder; null = as the encoder.
        num_heads: Attention heads.
        d_kv: Width of a head; heads x d_kv need not be d_model.
        d_ff: Width of the feed-forward layers.
        dropout: Dropout rate.
        temperature: tau of the loss; training only (LETTER: 0.7 to 1).
        output: "level": softmax over the codes of the level; "vocabulary": over all codes of all levels.
        level_embeddings: Add E_level (CoFiRec).
        item_positions: Add E_pos of the item's place in the history (CoFiRec).
        user_tokens: Buckets of a hashed user token in front of the history; 0 = none.
        random_crop: While training, show a random contiguous latest part of each history.
        beams: Width of the beam, or one width per level.
        level_sizes: Codes per level; set from the item tokenizer.
    """

    model_type = "llmrec_tiger"

    hidden_size: int = 128
    num_layers: int = 4
    num_decoder_layers: int | None = None
    num_heads: int = 6
    d_kv: int = 64
    d_ff: int = 1024
    dropout: float = 0.1
    temperature: float = 1.0
    output: Literal["level", "vocabulary"] = "level"
    level_embeddings: bool = False
    item_positions: bool = False
    user_tokens: int = 0
    random_crop: bool = False
    beams: int | list[int] = 50

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        widths = [self.beams] if isinstance(self.beams, int) else self.beams
        if not widths or min(widths) < 1:
            raise RecipeError(f"head.beams: found {self.beams}, expected a width from 1, or one per level")
        if self.temperature <= 0:
            raise RecipeError(f"head.temperature: found {self.temperature}, expected a number above 0")
        if self.output not in ("level", "vocabulary"):
            raise RecipeError(f"head.output: found {self.output!r}, expected level or vocabulary")

    @property
    def offsets(self) -> list[int]:
        """Embedding row of code 0 of each level; row 0 is padding, row 1 starts the decoder."""
        sizes = self.level_sizes or [1]
        return [2 + sum(sizes[:level]) for level in range(len(sizes))]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return 2 + sum(self.level_sizes or [1]) + self.user_tokens


class TIGERHead(CodeHead, GenerativeHead):
    """See the module; a `Recommender` and a `CandidateScorer`."""

    config_class = TIGERConfig
    config: TIGERConfig
    supervises: ClassVar[str] = "last"

    def __init__(self, config: TIGERConfig) -> None:
        super().__init__(config)
        self.transformer = T5Model(
            T5Config(
                vocab_size=config.vocab_size,
                d_model=config.hidden_size,
                d_kv=config.d_kv,
                d_ff=config.d_ff,
                num_layers=config.num_layers,
                num_decoder_layers=config.num_decoder_layers or config.num_layers,
                num_heads=config.num_heads,
                dropout_rate=config.dropout,
                pad_token_id=0,
            )
        )
        depth = len(config.level_sizes or [1])
        self.level_embedding = nn.Embedding(depth, config.hidden_size) if config.level_embeddings else None
        self.position_embedding = (
            nn.Embedding(config.max_history + 1, config.hidden_size) if config.item_positions else None
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def from_context(
        cls, config: GenerativeHeadConfig, context: DataContext, tokenizer: ItemTokenizer | None = None
    ) -> TIGERHead:
        """A fresh head that speaks a tokenizer's codes; popularity orders items that share one."""
        assert isinstance(config, TIGERConfig)
        tokenizer = check_codes(config, tokenizer)
        config.level_sizes = list(tokenizer.level_sizes)
        if isinstance(config.beams, list) and len(config.beams) != len(config.level_sizes):
            expected = f"one width, or one for each of {len(config.level_sizes)} levels"
            raise RecipeError(f"head.beams: found {config.beams}, expected {expected}")
        head = cls(config)
        head.take_codes(tokenizer, context)
        return head

    # Reading and writing ---------------------------------------------------------------------------------------------

    def _tokens(self, codes: Tensor) -> Tensor:
        """Codes [..., m <= H] from the first level -> embedding rows; -1 gives padding."""
        offsets = torch.tensor(self.config.offsets[: codes.shape[-1]], dtype=torch.long, device=codes.device)
        return (codes + offsets).masked_fill(codes < 0, 0)

    def read(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Encoder states [B, S, d] and their mask [B, S] bool."""
        item_ids, lengths = batch["item_ids"], batch["lengths"]
        if self.training and self.config.random_crop:
            item_ids, lengths = _cropped(item_ids, lengths)
        codes = self.codes[item_ids]  # [B, L, H]
        rows, width, depth = codes.shape
        embeds = self.transformer.shared(self._tokens(codes))
        if self.level_embedding is not None:
            embeds = embeds + self.level_embedding.weight
        if self.position_embedding is not None:
            embeds = embeds + self.position_embedding.weight[:width, None]
        embeds = embeds.flatten(1, 2)
        mask = padding_mask(lengths, width).repeat_interleave(depth, 1)
        if self.config.user_tokens:
            bucket = batch["user_ids"] % self.config.user_tokens + self.config.vocab_size - self.config.user_tokens
            embeds = torch.cat([self.transformer.shared(bucket)[:, None], embeds], 1)
            mask = torch.cat([mask.new_ones(rows, 1), mask], 1)
        states = self.transformer.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return states, mask

    def decoder_embeds(self, tokens: Tensor, level: int) -> Tensor:
        """[N, m, d] of decoder tokens [N, m], of which the first predicts level `level`."""
        embeds = self.transformer.shared(tokens)
        if self.position_embedding is not None:
            embeds = embeds + self.position_embedding.weight[-1]
        if self.level_embedding is not None:
            # Token m of the decoder is the code of level m - 1; the start token belongs to none.
            levels = F.pad(self.level_embedding.weight, (0, 0, 1, 0))
            embeds = embeds + levels[level : level + tokens.shape[1]]
        return embeds

    def logits(self, hidden: Tensor, level: int) -> Tensor:
        """[..., W_level] float32: unnormalised with output "level", log-probabilities over all codes otherwise."""
        table = self.transformer.shared.weight
        start = self.config.offsets[level]
        end = start + (self.config.level_sizes or [1])[level]
        hidden = hidden * self.config.hidden_size**-0.5
        if self.config.output == "level":
            return (hidden @ table[start:end].T).float()
        return (
            (hidden @ table[2 : 2 + sum(self.config.level_sizes or [1])].T)
            .float()
            .log_softmax(-1)[..., start - 2 : end - 2]
        )

    def _teacher_forced(self, states: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """Decoder states [B, H, d] that predict codes [B, H]."""
        tokens = F.pad(self._tokens(codes[:, :-1]), (1, 0), value=1)
        return self.transformer.decoder(
            inputs_embeds=self.decoder_embeds(tokens, 0),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state

    def forward(self, batch: SequenceBatch) -> HeadOutput:
        """Cross-entropy of the next item's code, per level and in the mean."""
        targets = batch["targets"].gather(1, batch["lengths"][:, None] - 1).squeeze(1)
        wanted = targets > 0
        states, mask = self.read(batch)
        codes = self.codes[targets].clamp(min=0)
        hidden = self._teacher_forced(states, mask, codes)[wanted]
        losses = [
            F.cross_entropy(self.logits(hidden[:, level], level) / self.config.temperature, codes[wanted, level])
            for level in range(codes.shape[1])
        ]
        parts = {f"level_{level}": loss.detach() for level, loss in enumerate(losses, start=1)}
        return HeadOutput(loss=torch.stack(losses).mean(), parts=parts, count=int(wanted.sum()))

    # Recommending ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def recommend(
        self,
        batch: SequenceBatch,
        k: int,
        *,
        beams: int | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Ranking:
        """The k best items by beam search; lists of candidates are scored one by one, exactly."""
        if "candidates" in batch:
            scores = self.score_candidates(batch)
            return Ranking(*top_items(scores, k, seen=batch.get("seen"), candidates=batch["candidates"]))
        width = beams if beams is not None else self.config.beams
        found = recommend_codes(
            self.trie,
            _Speaker(self, *self.read(batch)),
            k,
            max(width, k) if isinstance(width, int) else width,
            seen=batch.get("seen"),
            normaliser=self.normaliser,
        )
        return Ranking(*found)

    @property
    def normaliser(self) -> Literal["level", "given"]:
        """What the logits of `_Speaker` still need."""
        return "level" if self.config.output == "level" else "given"

    @torch.no_grad()
    def score_candidates(self, batch: SequenceBatch) -> Tensor:
        """[B, C] float32 log-probabilities of the candidates' codes, teacher-forced; -inf at padding."""
        candidates = batch["candidates"]
        rows, count = candidates.shape
        states, mask = self.read(batch)
        codes = self.codes[candidates.flatten()].clamp(min=0)
        hidden = self._teacher_forced(states.repeat_interleave(count, 0), mask.repeat_interleave(count, 0), codes)
        scores = torch.zeros(rows * count, device=hidden.device)
        for level in range(codes.shape[1]):
            found = self.logits(hidden[:, level], level).log_softmax(-1) if self.normaliser == "level" else (
                self.logits(hidden[:, level], level)
            )  # fmt: skip
            scores = scores + found.gather(1, codes[:, level, None]).squeeze(1)
        return scores.view(rows, count).masked_fill(candidates == 0, float("-inf"))


def _cropped(item_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Histories without a random number of their oldest items; at least one stays."""
    dropped = (torch.rand(len(lengths), device=lengths.device) * lengths).long()
    kept = lengths - dropped
    index = torch.arange(int(kept.max()), device=item_ids.device) + dropped[:, None]
    moved = item_ids.gather(1, index.clamp(max=item_ids.shape[1] - 1))
    return moved * padding_mask(kept, moved.shape[1]), kept


def _take(cache: Any, rows: Tensor) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class _Speaker:
    """`CodeSpeaker` over a T5 decoder: its cache grows by one token a level; each user's states are kept once a beam.

    Args:
        head: The head.
        states: [B, S, d] encoder states.
        mask: [B, S] bool.
    """

    def __init__(self, head: TIGERHead, states: Tensor, mask: Tensor) -> None:
        self.head, self.states, self.mask = head, states, mask
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def first(self) -> Tensor:
        """[B, W_0]."""
        start = torch.ones(len(self.states), 1, dtype=torch.long, device=self.states.device)
        return self._step(start, 0)

    def following(self, level: int, codes: Tensor, parents: Tensor) -> Tensor:
        """[B, M, W_level]."""
        rows, beams = codes.shape
        before = len(self.states) // rows
        index = (torch.arange(rows, device=codes.device)[:, None] * before + parents).flatten()
        _take(self.cache.self_attention_cache, index)
        if beams != before:  # what all beams of a user share is copied when their number changes, never reordered
            _take(self.cache.cross_attention_cache, index)
            self.states, self.mask = self.states[index], self.mask[index]
        tokens = codes.flatten()[:, None] + self.head.config.offsets[level - 1]
        return self._step(tokens, level).view(rows, beams, -1)

    def _step(self, tokens: Tensor, level: int) -> Tensor:
        hidden = self.head.transformer.decoder(
            inputs_embeds=self.head.decoder_embeds(tokens, level),
            encoder_hidden_states=self.states,
            encoder_attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self.head.logits(hidden[:, -1], level)


register(TIGERConfig, TIGERHead)
