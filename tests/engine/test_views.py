"""Tensors over a checkpoint's bytes are what safetensors reads from them."""

from __future__ import annotations

import warnings

import torch
from safetensors.torch import load, save

from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.server.adapters.views import tensor_views


def test_views_are_what_safetensors_reads() -> None:
    """Every dtype that admission lets through, an empty tensor, a number, and offsets that are not aligned."""
    torch.manual_seed(0)
    tensors = {
        "bytes": torch.randint(0, 255, (3,), dtype=torch.uint8),  # what follows begins at an odd place
        "f64": torch.randn(2, 3, dtype=torch.float64),
        "f32": torch.randn(4, 5),
        "f16": torch.randn(7).half(),
        "bf16": torch.randn(3, 3).bfloat16(),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(2.5),
        **{str(kind): torch.randint(0, 100, (2, 2)).to(kind) for kind in (torch.int8, torch.int16, torch.int32)},
        **{str(kind): torch.randint(0, 100, (3,)).to(kind) for kind in (torch.int64, torch.uint16, torch.uint32)},
    }
    data = save(tensors)
    # The library writes wide dtypes first; byte by byte in the order of the header nothing would be aligned.
    header = read_header(data, "test")
    moved = b"\0" + data
    shifted = {
        name: type(info)(info.name, info.dtype, info.shape, info.begin + 1, info.end + 1)
        for name, info in header.tensors.items()
    }
    expected = load(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for views in (tensor_views(data, header.tensors), tensor_views(moved, shifted)):
            assert views.keys() == expected.keys()
            for name, view in views.items():
                assert view.dtype is expected[name].dtype
                assert torch.equal(view, expected[name])


def test_views_share_the_bytes() -> None:
    """Nothing is copied where the offsets are aligned."""
    data = save({"a": torch.ones(8), "b": torch.zeros(8)})
    header = read_header(data, "test")
    views = tensor_views(data, header.tensors)
    assert views["b"].data_ptr() - views["a"].data_ptr() == header.tensors["b"].begin - header.tensors["a"].begin
