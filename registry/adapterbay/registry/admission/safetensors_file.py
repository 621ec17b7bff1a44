"""Strict reading of safetensors headers, without the safetensors library and without tensor data.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON object
`{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}}`, then the data. Here the data offsets
must tile the rest of the file exactly: no gap, no overlap, no byte left over.
"""

from __future__ import annotations

import io
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, cast

from adapterbay.registry.admission.arriving import Arriving
from adapterbay.registry.admission.regular_file import open_regular
from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import Rejected
from adapterbay.registry.manifest import WEIGHTS_FILE

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
VALUES_PER_TENSOR: Final = 8
"""More commas, or brackets, than this for each tensor are not in a header."""

_PICKLE = re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08)|\x80[\x02-\x05]")
"""Pickle protocols 2 to 5 begin with 0x80 and the number; torch.save writes a zip since torch 1.6."""
_COMPRESSED = re.compile(
    rb"\x1f\x8b\x08|\x1f\x9d|\x28\xb5\x2f\xfd|\xfd7zXZ\x00|BZh[1-9]1AY&S|\x04\x22\x4d\x18|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07"
)
"""gzip, compress, zstd, xz, bzip2, lz4, 7z, rar. Nothing is ever unpacked."""


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


Source = Path | bytes | Arriving


def open_source(source: Source, what: str = WEIGHTS_FILE) -> BinaryIO:
    """A readable, seekable stream over a regular file or over bytes in memory. Raises as `open_regular` does."""
    if isinstance(source, Path):
        return open_regular(source, what)
    return io.BytesIO(source) if isinstance(source, bytes) else cast(BinaryIO, source.open())


def read_header(
    source: Source, what: str, *, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int | None = None
) -> Header:
    """Reads and checks a header. `what` names the file in messages.

    Raises Rejected: PICKLE, COMPRESSED, TRUNCATED, BAD_HEADER, TOO_LARGE or BAD_JSON, or what `open_regular` raises.
    """
    with open_source(source, what) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        prefix = file.read(9)
        refuse_other_formats(prefix, what)
        if len(prefix) < 8:
            _refuse(what, "TRUNCATED", f"it has {size} bytes, too few for a safetensors header")
        if prefix == b"version h":
            _refuse(what, "MISSING_FILE", "it is a Git LFS pointer, not the file; run `git lfs pull`")
        if len(prefix) == 9 and prefix[8:] != b"{":
            _refuse(what, "BAD_HEADER", "it is no safetensors file: after 8 bytes of length, '{' must follow")
        (length,) = struct.unpack("<Q", prefix[:8])
        if length > max_header_bytes:
            _refuse(what, "TOO_LARGE", f"its header claims {length} bytes; {max_header_bytes} are allowed")
        if 8 + length > size:
            _refuse(
                what,
                "TRUNCATED",
                f"its header claims {length} bytes, but the file has {size} in all; copy or save it again",
            )
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        _refuse(what, "BAD_HEADER", "its header is empty")
    document = parse_json_object(
        text, f"the header of {what}", max_values=None if max_tensors is None else VALUES_PER_TENSOR * max_tensors
    )
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(what, "BAD_HEADER", "its __metadata__ must map text to text")
    if max_tensors is not None and len(document) > max_tensors:
        _refuse(what, "TOO_LARGE", f"it has {len(document)} tensors; {max_tensors} are allowed")
    tensors = [_tensor(what, name, entry, 8 + length) for name, entry in document.items()]
    _check_tiling(what, tensors, 8 + length, size)
    return Header({tensor.name: tensor for tensor in tensors}, metadata, size)


def refuse_other_formats(prefix: bytes, what: str, *, archives: bool = True) -> None:
    """Raises Rejected if the first 9 bytes are those of a pickle or a zip (PICKLE), or of an archive (COMPRESSED)."""
    # The length of a safetensors header may have these bytes by chance; then the header's '{' follows at byte 8.
    if prefix[8:9] == b"{":
        return
    if _PICKLE.match(prefix):
        _refuse(what, "PICKLE", "it is a pickle or a zip made by torch.save, which can run code; save as safetensors")
    if archives and _COMPRESSED.match(prefix):
        _refuse(what, "COMPRESSED", "it is compressed, and nothing is unpacked here; push what is in it")


def _tensor(what: str, name: str, entry: Any, data_begin: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(what, "BAD_HEADER", f"the entry of tensor {name[:200]!r} must hold dtype, shape and data_offsets only")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _refuse(what, "BAD_HEADER", f"tensor {name[:200]!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        _refuse(what, "BAD_HEADER", f"tensor {name[:200]!r} has the shape {str(shape)[:80]}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(what, "BAD_HEADER", f"tensor {name[:200]!r} has the data offsets {str(offsets)[:80]}")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        _refuse(
            what,
            "BAD_HEADER",
            f"tensor {name[:200]!r} of shape {shape} and dtype {dtype} needs {expected} bytes, "
            f"but its offsets hold {offsets[1] - offsets[0]}",
        )
    return TensorInfo(name, dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def _check_tiling(what: str, tensors: list[TensorInfo], data_begin: int, size: int) -> None:
    position = data_begin
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            kind = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap before it"
            _refuse(what, "BAD_HEADER", f"tensor {tensor.name[:200]!r} {kind}")
        position = tensor.end
    if position > size:
        _refuse(what, "TRUNCATED", f"its tensors need {position} bytes, but the file has {size}; copy or save it again")
    if position < size:
        _refuse(what, "BAD_HEADER", f"{size - position} bytes follow after its last tensor")


def _refuse(what: str, reason: str, detail: str) -> NoReturn:
    raise Rejected(f"{what} was refused: {detail}.", reason=reason, metadata={"file": what})
