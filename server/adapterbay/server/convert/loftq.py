"""LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1): what a base becomes before such an adapter is trained over it.

An adapter that was saved as it is belongs to that base, so that PEFT repeats the start whenever it loads one, on CUDA
only. Here it is repeated on any device, and what it takes from the base at hand becomes a part of the adapter's delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server.convert.direct import ADAPTER
from adapterbay.server.convert.tree import LinearView

BLOCK: Final = 64
"""So many values in a row of the weight share one scale in NF4, as bitsandbytes has it for PEFT. With 8 bits a whole
row has one."""


def is_loftq(config: Mapping[str, Any]) -> bool:
    """Whether adapter_config.json names a base that LoftQ left behind."""
    return bool(config.get("init_lora_weights") == "loftq")


def rewrite_base(layers: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Puts what LoftQ leaves of the base into the views under PEFT's `layers`.

    Raises UnsupportedMethod for Conv1D, on which PEFT's own start fails.
    """
    settings = config.get("loftq_config") or {}
    bits, iterations = int(settings.get("loftq_bits", 4)), int(settings.get("loftq_iter", 1))
    for path, layer in layers.items():
        view = layer.get_base_layer()
        if not isinstance(view, LinearView):
            raise UnsupportedMethod(
                f"LoftQ on {path}, a Conv1D, is not served: start with replace_lora_weights_loftq over a base in NF4, "
                "which leaves the base as it is.",
                metadata={"peft_type": "LORA", "field": "init_lora_weights"},
            )
        view.hold(loftq_base(view.dense(), int(layer.r[ADAPTER]), iterations, bits))


def loftq_base(weight: Tensor, rank: int, iterations: int, bits: int) -> Tensor:
    """The part Q of few bits of the alternation Q = round(W - L R), L R = the best of `rank` for W - Q, which PEFT
    takes for the base. weight [out, in] in float32; 4 bits are NF4, 8 bits bitsandbytes' rows of int8.
    """
    rounded = {4: _nf4, 8: _int8}[bits]
    residual = weight
    for _ in range(iterations - 1):
        u, s, v = torch.linalg.svd(weight - rounded(residual), full_matrices=False)
        residual = weight - (u[:, :rank] * s[:rank]) @ v[:rank]
    return rounded(residual)


def _nf4(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    held, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    plain: Tensor = dequantize_4bit(held, state)
    return plain.to(weight)


def _int8(weight: Tensor) -> Tensor:
    """By way of float16, as in `bitsandbytes.nn.Int8Params`."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    held, largest, _ = int8_vectorwise_quant(weight.contiguous().half())
    plain: Tensor = int8_vectorwise_dequant(held, largest)
    return plain.to(weight)
