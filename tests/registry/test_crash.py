"""kill -9 at random instants, many processes at once, and full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from registry_tools import Tiny, tree

from adapterbay.registry import Registry, durable
from adapterbay.registry.errors import AdapterbayError, StorageFull, Unavailable
from adapterbay.registry.local.index import Index

WORKER = Path(__file__).with_name("crash_worker.py")


def run_worker(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.slow
def test_kill_9_at_200_random_instants(
    llama: Tiny, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    answer = run_worker("kill", tmp_path / "registry", llama.adapter, 200, 20260101)
    record_property("kills", json.dumps(answer))
    assert answer["landed"] == 200
    # The kills must strike inside the push, on both sides of its commit.
    instants = answer["instants"]
    assert instants.get("staging", 0) >= 20, instants
    assert sum(count for stage, count in instants.items() if stage.startswith("between")) >= 5, instants
    # An index built again from disk says the same: no killed push comes alive.
    store = Registry.open(tmp_path / "registry", create=False)
    for adapter in store.adapters():
        store.push(llama.adapter, adapter.name)
    before = (store.adapters(), store.events(limit=100_000))
    store.rebuild_index()
    assert (store.adapters(), store.events(limit=100_000)) == before
    assert store.verify().ok


@pytest.mark.slow
def test_16_processes_push_to_one_name(llama: Tiny, tmp_path: Path) -> None:
    answer = run_worker("together", tmp_path / "registry", llama.adapter, 16)
    assert answer == {
        "versions": list(range(1, 17)),
        "listed": list(range(1, 17)),
        "aliases": {"champion": 16},
        "digests": 4,
        "problems": [],
        "leftovers": 0,
        "temporary": 0,
    }


# Full disks


DURABLE = ("sync_file", "sync_folder", "write_atomic", "rename", "append", "make_folders")


class Disk:
    """Fails the `at`-th durable step of a push, before or after it was done, as a full disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, after: bool, code: int) -> None:
        self.steps = 0
        for name in DURABLE:
            monkeypatch.setattr(durable, name, self._wrap(getattr(durable, name), at, after, code))

    def _wrap(self, step: Callable[..., Any], at: int, after: bool, code: int) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            self.steps += 1
            fails = self.steps == at
            if fails and not after:
                raise OSError(code, os.strerror(code))
            result = step(*args)
            if fails:
                raise OSError(code, os.strerror(code))
            return result

        return wrapped


def push_error(registry: Registry, folder: Path, name: str, aliases: Sequence[str]) -> AdapterbayError | None:
    try:
        registry.push(folder, name, aliases=aliases)
    except AdapterbayError as error:
        return error
    return None


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_a_full_disk_at_every_step_leaves_nothing(
    llama: Tiny, bert: Tiny, registry: Registry, monkeypatch: pytest.MonkeyPatch, after: bool, code: int
) -> None:
    registry.push(bert.adapter, "team/x", aliases=["champion"])
    before, last = tree(registry.root), registry.last_event()
    at = 0
    while True:
        at += 1
        with monkeypatch.context() as patch:
            disk = Disk(patch, at, after, code)
            error = push_error(registry, llama.adapter, "team/x", ("champion", "new"))
        if error is None:
            break
        assert isinstance(error, StorageFull), error
        assert error.exit_code == 2
        assert str(registry.root) in error.message
        assert tree(registry.root) == before, f"step {at}"
        assert registry.last_event() == last
        assert registry.verify().ok
    assert disk.steps < at
    assert at > 20
    assert registry.resolve("team/x@new").version == 2
    assert registry.verify().ok


@pytest.mark.parametrize("pages", range(4))
def test_a_full_disk_under_the_index_leaves_nothing(
    llama: Tiny, registry: Registry, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    """SQLite's own SQLITE_FULL: the database may not grow by more than some pages."""
    registry.push(llama.adapter, "team/x", aliases=["champion"])
    registry.close()
    before = tree(registry.root)
    connect = Index._connect

    def limited(self: Index) -> Any:
        connection = connect(self)
        count = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {count + pages}")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(Index, "_connect", limited)
        store = Registry.open(registry.root)
        error = None
        for number in range(500):
            before = tree(registry.root)
            error = push_error(store, llama.adapter, f"team/{number}-{'long' * 20}", ["champion"])
            if error is not None:
                break
        assert isinstance(error, StorageFull)
        store.close()
    assert tree(registry.root) == before
    assert registry.verify().ok


def test_a_read_only_registry_is_told(llama: Tiny, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = tree(registry.root)
    monkeypatch.setattr(durable, "sync_file", refuse)
    with pytest.raises(Unavailable, match="cannot be written"):
        registry.push(llama.adapter, "x")
    assert tree(registry.root) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where mounting is allowed."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(llama: Tiny, small_disk: Path, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    shutil.copytree(llama.adapter, grown)
    (grown / "README.md").write_bytes(os.urandom(2**20).replace(b"\x80", b"x"))
    registry = Registry.open(small_disk / "registry")
    registry.push(llama.adapter, "x")
    before = tree(registry.root)
    with pytest.raises(StorageFull):
        registry.push(grown, "x")
    assert tree(registry.root) == before
    assert registry.push(llama.adapter, "x").version == 2
    assert registry.verify().ok
    registry.close()
