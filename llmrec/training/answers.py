"""The loop of the text style: trl's SFTTrainer with our collator, our label-only loss and our checkpoints.

SFTTrainer asks for a `datasets.Dataset` and a language model of its own making. It gets a table of example numbers,
which the collator turns into our examples, and the language model; afterwards the whole recommender takes the model's
place, so that projector and strategy train as well. The tables are never tokenised by trl: prompts are ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trl reports usage when it builds a trainer

from datasets import Dataset  # noqa: E402
from torch import nn  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from llmrec.errors import RecipeError  # noqa: E402
from llmrec.training.loop import StageLoop, StageModule  # noqa: E402

ARGUMENTS: dict[str, Any] = {
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "max_length": None,
    "packing": False,
    "gradient_checkpointing": None,
}
"""What SFTConfig needs beyond the stage's own arguments; trl's defaults differ from transformers'."""

_EXAMPLE = "example"


class AnswerTrainer(StageLoop, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer for a recommender that answers in words.

    Args:
        module: Recommender and strategy.
        args: SFTConfig.
        train_dataset: Map-style examples.
        data_collator: Rows -> batch; extra fields such as user_repr stay.
        **kwargs: For SFTTrainer.

    Raises:
        RecipeError: The recommender holds no language model or no tokenizer.
    """

    def __init__(
        self, module: StageModule, args: SFTConfig, train_dataset: Any, data_collator: Callable[..., Any], **kwargs: Any
    ) -> None:
        language_model = find_language_model(module.model)
        tokenizer = getattr(module.model, "tokenizer", None)
        if tokenizer is None:
            raise RecipeError(f"{type(module.model).__name__} has no tokenizer, which the text style trains with")
        base = language_model.get_base_model() if hasattr(language_model, "get_base_model") else language_model
        own_forward = "forward" in vars(base)
        self._answered = train_dataset
        super().__init__(
            model=language_model,
            args=args,
            train_dataset=Dataset.from_dict({_EXAMPLE: list(range(len(train_dataset)))}),
            data_collator=_ExampleCollator(train_dataset, data_collator),
            processing_class=tokenizer,
            **kwargs,
        )
        if not own_forward:
            vars(base).pop("forward", None)  # trl's head scores every position; our loss takes the supervised ones
        module.to(args.device)
        self.model = self.model_wrapped = module
        self.callback_handler.model = module
        self._signature_columns = None
        self.model_accepts_loss_kwargs = False

    @property
    def examples(self) -> Any:
        """The examples behind the table of numbers."""
        return self._answered


class _ExampleCollator:
    """Numbers of examples -> our batch."""

    def __init__(self, examples: Any, collator: Callable[..., Any]) -> None:
        self.examples, self.collator = examples, collator

    def __call__(self, rows: list[dict[str, int]]) -> Any:
        return self.collator([self.examples[row[_EXAMPLE]] for row in rows])


def find_language_model(model: nn.Module) -> Any:
    """The adapted language model inside a recommender, or the plain one where there is no adapter.

    Raises:
        RecipeError: There is none.
    """
    for module in model.modules():
        if hasattr(module, "get_base_model") and hasattr(module, "peft_config"):
            return module
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.can_generate():
            return module
    raise RecipeError(f"{type(model).__name__} holds no language model that writes text")
