"""Parameters of the base that an adapter brings itself: saved modules, biases, rows of embeddings, copies."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

from adapterbay.registry.admission.heads import ROOTS
from adapterbay.registry.admission.methods import Settings
from adapterbay.registry.admission.places import Base, Place
from adapterbay.registry.admission.report import AdaptedSite, TrainedTokens
from adapterbay.registry.admission.safetensors_file import TensorInfo
from adapterbay.registry.admission.tensor_values import FLOAT_DTYPES
from adapterbay.registry.errors import Rejected, UnsupportedMethod

_PART = re.compile(r"(?P<module>.+?)(?P<layer>\.base_layer)?\.(?P<part>weight|bias)")
_LEFTOVER = re.compile(r"(?P<module>.+?)\.(?:modules_to_save(?:\.default(?:\.\w+)+)?|original_module(?:\.\w+)*)\.bias")
"""What PEFT writes twice with bias="all" and does not read: of a layer, or of what holds layers (a head of two)."""


class Replaced:
    """Takes the tensors that belong to no method. `sites` are the adapted modules, `heads` the head's layers, `tied`
    modules that are saved with the embedding."""

    def __init__(
        self,
        settings: Settings,
        base: Base,
        sites: Mapping[str, Place],
        heads: Mapping[str, Mapping[str, TensorInfo]],
        tied: Container[str] = (),
    ) -> None:
        self._base = base
        self._sites = sites
        self._heads = heads
        self._tied = tied
        self._wanted = tuple(settings.names("modules_to_save"))
        bias: Any = settings.config.get("bias") or "none"
        self._all_biases = bias == "all"
        self._own_biases = bias != "none"
        self._saved: dict[str, tuple[Place, dict[str, TensorInfo]]] = {}
        self._copies: dict[str, tuple[Place, dict[str, TensorInfo]]] = {}
        self._whole: set[str] = set()
        self.ignored: list[str] = []

    def take(self, name: str, tensor: TensorInfo) -> bool:
        """Gives a tensor its place by its name without prefix; False: it has none. Raises Rejected, UnsupportedMethod.

        A module may be given whole by the name of what holds it (`mlp`), as PEFT saves it.
        """
        if self._all_biases and (left := _LEFTOVER.fullmatch(name)) and self._is_saved(left["module"]):
            self.ignored.append(tensor.name)
            return tensor.dtype in FLOAT_DTYPES
        found = _PART.fullmatch(name)
        if found is None:
            return False
        module, part, own_layer = found["module"], found["part"], found["layer"] is not None
        place = self._base.place(module)
        if place is None or (own_layer and module not in self._sites):
            return False
        if not own_layer and module in self._sites:
            return False  # PEFT calls the layer below an adapter base_layer
        if not own_layer and self._is_saved(module):
            self._whole.add(module)
            return self._put(self._saved, place, part, tensor)
        if part == "bias" and (self._own_biases if own_layer else self._all_biases):
            return self._put(self._saved, place, part, tensor)
        if place.kind in ("embedding", "output"):
            return self._put(self._copies, place, part, tensor)
        return False

    def saved(self) -> tuple[AdaptedSite, ...]:
        """Modules whose parameters are replaced. Raises Rejected if a saved module or a part of it is missing."""
        for name in self._wanted:
            there = any(module.endswith(name) or f"{name}." in module for module in (*self._saved, *self._heads))
            if not there and any(module.endswith(name) for module in self._base.modules()):
                raise Rejected(
                    f"modules_to_save names {name[:200]!r}, but it is not among the tensors.",
                    reason="MISSING_TENSOR",
                    metadata={"module": name[:200]},
                )
        for module in self._whole:
            place, parts = self._saved[module]
            for part in ("weight", "bias")[: 1 + place.bias]:
                if part not in parts:
                    raise Rejected(
                        f"{module} is among modules_to_save, but its {part} is not among the tensors.",
                        reason="MISSING_TENSOR",
                        metadata={"module": module},
                    )
        return _sites(self._saved)

    def copies(self) -> tuple[AdaptedSite, ...]:
        """Embeddings and heads that claim to be the base's own."""
        return _sites(self._copies)

    def _is_saved(self, module: str) -> bool:
        """Whether it, or what holds it, is among modules_to_save (PEFT compares the ends of names)."""
        parts = module.split(".")
        holders = (".".join(parts[: index + 1]) for index in range(len(parts)))
        return parts[0] in ROOTS or module in self._tied or any(holder.endswith(self._wanted) for holder in holders)

    def _put(
        self, where: dict[str, tuple[Place, dict[str, TensorInfo]]], place: Place, part: str, tensor: TensorInfo
    ) -> bool:
        expected = place.weight_shape if part == "weight" else (place.out_features,)
        if part == "bias" and not place.bias:
            return False
        _check_tensor(tensor, place, expected)
        where.setdefault(place.name, (place, {}))[1][part] = tensor
        return True


