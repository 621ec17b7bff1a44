"""Distances between LoRA deltas ΔW = s·B A, without ever making ΔW. In float64, whatever the files hold.

With A [r, in] and B [out, r], the inner product of two deltas is that of small Gram matrices:

    ⟨s₁B₁A₁, s₂B₂A₂⟩_F = s₁s₂ · tr((B₁ᵀB₂)(A₂A₁ᵀ))        O((in + out)·r₁·r₂) in place of O(in·out)

and ‖ΔW₁ − ΔW₂‖² = ‖ΔW₁‖² + ‖ΔW₂‖² − 2⟨ΔW₁, ΔW₂⟩. Of deltas that are nearly equal that difference loses its digits;
there the distance is taken from QR factors, with [B₁ B₂] = Q R and [A₁ᵀ A₂ᵀ] = P S, as ‖s₁R₁S₁ᵀ − s₂R₂S₂ᵀ‖_F.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
import numpy.typing as npt

from adapterbay.registry.admission.lora_config import LoraSettings, plain_settings
from adapterbay.registry.admission.peft_fields import read_method
from adapterbay.registry.admission.report import PREFIX
from adapterbay.registry.admission.safetensors_file import Header, TensorInfo, open_source, read_header
from adapterbay.registry.admission.tensor_values import FLOAT_DTYPES
from adapterbay.registry.errors import Rejected, UnsupportedMethod
from adapterbay.registry.manifest import WEIGHTS_FILE

Array = npt.NDArray[np.float64]

_A_SUFFIX: Final = ".lora_A.weight"
_B_SUFFIX: Final = ".lora_B.weight"
_DTYPES: Final = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "I8": "<i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "<u1",
    "U16": "<u2",
    "U32": "<u4",
}
_CANCELLED: Final = 1e-7
"""Below this share of ‖ΔW₁‖² + ‖ΔW₂‖², float64 leaves fewer than nine digits of the squared distance."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """One delta: a [rank, in], b [out, rank], float64."""

    a: Array
    b: Array
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a LoRA checkpoint by header; values are read one module at a time.

    `scalings` maps a module to the factor of its B A; `dense` maps the names of whole tensors to their keys: those of
    heads, and all of a method whose tensors are no factors of a delta, or not alone.
    """

    path: Path
    header: Header
    scalings: Mapping[str, float]
    dense: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any]) -> Checkpoint:
        """Reads the header and the settings. Raises Rejected or UnsupportedMethod as admission does."""
        settings = _factors_of(config)
        header = read_header(path, WEIGHTS_FILE)
        scalings: dict[str, float] = {}
        dense: dict[str, str] = {}
        for key, tensor in sorted(header.tensors.items()):
            name = key.removeprefix(PREFIX)
            if settings is None:
                dense[name] = key
            elif name.endswith(_A_SUFFIX):
                module = name.removesuffix(_A_SUFFIX)
                _check_pair(header, key, tensor)
                scalings[module] = settings.scaling_of(module, tensor.shape[0])
            elif not name.endswith(_B_SUFFIX):
                dense[name] = key
        return cls(path, header, scalings, dense)

    @property
    def factored(self) -> bool:
        """Whether A and B are all that changes the base."""
        return not any(name.endswith((_A_SUFFIX, _B_SUFFIX)) for name in self.dense) and bool(self.scalings)

    def whole(self) -> Checkpoint:
        """The same with every tensor as it is stored."""
        names = {key.removeprefix(PREFIX): key for key in sorted(self.header.tensors)}
        return Checkpoint(self.path, self.header, {}, names)

    def factors(self, module: str) -> LowRank:
        """The delta of a module."""
        with open_source(self.path) as file:
            a, b = (self._read(file, f"{PREFIX}{module}{suffix}") for suffix in (_A_SUFFIX, _B_SUFFIX))
        return LowRank(a, b, self.scalings[module])

    def tensor(self, name: str) -> Array:
        """A dense tensor by its name without PEFT's prefix."""
        with open_source(self.path) as file:
            return self._read(file, self.dense[name])

    def _read(self, file: BinaryIO, key: str) -> Array:
        return read_values(file, self.header.tensors[key])


