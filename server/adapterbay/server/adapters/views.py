"""Tensors over the bytes of a checkpoint, without a copy: a third of what a cold adapter's load took was copying."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from adapterbay.registry.admission.safetensors_file import TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}
"""Of everything that admission lets through."""

with warnings.catch_warnings():  # torch says once in a process that it has no tensors that refuse to be written to
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def tensor_views(data: bytes, tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name. They share the memory of `data` and must not be written to."""
    return {name: _view(data, tensor) for name, tensor in tensors.items()}


def _view(data: bytes, tensor: TensorInfo) -> Tensor:
    dtype, count = DTYPES[tensor.dtype], math.prod(tensor.shape)
    if not count:
        return torch.empty(tensor.shape, dtype=dtype)
    if tensor.begin % dtype.itemsize:  # the format does not promise alignment
        own = bytes(memoryview(data)[tensor.begin : tensor.end])
        return torch.frombuffer(own, dtype=dtype, count=count).view(tensor.shape)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=tensor.begin).view(tensor.shape)
