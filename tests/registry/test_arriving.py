"""A checkpoint that another thread still reads: its header is there before its tensors, and both are of one file."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from registry_tools import Tiny

from adapterbay.registry import Registry
from adapterbay.registry.admission.arriving import AT_LEAST, Arriving, whole_of
from adapterbay.registry.admission.safetensors_file import open_source, read_header
from adapterbay.registry.errors import Corrupted
from adapterbay.registry.manifest import WEIGHTS_FILE


class Slow:
    """A file whose beginning is there at once and whose rest comes when it is let go."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.rest = threading.Event()
        self.reads: list[int | None] = []

    def __call__(self, count: int | None) -> bytes:
        self.reads.append(count)
        if count is None:
            assert self.rest.wait(20)
        return self.data if count is None else self.data[:count]


@pytest.fixture
def checkpoint(llama: Tiny) -> bytes:
    return (llama.adapter / WEIGHTS_FILE).read_bytes()


def test_the_header_does_not_wait_for_the_tensors(checkpoint: bytes) -> None:
    slow = Slow(checkpoint)
    source = Arriving(WEIGHTS_FILE, len(checkpoint), slow)
    reader = threading.Thread(target=source.whole)
    reader.start()
    try:
        assert read_header(source, WEIGHTS_FILE) == read_header(checkpoint, WEIGHTS_FILE)
    finally:
        slow.rest.set()
        reader.join()
    assert whole_of(source) == whole_of(checkpoint) == checkpoint
    assert slow.reads.count(None) == 1, "it is read whole once, whoever asks"


def test_a_stream_ends_where_the_file_does() -> None:
    data = bytes(range(256)) * 300
    slow = Slow(data)
    with open_source(Arriving(WEIGHTS_FILE, len(data), slow)) as file:
        assert file.read(9) == data[:9]
        assert slow.reads == [AT_LEAST]
        file.seek(-5, 2)
        assert file.read(100) == data[-5:]
        assert file.read(1) == b""
        file.seek(70_000)
        assert (file.tell(), file.read(3)) == (70_000, data[70_000:70_003])


def test_a_file_that_changes_meanwhile_is_refused(checkpoint: bytes) -> None:
    slow = Slow(checkpoint)
    slow.rest.set()
    source = Arriving(WEIGHTS_FILE, len(checkpoint), slow)
    read_header(source, WEIGHTS_FILE)
    slow.data = checkpoint[:8] + b"[" + checkpoint[9:]
    with pytest.raises(Corrupted, match=f"{WEIGHTS_FILE} was altered"):
        source.whole()


def test_what_a_registry_holds_arrives(tmp_path: Path, llama: Tiny, checkpoint: bytes) -> None:
    store = Registry.open(tmp_path / "store")
    store.push(llama.adapter, "tales", base=f"folder:{llama.base}")
    manifest = store.manifest(store.resolve("tales").digest)
    contents = store.contents(manifest)
    contents.verify()
    assert whole_of(contents.files[WEIGHTS_FILE]) == checkpoint
    (entry,) = [entry for entry in manifest.files if entry.path == WEIGHTS_FILE]
    blob = store.blobs.path(entry.digest)
    blob.chmod(0o644)
    blob.write_bytes(checkpoint[:-1] + bytes([checkpoint[-1] ^ 1]))
    with pytest.raises(Corrupted, match=WEIGHTS_FILE):
        store.contents(manifest).verify()
    blob.unlink()
    with pytest.raises(Corrupted, match="cannot be read"):
        read_header(store.contents(manifest).files[WEIGHTS_FILE], WEIGHTS_FILE)
