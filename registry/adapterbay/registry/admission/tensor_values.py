"""Whether the values of tensors can be computed with, and which of them are not zero. By bit patterns, in numpy."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
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

_INTEGERS: Final = {
    "I8": "<i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "<u1",
    "U16": "<u2",
    "U32": "<u4",
}
INDEX_DTYPES: Final = frozenset(_INTEGERS)
_FORMATS: Final = {"F16": ("<H", "<e"), "F32": ("<I", "<f"), "F64": ("<Q", "<d")}
_FLOATS: Final = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True, slots=True)
class Factor:
    """What A or B holds: which of its ranks have a value other than 0 or -0, and the largest magnitude, as a float."""

    ranks: npt.NDArray[np.bool_]
    largest: float


@dataclass(frozen=True, slots=True)
class Glance:
    """What one pass over many tensors tells of one: the largest magnitude, all of them being finite, and of a matrix
    which rows and which columns hold more than zero at their first value."""

    largest: int
    rows: npt.NDArray[np.bool_] | None
    columns: npt.NDArray[np.bool_] | None


def glance(file: BinaryIO, tensors: Iterable[TensorInfo]) -> dict[str, Glance]:
    """Looks at tensors that lie one after another together: most adapters have hundreds of small ones, and to read each
    by itself takes three times as long. Left out are those to look at more closely: what is too large for a chunk or
    empty, whole numbers, what is not finite, what is not all there."""
    found: dict[str, Glance] = {}
    for group in _neighbours(tensors):
        first, last = group[0], group[-1]
        layout = _LAYOUTS[first.dtype]
        integer = np.dtype(layout.integer)
        file.seek(first.begin)
        data = file.read(last.end - first.begin)
        if len(data) != last.end - first.begin:
            break
        magnitudes: Bits = np.frombuffer(data, dtype=integer.newbyteorder("<")) & layout.integer(layout.sign - 1)
        starts = [(tensor.begin - first.begin) // integer.itemsize for tensor in group]
        zero = layout.integer(layout.zero)
        for tensor, start, most in zip(group, starts, np.maximum.reduceat(magnitudes, starts).tolist(), strict=True):
            if most >= layout.infinite:
                continue
            rows = columns = None
            if len(tensor.shape) == 2:
                count, width = tensor.shape
                rows = magnitudes[start : start + count * width : width] > zero
                columns = magnitudes[start : start + width] > zero
            found[tensor.name] = Glance(most, rows, columns)
    return found


def _neighbours(tensors: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Runs of tensors of one floating-point type that lie one after another, each run as large as a chunk at most."""
    run: list[TensorInfo] = []
    most = 4 * CHUNK_VALUES  # bytes: the values of a chunk in float32
    for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
        fits = tensor.dtype in _LAYOUTS and 0 < tensor.nbytes <= most
        whole = run and (run[-1].end, run[0].dtype) == (tensor.begin, tensor.dtype)
        if run and not (fits and whole and tensor.end - run[0].begin <= most):
            yield run
            run = []
        if fits:
            run.append(tensor)
    if run:
        yield run


