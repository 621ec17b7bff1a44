"""PEFT checkpoint to serving form: what an adapter becomes in memory so that it can run beside others in one batch.

Names are relative to the backbone: `layers.0.self_attn.q_proj`, whatever model class the adapter was trained in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from safetensors.torch import load as load_safetensors
from torch import Tensor

from adapterbay.registry import BaseFiles, Manifest, admit
from adapterbay.registry.errors import Rejected, UnsupportedMethod
from adapterbay.registry.manifest import WEIGHTS_FILE


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's delta, as it was stored: a [rank, in], b [rank, out] (a view of B). Placing it casts and copies, on
    the engine's thread, so that loading threads compute nothing (see `Engine.create`)."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Head:
    """A linear classification head in float32. weight [labels, hidden], bias [labels] or None."""

    weight: Tensor
    bias: Tensor | None
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServingForm:
    """An adapter, ready to be placed. `layers` maps a backbone-relative module path to its delta."""

    digest: str
    manifest: Manifest
    layers: Mapping[str, LowRank]
    head: Head | None

    @property
    def bytes(self) -> int:
        """What the form takes in host memory."""
        total = sum(layer.a.nbytes + layer.b.nbytes for layer in self.layers.values())
        if self.head is not None:
            total += self.head.weight.nbytes + (self.head.bias.nbytes if self.head.bias is not None else 0)
        return total


def build_form(
    manifest: Manifest,
    files: Mapping[str, bytes],
    base: BaseFiles,
    sites: Mapping[str, tuple[int, int]],
) -> ServingForm:
    """Admits an adapter's files once more, against this very base, and reads them.

    `sites` maps the backbone's linear layers to (in, out) features. Raises what `adapterbay.registry.admit` raises, and
    UnsupportedMethod for a module that admission knows and this engine has no layer for.
    """
    report = admit(files, base.tensor_shapes(), base_config=base.config, labels=manifest.labels or None)
    tensors = load_safetensors(files[WEIGHTS_FILE])
    layers: dict[str, LowRank] = {}
    for module in report.modules:
        site = find_site(module.base_name, sites)
        if site is None or sites[site] != (module.in_features, module.out_features):
            raise UnsupportedMethod(f"Module {module.name} is no linear layer of this base's backbone.")
        if site in layers:
            raise Rejected(f"The adapter names layer {site} twice.", reason="UNKNOWN_MODULE")
        layers[site] = LowRank(
            a=tensors[module.a_key],
            b=tensors[module.b_key].t(),
            scaling=module.scaling,
        )
    head = None
    if report.head is not None:
        head = Head(
            weight=tensors[report.head.keys[0]].float(),
            bias=tensors[report.head.keys[1]].float() if report.head.has_bias else None,
            labels=manifest.labels or tuple(str(index) for index in range(report.head.labels)),
        )
    return ServingForm(digest=manifest.digest, manifest=manifest, layers=layers, head=head)


def find_site(path: str, sites: Collection[str]) -> str | None:
    """The backbone-relative name of a module as the base's checkpoint names it, which may begin with a prefix."""
    if path in sites:
        return path
    _, _, inner = path.partition(".")
    return inner if inner in sites else None
