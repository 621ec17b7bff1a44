"""Methods whose delta lives in another basis: FourierFT, WaveFT, C³A."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from adapterbay.registry.admission.methods.fields import (
    BIASED,
    EXCLUDED,
    FAN,
    INIT,
    LAYERS,
    SAVED,
    TARGETED,
    Fields,
    fields,
    obeyed,
)
from adapterbay.registry.admission.methods.low_rank import divided
from adapterbay.registry.admission.methods.method import LINEAR, MATRICES, Expected, Method, Tensor, shapes
from adapterbay.registry.admission.methods.settings import Settings, as_integer
from adapterbay.registry.admission.places import Place
from adapterbay.registry.errors import Rejected

PLACED: Final[Fields] = {**TARGETED, **LAYERS, **SAVED, **BIASED}
_SPECTRUM: Final[Fields] = {
    **PLACED,
    **EXCLUDED,
    **FAN,
    **INIT,
    **obeyed(
        n_frequency="how many coefficients are trained",
        n_frequency_pattern="the same for single modules",
        scaling="the factor of the delta",
        random_loc_seed="the seed of their places",
    ),
}


def _coefficients(suffix: str, default: int) -> Callable[[Settings, Place], Expected]:
    def expected(settings: Settings, place: Place) -> Expected:
        if settings.method == "WAVEFT" and settings.flag("proportional_parameters"):
            return {suffix: Tensor((None,))}  # a share that depends on all modules; PEFT works it out
        value = settings.of("n_frequency_pattern", place.name, settings.integer("n_frequency", default))
        count = as_integer("n_frequency", value)
        if count > place.in_features * place.out_features:
            raise Rejected(
                f"{settings.method} on {place.name}: n_frequency={count} is more than the weight has entries.",
                reason="SHAPE_MISMATCH",
                metadata={"module": place.name},
            )
        return {suffix: Tensor((count,))}

    return expected


FOURIERFT: Final = Method(
    "FOURIERFT",
    "FourierFT",
    fields(_SPECTRUM),
    MATRICES,
    ("fourierft_spectrum",),
    tensors=_coefficients("fourierft_spectrum", 1000),
    still=(("fourierft_spectrum",),),
    scaling=lambda settings, _: settings.number("scaling", 150.0),
)

WAVEFT: Final = Method(
    "WAVEFT",
    "WaveFT",
    fields(
        _SPECTRUM,
        obeyed(
            wavelet_family="the basis",
            use_idwt="whether the coefficients are transformed",
            proportional_parameters="whether larger modules get more coefficients",
        ),
    ),
    MATRICES,
    ("waveft_spectrum",),
    tensors=_coefficients("waveft_spectrum", 2592),
    still=(("waveft_spectrum",),),
    scaling=lambda settings, _: settings.number("scaling", 25.0),
)


def _c3a(settings: Settings, place: Place) -> Expected:
    value = settings.of("block_size_pattern", place.name, settings.integer("block_size", 256))
    size = as_integer("block_size", value)
    rows = divided(settings, place, place.out_features, size, "block_size")
    return shapes(c3a_kernel=(rows, divided(settings, place, place.in_features, size, "block_size"), size))


C3A: Final = Method(
    "C3A",
    "C3A",
    fields(PLACED, INIT, obeyed(block_size="the size of a circulant block", block_size_pattern="the same for modules")),
    LINEAR,
    ("c3a_kernel",),
    tensors=_c3a,
    still=(("c3a_kernel",),),
)
