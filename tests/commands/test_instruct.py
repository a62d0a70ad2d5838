from __future__ import annotations

import argparse
import json

import pytest

from llmrec.commands import instruct
from llmrec.data.dataset import InteractionDataset
from llmrec.data.negatives import stored_candidates
from llmrec.errors import CheckFailed, DataError, RecipeError
from tests.data.tables import dataset_of
from tests.fixtures.tokenizers import tiny_bpe_tokenizer

TITLES = [f"Film {letter}, The (19{70 + i})" for i, letter in enumerate("ABCDEFGHIJKLMNOPQRST")] + ["A <item> B", "a"]
EVENTS = [
    (user, (user * 3 + step) % len(TITLES) + 1, "test" if step == 7 else "train")
    for user in range(1, 7)
    for step in range(8)
]


@pytest.fixture
def folder(tmp_path):
    return dataset_of(EVENTS, times=range(len(EVENTS)), titles=TITLES).save(tmp_path / "data")


def call(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", dest="as_json", action="store_true")
    instruct.add_arguments(parser)
    return instruct.run(parser.parse_args([str(word) for word in words]))


def export(folder, *words):
    out = folder.parent / "rows.jsonl"
    assert call(folder, "--template", "next_item/movie", "--out", out, *words) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_rows_hold_prompt_completion_and_original_ids(folder, capsys):
    rows = export(folder, "--candidates", 5, "--json")
    shown = json.loads(capsys.readouterr().out)
    data = InteractionDataset.load(folder)
    examples = data.histories("train", 10)
    assert shown["rows"] == len(rows) == len(examples) == 36
    assert shown["preview"] == rows[0] and shown["answers_in_history"] == 0
    for row, target, example_id in zip(rows, examples.targets, examples.example_ids, strict=True):
        title = dict(zip(data.item_keys, data.item_titles, strict=True))
        title["key-21"] = "A (item) B"
        assert row["target"] == data.item_keys[target] and row["example_id"] == example_id
        assert row["completion"] == f" {title[row['target']]}\n" and not row["prompt"].endswith(" ")
        assert len(set(row["candidates"])) == 5 and row["target"] in row["candidates"]
        assert row["user"].startswith("user-") and row["target"] not in row["history"]
        assert "; ".join(title[key] for key in row["history"]) in row["prompt"]
        assert "; ".join(title[key] for key in row["candidates"]) in row["prompt"]
        assert "item_slots" not in row


def test_the_same_seed_writes_the_same_bytes(folder):
    assert export(folder, "--candidates", 4) == export(folder, "--candidates", 4)
    assert export(folder, "--candidates", 4) != export(folder, "--candidates", 4, "--seed", 1)
    few = export(folder, "--candidates", 4, "--limit", 7)
    every = {row["example_id"]: row for row in export(folder, "--candidates", 4)}
    assert len(few) == 7 and all(every[row["example_id"]] == row for row in few)
    with pytest.raises(RecipeError, match="--limit is 0"):
        export(folder, "--limit", 0)


def test_hybrid_rows_name_the_item_of_every_marker(folder):
    rows = export(folder, "--style", "hybrid", "--candidates", 5)
    data = InteractionDataset.load(folder)
    titles = dict(zip(data.item_keys, data.item_titles, strict=True)) | {"key-21": "A (item) B"}
    for row in rows:
        pieces = row["prompt"].split(" <item>")
        assert len(pieces) == len(row["item_slots"]) + 1
        assert sorted(row["item_slots"]) == sorted(row["history"] + row["candidates"])
        for piece, key in zip(pieces, row["item_slots"], strict=False):
            assert piece.endswith(titles[key])


def test_item_text_flags(folder):
    rows = export(folder, "--move-article", "--drop-year", "--max-history", 2)
    assert "The Film D; The Film E" in rows[2]["prompt"] or "The Film E; The Film F" in rows[2]["prompt"]
    assert all(len(row["history"]) <= 2 and row["candidates"] == [] for row in rows)


def test_evaluation_rows_use_the_stored_candidates(folder):
    rows = export(folder, "--split", "test", "--candidates", 6)
    data = InteractionDataset.load(folder)
    lists = stored_candidates(folder, data, "test", 6)
    assert [row["candidates"] for row in rows] == [[data.item_keys[i] for i in line] for line in lists]
    with pytest.raises(RecipeError, match="split 'valid' has no event"):
        export(folder, "--split", "valid")


def test_chat_rows_are_messages(folder):
    row = export(folder, "--chat", "--candidates", 3)[0]
    (question,), (answer,) = row["prompt"], row["completion"]
    assert question["role"] == "user" and question["content"].endswith(":")
    assert answer == {"role": "assistant", "content": answer["content"].strip()}


def test_an_answer_in_its_own_history_stops_the_export(tmp_path, capsys):
    events = [(1, item, "train") for item in (1, 2, 1, 3)]
    planted = dataset_of(events, titles=TITLES).save(tmp_path / "planted")
    out = tmp_path / "rows.jsonl"
    out.write_text("old\n")
    with pytest.raises(CheckFailed, match="the answer 'key-1' of user 'user-1' stands in its own history"):
        call(planted, "--template", "next_item/movie", "--out", out)
    assert out.read_text() == "old\n" and [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    declared = dataset_of(events, titles=TITLES, meta={"has_repeats": True}).save(tmp_path / "declared")
    assert call(declared, "--template", "next_item/movie", "--out", out) == 0
    assert "these answers also stand in the history" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 3


def test_alike_titles_are_no_leak_because_they_are_told_apart(tmp_path):
    events = [(1, item, "train") for item in (1, 2, 3)]
    folder = dataset_of(events, titles=["Alien", "Brazil", "ALIEN"]).save(tmp_path / "data")
    assert [row["completion"] for row in export(folder)] == [" Brazil\n", " ALIEN (2)\n"]


def test_readable_output_shows_one_prompt(folder, capsys):
    export(folder, "--candidates", 3)
    out = capsys.readouterr().out
    assert "prompt" in out and "answer" in out and "Film" in out and "36" in out


def test_no_data_set_and_no_template(tmp_path, folder):
    with pytest.raises(DataError, match="not a prepared data set"):
        call(tmp_path / "nothing", "--template", "next_item/movie", "--out", tmp_path / "x.jsonl")
    with pytest.raises(RecipeError, match="next_item/movie"):
        call(folder, "--template", "next_item/moovie", "--out", tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("chat", [False, True])
def test_trl_trains_on_the_file_as_it_is(folder, chat, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder.parent / "cache"))
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = export(folder, "--candidates", 3, *(["--chat"] if chat else []))
    tokenizer = tiny_bpe_tokenizer([str(row["prompt"]) for row in rows])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        args=SFTConfig(
            output_dir=str(folder.parent / "sft"),
            max_steps=1,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_json(str(folder.parent / "rows.jsonl")),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    supervised = batch["labels"] != -100
    assert 0 < int(supervised.sum()) < int(batch["attention_mask"].sum() if "attention_mask" in batch else 10**6)
    answers = {row["completion"][0]["content"] if chat else row["completion"].strip() for row in rows}
    for ids, chosen in zip(batch["input_ids"], supervised, strict=True):
        text = tokenizer.decode(ids[chosen], skip_special_tokens=True).removeprefix("assistant\n").strip()
        assert text in answers
    assert trainer.train().training_loss > 0
