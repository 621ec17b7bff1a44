"""A base in eight or four bits by the kernels of this house: `--quantize int8` and `int4` on a CPU."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import torch

from adapterbay.base.load import KEPT_WHOLE, LoadedBase, Quantization
from adapterbay.registry.errors import InvalidArgument, Unavailable
from adapterbay.server.kernels import loader
from adapterbay.server.kernels.loader import Compile
from adapterbay.server.kernels.quantized import Int4Linear, Int8Linear, QuantizedLinear, fits
from adapterbay.server.mix.linear import MixedLinear
from adapterbay.server.mix.sites import Sites
from adapterbay.server.packed import PackedLinear

KINDS: Final[dict[str, type[QuantizedLinear]]] = {"int8": Int8Linear, "int4": Int4Linear}
INSTEAD: Final = {"int8": "int8-bnb", "int4": "nf4"}
"""What bitsandbytes computes without kernels."""

log = logging.getLogger(__name__)


def native() -> bool:
    """Whether this processor multiplies numbers of eight bits itself; the kernels are loaded."""
    return bool(torch.ops.adapterbay.native_int8())


def check_kernels(quantization: Quantization, dtype: torch.dtype, mode: Compile) -> None:
    """Raises InvalidArgument for settings that exclude it, Unavailable where this machine cannot compute it."""
    other = f"Start with --quantize {INSTEAD[quantization]} (bitsandbytes, slower), or none."
    if dtype not in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise InvalidArgument(f"--quantize {quantization} computes in float32 or bfloat16, not {name}.", field="dtype")
    if mode == "off":
        raise InvalidArgument(
            f"--quantize {quantization} is computed by the kernels that --compile off leaves out. {other}",
            field="quantize",
        )
    kernels = loader.load("auto")
    if not kernels.loaded:
        raise Unavailable(f"--quantize {quantization} needs the kernels, and there are none: {kernels.reason}. {other}")
    if not native():
        raise Unavailable(f"--quantize {quantization} needs a processor with AVX512-VNNI. {other}")


def quantize(base: LoadedBase, sites: Sites, quantization: Quantization) -> None:
    """Puts quantized layers in the place of the backbone's linear layers, one after another, and notes it in
    `base.info`. Poolers stay whole, and so do layers whose shape does not fit, which is logged.

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
        made = kind.of(layer.base_layer)
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


def quantize_head(base: LoadedBase, head: MixedLinear) -> None:
    """A language-model head that shares its weight with the embeddings becomes a copy of eight bits, whatever the
    layers have: it is a fifth of a small base's reads. A head of its own stays whole, and one that does not fit, too.
    """
    tied = bool(getattr(base.model.config, "tie_word_embeddings", False))
    if not tied or not fits(head.out_features, head.in_features):
        return
    was = head.base_layer.packed.nbytes if isinstance(head.base_layer, PackedLinear) else 0
    made = Int8Linear.of(head.base_layer)
    head.base_layer = made
    base.info = replace(base.info, bytes=base.info.bytes + made.packed.nbytes - was)
