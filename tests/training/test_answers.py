"""The text style trains through trl's SFTTrainer, with our batches, our loss and our checkpoints."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec.errors import RecipeError
from llmrec.strategies.base import StepInfo, StepLoss, TrainingStrategy
from llmrec.training import checkpoints, loop
from llmrec.training.trainer import train_stage
from llmrec.tuners.ilora import ILoraTuner
from tests.fixtures.tokenizers import tiny_bpe_tokenizer
from tests.training.small import IDENTITY, make_context, make_stage, same

TITLES = ["Alien", "Brazil", "Casablanca", "Dune", "Eraserhead", "Fargo"]


class TinyAnswers(nn.Module):
    """An iLoRA-adapted model that names the next title; its loss looks at the answer's tokens only."""

    def __init__(self, style: str = "text") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.style = style
        self.tokenizer = tiny_bpe_tokenizer(TITLES)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )  # fmt: skip
        options = {"r": 4, "num_experts": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2}
        self.llm = ILoraTuner.attach(LlamaForCausalLM(config), ILoraTuner.configure(options, gate_dim=4))
        self.asked_for_all_logits = False

    def answer_loss(self, batch: Any) -> Tensor:
        answer = batch["token_labels"][:, 1:]
        hidden = self.llm(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], user_repr=batch["user_repr"],
            output_hidden_states=True, logits_to_keep=1,
        ).hidden_states[-1][:, :-1]  # fmt: skip
        kept = answer != -100
        return F.cross_entropy(self.llm.get_output_embeddings()(hidden[kept]), answer[kept])


@dataclass
class Answers(TrainingStrategy):
    """Cross-entropy of the answers."""

    def loss(self, model: Any, batch: Any, step: StepInfo) -> StepLoss:
        return StepLoss(model.answer_loss(batch), {}, int((batch["token_labels"][:, 1:] != -100).sum()))


class Examples:
    """Titles in pairs: after one comes the next."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": TITLES[index % 6], "answer": TITLES[(index + 1) % 6], "user": index}


@dataclass
class Collator:
    tokenizer: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [self.tokenizer(row["prompt"] + " then")["input_ids"] for row in rows]
        answers = [self.tokenizer(" " + row["answer"])["input_ids"] for row in rows]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (0, -100, 0))
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : end] = torch.tensor(answer)
            mask[i, :end] = 1
        users = torch.tensor([row["user"] for row in rows])
        gates = torch.stack([torch.sin(users + k) for k in range(4)], 1)
        return {"input_ids": ids, "attention_mask": mask, "token_labels": labels, "user_repr": gates}


STAGE = {"train": "tuner", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 4}


def train(folder: Path, style: str = "text", **options: Any) -> tuple[Any, dict[str, Tensor]]:
    model = TinyAnswers(style)
    result = train_stage(
        model, Answers(), Examples(), Collator(model.tokenizer),
        stage=make_stage(**{**STAGE, "save_total_limit": None, **options}), output_dir=folder, seed=3,
        context=make_context(), evaluate=None, identity=IDENTITY,
    )  # fmt: skip
    return result, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("answers") / "stage"
    return folder, train(folder)[1]


def test_text_goes_through_trl_and_ends_where_our_loop_ends(
    finished: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    from llmrec.training.answers import AnswerTrainer

    assert issubclass(AnswerTrainer, SFTTrainer)
    built = []
    adopt = loop.StageLoop.adopt_weights

    def noting(self: loop.StageLoop) -> None:
        built.append(type(self).__name__)
        adopt(self)

    monkeypatch.setattr(loop.StageLoop, "adopt_weights", noting)
    _, ended = train(tmp_path / "hybrid", style="hybrid")
    _, again = train(tmp_path / "text")
    assert built == ["RecTrainer", "AnswerTrainer"]
    assert same(ended, finished[1]) and same(again, finished[1])
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_adapter_and_router_learn_and_the_base_is_not_written(finished: tuple[Path, dict[str, Tensor]]) -> None:
    before = {n: p for n, p in TinyAnswers().named_parameters() if p.requires_grad}
    assert any(".ilora_router." in name for name in before)
    for name, tensor in finished[1].items():
        assert not torch.equal(tensor, before[name]), name
    path = finished[0] / "checkpoints" / "final" / checkpoints.TRAINABLE
    from safetensors import safe_open

    with safe_open(path, "pt") as stored:
        assert set(stored.keys()) == {f"model.{name}" for name in before}
    names = {p.name for p in (finished[0] / "checkpoints").rglob("*") if p.is_file()}
    assert {p.rpartition(".")[2] for p in names} == {"safetensors", "json"}


def test_a_text_stage_resumes_bit_for_bit(finished: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(finished[0], folder)
    (folder / "done.json").unlink()
    for step, path in checkpoints.list_checkpoints(folder / "checkpoints"):
        if step > 4:
            shutil.rmtree(path)
    result, ended = train(folder)
    assert result.resumed_from == 4
    assert same(ended, finished[1])


def test_activation_checkpointing_reaches_the_language_model(
    finished: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    _, ended = train(tmp_path, activation_checkpointing=True)
    for name, tensor in finished[1].items():
        torch.testing.assert_close(ended[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_recommender_without_tokenizer_is_refused(tmp_path: Path) -> None:
    model = TinyAnswers()
    collator = Collator(model.tokenizer)
    model.tokenizer = None
    with pytest.raises(RecipeError, match="has no tokenizer"):
        train_stage(
            model, Answers(), Examples(), collator, stage=make_stage(**STAGE), output_dir=tmp_path, seed=3,
            context=make_context(), evaluate=None, identity=IDENTITY,
        )  # fmt: skip
