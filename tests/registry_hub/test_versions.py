"""Versions as commits and tags: what stands on the Hub after a push, and after pushes that were disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub_tools import ServerProcess, environment
from huggingface_hub import HfApi
from plain_hub import Failure, PlainHub

from adapterbay.registry import Registry
from adapterbay.registry.digest import digest_bytes
from adapterbay.registry.errors import Corrupted, InvalidReference, NotFound, Rejected, Unavailable
from adapterbay.registry.hub.backend import HubRegistry
from adapterbay.registry.hub.ledger import MAX_LEDGER_BYTES
from adapterbay.registry.manifest import FileEntry, Manifest
from adapterbay.registry.portable import LEDGER_PATH, MANIFEST_PATH, OWN_README_PATH

Content = Callable[[int], Path]
NAME = "team/tales"

PUSH = """
import sys
from adapterbay.registry.hub.backend import HubRegistry
receipt = HubRegistry("hub:team", endpoint=sys.argv[1]).push(sys.argv[2], "tales", aliases=sys.argv[3:])
print(receipt.version, receipt.digest)
"""


@pytest.fixture
def registry(plain: PlainHub, tmp_path: Path) -> HubRegistry:
    return HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "hub-cache")


def start_push(endpoint: str, folder: Path, home: Path, *aliases: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PUSH, endpoint, str(folder), *aliases]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(home))


def ledger_of(plain: PlainHub) -> list[dict[str, object]]:
    document = json.loads(plain.repos[NAME].head.tree[LEDGER_PATH])
    assert document["schema_version"] == 1
    return document["versions"]  # type: ignore[no-any-return]


def test_one_commit_and_one_tag_per_version(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    receipts = [registry.push(content(number), "tales") for number in (1, 2, 3)]
    repo = plain.repos[NAME]
    assert [commit.title for commit in repo.commits] == ["initial commit", "Version 1", "Version 2", "Version 3"]
    commits = [commit.sha for commit in repo.commits[1:]]
    assert repo.tags == {f"v{number}": sha for number, sha in enumerate(commits, 1)}
    assert ledger_of(plain) == [
        {"version": number, "digest": receipt.digest, "commit": sha}
        for number, (receipt, sha) in enumerate(zip(receipts, [*commits[:2], None], strict=True), 1)
    ]
    for receipt, commit in zip(receipts, repo.commits[1:], strict=True):
        assert digest_bytes(commit.tree[MANIFEST_PATH]) == receipt.digest
        assert b"library_name: peft" in commit.tree["README.md"]
        assert {"adapter_config.json", "adapter_model.safetensors"} < set(commit.tree)
    assert all(f"/tag/{sha}" in " ".join(plain.requests) for sha in commits), "tags are pinned to the commit"


def test_names_and_references(registry: HubRegistry, content: Content) -> None:
    receipt = registry.push(content(1), "tales", aliases=["champion"])
    commit = registry.find("tales").commit
    assert receipt.name == NAME
    for reference in ("tales", NAME, f"hub:{NAME}", "tales@1", "tales@v1", "tales@champion", "tales@main"):
        assert registry.resolve(reference).digest == receipt.digest, reference
    for revision in (commit, receipt.digest):
        assert registry.resolve(f"tales@{revision}").version == 1
    with pytest.raises(NotFound):
        registry.resolve("tales@" + "0" * 40)


def test_a_card_by_hand_stays_with_its_version(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    folder = content(1)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tales\n")
    receipt = registry.push(folder, "tales")
    tree = plain.repos[NAME].head.tree
    assert tree[OWN_README_PATH] == (folder / "README.md").read_bytes() != tree["README.md"]
    assert b"license: mit" in tree["README.md"]
    assert registry.snapshot("tales").read("README.md") == (folder / "README.md").read_bytes()
    registry.push(content(2), "tales")
    assert OWN_README_PATH not in plain.repos[NAME].head.tree
    assert registry.snapshot("tales@1").manifest == receipt.manifest


def test_nothing_is_sent_before_admission(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    folder = content(1)
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04 no tensors")
    with pytest.raises(Rejected):
        registry.push(folder, "tales")
    assert plain.requests == []


def test_a_base_on_the_hub_is_pinned(plain: PlainHub, base_folder: Path, content: Content, tmp_path: Path) -> None:
    HfApi(endpoint=plain.endpoint, token=False).create_repo("base/llama")
    base = plain.repos["base/llama"]
    commit = base.add({path.name: path.read_bytes() for path in base_folder.iterdir()}, "the base")
    code = """
