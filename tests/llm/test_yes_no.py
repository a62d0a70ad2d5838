"""Style yes_no: the two logits, shared beginnings, pictures, gates, learning (card mllm-msr, 10.4 to 10.6, 10.8)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmrec.data.item_images import decode_image
from llmrec.data.pairs import PairEncoder, PairExamples, PairOptions
from llmrec.errors import CheckpointError, DataError, RecipeError
from llmrec.evaluation.metrics import auc
from llmrec.llm.pictures import ItemPictures
from llmrec.llm.recommender import LLMRecommender
from llmrec.llm.scoring import prefill
from llmrec.llm.vision import count_features, language_targets
from llmrec.llm.yes_no import PairCollator, YesNoRecommender
from llmrec.tuners.ilora import ILoraTuner
from llmrec.tuners.lora import LoraTuner
from tests.data.tables import dataset_of
from tests.fixtures.tokenizers import tiny_bpe_tokenizer
from tests.fixtures.vision import drawn, tiny_vlm
from tests.llm.tiny import ITEMS, TITLES, WIDTH, encoder, llama, rows

HISTORIES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
CANDIDATES = [[10, 11, 12, 0], [13, 14, 15, 16], [17, 18, 19, 20]]


@cache
def tokenizer() -> Any:
    return tiny_bpe_tokenizer(
        [*TITLES, "Will this viewer watch the film next? Answer Yes or No. Answer:"], vocab_size=400
    )


def writer(**options: Any) -> PairEncoder:
    return PairEncoder(TITLES, PairOptions("pairwise/movie", variants=1, **options), tokenizer())


def judge(tuner: str | None = "lora", seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    base: Any = llama(seed, dtype, vocab_size=len(tokenizer()), max_position_embeddings=512)
    torch.manual_seed(seed + 1)
    if tuner is not None:
        kind: Any = {"ilora": ILoraTuner, "lora": LoraTuner}[tuner]
        base = kind.attach(base, kind.configure({"r": 8, "lora_dropout": 0.0}, gate_dim=WIDTH))
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return LLMRecommender.build(
        base, encoder=encoder() if tuner == "ilora" else None, tokenizer=tokenizer(), renderer=writer(**options),
        style="yes_no", max_history=8,
    ).eval()  # fmt: skip


def whole_reading(model: YesNoRecommender, history: list[int], item: int) -> torch.Tensor:
    """All logits behind one question, by the language model's own forward."""
    ids = torch.from_numpy(model.renderer.encode(history, item).input_ids)[None]  # type: ignore[union-attr]
    gates = model.sequence_gates(model.collate(rows([history], [[item]])))
    return model.model(input_ids=ids, **gates).logits[0, -1].float()


@pytest.mark.parametrize("tuner", [None, "lora", "ilora"])
def test_4_scores_are_the_two_logits_of_one_forward(tuner: str | None) -> None:
    """One forward, a shared beginning, padding and other rows change nothing."""
    model = judge(tuner)
    batch = model.collate(rows(HISTORIES, CANDIDATES))
    scores, p_yes = model.score_candidates(batch), model.p_yes(batch)
    assert torch.isneginf(scores).tolist() == [[item == 0 for item in row] for row in CANDIDATES]
    yes, no = model.renderer.verbaliser
    for row, history in enumerate(HISTORIES):
        for place, item in enumerate(CANDIDATES[row]):
            if item:
                logits = whole_reading(model, history, item)
                torch.testing.assert_close(scores[row, place], logits[yes] - logits[no], atol=1e-5, rtol=1e-5)
                two = torch.softmax(logits[[yes, no]], 0)
                torch.testing.assert_close(p_yes[row, place], two[0], atol=1e-5, rtol=1e-5)
        alone = model.score_candidates(model.collate(rows([history], [CANDIDATES[row]])))
        torch.testing.assert_close(alone[0], scores[row], atol=1e-5, rtol=1e-5)


def test_4_p_yes_is_the_first_step_of_generate() -> None:
    model = judge("lora")
    batch = model.collate(rows(HISTORIES[:1], CANDIDATES[:1]))
    pair = model.renderer.encode(HISTORIES[0], 10)
    ids = torch.from_numpy(pair.input_ids)[None]
    step = model.model.generate(
        input_ids=ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0,
    ).logits[0][0]  # fmt: skip
    two = torch.softmax(step[list(model.renderer.verbaliser)].float(), 0)
    torch.testing.assert_close(model.p_yes(batch)[0, 0], two[0], atol=1e-5, rtol=1e-5)


