"""What this machine computes with: device, precision, threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adapterbay.trainer.config import Precision


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(wanted: Precision) -> Precision:
    """`float32` or `bfloat16` for what the settings say.

    auto takes bfloat16 where the processor multiplies in it. Measured on 2 cores with AVX512-BF16 (SmolLM2, LoRA r=8 on
    q and v, 16 rows of 32 tokens, forward and backward): float32 1.73 s, float32 weights under bfloat16 autocast
    1.07–1.14 s, bfloat16 weights 1.13–1.24 s. Under autocast the adapter's weights and their optimizer stay float32.
    """
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """`count` CPU threads inside, and as many as before afterwards."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
