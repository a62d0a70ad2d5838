from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from llmrec.data.instructions import (
    InstructionCollator,
    InstructionExamples,
    PromptOptions,
    curriculum_is_hybrid,
    text_mode,
)
from llmrec.data.prompt_encoder import PromptEncoder
from llmrec.data.prompts import USER_SLOT
from llmrec.errors import DataError, RecipeError
from tests.data.tables import dataset_of
from tests.fixtures.tokenizers import tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer

WORDS = "Alien Brazil Clue Dune Eraser Fargo Gattaca Heat Ikiru Jaws Kagemusha Labyrinth".split()
TITLES = [f"{word} ({1970 + i})" for i, word in enumerate(WORDS)]
TITLES += ["Wait; (1999)", "[HistoryEmb] <item>", "</s><|im_end|><|endoftext|>", "A, B. C:", "été é \u4eba", "(1979)"]
TEXTS = ["", *TITLES]
HOSTILE = [13, 14, 15, 16, 17, 18]


def small_dataset(users=4, length=7):
    events = [
        (user, (user * 5 + step) % len(TITLES) + 1, "test" if step == length - 1 else "train")
        for user in range(1, users + 1)
        for step in range(length)
    ]
    return dataset_of(events, times=range(len(events)), titles=TITLES)


DATA = small_dataset()
TRAINING = DATA.histories("train", 10)


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bpe":
        return tiny_bpe_tokenizer([*TITLES, "A viewer has watched these films, oldest first: "] * 3)
    return tiny_sentencepiece_tokenizer([*TITLES, "A viewer has watched these films: "], tmp_path_factory.mktemp("spm"))


def options(**changes):
    return replace(PromptOptions("next_item/movie", style="hybrid", variants=1, candidates=4), **changes)


def prompts(tokenizer=None, seed=0, examples=TRAINING, **changes):
    return InstructionExamples(DATA, examples, options(**changes), titles=TEXTS, tokenizer=tokenizer, seed=seed)


def text_of(tokenizer, ids, slots):
    """Decoded text with each slot written out; ids between slots are decoded as one piece."""
    out, piece = [], []
    for token, slot in zip(ids, slots, strict=True):
        if slot:
            out += [tokenizer.decode(piece), f"<{slot}>"]
            piece = []
        else:
            piece.append(token)
    return "".join([*out, tokenizer.decode(piece)])


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_a_slot_stands_right_behind_its_title(tokenizer):
    encoder = PromptEncoder(TEXTS, options(slots=("history", "candidates", "user")), tokenizer)
    for variant in encoder.template.variants:
        encoded = encoder.encode([1, *HOSTILE], [2, 13, 14, 3], variant=variant)
        order = [2, 13, 14, 3, USER_SLOT, 1, *HOSTILE] if variant == 4 else [USER_SLOT, 1, *HOSTILE, 2, 13, 14, 3]
        assert [slot for slot in encoded.item_slots if slot] == order
        assert (encoded.input_ids[encoded.item_slots != 0] == encoder.pieces.filler).all()
        ends = np.flatnonzero(encoded.item_slots)
        for place in ends[encoded.item_slots[ends] > 0]:
            before = tokenizer.decode(encoded.input_ids[:place].tolist())
            assert before.endswith(TEXTS[encoded.item_slots[place]])


def test_prompt_text_is_what_the_template_says(tokenizer):
    encoder = PromptEncoder(TEXTS, options(style="text"), tokenizer)
    encoded = encoder.encode([1, 16], [2, 17], answer=17)
    assert not encoded.item_slots.any()
    expected = (
        f"A viewer has watched these films, oldest first: {TEXTS[1]}; {TEXTS[16]}.\nExactly one of the following films "
        f"is the one this viewer watches next: {TEXTS[2]}; {TEXTS[17]}.\nName that film and nothing else.\nNext film:"
        f" {TEXTS[17]}\n"
    )
    ids = encoded.input_ids.tolist()
    if tokenizer.bos_token_id is not None:
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        ids = ids[1:]
    assert tokenizer.decode(ids) == expected


