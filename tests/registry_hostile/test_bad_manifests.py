"""Manifests that lie: about digests, about files, about themselves; and blobs that were swapped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_tools import checked, look, refused
from registry_tools import Draft, Tiny, tree

from adapterbay.registry import Registry
from adapterbay.registry.digest import canonical_json, digest_bytes, digest_file
from adapterbay.registry.errors import AdapterbayError, Corrupted, NotFound, Rejected
from adapterbay.registry.manifest import MAX_BYTES, Manifest

DraftOf = Callable[[Tiny], Draft]
ZERO = "sha256:" + "0" * 64
FILE = {"path": "adapter_config.json", "digest": ZERO, "size": 1}
PLAIN: dict[str, Any] = {
    "base_fingerprint": ZERO,
    "base_reference": "hub:org/base",
    "chat_template_digest": None,
    "files": [FILE, {"path": "adapter_model.safetensors", "digest": ZERO, "size": 2}],
    "labels": [],
    "library_versions": {"peft": "0.21.2"},
    "parents": [],
    "peft_config": {"r": 4},
    "peft_type": "LORA",
    "rank": 4,
    "schema_version": 1,
    "signature": None,
    "task": "causal-lm",
    "tokenizer_digest": ZERO,
    "training": {"metrics": {"loss": 1.5}},
}


def files(*paths: str) -> dict[str, Any]:
    return {"files": [FILE | {"path": path} for path in paths]}


BAD: dict[str, dict[str, Any]] = {
    "a file with an absolute path": files("/etc/passwd"),
    "a file above": files("../x"),
    "a file above, later": files("x/../../y"),
    "a file with a backslash": files("..\\x"),
    "a file with NUL": files("x\0"),
    "a file on a drive": files("c:x"),
    "a hidden file": files(".bashrc"),
    "a device of Windows": files("nul.json"),
    "a device of Windows, below": files("x/COM1.txt"),
    "a name that ends in a dot": files("x./y"),
    "a name of look-alikes": files("аdapter_config.json"),
    "a file twice": files("x", "x"),
    "two files that are one on a Mac": files("README.md", "readme.MD"),
    "a file that is a folder": files("x", "x/y"),
    "a file that is a folder on a Mac": files("X/y/z", "x/Y"),
    "ten thousand files and one": files(*(f"f{number}" for number in range(10_001))),
    "a path of 256 characters": files("x" * 256),
    "an empty path": files(""),
    "a digest that is short": {"files": [FILE | {"digest": "sha256:00"}]},
    "a digest in capitals": {"files": [FILE | {"digest": "sha256:" + "A" * 64}]},
    "another digest": {"files": [FILE | {"digest": "md5:" + "0" * 32}]},
    "a digest with a newline": {"files": [FILE | {"digest": ZERO + "\n"}]},
    "a digest that is a path": {"base_fingerprint": "sha256:../" + "0" * 61},
    "a negative size": {"files": [FILE | {"size": -1}]},
    "a size that no disk has": {"files": [FILE | {"size": 2**63}]},
    "a size that is text": {"files": [FILE | {"size": "1"}]},
    "a size that is 1.0": {"files": [FILE | {"size": 1.0}]},
    "a size that is true": {"files": [FILE | {"size": True}]},
    "a file with more keys": {"files": [FILE | {"mode": "0777"}]},
    "files that are an object": {"files": {"path": "x"}},
    "files that are text": {"files": "abc"},
    "a rank that is text": {"rank": "4"},
    "a rank that is 4.0": {"rank": 4.0},
    "a rank that is true": {"rank": True},
    "a rank below 0": {"rank": -1},
    "a rank beyond all": {"rank": 10**30},
    "an unknown task": {"task": "chat"},
    "an unknown key": {"name": "team/x"},
    "the next schema": {"schema_version": 2},
    "a schema that is true": {"schema_version": True},
    "a schema that is text": {"schema_version": "1"},
    "a signature": {"signature": "trust me"},
    "no base": {"base_reference": ""},
    "a base of a megabyte": {"base_reference": "x" * 2**20},
    "a base that writes to terminals": {"base_reference": "hub:a/b\x1b[2J"},
    "a method that writes to terminals": {"peft_type": "LORA\r"},
    "a library that writes to terminals": {"library_versions": {"peft": "\x9b2J"}},
    "a library's name that does": {"library_versions": {"\u202epeft": "1"}},
    "a version that is a number": {"library_versions": {"peft": 1}},
    "an empty label": {"labels": ["a", ""]},
    "a label of two lines": {"labels": ["a\nb"]},
    "a label that is a number": {"labels": [1]},
    "labels that are text": {"labels": "ab"},
    "a label of a megabyte": {"labels": ["a" * 2**20]},
    "a hundred thousand labels and one": {"labels": [str(number) for number in range(100_001)]},
    "a parent that is no digest": {"parents": ["team/x@1"]},
    "a config that is a list": {"peft_config": []},
    "a record that is a list": {"training": [1]},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_what_a_manifest_may_not_say(change: dict[str, Any]) -> None:
    assert Manifest.from_bytes(canonical_json(PLAIN)).rank == 4
    refused("BAD_MANIFEST", lambda: Manifest.from_bytes(canonical_json(PLAIN | change)))


@pytest.mark.parametrize("key", sorted(PLAIN))
def test_a_manifest_says_everything(key: str) -> None:
    """Also what is at its default: or two different bytes would mean the same."""
    less = {other: value for other, value in PLAIN.items() if other != key}
    refused("BAD_MANIFEST", lambda: Manifest.from_bytes(canonical_json(less)))


@pytest.mark.parametrize(
    "write",
    [
        lambda document: json.dumps(document).encode(),
        lambda document: json.dumps(document, indent=2, sort_keys=True).encode(),
        lambda document: canonical_json(document) + b"\n",
        lambda document: b" " + canonical_json(document),
        lambda document: canonical_json(dict(reversed(document.items()))).replace(b'"rank":4,', b'"rank":4 ,'),
        lambda document: canonical_json(document).replace(b"1.5", b"1.50"),
        lambda document: canonical_json(document).replace(b"1.5", b"15e-1"),
        lambda document: canonical_json(document).replace(b"LORA", b"\\u004cORA"),
    ],
)
def test_only_the_canonical_form_is_a_manifest(write: Callable[[dict[str, Any]], bytes]) -> None:
    """So that the digest of the bytes is the digest of the manifest."""
    assert json.loads(write(PLAIN)) == PLAIN
    refused("BAD_MANIFEST", lambda: Manifest.from_bytes(write(PLAIN)))


def test_a_large_manifest() -> None:
    refused("TOO_LARGE", lambda: Manifest.from_bytes(b" " * (MAX_BYTES + 1)))
    refused("TOO_LARGE", lambda: Manifest.from_bytes(canonical_json(PLAIN | {"training": {"x": [1] * 1_000_001}})))


# In a store


def blob(registry: Registry, digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return registry.root / "blobs" / "sha256" / name[:2] / name


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_manifest_that_was_swapped(registry: Registry, llama: Tiny, bert: Tiny, tmp_path: Path) -> None:
    """A valid manifest under another digest: nothing of it is served."""
    digest = registry.push(llama.adapter, "x").digest
    other = registry.push(bert.adapter, "y").manifest
    overwrite(blob(registry, digest), other.to_bytes())
    for read in (
        lambda: registry.manifest(digest),
        lambda: registry.open_snapshot(digest),
        lambda: registry.pull("x", tmp_path / "out"),
    ):
        with pytest.raises(Corrupted, match=digest):
            read()
    assert not (tmp_path / "out").exists()
    assert not registry.verify().ok
    assert registry.push(llama.adapter, "x").digest == digest  # a push repairs it
    assert registry.verify().ok


def test_a_blob_that_was_swapped_for_another_valid_one(registry: Registry, llama: Tiny, tmp_path: Path) -> None:
    receipt = registry.push(llama.adapter, "x")
    weights = next(entry for entry in receipt.manifest.files if entry.path == "adapter_model.safetensors")
    data = bytearray(blob(registry, weights.digest).read_bytes())
    data[-1] ^= 1
    overwrite(blob(registry, weights.digest), bytes(data))
    for read in (lambda: registry.open_snapshot(receipt.digest), lambda: registry.pull("x", tmp_path / "out")):
        with pytest.raises(Corrupted, match=weights.digest):
            read()
    assert not (tmp_path / "out").exists()


def test_a_blob_that_was_swapped_for_a_link(registry: Registry, llama: Tiny, tmp_path: Path) -> None:
    receipt = registry.push(llama.adapter, "x")
    readme = next(entry for entry in receipt.manifest.files if entry.path == "README.md")
    secret = tmp_path / "secret"
    secret.write_text("my key")
    blob(registry, readme.digest).unlink()
    blob(registry, readme.digest).symlink_to(secret)
    with pytest.raises(Corrupted):
        registry.open_snapshot(receipt.digest)


def test_a_blob_that_is_gone(registry: Registry, llama: Tiny) -> None:
    receipt = registry.push(llama.adapter, "x")
    blob(registry, receipt.manifest.files[0].digest).unlink()
    with pytest.raises((Corrupted, NotFound)):
        registry.open_snapshot(receipt.digest)


# In a folder that brings its own


def portable(registry: Registry, tiny: Tiny, folder: Path) -> Path:
    registry.push(tiny.adapter, "source")
    return registry.pull("source", folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "adapterbay" / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(canonical_json(document))


def entry(document: dict[str, Any], path: str) -> dict[str, Any]:
    return next(item for item in document["files"] if item["path"] == path)


def swap_digests(document: dict[str, Any]) -> None:
    first, second = document["files"][:2]
    first["digest"], second["digest"] = second["digest"], first["digest"]


MISMATCHES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a digest that lies": lambda d: entry(d, "README.md").update(digest=ZERO),
    "a digest of the weights that lies": lambda d: entry(d, "adapter_model.safetensors").update(digest=ZERO),
    "digests of one another": swap_digests,
    "a size that lies": lambda d: entry(d, "README.md").update(size=1),
    "a file that is not there": lambda d: d["files"].append({"path": "training.json", "digest": ZERO, "size": 5}),
    "a file that is no file of a version": lambda d: entry(d, "README.md").update(path="adapterbay/manifest.json"),
    "another method": lambda d: d.update(peft_type="IA3"),
    "another config": lambda d: d["peft_config"].update(r=8),
    "another rank": lambda d: d.update(rank=3),
    "another task": lambda d: d.update(task="sequence-classification"),
}


@pytest.mark.parametrize("change", MISMATCHES.values(), ids=MISMATCHES.keys())
def test_a_folder_whose_manifest_lies(
    registry: Registry, llama: Tiny, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    folder = portable(registry, llama, tmp_path / "folder")
    rewrite(folder, change)
    before = tree(registry.root)
    error = refused("MANIFEST_MISMATCH", lambda: registry.push(folder, "copy"))
    assert "adapterbay" in error.message
    assert tree(registry.root) == before
    shutil.rmtree(folder / "adapterbay")
    assert registry.push(folder, "copy").digest == registry.resolve("source").digest


@pytest.mark.parametrize(
    "change",
    [
        files("../../etc/passwd"),
        files("adapter_config.json", "Adapter_config.json"),
        files("x.py"),
        files(),
        {"rank": "2"},
        {"base_fingerprint": ZERO},
        {"base_reference": "folder:/nowhere"},
        {"base_reference": "what is this?"},
        {"labels": ["a", "b"]},
    ],
    ids=str,
)
def test_other_lies_of_a_folder(
    registry: Registry, llama: Tiny, bert: Tiny, tmp_path: Path, change: dict[str, Any]
) -> None:
    tiny = bert if "labels" in change else llama
    folder = portable(registry, tiny, tmp_path / "folder")
    rewrite(folder, lambda document: document.update(change))
    with pytest.raises(AdapterbayError) as caught:
        registry.push(folder, "copy")
    checked(caught.value)
    assert [adapter.name for adapter in registry.adapters()] == ["source"]


def test_a_manifest_with_files_that_are_no_files_of_a_version(registry: Registry, llama: Tiny, tmp_path: Path) -> None:
    """Also where they are there, and their digests are right, as in a repository that somebody else filled."""
    folder = portable(registry, llama, tmp_path / "folder")
    extra = folder / "notes.txt"
    extra.write_text("hello")
    rewrite(
        folder,
        lambda document: document["files"].append({"path": "notes.txt", "digest": digest_file(extra), "size": 5}),
    )
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    refused("MANIFEST_MISMATCH", lambda: registry.push_files(there, "copy"))


def test_the_manifest_of_a_folder_is_no_link(registry: Registry, llama: Tiny, tmp_path: Path) -> None:
    folder = portable(registry, llama, tmp_path / "folder")
    manifest = folder / "adapterbay" / "manifest.json"
    shutil.move(manifest, tmp_path / "elsewhere.json")
    manifest.symlink_to(tmp_path / "elsewhere.json")
    refused("PATH_OUTSIDE", lambda: registry.push(folder, "copy"))
    shutil.rmtree(folder / "adapterbay")
    (tmp_path / "ours").mkdir()
    shutil.move(tmp_path / "elsewhere.json", tmp_path / "ours" / "manifest.json")
    (folder / "adapterbay").symlink_to(tmp_path / "ours")
    with pytest.raises(Rejected):
        registry.push(folder, "copy")


def test_a_folder_that_was_pulled_is_the_same_version(registry: Registry, bert: Tiny, tmp_path: Path) -> None:
    folder = portable(registry, bert, tmp_path / "folder")
    receipt = registry.push(folder, "copy")
    assert receipt.digest == registry.resolve("source").digest
    assert digest_bytes((folder / "adapterbay" / "manifest.json").read_bytes()) == receipt.digest
    assert look(folder).manifest == receipt.manifest
