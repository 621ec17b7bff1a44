"""Two tiny bases with an adapter each; every test works on a copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry_tools import Draft, Tiny

from adapterbay.registry import Registry, locate
from adapterbay.registry.base import BaseFiles

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, session_home: Path) -> None:
    """No test sees or touches the caches and the registry of the person who runs it, nor the network."""
    monkeypatch.setenv("ADAPTERBAY_HOME", str(session_home))
    monkeypatch.delenv("ADAPTERBAY_REGISTRY", raising=False)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A language model; LoRA of rank 2 on q_proj and v_proj of two layers."""
    from tiny import make_adapter, make_base

    root = tmp_path_factory.mktemp("llama")
    base = make_base(root / "base", "llama", hidden=16, layers=2)
    return Tiny(base, make_adapter(base, root / "adapter", targets=["q_proj", "v_proj"], rank=2, seed=1))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """An encoder; LoRA of rank 2 on query, and a head with three labels."""
    from tiny import make_adapter, make_base

    root = tmp_path_factory.mktemp("bert")
    base = make_base(root / "base", "bert", hidden=16, layers=2)
    adapter = make_adapter(
        base, root / "adapter", targets=["query"], rank=2, seed=2, task="SEQ_CLS", labels=["a", "b", "c"]
    )
    return Tiny(base, adapter)


@pytest.fixture(scope="session")
def base(llama: Tiny) -> BaseFiles:
    """The base of `llama`, as the registry reads it."""
    return locate(str(llama.base))


@pytest.fixture(scope="session")
def model(llama: Tiny) -> Any:
    """The base of `llama`, as transformers loads it. Not to be changed: copies are."""
    from tiny import load_reference

    return load_reference(llama.base)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    store = Registry.open(tmp_path / "registry")
    yield store
    store.close()


@pytest.fixture
def draft(tmp_path: Path) -> Callable[[Tiny], Draft]:
    """Copies an adapter folder."""
    count = 0

    def copy(tiny: Tiny) -> Draft:
        nonlocal count
        count += 1
        target = tmp_path / f"draft-{count}"
        shutil.copytree(tiny.adapter, target)
        return Draft(target)

    return copy
