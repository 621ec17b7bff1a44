"""Where the base of a folder is found: by name, by a path of a cache, by its card; and who may look for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_tools import checked, look, unstaged
from registry_tools import Draft, Tiny

from adapterbay.registry import BaseReference, locate
from adapterbay.registry.admission.candidate import Wishes, examine
from adapterbay.registry.admission.folder import from_files
from adapterbay.registry.base import BaseFiles
from adapterbay.registry.errors import BaseNotFound, InvalidArgument
from adapterbay.registry.manifest import Manifest

DraftOf = Callable[[Tiny], Draft]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with the base at COMMIT, and no network."""
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(llama.base, repo / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    "path",
    [
        "{cache}/models--org--tiny/snapshots/{commit}",
        "{cache}/models--org--tiny/snapshots/{commit}/",
        "/home/them/.cache/huggingface/hub/models--org--tiny/snapshots/{commit}",
        "models--org--tiny/snapshots/{commit}",
        "C:\\Users\\them\\.cache\\huggingface\\hub\\models--org--tiny\\snapshots\\{commit}",
        "https://huggingface.co/org/tiny",
        "https://huggingface.co/org/tiny/tree/{commit}",
        "https://huggingface.co/org/tiny/tree/main/",
        "org/tiny",
        "hub:org/tiny@{commit}",
    ],
)
def test_a_base_of_the_hub_by_any_of_its_names(llama: Tiny, draft: DraftOf, hub_cache: Path, path: str) -> None:
    one = draft(llama)
    one.edit_config(base_model_name_or_path=path.format(cache=hub_cache, commit=COMMIT))
    found = look(one.path)
    assert found.manifest.base_reference == f"hub:org/tiny@{COMMIT}"
    assert found.manifest.base_fingerprint == locate(str(llama.base)).fingerprint


def test_a_cache_that_is_not_the_own(
    llama: Tiny, draft: DraftOf, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path leads to the files, and tells their name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    one = draft(llama)
    one.edit_config(base_model_name_or_path=f"{hub_cache}/models--org--tiny/snapshots/{COMMIT}")
    found = look(one.path)
    assert found.manifest.base_reference == f"hub:org/tiny@{COMMIT}"
    assert any("from the cache path in adapter_config.json" in finding for finding in found.findings)
    shutil.rmtree(hub_cache)
    with pytest.raises(BaseNotFound, match=f"hub:org/tiny@{COMMIT}.*--base"):
        look(one.path)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/home/them/models/llama", "a path of the machine where it was trained: pass --base with hub:ORG/REPO"),
        ("../models/llama", "a path seen from where it was trained: pass --base"),
        ("./llama", "a path seen from where it was trained: pass --base"),
        ("/mnt/x/model.gguf", "a path of the machine where it was trained: pass --base"),
        ("C:\\models\\llama", "pass --base"),
        ("out/merged", "Pass --base to say where it is, if that was a path"),
        ("package:nothing-of-this-name", "Pass --base"),
    ],
)
def test_a_base_that_is_elsewhere(
    llama: Tiny, draft: DraftOf, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    one = draft(llama)
    one.edit_config(base_model_name_or_path=path)
    (one.path / "README.md").write_text("# Card")
    with pytest.raises(BaseNotFound) as caught:
        look(one.path)
    checked(caught.value)
    assert text in caught.value.message
    assert "README.md" not in caught.value.message
    (one.path / "README.md").write_text("---\nbase_model: org/tiny\n---\n")
    with pytest.raises(BaseNotFound, match=r"README.md names hub:org/tiny\."):
        look(one.path)
    assert look(one.path, base="org/tiny").manifest.base_reference == f"hub:org/tiny@{COMMIT}"


def test_a_base_that_only_the_card_names(llama: Tiny, draft: DraftOf, hub_cache: Path) -> None:
    one = draft(llama)
    one.edit_config(base_model_name_or_path=None)
    (one.path / "README.md").write_text("---\nbase_model: org/tiny\n---\n")
    found = look(one.path)
    assert found.manifest.base_reference == f"hub:org/tiny@{COMMIT}"
    assert any("(from README.md)" in finding for finding in found.findings)
    (one.path / "README.md").write_text("---\nbase_model:\n- org/tiny\n- org/other\n---\n")
    with pytest.raises(InvalidArgument, match="--base"):
        look(one.path)


def test_a_relative_base_from_where_we_are(llama: Tiny, draft: DraftOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.base.parent)
    one = draft(llama)
    one.edit_config(base_model_name_or_path="./base")
    assert look(one.path).manifest.base_reference == f"folder:{llama.base}"


# A server looks at files that have no folder, and at bases that it allows


def test_files_without_a_folder_and_a_finder_of_bases(bert: Tiny, draft: DraftOf) -> None:
    folder = draft(bert).path
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"")
    (folder / "eval_results.json").write_text('{"eval_accuracy": 0.5}')
    found = from_files({path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()})
    assert found.path is None
    asked: list[Any] = []

    def finder(reference: str | BaseReference) -> BaseFiles:
        asked.append(str(reference))
        if str(reference) != "hub:org/allowed":
            raise BaseNotFound(f"The server does not open {reference}.")
        return locate(str(bert.base))

    with pytest.raises(BaseNotFound, match="does not open"):
        examine(found, unstaged(found), Wishes(), find_base=finder)
    assert asked == [f"folder:{bert.base}"]
    by_name = examine(found, unstaged(found), Wishes(base="hub:org/allowed"), find_base=finder)
    assert by_name.manifest == look(folder, base=str(bert.base)).manifest
    assert by_name.manifest.training == {"source": "eval_results.json", "metrics": {"accuracy": 0.5}}
    assert Manifest.from_bytes(by_name.manifest.to_bytes()) == by_name.manifest


def test_a_finder_is_asked_for_the_path_of_a_cache_only_after_its_name(llama: Tiny, draft: DraftOf) -> None:
    """So that one which opens no paths has nothing to open."""
    one = draft(llama)
    path = f"/home/them/hub/models--org--tiny/snapshots/{COMMIT}"
    one.edit_config(base_model_name_or_path=path)
    asked: list[str] = []

    def finder(reference: str | BaseReference) -> BaseFiles:
        asked.append(str(reference))
        raise BaseNotFound("No.")

    found = from_files({file.name: file for file in one.path.iterdir()})
    with pytest.raises(BaseNotFound, match="--base"):
        examine(found, unstaged(found), Wishes(), find_base=finder)
    assert asked == [f"hub:org/tiny@{COMMIT}", f"folder:{path}"]
