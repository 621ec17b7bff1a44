"""The conformance suite over repositories: on our own server, and on a Hub that knows nothing of versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from plain_hub import PlainHub
from registry.conformance import Conformance, Place

from adapterbay.registry.hub.backend import HubRegistry


class TestOwnServer(Conformance):
    @pytest.fixture
    def place(self, hub: Callable[[], HubRegistry]) -> Place:
        return Place(hub)


class TestPlainHub(Conformance):
    @pytest.fixture
    def place(self, plain: PlainHub, tmp_path: Path) -> Place:
        return Place(lambda: HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "hub-cache"))
