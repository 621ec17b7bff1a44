"""One real server for the tests of the clients and of the commands that use them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving_tools import Served, make_small_zoo
from zoo import Zoo

from adapterbay.client import Client


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_small_zoo(tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="session")
def served(zoo: Zoo) -> Iterator[Served]:
    with Served(zoo) as served:
        yield served


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client
