"""The conformance suite over repositories on a server that speaks the Hub's protocol."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapterbay.registry.hub.backend import HubRegistry
from registry.conformance import Conformance, Place


class TestHub(Conformance):
    @pytest.fixture
    def place(self, hub: Callable[[], HubRegistry]) -> Place:
        return Place(hub)