def test_labels_cover_the_answer_and_nothing_else(tokenizer):
    encoder = PromptEncoder(TEXTS, options(), tokenizer)
    bare, full = encoder.encode([1, 2], [3, 4]), encoder.encode([1, 2], [3, 4], answer=4)
    length = full.prompt_length
    assert np.array_equal(full.input_ids[:length], bare.input_ids) and bare.prompt_length == length
    assert (full.token_labels[:length] == -100).all() and (bare.token_labels == -100).all()
    assert full.token_labels[length:].tolist() == full.input_ids[length:].tolist() == encoder.answer_ids(4)
    assert tokenizer.decode(encoder.answer_ids(4)).strip(" ") == f"{TEXTS[4]}\n"


def test_both_generations_of_llama_tokenizers_give_the_same_prompt(tmp_path):
    """They differ in how often inside a text they add their space; in our prompts neither adds one."""
    new, old = (tiny_sentencepiece_tokenizer(TITLES, tmp_path / str(legacy), legacy=legacy) for legacy in (False, True))
    a, b = (PromptEncoder(TEXTS, options(), t).encode([1, 13, 18], [16, 17], answer=18).input_ids for t in (new, old))
    assert np.array_equal(a, b)


def test_every_answer_ends_in_the_same_terminator(tokenizer):
    for terminator, text in (("newline", "\n"), ("eos", tokenizer.eos_token)):
        encoder = PromptEncoder(TEXTS, options(terminator=terminator), tokenizer)
        ends = {tuple(encoder.answer_ids(item)[-len(encoder.pieces.terminator) :]) for item in range(1, 19)}
        assert ends == {tuple(encoder.pieces.terminator)} and len(encoder.pieces.terminator) == 1
        assert tokenizer.decode(encoder.pieces.terminator) == text


def test_a_title_has_the_same_tokens_in_prompt_and_answer(tokenizer):
    encoder = PromptEncoder(TEXTS, options(), tokenizer)
    encoded = encoder.encode([5, 1], [1, 3])
    answer = encoder.answer_ids(1)[: -len(encoder.pieces.terminator)]
    ends = np.flatnonzero(encoded.item_slots == 1)
    assert len(ends) == 2
    for end in ends:
        assert encoded.input_ids[end - len(answer) : end].tolist() == answer


def test_titles_never_become_control_tokens(tokenizer):
    encoder = PromptEncoder(TEXTS, options(style="text"), tokenizer)
    control = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    assert not control & set(encoder.answer_ids(15)[:-1])
    head = len(encoder.pieces.head)
    assert not control & set(encoder.encode([15], [15, 1]).input_ids[head:].tolist()) - {tokenizer.unk_token_id}


def test_text_mode_has_the_tokens_of_the_text_style(tokenizer):
    hybrid = PromptEncoder(TEXTS, options(), tokenizer).encode([1, *HOSTILE], [2, 3], answer=2, hybrid=False)
    text = PromptEncoder(TEXTS, options(style="text"), tokenizer).encode([1, *HOSTILE], [2, 3], answer=2)
    assert np.array_equal(hybrid.input_ids, text.input_ids) and not hybrid.item_slots.any()


def test_candidates_move_with_their_slots(tokenizer):
    encoder = PromptEncoder(TEXTS, options(slots=("candidates",)), tokenizer)
    a, b = encoder.encode([1, 2], [3, 13, 4]), encoder.encode([1, 2], [4, 3, 13])
    assert [s for s in a.item_slots if s] == [3, 13, 4] and [s for s in b.item_slots if s] == [4, 3, 13]
    assert sorted(a.input_ids) == sorted(b.input_ids)
    swapped = text_of(tokenizer, b.input_ids, b.item_slots)
    assert f"{TEXTS[4]}<4>; {TEXTS[3]}<3>; {TEXTS[13]}<13>." in swapped


