"""Hostile files: links, pipes, and files that change while they are read."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_tools import checked, files_of, refused
from registry_tools import Draft, Tiny, tree

from adapterbay.registry import BaseReference, Registry, admit, locate
from adapterbay.registry.admission import folder as folders
from adapterbay.registry.admission.folder import read_folder
from adapterbay.registry.admission.regular_file import open_regular
from adapterbay.registry.errors import AdapterbayError, BaseNotFound, NotFound, Rejected

DraftOf = Callable[[Tiny], Draft]


def push_fails(registry: Registry, folder: Path, reason: str) -> Rejected:
    """Soon, and nothing is left."""
    before = tree(registry.root)
    began = time.process_time()
    error = refused(reason, lambda: registry.push(folder, "x"))
    assert time.process_time() - began < 20
    assert tree(registry.root) == before
    return error


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "README.md", "config.json", "other"]
)
class TestLinks:
    def link(self, draft: Draft, name: str, target: Path | str) -> Path:
        (draft.path / name).unlink(missing_ok=True)
        (draft.path / name).symlink_to(target)
        return draft.path

    def test_to_a_file_outside(
        self, llama: Tiny, draft: DraftOf, registry: Registry, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "secret").write_text("{}")
        push_fails(registry, self.link(draft(llama), name, tmp_path / "secret"), "PATH_OUTSIDE")
        push_fails(registry, self.link(draft(llama), name, "../secret"), "PATH_OUTSIDE")

    def test_to_nowhere_and_in_circles(self, llama: Tiny, draft: DraftOf, registry: Registry, name: str) -> None:
        push_fails(registry, self.link(draft(llama), name, "nowhere"), "MISSING_FILE")
        push_fails(registry, self.link(draft(llama), name, name), "MISSING_FILE")
        circle = draft(llama)
        (circle.path / "b").symlink_to(name)
        push_fails(registry, self.link(circle, name, "b"), "MISSING_FILE")

    def test_to_folders_and_devices(self, llama: Tiny, draft: DraftOf, registry: Registry, name: str) -> None:
        push_fails(registry, self.link(draft(llama), name, "/dev/zero"), "PATH_OUTSIDE")
        push_fails(registry, self.link(draft(llama), name, "/"), "PATH_OUTSIDE")
        inside = draft(llama)
        (inside.path / "folder").mkdir()
        push_fails(registry, self.link(inside, name, "folder"), "NOT_A_FILE")

    def test_to_a_pipe_inside(self, llama: Tiny, draft: DraftOf, registry: Registry, name: str) -> None:
        inside = draft(llama)
        os.mkfifo(inside.path / "zpipe")
        push_fails(registry, self.link(inside, name, "zpipe"), "NOT_A_FILE")

    def test_pipes_and_sockets(
        self, llama: Tiny, draft: DraftOf, registry: Registry, name: str, monkeypatch: Any
    ) -> None:
        pipe = draft(llama)
        (pipe.path / name).unlink(missing_ok=True)
        os.mkfifo(pipe.path / name)
        push_fails(registry, pipe.path, "NOT_A_FILE")
        plug = draft(llama)
        (plug.path / name).unlink(missing_ok=True)
        monkeypatch.chdir(plug.path)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(name)
            push_fails(registry, plug.path, "NOT_A_FILE")

    def test_a_link_inside_and_a_hard_link_are_fine(
        self, llama: Tiny, draft: DraftOf, registry: Registry, tmp_path: Path, name: str
    ) -> None:
        linked = draft(llama)
        source = llama.adapter / name
        if not source.exists():
            return
        shutil.move(linked.path / name, linked.path / "real.txt")
        self.link(linked, name, "real.txt")
        hard = draft(llama)
        (hard.path / name).unlink()
        shutil.copy(source, tmp_path / "elsewhere")
        os.link(tmp_path / "elsewhere", hard.path / name)
        digests = {registry.push(folder, "x").digest for folder in (llama.adapter, linked.path, hard.path)}
        assert len(digests) == 1


def test_a_base_folder_of_pipes_does_not_block(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    os.mkfifo(base / "config.json")
    with pytest.raises(BaseNotFound):
        locate(str(base))


def test_a_pipe_at_load_does_not_block(llama: Tiny, tmp_path: Path) -> None:
    base = locate(str(llama.base))
    os.mkfifo(tmp_path / "pipe")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        files = files_of(llama.adapter) | {name: tmp_path / "pipe"}
        refused("NOT_A_FILE", lambda files=files: admit(files, base.tensor_shapes(), base_config=base.config))
        missing = files | {name: tmp_path / "missing"}
        refused("MISSING_FILE", lambda files=missing: admit(files, base.tensor_shapes(), base_config=base.config))


def test_the_hub_cache(llama: Tiny, registry: Registry, tmp_path: Path) -> None:
    """Links to the blobs of its own repository, in folders too, and to nothing else."""
    cache = tmp_path / "models--org--name"
    commit = cache / "snapshots" / ("1" * 40)
    inner = commit / "checkpoint-5"
    inner.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(llama.adapter.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (commit / file.name).symlink_to(f"../../blobs/{number}")
        (inner / file.name).symlink_to(f"../../../blobs/{number}")
    plain = registry.push(llama.adapter, "x").digest
    assert registry.push(commit, "x").digest == registry.push(inner, "x").digest == plain
    other = tmp_path / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("{}")
    (commit / "README.md").unlink()
    (commit / "README.md").symlink_to("../../../models--org--private/blobs/0")
    push_fails(registry, commit, "PATH_OUTSIDE")


def test_a_file_that_becomes_a_link_or_a_pipe_after_it_was_checked(
    llama: Tiny, draft: DraftOf, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the folder and the copy. What is read is what was opened, never what a path says by then."""
    import adapterbay.registry.local.store as store

    (tmp_path / "secret").write_text("my key")

    def swapped(replace: Callable[[Path], object]) -> Callable[[Any], Any]:
        def read(given: Any) -> Any:
            found = read_folder(given)
            path = found.files["README.md"]
            path.unlink()
            replace(path)
            return found

        return read

    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda path: path.symlink_to(tmp_path / "secret"), "PATH_OUTSIDE"),
        (lambda path: path.symlink_to("/dev/zero"), "PATH_OUTSIDE"),
        (lambda path: os.mkfifo(path), "NOT_A_FILE"),
        (lambda path: path.mkdir(), "NOT_A_FILE"),
        (lambda _: None, "MISSING_FILE"),
    ]
    for replace, reason in cases:
        bad = draft(llama)
        monkeypatch.setattr(store, "read_folder", swapped(replace))
        with pytest.raises((Rejected, OSError)) as caught:
            registry.push(bad.path, "x")
        assert isinstance(caught.value, Rejected), caught.value
        assert caught.value.reason in (reason, "NOT_A_FILE")
    assert registry.adapters() == []


