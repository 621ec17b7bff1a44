"""Commits by the real client: parents, concurrency, deletions, copies, and what admission refuses."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from registry_serve.tools import Hub, new_weights
from registry_tools import Draft, Tiny, tree

from adapterbay.registry import Registry


def additions(folder: Path) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]


def push(api: HfApi, name: str, folder: Path, parent: str | None = None) -> CommitInfo:
    return api.create_commit(name, additions(folder), commit_message="Push", parent_commit=parent)


def test_two_on_one_parent_one_wins(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    api = hub.api()
    api.create_repo("team/race")
    start = push(api, "team/race", llama.adapter)
    barrier = Barrier(2)
    messages: list[str] = []

    def run(number: int) -> str | int:
        folder = new_weights(llama.adapter, tmp_path / f"w{number}", number)
        barrier.wait()
        try:
            return push(hub.api(), "team/race", folder, parent=start.oid).oid
        except HfHubHTTPError as error:
            messages.append(str(error))
            return error.response.status_code

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(run, (1, 2)))
    (message,) = messages
    assert "A commit has happened since" in message
    assert start.oid in message
    assert answers.count(412) == 1
    (winner,) = [answer for answer in answers if answer != 412]
    assert api.model_info("team/race").sha == winner
    assert [tag.name for tag in api.list_repo_refs("team/race").tags] == ["v1", "v2"]
    # The other reads again and follows.
    loser = answers.index(412) + 1
    followed = push(api, "team/race", tmp_path / f"w{loser}", parent=str(winner))
    assert [commit.commit_id for commit in api.list_repo_commits("team/race")][:3] == [followed.oid, winner, start.oid]


def test_a_parent_may_be_shortened(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    """As huggingface_hub says of `parent_commit`: its first 7 characters are enough."""
    api = hub.api()
    api.create_repo("team/short")
    start = push(api, "team/short", llama.adapter)
    second = push(api, "team/short", new_weights(llama.adapter, tmp_path / "w1", 1), parent=start.oid[:7])
    assert [tag.name for tag in api.list_repo_refs("team/short").tags] == ["v1", "v2"]
    third = new_weights(llama.adapter, tmp_path / "w2", 2)
    for stale in (start.oid[:7], second.oid[:6], second.oid.upper()):
        with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
            push(api, "team/short", third, parent=stale)


@pytest.mark.parametrize("with_parent", [True, False], ids=["each on a parent", "without a parent"])
def test_8_together_leave_8_versions(hub: Hub, llama: Tiny, tmp_path: Path, with_parent: bool) -> None:
    name = f"team/eight-{int(with_parent)}"
    hub.api().create_repo(name)
    folders = [new_weights(llama.adapter, tmp_path / f"w{number}", number) for number in range(8)]
    barrier = Barrier(8)

    def run(folder: Path) -> int:
        api, refused = hub.api(), 0
        barrier.wait()
        while True:
            parent = api.model_info(name).sha if with_parent else None
            try:
                push(api, name, folder, parent)
            except HfHubHTTPError as error:
                if error.response.status_code != 412:
                    raise
                refused += 1
                time.sleep(random.random() * 0.05)
            else:
                return refused

    with ThreadPoolExecutor(8) as pool:
        refused = sum(pool.map(run, folders))
    assert (refused > 0) == with_parent
    store = Registry.open(hub.store)
    versions = store.versions(name)
    assert [record.version for record in versions] == list(range(1, 9))
    assert len({record.digest for record in versions}) == 8
    history = hub.api().list_repo_commits(name)
    assert len(history) == 9
    pushed = {(folder / "adapter_model.safetensors").read_bytes() for folder in folders}
    assert {store.snapshot(f"{name}@{n}").read("adapter_model.safetensors") for n in range(1, 9)} == pushed
    assert store.verify(name).ok


def test_additions_deletions_and_copies(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    api = hub.api()
    api.create_repo("team/edits")
    push(api, "team/edits", llama.adapter)
    api.create_commit(
        "team/edits",
        [
            CommitOperationAdd("notes/one.txt", b"one"),
            CommitOperationAdd("notes/two.txt", b"two"),
            CommitOperationCopy("adapter_config.json", "notes/config.json"),
        ],
        commit_message="Notes",
    )
    assert api.list_repo_files("team/edits") == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapterbay/manifest.json",
        "adapterbay/versions.json",
        "notes/config.json",
        "notes/one.txt",
        "notes/two.txt",
    ]
    copied = hf_hub_download(
        "team/edits", "notes/config.json", endpoint=hub.url, token=hub.token("alice"), cache_dir=tmp_path
    )
    assert Path(copied).read_bytes() == (llama.adapter / "adapter_config.json").read_bytes()
    api.create_commit(
        "team/edits",
        [
            CommitOperationDelete("notes/one.txt"),
            CommitOperationCopy("notes/two.txt", "notes/three.txt", src_revision="main"),
        ],
        commit_message="One less",
    )
    assert [path for path in api.list_repo_files("team/edits") if path.startswith("notes/")] == [
        "notes/config.json",
        "notes/three.txt",
        "notes/two.txt",
    ]
    api.delete_folder("notes", "team/edits")
    assert not [path for path in api.list_repo_files("team/edits") if path.startswith("notes/")]
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("notes/one.txt", "team/edits")
    assert [tag.name for tag in api.list_repo_refs("team/edits").tags] == ["v1"]
    (info,) = api.get_paths_info(
        "team/edits",
        ["notes/two.txt", "nothing.txt"],
        revision=api.list_repo_commits("team/edits")[1].commit_id,
        expand=True,
    )
    assert (info.path, info.size) == ("notes/two.txt", 3)
    assert info.last_commit is not None
    assert info.last_commit.title == "Notes"


def test_the_same_again_changes_nothing(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    api = hub.api()
    api.create_repo("team/same")
    first = push(api, "team/same", llama.adapter)
    assert push(api, "team/same", llama.adapter).oid == first.oid
    # A client that does not compare, or whose answer was lost and that sends its commit again.
    operation = CommitOperationAdd("adapter_config.json", llama.adapter / "adapter_config.json")
    operation._upload_mode = "regular"
    assert api.create_commit("team/same", [operation], commit_message="Again").oid == first.oid
    assert len(api.list_repo_commits("team/same")) == 2


def test_a_changed_document_makes_a_version(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    api = hub.api()
    api.create_repo("team/training")
    push(api, "team/training", llama.adapter)
    api.upload_file(
        repo_id="team/training", path_in_repo="training.json", path_or_fileobj=b'{"metrics": {"accuracy": 0.5}}'
    )
    store = Registry.open(hub.store)
    assert store.version("team/training", 2).metrics == {"accuracy": 0.5}
    api.upload_file(repo_id="team/training", path_in_repo="tokenizer.json", path_or_fileobj=b"{}")
    assert store.resolve("team/training").version == 2
    assert "tokenizer.json" in api.list_repo_files("team/training")


def test_admission_refuses_the_whole_commit(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    api = hub.api()
    api.create_repo("team/refused")
    first = push(api, "team/refused", llama.adapter)
    draft = Draft(new_weights(llama.adapter, tmp_path / "nan", 1))
    draft.edit_tensors(lambda tensors: next(iter(tensors.values())).fill(float("nan")))
    (draft.path / "README.md").write_text("# other\n")
    before = tree(hub.store)
    with pytest.raises(HfHubHTTPError, match="NaN") as refused:
        push(api, "team/refused", draft.path)
    assert refused.value.response.status_code == 422
    assert refused.value.response.json()["reason"] == "NOT_FINITE"
    assert tree(hub.store) == before
    assert api.model_info("team/refused").sha == first.oid


def test_a_base_that_the_server_does_not_know(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    draft = Draft(new_weights(llama.adapter, tmp_path / "other", 1))
    # The folder is there, for the server too: but clients do not name paths for it.
    (tmp_path / "base").symlink_to(llama.base)
    draft.edit_config(base_model_name_or_path=str(tmp_path / "base"))
    api = hub.api()
    api.create_repo("team/nobase")
    with pytest.raises(HfHubHTTPError, match=r"registry serve --base .*/base=PLACE"):
        push(api, "team/nobase", draft.path)
    assert api.list_repo_files("team/nobase") == []
    draft.edit_config(base_model_name_or_path="somebody/tiny-llama")  # the operator's name, below another owner
    push(api, "team/nobase", draft.path)
    assert [tag.name for tag in api.list_repo_refs("team/nobase").tags] == ["v1"]
    # What PEFT writes down: the folder that the server itself has the base in.
    changed = Draft(new_weights(draft.path, tmp_path / "another", 2))
    changed.edit_config(base_model_name_or_path=str(llama.base))
    push(api, "team/nobase", changed.path)
    assert [tag.name for tag in api.list_repo_refs("team/nobase").tags] == ["v1", "v2"]


def test_a_base_is_known_by_its_fingerprint(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    source = Registry.open(tmp_path / "source")
    draft = Draft(new_weights(llama.adapter, tmp_path / "other", 1))
    (tmp_path / "elsewhere").symlink_to(llama.base)
    receipt = source.push(draft.path, "x", base=str(tmp_path / "elsewhere"))
    assert "elsewhere" in receipt.manifest.base_reference
    api = hub.api()
    api.create_repo("team/fingerprint")
    api.upload_folder(repo_id="team/fingerprint", folder_path=source.pull("x", tmp_path / "pulled"))
    assert Registry.open(hub.store).resolve("team/fingerprint").digest == receipt.digest


def test_only_main(hub: Hub, llama: Tiny) -> None:
    api = hub.api()
    api.create_repo("team/main")
    push(api, "team/main", llama.adapter)
    with pytest.raises(BadRequestError, match="Commits go to main, not to 'v1'"):
        api.create_commit("team/main", additions(llama.adapter), commit_message="x", revision="v1")
    with pytest.raises(HfHubHTTPError, match="a pull request is not implemented"):
        api.create_commit("team/main", additions(llama.adapter), commit_message="x", create_pr=True)
    with pytest.raises(RepositoryNotFoundError):
        api.create_commit("team/nowhere", additions(llama.adapter), commit_message="x")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("team/main", [CommitOperationDelete("README.md")], commit_message="x", parent_commit="0" * 40)
