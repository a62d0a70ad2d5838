"""The card: front matter as the Hub reads it, figures with intervals, and nothing a reader could mistake or run."""

from __future__ import annotations

import ast
import getpass
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llmrec.data.catalogue import ItemCatalogue, item_index
from llmrec.evaluation.protocol import SAMPLED_NOTE
from llmrec.reporting.model_card import hub_name, interval, render_card
from tests.reporting.published import HOME, dataset, write_run


def card_of(folder: Path, *, titles: bool = True, **run: Any) -> str:
    write_run(folder, **run)
    return render_card(folder, "me/mine", ItemCatalogue.of(dataset(), titles=titles), [("a.json", 12, "d" * 64)])


def section(card: str, title: str) -> str:
    return re.split(r"\n## ", card.split(f"\n## {title}\n", 1)[1])[0]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return card_of(tmp_path_factory.mktemp("card") / "run", model=True)


def test_the_front_matter_is_what_the_hub_reads(card: str) -> None:
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("llmrec", "other", "hand-made")
    assert (data.base_model, data["base_model_relation"]) == ("owner/base-model", "adapter")
    assert {"recommendation", "ilora", "sasrec"} <= set(data.tags) and data.datasets == ["hand|made"]
    results = {(entry.dataset_config, entry.metric_type): entry for entry in data.eval_results}
    assert set(results) == {(print_, m) for print_ in ("0123456789ab", "ba9876543210") for m in ("hr@10", "ndcg@10")}
    full = results["0123456789ab", "hr@10"]
    assert full.metric_value == 0.4 and full.dataset_split == "test" and "full ranking" in full.metric_name
    assert full.metric_args["interval_95"] == pytest.approx([0.35, 0.45])


def test_loading_takes_five_lines_that_are_python(card: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", section(card, "Load it"), re.DOTALL)
    ast.parse(code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    assert 'Recommender.from_pretrained("me/mine")' in code and '"key-1", "key-2"' in code


def test_sampled_figures_stand_in_a_table_of_their_own_with_the_warning(card: str) -> None:
    full, sampled = section(card, "What was measured").split("### ")[1:]
    assert "| ilora (this run) | 0.4000 (0.3500 to 0.4500) | 0.2000 (0.1500 to 0.2500) |" in full
    assert "| popularity | 0.2000 " in full and "`0123456789ab`" in full and SAMPLED_NOTE not in full
    assert sampled.startswith("candidates-5") and SAMPLED_NOTE in sampled
    assert "| 0.9000 " in sampled and "| 0.9000 " not in full and "(this run) | 0.4000 " not in sampled


def test_the_data_card_has_counts_rules_and_the_leak(card: str) -> None:
    data = section(card, "Data")
    for row in ("| users | 3 |", "| items | 6 |", "| interactions | 12 |", "min\\_user = 2", "leave\\_one\\_out"):
        assert row in data
    assert dataset().fingerprint in data and "50% of the training events are later" in data
    assert "No interaction, user id or per-user prediction" in data


def test_every_part_is_named_by_hash(card: str) -> None:
    identity, index = section(card, "Identity"), item_index(dataset())
    for mark in (index["keys"], index["titles"], "f" * 64, "a" * 64, "c" * 40, "owner/base-model", "l" * 64):
        assert mark in identity
    assert "d" * 64 in section(card, "Files")


def test_training_names_no_machine(card: str) -> None:
    training = section(card, "Training")
    assert "| 1 | encoder | next\\_item | 7 | 1 | 0.01 |" in training and "ndcg@10 0.2500" in training
    assert "| system | Linux |" in training or "system" in training
    assert HOME not in card and socket.gethostname() not in card.replace("localhost", "")
    assert f"/{getpass.getuser()}/" not in card


def test_text_of_the_data_has_no_markup(card: str) -> None:
    assert "hand\\|made" in section(card, "Data") and "<b>" not in card


def test_titles_that_are_not_published_are_announced(tmp_path: Path) -> None:
    prompt = {"style": "text", "template": "next_item/movie"}
    assert "give the prepared data set" in card_of(tmp_path / "text", titles=False, model=True, prompt=prompt)
    slots = card_of(tmp_path / "slots", titles=False, model=True)
    assert "called by their ids" in slots and "of the titles only a hash is published" in slots
    assert "and the item titles" in card_of(tmp_path / "open", titles=True)


def test_a_run_of_an_encoder_has_no_base_model(tmp_path: Path) -> None:
    card = card_of(tmp_path / "run")
    data = ModelCard(card).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()
    assert "The sequence encoder sasrec" in card and "base model" not in section(card, "Identity")


def test_a_base_model_in_a_home_folder_is_not_named(tmp_path: Path) -> None:
    card = card_of(tmp_path / "run", model=True, base=f"{HOME}/models/mine")
    assert "somebody" not in card and "~/models/mine" in card and ModelCard(card).data.base_model is None


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    from llmrec.errors import DataError

    write_run(tmp_path / "run")
    (tmp_path / "run" / "evaluations" / "test-full" / "metrics.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.json"):
        render_card(tmp_path / "run", "me/mine", ItemCatalogue.of(dataset(), titles=True))


def test_names_of_base_models(tmp_path: Path) -> None:
    assert hub_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_name("tiny-llama") is None and hub_name("owner/name") == "owner/name"
    assert hub_name(str(tmp_path)) is None and hub_name("a/b/c") is None


def test_intervals() -> None:
    assert interval({"mean": 0.5, "low": 0.25, "high": 0.75}) == "0.5000 (0.2500 to 0.7500)"
    assert interval({"mean": 0.5, "low": None, "high": None}) == "0.5000" and interval(None) == "–"
