"""The header parser: what the safetensors library writes is read alike, and no bytes make it fail in another way."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save

from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.registry.errors import Rejected

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from(["float16", "float32", "float64", "int8", "uint16", "int64", "bool"])
files = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(shapes, dtypes), max_size=5)


@given(files, st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=2))
def test_valid_files_are_read_as_the_library_reads_them(content: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors = {name: np.ones(shape, dtype) for name, (shape, dtype) in content.items() if name != "__metadata__"}
    data = save(tensors, metadata)
    found = read_header(data, "x")
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {n: t.shape for n, t in tensors.items()}
    assert found.metadata == metadata
    for name, tensor in found.tensors.items():
        assert data[tensor.begin : tensor.end] == tensors[name].tobytes()


VALID = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 2), np.float16)}, {"k": "v"})


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4), st.integers(0, 40))
def test_damage_is_refused_or_harmless(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(VALID)
    for place, value in changes:
        data[place] = value
    damaged = bytes(data[: len(data) - cut])
    try:
        found = read_header(damaged, "x")
    except Rejected:
        return
    # What is accepted here, the library accepts too, with the same shapes.
    # Its numpy loader alone does not know every dtype of the format.
    theirs = dict(deserialize(damaged))
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in found.tensors.items()} == {
        name: (tensor["dtype"], tensor["shape"]) for name, tensor in theirs.items()
    }


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(Rejected):
        read_header(data + b"!", "x")


@pytest.mark.parametrize("length", [640, 66176, 0x950280, 0x04034B50])
def test_a_header_length_that_looks_like_a_pickle_is_none(length: int) -> None:
    """640 is 80 02 …, the first bytes of a pickle; the '{' after it tells them apart."""
    data = struct.pack("<Q", length) + b"{}" + b" " * 1000
    with pytest.raises(Rejected) as caught:
        read_header(data, "x")
    assert caught.value.reason != "PICKLE"


def test_a_long_valid_header_with_pickle_like_length() -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(640)
    found = read_header(struct.pack("<Q", 640) + header + b"x", "x")
    assert found.tensors["a"].nbytes == 1
