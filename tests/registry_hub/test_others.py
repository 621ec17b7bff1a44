"""Adapters that others pushed with plain PEFT and plain huggingface_hub, and what they pull of ours with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hub_tools import ServerProcess
from huggingface_hub import HfApi
from plain_hub import PlainHub

from adapterbay.registry import Registry
from adapterbay.registry.errors import BaseNotFound, NotFound, Rejected
from adapterbay.registry.hub.backend import HubRegistry
from adapterbay.registry.portable import MANIFEST_PATH

Content = Callable[[int], Path]
NAME = "team/theirs"


@pytest.fixture(params=["plain", "own"])
def endpoint(request: pytest.FixtureRequest) -> str:
    """Our own server, and a Hub that knows nothing of versions."""
    where: PlainHub | ServerProcess = request.getfixturevalue("plain" if request.param == "plain" else "server")
    return where.endpoint


@pytest.fixture
def theirs(endpoint: str) -> HfApi:
    return HfApi(endpoint=endpoint, token=False)


@pytest.fixture
def registry(endpoint: str, tmp_path: Path) -> HubRegistry:
    return HubRegistry("hub:team", endpoint=endpoint, cache=tmp_path / "hub-cache")


def logits(base: Path, adapter: Path) -> np.ndarray:
    import torch
    from tiny import peft_model

    with torch.no_grad():
        found: np.ndarray = peft_model(base, adapter)(torch.tensor([[3, 1, 4, 1, 5, 9]])).logits.numpy()
    return found


def test_uploaded_by_others_pulled_by_us(
    theirs: HfApi, registry: HubRegistry, content: Content, base_folder: Path, tmp_path: Path
) -> None:
    theirs.create_repo(NAME)
    theirs.upload_folder(repo_id=NAME, folder_path=content(1))
    first = registry.resolve(NAME)
    snapshot = registry.snapshot(NAME)
    assert snapshot.manifest.digest == first.digest
    local = Registry.open(tmp_path / "local")
    assert local.push(content(1), "theirs").digest == first.digest, "the same admission, the same digest"
    local.close()

    folder = registry.pull(NAME, tmp_path / "pulled")
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        content(1) / "adapter_model.safetensors"
    ).read_bytes()
    assert np.array_equal(logits(base_folder, folder), logits(base_folder, content(1)))
    assert not np.array_equal(logits(base_folder, folder), logits(base_folder, content(2)))

    theirs.upload_folder(repo_id=NAME, folder_path=content(2))
    second = registry.resolve(NAME)
    assert second.version == first.version + 1
    assert second.digest != first.digest
    for resolved in (first, second):
        again = registry.resolve(f"{NAME}@{resolved.version}")
        assert (again.version, again.digest) == (resolved.version, resolved.digest)
        by_commit = registry.find(f"{NAME}@{registry.find(f'{NAME}@{resolved.version}').commit}")
        assert (by_commit.version, by_commit.digest) == (resolved.version, resolved.digest)
    assert registry.version(NAME, second.version).digest == second.digest
    assert registry.versions(NAME)[-1].digest == second.digest
    assert [summary.name for summary in registry.adapters()] == [NAME]
    assert registry.verify(NAME).ok


def test_pushed_by_us_on_top_of_others(theirs: HfApi, registry: HubRegistry, content: Content) -> None:
    theirs.create_repo(NAME)
    theirs.upload_folder(repo_id=NAME, folder_path=content(1))
    before = registry.resolve(NAME)
    receipt = registry.push(content(2), NAME)
    assert receipt.version == before.version + 1, "no number means two things"
    assert registry.resolve(NAME).version == receipt.version
    assert registry.push(content(3), NAME).version == receipt.version + 1
    assert registry.verify().ok


def test_pushed_by_us_loaded_by_plain_peft(
    theirs: HfApi, registry: HubRegistry, content: Content, base_folder: Path, tmp_path: Path
) -> None:
    registry.push(content(1), NAME)
    registry.push(content(2), NAME, aliases=["champion"])
    registry.push(content(3), NAME)
    for revision, number in (("v1", 1), ("v2", 2), ("champion", 2), ("main", 3)):
        folder = Path(theirs.snapshot_download(NAME, revision=revision, cache_dir=tmp_path / "their-cache"))
        assert np.array_equal(logits(base_folder, folder), logits(base_folder, content(number))), revision


def test_pulled_with_the_plain_client_it_is_the_same_version(
    theirs: HfApi, registry: HubRegistry, content: Content, tmp_path: Path
) -> None:
    folder = content(1)
    (folder / "README.md").write_text("# By hand\n")
    receipt = registry.push(folder, NAME)
    downloaded = theirs.snapshot_download(NAME, local_dir=tmp_path / "downloaded")
    local = Registry.open(tmp_path / "local")
    pushed = local.push(downloaded, "copy")
    assert (pushed.digest, pushed.manifest) == (receipt.digest, receipt.manifest)
    assert local.snapshot("copy").read("README.md") == b"# By hand\n"
    local.close()


def test_uploaded_by_others_over_ours_on_our_server(
    hub: Callable[[], HubRegistry], api: HfApi, content: Content
) -> None:
    registry = hub()
    first = registry.push(content(1), NAME)
    api.upload_folder(repo_id=NAME, folder_path=content(2))
    assert registry.resolve(f"{NAME}@1").digest == first.digest
    assert registry.resolve(NAME).version == 2, "it was admitted there, as any push"
    assert (
        registry.snapshot(NAME).read("adapter_model.safetensors")
        == (content(2) / "adapter_model.safetensors").read_bytes()
    )
    assert registry.verify().ok


# On a Hub that takes anything


@pytest.fixture
def foreign(plain: PlainHub, content: Content, tmp_path: Path) -> tuple[HubRegistry, Callable[[dict[str, bytes]], str]]:
    """A registry on it, and a way to commit files there by hand."""
    plain.repos.clear()
    api = HfApi(endpoint=plain.endpoint, token=False)
    api.create_repo(NAME)
    repo = plain.repos[NAME]
    registry = HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "hub-cache")
    return registry, lambda files: repo.add({**repo.head.tree, **files}, "by hand")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pickles_and_code_are_never_fetched(
    foreign: tuple[HubRegistry, Callable[[dict[str, bytes]], str]], plain: PlainHub, content: Content, tmp_path: Path
) -> None:
    registry, commit = foreign
    commit({**files_of(content(1)), "adapter_model.bin": b"\x80\x04x", "modeling.py": b"boom()", "x/y.pkl": b"\x80"})
    folder = registry.pull(NAME, tmp_path / "pulled")
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    for bad in ("adapter_model.bin", "modeling.py", "y.pkl"):
        assert not any(bad in request for request in plain.requests)
        assert not list((tmp_path / "hub-cache").rglob(bad))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"adapter_model.bin": b"\x80\x04", "adapter_config.json": b"{}"}, "MISSING_FILE"),
        ({"adapter_model.safetensors": b"\x80\x04.", "adapter_config.json": b"{}"}, "PICKLE"),
        ({"model.safetensors": b"x"}, "MISSING_FILE"),
    ],
)
def test_what_is_no_adapter(
    foreign: tuple[HubRegistry, Callable[[dict[str, bytes]], str]], files: dict[str, bytes], reason: str
) -> None:
    registry, commit = foreign
    sha = commit(files)
    with pytest.raises(Rejected) as caught:
        registry.snapshot(f"{NAME}@{sha}")
    assert caught.value.reason == reason


def test_admission_is_that_of_a_push(
    foreign: tuple[HubRegistry, Callable[[dict[str, bytes]], str]], content: Content
) -> None:
    registry, commit = foreign
    files = files_of(content(1))
    config = json.loads(files["adapter_config.json"])
    commit({**files, "adapter_config.json": json.dumps({**config, "surprise": 1}).encode()})
    with pytest.raises(Rejected) as caught:
        registry.resolve(NAME)
    assert caught.value.reason == "UNKNOWN_CONFIG_KEY"
    commit({**files, "adapter_config.json": json.dumps({**config, "base_model_name_or_path": "/nowhere/x"}).encode()})
    with pytest.raises(BaseNotFound) as missing:
        registry.resolve(NAME)
    assert "hf download" in missing.value.message


def test_a_manifest_that_lies(
    foreign: tuple[HubRegistry, Callable[[dict[str, bytes]], str]], content: Content, tmp_path: Path
) -> None:
    registry, commit = foreign
    local = Registry.open(tmp_path / "local")
    manifest = local.push(content(1), "x").manifest
    local.close()
    commit({**files_of(content(2)), MANIFEST_PATH: manifest.to_bytes()})
    with pytest.raises(Exception, match="not what the manifest there says"):
        registry.snapshot(NAME)
    commit({MANIFEST_PATH: json.dumps(manifest.model_dump(mode="json"), indent=1).encode()})
    with pytest.raises(Rejected) as caught:
        registry.snapshot(NAME)
    assert caught.value.reason == "BAD_MANIFEST"


def test_tags_of_others_are_versions_and_aliases(
    foreign: tuple[HubRegistry, Callable[[dict[str, bytes]], str]], plain: PlainHub, content: Content
) -> None:
    registry, commit = foreign
    shas = [commit(files_of(content(number))) for number in (1, 2, 3)]
    numbers = [registry.find(f"{NAME}@{sha}").version for sha in shas]
    assert numbers == [2, 3, 4], "positions on main, after the initial commit"
    assert [record.version for record in registry.versions(NAME)] == [4]
    plain.repos[NAME].tags.update({"v1": shas[1], "stable": shas[0]})
    assert registry.find(f"{NAME}@1").commit == shas[1]
    assert registry.find(f"{NAME}@stable").commit == shas[0]
    found = {registry.find(f"{NAME}@{sha}").version: sha for sha in shas}
    assert len(found) == 3
    for version, sha in found.items():
        assert registry.find(f"{NAME}@{version}").commit == sha
    assert registry.aliases(NAME) == {"stable": next(version for version, sha in found.items() if sha == shas[0])}
    with pytest.raises(NotFound):
        registry.resolve(f"{NAME}@refs/pr/1")


def test_repositories_without_an_adapter_are_not_listed(
    foreign: tuple[HubRegistry, Callable[[dict[str, bytes]], str]], plain: PlainHub, content: Content
) -> None:
    registry, commit = foreign
    HfApi(endpoint=plain.endpoint, token=False).create_repo("team/model")
    plain.repos["team/model"].add({"model.safetensors": b"x", "config.json": b"{}"}, "a model")
    assert registry.adapters() == []
    commit(files_of(content(1)))
    (found,) = registry.adapters()
    assert (found.name, found.task, found.peft_type, found.rank) == (NAME, "causal-lm", "LORA", 4)
    assert found.digest == "", "not known before its weights were read"
    assert registry.adapters("the")[0].name == NAME
    with pytest.raises(NotFound):
        registry.resolve("team/model@7")


def test_the_digest_stays_while_the_cache_does(
    foreign: tuple[HubRegistry, Callable[[dict[str, bytes]], str]],
    content: Content,
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry, commit = foreign
    moved = tmp_path / "moved-base"
    shutil.copytree(base_folder, moved)
    files = files_of(content(1))
    config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": str(moved)}
    commit({**files, "adapter_config.json": json.dumps(config).encode()})
    digest = registry.resolve(NAME).digest
    shutil.rmtree(moved)
    assert registry.resolve(NAME).digest == digest, "remembered, with the base as it was found first"
