"""Whether the values of tensors can be computed with, and which of them are not zero. By bit patterns, in numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from adapterbay.registry.admission.safetensors_file import TensorInfo
from adapterbay.registry.errors import Rejected

CHUNK_VALUES: Final = 2**20

Bits = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Magnitudes are the bits without the sign, which grow with the value in every IEEE 754 format and in bfloat16.

    `sign` is the sign bit, `infinite` the first magnitude that is refused, `zero` the last one that counts as zero.
    """

    integer: type[np.unsignedinteger[Any]]
    sign: int
    infinite: int
    zero: int = 0


# Servers compute in float32 or bfloat16, whose largest value is 3.3895e38: what rounds to more is infinity there, and
# what rounds to less than the smallest float32, 1.4e-45, is zero.
_LAYOUTS: Final = {
    "F16": _Layout(np.uint16, 0x8000, 0x7C00),
    "BF16": _Layout(np.uint16, 0x8000, 0x7F80),
    "F32": _Layout(np.uint32, 0x8000_0000, 0x7F7F_8000),
    "F64": _Layout(np.uint64, 1 << 63, 0x47EF_EFFF_F000_0000, 0x3690_0000_0000_0000),
}

FLOAT_DTYPES: Final = frozenset(_LAYOUTS)


@dataclass(frozen=True, slots=True)
class Factor:
    """What A or B holds: which of its ranks have a value other than 0 or -0, and the largest magnitude, as a float."""

    ranks: npt.NDArray[np.bool_]
    largest: float


def read_factor(file: BinaryIO, tensor: TensorInfo, what: str, *, rank_axis: int) -> Factor:
    """Reads A [rank, in] with `rank_axis` 0, or B [out, rank] with 1. Needs little more memory than a chunk.

    Raises Rejected with reason NOT_FINITE if any value is NaN, infinite, or too large for bfloat16, TRUNCATED if bytes
    are missing.
    """
    layout = _LAYOUTS[tensor.dtype]
    columns = math.prod(tensor.shape[1:])
    used = np.zeros(tensor.shape[rank_axis], dtype=np.bool_)
    largest = 0
    rows_at_once = max(1, CHUNK_VALUES // max(columns, 1))
    file.seek(tensor.begin)
    for row in range(0, tensor.shape[0], rows_at_once):
        rows = min(rows_at_once, tensor.shape[0] - row)
        magnitudes = _magnitudes(file, tensor, layout, row * columns, rows * columns, what).reshape(rows, columns)
        if magnitudes.size:
            largest = max(largest, int(magnitudes.max()))
        nonzero = magnitudes > layout.integer(layout.zero)
        if rank_axis == 0:
            used[row : row + rows] = nonzero.any(axis=1)
        else:
            used |= nonzero.any(axis=0)
    return Factor(used, _value(tensor.dtype, largest))


def check_finite(file: BinaryIO, tensor: TensorInfo, what: str) -> None:
    """Reads a tensor of any shape. Raises as `read_factor` does."""
    layout, total = _LAYOUTS[tensor.dtype], math.prod(tensor.shape)
    file.seek(tensor.begin)
    for begin in range(0, total, CHUNK_VALUES):
        _magnitudes(file, tensor, layout, begin, min(CHUNK_VALUES, total - begin), what)


def _magnitudes(file: BinaryIO, tensor: TensorInfo, layout: _Layout, begin: int, count: int, what: str) -> Bits:
    width = np.dtype(layout.integer).itemsize
    data = file.read(count * width)
    if len(data) != count * width:
        raise Rejected(f"{what} ends inside the tensor {tensor.name[:200]}.", reason="TRUNCATED")
    bits = np.frombuffer(data, dtype=np.dtype(layout.integer).newbyteorder("<"))
    magnitudes: Bits = bits & layout.integer(layout.sign - 1)
    wrong = magnitudes >= layout.integer(layout.infinite)
    if wrong.any():
        raise Rejected(
            f"{what} was refused: the tensor {tensor.name[:200]} holds NaN, infinity or a value too large for bfloat16 "
            f"(the first at {begin + int(np.argmax(wrong))} of {math.prod(tensor.shape)}).",
            reason="NOT_FINITE",
            metadata={"tensor": tensor.name[:200]},
        )
    return magnitudes


def _value(dtype: str, magnitude: int) -> float:
    """The number that a magnitude stands for."""
    if dtype == "BF16":
        dtype, magnitude = "F32", magnitude << 16
    integer = _LAYOUTS[dtype].integer
    return float(np.array([magnitude], dtype=integer).view(f"f{np.dtype(integer).itemsize}")[0])
