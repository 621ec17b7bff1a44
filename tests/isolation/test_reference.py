"""The suite's adapters can be told apart, by an engine that gives nothing but tokens, too."""

from __future__ import annotations

import pytest
from isolation import test_memory, test_names, test_neighbours
from isolation.reference import Alone, Folders

ADAPTERS = 8
"""The most that a test has at once."""


@pytest.mark.parametrize("tests", [test_memory, test_names, test_neighbours], ids=lambda module: module.__name__)
def test_each_adapter_says_something_else(tests: object, folders: Folders, alone: Alone) -> None:
    prompt, tokens = tests.PROMPT, tests.TOKENS  # type: ignore[attr-defined]
    arms = [None, *(folders.generator(number) for number in range(ADAPTERS))]
    assert len({alone.generates(prompt, arm, tokens).tokens for arm in arms}) == len(arms)
