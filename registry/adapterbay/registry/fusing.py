"""A new version made of several: PEFT's `add_weighted_adapter`, with the parents recorded.

    parts = [read_part(registry, parse_weighted(text)) for text in ("a@1:0.7", "b@champion:0.3")]
    receipt = fuse_versions(registry, "team/both", parts, FusionSettings("cat"))

Checked here, without torch: the settings, and whether the parents go together. The fusion itself needs torch and PEFT
and is found by its entry point, as the conversion of bases is.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from adapterbay.registry.admission.lora_config import plain_settings
from adapterbay.registry.backend import Backend
from adapterbay.registry.base import BaseFiles, BaseReference, locate
from adapterbay.registry.errors import BaseMismatch, InvalidArgument, MissingExtra, TaskMismatch
from adapterbay.registry.local.commit import Force
from adapterbay.registry.local.store import Registry
from adapterbay.registry.manifest import TRAINING_FILE, Manifest
from adapterbay.registry.views import PushReceipt, Resolved, Snapshot

ENTRY_POINT_GROUP: Final = "adapterbay.adapter_fusers"

METHODS: Final = (
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
"""`combination_type` of PEFT's `add_weighted_adapter` (0.21).

`cat` is the weighted sum of the deltas, exactly. `svd` is its best approximation of the rank that is asked for.
`linear` sums A and B separately, with cross terms. TIES is arXiv:2306.01708, DARE arXiv:2311.03099.
"""

MAJORITY_SIGNS: Final = ("total", "frequency")
DEFAULT_DENSITY: Final = 0.5
MAX_PARTS: Final = 64
_VERSIONED: Final = ("adapterbay", "peft", "torch", "transformers")
_FORM: Final = "write REF:WEIGHT, such as team/a@1:0.7"


@dataclass(frozen=True, slots=True)
class WeightedReference:
    """A version and the factor on its delta. The factor may be negative; it is finite and not zero."""

    reference: str
    weight: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0.0:
            raise InvalidArgument(
                f"The weight of {self.reference[:200]} is {self.weight}: it must be finite and not 0.", field="weight"
            )

    def spelled(self, reference: str) -> WeightedReference:
        """The same weight for a reference as its own registry spells it."""
        return WeightedReference(reference, self.weight)

    def __str__(self) -> str:
        return f"{self.reference}:{self.weight!r}"


def parse_weighted(text: str) -> WeightedReference:
    """Reads `REF:WEIGHT`, from the right, since a digest and `hub:` hold colons too. Raises InvalidArgument."""
    reference, separator, number = text.rpartition(":")
    # Without a weight, the last colon is that of hub: or of sha256:, whose digits may look like a number.
    digest_only = reference.endswith("@sha256") and re.fullmatch(r"[0-9a-f]{64}", number) is not None
    weight = math.nan
    if separator and reference and not digest_only and re.fullmatch(r"[0-9+.eE-]+", number):
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
    if math.isnan(weight):
        raise InvalidArgument(f"{text[:200]!r} has no weight: {_FORM}.", field="weight")
    return WeightedReference(reference, weight)


@dataclass(frozen=True, slots=True)
class FusionSettings:
    """How parts are fused. What a method does not use must be None; `completed` fills in defaults.

    `density` is the share of values that are kept, 0 to 1; `rank` is that of the result (None: the largest of the
    parts'); `seed` is that of the values that DARE drops; `majority_sign` is what elects the sign of a value in TIES:
    the sum of the parts' values ("total", as None is) or the number of parts ("frequency").
    """

    method: str = "cat"
    density: float | None = None
    rank: int | None = None
    seed: int | None = None
    majority_sign: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidArgument(
                f"{self.method[:60]!r} is not a method of fusion: {', '.join(METHODS)} are.", field="method"
            )
        for name, value, used in (
            ("density", self.density, self.prunes),
            ("rank", self.rank, self.decomposes),
            ("seed", self.seed, self.drops_at_random),
            ("majority_sign", self.majority_sign, self.elects_signs),
        ):
            if value is not None and not used:
                raise InvalidArgument(f"The method {self.method} has no {name}: leave it out.", field=name)
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise InvalidArgument(f"density is {self.density}: it must be above 0 and at most 1.", field="density")
        if self.rank is not None and self.rank < 1:
            raise InvalidArgument(f"rank is {self.rank}: it must be at least 1.", field="rank")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InvalidArgument(f"seed is {self.seed}: it must be 0 or more, and fit 63 bits.", field="seed")
        if self.majority_sign not in (None, *MAJORITY_SIGNS):
            raise InvalidArgument(
                f"majority_sign is {self.majority_sign[:60]!r}: it must be {' or '.join(MAJORITY_SIGNS)}.",
                field="majority_sign",
            )

    @property
    def prunes(self) -> bool:
        """Whether values are dropped."""
        return self.method.startswith(("ties", "dare", "magnitude_prune"))

    @property
    def drops_at_random(self) -> bool:
        """Whether it needs a seed."""
        return self.method.startswith("dare")

    @property
    def decomposes(self) -> bool:
        """Whether the rank of the result can be chosen."""
        return self.method.endswith("svd")

    @property
    def elects_signs(self) -> bool:
        """Whether values whose sign is not that of the majority are left out."""
        return "ties" in self.method

    @property
    def needs_equal_ranks(self) -> bool:
        """Whether A and B are combined value by value."""
        return self.method != "cat" and not self.decomposes

    def completed(self) -> FusionSettings:
        """With the defaults of what was left open: density 0.5, seed 0; a majority_sign that is the default is None."""
        density = DEFAULT_DENSITY if self.density is None and self.prunes else self.density
        seed = 0 if self.seed is None and self.drops_at_random else self.seed
        sign = None if self.majority_sign == MAJORITY_SIGNS[0] else self.majority_sign
        return FusionSettings(self.method, density, self.rank, seed, sign)


class Fuser(Protocol):
    """What the entry point names."""

    def __call__(
        self,
        base: BaseFiles,
        task: str,
        adapters: Sequence[Mapping[str, Path]],
        weights: Sequence[float],
        settings: FusionSettings,
        destination: Path,
    ) -> None:
        """Writes the fused adapter into the empty folder `destination` as PEFT would save it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A version that takes part in a fusion."""

    resolved: Resolved
    snapshot: Snapshot
    weight: float

    @property
    def manifest(self) -> Manifest:
        """What the version is."""
        return self.snapshot.manifest

    def __str__(self) -> str:
        return f"{self.resolved.name}@{self.resolved.version}"


def read_part(registry: Backend, weighted: WeightedReference) -> Part:
    """What a reference means now, with its files. Raises NotFound, InvalidReference or Corrupted."""
    resolved = registry.resolve(weighted.reference)
    return Part(resolved, registry.snapshot(f"{resolved.name}@{resolved.digest}"), weighted.weight)


def fuse_versions(
    registry: Backend,
    name: str,
    parts: Sequence[Part],
    settings: FusionSettings,
    *,
    aliases: Sequence[str] = (),
    base: str | BaseReference | None = None,
    force: Force | None = None,
) -> PushReceipt:
    """Fuses versions and pushes the result as the next version of `name` in `registry`, all parts as its parents.

    The parts may come from other registries. `base` says where their base is, if it is not where their manifests say.
    `force` overrules the guards of `aliases` in a local registry, and is recorded.
    Raises InvalidArgument, NotFound, BaseMismatch (both fingerprints), TaskMismatch (tasks or labels), MissingExtra
    without PEFT, and what a push raises: NoEffect if the parts cancel out.
    """
    overruling: dict[str, Any] = {}
    if force is not None:
        if not isinstance(registry, Registry):
            raise InvalidArgument("A guard is overruled in a registry in a folder only.", field="force")
        overruling["force"] = force
    settings = settings.completed()
    _check_together(parts, settings)
    fuser = find_fuser()
    first = parts[0].manifest
    files = locate(base if base is not None else first.base_reference)
    if files.fingerprint != first.base_fingerprint:
        raise BaseMismatch(
            f"The base {files.reference} has the fingerprint {files.fingerprint}, but {parts[0]} needs "
            f"{first.base_fingerprint}. Pass --base to say where the right one is.",
            expected=first.base_fingerprint,
            actual=files.fingerprint,
        )
    with tempfile.TemporaryDirectory(prefix="adapterbay-fuse-") as temporary:
        folder = Path(temporary)
        fuser(
            files,
            first.task,
            [part.snapshot.files for part in parts],
            [part.weight for part in parts],
            settings,
            folder,
        )
        record = _record(parts, settings, str(files.reference))
        text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / TRAINING_FILE).write_text(text, encoding="utf-8")
        return registry.push(
            folder,
            name,
            aliases=aliases,
            base=base,
            parents=[part.resolved.digest for part in parts],
            **overruling,
        )


def find_fuser() -> Fuser:
    """The one that the installed parts bring. Raises MissingExtra if there is none or it cannot be loaded."""
    entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name="peft")
    if not entries:
        raise MissingExtra("Fusing adapters needs torch and PEFT: pip install 'adapterbay[server]'.")
    try:
        found: Fuser = next(iter(entries)).load()
    except ImportError as error:
        raise _missing(error) from error
    return found


def _missing(error: ImportError) -> MissingExtra:
    return MissingExtra(f"Fusing adapters needs more: pip install 'adapterbay[server]' ({error}).")


def _check_together(parts: Sequence[Part], settings: FusionSettings) -> None:
    if len(parts) < 2:
        raise InvalidArgument(f"A fusion needs two versions or more: {_FORM}.", field="parts")
    if len(parts) > MAX_PARTS:
        raise InvalidArgument(f"{len(parts)} versions were given; {MAX_PARTS} can be fused at once.", field="parts")
    first = parts[0]
    for index, part in enumerate(parts):
        _check_pair(first, part)
        for other in parts[:index]:
            if other.resolved.digest == part.resolved.digest:
                raise InvalidArgument(
                    f"{part} is the same content as {other}, which is in the fusion already: add up their weights.",
                    field="parts",
                )
    total = math.fsum(part.weight for part in parts)
    if first.manifest.labels and total <= 0.0:
        raise TaskMismatch(f"The weights of the heads add up to {total:g}; they must add up to more than 0.")
    ranks = {str(part): _peft_rank(part.manifest) for part in parts}
    if settings.needs_equal_ranks and len(set(ranks.values())) > 1:
        listed = ", ".join(f"{part} has {rank}" for part, rank in ranks.items())
        raise InvalidArgument(
            f"The method {settings.method} needs equal ranks, but {listed}: use cat or svd.", field="method"
        )


def _check_pair(first: Part, other: Part) -> None:
    """Raises BaseMismatch or TaskMismatch unless both are of one base, one task and one list of labels."""
    if other.manifest.base_fingerprint != first.manifest.base_fingerprint:
        raise BaseMismatch(
            f"{other} belongs to a base with the fingerprint {other.manifest.base_fingerprint}, but {first} to one "
            f"with {first.manifest.base_fingerprint}: only adapters of one base can be fused.",
            expected=first.manifest.base_fingerprint,
            actual=other.manifest.base_fingerprint,
        )
    if other.manifest.task != first.manifest.task:
        raise TaskMismatch(
            f"The task of {other} is {other.manifest.task}, but that of {first} is {first.manifest.task}: only "
            "adapters of one task can be fused."
        )
    if other.manifest.labels != first.manifest.labels:
        raise TaskMismatch(
            f"The heads have different labels, {_shown(first.manifest.labels)} of {first} and "
            f"{_shown(other.manifest.labels)} of {other}; only heads with the same labels in the same order can be "
            "fused."
        )


def _shown(labels: Sequence[str]) -> str:
    return str([label[:40] for label in labels[:10]])


def _peft_rank(manifest: Manifest) -> int:
    """The rank that PEFT compares: the largest that the config names. Raises UnsupportedMethod unless it is LoRA."""
    settings = plain_settings(manifest.peft_config)
    return max([settings.r, *settings.rank_pattern.values()])


def _record(parts: Sequence[Part], settings: FusionSettings, base_reference: str) -> dict[str, Any]:
    """training.json of a fusion: no names, since the same content must have the same digest under any name."""
    first = parts[0].manifest
    digests = [part.resolved.digest for part in parts]
    fusion: dict[str, Any] = {
        "method": settings.method,
        "parents": digests,
        "weights": [part.weight for part in parts],
        **{
            key: value
            for key in ("density", "rank", "seed", "majority_sign")
            if (value := getattr(settings, key)) is not None
        },
    }
    record: dict[str, Any] = {
        "schema": 1,
        "base": {"reference": base_reference, "fingerprint": first.base_fingerprint},
        "task": first.task,
        "labels": list(first.labels),
        "fusion": fusion,
        "parents": digests,
        "versions": _versions(),
    }
    lengths = [(part.manifest.training or {}).get("max_length") for part in parts]
    known = [length for length in lengths if isinstance(length, int) and not isinstance(length, bool) and length > 0]
    if known:
        # A server cuts texts at the length that all of the parents know.
        record["max_length"] = min(known)
    templates = {part.manifest.chat_template_digest for part in parts}
    if len(templates) == 1 and None not in templates:
        record["chat_template_digest"] = templates.pop()
    return record


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
