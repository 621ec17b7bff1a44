"""Guards: what an alias demands of a version, refusals with their reasons, and forced moves that are recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument, NotFound, PromotionRefused, StaleAlias
from adapterbay.registry.gate import Comparison, Guard, Verdict
from adapterbay.registry.local.commit import Force

Trained = Callable[..., Path]

GUARD = Guard({"accuracy": 0.8}, {"loss": 0.5}, ("comparison",))


def test_a_guard_refuses_with_the_reasons(trained: Trained, registry: Registry) -> None:
    first = registry.push(trained(accuracy=0.7, loss=0.9), "x", aliases=["champion"]).digest
    registry.guard("x", "champion", GUARD)
    assert registry.aliases("x") == {"champion": 1}, "what was there before is not asked"
    registry.push(trained(accuracy=0.75), "x")
    with pytest.raises(PromotionRefused) as refused:
        registry.set_alias("x", "champion", 2)
    assert refused.value.unmet == (
        "accuracy must be at least 0.8, and is 0.75",
        "loss must be at most 0.5, and is not recorded",
        f"a comparison with the version it points or pointed at ({first[:19]}…) must be recorded",
    )
    assert all(demand in refused.value.message for demand in refused.value.unmet)
    last = registry.last_event()
    with pytest.raises(PromotionRefused):
        registry.push(trained(accuracy=0.9, loss=0.1), "x", aliases=["champion", "other"])
    assert (registry.last_event(), len(registry.versions("x"))) == (last, 2), "the push is refused as a whole"
    assert registry.verify().ok


def test_removing_the_alias_is_no_way_around_its_guard(trained: Trained, registry: Registry) -> None:
    registry.push(trained(accuracy=0.7), "x", aliases=["champion"])
    registry.push(trained(accuracy=0.6), "x")
    registry.guard("x", "champion", Guard(requires=("comparison",)))
    registry.record_comparison("x", 2, Comparison("base", "accuracy", 0.6, 0.5, 240, "better"))
    registry.remove_alias("x", "champion")
    with pytest.raises(PromotionRefused, match="points or pointed at"):
        registry.set_alias("x", "champion", 2)
    with pytest.raises(PromotionRefused):
        registry.push(trained(accuracy=0.61), "x", aliases=["champion"])
    registry.delete("x", 1, "withdrawn")
    assert registry.set_alias("x", "champion", 2).version == 2, "nothing can be compared with a deleted version"


def test_a_guard_lets_pass_what_meets_it(trained: Trained, registry: Registry) -> None:
    one = registry.push(trained(accuracy=0.81, loss=0.4), "x", aliases=["champion"])
    two = registry.push(trained(accuracy=0.9, loss=0.3), "x")
    registry.guard("x", "champion", GUARD)

    def compared(against: str, verdict: Verdict) -> None:
        registry.record_comparison("x", 2, Comparison(against, "accuracy", 0.9, 0.81, 240, verdict))

    compared("base", "better")  # not with the champion
    with pytest.raises(PromotionRefused, match="comparison"):
        registry.set_alias("x", "champion", 2)
    compared(one.digest, "worse")
    with pytest.raises(PromotionRefused, match="says that it is worse"):
        registry.set_alias("x", "champion", 2)
    compared(one.digest, "inconclusive")
    assert registry.set_alias("x", "champion", 2).version == 2
    with pytest.raises(PromotionRefused):
        registry.rollback("x", "champion")  # a rollback is a move as any other
    registry.record_comparison("x", 1, Comparison(two.digest, "accuracy", 0.81, 0.9, 240, "inconclusive"))
    assert registry.rollback("x", "champion").version == 1
    registry.guard("x", "champion", None)
    assert registry.guards("x") == {}


def test_a_forced_move_is_recorded(trained: Trained, tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "store", by="ann")
    registry.push(trained(), "x", aliases=["champion"])
    registry.push(trained(), "x")
    registry.guard("x", "champion", Guard(requires=("signature",)))
    with pytest.raises(InvalidArgument, match="why"):
        Force(" ")
    move = registry.set_alias("x", "champion", 2, force=Force("the old one leaks"))
    assert move.overruled == ("it must be signed",)
    event = registry.history("x")[-1]
    assert (event.by, event.detail) == ("ann", {"forced": "the old one leaks", "overruled": ["it must be signed"]})
    with pytest.raises(StaleAlias):
        registry.set_alias("x", "champion", 1, expected=1, force=Force("compare-and-swap is not overruled"))
    forced = registry.push(trained(), "x", aliases=["champion"], force=Force("again"))
    assert registry.aliases("x") == {"champion": forced.version}
    assert forced.overruled == ("it must be signed",)
    registry.attach_signature("x", 1, b"bundle")
    assert registry.set_alias("x", "champion", 1, force=Force("not needed")).overruled == ()
    assert registry.history("x")[-1].detail == {}


def test_a_guard_of_every_adapter(trained: Trained, tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "store", by="lead")
    registry.guard(None, "champion", Guard({"accuracy": 0.8}))
    with pytest.raises(PromotionRefused, match=r"accuracy must be at least 0\.8"):
        registry.push(trained(accuracy=0.7), "new", aliases=["champion"])
    assert registry.push(trained(accuracy=0.85), "new", aliases=["champion"]).version == 1
    registry.guard("new", "champion", Guard({"accuracy": 0.9}, requires=("signature",)))
    registry.push(trained(accuracy=0.75), "new")
    with pytest.raises(PromotionRefused) as refused:
        registry.set_alias("new", "champion", 2)
    assert refused.value.unmet == (
        "accuracy must be at least 0.8, and is 0.75",
        "accuracy must be at least 0.9, and is 0.75",
        "it must be signed",
    )
    assert [(event.kind, event.by, event.alias) for event in registry.history(None)] == [
        ("guard_set", "lead", "champion")
    ]
    assert registry.verify().ok
    before = registry.guards(None), registry.guards("new"), registry.events()
    registry.rebuild_index()
    assert (registry.guards(None), registry.guards("new"), registry.events()) == before
    (registry.root / "adapters" / "@journal.jsonl").unlink()
    assert [problem.kind for problem in registry.verify().problems] == ["journal"]
    registry.guard("new", "champion", None)
    registry.guard(None, "champion", None)
    assert registry.set_alias("new", "champion", 2).version == 2


def test_guards_that_make_no_sense(trained: Trained, registry: Registry) -> None:
    registry.push(trained(), "x")
    with pytest.raises(InvalidArgument, match="demands something"):
        Guard()
    with pytest.raises(InvalidArgument, match="can never be met"):
        Guard({"loss": 1.0}, {"loss": 0.5})
    with pytest.raises(InvalidArgument, match="no evidence"):
        Guard(requires=("prayer",))
    with pytest.raises(NotFound, match="not guarded"):
        registry.guard("x", "champion", None)
    with pytest.raises(NotFound):
        registry.guard("y", "champion", GUARD)
