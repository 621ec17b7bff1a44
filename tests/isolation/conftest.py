"""The engines under test, the adapters they get, and the reference: plain PEFT with one adapter alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from isolation.interface import EngineUnderTest, Factory, Limits
from isolation.reference import Alone, Folders
from tiny import make_base

OURS = {"in-process": "isolation.ours:InProcess", "grpc": "isolation.ours:OverGrpc"}

Start = Callable[[Limits], EngineUnderTest]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--isolation-engine",
        metavar="MODULE:FACTORY",
        action="append",
        help="examine this engine instead of our own; may be repeated; see tests/isolation/interface.py",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "factory" not in metafunc.fixturenames:
        return
    named = metafunc.config.getoption("--isolation-engine", default=None)
    engines = {name: name for name in named} if named else OURS
    metafunc.parametrize("factory", [find(engine) for engine in engines.values()], ids=engines, scope="module")


def find(name: str) -> Factory:
    """What MODULE:FACTORY means."""
    module, _, attribute = name.partition(":")
    factory: Factory = getattr(importlib.import_module(module), attribute)
    return factory


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("isolation") / "base", "llama")


@pytest.fixture(scope="session")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """PEFT folders of equal size, made when first asked for."""
    return Folders(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def alone(base: Path) -> Alone:
    """What PEFT answers with one adapter and nobody else."""
    return Alone(base)


@pytest.fixture(scope="module")
def engine(factory: Factory, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    """An engine with room for everything, shared by the tests of a module: each uses names of its own."""
    started = factory(base, tmp_path_factory.mktemp("engine"), Limits())
    yield started
    started.close()


@pytest.fixture
def start(factory: Factory, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts an engine of the test's own."""
    started: list[EngineUnderTest] = []

    def begin(limits: Limits) -> EngineUnderTest:
        started.append(factory(base, tmp_path_factory.mktemp("engine"), limits))
        return started[-1]

    yield begin
    for engine in started:
        engine.close()
