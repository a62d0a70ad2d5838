"""Pulling by name: order of sources, pinned hashes, and a cache that never holds half of something."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llmrec import downloads
from llmrec.downloads import NAMES, Named, Wheel, cache_root, pull
from llmrec.errors import DependencyError, LlmrecError

CONTENT = b"0\t1\t5\t3\n"
SHA = hashlib.sha256(CONTENT).hexdigest()
NOTE = hashlib.sha256(b"note").hexdigest()
WHEEL = Wheel("some-package==1.0", {"pkg/data.txt": ("sub/data.txt", SHA), "pkg/note.txt": ("note.txt", NOTE)})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        NAMES, "thing", Named("a thing", "Apache-2.0", WHEEL, "someone/thing", hub_commit="c" * 40, hub_sha256=SHA)
    )
    monkeypatch.setattr(downloads, "_from_provider", unreachable)
    monkeypatch.setattr(downloads.subprocess, "run", pip(CONTENT))
    return tmp_path / "cache"


def unreachable(entry: Named, work: Path) -> str:
    (work / "half.bin").write_bytes(b"half")
    raise ConnectionError("no route\nsecond line")


def pip(content: bytes | None, calls: list[list[str]] | None = None) -> Any:
    """A stand-in for `pip download` that writes a wheel, or fails where `content` is None."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if calls is not None:
            calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "looking\nERROR: No matching distribution")
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "some_package-1.0-py3-none-any.whl", "w") as file:
            file.writestr("pkg/data.txt", content)
            file.writestr("pkg/note.txt", "note")
            file.writestr("pkg/setup.py", "raise SystemExit('never run')")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_the_provider_comes_first(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def provider(entry: Named, work: Path) -> str:
        (work / "model.bin").write_bytes(b"x")
        return "hub:someone/thing"

    calls: list[list[str]] = []
    monkeypatch.setattr(downloads, "_from_provider", provider)
    monkeypatch.setattr(downloads.subprocess, "run", pip(CONTENT, calls))
    lines: list[str] = []
    folder = pull("thing", report=lines.append)
    assert folder == cache / "thing" and not calls
    assert json.loads((folder / "source.json").read_text())["source"] == "hub:someone/thing"
    assert lines == ["thing: asking the provider", "thing: ready (Apache-2.0)"]


def test_the_wheel_is_second_and_only_its_named_members_are_kept(cache: Path) -> None:
    lines: list[str] = []
    folder = pull("thing", report=lines.append)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["note.txt", "source.json", "sub/data.txt"]  # nothing of the failed provider either
    assert (folder / "sub/data.txt").read_bytes() == CONTENT
    assert json.loads((folder / "source.json").read_text()) == {
        "name": "thing", "licence": "Apache-2.0", "source": "wheel:some-package==1.0",
    }  # fmt: skip
    assert lines[1] == "thing: provider: ConnectionError: no route"
    assert [path.name for path in cache.iterdir()] == ["thing"]


def test_pip_may_not_build_or_follow_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(downloads.subprocess, "run", pip(CONTENT, calls))
    pull("thing", report=lambda _: None)
    assert {"--no-deps", "--only-binary=:all:"} <= set(calls[0]) and calls[0][-1] == "some-package==1.0"


def test_a_second_pull_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pull("thing", report=lambda _: None)
    calls: list[list[str]] = []
    monkeypatch.setattr(downloads.subprocess, "run", pip(CONTENT, calls))
    lines: list[str] = []
    assert pull("thing", report=lines.append) == first and not calls and not lines


def test_other_bytes_are_refused_and_nothing_stays(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(downloads.subprocess, "run", pip(b"tampered"))
    with pytest.raises(LlmrecError) as caught:
        pull("thing", report=lambda _: None)
    message = str(caught.value)
    assert "provider: ConnectionError: no route" in message and f"expected {SHA}" in message
    assert hashlib.sha256(b"tampered").hexdigest() in message
    assert list(cache.iterdir()) == []


def test_both_sources_fail(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(downloads.subprocess, "run", pip(None))
    with pytest.raises(LlmrecError, match="No matching distribution") as caught:
        pull("thing", report=lambda _: None)
    assert "local folder" in str(caught.value) and list(cache.iterdir()) == []


def test_a_wheel_without_the_member(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    wheel = Wheel("some-package==1.0", {"pkg/gone.txt": ("gone.txt", None)})
    monkeypatch.setitem(NAMES, "thing", Named("a thing", "Apache-2.0", wheel, hub_id="someone/thing"))
    with pytest.raises(LlmrecError, match="gone.txt"):
        pull("thing", report=lambda _: None)
    assert list(cache.iterdir()) == []


def test_an_interruption_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def interrupted(entry: Named, work: Path) -> str:
        (work / "half.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "_from_provider", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull("thing", report=lambda _: None)
    assert list(cache.iterdir()) == []


def test_a_missing_library_is_told_and_not_searched_elsewhere(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def finish(folder: Path) -> None:
        raise DependencyError("gguf", extra="gguf", purpose="reading weights")

    monkeypatch.setitem(NAMES, "thing", Named("a thing", "MIT", WHEEL, hub_id="someone/thing", finish=finish))
    with pytest.raises(DependencyError, match=r"llmrec\[gguf\]"):
        pull("thing", report=lambda _: None)
    assert list(cache.iterdir()) == []


def test_an_older_folder_without_source_is_replaced(cache: Path) -> None:
    (cache / "thing").mkdir(parents=True)
    (cache / "thing" / "stale.txt").write_text("stale")
    folder = pull("thing", report=lambda _: None)
    assert not (folder / "stale.txt").exists() and (folder / "sub/data.txt").is_file()


def test_another_process_may_be_faster(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def provider(entry: Named, work: Path) -> str:
        (cache / "thing").mkdir()
        (cache / "thing" / "source.json").write_text("{}")
        raise OSError("the folder is not empty")

    monkeypatch.setattr(downloads, "_from_provider", provider)
    assert pull("thing", report=lambda _: None) == cache / "thing"
    assert (cache / "thing" / "source.json").read_text() == "{}"


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(LlmrecError, match="did you mean 'movielens-100k'"):
        pull("movielens-100")
    with pytest.raises(LlmrecError, match="smollm2-135m"):
        pull("zzz")


def test_the_archive_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for member in ("u.data", "u.item", "u.user"):
            archive.writestr(f"ml-100k/{member}", b"other ratings")
    packed.seek(0)
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *_, **__: packed)
    with pytest.raises(LlmrecError, match="archive.zip has sha256"):
        downloads._from_provider(NAMES["movielens-100k"], tmp_path)


def test_the_hub_is_asked_for_one_commit_and_its_weights_are_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    asked: list[tuple[str, str]] = []

    def snapshot(repo: str, *, revision: str, local_dir: Path, **_: Any) -> None:
        asked.append((repo, revision))
        (local_dir / "model.safetensors").write_bytes(CONTENT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    entry = Named("a thing", "MIT", WHEEL, hub_id="someone/thing", hub_commit="c" * 40, hub_sha256=SHA)
    assert downloads._from_provider(entry, tmp_path) == f"hub:someone/thing@{'c' * 40}"
    assert asked == [("someone/thing", "c" * 40)]
    with pytest.raises(LlmrecError, match="model.safetensors has sha256"):
        downloads._from_provider(NAMES["smollm2-135m"], tmp_path)


def test_every_name_has_a_licence_and_pinned_bytes() -> None:
    for name, entry in NAMES.items():
        assert entry.licence and entry.summary, name
        if entry.wheel is None:
            assert entry.finish is not None and not (entry.hub_id or entry.archive), name
            continue
        assert entry.hub_id or entry.archive, name
        assert "==" in entry.wheel.requirement
        assert all(len(sha) == 64 for _, sha in entry.wheel.members.values()), name
        if entry.hub_id is not None:
            assert len(entry.hub_commit or "") == 40 and len(entry.hub_sha256 or "") == 64, name


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("LLMREC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "llmrec"