def _factors_of(config: Mapping[str, Any]) -> LoraSettings | None:
    """The settings of an adapter that is scaling · B A; None for any other. Raises as admission does."""
    read_method(config)
    try:
        return plain_settings(config)
    except UnsupportedMethod:
        return None


def _check_pair(header: Header, key: str, a: TensorInfo) -> None:
    b = header.tensors.get(key.removesuffix(_A_SUFFIX) + _B_SUFFIX)
    for tensor in (a, b) if b else (a,):
        if tensor.dtype not in FLOAT_DTYPES:
            raise Rejected(f"The tensor {tensor.name} has the dtype {tensor.dtype}.", reason="UNSUPPORTED_DTYPE")
    if b is None or len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0]:
        raise Rejected(f"{key[:200]} has no lora_B that fits it.", reason="SHAPE_MISMATCH")


def read_values(file: BinaryIO, tensor: TensorInfo) -> Array:
    """A tensor as float64. Raises Rejected: UNSUPPORTED_DTYPE, or TRUNCATED."""
    file.seek(tensor.begin)
    data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise Rejected(f"{WEIGHTS_FILE} ends inside the tensor {tensor.name}.", reason="TRUNCATED")
    if tensor.dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        values: npt.NDArray[Any] = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    elif tensor.dtype in _DTYPES:
        values = np.frombuffer(data, dtype=_DTYPES[tensor.dtype])
    else:
        raise Rejected(f"The tensor {tensor.name} has the dtype {tensor.dtype}.", reason="UNSUPPORTED_DTYPE")
    return values.astype(np.float64).reshape(tensor.shape)


def inner(x: LowRank, y: LowRank) -> float:
    """⟨ΔWx, ΔWy⟩_F by Gram matrices."""
    # tr(P Q) = Σ P ⊙ Qᵀ, with P = BxᵀBy [rx, ry] and Qᵀ = AxAyᵀ [rx, ry].
    return float(x.scaling * y.scaling * np.sum((x.b.T @ y.b) * (x.a @ y.a.T)))


def norm(x: LowRank) -> float:
    """‖ΔW‖_F."""
    return math.sqrt(max(0.0, inner(x, x)))


def distance(x: LowRank, y: LowRank) -> float:
    """‖ΔWx − ΔWy‖_F of two deltas of one shape."""
    squares = inner(x, x) + inner(y, y)
    squared = squares - 2.0 * inner(x, y)
    if squared > _CANCELLED * squares:
        return math.sqrt(squared)
    if x.scaling == y.scaling and np.array_equal(x.a, y.a) and np.array_equal(x.b, y.b):
        return 0.0
    out_factor, in_factor = (
        cast(Array, np.linalg.qr(both, mode="r"))
        for both in (np.concatenate([x.b, y.b], axis=1), np.concatenate([x.a, y.a], axis=0).T)
    )
    rank = x.a.shape[0]
    core = x.scaling * out_factor[:, :rank] @ in_factor[:, :rank].T
    core -= y.scaling * out_factor[:, rank:] @ in_factor[:, rank:].T
    return float(np.linalg.norm(core))


def modules_in_both(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, str]]:
    """The modules of `a` with those of `b` that are the same layer, by name.

    One side may have been trained inside of a larger class, which puts one more part before every name
    (`bert.encoder.layer.0…` and `encoder.layer.0…`); that part is looked over if no name is in both as it is.
    """
    names = {module: module for module in b.scalings}
    if not names.keys() & a.scalings.keys():
        names = _renamed(tuple(b.scalings), a.scalings) or names
    for module in sorted(a.scalings):
        if module in names:
            yield module, names[module]


def _renamed(names: tuple[str, ...], there: Mapping[str, float]) -> dict[str, str]:
    """`names` by what `there` calls them: with one part less in front, or one part more."""
    shorter = {name.partition(".")[2]: name for name in names}
    if shorter.keys() & there.keys():
        return shorter
    fronts = {name.partition(".")[0] for name in there}
    return {f"{next(iter(fronts))}.{name}": name for name in names} if len(fronts) == 1 else {}
