"""How two versions differ: what they say of themselves, and how far their weights lie apart.

Knows nothing of registries: two snapshots in, one frozen answer out. The formulas are in `low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from adapterbay.registry.card_text import NOT_SETTINGS
from adapterbay.registry.low_rank import Checkpoint, LowRank, distance, inner, modules_in_both, norm
from adapterbay.registry.manifest import WEIGHTS_FILE, Manifest
from adapterbay.registry.metrics import metrics_of
from adapterbay.registry.views import Snapshot

Side = Literal["a", "b"]

_LEFT_OUT: Final = frozenset(
    {
        "metrics",
        "loss_history",
        "duration_seconds",
        "schema",
        "base",
        "task",
        "labels",
        "versions",
        "chat_template_digest",
    }
)
"""Of the training record: metrics are compared as numbers, losses and times are no settings, the rest are facts."""
_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class Change:
    """A value that differs. None on a side where it is not there, or null."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class MetricChange:
    """A metric on both sides; None where it was not measured. `difference` is b − a."""

    metric: str
    a: float | None
    b: float | None
    difference: float | None


@dataclass(frozen=True, slots=True)
class WeightDistance:
    """How far two deltas, or two dense tensors, lie apart; norms are Frobenius norms.

    `relative` is distance / max(norm_a, norm_b): 0 the same, √2 unrelated at equal norms, 2 opposite; 0 where both are
    zero. `cosine` is ⟨a, b⟩ / (norm_a · norm_b), None where one is zero. `only_in` names the side that has the module,
    None if both do; the other side counts as zero.
    """

    module: str
    norm_a: float
    norm_b: float
    distance: float
    relative: float
    cosine: float | None
    only_in: Side | None = None


@dataclass(frozen=True, slots=True)
class VersionDiff:
    """`a` and `b` are digests. Lists hold what differs; `modules` and `heads` hold all, the farthest apart first.

    `overall` takes the deltas of all modules together as one vector (heads are no deltas and are not in it). Where one
    side has no LoRA deltas, `modules` are empty, `heads` are all tensors as they are stored, and `overall` is of those.
    `incomparable` are modules and heads whose shapes differ.
    """

    a: str
    b: str
    same_base: bool
    facts: tuple[Change, ...]
    config: tuple[Change, ...]
    training: tuple[Change, ...]
    metrics: tuple[MetricChange, ...]
    modules: tuple[WeightDistance, ...]
    heads: tuple[WeightDistance, ...]
    incomparable: tuple[str, ...]
    overall: WeightDistance

    @property
    def only_a(self) -> tuple[str, ...]:
        """Modules that only `a` adapts."""
        return tuple(sorted(module.module for module in self.modules if module.only_in == "a"))

    @property
    def only_b(self) -> tuple[str, ...]:
        """Modules that only `b` adapts."""
        return tuple(sorted(module.module for module in self.modules if module.only_in == "b"))


def diff_versions(a: Snapshot, b: Snapshot) -> VersionDiff:
    """Compares two versions. Raises Rejected or UnsupportedMethod for weights that admission would refuse."""
    left, right = (Checkpoint.open(side.files[WEIGHTS_FILE], side.manifest.peft_config) for side in (a, b))
    if not (left.factored and right.factored):
        left, right = left.whole(), right.whole()
    modules, odd_modules = _module_distances(left, right)
    heads, odd_heads = _head_distances(left, right)
    return VersionDiff(
        a=a.manifest.digest,
        b=b.manifest.digest,
        same_base=a.manifest.base_fingerprint == b.manifest.base_fingerprint,
        facts=changes(_facts(a.manifest), _facts(b.manifest)),
        config=changes(a.manifest.peft_config, b.manifest.peft_config),
        training=changes(_asked(a.manifest), _asked(b.manifest)),
        metrics=_metric_changes(a.manifest, b.manifest),
        modules=_sorted(modules),
        heads=_sorted(heads),
        incomparable=(*odd_modules, *odd_heads),
        overall=_overall(modules or heads),
    )


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Change, ...]:
    """What differs between two JSON objects, by dotted key. Lists of names are compared without their order."""
    left, right = dict(_leaves(a)), dict(_leaves(b))
    return tuple(
        Change(key, left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if not _equal(left.get(key, _MISSING), right.get(key, _MISSING))
    )


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _equal(a: Any, b: Any) -> bool:
    """Unset, null and empty mean the same in a config; PEFT writes sets of names as lists in any order."""
    empty = [value is _MISSING or value is None or value == [] or value == {} for value in (a, b)]
    if any(empty):
        return all(empty)
    if isinstance(a, list) and isinstance(b, list) and all(isinstance(item, str) for item in [*a, *b]):
        return sorted(a) == sorted(b)
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "task": manifest.task,
        # A mapping, since the order of labels is that of the head's rows.
        "labels": {str(index): label for index, label in enumerate(manifest.labels)},
        "method": manifest.peft_type,
        "rank": manifest.rank,
        "base": manifest.base_reference,
        "base fingerprint": manifest.base_fingerprint,
        "tokenizer": manifest.tokenizer_digest,
        "chat template": manifest.chat_template_digest,
        "libraries": manifest.library_versions,
        "parents": {str(index): parent for index, parent in enumerate(manifest.parents)},
    }


