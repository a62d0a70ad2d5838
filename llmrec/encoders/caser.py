"""Caser: convolutions over the image of the latest item vectors (WSDM 2018).

The latest W item vectors of a user form an image M [W, d]. Horizontal filters of every height i = 1..W look at i
consecutive items and keep the strongest answer; vertical filters weigh the W places, dimension by dimension:

    o = [max_t relu(F_i . M[t : t+i])]_i [n_h W];   v = V M [n_v d];   z = relu(W_1 dropout([v, o]));   h = W_2 [z, P_u]

Paper: both kinds of filters, their concatenation, the user vector P_u and the linear last step. Departures:

- One state for every position instead of one per window (ours): the window of position t ends at event t, so states are
  causal and all positions are supervised at once. A filter's answer is computed once per place of the history and
  shared by all windows around it; the maximum over a window is a running maximum. The numbers are those of separate
  windows (tested).
- Places before the first event are zero vectors on the left of the window, as in the paper's short sequences.
- The item table is tied to the inputs, as in later libraries; the paper has separate output vectors of width 2d.
- No user table unless `use_user` asks for it (ours): a state then needs nothing but events, and users that were not
  there in training have one. With it, user 0 and unknown users contribute a zero vector.

Shapes: item_ids [B, L], hidden [B, L, d], W = window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrec.blocks.readout import padding_mask
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, register
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding",
    venue="WSDM 2018",
    url_id="1809.07426",
    system="Caser",
)


class CaserConfig(SequenceEncoderConfig):
    """Options of Caser.

    Args:
        window: W, the latest events a state sees.
        horizontal_filters: n_h, filters per height.
        vertical_filters: n_v.
        use_user: Add a table of user vectors; the encoder then reads `user_ids`.
    """

    model_type = "llmrec_caser"

    window: int = 5
    horizontal_filters: int = 16
    vertical_filters: int = 4
    use_user: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("window", "horizontal_filters", "vertical_filters"):
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected a whole number from 1")


class CaserEncoder(SequenceEncoder):
    """Horizontal and vertical convolutions over the window that ends at each event; tied item embeddings."""

    config_class = CaserConfig
    config: CaserConfig

    def __init__(self, config: CaserConfig) -> None:
        super().__init__(config)
        width, window = config.hidden_size, config.window
        self.item_embedding = nn.Embedding(config.num_items + 1, width, padding_idx=0)
        self.horizontal = nn.ModuleList(
            nn.Conv1d(width, config.horizontal_filters, height) for height in range(1, window + 1)
        )
        self.vertical = nn.Linear(window, config.vertical_filters)
        self.dropout = nn.Dropout(config.dropout)
        self.mix = nn.Linear(config.vertical_filters * width + config.horizontal_filters * window, width)
        self.user_embedding: nn.Embedding | None = None
        if config.use_user:
            if config.num_users < 1:
                raise RecipeError(
                    f"encoder.use_user: found num_users = {config.num_users}, expected a data set with users; "
                    "set encoder.use_user: false"
                )
            self.user_embedding = nn.Embedding(config.num_users + 1, width, padding_idx=0)
        self.output = nn.Linear(2 * width if config.use_user else width, width)
        self.post_init()

    @classmethod
    def fields_read(cls, config: CaserConfig) -> frozenset[str]:  # type: ignore[override]  # its own config
        """The user, with a user table."""
        return frozenset({"user_ids"}) if config.use_user else frozenset()

    def _init_weights(self, module: nn.Module) -> None:
        """Xavier for filters and maps (ours); else as the base class."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        item_ids: Tensor,
        lengths: Tensor,
        *,
        item_embeds: Tensor | None = None,
        user_ids: Tensor | None = None,
        **features: Tensor,
    ) -> EncoderOutput:
        """States of a batch; see the base class.

        Args:
            item_ids: [B, L] right padded with 0.
            lengths: [B].
            item_embeds: [B, L, d] used instead of the item table.
            user_ids: [B], with `use_user`; ids outside the table are nobody.
            **features: Not read.

        Raises:
            KeyError: `use_user` is set and there are no user ids.
        """
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        # On the left, so that every event has a whole window that ends at it.
        padded = F.pad(items, (0, 0, self.config.window - 1, 0))  # [B, L + W - 1, d]
        images = torch.cat([self._vertical(padded), *self._horizontal(padded)], dim=-1)
        hidden = F.relu(self.mix(self.dropout(images)))
        if self.user_embedding is not None:
            hidden = torch.cat([hidden, self._users(user_ids, item_ids.shape[1])], dim=-1)
        real = padding_mask(lengths, item_ids.shape[1]).unsqueeze(-1)
        hidden = self.output(hidden).masked_fill(~real, 0.0)
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))

    def _vertical(self, padded: Tensor) -> Tensor:
        """[B, L + W - 1, d] -> [B, L, n_v d]: every filter weighs the W places of a window."""
        weighed: Tensor = self.vertical(padded.unfold(1, self.config.window, 1))  # [B, L, d, n_v]
        return weighed.transpose(2, 3).flatten(2)

    def _horizontal(self, padded: Tensor) -> list[Tensor]:
        """[B, L + W - 1, d] -> for each height i, [B, L, n_h]: the strongest answer inside each window."""
        events = padded.transpose(1, 2).contiguous()
        found = []
        for number, filters in enumerate(self.horizontal):  # of height i = number + 1
            answers = F.relu(filters(events))  # [B, n_h, L + W - i]
            places = self.config.window - number
            found.append(F.max_pool1d(answers, places, stride=1).transpose(1, 2))
        return found

    def _users(self, user_ids: Tensor | None, length: int) -> Tensor:
        """[B, L, d], the user's vector at every position."""
        if user_ids is None:
            raise KeyError("CaserEncoder with use_user needs user_ids")
        assert self.user_embedding is not None
        known = user_ids.where(user_ids <= self.config.num_users, 0)
        vectors: Tensor = self.user_embedding(known)
        return vectors[:, None].expand(-1, length, -1)


register(CaserConfig, CaserEncoder)
