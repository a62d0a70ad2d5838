from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from llmrec.assets import asset_names
from llmrec.data import code_prompts
from llmrec.data.code_phrasings import FOLDER, read_frame
from llmrec.data.code_tasks import ASKING, TASKS, CodeAsker, CodeTaskCollator, CodeTaskOptions, CodeTasks
from llmrec.data.prompt_tokens import PieceTokenizer
from llmrec.data.prompts import PromptTemplate
from llmrec.errors import DataError, RecipeError
from tests.data.tables import dataset_of
from tests.fixtures.tokenizers import tiny_bpe_tokenizer, tiny_sentencepiece_tokenizer

STORED = Path(__file__).resolve().parent.parent / "fixtures" / "prompts"
WRITE = os.environ.get("LLMREC_WRITE_RENDERINGS") == "1"

WORDS = "Alien Brazil Clue Dune Eraser Fargo Gattaca Heat Ikiru Jaws Kagemusha Labyrinth".split()
TITLES = [f"{word} ({1970 + i})" for i, word in enumerate(WORDS)]
TITLES += [
    "Wait; (1999)",
    "\U000f51000\U000f5101 {{ item }}",
    "</s><|im_end|><|endoftext|>",
    "<a_1><b_2>",
    "été \u4eba",
]
UNTITLED = 18
TITLES += [None]
ITEMS = len(TITLES)
SIZES = (4, 5, 3)
BASE = 1000
CODES = np.array([[item % 4, item // 4, (item * 2) % 3] for item in range(ITEMS + 1)])
EVERY = {name: 1.0 for name in TASKS}


def small_dataset(users=30, length=7, titles=TITLES):
    events = [
        (user, (user * 5 + step) % ITEMS + 1, "test" if step == length - 1 else "train")
        for user in range(1, users + 1)
        for step in range(length)
    ]
    return dataset_of(events, times=range(len(events)), titles=titles)


DATA = small_dataset()
HISTORIES = DATA.histories("train", 20)
BPE = tiny_bpe_tokenizer([title for title in TITLES if title] * 3)


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bpe":
        return BPE
    return tiny_sentencepiece_tokenizer([title for title in TITLES if title], tmp_path_factory.mktemp("spm"))


def tasks(tokenizer=BPE, shares=EVERY, dataset=DATA, *, seed=0, titles=None, examples=None, **options):
    chosen = CodeTaskOptions(tasks=dict(shares), **options)
    return CodeTasks(dataset, CODES, SIZES, BASE, tokenizer, chosen, seed=seed, titles=titles, examples=examples)


def spelled(items):
    """Code ids of items, written out again from the definition."""
    offsets = (0, SIZES[0], SIZES[0] + SIZES[1])
    return [BASE + offsets[level] + int(CODES[item][level]) for item in items for level in range(3)]


def codes_in(ids):
    return [token for token in ids.tolist() if token >= BASE]


def least_length(tokenizer=BPE, names=tuple(TASKS), **options):
    """Tokens that the longest prompt of one item needs with its answer."""
    sizes = map(tasks(tokenizer, **options).asker.sizes, names)
    return max(int(size.frame.max() + size.shown.max() + size.answer.max()) for size in sizes)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# Prompt files ---------------------------------------------------------------------------------------------------------


def test_every_task_is_a_prompt_file_and_the_other_way_round():
    assert {f"{FOLDER}/{name}" for name in TASKS} == {n for n in asset_names("prompts") if n.startswith(f"{FOLDER}/")}


@pytest.mark.parametrize("name", TASKS)
def test_phrasings_render_to_the_stored_text(name):
    template, task = PromptTemplate.load(f"{FOLDER}/{name}"), TASKS[name]
    assert template.variables == {task.variable} and len(template.variants) >= 4
    shown = ["<first>", "<second>", "<third>"] if task.from_history else "<item>"
    texts = [template.render(variant, **{task.variable: shown}) for variant in template.variants]
    assert len(set(texts)) == len(texts) and all(text.endswith(":") for text in texts)
    assert all("  " not in text and "\n\n" not in text for text in texts)
    whole = "".join(f"=== variant {v}\n{text}\n\n" for v, text in zip(template.variants, texts, strict=True))
    path = STORED / f"{FOLDER}__{name}.txt"
    if WRITE:
        path.write_text(whole, encoding="utf-8")
    assert whole == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("task", "body", "message"),
    [
        ("history_to_item", 'A {{ history | join("; ") }} and {{ history | join("; ") }}:', "once, in order"),
        ("history_to_item", "A {{ history[0] }}:", "shows 1 of 2"),
        ("history_to_item", "A {{ history | reverse | join }}:", "once, in order"),
        ("history_to_item", "A {% for h in history %}{{ loop.index }}{{ h }}{% endfor %}:", "same text"),
        ("title_to_item", "A '{{ title }}':", "blank in front of a title"),
        ("titles_to_item", "A {{ history | join }}:", "blank in front of a title"),
    ],
)
def test_phrasings_that_cannot_hold_items_are_refused(task, body, message):
    source = f"{{# variables: {TASKS[task].variable}; source: a test #}}{body}"
    template = PromptTemplate("own", Path("own.jinja"), source)
    with pytest.raises(RecipeError, match=message):
        read_frame(template, 1, TASKS[task], PieceTokenizer(BPE, False, "eos"))


# Labels and tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_property_11_only_the_answer_and_its_end_carry_loss(tokenizer, chat):
    """Card, property 11: H + 1 loss tokens where a code answers, one token for each of its H levels."""
    if chat and tokenizer.chat_template is None:
        pytest.skip("no chat template")
    data, met = tasks(tokenizer, chat_template=chat), set()
    for row in (data[index] for index in range(len(data))):
        ids, labels, start = row["input_ids"], row["labels"], row["prompt_length"]
        assert ids.dtype == labels.dtype == np.int64 and ids.shape == labels.shape
        assert (labels[:start] == -100).all() and np.array_equal(labels[start:], ids[start:])
        assert ids[-1] == tokenizer.eos_token_id
        if TASKS[row["task"]].answers == "codes":
            assert labels[start:].tolist() == [*spelled([row["target"]]), tokenizer.eos_token_id]
            assert (labels != -100).sum() == len(SIZES) + 1
        else:
            assert (labels < BASE).all()
            written = tokenizer.decode(labels[start:-1].tolist()).strip(" ")
            assert written == data.asker.pieces.tokenizer.decode(ids[start:-1].tolist()).strip(" ") != ""
        met.add(row["task"])
    assert met == set(TASKS)


def test_prompts_show_the_codes_of_their_items_in_order(tokenizer):
    data = tasks(tokenizer, max_history=4)
    for row in (data[index] for index in range(len(data))):
        prompt = row["input_ids"][: row["prompt_length"]]
        shows_codes = TASKS[row["task"]].shows == "codes"
        assert codes_in(prompt) == (spelled(row["item_ids"].tolist()) if shows_codes else [])
        assert len(row["item_ids"]) <= 4 and row["dropped_items"] == 0


def test_prompt_text_is_what_the_template_says(tokenizer):
    asker = tasks(tokenizer).asker
    head = len(asker.pieces.head)

    def text(task, items, answer=None):
        """Words as they read on from one another, a run of codes as its length."""
        out, words, run = "", [], 0
        for token in [*asker.encode(task, items, answer).input_ids[head:].tolist(), None]:
            if token is not None and token >= BASE:
                run += 1
                continue
            out += f"[{run}]" if run else ""
            run = 0
            if token is not None:
                before = tokenizer.decode(words)
                words.append(token)
                out += tokenizer.decode(words)[len(before) :]
        return out.strip(" ")

    first = "Items that one person has chosen, oldest first:"
    assert text("history_to_item", [1, 2, 3]) == (
        f"{first}[9].\nGive the item this person chooses next and nothing else.\nNext item:"
    )
    assert text("titles_to_item", [1, 13]) == (
        f"Titles of what one person has chosen, oldest first: {TITLES[0]}; {TITLES[12]}.\n"
        "Give the item this person chooses next, as a code and nothing else.\nNext item:"
    )
    assert text("item_to_title", [5], 5) == (
        f"What is the item[3] called?\nGive its title and nothing else.\nTitle: {TITLES[4]}{tokenizer.eos_token}"
    )
    assert text("title_to_item", [5]) == f"An item is called: {TITLES[4]}\nWhich code stands for it?\nCode:"


def test_a_title_has_the_same_tokens_in_prompts_and_answers(tokenizer):
    asker = tasks(tokenizer).asker
    for item in range(1, UNTITLED):
        answer = asker.answer_ids("item_to_title", item)[:-1].tolist()
        prompt = asker.encode("title_to_item", [item]).input_ids.tolist()
        assert any(prompt[i : i + len(answer)] == answer for i in range(len(prompt)))


def test_no_title_can_produce_a_code_or_a_control_token(tokenizer):
    """Titles spell marks, Jinja, control tokens and code names; on token level none of that is left of them."""
    asker = tasks(tokenizer, {"titles_to_item": 1, "item_to_title": 1}).asker
    control = (set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())) - {tokenizer.unk_token_id}
    prompt = asker.encode("titles_to_item", list(range(1, UNTITLED))).input_ids[len(asker.pieces.head) :]
    assert not codes_in(prompt) and not control & set(prompt.tolist())
    for item in range(1, UNTITLED):
        answer = asker.answer_ids("item_to_title", item)[:-1]
        assert not codes_in(answer) and not control & set(answer.tolist())


def test_a_vocabulary_that_reaches_into_the_codes_is_refused():
    highest = max(BPE.get_vocab().values())
    CodeAsker(CODES, SIZES, highest + 1, BPE, CodeTaskOptions())
    with pytest.raises(RecipeError, match=f"code_base is {highest}, but the tokenizer has ids up to {highest}"):
        CodeAsker(CODES, SIZES, highest, BPE, CodeTaskOptions())


def test_long_titles_are_cut_without_half_characters():
    long = ["", "\u4eba\u9593\u5931\u683c " * 9, *(title or "" for title in TITLES[1:])]
    asker = CodeAsker(CODES, SIZES, BASE, BPE, CodeTaskOptions(max_title_tokens=7, tasks={"item_to_title": 1}), long)
    answers = [asker.answer_ids("item_to_title", item)[:-1].tolist() for item in range(1, UNTITLED)]
    assert max(map(len, answers)) == 7
    kept = BPE.decode(answers[0]).strip(" ")
    assert kept and "\ufffd" not in kept and long[1].startswith(kept)
    whole = CodeAsker(CODES, SIZES, BASE, BPE, CodeTaskOptions(max_title_tokens=None, tasks={"item_to_title": 1}), long)
    assert BPE.decode(whole.answer_ids("item_to_title", 1)[:-1].tolist()).strip(" ") == long[1].strip()


# Asking ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limited", [False, True])
def test_a_question_is_the_training_prompt_of_the_first_phrasing(tokenizer, limited):
    limit = least_length(tokenizer, [ASKING]) + 4 if limited else None
    data = tasks(tokenizer, {"history_to_item": 1}, max_history=5, max_length=limit, variants=1)
    shortened = 0
    for index in range(len(data)):
        row = data[index]
        asked = data.encode_history(HISTORIES[index]["seen"])
        assert np.array_equal(asked, row["input_ids"][: row["prompt_length"]])
        shortened += row["dropped_items"] > 0
    assert bool(shortened) == limited
    assert np.array_equal(tasks(tokenizer).encode_history([3, 4]), tasks(tokenizer, variants=1).encode_history([3, 4]))


def test_asking_needs_neither_events_nor_titles():
    data = tasks(BPE, variants=2)
    bare = CodeAsker(CODES, SIZES, BASE, BPE, data.options)
    assert np.array_equal(bare.encode_history([1, 2, 3]), data.encode_history([1, 2, 3]))
    with pytest.raises(DataError, match="item 3 has no title"):
        bare.encode("item_to_title", [3], 3)


@pytest.mark.parametrize("history", [[], [0], [1, ITEMS + 1]])
def test_histories_without_codes_are_refused(history):
    with pytest.raises(DataError, match="nothing to show|items without codes"):
        tasks().encode_history(history)


# Length ---------------------------------------------------------------------------------------------------------------


def test_max_length_keeps_the_answer_whole_and_the_latest_items(tokenizer):
    limit, free = least_length(tokenizer, max_title_tokens=8) + 4, tasks(tokenizer, max_title_tokens=8)
    data, dropped = tasks(tokenizer, max_title_tokens=8, max_length=limit), 0
    for index in range(len(data)):
        row, whole = data[index], free[index]
        assert len(row["input_ids"]) <= limit
        answer = whole["input_ids"][whole["prompt_length"] :]
        assert np.array_equal(row["labels"][row["prompt_length"] :], answer)
        shown = codes_in(row["input_ids"][: row["prompt_length"]])
        if TASKS[row["task"]].shows == "codes":
            assert shown == codes_in(whole["input_ids"][: whole["prompt_length"]])[row["dropped_items"] * len(SIZES) :]
        assert np.array_equal(row["item_ids"], whole["item_ids"])
        if row["dropped_items"]:
            dropped += 1
            kept = len(whole["item_ids"]) - row["dropped_items"]
            assert TASKS[row["task"]].shows == "titles" or len(shown) == kept * len(SIZES)
            one_more = data.asker.sizes(row["task"]).shown.max() + 2
            assert len(row["input_ids"]) + one_more > limit, "as many items as fit"
    assert dropped


def test_a_length_without_room_for_one_item_is_refused():
    needed = least_length()
    tasks(max_length=needed)
    with pytest.raises(RecipeError, match=f"max_length is {needed - 1}"):
        tasks(max_length=needed - 1)


@pytest.mark.parametrize("chat", [False, True])
def test_lengths_are_those_of_the_rows(tokenizer, chat):
    if chat and tokenizer.chat_template is None:
        pytest.skip("no chat template")
    data = tasks(tokenizer, chat_template=chat)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        assert data.lengths.tolist() == [len(data[index]["input_ids"]) for index in range(len(data))]


def test_lengths_are_an_upper_estimate_of_shortened_prompts():
    limit = least_length(max_title_tokens=8) + 4
    data = tasks(max_title_tokens=8, max_length=limit)
    real = np.array([len(data[index]["input_ids"]) for index in range(len(data))])
    cut = np.array([data[index]["dropped_items"] > 0 for index in range(len(data))])
    assert (data.lengths >= real).all() and cut.any()
    assert np.array_equal(data.lengths[~cut], real[~cut]) and (data.lengths[cut] == limit).all()


# Mix and draws --------------------------------------------------------------------------------------------------------


def test_shares_of_the_mix():
    shares = {"history_to_item": 2.0, "history_to_title": 1.0, "title_to_item": 1.5, "item_to_title": 0.75}
    data = tasks(shares=shares, dataset=small_dataset(users=400))
    mix, histories = data.mix(), 400 * 5
    assert list(mix) == [name for name in TASKS if name in shares] and sum(mix.values()) == len(data)
    assert mix["history_to_item"] + mix["history_to_title"] == histories, "every history once an epoch"
    assert mix["title_to_item"] == 1000 and mix["item_to_title"] == 500
    assert abs(mix["history_to_title"] / histories - 1 / 3) < 0.05
    assert mix == {name: sum(data[i]["task"] == name for i in range(len(data))) for name in mix}


def test_default_mix_and_a_mix_without_histories():
    data = CodeTasks(DATA, CODES, SIZES, BASE, BPE, CodeTaskOptions())
    assert set(data.tasks) == set(code_prompts.DEFAULT_MIX)
    mix = tasks(shares={"item_to_title": 0.5, "title_to_item": 0.25}).mix()
    assert mix == {"item_to_title": ITEMS - 1, "title_to_item": round((ITEMS - 1) / 2)}


def test_catalogue_tasks_run_through_all_items():
    data = tasks(shares={"title_to_item": 1})
    seen = []
    for epoch in range(2):
        data.set_epoch(epoch)
        seen.append([data[index]["target"] for index in range(len(data))])
        assert sorted(seen[-1]) == list(range(1, UNTITLED))
    assert seen[0] != seen[1]


def test_items_without_a_title_are_left_out_of_title_tasks(tokenizer):
    data = tasks(tokenizer)
    rows = [data[index] for index in range(len(data))]
    assert not any(row["target"] == UNTITLED for row in rows if TASKS[row["task"]].answers == "titles")
    assert not any(row["target"] == UNTITLED for row in rows if row["task"] == "title_to_item")
    assert sum(row["target"] == UNTITLED for row in rows) == (HISTORIES.targets == UNTITLED).sum() > 0
    asker = data.asker
    with_it, without = (asker.encode("titles_to_item", h).input_ids for h in ([1, UNTITLED, 2], [1, 2]))
    assert np.array_equal(with_it, without)
    only = tasks(tokenizer, {"history_to_title": 1})
    assert len(only) == (HISTORIES.targets != UNTITLED).sum()


def test_keys_are_no_titles():
    with pytest.raises(RecipeError, match="need titles, but no item has one"):
        tasks(dataset=small_dataset(titles=None))
    assert len(tasks(shares={"history_to_item": 1}, dataset=small_dataset(titles=None))) == len(HISTORIES)
    named = ["", *(f"thing {item}" for item in range(1, ITEMS + 1))]
    assert tasks(dataset=small_dataset(titles=None), titles=named).mix()["item_to_title"] > 0


def test_draws_are_keyed_by_seed_example_and_epoch():
    a, b, other = tasks(seed=3), tasks(seed=3), tasks(seed=4)
    a.set_epoch(2)
    a[5]  # order of access and earlier epochs leave no trace
    a.set_epoch(1)
    b.set_epoch(1)
    other.set_epoch(1)
    rows = [[data[index] for index in reversed(range(len(data)))] for data in (a, b, other)]
    assert all(same(x, y) for x, y in zip(rows[0], rows[1], strict=True))
    assert not all(same(x, y) for x, y in zip(rows[0], rows[2], strict=True))
    b.set_epoch(2)
    tasks_of = [[b[index]["task"] for index in range(len(b))] for b in (a, b)]
    assert tasks_of[0] != tasks_of[1]
    assert {row["phrasing"] for row in rows[0]} == {0, 1, 2, 3}
    assert {tasks(variants=2)[index]["phrasing"] for index in range(len(a))} == {0}


def test_a_subset_holds_the_same_examples():
    data, chosen = tasks(), np.array([140, 3, 77, 3, 200])
    part = data.subset(chosen).subset([0, 1, 2, 4])
    part.set_epoch(4)
    assert data.epoch == 0 and same(data[0], tasks()[0]), "the whole set keeps its epoch"
    data.set_epoch(4)
    assert all(same(part[i], data[j]) for i, j in enumerate([140, 3, 77, 200])) and len(part) == 4
    assert part.lengths.tolist() == data.lengths[[140, 3, 77, 200]].tolist() and sum(part.mix().values()) == 4
    fewer = tasks(shares={"history_to_item": 1, "history_to_title": 1}, examples=HISTORIES.subset([9, 50]))
    whole = tasks(shares={"history_to_item": 1, "history_to_title": 1})
    assert same(fewer[0], whole[9]) and same(fewer[1], whole[50])


def test_example_ids_are_unique_and_belong_to_the_event():
    data = tasks()
    ids = [data[index]["example_id"] for index in range(len(data))]
    assert len(set(ids)) == len(ids)
    assert ids[: len(HISTORIES)] == HISTORIES.example_ids.tolist()
    assert min(ids[len(HISTORIES) :]) >= DATA.interactions.num_rows


# Batches --------------------------------------------------------------------------------------------------------------


def test_batches_are_right_padded_and_hold_what_gates_read(tokenizer):
    data = tasks(tokenizer)
    rows = [data[index] for index in (0, 3, len(data) - 1)]
    batch = CodeTaskCollator(tokenizer)(rows)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for place, row in enumerate(rows):
        size, items = len(row["input_ids"]), len(row["item_ids"])
        assert batch["input_ids"][place, :size].tolist() == row["input_ids"].tolist()
        assert (batch["input_ids"][place, size:] == filler).all() and (
            batch["token_labels"][place, size:] == -100
        ).all()
        assert batch["token_labels"][place, :size].tolist() == row["labels"].tolist()
        assert batch["attention_mask"][place].tolist() == [1] * size + [0] * (batch["input_ids"].shape[1] - size)
        assert batch["item_ids"][place, :items].tolist() == row["item_ids"].tolist()
        assert (batch["item_ids"][place, items:] == 0).all()
    assert batch["lengths"].tolist() == [len(row["item_ids"]) for row in rows]
    assert batch["item_ids"][2, 0] == rows[2]["target"] and batch["lengths"][2] == 1 and batch["user_ids"][2] == 0
    assert batch["example_ids"].tolist() == [row["example_id"] for row in rows]
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_workers_see_what_the_main_process_sees():
    data = tasks()
    data.set_epoch(3)
    loaders = [DataLoader(data, batch_size=16, collate_fn=CodeTaskCollator(BPE), num_workers=n) for n in (0, 2)]
    for one, two in zip(*loaders, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {}}, "expected a share for each"),
        ({"tasks": {"item_search": 1}}, "found 'item_search'"),
        ({"tasks": {"history_to_item": 0}}, "found 0"),
        ({"tasks": {"history_to_item": -1.0}}, "expected a share above 0"),
        ({"tasks": {"history_to_item": float("nan")}}, "found nan"),
        ({"tasks": {"history_to_item": True}}, "found True"),
        ({"max_history": 0}, "max_history: found 0"),
        ({"max_title_tokens": 0}, "max_title_tokens: found 0"),
        ({"max_length": 1.5}, "max_length: found 1.5"),
        ({"variants": "some"}, "variants: found 'some'"),
    ],
)
def test_options_say_what_they_expect(options, message):
    with pytest.raises(RecipeError, match=message):
        CodeTaskOptions(**options)


def test_parts_that_do_not_fit_are_refused():
    asking = CodeTaskOptions(tasks={ASKING: 1})
    with pytest.raises(DataError, match="another catalogue"):
        CodeTasks(DATA, CODES[:-1], SIZES, BASE, BPE, asking)
    with pytest.raises(DataError, match="codes outside their levels"):
        CodeTasks(DATA, CODES, (4, 5, 2), BASE, BPE, asking)
    with pytest.raises(DataError, match="codes and level sizes disagree"):
        CodeTasks(DATA, CODES, (4, 5), BASE, BPE, asking)
    with pytest.raises(DataError, match="one title per item"):
        tasks(titles=["a", "b"])
    with pytest.raises(RecipeError, match="use dataset.histories"):
        tasks(examples=DATA.windows(5))
    with pytest.raises(RecipeError, match="found 9"):
        tasks(variants=9)
    with pytest.raises(RecipeError, match="have no example"):
        tasks(shares={ASKING: 1}, examples=HISTORIES.subset(np.zeros(0, dtype=int)))
