"""Whatever safetensors file comes: refused, or read as the safetensors library reads it.

What we refuse and the library takes: see `STRICTER`, and `test_bad_bytes`.
"""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_tools import checked, fuzz, json_values, split, with_header
from hypothesis import event, given
from hypothesis import strategies as st
from registry_tools import Tiny
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from adapterbay.registry import admit
from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.registry.base import BaseFiles
from adapterbay.registry.errors import AdapterbayError, Rejected

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros((0, 2), np.float16),
    "c": np.ones(3, np.int8),
}
FILE = save(TENSORS, {"format": "pt"})
HEADER, DATA = split(FILE)
numbers = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**32, 2**53, 2**61, 2**63, 2**64, 1.0, True, "1", None])
)
edits: st.SearchStrategy[tuple[str, Any]] = st.one_of(
    st.tuples(st.just("data_offsets"), st.lists(numbers, max_size=3)),
    st.tuples(st.just("shape"), st.lists(numbers, max_size=4)),
    st.tuples(
        st.just("dtype"),
        st.sampled_from(["F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", None]),
    ),
    st.tuples(st.text(max_size=5), json_values),
)  # fmt: skip
STRICTER = (
    "the key",  # a name twice: the library takes the last
    "must hold dtype, shape and data_offsets only",  # the library passes over further keys
    "__metadata__ must map",  # null
    "has the shape",  # more than 8 dimensions
    "unknown dtype",  # F4, F6, F8 of other kinds, C64: no adapter has them
    "'{' must follow",  # space before the header
    "not usable JSON",  # further keys with NaN or deep nesting, a byte order mark
    "holds more than",
)


def read_as_by_the_library(file: bytes, folder: Path) -> None:
    """What we accept, the library accepts, with the same names, types, shapes and bytes."""
    try:
        ours = read_header(file, "x")
    except Rejected as error:
        checked(error)
        event("refused")
        try:
            deserialize(file)
        except SafetensorError:
            return
        if not any(reason in error.message for reason in STRICTER):
            raise
        event("we are stricter")
        return
    event("accepted")
    theirs = dict(deserialize(file))
    assert ours.tensors.keys() == theirs.keys()
    for name, tensor in ours.tensors.items():
        assert theirs[name]["dtype"] == tensor.dtype
        assert theirs[name]["shape"] == list(tensor.shape)
        assert bytes(theirs[name]["data"]) == file[tensor.begin : tensor.end]
    path = folder / "x.safetensors"
    path.write_bytes(file)
    with safe_open(path, "numpy") as opened:
        assert set(opened.keys()) == set(ours.tensors)
        assert (opened.metadata() or {}) == ours.metadata
        for name, tensor in ours.tensors.items():
            assert opened.get_slice(name).get_shape() == list(tensor.shape)
            assert opened.get_slice(name).get_dtype() == tensor.dtype
    assert read_header(path, "x") == ours


@fuzz(500)
@given(
    st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), max_size=4),
    st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 7)), max_size=2),
    st.integers(0, 30),
    st.binary(max_size=3),
)
def test_safetensors_with_any_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[int, int]],
    flips: list[tuple[int, int]],
    cut: int,
    more: bytes,
) -> None:
    data = bytearray(FILE)
    for place, value in changes:
        data[place] = value
    for place, bit in flips:
        data[place] ^= 1 << bit
    read_as_by_the_library(bytes(data[: len(data) - cut]) + more, tmp_path_factory.getbasetemp())


@fuzz(800)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", "__metadata__"]), edits), min_size=1, max_size=3),
    st.sampled_from([b"", b" ", b"  \n", b"\0", b"}"]),
    st.integers(-3, 3),
    st.integers(-4, 4),
)
def test_safetensors_with_any_header(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[str, tuple[str, Any]]],
    tail: bytes,
    length: int,
    size: int,
) -> None:
    header = copy.deepcopy(HEADER)
    for name, (key, value) in changes:
        header.setdefault(name, {})[key] = value
    file = with_header(json.dumps(header).encode() + tail, DATA[: len(DATA) + size] + b"\0" * size)
    if length and tail:
        file = struct.pack("<Q", struct.unpack("<Q", file[:8])[0] + length) + file[8:]
    read_as_by_the_library(file, tmp_path_factory.getbasetemp())


@fuzz(400)
@given(st.binary(max_size=120), st.booleans())
def test_safetensors_of_any_header_text(tmp_path_factory: pytest.TempPathFactory, text: bytes, closed: bool) -> None:
    read_as_by_the_library(with_header(b"{" + text + b"}" * closed, DATA), tmp_path_factory.getbasetemp())


@fuzz(150)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_admission_of_any_bytes(llama: Tiny, base: BaseFiles, changes: list[tuple[float, int]]) -> None:
    data = bytearray((llama.adapter / "adapter_model.safetensors").read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    files: dict[str, Path | bytes] = {
        "adapter_config.json": llama.adapter / "adapter_config.json",
        "adapter_model.safetensors": bytes(data),
    }
    try:
        report = admit(files, base.tensor_shapes(), base_config=base.config)
    except AdapterbayError as error:
        checked(error)
        return
    assert report.rank == 2
    with np.errstate(invalid="ignore"):
        for tensor in dict(deserialize(bytes(data))).values():
            assert np.isfinite(np.frombuffer(bytes(tensor["data"]), np.float32)).all()
