"""The statistics against numbers from elsewhere."""

from __future__ import annotations

import math

import pytest

from adapterbay.comparison import compare_paired
from adapterbay.registry.errors import InvalidArgument


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[str], list[str], list[str]]:
    first = ["y"] * (both + only_first) + ["n"] * (only_second + neither)
    second = ["y"] * both + ["n"] * only_first + ["y"] * only_second + ["n"] * neither
    return ["y"] * len(first), first, second


def test_exact_p_is_the_two_sided_binomial() -> None:
    found = compare_paired(*answers(100, 4, 14, 32))
    tail = sum(math.comb(18, k) for k in range(5)) / 2**18
    assert found.p_value == pytest.approx(2 * tail)
    assert (found.only_first_right, found.only_second_right) == (4, 14)
    assert found.verdict == "second is better"
    assert len(found.disagreements) == 18


def test_wilson_interval_of_a_textbook_proportion() -> None:
    found = compare_paired(*answers(8, 0, 1, 1))
    z, n, p = 1.959963984540054, 10, 0.8
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.first.low == pytest.approx(centre - half)
    assert found.first.high == pytest.approx(centre + half)


def test_few_disagreements_are_inconclusive() -> None:
    assert compare_paired(*answers(190, 2, 6, 2)).verdict == "inconclusive"
    assert compare_paired(*answers(200, 0, 0, 0)).p_value == 1.0


def test_arms_change_places() -> None:
    labels, first, second = answers(100, 4, 14, 32)
    assert compare_paired(labels, second, first).verdict == "first is better"


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="2 labels, 1 and 2 answers"):
        compare_paired(["a", "b"], ["a"], ["a", "b"])
    with pytest.raises(InvalidArgument):
        compare_paired([], [], [])
