"""Questions about one candidate: tokens, labels, budgets, negatives, summaries (card mllm-msr, 10.5, 10.10)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmrec.data.pairs import PairEncoder, PairExamples, PairOptions
from llmrec.data.prompt_encoder import IGNORED
from llmrec.errors import DataError, RecipeError
from tests.data.tables import dataset_of
from tests.fixtures.tokenizers import tiny_bpe_tokenizer

TITLES = ["", *[f"film number {n}" for n in range(1, 13)]]
TEXTS = ["", *[f"a story about the {n}th lake and its many quiet boats" for n in range(1, 13)]]
TOKENIZER = tiny_bpe_tokenizer([*TITLES, *TEXTS, "Yes No Answer: taste viewer film watch next"], vocab_size=400)


def encoder(**options: Any) -> PairEncoder:
    parts = {name: options.pop(name) for name in ("texts", "preferences", "image_ids") if name in options}
    template = options.pop("template", "pairwise/movie")
    return PairEncoder(TITLES, PairOptions(template, **{"variants": 1, **options}), TOKENIZER, **parts)


def words(ids: Any) -> str:
    return str(TOKENIZER.decode([int(i) for i in ids]))


def shop() -> Any:
    events = [(user, 1 + (user + 2 * step) % 12, split) for user in range(1, 5)
              for step, split in enumerate(["train"] * 4 + ["valid", "test"])]  # fmt: skip
    return dataset_of(events, titles=TITLES[1:])


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("template", ["pairwise/movie", "pairwise/product"])
def test_a_question_shows_what_it_is_given_and_nothing_else(template: str, variant: int) -> None:
    writer = encoder(template=template, variants=variant, texts=TEXTS)
    text = words(writer.encode([1, 2], 5, preference="likes lakes").input_ids)
    assert "likes lakes" in text and "film number 1; film number 2" in text and TITLES[5] in text and TEXTS[5] in text
    assert "Yes" in text and text.rstrip().endswith("Answer:")
    bare = words(encoder(template=template, variants=variant, show_history=0).encode([1, 2], 5).input_ids)
    assert "film number 1" not in bare and "number 5" in bare and "lake" not in bare


def test_5_labels_are_the_answer_and_its_end() -> None:
    writer = encoder()
    for answer, word in ((True, " Yes"), (False, " No")):
        pair = writer.encode([1, 2], 5, answer=answer)
        assert (pair.token_labels[: pair.prompt_length] == IGNORED).all()
        supervised = pair.token_labels[pair.prompt_length :]
        assert np.array_equal(supervised, pair.input_ids[pair.prompt_length :])
        assert words(supervised) == f"{word}\n"
        assert supervised[0] == writer.verbaliser[0 if answer else 1]
    assert np.array_equal(pair.input_ids[: pair.prompt_length], writer.encode([1, 2], 5).input_ids)
    everything = encoder(loss_on_prompt=True).encode([1, 2], 5, answer=True)
    assert np.array_equal(everything.token_labels, everything.input_ids), "the release's objective, as an option"


def test_4_the_verbaliser_is_what_follows_a_question() -> None:
    writer = encoder()
    whole = TOKENIZER("Answer: Yes", add_special_tokens=False)["input_ids"]
    before = TOKENIZER("Answer:", add_special_tokens=False)["input_ids"]
    assert whole[: len(before)] == before and whole[len(before)] == writer.verbaliser[0]
    assert len(set(writer.verbaliser)) == 2


def test_answers_that_begin_alike_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.data.pairs.ANSWERS", ("Yes", "Yes indeed"))
    with pytest.raises(RecipeError, match="as the beginning of the other"):
        encoder()


def test_4_what_both_answers_begin_with_belongs_to_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrec.data.pairs.ANSWERS", ("taste Yes", "taste No"))
    writer = encoder()
    question, answered = writer.encode([1], 2), writer.encode([1], 2, answer=False)
    assert words(question.input_ids).endswith("Answer: taste") and question.prompt_length == len(question.input_ids)
    assert words(answered.token_labels[answered.token_labels != IGNORED]) == " No\n"
    assert answered.token_labels[answered.prompt_length] == writer.verbaliser[1]


def test_titles_give_way_and_the_picture_never_does() -> None:
    picture = [7] * 30
    writer = encoder(max_length=110, image_ids=lambda item: picture)
    pair = writer.encode(list(range(1, 11)), 12, answer=True)
    assert len(pair.input_ids) <= 110 and pair.image == 12 and writer.cuts.histories > 0
    ids = pair.input_ids.tolist()
    assert any(ids[place : place + 30] == picture for place in range(len(ids)))
    text = words([i for i in ids if i != 7])
    assert "film number 10" in text and "film number 1;" not in text, "the oldest titles go first"
    with pytest.raises(DataError, match="even|without any title"):
        encoder(max_length=40, image_ids=lambda item: picture).encode([1, 2], 3)


def test_10_cuts_are_counted() -> None:
    writer = encoder(max_title_tokens=2, max_text_tokens=3, max_preference_tokens=2, texts=TEXTS)
    text = words(writer.encode([1], 2, preference="likes lakes and very quiet boats").input_ids)
    assert (writer.cuts.titles, writer.cuts.texts, writer.cuts.preferences) == (2, 1, 1)
    assert "boats" not in text


def test_items_without_a_picture_have_no_place_for_one() -> None:
    pair = encoder(image_ids=lambda item: []).encode([1], 2)
    assert pair.image == 0 and "Poster" not in words(pair.input_ids)


def test_1_to_negatives_and_none_the_user_has_met() -> None:
    dataset = shop()
    questions = PairExamples(dataset, dataset.histories("train", 10), encoder(negatives=2), seed=3)
    assert len(questions) == 4 * 3 * 3
    trained: dict[int, set[int]] = {}
    for user, item in dataset.context().train_edges.T.tolist():
        trained.setdefault(user, set()).add(item)
    for start in range(0, len(questions), 3):
        positive, *negatives = (questions[start + place] for place in range(3))
        assert positive["label"] == 1 and positive["candidate"] == positive["targets"][-1]
        drawn = [row["candidate"] for row in negatives]
        assert len(set(drawn)) == 2 and all(row["label"] == 0 for row in negatives)
        assert not set(drawn) & trained[positive["user_id"]]
        assert words(positive["input_ids"]).endswith(" Yes\n") and words(negatives[0]["input_ids"]).endswith(" No\n")


def test_draws_depend_on_seed_example_and_epoch_alone() -> None:
    dataset = shop()
    histories = dataset.histories("train", 10)
    first, again = (PairExamples(dataset, histories, encoder(), seed=3) for _ in range(2))
    picked = first.subset([5, 1])
    assert [picked[0]["candidate"], picked[1]["candidate"]] == [again[5]["candidate"], again[1]["candidate"]]
    before = [again[place]["candidate"] for place in range(len(again))]
    again.set_epoch(1)
    assert [again[place]["candidate"] for place in range(len(again))] != before
    again.set_epoch(0)
    assert [again[place]["candidate"] for place in range(len(again))] == before


def test_popular_negatives_follow_training_counts() -> None:
    events = [(user, item, "train") for user in range(1, 41) for item in ([1, 2] if user % 4 else [1, 3, 2])]
    dataset = dataset_of([*events, (41, 4, "train"), (41, 5, "train")], titles=TITLES[1:])
    histories = dataset.histories("train", 10).subset([len(dataset.histories("train", 10)) - 1])
    drawn = []
    questions = PairExamples(dataset, histories, encoder(negative_kind="popularity"), seed=0)
    for epoch in range(300):
        questions.set_epoch(epoch)
        drawn.append(questions[1]["candidate"])
    counts = np.bincount(drawn, minlength=6)
    assert set(drawn) == {1, 2, 3} and counts[1] > 2 * counts[3], "40, 40 and 10 training events; 4 and 5 were met"


def test_targets_without_a_summary_are_left_out() -> None:
    dataset = shop()
    questions = PairExamples(dataset, dataset.histories("train", 10), encoder(preferences={(2, 3): "boats"}), seed=0)
    assert len(questions) == 2
    assert questions[0]["user_id"] == 2 and "boats" in words(questions[0]["input_ids"])
    row = dataset.histories("train", 10)[0]
    with pytest.raises(DataError, match="no summary in front of this target"):
        encoder(preferences={(2, 3): "boats"}).preference_of(row)


@pytest.mark.parametrize("options", [{"negatives": -1}, {"negative_kind": "random"}, {"max_title_tokens": 0}])
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"prompt.{next(iter(options))}"):
        PairOptions("pairwise/movie", **options)
