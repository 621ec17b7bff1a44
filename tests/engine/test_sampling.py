"""Sampling against its definition: frequencies, cuts, repeatability, log-probabilities."""

from __future__ import annotations

import pytest
import torch

from adapterbay.server.requests import SamplingSpec
from adapterbay.server.sampling import draw, sample_row


def frequencies(logits: torch.Tensor, spec: SamplingSpec, draws: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(logits.shape[0])
    for _ in range(draws):
        counts[sample_row(logits, spec, generator)] += 1
    return counts / draws


def test_frequencies_are_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    got = frequencies(logits, SamplingSpec(temperature=0.7))
    torch.testing.assert_close(got, (logits / 0.7).softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.60}, {0}),  # softmax: .644 .237 .087 .032
        ({"top_p": 0.65}, {0, 1}),
        ({"top_p": 0.95}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.90}, {0, 1}),  # among the first three: .665 .245 .090
        ({"top_k": 1}, {0}),
    ],
)
def test_cuts_keep_exactly_their_tokens(settings: dict[str, float], kept: set[int]) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    got = frequencies(logits, SamplingSpec(temperature=1.0, **settings), 4000)  # type: ignore[arg-type]
    assert set(got.nonzero().flatten().tolist()) == kept
    expected = torch.zeros(4)
    expected[list(kept)] = logits.softmax(-1)[list(kept)]
    torch.testing.assert_close(got, expected / expected.sum(), atol=0.03, rtol=0)


def test_top_p_beyond_the_first_guess_is_exact() -> None:
    logits = torch.zeros(5000)
    got = frequencies(logits, SamplingSpec(temperature=1.0, top_p=0.5), 6000)
    assert 1400 < int((got > 0).sum()) <= 2500


def test_a_seeded_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(3)
    logits = torch.randn(4, 50)
    spec = SamplingSpec(temperature=1.0, seed=9)

    def drawn(rows: list[int], at: int) -> int:
        generators = [torch.Generator().manual_seed(9 if row == 2 else row) for row in rows]
        return draw(logits[rows], [spec] * len(rows), generators)[at].token_id

    assert drawn([2], 0) == drawn([0, 1, 2, 3], 2) == drawn([2, 0], 0)


def test_log_probabilities_are_of_the_model_and_not_of_the_cut() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    spec = SamplingSpec(temperature=0.1, top_k=1, top_log_probabilities=2)
    drawn = draw(logits, [spec], [torch.Generator().manual_seed(0)])[0]
    expected = logits[0].log_softmax(-1)
    assert drawn.token_id == 0
    assert drawn.log_probability == pytest.approx(float(expected[0]))
    assert [token for token, _ in drawn.top] == [0, 1]
    assert drawn.top[1][1] == pytest.approx(float(expected[1]))


def test_rows_that_are_not_finite_say_so_and_spare_the_others() -> None:
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 3.0, 1.0], [float("inf"), 0.0, 0.0]])
    drawn = draw(logits, [SamplingSpec()] * 3, [None] * 3)
    assert [d.finite for d in drawn] == [False, True, False]
    assert drawn[1].token_id == 1
