"""The tensors of a LoRA checkpoint matched with the linear layers of its base.

PEFT writes, for a linear layer of `out` rows and `in` columns:

    base_model.model.<module>.lora_A.weight   [r, in]
    base_model.model.<module>.lora_B.weight   [out, r]
    base_model.model.<head>.weight            [labels, hidden]     and .bias [labels]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from adapterbay.registry.admission.lora_config import HEAD_MODULES, LoraSettings
from adapterbay.registry.admission.module_names import (
    CONV1D_MODEL_TYPES,
    EMBEDDING_AND_OUTPUT,
    backbone_path,
    hidden_size,
)
from adapterbay.registry.admission.patterns import Targets
from adapterbay.registry.admission.safetensors_file import Header, TensorInfo
from adapterbay.registry.admission.tensor_values import FLOAT_DTYPES
from adapterbay.registry.errors import Rejected, UnsupportedMethod

PREFIX: Final = "base_model.model."
_LORA_KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING_KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_embedding_[AB]")
_HEAD_KEY = re.compile(rf"base_model\.model\.(?P<head>{'|'.join(HEAD_MODULES)})\.(?P<part>weight|bias)")
_HEAD_LAYER_KEY = re.compile(rf"base_model\.model\.({'|'.join(HEAD_MODULES)})\..+")


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One adapted linear layer: y = W x + scaling · B (A x), A [rank, in_features], B [out_features, rank].

    `name` is the module as the adapter calls it, `base_name` as the checkpoint of the base does. `transposed`: the base
    stores W as [in, out] (Conv1D).
    """

    name: str
    base_name: str
    rank: int
    scaling: float
    in_features: int
    out_features: int
    transposed: bool

    @property
    def a_key(self) -> str:
        """The key of A in the checkpoint."""
        return f"{PREFIX}{self.name}.lora_A.weight"

    @property
    def b_key(self) -> str:
        """The key of B in the checkpoint."""
        return f"{PREFIX}{self.name}.lora_B.weight"


@dataclass(frozen=True, slots=True)
class Head:
    """A classifier: weight [labels, hidden], and a bias [labels] or none."""

    name: str
    labels: int
    hidden: int
    has_bias: bool

    @property
    def weight_key(self) -> str:
        """The key of the weight in the checkpoint."""
        return f"{PREFIX}{self.name}.weight"

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its tensors in the checkpoint."""
        return (self.weight_key, f"{PREFIX}{self.name}.bias") if self.has_bias else (self.weight_key,)


@dataclass(frozen=True, slots=True)
class Matched:
    """All tensors of a checkpoint, each in its place. Modules are sorted by name."""

    modules: tuple[AdaptedModule, ...]
    head: Head | None


def match_tensors(
    header: Header,
    config: dict[str, Any],
    settings: LoraSettings,
    base_shapes: Mapping[str, tuple[int, ...]],
    base_config: Mapping[str, Any],
) -> Matched:
    """Gives every tensor its place, or raises Rejected or UnsupportedMethod. No tensor is left over."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    heads: dict[str, dict[str, TensorInfo]] = {}
    for key, tensor in header.tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise Rejected(
                f"The tensor {key[:200]!r} has the dtype {tensor.dtype}: save it as F32, BF16 or F16.",
                reason="UNSUPPORTED_DTYPE",
                metadata={"tensor": key[:200]},
            )
        if match := _LORA_KEY.fullmatch(key):
            factors.setdefault(match["module"], {})[match["side"]] = tensor
        elif match := _HEAD_KEY.fullmatch(key):
            heads.setdefault(match["head"], {})[match["part"]] = tensor
        else:
            raise _no_place(key)
    transposed = base_config.get("model_type") in CONV1D_MODEL_TYPES
    targets = Targets(config)
    modules = [
        _module(name, pair, targets, settings, base_shapes, transposed) for name, pair in sorted(factors.items())
    ]
    _check_one_naming(modules)
    return Matched(tuple(modules), _head(heads, base_config))


def _no_place(key: str) -> Exception:
    if match := _EMBEDDING_KEY.fullmatch(key):
        return _not_served_yet(match["module"])
    if _HEAD_LAYER_KEY.fullmatch(key):
        return UnsupportedMethod(
            f"The head tensor {key[:200]!r} is not served yet: only a head of one linear layer is."
        )
    return Rejected(
        f"The tensor {key[:200]!r} has no place: it is neither A or B of a LoRA module nor a head.",
        reason="UNKNOWN_TENSOR",
        metadata={"tensor": key[:200]},
    )


