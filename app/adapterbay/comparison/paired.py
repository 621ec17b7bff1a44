"""Two classifiers on the same labelled inputs: accuracies with intervals, and an exact paired test.

Accuracy intervals are Wilson's (1927), which hold their level near 0 and 1 and on few inputs, by
`statsmodels.stats.proportion.proportion_confint`. The difference is tested by the exact McNemar test (McNemar 1947):
under the hypothesis of equal accuracy, of the inputs that exactly one arm gets right each arm gets half, a binomial
with p = ½; by `statsmodels.stats.contingency_tables.mcnemar(exact=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from adapterbay.registry.errors import InvalidArgument, MissingExtra

Verdict = Literal["first is better", "second is better", "inconclusive"]


@dataclass(frozen=True, slots=True)
class ArmAccuracy:
    """One arm: how many of the inputs it got right, the share, and the share's Wilson interval."""

    correct: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """Both arms on `inputs` labelled texts. `disagreements` are the positions where their answers differ."""

    inputs: int
    first: ArmAccuracy
    second: ArmAccuracy
    only_first_right: int
    only_second_right: int
    p_value: float
    level: float
    verdict: Verdict
    disagreements: tuple[int, ...]


def require_statistics() -> None:
    """Raises MissingExtra if comparisons cannot be tested here."""
    try:
        import statsmodels.stats.api  # noqa: F401
    except ImportError as error:
        raise MissingExtra("Statistics need statsmodels: pip install 'adapterbay[server]'.") from error


def compare_paired(
    labels: Sequence[str], first: Sequence[str], second: Sequence[str], *, level: float = 0.95
) -> PairedComparison:
    """Compares two arms' answers with the true `labels`, all of one length.

    `level` is the confidence of the intervals; the verdict is "inconclusive" unless the exact McNemar p-value is at
    most 1 − level. Raises InvalidArgument for no inputs or lengths that differ.
    """
    require_statistics()
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.proportion import proportion_confint

    if not labels or len(labels) != len(first) or len(labels) != len(second):
        raise InvalidArgument(
            f"A paired comparison needs one answer of each arm for each label; there are {len(labels)} labels, "
            f"{len(first)} and {len(second)} answers.",
            field="labels",
        )
    first_right = [answer == label for answer, label in zip(first, labels, strict=True)]
    second_right = [answer == label for answer, label in zip(second, labels, strict=True)]
    both = sum(a and b for a, b in zip(first_right, second_right, strict=True))
    only_first = sum(first_right) - both
    only_second = sum(second_right) - both
    neither = len(labels) - both - only_first - only_second
    p_value = float(mcnemar([[both, only_first], [only_second, neither]], exact=True).pvalue)

    def arm(right: list[bool]) -> ArmAccuracy:
        low, high = proportion_confint(sum(right), len(right), alpha=1 - level, method="wilson")
        return ArmAccuracy(sum(right), sum(right) / len(right), float(low), float(high))

    verdict: Verdict = "inconclusive"
    if p_value <= 1 - level:
        verdict = "first is better" if only_first > only_second else "second is better"
    return PairedComparison(
        inputs=len(labels),
        first=arm(first_right),
        second=arm(second_right),
        only_first_right=only_first,
        only_second_right=only_second,
        p_value=p_value,
        level=level,
        verdict=verdict,
        disagreements=tuple(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b),
    )
