"""The masked product against a plain loop over tokens and parts, over every popularity that peers measure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adapterbay.server import packed
from adapterbay.server.adapters.forms import LinearForm, LowRank
from adapterbay.server.kernels import loader
from adapterbay.server.mix.context import step_context
from adapterbay.server.mix.linear import LinearSite, MixedLinear
from adapterbay.server.mix.plan import FEW_TOKENS, AdapterMix, Run
from adapterbay.server.mix.pools import PACKED_SLICES, RankPool
from adapterbay.server.packed import PackedLinear, can_pack

IN, OUT = 24, 40


def naive(x: Tensor, runs: list[Run], adapters: dict[str, tuple[Tensor, Tensor, float]], out: int) -> Tensor:
    """Σ w·s·B(Ax), token by token."""
    y = torch.zeros(x.shape[0], out, dtype=torch.float64)
    for run in runs:
        for token in range(run.start, run.stop):
            for key, weight in run.parts:
                if key in adapters:
                    a, b, scaling = adapters[key]
                    y[token] += weight * scaling * (b.double().t() @ (a.double() @ x[token].double()))
    return y


def site_of(adapters: dict[str, tuple[Tensor, Tensor, float]]) -> LinearSite:
    site = LinearSite(IN, OUT, torch.float32, torch.device("cpu"))
    for key, (a, b, scaling) in adapters.items():
        site.place(key, LinearForm(LowRank(a, b, scaling)))
    return site


def pool_of(adapters: dict[str, tuple[Tensor, Tensor, float]]) -> RankPool:
    pool = RankPool(IN, OUT, torch.float32, torch.device("cpu"))
    for key, (a, b, scaling) in adapters.items():
        pool.place(key, a, b, scaling)
    return pool


def random_adapters(count: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor, float]]:
    torch.manual_seed(seed)
    ranks = [1, 2, 4, 8, 16, 32, 64, 3]
    return {
        f"a{i}": (torch.randn(ranks[i % 8], IN), torch.randn(ranks[i % 8], OUT), 0.25 * (i + 1)) for i in range(count)
    }


POPULARITY = {
    "distinct": [[(f"a{i}", 1.0)] for i in range(8)],
    "identical": [[("a3", 1.0)]] * 8,
    "uniform": [[(f"a{i % 3}", 1.0)] for i in range(8)],
    "skewed": [[("a0", 1.0)]] * 5 + [[("a6", 1.0)], [("a1", 1.0)], []],
    "fused": [[("a0", 0.7), ("a6", -0.3)], [], [("a1", 2.0)], [("a2", 0.5), ("a3", 0.5), ("a4", 0.1)], [("a7", 1.0)]],
}


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("lengths", [[1] * 8, [1, 1, 1, FEW_TOKENS + 9, 5, 1, FEW_TOKENS, 2]])
@pytest.mark.parametrize("kernels", [False, True])
def test_every_token_gets_its_own_deltas_and_no_other(popularity: str, lengths: list[int], kernels: bool) -> None:
    assert not kernels or loader.load("auto").loaded
    adapters = random_adapters(8)
    runs, at = [], 0
    for parts, length in zip(POPULARITY[popularity], lengths, strict=False):
        if parts:
            runs.append(Run(at, at + length, tuple(parts)))
        at += length
    x = torch.randn(1, at, IN)
    base = nn.Linear(IN, OUT)
    layer = MixedLinear(base, IN, OUT)
    layer.site = site_of(adapters)
    step_context.mix = AdapterMix(at, runs, torch.float32, torch.device("cpu"), kernels=kernels)
    try:
        with torch.inference_mode():
            got = layer(x)[0]
            expected = base(x)[0].double() + naive(x[0], runs, adapters, OUT)
    finally:
        step_context.mix = None
    # sums of up to 64 + 24 products of unit normals in float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-3)


def test_without_a_mix_the_layer_is_the_base_layer() -> None:
    base = nn.Linear(IN, OUT)
    layer = MixedLinear(base, IN, OUT)
    layer.site = site_of(random_adapters(2))
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), base(x))


def test_an_adapter_that_is_not_at_this_layer_adds_nothing() -> None:
    base = nn.Linear(IN, OUT)
    layer = MixedLinear(base, IN, OUT)
    layer.site = site_of(random_adapters(2))
    x = torch.randn(1, 3, IN)
    step_context.mix = AdapterMix(3, [Run(0, 3, (("elsewhere", 1.0),))], torch.float32, torch.device("cpu"))
    try:
        assert torch.equal(layer(x), base(x))
    finally:
        step_context.mix = None


def test_freed_rows_are_reused_and_leave_no_trace() -> None:
    adapters = random_adapters(6)
    pool = pool_of(adapters)
    before = pool.bytes
    for round_ in range(50):
        key = f"a{round_ % 6}"
        pool.remove(key)
        a, b, scaling = adapters[key]
        pool.place(key, a, b, scaling)
    assert pool.bytes <= 2 * before
    x = torch.randn(6, IN)
    runs = [Run(i, i + 1, ((f"a{i}", 1.0),)) for i in range(6)]
    y = torch.zeros(6, OUT)
    y = AdapterMix(6, runs, torch.float32, torch.device("cpu")).add_to(y, x, pool)
    torch.testing.assert_close(y.double(), naive(x, runs, adapters, OUT), rtol=1e-5, atol=2e-3)
    for key in adapters:
        pool.remove(key)
    assert pool.bytes == 0


@pytest.mark.parametrize("kernels", [False, True])
def test_a_row_that_overflows_does_not_reach_its_neighbours(kernels: bool) -> None:
    adapters = random_adapters(2)
    pool = pool_of(adapters)
    x = torch.randn(2, IN)
    x[0] = float("inf")
    runs = [Run(0, 1, (("a0", 1.0),)), Run(1, 2, (("a1", 1.0),))]
    y = torch.zeros(2, OUT)
    AdapterMix(2, runs, torch.float32, torch.device("cpu"), kernels=kernels).add_to(y, x, pool)
    assert not y[0].isfinite().all()
    torch.testing.assert_close(y[1:].double(), naive(x, runs[1:], adapters, OUT)[1:], rtol=1e-5, atol=2e-3)


def test_mostly_idle_pools_are_gathered_not_read() -> None:
    adapters = random_adapters(40)
    pool = pool_of(adapters)
    runs = [Run(0, 1, (("a0", 1.0),)), Run(1, 2, (("a39", 1.0),))]
    mix = AdapterMix(2, runs, torch.float32, torch.device("cpu"))
    x, y = torch.randn(2, IN), torch.zeros(2, OUT)
    mix.add_to(y, x, pool)
    assert isinstance(mix._plans[pool.layout, ""][0].rows, Tensor)  # type: ignore[union-attr]
    torch.testing.assert_close(y.double(), naive(x, runs, adapters, OUT), rtol=1e-5, atol=2e-3)


def test_a_mix_for_other_tokens_is_an_error_and_not_a_guess() -> None:
    layer = MixedLinear(nn.Linear(IN, OUT), IN, OUT)
    layer.site = site_of(random_adapters(1))
    step_context.mix = AdapterMix(2, [Run(0, 2, (("a0", 1.0),))], torch.float32, torch.device("cpu"))
    try:
        with pytest.raises(RuntimeError, match="2 tokens met a layer input of 3"):
            layer(torch.randn(3, IN))
    finally:
        step_context.mix = None


@pytest.mark.skipif(not can_pack(torch.bfloat16, torch.device("cpu")), reason="this CPU has no native bfloat16")
@pytest.mark.parametrize("lengths", [[1] * 8, [1, 1, 1, FEW_TOKENS + 9, 5, 1, FEW_TOKENS, 2]])
def test_packed_pools_follow_every_change(lengths: list[int]) -> None:
    """The packed copy of a pool must never outlive a placed or removed adapter. Tolerance: bfloat16 has 8 bits, and
    the sums have up to 88 terms of size about 1."""
    adapters = random_adapters(8)
    layer = MixedLinear(PackedLinear(nn.Linear(IN, OUT, dtype=torch.bfloat16)), IN, OUT)
    layer.site = pool = LinearSite(IN, OUT, torch.bfloat16, torch.device("cpu"))
    for key, (a, b, scaling) in adapters.items():
        pool.place(key, LinearForm(LowRank(0.1 * a, 0.1 * b, scaling)))
    runs, at = [], 0
    for index, length in enumerate(lengths):
        runs.append(Run(at, at + length, ((f"a{index}", 1.0),)))
        at += length
    x = torch.randn(1, at, IN, dtype=torch.bfloat16)
    present = {key: (0.1 * a, 0.1 * b, s) for key, (a, b, s) in adapters.items()}

    def check() -> None:
        step_context.mix = AdapterMix(at, runs, torch.bfloat16, torch.device("cpu"))
        try:
            with torch.inference_mode():
                got = layer(x)[0].double()
                base = layer.base_layer(x)[0].double()
        finally:
            step_context.mix = None
        torch.testing.assert_close(got - base, naive(x[0].float(), runs, present, OUT), rtol=0.05, atol=0.05)

    check()
    for key in ("a3", "a0", "a7"):
        pool.remove(key)
        del present[key]
        check()
    fresh = random_adapters(8, seed=5)
    for key in ("a7", "a3"):
        a, b, scaling = fresh[key]
        pool.place(key, LinearForm(LowRank(0.1 * a, 0.1 * b, scaling)))
        present[key] = (0.1 * a, 0.1 * b, scaling)
        check()


@pytest.mark.skipif(not can_pack(torch.bfloat16, torch.device("cpu")), reason="this CPU has no native bfloat16")
def test_a_step_packs_each_of_its_slices_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run between short ones: two masked products over different rows, and the same two at the next step."""
    packs = []
    real = packed.pack
    monkeypatch.setattr(packed, "pack", lambda weight: packs.append(weight.shape) or real(weight))
    pool = RankPool(IN, OUT, torch.bfloat16, torch.device("cpu"))
    for key, (a, b, scaling) in random_adapters(8).items():
        pool.place(key, a, b, scaling)
    long = FEW_TOKENS + 4
    short = [Run(0, 1, (("a0", 1.0),)), Run(1, 2, (("a1", 1.0),))]
    later = [Run(2 + long, 3 + long, (("a4", 1.0),)), Run(3 + long, 4 + long, (("a5", 1.0),))]
    runs = [*short, Run(2, 2 + long, (("a3", 1.0),)), *later]
    x = torch.randn(4 + long, IN, dtype=torch.bfloat16)

    def step() -> None:
        with torch.inference_mode():
            AdapterMix(4 + long, runs, torch.bfloat16, torch.device("cpu")).add_to(
                torch.zeros(4 + long, OUT, dtype=torch.bfloat16), x, pool
            )

    step()
    assert len(packs) == 4, "A and B of two slices"
    step()
    step()
    assert len(packs) == 4, "the same rows were packed again"
    pool.remove("a7")
    step()
    assert len(packs) == 8, "the pool has changed"
    for start in range(20):
        pool.packed(slice(start, start + 8))
    assert len(pool._packed) == PACKED_SLICES, "what is kept is bounded"