def read_factor(file: BinaryIO, tensor: TensorInfo, what: str, *, rank_axis: int, seen: Glance | None = None) -> Factor:
    """Reads A [rank, in] with `rank_axis` 0, or B [out, rank] with 1. Needs little more memory than a chunk. What was
    `seen` of it may be enough.

    Raises Rejected with reason NOT_FINITE if any value is NaN, infinite, or too large for bfloat16, TRUNCATED if bytes
    are missing.
    """
    if seen is not None:
        there = seen.rows if rank_axis == 0 else seen.columns
        if there is not None and there.all():
            return Factor(there, _value(tensor.dtype, seen.largest))
    layout = _LAYOUTS[tensor.dtype]
    columns = math.prod(tensor.shape[1:])
    used = np.zeros(tensor.shape[rank_axis], dtype=np.bool_)
    largest = 0
    rows_at_once = max(1, CHUNK_VALUES // max(columns, 1))
    file.seek(tensor.begin)
    for row in range(0, tensor.shape[0], rows_at_once):
        rows = min(rows_at_once, tensor.shape[0] - row)
        magnitudes, most, _ = _magnitudes(file, tensor, layout, row * columns, rows * columns, what)
        largest = max(largest, most)
        if rank_axis == 0:
            used[row : row + rows] = _nonzero_rows(magnitudes.reshape(rows, columns), layout)
        elif not used.all():
            used |= _nonzero_rows(magnitudes.reshape(rows, columns).T, layout)
    return Factor(used, _value(tensor.dtype, largest))


def _nonzero_rows(magnitudes: Bits, layout: _Layout) -> npt.NDArray[np.bool_]:
    """Which rows hold more than zero. A trained row does at its first value, so that the rest is seldom looked at."""
    if not magnitudes.size:
        return np.zeros(magnitudes.shape[0], dtype=np.bool_)
    zero = layout.integer(layout.zero)
    found: npt.NDArray[np.bool_] = magnitudes[:, 0] > zero
    if not found.all():
        found = np.any(magnitudes > zero, axis=1)
    return found


@dataclass(frozen=True, slots=True)
class Values:
    """What a tensor holds: its largest magnitude, and whether all of it is zero, or exactly one."""

    largest: float
    zero: bool
    one: bool


def read_values(file: BinaryIO, tensor: TensorInfo, what: str, seen: Glance | None = None) -> Values:
    """Reads a tensor of any shape, if what was `seen` of it is not enough. Raises as `read_factor` does."""
    layout, total = _LAYOUTS[tensor.dtype], math.prod(tensor.shape)
    one = _pattern(tensor.dtype, 1.0)
    if seen is not None and seen.largest != one:
        return Values(_value(tensor.dtype, seen.largest), zero=seen.largest <= layout.zero, one=False)
    largest, smallest, negative = 0, one, False
    file.seek(tensor.begin)
    for begin in range(0, total, CHUNK_VALUES):
        magnitudes, most, bits = _magnitudes(file, tensor, layout, begin, min(CHUNK_VALUES, total - begin), what)
        largest = max(largest, most)
        smallest = min(smallest, int(magnitudes.min()))
        negative = negative or int(bits.max()) >= layout.sign
    return Values(
        largest=_value(tensor.dtype, largest),
        zero=largest <= layout.zero,
        one=largest == one and smallest == one and not negative,
    )


def check_indices(file: BinaryIO, tensor: TensorInfo, what: str, below: tuple[int, ...]) -> None:
    """Reads whole numbers, which some systems store as floating point.

    `below` has a bound for each row, or one for all. Raises Rejected: NOT_FINITE for what is no whole number,
    SHAPE_MISMATCH for an index out of its range, TRUNCATED.
    """
    file.seek(tensor.begin)
    data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise Rejected(f"{what} ends inside the tensor {tensor.name[:200]}.", reason="TRUNCATED")
    if tensor.dtype in _INTEGERS:
        numbers = np.frombuffer(data, dtype=_INTEGERS[tensor.dtype]).astype(np.int64)
    else:
        numbers = _whole(data, tensor, what)
    rows = numbers.reshape(len(below), -1)
    for row, bound in zip(rows, below, strict=True):
        if row.size and (int(row.min()) < 0 or int(row.max()) >= bound):
            raise Rejected(
                f"{what} was refused: the tensor {tensor.name[:200]} holds indices that are not from 0 to {bound - 1}.",
                reason="SHAPE_MISMATCH",
                metadata={"tensor": tensor.name[:200]},
            )


def _whole(data: bytes, tensor: TensorInfo, what: str) -> npt.NDArray[np.int64]:
    values = np.frombuffer(data, dtype=_FLOATS[tensor.dtype]) if tensor.dtype in _FLOATS else None
    if values is None or not (np.isfinite(values).all() and (values == np.floor(values)).all()):
        raise Rejected(
            f"{what} was refused: the tensor {tensor.name[:200]} must hold whole numbers.",
            reason="NOT_FINITE",
            metadata={"tensor": tensor.name[:200]},
        )
    whole: npt.NDArray[np.int64] = np.clip(values, -1, 2**62).astype(np.int64)
    return whole


def check_finite(file: BinaryIO, tensor: TensorInfo, what: str) -> None:
    """Reads a tensor of any shape. Raises as `read_factor` does."""
    layout, total = _LAYOUTS[tensor.dtype], math.prod(tensor.shape)
    file.seek(tensor.begin)
    for begin in range(0, total, CHUNK_VALUES):
        _magnitudes(file, tensor, layout, begin, min(CHUNK_VALUES, total - begin), what)


def _magnitudes(
    file: BinaryIO, tensor: TensorInfo, layout: _Layout, begin: int, count: int, what: str
) -> tuple[Bits, int, Bits]:
    """The magnitudes of the next `count` values, all of which can be computed with, the largest, and the bits."""
    integer = np.dtype(layout.integer)
    data = file.read(count * integer.itemsize)
    if len(data) != count * integer.itemsize:
        raise Rejected(f"{what} ends inside the tensor {tensor.name[:200]}.", reason="TRUNCATED")
    bits: Bits = np.frombuffer(data, dtype=integer.newbyteorder("<"))
    magnitudes: Bits = bits & layout.integer(layout.sign - 1)
    largest = int(magnitudes.max()) if count else 0
    if largest >= layout.infinite:
        first = begin + int(np.argmax(magnitudes >= layout.infinite))
        raise Rejected(
            f"{what} was refused: the tensor {tensor.name[:200]} holds NaN, infinity or a value too large for bfloat16 "
            f"(the first at {first} of {math.prod(tensor.shape)}).",
            reason="NOT_FINITE",
            metadata={"tensor": tensor.name[:200]},
        )
    return magnitudes, largest, bits


def _pattern(dtype: str, value: float) -> int:
    """The bits of a positive number."""
    if dtype == "BF16":
        return _pattern("F32", value) >> 16
    bits, number = _FORMATS[dtype]
    found: int = struct.unpack(bits, struct.pack(number, value))[0]
    return found


def _value(dtype: str, magnitude: int) -> float:
    """The number that a magnitude stands for."""
    if dtype == "BF16":
        dtype, magnitude = "F32", magnitude << 16
    bits, number = _FORMATS[dtype]
    found: float = struct.unpack(number, struct.pack(bits, magnitude))[0]
    return found
