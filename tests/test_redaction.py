"""Planted secrets are found, named by kind and place, and never shown; ordinary text stays as it is."""

from __future__ import annotations

import io
import sys
import traceback
from pathlib import Path

import pytest

from llmrec import cli, redaction
from llmrec.errors import DataError, RecipeError
from llmrec.recipe import load_recipe, parse_recipe
from llmrec.redaction import HOME, Finding, find_secrets, redact, redact_record, redacted_output, secrets_in
from llmrec.run_dir import RunDir

BODY = "Abcdefghij0123456789" + "abcdZ"
# Written in two parts, so that this file holds no secret of its own.
PLANTED = {
    "hf_" + BODY: "Hugging Face token",
    "sk-" + "proj-" + BODY: "secret key (sk-)",
    "AKIA" + "ABCDEFGHIJ012345": "AWS access key",
    "ghp_" + BODY: "GitHub token",
    "github_pat_" + BODY: "GitHub token",
    "xoxb-" + "1234567890-abc": "Slack token",
    "AIza" + BODY + "0123456789": "Google API key",
    "-----BEGIN" + " RSA PRIVATE KEY-----": "private key",
    "https" + "://me:geheim7@example.com/x": "password in an address",
}
HOMES = [
    "/home/" + "anna/data.csv",
    "/Users/" + "anna/x",
    "/root/" + "models/anna",
    "C:\\Users\\" + "anna",
    "C:\\\\Users\\\\" + "anna",
]
HARMLESS = [
    "task-based learning of the sk-learn library", "shelf_" + BODY, "https://example.com/home/news", "chef_1",
    "the next token is <pad>", "pad_token: '<|im_end|>'", "user_key=u0000001", "s3://bucket/home/x", "AKIA", "ghp_a",
    "-----BEGIN CERTIFICATE-----", "http://localhost:8000/a@b", "sort_key: timestamp", "max_new_tokens=123456789",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_secrets_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in redaction.environment_secrets():
        monkeypatch.delenv(name)


def found(data: bytes, **options: bool) -> list[Finding]:
    return find_secrets(io.BytesIO(data), **options)


@pytest.mark.parametrize("secret", PLANTED)
def test_a_planted_secret_is_found_and_taken_out(secret: str) -> None:
    text = f"first line\nsecond: ({secret}) and more"
    assert found(text.encode()) == [Finding(PLANTED[secret], "line 2")]
    clean = redact(text)
    assert (
        secret not in clean and f"[redacted: {PLANTED[secret]}]" in clean and clean.startswith("first line\nsecond: (")
    )
    assert [kind for _, kind in secrets_in({"a": [text]})] == [PLANTED[secret]]


@pytest.mark.parametrize("path", HOMES)
def test_home_folders_leave_no_machine(path: str) -> None:
    assert found(f'{{"a": "{path}"}}'.encode()) == [Finding(HOME, "line 1")]
    assert found(path.encode(), homes=False) == []
    assert redact(path, homes=True).startswith("~") and "root" not in redact(path, homes=True)
    assert "anna" not in redact(path, homes=True) or path.startswith("/root")
    assert redact(path) == path, "messages keep the paths people need"


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_stays(text: str) -> None:
    assert found(text.encode()) == []
    assert redact(text, homes=True) == text
    assert list(secrets_in({"x": text})) == []


def test_secrets_in_binary_files_and_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + BODY
    assert found(b"\0\1\2" + secret.encode() + b"\0") == [Finding("Hugging Face token", "byte 3")]
    monkeypatch.setattr(redaction, "_CHUNK", 64)
    monkeypatch.setattr(redaction, "_OVERLAP", 40)
    for before in range(30, 70):
        text = "x\n" * (before // 2) + " " * (before % 2) + secret
        assert found(text.encode()) == [Finding("Hugging Face token", f"line {before // 2 + 1}")], before


def test_values_of_the_environment_are_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_API_KEY", "kf83mmvq19")
    monkeypatch.setenv("OTHER_TOKEN", "plain")  # too short to tell from a word
    monkeypatch.setenv("KEY_PATH_TOKEN", "/etc/some/path0")
    assert redaction.environment_secrets() == {"SHOP_API_KEY": "kf83mmvq19"}
    assert redact("got kf83mmvq19!") == "got [redacted: $SHOP_API_KEY]!"
    assert found(b"x\nkf83mmvq19") == [Finding("value of the environment variable SHOP_API_KEY", "line 2")]
    with pytest.raises(RecipeError, match="SHOP_API_KEY"):
        parse_recipe({"name": "x", "dataset": {"source": "kf83mmvq19"}})


def test_values_under_secret_names() -> None:
    record = {"hub_token": "q7w8e9r0t1", "api_key": "q7w8e9r0t1", "password": "abc", "user_key": "user_id",
              "pad_token": "<pad>", "deep": [{"wandb_key": "q7w8e9r0t1"}], "n_key": 3, "hf_token": None}  # fmt: skip
    clean = redact_record(record)
    assert "q7w8e9r0t1" not in str(clean) and clean["password"] != "abc"
    assert {name: clean[name] for name in ("user_key", "pad_token", "n_key", "hf_token")} == {
        "user_key": "user_id", "pad_token": "<pad>", "n_key": 3, "hf_token": None}  # fmt: skip
    assert [place for place, _ in secrets_in(record)] == [
        ("hub_token",), ("api_key",), ("password",), ("deep", 0, "wandb_key")]  # fmt: skip
    assert redact("hub_token=q7w8e9r0t1, password: abc") == "hub_token=[redacted], password: [redacted]"


@pytest.mark.parametrize("secret", PLANTED)
def test_error_texts_hold_no_secret(secret: str) -> None:
    error = DataError("bad cell", file="a.csv", line=3, found=secret)
    shown = "".join(traceback.format_exception_only(error))
    assert secret not in shown and "a.csv:3: bad cell" in shown


def test_a_recipe_with_a_secret_is_refused_with_its_line(tmp_path: Path) -> None:
    secret = "hf_" + BODY
    path = tmp_path / "r.yaml"
    path.write_text(f"name: x\ndataset: {{source: synthetic}}\nreport:\n  title: mine {secret}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.yaml:4: report\.title holds a secret \(Hugging Face token\)") as error:
        load_recipe(path)
    assert secret not in str(error.value)
    path.write_text("name: x\ndataset: {source: synthetic}\n", encoding="utf-8")
    for override in (f"report.title={secret}", "stages=[{train: encoder, hub_token: q7w8e9r0t1}]", f"{secret}=1"):
        with pytest.raises(RecipeError, match="holds a secret") as error:
            load_recipe(path, [override])
        assert secret not in str(error.value) and "q7w8e9r0t1" not in str(error.value)


def test_a_recipe_made_in_python_is_not_written_with_a_secret() -> None:
    recipe = parse_recipe({"name": "x", "dataset": {"source": "synthetic"}})
    recipe.report.title = "hf_" + BODY
    with pytest.raises(RecipeError, match=r"report\.title holds a secret"):
        recipe.dump()


def test_the_record_of_the_environment_holds_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llmrec", "hf_" + BODY])
    RunDir(tmp_path).write_environment({"note": HOMES[0], "hub_token": "q7w8e9r0t1"})
    text = (tmp_path / "environment.json").read_text(encoding="utf-8")
    assert BODY not in text and "anna" not in text and "q7w8e9r0t1" not in text and "numpy" in text


def test_what_is_printed_is_clean_and_streams_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with redacted_output():
        print("out", "hf_" + BODY)
        sys.stderr.writelines(["err ", "ghp_" + BODY, "\n"])
        assert sys.stdout.isatty() == before[0].isatty() and sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
    shown = capsys.readouterr()
    assert shown.out == "out [redacted: Hugging Face token]\n" and shown.err == "err [redacted: GitHub token]\n"


@pytest.mark.parametrize("words", [["train", "--token", "hf_" + BODY], ["hf_" + BODY], ["train", "hf_" + BODY]])
def test_a_token_among_the_arguments_is_not_repeated(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert cli.main(words) == 2
    except SystemExit as end:  # argparse
        assert end.code == 2
    shown = capsys.readouterr()
    assert shown.err and BODY not in shown.out + shown.err


def test_usage_is_reported_to_nobody_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    for chosen, expected in ((None, "1"), ("0", "0")):
        monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
        if chosen is not None:
            monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", chosen)
        cli.main(["nonsense"])
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == expected
