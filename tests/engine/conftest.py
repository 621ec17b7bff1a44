"""Tiny bases of each architecture with different adapters, made once for the session."""

from __future__ import annotations

import pytest
from zoo import Zoo, make_zoo

from adapterbay.server.kernels import loader


@pytest.fixture(scope="session")
def kernels() -> None:
    """The compiled kernels are loaded. Where they cannot be, tests fail; they are skipped only without a compiler."""
    if loader.find_compiler() is None:
        pytest.skip(loader.NO_COMPILER)
    loader.load("on")


@pytest.fixture(scope="session")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Zoo]:
    """One zoo for each architecture, filled when first asked for."""
    return _Zoos(tmp_path_factory)


class _Zoos(dict[str, Zoo]):
    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._factory = factory

    def __missing__(self, architecture: str) -> Zoo:
        self[architecture] = make_zoo(self._factory.mktemp(architecture), architecture)
        return self[architecture]
