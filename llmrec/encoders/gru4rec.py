"""GRU4Rec: recurrent session-based recommendation (ICLR 2016).

A gated recurrent network reads the item vectors one after the other; its state, mapped back to the width of the item
vectors, is scored against the item table that also embeds the inputs:

    z = sig(W_z x + U_z h);  r = sig(W_r x + U_r h);  n = tanh(W_n x + r (U_n h));  h' = (1 - z) n + z h
    s_t = W_o h_t;  r_t = s_t . E[j]

Paper: the recurrent layer over items, ranked by the state. Departures, those of later libraries: rows of a batch are
whole histories instead of session-parallel steps, every position is supervised at once (objectives stand in
`llmrec.strategies`), the output is tied to the item table by the map W_o, the layer has no biases, weights start from
Xavier's distribution, and dropout falls on the item vectors.

Ours: the encoder reads growing histories event by event (`init_state`, `step`, `read`); the state is constant in size,
and `item 0` leaves a user's state as it is. There are no positions, hence no longest history.

Shapes: item_ids [B, L], hidden [B, L, d], state [num_layers, B, gru_size].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmrec.blocks.readout import padding_mask
from llmrec.encoders.base import EncoderOutput, SequenceEncoder, SequenceEncoderConfig, register
from llmrec.errors import RecipeError
from llmrec.paper import Paper

PAPER = Paper(
    title="Session-based Recommendations with Recurrent Neural Networks",
    venue="ICLR 2016",
    url_id="1511.06939",
    system="GRU4Rec",
)


class GRU4RecConfig(SequenceEncoderConfig):
    """Options of GRU4Rec.

    Args:
        gru_size: Width of the recurrent state.
        num_layers: Recurrent layers, one over the other; dropout falls between them too.
        bias: Whether the recurrent layers have biases.
    """

    model_type = "llmrec_gru4rec"

    gru_size: int = 128
    num_layers: int = 1
    bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("gru_size", "num_layers"):
            if getattr(self, name) < 1:
                raise RecipeError(f"encoder.{name}: found {getattr(self, name)}, expected a whole number from 1")


class GRU4RecEncoder(SequenceEncoder):
    """Gated recurrent network with tied item embeddings; an `IncrementalEncoder`."""

    config_class = GRU4RecConfig
    config: GRU4RecConfig

    def __init__(self, config: GRU4RecConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(
            config.hidden_size,
            config.gru_size,
            num_layers=config.num_layers,
            bias=config.bias,
            batch_first=True,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        self.output = nn.Linear(config.gru_size, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Xavier for the recurrent layers and the map behind them, as in later libraries; else as the base class."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)

    def forward(
        self, item_ids: Tensor, lengths: Tensor, *, item_embeds: Tensor | None = None, **features: Tensor
    ) -> EncoderOutput:
        """States of a batch; see the base class."""
        items = self.item_embedding(item_ids) if item_embeds is None else item_embeds
        states, _ = self.gru(self.dropout(items))
        # Padding stands right of every real position: the recurrence never carries it into a real state.
        real = padding_mask(lengths, item_ids.shape[1]).unsqueeze(-1)
        hidden = self.output(states).masked_fill(~real, 0.0)
        return EncoderOutput(hidden=hidden, user_repr=self.last_state(hidden, lengths))

    def init_state(self, batch_size: int) -> Tensor:
        """[num_layers, B, gru_size] zeros: users without an event."""
        return self.item_embedding.weight.new_zeros(self.config.num_layers, batch_size, self.config.gru_size)

    def step(self, state: Tensor, item_ids: Tensor, timestamps: Tensor | None = None) -> Tensor:
        """The state after one more event per user; the given state is left as it was.

        Args:
            state: [num_layers, B, gru_size].
            item_ids: [B]; users with item 0 had no event, their state stays.
            timestamps: Not read.

        Returns:
            [num_layers, B, gru_size].
        """
        _, after = self.gru(self.dropout(self.item_embedding(item_ids))[:, None], state)
        return torch.where((item_ids > 0)[None, :, None], after, state)

    def read(self, state: Tensor, target_timestamps: Tensor | None = None) -> Tensor:
        """[B, d]: what `user_representation` gives for the events the state has seen. Times are not read."""
        read: Tensor = self.output(state[-1])
        return read


register(GRU4RecConfig, GRU4RecEncoder)
