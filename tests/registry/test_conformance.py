"""The conformance suite over a registry in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from registry.conformance import Conformance, Place
from registry_tools import Tiny

from adapterbay.registry import Registry


class TestLocal(Conformance):
    @pytest.fixture
    def base_folder(self, llama: Tiny) -> Path:
        return llama.base

    @pytest.fixture
    def adapter(self, llama: Tiny) -> Path:
        return llama.adapter

    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Place(lambda: Registry.open(tmp_path / "registry"))
