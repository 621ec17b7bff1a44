"""Hostile weights: what is no safetensors file, and headers that lie."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_tools import checked, peak_bytes, refused, torch_zip, with_header
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.registry.errors import Rejected

F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = b"\0" * 8
VALID = save({"a": np.arange(4, dtype=np.float32)})


def entry(**changes: Any) -> bytes:
    return with_header({"a": F | changes}, EIGHT)


def raw(text: str, data: bytes = EIGHT) -> bytes:
    return with_header(text.encode(), data)


LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "TRUNCATED"),
    "a length alone": (struct.pack("<Q", 0), "BAD_HEADER"),
    "an empty header": (struct.pack("<Q", 0) + b"{}", "BAD_HEADER"),
    "the longest length": (b"\xff" * 8 + b"{}", "TOO_LARGE"),
    "a length of 2^63": (struct.pack("<Q", 2**63) + b"{}", "TOO_LARGE"),
    "a length of 16 MiB and one": (struct.pack("<Q", 2**24 + 1) + b"{}" + b" " * 100, "TOO_LARGE"),
    "a length one too long": (struct.pack("<Q", 3) + b"{}", "TRUNCATED"),
    "a header that ends in NUL": (raw('{"a":1}\0', b""), "BAD_JSON"),
    "two headers": (raw("{}{}", b""), "BAD_JSON"),
    "a byte order mark": (with_header(b"\xef\xbb\xbf{}", b""), "BAD_HEADER"),
    "space before the header": (with_header(b" {}", b""), "BAD_HEADER"),
    "not UTF-8": (with_header(b'{"\xff": 1}', b""), "BAD_JSON"),
    "a lone surrogate": (raw('{"\\ud800": {}}', b""), "BAD_JSON"),
    "a name twice": (raw(f'{{"a": {json.dumps(F)}, "a": {json.dumps(F)}}}'), "BAD_JSON"),
    "an entry that is a number": (with_header({"a": 1}, b""), "BAD_HEADER"),
    "metadata that is a number": (with_header({"__metadata__": 1}, b""), "BAD_HEADER"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}}, b""), "BAD_HEADER"),
    "metadata that is null": (with_header({"__metadata__": None}, b""), "BAD_HEADER"),
    "bytes without a tensor": (raw("{}"), "BAD_HEADER"),
    "offsets past the end": (entry(shape=[4], data_offsets=[0, 16]), "TRUNCATED"),
    "offsets far past the end": (entry(shape=[2**59], data_offsets=[0, 2**61]), "TRUNCATED"),
    "offsets that begin later": (entry(data_offsets=[8, 16]), "BAD_HEADER"),
    "offsets backwards": (entry(data_offsets=[8, 0]), "BAD_HEADER"),
    "negative offsets": (entry(data_offsets=[-8, 0]), "BAD_HEADER"),
    "minus nothing": (raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}'), "BAD_JSON"),
    "offsets in floating point": (raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8.0]}}'), "BAD_HEADER"),
    "offsets with an exponent": (raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8e0]}}'), "BAD_HEADER"),
    "offsets that are true": (entry(data_offsets=[False, 8]), "BAD_HEADER"),
    "offsets as text": (entry(data_offsets=["0", "8"]), "BAD_HEADER"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "BAD_HEADER"),
    "no offsets": (entry(data_offsets=[]), "BAD_HEADER"),
    "offsets of 2^64": (entry(data_offsets=[2**64, 2**64 + 8]), "BAD_HEADER"),
    "a number of 5,000 digits": (raw(f'{{"a":{{"shape":[{"9" * 5000}],"data_offsets":[0,8]}}}}'), "BAD_JSON"),
    "1e999": (raw('{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'), "BAD_JSON"),
    "a shape that wraps around": (entry(shape=[2**61, 8]), "BAD_HEADER"),
    "a shape whose product is huge": (entry(shape=[2**61] * 8), "BAD_HEADER"),
    "a negative shape": (entry(shape=[-2, -1]), "BAD_HEADER"),
    "a shape of nine dimensions": (entry(shape=[1] * 8 + [2]), "BAD_HEADER"),
    "a shape that is a number": (entry(shape=2), "BAD_HEADER"),
    "another shape than the bytes": (entry(shape=[3]), "BAD_HEADER"),
    "another dtype than the bytes": (entry(dtype="F64"), "BAD_HEADER"),
    "a dtype that is a list": (entry(dtype=["F32"]), "BAD_HEADER"),
    "a dtype in small letters": (entry(dtype="f32"), "BAD_HEADER"),
    "a dtype of a megabyte": (entry(dtype="F" * 2**20), "BAD_HEADER"),
    "an unknown key": (entry(code="import os"), "BAD_HEADER"),
    "no dtype": (with_header({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "BAD_HEADER"),
    "overlapping tensors": (with_header({"a": F, "b": F}, EIGHT), "BAD_HEADER"),
    "tensors that share a byte": (
        with_header({"a": F, "b": F | {"data_offsets": [7, 15]}}, b"\0" * 15),
        "BAD_HEADER",
    ),
    "a gap": (with_header({"a": F, "b": F | {"data_offsets": [9, 17]}}, b"\0" * 17), "BAD_HEADER"),
    "a byte too many": (with_header({"a": F}, EIGHT + b"\0"), "BAD_HEADER"),
    "a byte too few": (with_header({"a": F}, EIGHT[:-1]), "TRUNCATED"),
    "an empty tensor between two bytes": (
        with_header({"a": F, "b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}, EIGHT),
        "BAD_HEADER",
    ),
    "a name of a megabyte that lies": (with_header({"a" * 2**20: F | {"shape": [3]}}, EIGHT), "BAD_HEADER"),
    "a name that writes to terminals": (with_header({"\x1b[2J\u202eevil": F | {"shape": [3]}}, EIGHT), "BAD_HEADER"),
    "deep metadata": (raw('{"__metadata__":' + "[" * 500 + "]" * 500 + "}"), "BAD_JSON"),
    "very deep metadata": (raw('{"__metadata__":' + "[" * 100_000 + "]" * 100_000 + "}"), "BAD_JSON"),
    # other formats under the name of safetensors
    **{f"a pickle of protocol {number}": (pickle.dumps({"a": [1.5] * 50}, number), reason) for number, reason in
       enumerate(["BAD_HEADER", "BAD_HEADER", "PICKLE", "PICKLE", "PICKLE", "PICKLE"])},
    "torch.save": (torch_zip(), "PICKLE"),
    "an empty zip": (b"PK\x05\x06" + b"\0" * 18, "PICKLE"),
    "gzip": (gzip.compress(VALID), "COMPRESSED"),
    "bzip2": (bz2.compress(VALID), "COMPRESSED"),
    "xz": (lzma.compress(VALID), "COMPRESSED"),
    "zstd": (b"\x28\xb5\x2f\xfd" + VALID, "COMPRESSED"),
    "zlib": (zlib.compress(VALID), "BAD_HEADER"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "BAD_HEADER"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "BAD_HEADER"),
    "JSON": (b'{"a": [1, 2, 3], "b": 4}', "BAD_HEADER"),
    "HTML": (b"<html><script>alert(1)</script></html>", "BAD_HEADER"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "MISSING_FILE"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "reason"), LIES.values(), ids=LIES.keys())
def test_lies_are_refused_in_little_time_and_memory(file: bytes, reason: str, tmp_path: Path) -> None:
    began = time.process_time()
    refused(reason, lambda: read_header(file, "x.safetensors", max_header_bytes=2**24, max_tensors=100_000))
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    peak = peak_bytes(
        lambda: refused(reason, lambda: read_header(path, "x", max_header_bytes=2**24, max_tensors=100_000))
    )
    assert peak < 4 * len(file) + 200_000
    assert time.process_time() - began < 10


def test_the_library_takes_none_of_them_or_we_are_stricter() -> None:
    """Where the safetensors library (0.8) reads what we refuse, it is one of these."""
    stricter = set()
    for name, (file, _) in LIES.items():
        try:
            deserialize(file)
        except SafetensorError:
            continue
        stricter.add(name)
    assert stricter <= {
        "a name twice",
        "space before the header",
        "metadata that is null",
        "a shape of nine dimensions",
        "an unknown key",
        "an entry that is a number",
    }


BOMBS: dict[str, bytes] = {
    "empty lists": raw('{"a":[' + "[]," * 5_000_000 + "[]]}"),
    "empty objects": raw('{"a":[' + "{}," * 5_000_000 + "{}]}"),
    "numbers": raw('{"a":[' + "1," * 8_000_000 + "1]}"),
    "short texts": raw('{"__metadata__":{"a":[' + '"",' * 5_000_000 + '""]}}'),
    "one long text": raw('{"__metadata__":{"a":"' + "x" * 16_000_000 + '"}}'),
    "one long text in Chinese": raw('{"__metadata__":{"a":"' + "语" * 5_000_000 + '"}}'),
    "one long escaped text": raw('{"__metadata__":{"a":"' + "\\u0001" * 2_700_000 + '"}}'),
    "one long name": raw('{"' + "x" * 16_000_000 + '":1}'),
    "keys": raw('{"a":{' + ",".join(f'"{number:x}":1' for number in range(1_400_000)) + "}}"),
    "spaces": raw("{" + " " * 16_000_000 + "}"),
    "digits": raw('{"a":' + "9" * 16_000_000 + "}"),
    "brackets": raw("{" + '"a":{' * 3_000_000),
}


@pytest.mark.parametrize("file", BOMBS.values(), ids=BOMBS.keys())
def test_headers_of_16_mib_are_refused_in_little_time_and_memory(file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    began = time.process_time()

    def read() -> None:
        with pytest.raises(Rejected) as caught:
            read_header(path, "x", max_header_bytes=2**24, max_tensors=100_000)
        checked(caught.value)

    peak = peak_bytes(read)
    assert peak < 6 * len(file)
    assert time.process_time() - began < 10  # tracemalloc slows it down several times


def test_a_file_of_many_tensors_is_read_within_bounds(tmp_path: Path) -> None:
    count = 100_000
    header = {
        f"t{number}": {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]} for number in range(count)
    }
    path = tmp_path / "x"
    path.write_bytes(with_header(header, b"\0" * count))
    assert len(read_header(path, "x", max_tensors=count).tensors) == count
    refused("TOO_LARGE", lambda: read_header(path, "x", max_tensors=count - 1))


def test_a_huge_claim_on_a_sparse_file_reads_nothing(tmp_path: Path) -> None:
    """4 GiB of nothing: refused by its header, not by reading it."""
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**24) + b"{")
        file.truncate(2**32)
    peak = peak_bytes(lambda: refused("BAD_JSON", lambda: read_header(path, "x", max_header_bytes=2**24)))
    assert peak < 6 * 2**24
