"""Plain LoRA, DoRA and rank-stabilised LoRA: one low-rank update for all users, the baseline of the gated tuners.

    y = W0 x + b + (alpha / r) B A dropout(x)          alpha / sqrt(r) with use_rslora

Everything is peft's own; this file only maps recipe options. DoRA (use_dora) additionally learns the length of each
weight column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig

from llmrec.paper import Paper
from llmrec.tuners.base import Tuner, check_lora_options

PAPER = Paper(
    title="LoRA: Low-Rank Adaptation of Large Language Models", venue="ICLR 2022", url_id="2106.09685", system="LoRA"
)
DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}


class LoraTuner(Tuner):
    """Plain LoRA. Options: r, lora_alpha, lora_dropout, target_modules, use_dora, use_rslora."""

    options = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora")

    @classmethod
    def configure(
        cls, options: Mapping[str, Any], *, task_type: str | None = "CAUSAL_LM", gate_dim: int | None = None
    ) -> PeftConfig:
        """See `Tuner.configure`; gates are not used, so `gate_dim` is ignored."""
        cls.check_options(options)
        return LoraConfig(task_type=task_type, **{**DEFAULTS, **check_lora_options(options)})  # type: ignore[arg-type]
