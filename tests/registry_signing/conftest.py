"""A registry with two versions of an adapter, and key pairs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from signing_tools import NAME, KeyPair, make_keys
from tiny import TARGETS, make_adapter, make_base

from adapterbay.registry import Registry

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose version 1 has a README.md and whose version 2 has none. Not to be written to: copies are."""
    root = tmp_path_factory.mktemp("signing")
    base = make_base(root / "base", "llama")
    registry = Registry.open(root / "registry")
    for seed in (1, 2):
        folder = make_adapter(base, root / f"adapter-{seed}", targets=TARGETS["llama"][0], rank=4, seed=seed)
        (folder / "README.md").unlink(missing_ok=True)
        if seed == 1:
            (folder / "README.md").write_text("# Tales\n\nTells tales.\n")
        registry.push(folder, NAME, base=f"folder:{base}")
    registry.close()
    return root


@pytest.fixture
def registry(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv("ADAPTERBAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ADAPTERBAY_REGISTRY", raising=False)
    monkeypatch.delenv("ADAPTERBAY_KEY_PASSWORD", raising=False)
    shutil.copytree(made / "registry", tmp_path / "registry")
    store = Registry.open(tmp_path / "registry", create=False)
    yield store
    store.close()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"), "release")


@pytest.fixture(scope="session")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"), "other")