def trained_tokens(found: Mapping[str, TensorInfo], settings: Settings, base: Base) -> tuple[TrainedTokens, ...]:
    """The rows of trainable_token_indices, which is a list for the input embedding or an object by module."""
    wanted = settings.config.get("trainable_token_indices")
    rows = []
    for name, tensor in sorted(found.items()):
        place = base.place(name)
        if place is None or place.kind not in ("embedding", "output"):
            raise Rejected(
                f"The adapter has rows for {name}, which is no embedding of the base.",
                reason="UNKNOWN_MODULE",
                metadata={"module": name},
            )
        count = place.in_features if place.kind == "embedding" else place.out_features
        width = place.out_features if place.kind == "embedding" else place.in_features
        tokens = _tokens_of(wanted, place, count)
        if tokens is None:
            raise Rejected(
                f"The adapter has rows for {name}, but trainable_token_indices leaves it out.",
                reason="UNKNOWN_TENSOR",
                metadata={"module": name},
            )
        _check_tensor(tensor, place, (len(tokens), width))
        rows.append(TrainedTokens(name, place.base_name, tokens, tensor.name))
    if wanted is not None and wanted != {} and not rows:
        raise Rejected("trainable_token_indices is set, but no rows are among the tensors.", reason="MISSING_TENSOR")
    return tuple(rows)


def _tokens_of(wanted: Any, place: Place, count: int) -> tuple[int, ...] | None:
    if isinstance(wanted, list) and place.kind == "embedding":
        return Settings({"trainable_token_indices": wanted}).integers("trainable_token_indices", below=count)
    if isinstance(wanted, dict):
        for key in wanted:
            if isinstance(key, str) and place.name.endswith(key):
                return Settings(wanted).integers(key, below=count)
    return None


def _sites(found: Mapping[str, tuple[Place, dict[str, TensorInfo]]]) -> tuple[AdaptedSite, ...]:
    return tuple(
        AdaptedSite.at(place, {part: tensor.name for part, tensor in sorted(parts.items(), reverse=True)})
        for _, (place, parts) in sorted(found.items())
    )


def _check_tensor(tensor: TensorInfo, place: Place, expected: tuple[int, ...]) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise Rejected(
            f"The tensor {tensor.name[:200]!r} has the dtype {tensor.dtype}: save it as F32, BF16 or F16.",
            reason="UNSUPPORTED_DTYPE",
            metadata={"tensor": tensor.name[:200]},
        )
    if tensor.shape == expected:
        return
    table = expected == place.weight_shape and place.kind in ("embedding", "output")
    if table and len(tensor.shape) == 2 and tensor.shape[1:] == expected[1:]:
        raise UnsupportedMethod(
            f"{tensor.name[:200]} has {tensor.shape[0]} rows and the base {expected[0]}: adapters that changed the "
            "vocabulary are not served.",
            metadata={"module": place.name},
        )
    raise Rejected(
        f"{tensor.name[:200]} has the shape {list(tensor.shape)}, but {list(expected)} is needed there.",
        reason="SHAPE_MISMATCH",
        metadata={"module": place.name},
    )
