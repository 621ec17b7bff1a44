"""Hostile names: of adapters, of Hub repositories, of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_tools import checked, files_of, refused
from registry_tools import Draft, Tiny, tree

from adapterbay.registry import Registry, admit, locate, parse_reference
from adapterbay.registry.admission.folder import from_files, read_folder
from adapterbay.registry.errors import InvalidReference, Rejected
from adapterbay.registry.manifest import inside_path

DraftOf = Callable[[Tiny], Draft]

NAMES = {
    "parent": "../x",
    "parent inside": "team/../../x",
    "two dots": "a..b",
    "absolute": "/etc/passwd",
    "backslash": "team\\x",
    "NUL": "team/x\0.json",
    "percent-encoded": "team/%2e%2e/x",
    "percent-encoded slash": "team%2fx",
    "a drive": "c:/x",
    "a stream of NTFS": "x::$data",
    "device of Windows": "team/con",
    "device with an ending": "team/aux.v1",
    "device with a number": "lpt1",
    "trailing dot": "team./x",
    "trailing space": "team/x ",
    "newline": "team/x\n",
    "tab": "te\tam",
    "escape": "x\x1b[31m",
    "Cyrillic а": "teаm/x",
    "Greek ο": "senοr",
    "fullwidth": "ｔeam/x",
    "combining": "e\u0301quipe",
    "composed": "équipe",
    "ligature": "\ufb01ne",
    "dotless ı": "sentıment",
    "Kelvin sign": "\u212a",
    "right to left": "x\u202etxt.exe",
    "zero width": "te\u200bam",
    "soft hyphen": "te\u00adam",
    "fullwidth slash": "a\uff0f..\uff0fb",
    "division slash": "a\u2215b",
    "fullwidth dots": "\uff0e\uff0e",
    "upper case": "Team/x",
    "hidden": ".git",
    "an at sign": "a@1@2",
    "tilde": "~root",
    "a variable": "$HOME",
    "a megabyte": "a" * 2**20,
    "a thousand parts": "/".join("a" * 1000),
    "surrogate": "a\ud800",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names(registry: Registry, llama: Tiny, tmp_path: Path, name: str) -> None:
    before = tree(registry.root)
    calls: list[Callable[[], Any]] = [
        lambda: registry.push(llama.adapter, name),
        lambda: registry.pull(name, tmp_path / "out"),
        lambda: registry.resolve(name),
        lambda: registry.set_alias(name, "champion", 1),
    ]
    if name != "lpt1":  # no file is named after an alias
        calls += [
            lambda: registry.push(llama.adapter, "fine", aliases=[name]),
            lambda: parse_reference(f"fine@{name}"),
        ]
    for call in calls:
        with pytest.raises(InvalidReference) as caught:
            call()
        checked(caught.value)
    assert tree(registry.root) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(NAMES.values(), key=len), ids=ascii)
def test_names_of_hub_repositories(name: str) -> None:
    for text in (f"hub:{name}/x", f"hub:org/{name}", f"hub:org/x@{name}"):
        try:
            parsed = parse_reference(text)
        except InvalidReference as error:
            checked(error)
            continue
        assert str(parsed) == text
        assert text.isascii()
        assert ".." not in text


PATHS = [
    *NAMES.values(),
    "",
    ".",
    "..",
    "./x",
    "x/",
    "x//y",
    "x/./y",
    "x/../y",
    "con",
    "x/NUL.txt",
    "COM1",
    "x.",
    "x /y",
]
PATHS.remove("a@1@2")


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("Team/x", "/".join("a" * 1000))], ids=ascii)
def test_paths_of_files(llama: Tiny, path: str) -> None:
    with pytest.raises(ValueError, match=r"path|Windows"):
        inside_path(path)
    base = locate(str(llama.base))
    error = refused(
        "PATH_OUTSIDE",
        lambda: admit(files_of(llama.adapter) | {path: b"{}"}, base.tensor_shapes(), base_config=base.config),
    )
    assert len(error.message) < 1000


@pytest.mark.parametrize("path", ["../x", "/x", "a/../b", "a//b", "a\\b", "a\0b", "", "./a", "a/", "adapterbay/../x"])
def test_paths_of_files_of_a_repository(llama: Tiny, path: str) -> None:
    files = {path.name: path for path in llama.adapter.iterdir()}
    refused("PATH_OUTSIDE", lambda: from_files(files | {path: llama.adapter / "README.md"}))


def test_files_of_a_repository_are_the_same_as_of_a_folder(llama: Tiny, draft: DraftOf) -> None:
    full = draft(llama).path
    (full / "config.json").write_text("{}")
    (full / ".gitattributes").write_text("")
    (full / "notes 语.txt").write_text("")
    (full / "optimizer.pt").write_bytes(b"\x80\x04")
    (full / "checkpoint-5").mkdir()
    (full / "checkpoint-5" / "optimizer.pt").write_bytes(b"")
    (full / "adapterbay").mkdir()
    (full / "adapterbay" / "manifest.json").write_text("{}")
    (full / "adapterbay" / "other.txt").write_text("")
    there = {path.relative_to(full).as_posix(): path for path in full.rglob("*") if path.is_file()}
    ours, theirs = read_folder(full), from_files(there)
    assert (theirs.files, theirs.beside, theirs.left_out) == (ours.files, ours.beside, ours.left_out)
    assert theirs.left_out == (
        ".gitattributes",
        "adapterbay/",
        "checkpoint-5/",
        "config.json",
        "notes 语.txt",
        "optimizer.pt",
    )
    assert set(theirs.beside) == {"config.json", "adapterbay/manifest.json"}
    (full / "logs.gz").write_bytes(b"\x1f\x8b\x08x")
    assert "logs.gz" in read_folder(full).left_out
    for extra in ({"evil.py": b"x"}, {"x.pkl": b"x"}, {"notes": b"\x80\x04x"}, {"README.md": b"\x1f\x8b\x08x"}):
        ((name, data),) = extra.items()
        (full.parent / name).write_bytes(data)
        with pytest.raises(Rejected):
            from_files(there | {name: full.parent / name})