import sys
from adapterbay.registry.hub.backend import HubRegistry
registry = HubRegistry("hub:team")
print(registry.push(sys.argv[1], "tales", base="hub:base/llama").manifest.base_reference)
print(registry.version("tales", 1).base_reference)
"""
    command = [sys.executable, "-c", code, str(content(1))]
    env = environment(tmp_path / "home", plain.endpoint)
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"hub:base/llama@{commit}"] * 2
    assert b"base_model: base/llama" in plain.repos[NAME].head.tree["README.md"]


# Disturbed pushes


def test_a_pusher_killed_between_commit_and_tag(
    plain: PlainHub, registry: HubRegistry, content: Content, tmp_path: Path
) -> None:
    registry.push(content(1), "tales")
    pusher = start_push(plain.endpoint, content(2), tmp_path / "home", "champion")
    plain.after_commit = lambda _: os.kill(pusher.pid, signal.SIGKILL)
    pusher.communicate(timeout=120)
    plain.after_commit = lambda _: None
    assert pusher.returncode == -signal.SIGKILL
    repo = plain.repos[NAME]
    assert (set(repo.tags), repo.head.title) == ({"v1"}, "Version 2")

    assert registry.resolve("tales").version == registry.resolve("tales@2").version == 2
    assert (
        registry.snapshot("tales@2").read("adapter_model.safetensors")
        == (content(2) / "adapter_model.safetensors").read_bytes()
    )
    assert [record.version for record in registry.versions("tales")] == [1, 2]
    assert registry.find(f"tales@{repo.head.sha}").version == 2

    third = registry.push(content(3), "tales")
    assert third.version == 3
    assert repo.tags == {f"v{number}": commit.sha for number, commit in enumerate(repo.commits[1:], 1)}
    assert [entry["commit"] for entry in ledger_of(plain)] == [repo.tags["v1"], repo.tags["v2"], None]


def test_verify_sets_a_tag_that_is_missing(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    plain.failures.append(Failure("POST /api/models/team/tales/tag/", 500))
    receipt = registry.push(content(1), "tales")
    assert "the next push or verify sets it" in receipt.findings[-1]
    assert (receipt.version, plain.repos[NAME].tags) == (1, {})
    report = registry.verify("tales")
    assert (report.ok, report.checked_versions) == (True, 1)
    assert plain.repos[NAME].tags == {"v1": plain.repos[NAME].head.sha}


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    plain: PlainHub, registry: HubRegistry, content: Content
) -> None:
    registry.push(content(1), "tales")
    plain.failures.append(Failure("/commit/main", 502, after=True))
    receipt = registry.push(content(2), "tales")
    assert receipt.version == 2
    assert [record.version for record in registry.versions("tales")] == [1, 2]
    assert len(plain.repos[NAME].commits) == 3
    plain.failures.append(Failure("/commit/main", 502))
    with pytest.raises(Unavailable):
        registry.push(content(3), "tales")
    assert len(plain.repos[NAME].commits) == 3


def test_of_two_pushers_on_one_parent_one_follows(
    plain: PlainHub, registry: HubRegistry, content: Content, tmp_path: Path
) -> None:
    registry.push(content(1), "tales")
    parent = plain.repos[NAME].head.sha
    folders = [content(2), content(3)]
    both_have_read, parents = threading.Barrier(2), []

    def push(folder: Path) -> int:
        other = HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "hub-cache")
        commit = other.client.commit

        def when_both_have_read(*arguments: Any, **keywords: Any) -> str:
            parents.append(keywords["parent"])
            if keywords["parent"] == parent:
                both_have_read.wait(timeout=60)
            return commit(*arguments, **keywords)

        other.client.commit = when_both_have_read  # type: ignore[method-assign]
        return other.push(folder, "tales").version

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(push, folders)) == [2, 3]
    follower = plain.repos[NAME].commits[2].sha
    assert parents == [parent, parent, follower]
    assert [commit.title for commit in plain.repos[NAME].commits[1:]] == ["Version 1", "Version 2", "Version 3"]
    assert registry.verify().ok


@pytest.mark.parametrize("kind", ["plain", "own"])
def test_eight_processes_leave_eight_versions(
    kind: str, request: pytest.FixtureRequest, content: Content, tmp_path: Path
) -> None:
    where: PlainHub | ServerProcess = request.getfixturevalue("plain" if kind == "plain" else "server")
    pushers = [start_push(where.endpoint, content(number), tmp_path / "home") for number in range(8)]
    pushed = {}
    for pusher in pushers:
        out, err = pusher.communicate(timeout=280)
        assert pusher.returncode == 0, err
        version, digest = out.split()
        pushed[int(version)] = digest
    assert sorted(pushed) == list(range(1, 9))
    registry = HubRegistry("hub:team", endpoint=where.endpoint, cache=tmp_path / "hub-cache")
    assert {record.version: record.digest for record in registry.versions("tales")} == pushed
    assert registry.verify().ok
    api = HfApi(endpoint=where.endpoint, token=False)
    refs = api.list_repo_refs(NAME)
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    assert set(tags) == {f"v{number}" for number in range(1, 9)}
    ledger = json.loads(Path(api.hf_hub_download(NAME, LEDGER_PATH, cache_dir=tmp_path / "plain-cache")).read_text())[
        "versions"
    ]
    assert [(entry["version"], entry["digest"]) for entry in ledger] == sorted(pushed.items())
    assert [entry["commit"] for entry in ledger] == [*(tags[f"v{number}"] for number in range(1, 8)), None]


# Strangers


def test_a_moved_version_tag_is_found(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    for number in (1, 2, 3):
        registry.push(content(number), "tales")
    tags = plain.repos[NAME].tags
    for moved, to in (("v1", "v2"), ("v3", "v1")):
        before = tags[moved]
        tags[moved] = tags[to]
        with pytest.raises(Corrupted) as caught:
            registry.resolve(f"tales@{moved}")
        assert "it was moved" in caught.value.message
        report = registry.verify()
        assert [problem.kind for problem in report.problems] == ["tag"], report.problems
        assert moved in report.problems[0].detail
        tags[moved] = before
    assert registry.verify().ok


def test_adapter_files_changed_on_main_are_refused_there(
    plain: PlainHub, registry: HubRegistry, content: Content
) -> None:
    receipt = registry.push(content(1), "tales", aliases=["champion"])
    repo = plain.repos[NAME]
    weights = (content(2) / "adapter_model.safetensors").read_bytes()
    changed = repo.add({**repo.head.tree, "adapter_model.safetensors": weights}, "by hand")
    for reference in ("tales", "tales@main", f"tales@{changed}"):
        with pytest.raises(Rejected) as caught:
            registry.resolve(reference)
        assert caught.value.reason == "MANIFEST_MISMATCH"
        assert "tales@1" in caught.value.message
    for reference in ("tales@1", "tales@champion"):
        assert registry.snapshot(reference).manifest == receipt.manifest
    assert [problem.kind for problem in registry.verify().problems] == ["record"]
    assert registry.push(content(3), "tales").version == 2
    assert registry.resolve("tales").version == 2


def test_a_card_edited_on_the_hub_changes_no_version(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    receipt = registry.push(content(1), "tales")
    repo = plain.repos[NAME]
    edited = repo.add({**repo.head.tree, "README.md": b"# Better\n", "notes.txt": b"x"}, "Update README.md")
    for reference in ("tales", "tales@main", f"tales@{edited}", "tales@1"):
        assert registry.resolve(reference).digest == receipt.digest
    assert registry.verify().ok
    registry.push(content(2), "tales")
    assert repo.head.tree["notes.txt"] == b"x", "files of others stay"


def test_bytes_that_changed_are_never_served(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    registry.push(content(1), "tales")
    path = registry.snapshot("tales").files["adapter_model.safetensors"]
    good = path.read_bytes()
    path.resolve().chmod(0o644)
    path.write_bytes(good[:-1] + b"?")
    assert registry.snapshot("tales").files["adapter_model.safetensors"].read_bytes() == good, "fetched again"
    plain.repos[NAME].head.tree["adapter_model.safetensors"] = good[:-1] + b"!"
    path.write_bytes(good[:-1] + b"?")
    with pytest.raises(Corrupted) as caught:
        registry.snapshot("tales")
    assert "adapter_model.safetensors" in caught.value.message
    assert [problem.kind for problem in registry.verify().problems] == ["blob"]


@pytest.mark.parametrize(
    "ledger",
    [
        b"[]",
        b"{",
        b'{"schema_version": 2, "versions": []}',
        b'{"schema_version": 1, "versions": [{"version": 0, "digest": "sha256:%s", "commit": null}]}' % (b"a" * 64),
        b'{"schema_version": 1, "versions": [{"version": 1, "digest": "x", "commit": null}]}',
        b'{"schema_version": 1, "versions": [{"version": 1, "digest": "sha256:%s", "commit": "../x"}]}' % (b"a" * 64),
    ],
)
def test_a_ledger_that_is_none(plain: PlainHub, registry: HubRegistry, content: Content, ledger: bytes) -> None:
    registry.push(content(1), "tales")
    repo = plain.repos[NAME]
    repo.add({**repo.head.tree, LEDGER_PATH: ledger}, "by hand")
    with pytest.raises(Corrupted) as caught:
        registry.resolve("tales")
    assert LEDGER_PATH in caught.value.message


def test_what_is_too_large_is_not_fetched(
    plain: PlainHub, registry: HubRegistry, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = registry.push(content(1), "tales")
    tree = plain.repos[NAME].head.tree
    tree["adapter_model.safetensors"] += b"much more than the manifest says"
    with pytest.raises(Corrupted):
        registry.snapshot("tales")
    assert not any("/resolve/" in request and "safetensors" in request for request in plain.requests)
    tree[LEDGER_PATH] = b" " * (MAX_LEDGER_BYTES + 1)
    plain.repos[NAME].add(dict(tree), "by hand")
    plain.requests.clear()
    with pytest.raises(Rejected) as caught:
        registry.resolve("tales@1")
    assert caught.value.reason == "TOO_LARGE"
    assert not any(LEDGER_PATH in request for request in plain.requests)
    assert receipt.version == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [("evil.py", "CODE_IN_FOLDER"), ("more.bin", "PICKLE"), ("notes.txt", "BAD_MANIFEST")],
)
def test_a_manifest_that_names_what_is_never_fetched(
    plain: PlainHub, registry: HubRegistry, content: Content, path: str, reason: str
) -> None:
    manifest = registry.push(content(1), "tales").manifest
    entry = FileEntry(path=path, digest=digest_bytes(b"x"), size=1)
    lying = manifest.model_copy(update={"files": (*manifest.files, entry)})
    lying = Manifest.model_validate(lying.model_dump())
    repo = plain.repos[NAME]
    ledger = json.loads(repo.head.tree[LEDGER_PATH])
    ledger["versions"][0]["digest"] = lying.digest
    changed = {path: b"x", MANIFEST_PATH: lying.to_bytes(), LEDGER_PATH: json.dumps(ledger).encode()}
    repo.tags["v1"] = repo.add({**repo.head.tree, **changed}, "by hand")
    plain.requests.clear()
    with pytest.raises(Rejected) as caught:
        registry.snapshot("tales@1")
    assert caught.value.reason == reason
    assert not any(path in request for request in plain.requests)


def test_a_registry_of_one_repository(plain: PlainHub, registry: HubRegistry, content: Content, tmp_path: Path) -> None:
    registry.push(content(1), "songs")
    one = HubRegistry("hub:team/tales", endpoint=plain.endpoint, cache=tmp_path / "hub-cache")
    assert one.push(content(1), "tales").name == NAME
    assert [summary.name for summary in one.adapters()] == [NAME]
    assert one.verify().checked_versions == 1
    for name in ("songs", "team/songs", "other/tales"):
        with pytest.raises(InvalidReference):
            one.resolve(name)


def test_a_version_deleted_on_our_server(
    server: ServerProcess, hub: Callable[[], HubRegistry], content: Content, tmp_path: Path
) -> None:
    registry = hub()
    for number in (1, 2, 3):
        registry.push(content(number), "tales")
    store = Registry.open(server.store)
    store.delete(NAME, 2, "wrong data")
    assert [record.version for record in registry.versions("tales")] == [1, 3]
    with pytest.raises(NotFound):
        registry.resolve("tales@2")
    assert registry.verify().ok
    store.delete(NAME, 3, "wrong data")
    assert registry.resolve("tales").version == 1
    assert registry.push(content(4), "tales").version == 4
    assert [record.version for record in registry.versions("tales")] == [1, 4]
    store.push(content(5), NAME)
    assert registry.resolve("tales").version == 5
    assert [record.version for record in registry.versions("tales")] == [1, 4, 5]
    assert registry.verify().ok
    store.close()