def test_4_swapped_answers_give_the_other_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    model = judge("lora")
    batch = model.collate(rows(HISTORIES, CANDIDATES))
    before = model.p_yes(batch)
    yes, no = model.renderer.verbaliser
    monkeypatch.setattr(PairEncoder, "verbaliser", property(lambda self: (no, yes)))
    real = batch["candidates"] > 0
    torch.testing.assert_close(model.p_yes(batch)[real], 1 - before[real])


def test_the_beginning_of_a_users_questions_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = judge("lora")
    widths = []

    def counted(backbone: Any, embeds: Any, mask: Any, gates: Any) -> Any:
        widths.append(tuple(embeds.shape[:2]))
        return prefill(backbone, embeds, mask, gates)

    monkeypatch.setattr("llmrec.llm.yes_no.prefill", counted)
    model.score_candidates(model.collate(rows(HISTORIES, CANDIDATES)))
    longest = max(len(model.renderer.encode(history, 10).input_ids) for history in HISTORIES)
    assert len(widths) == 1 and widths[0][0] == 3 and widths[0][1] > longest // 3


def test_5_the_loss_is_that_of_the_answers_tokens() -> None:
    model = judge("ilora")
    made = []
    for history, item, answer in (([1, 2, 3], 10, True), ([4], 11, False)):
        pair = model.renderer.encode(history, item, answer=answer)
        row = rows([history])[0] | {name: getattr(pair, name) for name in ("input_ids", "token_labels", "image")}
        made.append(row)
    batch = PairCollator(tokenizer())(made)
    expected, count = torch.zeros(()), 0
    for row, one in enumerate(made):
        gates = {name: value[row : row + 1] for name, value in model.sequence_gates(batch).items()}
        logits = model.model(input_ids=torch.from_numpy(one["input_ids"])[None], **gates).logits[0, :-1].float()
        labels = torch.from_numpy(one["token_labels"])[1:]
        expected = expected + F.cross_entropy(logits, labels, reduction="sum")
        count += int((labels >= 0).sum())
    assert count == 4, "Yes or No, and the line end behind it"
    torch.testing.assert_close(model.answer_loss(batch), expected / count, atol=1e-5, rtol=1e-5)


def test_candidates_are_ranked_and_whole_catalogues_are_not() -> None:
    model = judge("lora")
    batch: Any = model.collate(rows(HISTORIES, CANDIDATES))
    ranking, scores = model.recommend(batch, 3), model.score_candidates(batch)
    for row in range(3):
        allowed = {item: score for item, score in zip(CANDIDATES[row], scores[row].tolist(), strict=True) if item}
        wanted = sorted(allowed, key=lambda item: -allowed[item])[:3]
        assert ranking.item_ids[row].tolist() == wanted
    batch["seen"] = torch.tensor([[10], [13], [17]])
    assert not (model.recommend(batch, 4).item_ids == batch["seen"]).any()
    with pytest.raises(DataError, match="judges given items"):
        model.collate(rows(HISTORIES))


def test_a_saved_judge_scores_alike_and_refuses_other_questions(tmp_path: Any) -> None:
    model = judge("lora")
    batch = model.collate(rows(HISTORIES, CANDIDATES))
    model.save_pretrained(tmp_path)
    base = llama(vocab_size=len(tokenizer()), max_position_embeddings=512)
    loaded: Any = LLMRecommender.from_pretrained(tmp_path, base, tokenizer=tokenizer(), renderer=writer())
    assert torch.equal(loaded.score_candidates(batch), model.score_candidates(batch))
    for renderer in (None, writer(show_history=2)):
        with pytest.raises(CheckpointError, match="was trained on questions with the options"):
            LLMRecommender.from_pretrained(
                tmp_path, llama(vocab_size=len(tokenizer())), tokenizer=tokenizer(), renderer=renderer
            )
    with pytest.raises(RecipeError, match="needs what writes its questions"):
        YesNoRecommender(base, torch.zeros(21, 0), model.options, None, tokenizer()).collate(
            rows(HISTORIES, CANDIDATES)
        )


