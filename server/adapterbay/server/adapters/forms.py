"""PEFT checkpoint to serving form: what an adapter becomes in memory so that it can run beside others in one batch.

Names are relative to the backbone: `layers.0.self_attn.q_proj`, whatever model class the adapter was trained in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from adapterbay.registry.errors import NoEffect, Rejected, UnsupportedMethod
from adapterbay.registry.manifest import Manifest

PREFIX = "base_model.model."
HEADS = ("score", "classifier")
"""The names that transformers gives classification heads; a head is the last component of a path."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's delta: `scaling · Bᵀ` rows after `A` rows. a [rank, in], b [rank, out]."""

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
    manifest: Manifest, weights: bytes, sites: Mapping[str, tuple[int, int]], dtype: torch.dtype
) -> ServingForm:
    """Reads a checkpoint. `sites` maps the backbone's linear layers to (in, out) features.

    Every tensor must find its place: Rejected for one that does not, UnsupportedMethod for a method that is not
    served, NoEffect for an adapter that would change nothing.
    """
    config = manifest.peft_config
    if manifest.peft_type != "LORA":
        raise UnsupportedMethod(f"PEFT method {manifest.peft_type} is not served; LORA is.")
    tensors = load_safetensors(weights)
    head = _take_head(tensors, manifest.labels)
    pairs: dict[str, dict[str, Tensor]] = {}
    paths: dict[str, str] = {}
    for name, tensor in tensors.items():
        path, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX) or kind not in ("A.weight", "B.weight"):
            raise Rejected(f"Tensor {name} has no meaning in a LoRA adapter.", reason="UNKNOWN_TENSOR")
        site = find_site(path, sites)
        if site is None:
            raise Rejected(f"Tensor {name} belongs to no linear layer of this base.", reason="UNKNOWN_MODULE")
        if paths.setdefault(site, path) != path:
            raise Rejected(f"{paths[site]} and {path} both mean layer {site}.", reason="UNKNOWN_MODULE")
        pairs.setdefault(site, {})[kind[0]] = tensor
    layers = {site: _low_rank(site, paths[site], pair, config, sites[site], dtype) for site, pair in pairs.items()}
    if head is None and all(not layer.a.any() or not layer.b.any() for layer in layers.values()):
        raise NoEffect(
            "Every delta of this adapter is zero and it has no head: it would answer exactly like the base. "
            "Was it saved before training?"
        )
    return ServingForm(digest=manifest.digest, manifest=manifest, layers=layers, head=head)


def find_site(path: str, sites: Collection[str]) -> str | None:
    """The backbone-relative name of a module path as PEFT saved it, which may begin with the model's own prefix."""
    while path:
        if path in sites:
            return path
        _, _, path = path.partition(".")
    return None


def _low_rank(
    site: str,
    path: str,
    pair: Mapping[str, Tensor],
    config: Mapping[str, Any],
    size: tuple[int, int],
    dtype: torch.dtype,
) -> LowRank:
    if set(pair) != {"A", "B"}:
        raise Rejected(f"Layer {site} has only one of lora_A and lora_B.", reason="UNKNOWN_TENSOR")
    a, b = pair["A"], pair["B"]
    rank = a.shape[0]
    if a.shape != (rank, size[0]) or b.shape != (size[1], rank):
        raise Rejected(
            f"Layer {site} of this base takes A [r, {size[0]}] and B [{size[1]}, r]; the adapter has "
            f"A {list(a.shape)} and B {list(b.shape)}.",
            reason="SHAPE_MISMATCH",
        )
    return LowRank(a=a.to(dtype), b=b.t().contiguous().to(dtype), scaling=scaling_of(path, rank, config))


def scaling_of(path: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / √r for rsLoRA, with PEFT's own per-layer patterns (`peft.utils.get_pattern_key`)."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    key = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", path)), None)
    alpha = float(patterns[key] if key is not None else config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _take_head(tensors: dict[str, Tensor], labels: tuple[str, ...]) -> Head | None:
    found: dict[str, Tensor] = {}
    for name in list(tensors):
        *_, module, kind = name.split(".")
        if module in HEADS and kind in ("weight", "bias"):
            found[kind] = tensors.pop(name).float()
    if not found:
        return None
    if "weight" not in found or found["weight"].ndim != 2:
        raise Rejected("The classification head has no two-dimensional weight.", reason="SHAPE_MISMATCH")
    rows = found["weight"].shape[0]
    names = labels or tuple(str(index) for index in range(rows))
    if len(names) != rows:
        raise Rejected(f"The head has {rows} rows and the manifest {len(names)} labels.", reason="SHAPE_MISMATCH")
    return Head(weight=found["weight"], bias=found.get("bias"), labels=names)
