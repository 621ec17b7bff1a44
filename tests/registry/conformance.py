"""What every registry must do, wherever its versions lie. One suite; a backend calls it in a few lines:

    class TestOurs(Conformance):
        @pytest.fixture
        def place(self, ...) -> Place: ...

It needs the fixtures `base_folder` and `adapter` (a plain PEFT folder of that base, which is named in it), and asks for
nothing that `adapterbay.registry.backend.Backend` does not promise.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hub_tools import vary
from registry_tools import Draft

from adapterbay.registry.backend import Backend
from adapterbay.registry.digest import digest_bytes, digest_file
from adapterbay.registry.errors import (
    BaseNotFound,
    Conflict,
    InvalidArgument,
    InvalidReference,
    NotFound,
    Rejected,
    StaleAlias,
)
from adapterbay.registry.portable import MANIFEST_PATH

NAME = "team/tales"


@dataclass(frozen=True)
class Place:
    """An empty registry: `open` gives a new object for it every time."""

    open: Callable[[], Backend]


class Conformance:
    """The suite. Names are `team/…`: every backend has those."""

    @pytest.fixture
    def place(self) -> Place:
        raise NotImplementedError("the class of a backend says where it is")

    @pytest.fixture
    def registry(self, place: Place) -> Iterator[Backend]:
        backend = place.open()
        yield backend
        backend.close()

    @pytest.fixture
    def content(self, adapter: Path, tmp_path: Path) -> Callable[[int], Path]:
        """Adapters that differ, by number; the same number is the same content."""
        return lambda number: vary(adapter, tmp_path / "contents" / str(number), number)

    def test_it_is_a_backend(self, registry: Backend) -> None:
        assert isinstance(registry, Backend)

    # Versions

    def test_versions_count_up_and_are_found_again(self, registry: Backend, content: Callable[[int], Path]) -> None:
        receipts = [registry.push(content(number), NAME) for number in (1, 2, 3)]
        assert [(receipt.name, receipt.version) for receipt in receipts] == [(NAME, 1), (NAME, 2), (NAME, 3)]
        assert len({receipt.digest for receipt in receipts}) == 3
        for receipt in receipts:
            assert receipt.digest == receipt.manifest.digest == digest_bytes(receipt.manifest.to_bytes())
            by_number = registry.resolve(f"{NAME}@{receipt.version}")
            assert (by_number.name, by_number.version, by_number.digest) == (NAME, receipt.version, receipt.digest)
            by_digest = registry.resolve(f"{NAME}@{receipt.digest}")
            assert (by_digest.version, by_digest.digest) == (receipt.version, receipt.digest)
            assert registry.resolve(by_number.reference).digest == receipt.digest
        assert registry.resolve(NAME).version == registry.resolve(f"{NAME}@latest").version == 3

    def test_records(self, registry: Backend, content: Callable[[int], Path], base_folder: Path) -> None:
        before = datetime.now(UTC) - timedelta(seconds=2)
        first = registry.push(content(1), NAME, aliases=["champion"])
        second = registry.push(content(2), NAME)
        records = registry.versions(NAME)
        assert [(record.name, record.version, record.digest) for record in records] == [
            (NAME, 1, first.digest),
            (NAME, 2, second.digest),
        ]
        record = registry.version(NAME, 1)
        assert record == records[0]
        assert before <= record.created_at <= datetime.now(UTC) + timedelta(seconds=2)
        assert record.size_bytes == first.manifest.size_bytes
        assert (record.aliases, records[1].aliases) == (("champion",), ())
        assert (record.task, record.peft_type, record.rank, record.labels) == ("causal-lm", "LORA", 4, ())
        assert record.base_reference == f"folder:{base_folder}"
        assert record.base_fingerprint == first.manifest.base_fingerprint
        assert (record.deprecated, record.signed) == (None, False)

    def test_adapters_are_listed_by_name(self, registry: Backend, content: Callable[[int], Path]) -> None:
        assert registry.adapters() == []
        registry.push(content(1), "team/b", aliases=["champion"])
        registry.push(content(2), "team/b")
        registry.push(content(1), "team/a")
        found = registry.adapters()
        assert [summary.name for summary in found] == ["team/a", "team/b"]
        assert (found[1].version, found[1].versions, dict(found[1].alias_versions)) == (2, 2, {"champion": 1})
        assert found[1].digest == registry.resolve("team/b").digest
        assert [summary.name for summary in registry.adapters("team/b")] == ["team/b"]
        assert registry.adapters("team/c") == []

    def test_the_same_content_again_is_a_new_version(self, registry: Backend, content: Callable[[int], Path]) -> None:
        first = registry.push(content(1), NAME)
        registry.push(content(2), NAME)
        again = registry.push(content(1), NAME)
        assert (again.version, again.digest, again.same_as) == (3, first.digest, 1)
        twice = registry.push(content(1), NAME)
        assert (twice.version, twice.digest, twice.new_bytes) == (4, first.digest, 0)
        assert [record.digest for record in registry.versions(NAME)].count(first.digest) == 3
        assert registry.resolve(f"{NAME}@{first.digest}").version == 4

    def test_a_number_can_be_asked_for(self, registry: Backend, content: Callable[[int], Path]) -> None:
        registry.push(content(1), NAME, number=1)
        for taken in (1, 0):
            with pytest.raises((Conflict, InvalidArgument)):
                registry.push(content(2), NAME, number=taken)
        assert [record.version for record in registry.versions(NAME)] == [1]
        assert registry.push(content(2), NAME, number=2).version == 2

    def test_what_was_said_is_in_the_manifest(self, registry: Backend, content: Callable[[int], Path]) -> None:
        parent = registry.push(content(1), NAME)
        child = registry.push(content(2), NAME, parents=[parent.digest])
        assert child.manifest.parents == (parent.digest,)
        assert registry.snapshot(f"{NAME}@2").manifest == child.manifest

    def test_the_manifest_is_that_of_any_registry(
        self, registry: Backend, content: Callable[[int], Path], tmp_path: Path
    ) -> None:
        from adapterbay.registry import Registry

        elsewhere = Registry.open(tmp_path / "elsewhere")
        assert elsewhere.push(content(1), "other/name").digest == registry.push(content(1), NAME).digest
        elsewhere.close()

    # Files

    def test_a_snapshot_is_what_was_pushed(self, registry: Backend, content: Callable[[int], Path]) -> None:
        folder = content(1)
        (folder / "README.md").write_text("# Tales\n\nWritten by hand: naïve café, 你好.\n", encoding="utf-8")
        receipt = registry.push(folder, NAME, aliases=["champion"])
        registry.push(content(2), NAME)
        for reference in (f"{NAME}@1", f"{NAME}@champion", f"{NAME}@{receipt.digest}"):
            snapshot = registry.snapshot(reference)
            assert snapshot.manifest == receipt.manifest
            assert set(snapshot.files) == {entry.path for entry in receipt.manifest.files}
            for entry in receipt.manifest.files:
                assert snapshot.files[entry.path].read_bytes() == (folder / entry.path).read_bytes()
                assert digest_file(snapshot.files[entry.path]) == entry.digest

    def test_a_pulled_folder_is_plain_and_the_same_version_again(
        self, registry: Backend, content: Callable[[int], Path], tmp_path: Path
    ) -> None:
        receipt = registry.push(content(1), NAME)
        folder = registry.pull(NAME, tmp_path / "pulled")
        assert digest_file(folder / MANIFEST_PATH) == receipt.digest
        assert (folder / "adapter_model.safetensors").read_bytes() == (
            content(1) / "adapter_model.safetensors"
        ).read_bytes()
        assert {path.name for path in folder.iterdir()} == {
            "adapterbay",
            *(entry.path for entry in receipt.manifest.files),
        }
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        again = registry.push(folder, "team/copy")
        assert (again.digest, again.manifest) == (receipt.digest, receipt.manifest)
        with pytest.raises(InvalidArgument):
            registry.pull(NAME, folder)

    def test_a_file_that_a_version_lost_is_gone(
        self, registry: Backend, content: Callable[[int], Path], tmp_path: Path
    ) -> None:
        first = content(1)
        (first / "training.json").write_text(json.dumps({"metrics": {"accuracy": 0.5}}))
        registry.push(first, NAME)
        registry.push(content(2), NAME)
        assert dict(registry.version(NAME, 1).metrics) == {"accuracy": 0.5}
        assert (registry.pull(f"{NAME}@1", tmp_path / "one") / "training.json").is_file()
        assert not (registry.pull(f"{NAME}@2", tmp_path / "two") / "training.json").exists()

    # Refusals

    def test_a_refused_push_leaves_nothing(self, registry: Backend, content: Callable[[int], Path]) -> None:
        spoiled = Draft(content(1))
        spoiled.edit_config(not_a_setting=1)
        with pytest.raises(Rejected) as caught:
            registry.push(spoiled.path, NAME, aliases=["champion"])
        assert caught.value.reason == "UNKNOWN_CONFIG_KEY"
        with pytest.raises(NotFound):
            registry.versions(NAME)
        assert registry.adapters() == []
        registry.push(content(2), NAME)
        with pytest.raises(Rejected):
            registry.push(spoiled.path, NAME, aliases=["champion"])
        assert [record.version for record in registry.versions(NAME)] == [1]
        assert registry.aliases(NAME) == {}

    def test_a_base_that_is_not_there(self, registry: Backend, content: Callable[[int], Path], tmp_path: Path) -> None:
        with pytest.raises(BaseNotFound):
            registry.push(content(1), NAME, base=f"folder:{tmp_path / 'nothing'}")
        assert registry.adapters() == []

    def test_what_is_not_there(self, registry: Backend, content: Callable[[int], Path], tmp_path: Path) -> None:
        for ask in (registry.versions, registry.aliases, registry.history, registry.resolve, registry.snapshot):
            with pytest.raises(NotFound):
                ask("team/nothing")
        receipt = registry.push(content(1), NAME, aliases=["champion"])
        for selector in ("2", "challenger", "sha256:" + "0" * 64):
            with pytest.raises(NotFound) as caught:
                registry.resolve(f"{NAME}@{selector}")
            assert NAME in caught.value.message
        with pytest.raises(NotFound):
            registry.version(NAME, 2)
        with pytest.raises(NotFound):
            registry.pull(f"{NAME}@2", tmp_path / "two")
        assert not (tmp_path / "two").exists()
        assert f"{NAME}@champion" in _near(registry, f"{NAME}@champoin")
        assert registry.resolve(f"{NAME}@{receipt.digest}").version == 1

    @pytest.mark.parametrize("name", ["", "team/", "/tales", "team/../x", "team/ta les", "team\\tales", "team/tàles"])
    def test_names_outside_the_grammar(self, registry: Backend, content: Callable[[int], Path], name: str) -> None:
        with pytest.raises(InvalidReference):
            registry.push(content(1), name)
        with pytest.raises(InvalidReference):
            registry.resolve(name)

    # Aliases

    def test_aliases(self, registry: Backend, content: Callable[[int], Path]) -> None:
        registry.push(content(1), NAME, aliases=["champion"])
        registry.push(content(2), NAME)
        assert registry.aliases(NAME) == {"champion": 1}
        move = registry.set_alias(NAME, "champion", 2)
        assert (move.alias, move.previous, move.version) == ("champion", 1, 2)
        move = registry.set_alias(NAME, "challenger", 1, expected=None)
        assert (move.previous, move.version) == (None, 1)
        assert registry.aliases(NAME) == {"challenger": 1, "champion": 2}
        assert registry.resolve(f"{NAME}@champion").version == 2
        assert registry.version(NAME, 1).aliases == ("challenger",)
        removed = registry.remove_alias(NAME, "challenger", expected=1)
        assert (removed.previous, removed.version) == (1, None)
        assert registry.aliases(NAME) == {"champion": 2}
        registry.push(content(3), NAME, aliases=["champion", "newest"])
        assert registry.aliases(NAME) == {"champion": 3, "newest": 3}

    def test_an_alias_moves_by_compare_and_swap(self, registry: Backend, content: Callable[[int], Path]) -> None:
        registry.push(content(1), NAME, aliases=["champion"])
        registry.push(content(2), NAME)
        for expected in (None, 2):
            with pytest.raises(StaleAlias) as caught:
                registry.set_alias(NAME, "champion", 2, expected=expected)
            assert caught.value.metadata["current_version"] == "1"
        with pytest.raises(StaleAlias):
            registry.remove_alias(NAME, "champion", expected=2)
        with pytest.raises(StaleAlias):
            registry.set_alias(NAME, "challenger", 2, expected=1)
        assert registry.aliases(NAME) == {"champion": 1}
        assert registry.set_alias(NAME, "champion", 2, expected=1).previous == 1

    def test_what_no_alias_can_be(self, registry: Backend, content: Callable[[int], Path]) -> None:
        registry.push(content(1), NAME)
        for alias in ("latest", "Champion", "3", "a b", ""):
            with pytest.raises(InvalidReference):
                registry.set_alias(NAME, alias, 1)
        with pytest.raises(NotFound):
            registry.set_alias(NAME, "champion", 2)
        with pytest.raises(NotFound):
            registry.set_alias("team/nothing", "champion", 1)
        with pytest.raises(NotFound):
            registry.remove_alias(NAME, "champion")
        assert registry.aliases(NAME) == {}

    def test_rollback(self, registry: Backend, content: Callable[[int], Path]) -> None:
        for number in (1, 2, 3):
            registry.push(content(number), NAME)
        for version in (1, 2, 3):
            registry.set_alias(NAME, "champion", version)
        move = registry.rollback(NAME, "champion")
        assert (move.previous, move.version) == (3, 2)
        assert registry.resolve(f"{NAME}@champion").version == 2
        assert registry.rollback(NAME, "champion").version == 1
        with pytest.raises(NotFound):
            registry.rollback(NAME, "champion")
        with pytest.raises(NotFound):
            registry.rollback(NAME, "challenger")
        assert registry.aliases(NAME) == {"champion": 1}

    def test_history(self, registry: Backend, content: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
        first = registry.push(content(1), NAME, aliases=["champion"])
        second = registry.push(content(2), NAME)
        registry.set_alias(NAME, "champion", 2)
        registry.remove_alias(NAME, "champion")
        events = registry.history(NAME)
        assert [(event.kind, event.version, event.alias, event.previous_version) for event in events] == [
            ("pushed", 1, None, None),
            ("alias_set", 1, "champion", None),
            ("pushed", 2, None, None),
            ("alias_set", 2, "champion", 1),
            ("alias_removed", events[4].version, "champion", 2),
        ]
        assert [events[0].digest, events[2].digest] == [first.digest, second.digest]
        sequences = [event.sequence for event in events]
        assert sequences == sorted(set(sequences))
        times = [event.at for event in events]
        assert times == sorted(times)
        assert all(event.name == NAME and event.by for event in events)

    # Whole

    def test_verify(self, registry: Backend, content: Callable[[int], Path]) -> None:
        registry.push(content(1), NAME, aliases=["champion"])
        registry.push(content(2), NAME)
        registry.push(content(3), "team/other")
        report = registry.verify()
        assert (report.ok, report.checked_versions) == (True, 3), report.problems
        assert registry.verify(NAME).checked_versions == 2
        with pytest.raises(NotFound):
            registry.verify("team/nothing")

    def test_another_object_sees_every_write_at_once(self, place: Place, content: Callable[[int], Path]) -> None:
        writer, reader = place.open(), place.open()
        writer.push(content(1), NAME)
        assert reader.resolve(NAME).version == 1
        writer.push(content(2), NAME, aliases=["champion"])
        assert (reader.resolve(NAME).version, reader.aliases(NAME)) == (2, {"champion": 2})
        reader.set_alias(NAME, "champion", 1)
        assert writer.resolve(f"{NAME}@champion").version == 1
        writer.close()
        reader.close()

    def test_pushers_at_once_leave_one_version_each(self, place: Place, content: Callable[[int], Path]) -> None:
        folders = [content(number) for number in range(4)]
        start = threading.Barrier(len(folders))

        def push(folder: Path) -> tuple[int, str]:
            backend = place.open()
            start.wait()
            receipt = backend.push(folder, NAME)
            backend.close()
            return receipt.version, receipt.digest

        with ThreadPoolExecutor(len(folders)) as pool:
            pushed = dict(pool.map(push, folders))
        assert sorted(pushed) == [1, 2, 3, 4]
        registry = place.open()
        assert {record.version: record.digest for record in registry.versions(NAME)} == pushed
        assert registry.verify().ok
        registry.close()

    def test_of_movers_from_one_place_one_wins(self, place: Place, content: Callable[[int], Path]) -> None:
        registry = place.open()
        for number in (1, 2, 3):
            registry.push(content(number), NAME)
        registry.set_alias(NAME, "champion", 1)
        start = threading.Barrier(2)

        def move(version: int) -> int | None:
            backend = place.open()
            start.wait()
            try:
                return backend.set_alias(NAME, "champion", version, expected=1).version
            except StaleAlias:
                return None
            finally:
                backend.close()

        with ThreadPoolExecutor(2) as pool:
            moved = [version for version in pool.map(move, (2, 3)) if version is not None]
        assert len(moved) == 1
        assert registry.aliases(NAME) == {"champion": moved[0]}
        registry.close()


def _near(registry: Backend, reference: str) -> tuple[str, ...]:
    with pytest.raises(NotFound) as caught:
        registry.resolve(reference)
    return caught.value.near
