"""Bases and adapters from ModelScope, by its real client against a small server that answers as the site does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelscope_hub
import pytest
from modelscope_tools import ModelScope, Repository, files_of
from registry_tools import Tiny

from adapterbay.registry import BaseReference, Registry, locate
from adapterbay.registry.errors import (
    BaseNotFound,
    InvalidReference,
    MissingExtra,
    NotFound,
    Rejected,
    StorageFull,
    Unavailable,
)
from adapterbay.registry.sources import fetch_adapter_folder

REPO = "AI-Org/Tiny_Llama-1.5"
BASE = f"modelscope:{REPO}"


@pytest.fixture(autouse=True)
def _client_of_this_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client's own settings: an empty cache, nobody logged in, no waiting before a retry."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_INTRA_CLOUD_ACCELERATION", "false")
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 0)
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_HASH_RETRY_TIMES", 1)


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScope]:
    with ModelScope() as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def repository(modelscope: ModelScope, llama: Tiny) -> Repository:
    """The tiny base with what else such repositories hold."""
    return modelscope.add(
        REPO,
        files_of(llama.base)
        | {
            "README.md": b"# Tiny",
            "configuration.json": b'{"framework": "pytorch"}',
            "pytorch_model.bin": b"\x80\x04pickle",
            "modeling_tiny.py": b"raise SystemExit",
            "onnx/model.json": b"{}",
            "consolidated/model.safetensors": b"more",
        },
    )


@pytest.fixture
def adapter(modelscope: ModelScope, llama: Tiny) -> Repository:
    files = files_of(llama.adapter) | {"checkpoint-5/adapter_model.safetensors": b"old", "args.json": b"{}"}
    return modelscope.add("swift/tales", files | {"optimizer.pt": b"\x80", "adapter_model.bin": b"\x80"})


def cache(repo: str, *more: str) -> Path:
    return Path(os.environ["MODELSCOPE_CACHE"], "models", repo.replace("/", "--"), *more)


# Bases


def test_a_base_is_fetched_and_pinned_to_its_commit(
    modelscope: ModelScope, repository: Repository, llama: Tiny
) -> None:
    found = locate(BASE)
    commit = repository.branches["master"]
    assert found.reference == BaseReference("modelscope", REPO, commit)
    assert found.folder == cache(REPO, "snapshots", commit)
    assert found.fingerprint == locate(str(llama.base)).fingerprint
    assert files_of(found.folder) == files_of(llama.base) | {"configuration.json": b'{"framework": "pytorch"}'}
    assert {revision for _, revision in modelscope.fetched()} == {commit}
    assert not list(cache(REPO, "partial").iterdir())


def test_no_pickle_and_no_code_is_even_asked_for(modelscope: ModelScope, repository: Repository) -> None:
    locate(BASE)
    asked = {path for path, _ in modelscope.fetched()}
    assert asked
    assert not [path for path in asked if path.endswith((".bin", ".py", ".md")) or "/" in path]


def test_a_pinned_base_that_is_cached_is_not_asked_for(modelscope: ModelScope, repository: Repository) -> None:
    first = locate(BASE)
    modelscope.requests.clear()
    assert locate(first.reference).folder == first.folder
    assert modelscope.requests == []


def test_a_branch_that_moved_is_another_folder(modelscope: ModelScope, repository: Repository) -> None:
    first = locate(BASE)
    config = json.loads((first.folder / "config.json").read_bytes()) | {"rope_theta": 5.0}
    repository.commit({"config.json": json.dumps(config).encode()})
    second = locate(BASE)
    assert second.reference.revision == repository.branches["master"] != first.reference.revision
    assert second.config != first.config
    assert locate(first.reference).config == first.config


def test_a_commit_that_changed_nothing_of_ours_pins_the_same(modelscope: ModelScope, repository: Repository) -> None:
    first = locate(BASE)
    repository.commit({"README.md": b"# Tiny, and explained"})
    modelscope.requests.clear()
    assert locate(BASE).reference == first.reference
    assert modelscope.fetched() == []


def test_tags_and_commits_are_revisions(modelscope: ModelScope, repository: Repository) -> None:
    old = repository.branches["master"]
    repository.tags["v1.0"] = old
    repository.commit({"tokenizer_config.json": b'{"eos_token": "b"}'})
    assert locate(f"{BASE}@v1.0").reference.revision == old
    assert locate(f"{BASE}@{old}").reference.revision == old
    assert locate(BASE).reference.revision != old


def test_an_interrupted_download_is_continued_and_seen_only_when_whole(
    modelscope: ModelScope, repository: Repository
) -> None:
    modelscope.spoil_file = lambda path, data: data[: len(data) // 2] if path == "model.safetensors" else data
    with pytest.raises(Unavailable, match="could not be fetched"):
        locate(BASE)
    commit = repository.branches["master"]
    assert not cache(REPO, "snapshots", commit).exists()
    modelscope.spoil_file = lambda _, data: data
    modelscope.requests.clear()
    assert locate(BASE).reference.revision == commit
    assert [path for path, _ in modelscope.fetched()] == ["model.safetensors"]


def test_altered_bytes_are_not_taken(modelscope: ModelScope, repository: Repository) -> None:
    modelscope.spoil_file = lambda path, data: data[:-1] + b"\x00" if path == "config.json" else data
    with pytest.raises(Unavailable, match=r"config\.json"):
        locate(BASE)
    assert not cache(REPO, "snapshots").exists()


def test_several_at_once_get_the_same_folder(modelscope: ModelScope, repository: Repository) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(locate(BASE).folder)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache(REPO, "snapshots", repository.branches["master"])] * 4
    assert len(modelscope.fetched()) == len(set(modelscope.fetched()))
    assert not list(cache(REPO, "partial").iterdir())


def test_a_merged_branch_without_a_commit_of_its_files_is_not_pinned(
    modelscope: ModelScope, repository: Repository
) -> None:
    """After a merge no commit that changed a file holds all of them: nothing may be called pinned then."""
    repository.branches["side"] = repository.branches["master"]
    repository.commit({"tokenizer_config.json": b'{"eos_token": "b"}'}, branch="side")
    repository.commit({"tokenizer.json": b"{}"})
    merged = repository.merge("side")
    with pytest.raises(Unavailable, match="cannot be pinned"):
        locate(BASE)
    assert modelscope.fetched() == []
    found = locate(f"{BASE}@{merged}")
    assert found.reference.revision == merged
    assert (found.folder / "tokenizer_config.json").read_bytes() == b'{"eos_token": "b"}'
    assert (found.folder / "tokenizer.json").read_bytes() == b"{}"


def test_without_commits_in_the_list_nothing_is_pinned(modelscope: ModelScope, repository: Repository) -> None:
    modelscope.spoil_entry = lambda entry: entry.pop("Revision")
    with pytest.raises(Unavailable, match="cannot be pinned"):
        locate(BASE)
    assert modelscope.fetched() == []


@pytest.mark.parametrize(
    "path", ["../../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json", "./x.json"]
)
def test_a_path_that_leaves_the_folder_is_refused(modelscope: ModelScope, repository: Repository, path: str) -> None:
    repository.commit({path: b"{}"})
    with pytest.raises(Rejected) as caught:
        locate(BASE)
    assert caught.value.reason == "PATH_OUTSIDE"
    assert modelscope.fetched() == []


@pytest.mark.parametrize("spoil", [lambda it: it.pop("Path"), lambda it: it.update(Size="much"), lambda it: it.clear()])
def test_a_list_in_another_form_is_one_sentence(modelscope: ModelScope, repository: Repository, spoil: Any) -> None:
    modelscope.spoil_entry = spoil
    with pytest.raises(Unavailable, match="unknown form"):
        locate(BASE)


def test_what_is_not_there(modelscope: ModelScope, repository: Repository) -> None:
    with pytest.raises(BaseNotFound, match="no base modelscope:org/none that this account may read") as caught:
        locate("modelscope:org/none")
    assert caught.value.exit_code == 2
    with pytest.raises(BaseNotFound, match=r"has no revision v9\. Did you mean master\?"):
        locate(f"{BASE}@v9")
    modelscope.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    with pytest.raises(BaseNotFound, match="Pickled weights"):
        locate("modelscope:org/pickled")
    modelscope.add("org/pictures", {"cat.png": b"x"})
    with pytest.raises(BaseNotFound, match="holds nothing that is fetched"):
        locate("modelscope:org/pictures")


def test_a_private_base_needs_a_token(
    modelscope: ModelScope, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.token = "ms-secret"
    with pytest.raises(BaseNotFound, match="MODELSCOPE_API_TOKEN"):
        locate(BASE)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    assert locate(BASE).reference.revision == repository.branches["master"]


def test_a_failing_server_is_not_the_same_as_none(modelscope: ModelScope, repository: Repository) -> None:
    locate(BASE)
    modelscope.status = 503
    with pytest.raises(Unavailable, match=r"out of order.*Try again later"):
        locate(BASE)


def test_a_full_disk(modelscope: ModelScope, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("modelscope_hub._download.DownloadManager._download_with_resume", full)
    with pytest.raises(StorageFull, match="MODELSCOPE_CACHE"):
        locate(BASE)


# Without a connection


def test_offline_the_cache_answers_for_what_was_asked_before(modelscope: ModelScope, repository: Repository) -> None:
    repository.tags["v1.0"] = repository.branches["master"]
    first = locate(BASE)
    locate(f"{BASE}@v1.0")
    modelscope.stop()
    for reference in (BASE, f"{BASE}@v1.0", f"{BASE}@{first.reference.revision}"):
        assert locate(reference).reference == first.reference
    with pytest.raises(BaseNotFound, match=r"not in ModelScope's cache.*cannot be reached"):
        locate(f"{BASE}@v2.0")
    with pytest.raises(BaseNotFound, match="connect once"):
        locate("modelscope:org/other")


def test_hf_hub_offline_asks_nobody(
    modelscope: ModelScope, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = locate(BASE)
    modelscope.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate(BASE).reference == first.reference
    with pytest.raises(BaseNotFound, match="HF_HUB_OFFLINE"):
        locate("modelscope:org/other")
    assert modelscope.requests == []


@pytest.mark.parametrize(
    "place", ["models/AI-Org--Tiny_Llama-1.5/snapshots/master", "hub/models/AI-Org/Tiny_Llama-1___5"]
)
def test_offline_what_the_client_downloaded_itself_is_found(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In the layouts of today and of before 1.38. Which commit that is, nobody knows: it is not called pinned."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(llama.base, tmp_path / "cache" / place)
    found = locate(BASE)
    assert found.folder == tmp_path / "cache" / place
    assert found.reference == BaseReference("modelscope", REPO)
    with pytest.raises(BaseNotFound):
        locate(f"{BASE}@{'1' * 40}")


# Adapters


def test_an_adapter_is_fetched_without_pickles_and_checkpoints(
    modelscope: ModelScope, adapter: Repository, llama: Tiny
) -> None:
    folder = fetch_adapter_folder("modelscope:swift/tales")
    assert folder == cache("swift/tales", "snapshots", adapter.branches["master"])
    assert files_of(folder) == files_of(llama.adapter)
    assert fetch_adapter_folder(f"modelscope:swift/tales@{folder.name}") == folder


def test_a_fetched_adapter_is_pushed(
    modelscope: ModelScope, adapter: Repository, repository: Repository, llama: Tiny, registry: Registry
) -> None:
    commit = repository.branches["master"]
    receipt = registry.push(fetch_adapter_folder("modelscope:swift/tales"), "tales", base=BASE)
    assert receipt.manifest.base_reference == f"{BASE}@{commit}"
    assert receipt.manifest.base_fingerprint == locate(str(llama.base)).fingerprint


def test_a_half_cached_adapter_is_completed(modelscope: ModelScope, adapter: Repository, llama: Tiny) -> None:
    """Another tool may have fetched two files of the commit: the manifest beside them must not be missed."""
    adapter.commit({"adapterbay/manifest.json": b"{}"})
    folder = cache("swift/tales", "snapshots", adapter.branches["master"])
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(llama.adapter / name, folder)
    (folder / "adapter_config.json").write_bytes(b"{}")
    assert fetch_adapter_folder(f"modelscope:swift/tales@{folder.name}") == folder
    assert files_of(folder) == files_of(llama.adapter) | {"adapterbay/manifest.json": b"{}"}


def test_an_adapter_that_is_not_there(modelscope: ModelScope, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="no adapter modelscope:org/none") as caught:
        fetch_adapter_folder("modelscope:org/none")
    assert not isinstance(caught.value, BaseNotFound)
    for text in ("modelscope:org", "modelscope:org/x@", "modelscope:../x", "folder:x", "org/x", "hub:x"):
        with pytest.raises(InvalidReference):
            fetch_adapter_folder(text)


@pytest.mark.parametrize("revision", [None, "main", "1" * 40])
def test_an_adapter_of_the_hub_comes_from_its_cache_offline(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    repo = tmp_path / "hub" / "models--org--tales"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("1" * 40)
    shutil.copytree(llama.adapter, repo / "snapshots" / ("1" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = "hub:org/tales" + (f"@{revision}" if revision else "")
    assert fetch_adapter_folder(text) == repo / "snapshots" / ("1" * 40)
    with pytest.raises(Unavailable, match="hub:org/other"):
        fetch_adapter_folder("hub:org/other")
    with pytest.raises(InvalidReference, match="names a digest"):
        fetch_adapter_folder(f"hub:org/tales@sha256:{'a' * 64}")


# The client


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    for use in (locate, fetch_adapter_folder):
        with pytest.raises(MissingExtra, match=r"pip install 'adapterbay\[modelscope\]'"):
            use(BASE)  # type: ignore[operator]


def test_the_client_loads_no_torch_and_neither_does_naming_a_base() -> None:
    code = (
        "import sys, adapterbay.registry.sources\n"
        "from adapterbay.registry import BaseReference\n"
        "BaseReference.parse('modelscope:org/x')\n"
        "early = {'modelscope_hub', 'requests', 'huggingface_hub'} & set(sys.modules)\n"
        "import modelscope_hub\n"
        "heavy = {'torch', 'transformers', 'modelscope'} & set(sys.modules)\n"
        "sys.exit(', '.join(early | heavy) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_clients_own_snapshot_is_the_same_folder(modelscope: ModelScope, repository: Repository) -> None:
    """Whoever uses modelscope-hub beside us shares our cache: the layout is the client's."""
    found = locate(BASE)
    api = modelscope_hub.HubApi(modelscope_hub.HubConfig())
    again = api.download_repo(REPO, "model", revision=found.reference.revision, local_files_only=True)
    assert again == found.folder