def test_chat_template_frames_the_prompt_and_keeps_the_slots(tokenizer):
    if tokenizer.chat_template is None:
        with pytest.raises(RecipeError, match="has no chat template"):
            PromptEncoder(TEXTS, options(chat_template=True), tokenizer)
        return
    encoder = PromptEncoder(TEXTS, options(chat_template=True), tokenizer)
    encoded = encoder.encode([1, 15], [2, 14], answer=2)
    assert [s for s in encoded.item_slots if s] == [1, 15, 2, 14]
    text = tokenizer.decode(encoded.input_ids[encoded.item_slots == 0].tolist())
    assert text.startswith("<|im_start|>user\nA viewer has watched")
    assert text.endswith(f"Next film:<|im_end|>\n<|im_start|>assistant\n{TEXTS[2]}<|endoftext|>")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert encoded.input_ids.tolist().count(start) == 2 and encoded.input_ids.tolist().count(end) == 1
    turn = [{"role": "user", "content": tokenizer.decode(encoded.input_ids[:0].tolist()) + "x"}]
    assert encoder.pieces.head == tokenizer.apply_chat_template(turn, return_dict=False)[: len(encoder.pieces.head)]


# Length ---------------------------------------------------------------------------------------------------------------


def test_the_latest_history_is_shown(tokenizer):
    encoder = PromptEncoder(TEXTS, options(max_history=3), tokenizer)
    assert [s for s in encoder.encode([1, 2, 3, 4, 5]).item_slots if s] == [3, 4, 5]


def test_too_long_prompts_lose_the_oldest_items_only(tokenizer):
    whole = PromptEncoder(TEXTS, options(), tokenizer)
    history, shown = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10]
    full, least = (len(whole.encode(shorter, shown).input_ids) for shorter in (history, history[-1:]))
    room = max(len(whole.answer_ids(item)) for item in range(1, 19))
    previous = 0
    for limit in range(full + room, least + room - 1, -3):
        encoded = PromptEncoder(TEXTS, options(max_length=limit), tokenizer).encode(history, shown, answer=7)
        kept = [s for s in encoded.item_slots if s]
        assert len(encoded.input_ids) <= limit and kept[-4:] == shown
        assert kept[:-4] == history[encoded.dropped_items :] and encoded.dropped_items >= previous
        longer = whole.encode(history[max(0, encoded.dropped_items - 1) :], shown).input_ids
        assert encoded.dropped_items == 0 or len(longer) + room > limit, "no more is dropped than needed"
        previous = encoded.dropped_items
    assert previous >= 3
    tight = PromptEncoder(TEXTS, options(max_length=least + room - 1), tokenizer)
    with pytest.raises(DataError, match="single history item does not fit"):
        tight.encode(history, shown)


def test_truncated_examples_are_counted(tokenizer):
    assert prompts().truncation(tokenizer) == {"examples": len(TRAINING), "truncated": 0, "dropped_items": 0}
    longest = max(len(prompts().encode(i, tokenizer, with_answer=False)["input_ids"]) for i in range(len(TRAINING)))
    count = prompts(max_length=longest + 5).truncation(tokenizer)
    assert 0 < count["truncated"] < count["examples"] and count["dropped_items"] >= count["truncated"]


def test_long_titles_are_cut_alike_in_prompt_and_answer(tokenizer):
    titles = ["", "word " * 40 + "end", *TITLES[1:]]
    encoder = PromptEncoder(titles, options(max_title_tokens=9, slots=("history",)), tokenizer)
    answer = encoder.answer_ids(1)[:-1]
    assert 7 <= len(answer) <= 9 and titles[1].startswith(encoder.titles[1])
    encoded = encoder.encode([2, 1], [3, 4])
    end = int(np.flatnonzero(encoded.item_slots == 1)[0])
    assert encoded.input_ids[end - len(answer) : end].tolist() == answer
    assert encoder.titles[2] == titles[2] or len(encoder.answer_ids(2)) <= 10


# Examples -------------------------------------------------------------------------------------------------------------


def test_training_candidates_hold_the_target_and_nothing_the_user_met(tokenizer):
    data = prompts()
    places = []
    for index in range(len(data)):
        row = data[index]
        target = int(row["targets"][-1])
        drawn = row["candidates"].tolist()
        met = set(DATA.column("item")[(DATA.column("user") == row["user_id"]) & (DATA.split_codes == 0)].tolist())
        assert len(set(drawn)) == 4 and drawn.count(target) == 1
        assert not (set(drawn) - {target}) & met
        assert [s for s in data.encode(row, tokenizer)["item_slots"] if s][-4:] == drawn
        places.append(drawn.index(target))
    assert len(set(places)) == 4


