"""LoRA's own reading of its sites: rank, scaling, and what its variants add."""

from __future__ import annotations

from collections.abc import Sequence

from adapterbay.registry.admission.lora_config import lora_settings
from adapterbay.registry.admission.methods import Settings
from adapterbay.registry.admission.methods.lora import block_diagonal, initialisation
from adapterbay.registry.admission.places import Place
from adapterbay.registry.admission.report import AdaptedModule, AdaptedSite, Matched


def lora_modules(matched: Matched, settings: Settings) -> tuple[AdaptedModule, ...]:
    """The modules with A and B, by name."""
    numbers = lora_settings(settings)
    found = []
    for site in matched.sites:
        rank = numbers.rank_of(site.name)
        blocks = block_diagonal(settings, _place(site)) if site.kind != "embedding" else (0, 0)
        found.append(
            AdaptedModule(
                name=site.name,
                base_name=site.base_name,
                rank=rank,
                scaling=numbers.scaling_of(site.name, rank),
                in_features=site.in_features,
                out_features=site.out_features,
                transposed=site.kind == "conv1d",
                kind=site.kind,
                magnitude_key=site.tensors.get("lora_magnitude_vector"),
                bias_key=site.tensors.get("lora_B.bias"),
                diagonal_key=site.tensors.get("lora_diag"),
                blocks_a=blocks[0],
                blocks_b=blocks[1],
            )
        )
    return tuple(found)


def variants(settings: Settings, modules: Sequence[AdaptedModule]) -> list[str]:
    """What makes it more than LoRA, for people."""
    found = []
    if any(module.magnitude_key for module in modules):
        found.append("DoRA: with the magnitudes of the weight's rows")
    if any(module.bias_key for module in modules):
        found.append("with biases of B")
    if any(module.diagonal_key for module in modules):
        found.append("KaSA: over a truncated base")
    if any(module.blocks_a or module.blocks_b for module in modules):
        found.append("block-diagonal (BD-LoRA)")
    if start := initialisation(settings):
        found.append(f"over the base as init_lora_weights={start!r} leaves it")
    if tokens := settings.integers("alora_invocation_tokens"):
        found.append(f"on from {len(tokens)} invocation tokens on (aLoRA)")
    return found


def _place(site: AdaptedSite) -> Place:
    return Place(site.name, site.base_name, site.kind, site.in_features, site.out_features, bias=False)