def _not_served_yet(module: str) -> UnsupportedMethod:
    return UnsupportedMethod(
        f"LoRA on {module} is not served yet: leave the embedding and the output layer out of target_modules.",
        metadata={"peft_type": "LORA", "module": module},
    )


def _module(
    name: str,
    pair: Mapping[str, TensorInfo],
    targets: Targets,
    settings: LoraSettings,
    base_shapes: Mapping[str, tuple[int, ...]],
    transposed: bool,
) -> AdaptedModule:
    if name.rpartition(".")[2] in EMBEDDING_AND_OUTPUT:
        raise _not_served_yet(name)
    if len(pair) != 2:
        there = next(iter(pair))
        raise Rejected(
            f"The module {name} has lora_{there} but no lora_{'B' if there == 'A' else 'A'}.", reason="MISSING_TENSOR"
        )
    base_name = backbone_path(name, base_shapes)
    shape = base_shapes[f"{base_name}.weight"] if base_name else ()
    if base_name is None or len(shape) != 2:
        detail = "it is not a linear layer there" if base_name else "the base has no such module"
        raise Rejected(
            f"The adapter has tensors for {name}, but {detail}: was it trained on another base?",
            reason="UNKNOWN_MODULE",
            metadata={"module": name},
        )
    if name not in targets:
        raise Rejected(
            f"The adapter has tensors for {name}, but its own target_modules leave it out: PEFT would ignore them.",
            reason="UNKNOWN_TENSOR",
            metadata={"module": name},
        )
    out_features, in_features = reversed(shape) if transposed else shape
    rank = settings.rank_of(name)
    for side, expected in (("A", (rank, in_features)), ("B", (out_features, rank))):
        if pair[side].shape != expected:
            raise Rejected(
                f"{PREFIX}{name}.lora_{side}.weight has the shape {list(pair[side].shape)}, but rank {rank} on "
                f"{base_name}.weight {list(shape)} needs {list(expected)}.",
                reason="SHAPE_MISMATCH",
                metadata={"module": name},
            )
    return AdaptedModule(
        name, base_name, rank, settings.scaling_of(name, rank), in_features, out_features, transposed=transposed
    )


def _check_one_naming(modules: list[AdaptedModule]) -> None:
    """All modules differ from the base's names by the same prefix, and no two mean the same layer."""
    if len({module.base_name for module in modules}) != len(modules):
        raise Rejected("Two modules of the adapter mean the same layer of the base.", reason="UNKNOWN_MODULE")
    prefixes = {_prefix(module.name, module.base_name) for module in modules}
    if len(prefixes) > 1:
        raise Rejected(
            "The adapter names its modules in two ways, so they cannot all be of one model.", reason="UNKNOWN_MODULE"
        )


def _prefix(name: str, base_name: str) -> tuple[str, str]:
    if name.endswith(base_name):
        return name.removesuffix(base_name), ""
    return "", base_name.removesuffix(name)


def _head(heads: Mapping[str, Mapping[str, TensorInfo]], base_config: Mapping[str, Any]) -> Head | None:
    if not heads:
        return None
    if len(heads) > 1:
        raise UnsupportedMethod(f"An adapter with two heads ({', '.join(sorted(heads))}) is not served.")
    ((name, parts),) = heads.items()
    if "weight" not in parts:
        raise Rejected(f"The head {name} has a bias but no weight.", reason="MISSING_TENSOR")
    shape = parts["weight"].shape
    hidden = hidden_size(base_config)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != hidden:
        raise Rejected(
            f"{PREFIX}{name}.weight has the shape {list(shape)}, but the base needs [labels, {hidden}].",
            reason="SHAPE_MISMATCH",
        )
    bias = parts.get("bias")
    if bias is not None and bias.shape != (shape[0],):
        raise Rejected(
            f"{PREFIX}{name}.bias has the shape {list(bias.shape)}, but the weight needs [{shape[0]}].",
            reason="SHAPE_MISMATCH",
        )
    return Head(name, shape[0], shape[1], bias is not None)
