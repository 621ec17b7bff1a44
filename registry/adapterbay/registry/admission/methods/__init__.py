"""What admission knows of each method: one description for each of PEFT's types, and our own BOTTLENECK.

`METHODS` is by `peft_type`. Data and small pure functions; the matching is done by `admission.matching`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from adapterbay.registry.admission.methods import (
    bottleneck,
    lora,
    low_rank,
    lycoris,
    plain,
    projections,
    refused,
    rotations,
    spectral,
    subspaces,
    virtual,
)
from adapterbay.registry.admission.methods.method import Method, Tensor
from adapterbay.registry.admission.methods.settings import Settings

__all__ = ["METHODS", "Method", "Settings", "Tensor"]

METHODS: Final[Mapping[str, Method]] = {
    method.peft_type: method
    for module in (
        lora,
        plain,
        low_rank,
        lycoris,
        subspaces,
        projections,
        spectral,
        rotations,
        virtual,
        bottleneck,
        refused,
    )
    for method in vars(module).values()
    if isinstance(method, Method)
}
