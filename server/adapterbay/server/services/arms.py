"""What a request selected, resolved once at its arrival. From then on versions are fixed, whatever aliases do."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adapterbay.registry import Resolved
from adapterbay.registry.errors import (
    AdapterbayError,
    BaseMismatch,
    Corrupted,
    InvalidArgument,
    InvalidReference,
    NoEffect,
    NotFound,
    Rejected,
    TaskMismatch,
    UnsupportedMethod,
    Untrusted,
)
from adapterbay.server.requests import ArmSpec, Part
from adapterbay.server.services.ports import AdaptersPort
from adapterbay.server.services.selection import Choice, Selected

OF_ADAPTERS = (BaseMismatch, Corrupted, NoEffect, Rejected, TaskMismatch, UnsupportedMethod, Untrusted)
"""The errors that are some adapter's fault, unless they say that they are the base's."""


def resolve_arm(adapters: AdaptersPort, selected: Selected) -> ArmSpec:
    """The arm that a selection means now. May block. Errors name the field that named the adapter."""
    return _arm(selected, [_resolve_choice(adapters, choice) for choice in selected.choices])


def arm_at_once(adapters: AdaptersPort, selected: Selected) -> ArmSpec | None:
    """The same if that can be told without waiting; None leaves it to `resolve_arm`, as for names that nobody has."""
    found = []
    for choice in selected.choices:
        resolved = adapters.resolve_at_once(choice.reference)
        if resolved is None:
            return None
        found.append(resolved)
    return _arm(selected, found)


def _arm(selected: Selected, found: Iterable[Resolved]) -> ArmSpec:
    parts: list[Part] = []
    for choice, resolved in zip(selected.choices, found, strict=True):
        if any(other.digest == resolved.digest for other in parts):
            raise InvalidArgument(
                f"{choice.reference!r} is {resolved.name}@{resolved.version}, which is in the fusion already.",
                field=choice.field,
            )
        parts.append(
            Part(
                reference=choice.reference,
                name=resolved.name,
                version=resolved.version,
                digest=resolved.digest,
                weight=choice.weight,
                layer_weights=choice.layer_weights,
            )
        )
    return ArmSpec(tuple(parts), selected.fusion)


def _resolve_choice(adapters: AdaptersPort, choice: Choice) -> Resolved:
    try:
        return adapters.resolve(choice.reference)
    except InvalidReference as error:
        raise InvalidReference(error.message, field=choice.field, reason=error.reason) from error
    except NotFound as error:
        error.metadata.setdefault("field", choice.field)
        raise


def named(error: AdapterbayError, arms: Iterable[ArmSpec]) -> AdapterbayError:
    """The error with the adapter that it is about by name: in a call with several, nobody else could know which.

    The engine knows contents by their digests; what they are called is the call's business. Names that mean one content
    are told together. What is the base's fault (`base_reference` in its metadata) blames no adapter.
    """
    names: dict[str, list[str]] = {}
    for part in (part for arm in arms for part in arm.parts):
        known = names.setdefault(part.digest, [])
        if str(part) not in known:
            known.append(str(part))
    called = {digest: ", ".join(known) for digest, known in names.items()}
    message = error.message
    if called:
        digests = re.compile("|".join(map(re.escape, called)))
        message = digests.sub(lambda found: f"{called[found[0]]} ({found[0]})", message)
    if isinstance(error, OF_ADAPTERS) and "base_reference" not in error.metadata:
        told = {name for known in names.values() for name in known}
        if not any(re.search(rf"(?<![\w./-]){re.escape(name)}(?!\w)", message) for name in told):
            digest = error.metadata.get("adapter_digest")
            who = [called[digest]] if digest in called else list(called.values())
            message = f"{' + '.join(who)}: {message}" if who else message
    return error if message == error.message else error.told(message)


def require_head(arm: ArmSpec) -> None:
    """Refuses to classify with the base alone. Whether an adapter has a head, the engine checks."""
    if not arm.parts:
        raise TaskMismatch("The base alone has no classification head; name an adapter that brings one.")


def text_room(adapters: AdaptersPort, arm: ArmSpec, base_limit: int) -> int:
    """Where `truncate` cuts texts to embed: what its adapters' virtual tokens leave of the base's context.

    May block.
    """
    configs = [adapters.manifest(part.digest).peft_config for part in arm.parts]
    counts = [config.get("num_virtual_tokens") for config in configs]
    return max(base_limit - max((count for count in counts if isinstance(count, int) and count > 0), default=0), 1)


def text_limit(adapters: AdaptersPort, arm: ArmSpec, base_limit: int) -> int:
    """Where `truncate` cuts texts to label: the shortest length its adapters were trained on, or `text_room`.

    May block.
    """
    manifests = [adapters.manifest(part.digest) for part in arm.parts]
    lengths = [(manifest.training or {}).get("max_length") for manifest in manifests]
    trained = [length for length in lengths if isinstance(length, int) and length > 0]
    return min([text_room(adapters, arm, base_limit), *trained])
