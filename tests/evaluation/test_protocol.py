from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llmrec.errors import RecipeError
from llmrec.evaluation.protocol import EvalProtocol, parse_protocol
from tests.evaluation.small import make_dataset

DATA = make_dataset([[1, 2, 3], [2, 3, 1]], 4)


def test_labels():
    assert EvalProtocol().resolve(DATA).label() == "full ranking, test, seen removed"
    assert EvalProtocol(remove_seen=False, split="valid").label() == "full ranking, valid, seen kept"
    assert parse_protocol("candidates-20").label() == "candidates-20 (uniform, seed 42), test, score"
    label = parse_protocol("candidates-20-popularity", mode="generate", seeds=(1, 2)).label()
    assert label == "candidates-20 (popularity, seeds 1, 2), test, generate"


def test_seen_items_follow_the_data_set():
    repeats = make_dataset([[1, 2, 1]], 3, has_repeats=True)
    assert EvalProtocol().resolve(DATA).remove_seen is True
    assert EvalProtocol().resolve(repeats).remove_seen is False
    assert EvalProtocol(remove_seen=True).resolve(repeats).remove_seen is True


@pytest.mark.parametrize(
    "change",
    [
        {"split": "valid"},
        {"remove_seen": False},
        {"candidates": "candidates-3"},
        {"candidates": "candidates-3", "kind": "popularity"},
        {"candidates": "candidates-3", "seeds": (7,)},
        {"mode": "generate"},
    ],
)
def test_another_question_has_another_fingerprint(change):
    base = EvalProtocol(ks=(1, 2))
    if len(change) > 1:
        base = replace(base, candidates="candidates-3")
    assert replace(base, **change).fingerprint(DATA) != base.fingerprint(DATA)


@pytest.mark.parametrize("change", [{"ks": (1, 3)}, {"max_history": 9}, {"seeds": (7,)}, {"kind": "popularity"}])
def test_what_leaves_the_question_alone_leaves_the_fingerprint(change):
    base = EvalProtocol()
    assert replace(base, **change).fingerprint(DATA) == base.fingerprint(DATA)
    assert base.resolve(DATA).fingerprint(DATA) == base.fingerprint(DATA)


def test_another_data_set_has_another_fingerprint():
    assert EvalProtocol().fingerprint(DATA) != EvalProtocol().fingerprint(make_dataset([[1, 2, 4], [2, 3, 1]], 4))


def test_round_trip_through_json():
    protocol = parse_protocol("candidates-100-popularity", split="valid", ks=(10, 1), seeds=[3, 4])
    assert EvalProtocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol
    assert protocol.ks == (1, 10) and protocol.num_candidates == 100


def test_cuts_that_say_nothing_are_left_out():
    assert parse_protocol("candidates-20").cuts == (1, 5, 10)
    assert parse_protocol("candidates-20", mode="generate").cuts == (1,)
    assert EvalProtocol().cuts == (1, 5, 10, 20)


def test_slugs_are_distinct_folder_names():
    protocols = [
        EvalProtocol(),
        EvalProtocol(split="valid"),
        EvalProtocol(remove_seen=False),
        parse_protocol("candidates-20"),
        parse_protocol("candidates-20-popularity"),
        parse_protocol("candidates-20", mode="generate"),
    ]
    slugs = [protocol.slug for protocol in protocols]
    assert len(set(slugs)) == len(slugs) and not any("/" in slug or " " in slug for slug in slugs)


@pytest.mark.parametrize(
    "text, fields",
    [
        ("candidates-1", {}),
        ("candidates-x", {}),
        ("sampled", {}),
        ("candidates-20-rare", {}),
        ("candidates-20-uniform", {"kind": "popularity"}),
        ("candidates-5", {"ks": (5, 10)}),
        ("full", {"split": "tset"}),
        ("full", {"ks": ()}),
        ("full", {"ks": (0,)}),
        ("full", {"seeds": ()}),
        ("full", {"mode": "guess"}),
        ("full", {"max_history": 0}),
        ("full", {"cutoffs": (1,)}),
    ],
)
def test_what_cannot_be_meant_is_refused(text, fields):
    with pytest.raises(RecipeError, match="protocol"):
        parse_protocol(text, **fields)
