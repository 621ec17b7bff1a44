"""One real server for all tests of the services."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from serving_tools import Served, make_small_zoo
from zoo import Zoo

from adapterbay.v1 import adapters_pb2_grpc, inference_pb2_grpc


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_small_zoo(tmp_path_factory.mktemp("services"))


@pytest.fixture(scope="session")
def served(zoo: Zoo) -> Iterator[Served]:
    with Served(zoo) as served:
        yield served


@pytest.fixture(scope="session")
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.address) as channel:
        yield channel


@pytest.fixture(scope="session")
def inference(channel: grpc.Channel) -> inference_pb2_grpc.InferenceServiceStub:
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture(scope="session")
def adapters(channel: grpc.Channel) -> adapters_pb2_grpc.AdapterServiceStub:
    return adapters_pb2_grpc.AdapterServiceStub(channel)
