"""A base in eight or four bits in the layout of this house's kernels: `--quantize int8` and `int4` on a CPU."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import torch

from adapterbay.base.load import KEPT_WHOLE, LoadedBase, Quantization
from adapterbay.registry.errors import InvalidArgument
from adapterbay.server.kernels import loader
from adapterbay.server.kernels.loader import Compile
from adapterbay.server.kernels.quantized import Int4Linear, Int8Linear, QuantizedLinear, fits
from adapterbay.server.mix.linear import MixedLinear
from adapterbay.server.mix.sites import Sites
from adapterbay.server.packed import PackedLinear

KINDS: Final[dict[str, type[QuantizedLinear]]] = {"int8": Int8Linear, "int4": Int4Linear}
INSTEAD: Final = {"int8": "int8-bnb", "int4": "nf4"}
"""What bitsandbytes computes."""
COMPUTED: Final = (torch.float32, torch.bfloat16)
"""What the kernels compute in; torch's own operations do in float16, too."""

log = logging.getLogger(__name__)


def native() -> bool:
    """Whether this processor multiplies numbers of eight bits itself; the kernels are loaded."""
    return bool(torch.ops.adapterbay.native_int8())


def by_our_kernels(quantization: Quantization, dtype: torch.dtype, mode: Compile) -> bool:
    """Whether the kernels compute it here, which `--compile` decides and where they can be had; torch's own operations
    do otherwise, with the same numbers (`kernels.by_torch`). What is slow is logged as a warning.

    Raises InvalidArgument and Unavailable if the kernels are insisted on (`on`) and cannot compute it.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype not in COMPUTED:
        if mode == "on":
            raise InvalidArgument(
                f"The kernels compute --quantize {quantization} in float32 or bfloat16, not {name}: take one of these, "
                "or --compile auto.",
                field="dtype",
            )
        _warn(quantization, f"the kernels do not compute in {name}")
        return False
    kernels = loader.load(mode)
    if not kernels.loaded:
        _warn(quantization, f"the kernels are off: {kernels.reason}")
    elif not native():
        log.warning("--quantize %s is slow here: this processor has no AVX512-VNNI", quantization)
    return kernels.loaded


def _warn(quantization: Quantization, reason: str) -> None:
    log.warning(
        "--quantize %s is computed by torch's own operations, many times slower than by the kernels (%s); "
        "bitsandbytes computes --quantize %s",
        quantization,
        reason,
        INSTEAD[quantization],
    )


def quantize(base: LoadedBase, sites: Sites, quantization: Quantization, *, compiled: bool) -> None:
    """Puts quantized layers in the place of the backbone's linear layers, one after another, and notes it in
    `base.info`. Poolers stay whole, and so do layers whose shape does not fit, which is logged. `compiled`: as
    `QuantizedLinear` has it.

    Raises InvalidArgument if no layer fits.
    """
    kind = KINDS[quantization]
    done, left, saved = 0, [], 0
    for path, layer in sites.linears.items():
        if any(name in KEPT_WHOLE for name in path.split(".")):
            continue
        if not fits(layer.out_features, layer.in_features):
            left.append(path)
            continue
        made = kind.of(layer.base_layer, compiled=compiled)
        saved += layer.in_features * layer.out_features * made.weight.itemsize - made.packed.nbytes
        layer.base_layer = made
        done += 1
    if not done:
        raise InvalidArgument(
            f"No layer of this base has a shape that --quantize {quantization} fits.", field="quantize"
        )
    if left:
        shown = ", ".join(left[:3]) + (", …" if len(left) > 3 else "")
        log.warning("%d layers stay whole: their shapes do not fit %s (%s)", len(left), quantization, shown)
    base.info = replace(base.info, quantization=quantization, bytes=base.info.bytes - saved)


def quantize_head(base: LoadedBase, head: MixedLinear, *, compiled: bool) -> None:
    """A language-model head that shares its weight with the embeddings becomes a copy of eight bits, whatever the
    layers have: it is a fifth of a small base's reads. A head of its own stays whole, and one that does not fit, too.
    """
    tied = bool(getattr(base.model.config, "tie_word_embeddings", False))
    if not tied or not fits(head.out_features, head.in_features):
        return
    was = head.base_layer.packed.nbytes if isinstance(head.base_layer, PackedLinear) else 0
    made = Int8Linear.of(head.base_layer, compiled=compiled)
    head.base_layer = made
    base.info = replace(base.info, bytes=base.info.bytes + made.packed.nbytes - was)
