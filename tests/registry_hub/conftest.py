"""A base, an adapter of it, and a real `registry serve` in place of the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_tools import ServerProcess, serving, vary
from huggingface_hub import HfApi
from plain_hub import PlainHub, plain_hub

from adapterbay.registry.hub.backend import HubRegistry

pytest.register_assert_rewrite("registry.conformance")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import make_base

    return make_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="session")
def adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA of rank 4, as PEFT saved it, without the card that PEFT writes."""
    from tiny import TARGETS, make_adapter

    folder = tmp_path_factory.mktemp("adapter") / "tales"
    make_adapter(base_folder, folder, targets=TARGETS["llama"][0], rank=4)
    (folder / "README.md").unlink(missing_ok=True)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_folder)
    return folder


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, session_home: Path) -> None:
    """No test sees or touches the caches, the tokens and the registry of the person who runs it."""
    monkeypatch.setenv("ADAPTERBAY_HOME", str(session_home))
    monkeypatch.setenv("ADAPTERBAY_ACTOR", "tester")
    for variable in ("ADAPTERBAY_REGISTRY", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def server(base_folder: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """Over a new store, for this test alone; anybody may write."""
    with serving(tmp_path / "store", base_folder) as running:
        yield running


@pytest.fixture
def hub(server: ServerProcess, tmp_path: Path) -> Callable[[], HubRegistry]:
    """Registries `hub:team` on the server, with one cache that is the test's own."""
    return lambda: HubRegistry("hub:team", endpoint=server.endpoint, cache=tmp_path / "hub-cache")


@pytest.fixture
def api(server: ServerProcess) -> HfApi:
    """The Hub's own client, as somebody without adapterbay uses it."""
    return HfApi(endpoint=server.endpoint, token=False)


@pytest.fixture
def content(adapter: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Adapters that differ, by number."""
    return lambda number: vary(adapter, tmp_path / "contents" / str(number), number)


@pytest.fixture
def plain() -> Iterator[PlainHub]:
    """A Hub that knows nothing of versions, and whose tags anybody may move."""
    with plain_hub() as running:
        yield running
