"""What a request selected, resolved once at its arrival. From then on versions are fixed, whatever aliases do."""

from __future__ import annotations

import asyncio

from adapterbay.registry.errors import InvalidArgument, InvalidReference, NotFound, TaskMismatch
from adapterbay.server.requests import ArmSpec, Part
from adapterbay.server.services.ports import AdaptersPort
from adapterbay.server.services.selection import Choice, Selected


async def resolve_arm(adapters: AdaptersPort, selected: Selected) -> ArmSpec:
    """The arm that a selection means now. The registry is asked on another thread."""
    return await asyncio.to_thread(resolve_now, adapters, selected) if selected.choices else ArmSpec()


def resolve_now(adapters: AdaptersPort, selected: Selected) -> ArmSpec:
    """Like `resolve_arm`, on this thread. Errors name the field that named the adapter."""
    parts: list[Part] = []
    for choice in selected.choices:
        part = _resolve_choice(adapters, choice)
        if any(other.digest == part.digest for other in parts):
            raise InvalidArgument(
                f"{choice.reference!r} is {part.name}@{part.version}, which is in the fusion already.",
                field=choice.field,
            )
        parts.append(part)
    return ArmSpec(tuple(parts), selected.fusion)


def _resolve_choice(adapters: AdaptersPort, choice: Choice) -> Part:
    try:
        resolved = adapters.resolve(choice.reference)
    except InvalidReference as error:
        raise InvalidReference(error.message, field=choice.field, reason=error.reason) from error
    except NotFound as error:
        error.metadata.setdefault("field", choice.field)
        raise
    return Part(
        reference=choice.reference,
        name=resolved.name,
        version=resolved.version,
        digest=resolved.digest,
        weight=choice.weight,
        layer_weights=choice.layer_weights,
    )


def require_head(arm: ArmSpec) -> None:
    """Refuses to classify with the base alone. Whether an adapter has a head, the engine checks."""
    if not arm.parts:
        raise TaskMismatch("The base alone has no classification head; name an adapter that brings one.")


async def text_room(adapters: AdaptersPort, arm: ArmSpec, base_limit: int) -> int:
    """Where `truncate` cuts texts to embed: what its adapters' virtual tokens leave of the base's context."""

    def virtual_tokens() -> list[int]:
        configs = [adapters.registry.manifest(part.digest).peft_config for part in arm.parts]
        counts = [config.get("num_virtual_tokens") for config in configs]
        return [count for count in counts if isinstance(count, int) and count > 0]

    return max(base_limit - max(await asyncio.to_thread(virtual_tokens), default=0), 1)


async def text_limit(adapters: AdaptersPort, arm: ArmSpec, base_limit: int) -> int:
    """Where `truncate` cuts texts to label: the shortest length its adapters were trained on, or `text_room`."""

    def trained_lengths() -> list[int]:
        manifests = [adapters.registry.manifest(part.digest) for part in arm.parts]
        lengths = [(manifest.training or {}).get("max_length") for manifest in manifests]
        return [length for length in lengths if isinstance(length, int) and length > 0]

    return min([await text_room(adapters, arm, base_limit), *await asyncio.to_thread(trained_lengths)])