def test_it_learns_which_films_are_watched() -> None:
    """Every user watches the same five films; the others are drawn as negatives."""
    watched = [2, 5, 9, 14, 17]
    events = [
        (user, item, "train") for user in range(1, 7) for item in np.random.default_rng(user).permutation(watched)
    ]
    dataset = dataset_of(events, titles=TITLES[1:])
    model = judge("lora", show_history=2)
    model.requires_grad_(True)  # the random base never wrote Yes or No, so the adapter alone would take long
    examples = PairExamples(dataset, dataset.histories("train", 3), model.renderer, seed=0)
    collate = PairCollator(tokenizer())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        examples.set_epoch(step)
        chosen = np.random.default_rng(step).choice(len(examples), 16, replace=False)
        loss = model.train().answer_loss(collate([examples[int(i)] for i in chosen]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    asked = list(range(1, ITEMS + 1))
    scores = model.score_candidates(model.collate(rows([watched[:2]], [asked])))[0].detach().numpy()
    assert auc(scores, np.isin(asked, watched))[0] > 0.95


# Pictures ------------------------------------------------------------------------------------------------------------


class Shown:
    """Four drawn pictures for the items 1 to 4, none for the others."""

    def __init__(self) -> None:
        colours = ("red", "blue", "green", "yellow")
        self.images = {item: drawn("star", colour) for item, colour in enumerate(colours, start=1)}
        self.mask = np.array([item in self.images for item in range(ITEMS + 1)])

    def __getitem__(self, item: int) -> Any:
        return decode_image(self.images[item])


def seeing(tuner: Any = None) -> Any:
    model, processor = tiny_vlm()
    pictures = ItemPictures(Shown(), processor)  # type: ignore[arg-type]
    questions = PairEncoder(
        TITLES, PairOptions("pairwise/movie", variants=1), processor.tokenizer, image_ids=pictures.ids
    )  # fmt: skip
    if tuner is not None:
        config = LoraTuner.configure({"r": 4, "target_modules": language_targets(model, ["q_proj", "v_proj"])})
        model = LoraTuner.attach(model, config)
    return LLMRecommender.build(
        model, tokenizer=processor.tokenizer, renderer=questions, pictures=pictures, style="yes_no", max_history=8
    ).eval()


def test_pictures_are_read_where_they_stand() -> None:
    """Scores equal the model's own forward over the same tokens and pixels; items without a picture are read too."""
    model = seeing()
    batch = model.collate(rows([[5, 6], [7]], [[1, 2, 9], [3, 0, 4]]))
    scores = model.score_candidates(batch)
    base, (yes, no) = model.backbone.base, model.renderer.verbaliser
    token = base.config.image_token_id
    for row, place, history, item in ((0, 0, [5, 6], 1), (0, 2, [5, 6], 9), (1, 2, [7], 4)):
        ids = torch.from_numpy(model.renderer.encode(history, item).input_ids)[None]
        pixels = model.pictures.inputs([item]) if item < 5 else {}
        assert int((ids == token).sum()) == (len(model.pictures.ids(item)) if item < 5 else 0)
        if item < 5:
            placeholders, features = count_features(base, {"input_ids": ids, **pixels})
            assert placeholders == features > 0
        logits = base(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits[0, -1].float()
        torch.testing.assert_close(scores[row, place], logits[yes] - logits[no], atol=1e-4, rtol=1e-4)
    assert torch.isneginf(scores[1, 1])
    other = model.score_candidates(model.collate(rows([[5, 6]], [[2, 1, 9]])))
    torch.testing.assert_close(other[0], scores[0, [1, 0, 2]], atol=1e-4, rtol=1e-4)
    assert scores[0, 0] != scores[0, 1]


def test_a_batch_with_and_without_pictures_trains_both() -> None:
    model = seeing("lora")
    made = []
    for history, item, answer in (([5], 1, True), ([6], 9, False), ([7, 8], 3, True)):
        pair = model.renderer.encode(history, item, answer=answer)
        made.append(rows([history])[0] | {n: getattr(pair, n) for n in ("input_ids", "token_labels", "image")})
    collate = PairCollator(model.tokenizer, model.pictures)
    losses, counts = [], []
    for chosen in ([0], [1], [2], [0, 1, 2]):
        batch = collate([made[i] for i in chosen])
        losses.append(model.answer_loss(batch))
        counts.append(int((batch["token_labels"] >= 0).sum()))
    apart = sum(loss * count for loss, count in zip(losses[:3], counts[:3], strict=True)) / sum(counts[:3])
    torch.testing.assert_close(losses[3], apart, atol=1e-4, rtol=1e-4)
    losses[3].backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all("lora_" in name and "language_model" in name for name in trained)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name and "vision" in name]