def test_draws_depend_on_seed_example_and_epoch_only():
    plain, again = prompts(variants="all"), prompts(variants="all")
    order = np.random.default_rng(0).permutation(len(plain))
    first = {i: (plain[i]["variant"], plain[i]["candidates"].tolist()) for i in range(len(plain))}
    assert {int(i): (again[int(i)]["variant"], again[int(i)]["candidates"].tolist()) for i in order} == first
    part = again.subset(order[:5])
    assert [(part[i]["variant"], part[i]["candidates"].tolist()) for i in range(5)] == [
        first[int(i)] for i in order[:5]
    ]
    again.set_epoch(1)
    assert sum(again[i]["candidates"].tolist() != first[i][1] for i in first) > len(first) // 2
    assert {again[i]["variant"] for i in first} == {1, 2, 3, 4}
    again.set_epoch(0)
    assert again[3]["candidates"].tolist() == first[3][1]
    other = prompts(variants="all", seed=1)
    assert sum(other[i]["candidates"].tolist() != first[i][1] for i in first) > len(first) // 2


def test_workers_do_not_change_a_batch(tokenizer):
    data = prompts(tokenizer, variants="all")
    collate = InstructionCollator(tokenizer)
    alone = list(DataLoader(data, batch_size=5, collate_fn=collate))
    shared = list(DataLoader(data, batch_size=5, collate_fn=collate, num_workers=2))
    for a, b in zip(alone, shared, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_evaluation_uses_stored_lists_in_their_order(tokenizer):
    examples = DATA.histories("test", 10)
    with pytest.raises(RecipeError, match="attach the stored lists"):
        InstructionExamples(DATA, examples, options(), training=False)
    lists = np.array([[3, 13, int(t), 0] for t in examples.targets])
    data = InstructionExamples(
        DATA, examples.with_candidates(lists), options(variants="all"), titles=TEXTS, training=False
    )
    before = [data[i]["variant"] for i in range(len(data))]
    data.set_epoch(5)
    assert [data[i]["variant"] for i in range(len(data))] == before
    row = data[0]
    slots = [s for s in data.encode(row, tokenizer)["item_slots"] if s]
    target = int(examples.targets[0])
    if row["variant"] == 4:
        assert slots[:3] == [3, 13, target]
    else:
        assert slots[-3:] == [3, 13, target]
    with pytest.raises(RecipeError, match="candidate lists hold 3"):
        InstructionExamples(DATA, examples.with_candidates(lists[:, :3]), options(), training=False)


def test_open_questions_show_no_candidates(tokenizer):
    lists = np.array([[3, int(t)] for t in TRAINING.targets])
    data = prompts(candidates=None, examples=TRAINING.with_candidates(lists))
    assert "candidates" not in prompts(candidates=None)[0]
    assert [s for s in data.encode(2, tokenizer)["item_slots"] if s] == data[2]["item_ids"].tolist()


def test_faults_are_named():
    with pytest.raises(RecipeError, match="one target per example"):
        prompts(examples=DATA.windows(4))
    with pytest.raises(DataError, match="too small for candidate lists of 17"):
        prompts(candidates=17)[0]
    for change, message in (
        ({"slots": ("titles",)}, "expected a choice of history, candidates, user"),
        ({"candidates": 1}, "prompt.candidates is 1"),
        ({"max_history": 0}, "prompt.max_history is 0"),
        ({"variants": 9}, "prompt.variants: found"),
        ({"style": "slots"}, "expected text or hybrid"),
    ):
        with pytest.raises(RecipeError, match=message):
            prompts(**change)


# Batches --------------------------------------------------------------------------------------------------------------


def test_batches_pad_on_either_side(tokenizer):
    data = prompts(tokenizer)
    rows = [data[i] for i in (0, 4, 2)]
    filler = data.encoder(tokenizer).pieces.filler
    for side in ("left", "right"):
        batch = InstructionCollator(tokenizer, side, with_seen=True)(rows)
        width = max(len(row["input_ids"]) for row in rows)
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            real = slice(width - size, width) if side == "left" else slice(0, size)
            pad = slice(0, width - size) if side == "left" else slice(size, width)
            for name in ("input_ids", "token_labels", "item_slots"):
                assert np.array_equal(batch[name][i, real].numpy(), row[name])
            assert batch["attention_mask"][i, real].all() and not batch["attention_mask"][i, pad].any()
            assert (batch["input_ids"][i, pad] == filler).all() and (batch["token_labels"][i, pad] == -100).all()
            assert not batch["item_slots"][i, pad].any()
        basics = "item_ids lengths user_ids example_ids targets candidates seen timestamps target_timestamps"
        assert set(basics.split()) <= batch.keys()
        assert batch["item_ids"][0, : batch["lengths"][0]].tolist() == rows[0]["item_ids"].tolist()


def test_answers_can_be_left_off(tokenizer):
    data = prompts(tokenizer)
    rows = [data[i] for i in range(4)]
    batch = InstructionCollator(tokenizer, with_answer=False)(rows)
    assert (batch["token_labels"] == -100).all()
    for i, row in enumerate(rows):
        bare = data.encode(row, tokenizer, with_answer=False)["input_ids"]
        assert batch["input_ids"][i, batch["attention_mask"][i] == 1].tolist() == bare.tolist()
    with pytest.raises(RecipeError, match="give the tokenizer to InstructionExamples"):
        InstructionCollator(tokenizer)([prompts()[0]])
    with pytest.raises(RecipeError, match="expected left or right"):
        InstructionCollator(tokenizer, "both")


def test_both_sides_give_the_same_loss_and_slots_take_one_position(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    data = prompts(tokenizer)
    losses = []
    for side in ("left", "right"):
        batch = InstructionCollator(tokenizer, side)([data[i] for i in range(6)])
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                position_ids=positions,
                labels=batch["token_labels"],
            )
        losses.append(float(out.loss))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_mode_of_a_batch_is_the_batch_of_text_mode(tokenizer, side):
    data = prompts(tokenizer, variants="all", slots=("history", "candidates", "user"))
    rows = [data[i] for i in range(8)]
    collate = InstructionCollator(tokenizer, side)
    hybrid = collate(rows)
    text = collate.text_mode(hybrid)
    direct = collate([row | data.encode(row, tokenizer, hybrid=False) for row in rows])
    assert torch.equal(text["attention_mask"], direct["attention_mask"])
    real = direct["attention_mask"] == 1
    assert torch.equal(text["input_ids"][real], direct["input_ids"][real])
    assert torch.equal(text["token_labels"], direct["token_labels"])
    assert not text["item_slots"].any() and hybrid["item_slots"].any()
    assert torch.equal(text["item_ids"], hybrid["item_ids"])
    assert torch.equal(text_mode(text, side)["attention_mask"], text["attention_mask"])


# Curriculum -----------------------------------------------------------------------------------------------------------


def test_curriculum_grows_from_text_to_hybrid():
    total = 4000
    chosen = np.array([curriculum_is_hybrid(step, total, seed=3) for step in range(total)])
    assert abs(chosen.mean() - 0.5) < 0.03
    assert chosen[: total // 20].mean() < 0.08 and chosen[-total // 20 :].mean() > 0.92
    quarters = chosen.reshape(4, -1).mean(1)
    assert np.allclose(quarters, [0.125, 0.375, 0.625, 0.875], atol=0.05)
    assert not curriculum_is_hybrid(0, total) and curriculum_is_hybrid(total, total)


def test_curriculum_is_a_function_of_the_global_step():
    whole = [curriculum_is_hybrid(step, 200, seed=1) for step in range(200)]
    resumed = [curriculum_is_hybrid(step, 200, seed=1) for step in range(120, 200)]
    backwards = [curriculum_is_hybrid(step, 200, seed=1) for step in reversed(range(200))]
    assert whole[120:] == resumed and backwards[::-1] == whole
    assert whole != [curriculum_is_hybrid(step, 200, seed=2) for step in range(200)]
    with pytest.raises(RecipeError, match="at least one step"):
        curriculum_is_hybrid(0, 0)