def _asked(manifest: Manifest) -> dict[str, Any]:
    """What was asked of the training: its record without results, and without where on a machine it ran."""
    kept = {key: value for key, value in (manifest.training or {}).items() if key not in _LEFT_OUT}
    settings = kept.get("settings")
    if isinstance(settings, Mapping):
        kept["settings"] = {key: value for key, value in settings.items() if key not in NOT_SETTINGS}
    return kept


def _metric_changes(a: Manifest, b: Manifest) -> tuple[MetricChange, ...]:
    left, right = metrics_of(a), metrics_of(b)
    return tuple(
        MetricChange(
            name,
            left.get(name),
            right.get(name),
            right[name] - left[name] if name in left and name in right else None,
        )
        for name in sorted(left.keys() | right.keys())
    )


def _module_distances(a: Checkpoint, b: Checkpoint) -> tuple[list[WeightDistance], list[str]]:
    pairs = dict(modules_in_both(a, b))
    found: list[WeightDistance] = []
    odd: list[str] = []
    for module, other in pairs.items():
        x, y = a.factors(module), b.factors(other)
        if x.shape != y.shape:
            odd.append(f"{module}: {list(x.shape)} and {list(y.shape)}")
        else:
            found.append(_low_rank_distance(module, x, y))
    found += [_alone(module, norm(a.factors(module)), "a") for module in a.scalings if module not in pairs]
    there = set(pairs.values())
    found += [_alone(module, norm(b.factors(module)), "b") for module in b.scalings if module not in there]
    return found, odd


def _low_rank_distance(module: str, x: LowRank, y: LowRank) -> WeightDistance:
    return _measured(module, norm(x), norm(y), distance(x, y), inner(x, y))


def _head_distances(a: Checkpoint, b: Checkpoint) -> tuple[list[WeightDistance], list[str]]:
    found: list[WeightDistance] = []
    odd: list[str] = []
    for name in sorted({*a.dense, *b.dense}):
        if name not in b.dense:
            found.append(_alone(name, float(np.linalg.norm(a.tensor(name))), "a"))
        elif name not in a.dense:
            found.append(_alone(name, float(np.linalg.norm(b.tensor(name))), "b"))
        else:
            x, y = a.tensor(name), b.tensor(name)
            if x.shape != y.shape:
                odd.append(f"{name}: {list(x.shape)} and {list(y.shape)}")
                continue
            norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
            found.append(_measured(name, *norms, float(np.linalg.norm(x - y)), float(np.vdot(x, y))))
    return found, odd


def _alone(module: str, length: float, side: Side) -> WeightDistance:
    norms = (length, 0.0) if side == "a" else (0.0, length)
    return WeightDistance(module, *norms, length, 1.0 if length else 0.0, None, side)


def _measured(module: str, norm_a: float, norm_b: float, apart: float, product: float) -> WeightDistance:
    largest = max(norm_a, norm_b)
    both = norm_a * norm_b
    cosine = max(-1.0, min(1.0, product / both)) if both else None
    return WeightDistance(module, norm_a, norm_b, apart, apart / largest if largest else 0.0, cosine)


def _overall(modules: list[WeightDistance]) -> WeightDistance:
    """Sums of squares over modules; the inner product of each follows from its cosine."""
    norm_a, norm_b, apart = (
        math.sqrt(math.fsum(getattr(module, field) ** 2 for module in modules))
        for field in ("norm_a", "norm_b", "distance")
    )
    product = math.fsum(
        module.cosine * module.norm_a * module.norm_b for module in modules if module.cosine is not None
    )
    return _measured("all modules", norm_a, norm_b, apart, product)


def _sorted(found: list[WeightDistance]) -> tuple[WeightDistance, ...]:
    return tuple(sorted(found, key=lambda module: (-module.relative, -module.distance, module.module)))
