"""The cache of kernels: what is damaged there is built anew, never loaded. The real compiler builds a one-line library.

It is loaded through ctypes, too, so that its number says whether the bytes that ran are those that were built.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adapterbay.registry.errors import Unavailable
from adapterbay.server.kernels import cache, loader

MARK = b"adapterbay-answers-"
SOURCE = 'static const volatile char text[] = "adapterbay-answers-7"; extern "C" int answer() { return text[19] - 48; }'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the compiler notes each of its calls in `calls`."""
    if loader.find_compiler() is None:
        pytest.skip(loader.NO_COMPILER)
    wrapper = tmp_path / "compiler"
    wrapper.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || echo >> {tmp_path}/calls\nexec {loader.find_compiler()} "$@"\n'
    )
    wrapper.chmod(0o755)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "ops.cpp").write_text(SOURCE)
    monkeypatch.setattr(loader, "SOURCES", tmp_path / "src")
    monkeypatch.setattr(loader, "FLAGS", ("-fPIC",))
    monkeypatch.setattr(loader, "_state", None)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("ADAPTERBAY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("adapterbay.server.kernels.ops._fakes", True)  # these are no operators
    return tmp_path / "home" / "cache" / "kernels"


def builds(folder: Path) -> int:
    """How often something was compiled and linked."""
    calls = folder.parents[2] / "calls"
    return len(calls.read_text().splitlines()) // 2 if calls.exists() else 0


def start(monkeypatch: pytest.MonkeyPatch) -> tuple[loader.Kernels, int]:
    """As a server that starts; and what the loaded library answers."""
    loaded: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(loader, "_state", None)
        was = torch.ops.load_library
        patch.setattr(torch.ops, "load_library", lambda path: (was(path), loaded.append(ctypes.CDLL(path).answer())))
        kernels = loader.load("on")
    (answer,) = loaded
    return kernels, answer  # type: ignore[return-value]


def flip(library: Path) -> None:
    """One byte of its data: it would load, and answer 6."""
    library.write_bytes(library.read_bytes().replace(MARK + b"7", MARK + b"6"))


def be_a_folder(library: Path) -> None:
    library.unlink()
    (library / "inside").mkdir(parents=True)


def point_nowhere(library: Path) -> None:
    library.unlink()
    library.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte": flip,
    "cut off": lambda library: library.write_bytes(library.read_bytes()[:5000]),
    "empty": lambda library: library.write_bytes(b""),
    "a folder": be_a_folder,
    "not readable": point_nowhere,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_built_anew(
    damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert start(monkeypatch)[0].compiled
    assert not start(monkeypatch)[0].compiled
    (library,) = folder.glob("*.so")
    shutil.copy(library, aside := library.with_name("aside"))  # a new inode: ctypes has the old one loaded
    aside.replace(library)
    DAMAGES[damage](library)
    kernels, answer = start(monkeypatch)
    assert kernels.compiled
    assert answer == 7
    assert [record.levelno for record in caplog.records if "damaged" in record.message] == [logging.WARNING]
    assert not start(monkeypatch)[0].compiled
    assert builds(folder) == 2
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]


def test_a_cache_that_cannot_be_used_is_done_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("no folder")
    for _ in range(2):
        kernels, answer = start(monkeypatch)
        assert kernels.compiled
        assert answer == 7
    assert "compiled at every start" in caplog.text
    assert builds(folder) == 2


def test_processes_that_start_together_compile_once(folder: Path) -> None:
    """Each opens the lock for itself, as another process does. What a killed one left is cleared away."""
    (folder / "build-key-left").mkdir(parents=True)
    (folder / "build-other-under-way").mkdir()

    def build(work: Path) -> Path:
        return loader.build(str(loader.find_compiler()), work)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cache.kept(folder, "key", build), range(4)))
    assert len({path for path, _ in found}) == 1
    assert sorted(built for _, built in found) == [False, False, False, True]
    assert builds(folder) == 1
    assert [path.name for path in folder.glob("build-*")] == ["build-other-under-way"]


def test_only_a_missing_compiler_is_told_to_be_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (loader.SOURCES / "ops.cpp").write_text("this is no C++")
    with pytest.raises(Unavailable, match=r"ended with 1.*--compile off") as caught:
        loader.load("on")
    assert "Install" not in str(caught.value)
    assert not list(folder.iterdir()) or [path.suffix for path in folder.iterdir()] == [".lock"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match=r"Install a C\+\+ compiler, or start with --compile off"):
        loader.load("on")
