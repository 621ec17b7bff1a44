"""Tiny bases with real PEFT adapters, and a registry that holds them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_tools import FUSION_TARGETS, Bench
from tiny import make_base

from adapterbay.registry import Registry

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, session_home: Path) -> None:
    monkeypatch.setenv("ADAPTERBAY_HOME", str(session_home))
    monkeypatch.delenv("ADAPTERBAY_REGISTRY", raising=False)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random bases by architecture: two layers, 32 wide."""
    root = tmp_path_factory.mktemp("bases")
    return {name: make_base(root / name, name, hidden=32, layers=2) for name in ("llama", "gpt2", "bert")}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    store = Registry.open(tmp_path / "registry")
    yield store
    store.close()


@pytest.fixture
def bench(request: pytest.FixtureRequest, bases: dict[str, Path], registry: Registry, tmp_path: Path) -> Bench:
    architecture = getattr(request, "param", "llama")
    return Bench(bases[architecture], registry, tmp_path)


@pytest.fixture
def pair(request: pytest.FixtureRequest, bases: dict[str, Path], registry: Registry, tmp_path: Path) -> Bench:
    """Two adapters of one rank that share some of their layers."""
    architecture = getattr(request, "param", "llama")
    made = Bench(bases[architecture], registry, tmp_path)
    for name, targets in zip("ab", FUSION_TARGETS[architecture], strict=True):
        made.add(name, targets=targets, settings={"fan_in_fan_out": architecture == "gpt2"})
    return made
