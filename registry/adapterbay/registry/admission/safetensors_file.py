"""Strict reading of safetensors headers, without the safetensors library and without tensor data.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON object
`{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}}`, then the data. Here the data offsets
must tile the rest of the file exactly: no gap, no overlap, no byte left over.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import Rejected

DTYPE_BYTES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
MAX_HEADER_BYTES: Final = 100_000_000
"""The limit of the safetensors library itself. Adapters get a smaller one (`admission.Limits`)."""
MAX_DIMENSIONS: Final = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `begin` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file by name, and the free-text metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def open_source(source: Path | bytes) -> BinaryIO:
    """A readable, seekable stream over a file or over bytes in memory."""
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def read_header(source: Path | bytes, what: str, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Reads and checks a header. `what` names the file in messages.

    Raises Rejected: PICKLE, TRUNCATED, BAD_HEADER, TOO_LARGE or BAD_JSON.
    """
    with open_source(source) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        prefix = file.read(9)
        refuse_other_formats(prefix, what)
        if len(prefix) < 8:
            _refuse(what, "TRUNCATED", f"it has {size} bytes, too few for a safetensors header")
        (length,) = struct.unpack("<Q", prefix[:8])
        if length > max_header_bytes:
            _refuse(what, "TOO_LARGE", f"its header claims {length} bytes; {max_header_bytes} are allowed")
        if 8 + length > size:
            _refuse(what, "TRUNCATED", f"its header claims {length} bytes, but the file has {size} in all")
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        _refuse(what, "BAD_HEADER", "its header does not begin with '{'")
    document = parse_json_object(text, f"the header of {what}")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(what, "BAD_HEADER", "its __metadata__ must map text to text")
    tensors = [_tensor(what, name, entry, 8 + length) for name, entry in document.items()]
    _check_tiling(what, tensors, 8 + length, size)
    return Header({tensor.name: tensor for tensor in tensors}, metadata, size)


def refuse_other_formats(prefix: bytes, what: str) -> None:
    """Raises Rejected with reason PICKLE if the first 9 bytes are those of a pickle or of a zip (torch.save)."""
    # Pickle protocols 2 to 5 begin with 0x80 and the protocol number; torch.save writes a zip since torch 1.6.
    magic = prefix[:4] in (b"PK\x03\x04", b"PK\x05\x06") or (prefix[:1] == b"\x80" and prefix[1:2] in b"\2\3\4\5")
    # A header length may have these bytes by chance; then the header's '{' follows at byte 8.
    if magic and prefix[8:9] != b"{":
        _refuse(what, "PICKLE", "it is a pickle or a zip made by torch.save, which can run code; save as safetensors")


def _tensor(what: str, name: str, entry: Any, data_begin: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(what, "BAD_HEADER", f"the entry of tensor {name!r} must hold dtype, shape and data_offsets only")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _refuse(what, "BAD_HEADER", f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        _refuse(what, "BAD_HEADER", f"tensor {name!r} has the shape {str(shape)[:80]}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(what, "BAD_HEADER", f"tensor {name!r} has the data offsets {str(offsets)[:80]}")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        _refuse(
            what,
            "BAD_HEADER",
            f"tensor {name!r} of shape {shape} and dtype {dtype} needs {expected} bytes, "
            f"but its offsets hold {offsets[1] - offsets[0]}",
        )
    return TensorInfo(name, dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**62 for item in value
    )


def _check_tiling(what: str, tensors: list[TensorInfo], data_begin: int, size: int) -> None:
    position = data_begin
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            kind = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap before it"
            _refuse(what, "BAD_HEADER", f"tensor {tensor.name!r} {kind}")
        position = tensor.end
    if position > size:
        _refuse(what, "TRUNCATED", f"its tensors need {position} bytes, but the file has {size}")
    if position < size:
        _refuse(what, "BAD_HEADER", f"{size - position} bytes follow after its last tensor")


def _refuse(what: str, reason: str, detail: str) -> NoReturn:
    raise Rejected(f"{what} was refused: {detail}.", reason=reason, metadata={"file": what})