def test_the_type_is_asked_of_the_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap between the check of the path and its opening."""
    victim, pipe = tmp_path / "victim", tmp_path / "pipe"
    victim.write_text("x")
    os.mkfifo(pipe)
    really_open = os.open

    def swap_and_open(path: Any, *rest: Any, **more: Any) -> int:
        if Path(path) == victim:
            pipe.replace(victim)
        return really_open(path, *rest, **more)

    monkeypatch.setattr(os, "open", swap_and_open)
    refused("NOT_A_FILE", lambda: open_regular(victim, "victim"))


def test_links_that_are_swapped_all_the_time(llama: Tiny, draft: DraftOf, registry: Registry, tmp_path: Path) -> None:
    """A real race: whatever wins, the secret is never stored."""
    secret = tmp_path / "secret"
    secret.write_text("my key")
    racing = draft(llama)
    target = racing.path / "README.md"
    at_first = target.read_bytes()
    stop = threading.Event()

    def swap() -> None:
        spare = tmp_path / "spare"
        while not stop.is_set():
            spare.write_text("# Card")
            spare.replace(target)
            spare.symlink_to(secret)
            spare.replace(target)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(40):
            try:
                receipt = registry.push(racing.path, "x")
            except AdapterbayError:
                continue
            assert registry.open_snapshot(receipt.digest).read("README.md") in (b"# Card", at_first)
    finally:
        stop.set()
        thread.join()
    assert b"my key" not in {content for content in tree(registry.root).values() if content}


def test_odd_file_names_are_left_out_and_shown_safely(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    odd = draft(llama)
    for name in (b"\xff\xfe.txt", b"a\x1b[2Jb.txt", "x\u202etxt.cod".encode(), "语.txt".encode(), b"a\nb.txt"):
        (Path(os.fsdecode(os.fsencode(odd.path) + b"/" + name))).write_text("x")
    finding = next(line for line in registry.push(odd.path, "x").findings if line.startswith("left out"))
    assert finding.isprintable()
    finding.encode()
    assert "语.txt" in finding


def test_thousands_of_files_are_counted(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    many = draft(llama)
    for number in range(2000):
        (many.path / f"n{number}.txt").write_text("")
    finding = next(line for line in registry.push(many.path, "x").findings if line.startswith("left out"))
    assert len(finding) < 1100
    assert "1980 more" in finding


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    locked = draft(llama)
    locked.path.chmod(0)
    with pytest.raises(AdapterbayError):
        registry.push(locked.path, "x")


@pytest.mark.parametrize("given", ["nowhere", "a\0b", "x" * 5000, "~nobody-of-this-name/x"], ids=ascii)
def test_a_folder_that_is_none(registry: Registry, given: str) -> None:
    with pytest.raises((NotFound, AdapterbayError)) as caught:
        registry.push(given, "x")
    checked(caught.value)


@pytest.mark.parametrize(
    "given", ["folder:" + "x" * 5000, "~nobody-of-this-name/x", "x" * 100_000 + ".gguf", "./a\0b"], ids=len
)
def test_a_base_that_is_none(given: str) -> None:
    with pytest.raises(AdapterbayError) as caught:
        locate(given)
    checked(caught.value)
    with pytest.raises(AdapterbayError):
        locate(BaseReference.parse(given))


def test_code_is_not_run_by_looking(llama: Tiny, draft: DraftOf, tmp_path: Path) -> None:
    """A whole process pushes a folder whose every document names code; nothing of it is imported."""
    bad = draft(llama)
    proof = tmp_path / "was-run"
    package = tmp_path / "planted"
    package.mkdir()
    (package / "planted.py").write_text(f"open({str(proof)!r}, 'w')")
    bad.edit_config(
        task_type=None, auto_mapping={"base_model_class": "Evil", "parent_library": "planted"}, megatron_core="planted"
    )
    script = "import sys; from adapterbay.registry import Registry; Registry.open(sys.argv[1]).push(sys.argv[2], 'x')"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store"), str(bad.path)],
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "auto_mapping.parent_library='planted'" in done.stderr
    assert not proof.exists()


def test_trainer_states_are_named_exactly() -> None:
    assert folders.is_trainer_state("training_args.bin")
    assert folders.is_trainer_state("zero_to_fp32.py")
    for name in (
        "training_args.bin.py",
        "xtraining_args.bin",
        "optimizer.pt.pt",
        "rng_state_x.pth",
        "adapter_model.bin",
    ):
        assert not folders.is_trainer_state(name)
