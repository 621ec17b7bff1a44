"""Export and import: digests, numbers, aliases and tags travel in one file; a spoiled file brings nothing in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry_tools import Draft, Tiny, tree
from signing_tools import make_keys

from adapterbay.registry import Registry
from adapterbay.registry.archive import HEADER, export_archive, import_archive
from adapterbay.registry.errors import AdapterbayError, Conflict, Corrupted, InvalidArgument, NotFound, Rejected
from adapterbay.registry.gate import Guard
from adapterbay.registry.signing import sign

DraftOf = Callable[[Tiny], Draft]


@pytest.fixture
def store(registry: Registry, llama: Tiny, bert: Tiny, draft: DraftOf, tmp_path: Path) -> Registry:
    for number in range(3):
        made = draft(llama)
        made.edit_tensors(lambda tensors, number=number: next(iter(tensors.values())).flat.__setitem__(0, number + 9.0))
        registry.push(made.path, "team/x", aliases=["champion"])
    registry.delete("team/x", 2)
    registry.tag("team/x", 3, {"language": "zh"})
    registry.deprecate("team/x", 1, "old")
    registry.attach_signature("team/x", 3, sign(registry.snapshot("team/x@3"), make_keys(tmp_path, "key").private))
    registry.push(bert.adapter, "team/y", aliases=["best"])
    return registry


def versions(registry: Registry, name: str) -> list[tuple[Any, ...]]:
    return [
        (record.version, record.digest, record.tags, record.deprecated, record.signed, record.aliases)
        for record in registry.versions(name)
    ]


def test_versions_arrive_as_they_left(store: Registry, tmp_path: Path) -> None:
    archive = tmp_path / "out" / "adapters.tar"
    report = export_archive(store, ["team/x", "team/y@best"], archive)
    assert (report.versions, report.size_bytes) == (3, archive.stat().st_size)
    other = Registry.open(tmp_path / "other", by="courier")
    assert import_archive(other, archive).versions == 3
    for name in ("team/x", "team/y"):
        assert versions(other, name) == versions(store, name)
    digest = other.resolve("team/x@3").digest
    assert other.signature(digest) == store.signature(digest) is not None
    assert other.history("team/x")[0].by == "courier"
    assert other.verify().ok
    last = other.last_event()
    again = import_archive(other, archive)
    assert (again.versions, again.skipped, other.last_event()) == (0, 3, last)
    assert [path for path in tree(other.root) if path.startswith("tmp/")] == []


def test_the_file_depends_on_its_content_alone(store: Registry, tmp_path: Path) -> None:
    export_archive(store, ["team/x", "team/y"], tmp_path / "a")
    export_archive(store, ["team/y", "team/x@3", "team/x"], tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(InvalidArgument, match="there already"):
        export_archive(store, ["team/x"], tmp_path / "a")
    for references in ([], ["team/z"], ["team/x@2"]):
        with pytest.raises((InvalidArgument, NotFound)):
            export_archive(store, references, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_other_content_under_a_number_stops_all_of_it(store: Registry, llama: Tiny, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    export_archive(store, ["team/x", "team/y"], archive)
    other = Registry.open(tmp_path / "other")
    other.push(llama.adapter, "team/x", aliases=["champion"])
    before = tree(other.root)
    with pytest.raises(Conflict, match="team/x@1") as conflict:
        import_archive(other, archive)
    assert conflict.value.reason == "VERSION_TAKEN"
    assert tree(other.root) == before


def test_an_alias_that_points_elsewhere_stays(store: Registry, tmp_path: Path) -> None:
    export_archive(store, ["team/x@1"], tmp_path / "one")
    export_archive(store, ["team/x"], tmp_path / "all")
    other = Registry.open(tmp_path / "other")
    import_archive(other, tmp_path / "one")
    other.set_alias("team/x", "champion", 1)
    report = import_archive(other, tmp_path / "all")
    assert report.notes == ("team/x@champion stays at 1 (in the archive: 3)",)
    assert other.aliases("team/x") == {"champion": 1}


def test_an_import_that_was_cut_off_is_finished_by_the_next(
    store: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_archive(store, ["team/x", "team/y"], tmp_path / "all")
    other = Registry.open(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(other, "tag", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_archive(other, tmp_path / "all")
    assert import_archive(other, tmp_path / "all").versions == 0
    for name in ("team/x", "team/y"):
        assert versions(other, name) == versions(store, name)


def test_what_was_decided_here_stays(store: Registry, tmp_path: Path) -> None:
    """A guard here, and a deletion here: the rest of the archive still comes in."""
    export_archive(store, ["team/x", "team/y"], tmp_path / "all")
    other = Registry.open(tmp_path / "other")
    other.guard(None, "champion", Guard(minimum={"accuracy": 0.8}))
    report = import_archive(other, tmp_path / "all")
    (note,) = report.notes
    assert note.startswith("team/x@champion was not set: ")
    assert "accuracy must be at least 0.8" in note
    assert (other.aliases("team/x"), other.aliases("team/y")) == ({}, {"best": 1})
    assert other.version("team/x", 3).tags == {"language": "zh"}
    other.delete("team/x", 3)
    (note,) = import_archive(other, tmp_path / "all").notes
    assert "team/x@champion was not set: team/x@3 was deleted" in note


def members(archive: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def write(archive: Path, content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(archive, "w") as tar:
        for member, data in content:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))


def spoil_no_header(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    del content[0]


def spoil_escape(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content.append((tarfile.TarInfo("../../evil"), b"x"))


def spoil_link(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content[1][0].type = tarfile.SYMTYPE
    content[1][0].linkname = "/etc/passwd"


def spoil_missing(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    del content[-1]


def spoil_twice(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    content.append(content[-1])


def spoil_bytes(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    member, data = content[-1]
    content[-1] = (member, data[:-1] + b"!")


def spoil_header(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    member, data = content[0]
    content[0] = (member, json.dumps(json.loads(data) | {"more": 1}).encode())


def spoil_name(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    member, data = content[0]
    content[0] = (member, data.replace(b'"team/x"', b'"../../x"'))


SPOILED = [
    (spoil_no_header, "BAD_ARCHIVE"),
    (spoil_escape, "BAD_ARCHIVE"),
    (spoil_link, "BAD_ARCHIVE"),
    (spoil_missing, "BAD_ARCHIVE"),
    (spoil_twice, "BAD_ARCHIVE"),
    (spoil_bytes, "CORRUPTED"),
    (spoil_header, "BAD_ARCHIVE"),
    (spoil_name, "INVALID_REFERENCE"),
]


@pytest.mark.parametrize(("spoil", "reason"), SPOILED, ids=[spoil.__name__ for spoil, _ in SPOILED])
def test_a_spoiled_archive_brings_nothing(
    store: Registry, tmp_path: Path, spoil: Callable[[Any], None], reason: str
) -> None:
    archive = tmp_path / "a.tar"
    export_archive(store, ["team/x@3"], archive)
    content = members(archive)
    assert content[0][0].name == HEADER
    spoil(content)
    write(archive, content)
    other = Registry.open(tmp_path / "other")
    before = tree(other.root)
    with pytest.raises(AdapterbayError) as refused:
        import_archive(other, archive)
    assert refused.value.reason == reason
    assert tree(other.root) == before
    assert not (tmp_path / "evil").exists()


def test_other_files(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        import_archive(registry, tmp_path / "nothing")
    for content in (b"", b"PK\x03\x04", b"\x1f\x8b" + b"0" * 600, b"x" * 2048):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises((Rejected, Corrupted)):
            import_archive(registry, tmp_path / "file")
