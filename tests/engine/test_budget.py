"""What layers really hold stays within a quarter above the budget, and one layer's pools, whatever comes and goes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from engine_tools import Harness
from zoo import Zoo

from adapterbay.server.adapters.device import SITE_BYTES, DeviceMemory
from adapterbay.server.adapters.forms import LinearForm, LowRank, ServingForm
from adapterbay.server.adapters.residency import Resident
from adapterbay.server.batch import Group, Row
from adapterbay.server.mix.linear import LinearSite
from adapterbay.server.mix.pools import RankPool, VectorPool
from adapterbay.server.mix.sites import Sites
from adapterbay.server.requests import ArmSpec, EmbedTask, Pooling, Request
from adapterbay.server.scheduler import Seat


@pytest.fixture
def sites(zoos: dict[str, Zoo]) -> Iterator[Sites]:
    with Harness(zoos["llama"].base, zoos["llama"].registry) as harness:
        yield harness.engine._model.sites


def adapter(sites: Sites, number: int, rng: random.Random, ranks: tuple[int, ...]) -> Resident:
    """Low-rank deltas and scales on some kind of layers; now and then whole deltas."""
    kind, rank = rng.choice(("q_proj", "v_proj", "down_proj", "proj")), rng.choice(ranks)
    layers = {}
    for path, (wide, out) in sites.shapes().items():
        if path.endswith(kind):
            ranked = LowRank(torch.randn(rank, wide), torch.randn(rank, out), 1.0)
            layers[path] = LinearForm(ranked, out_scale=torch.randn(out) if number % 3 == 0 else None)
            if number % 5 == 0 and kind == "v_proj":
                layers[path] = LinearForm(dense=torch.randn(out, wide))
    key = f"k{number}"
    return Resident(key, key, 0, form=ServingForm(key, None, layers=layers))  # type: ignore[arg-type]


def group(residents: list[Resident]) -> Group:
    row = Row(Request(ArmSpec(), EmbedTask((1,), Pooling.MEAN), print), [1], 1, 0)
    row.residents = tuple(residents)
    return Group([row], ready=True)


def held(sites: Sites) -> int:
    """The bytes of all stores, free rows included."""
    pools = [pool for site in made(sites) for pool in site.pools]
    stores = [store for p in pools for store in ((p.a, p.b) if isinstance(p, RankPool) else (p.rows,))]
    whole = [delta._delta for site in made(sites) for delta in site.dense.values()]
    return sum(tensor.nbytes for tensor in (*stores, *whole))


def made(sites: Sites) -> list[LinearSite]:
    """Where anything was ever placed."""
    return [layer.site for layer in sites.linears.values() if layer.site is not None]


def intact(sites: Sites, resident: Resident) -> bool:
    """Whether an adapter's rows are what they were, wherever they lie now."""
    for path, form in resident.ready.layers.items():
        site = sites.linears[path].site
        assert site is not None
        if form.low_rank is None:
            continue
        pairs: list[tuple[RankPool | VectorPool, torch.Tensor, torch.Tensor]] = [
            (site.pool, site.pool.a, form.low_rank.a), (site.pool, site.pool.b, form.low_rank.b)
        ]  # fmt: skip
        if form.out_scale is not None:
            pairs.append((site.out_scales, site.out_scales.rows, form.out_scale[None] - 1))
        for pool, store, expected in pairs:
            span = pool.spans[resident.key]
            if not torch.equal(store[span.start : span.start + span.rank], expected):
                return False
    return True


def test_free_rows_are_counted_when_an_adapter_is_placed_in_part(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    path, (wide, out) = next((path, shape) for path, shape in sites.shapes().items() if path.endswith("q_proj"))
    layer = LinearForm(LowRank(torch.ones(4, wide), torch.ones(4, out), 1.0), out_scale=torch.ones(out))
    form = ServingForm("digest", None, layers={path: layer})  # type: ignore[arg-type]
    sites.growth = 2.0
    for key in "ab":
        sites.place(key, form)
    with monkeypatch.context() as patch:
        patch.setattr(VectorPool, "place", fail)
        with pytest.raises(torch.OutOfMemoryError):
            sites.place("c", form)
    assert sites.free_bytes == sum(site.free_bytes for site in made(sites)) > 0
    for key in "abc":
        sites.remove(key, form)
    assert held(sites) == sites.free_bytes == 0


@pytest.mark.parametrize("ranks", [(4,), (1, 4, 9)])
def test_free_rows_take_a_quarter_of_the_budget_at_most(sites: Sites, ranks: tuple[int, ...]) -> None:
    rng = random.Random(5)
    torch.manual_seed(5)
    everyone = [adapter(sites, number, rng, ranks) for number in range(60)]
    sizes = DeviceMemory(sites, 1)
    budget = 4 * max(map(sizes.size, everyone))
    device = DeviceMemory(sites, budget, step_bytes=8 * SITE_BYTES)
    running: list[Group] = []
    waiting: list[Group] = []
    most = 0
    for _ in range(400):
        device.renew()
        if not waiting or (len(waiting) < 3 and rng.random() < 0.5):
            waiting.append(group(rng.sample(everyone, rng.choice((1, 1, 2)))))
        for asking in list(waiting):
            seat = device.seat(asking, alone=not running)
            if seat is Seat.FULL:
                break
            if seat is Seat.TAKEN:
                waiting.remove(asking)
                running.append(asking)
            most = max(most, held(sites))
            assert device.used_bytes <= budget
            assert sites.free_bytes == sum(site.free_bytes for site in made(sites))
            largest = max(pool.bytes for site in made(sites) for pool in site.pools)
            assert held(sites) <= budget * 5 // 4 + largest
        while running and (len(running) > 3 or rng.random() < 0.4):
            device.leave(running.pop(rng.randrange(len(running))).rows[0])
        if rng.random() < 0.1:
            idle = [resident for resident in device.placed() if not resident.seats]
            for resident in idle[: rng.randrange(4)]:
                device.vacate(resident)
        assert all(intact(sites, resident) for resident in device.placed())
    assert most > budget * 3 // 4, "a budget that nobody comes near bounds nothing"
    for resident in everyone:
        device.vacate(resident)
    assert held(sites) == device.used_bytes == 0
