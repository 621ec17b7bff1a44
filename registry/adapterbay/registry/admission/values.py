"""Reads every value of a checkpoint once: whether it can be computed with, and whether the adapter changes anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Final

from adapterbay.registry.admission.arriving import whole_of
from adapterbay.registry.admission.methods import Method, Settings
from adapterbay.registry.admission.places import Base
from adapterbay.registry.admission.report import AdaptedModule, AdaptedSite, Matched
from adapterbay.registry.admission.safetensors_file import Header, Source, open_source
from adapterbay.registry.admission.tensor_values import (
    Glance,
    Values,
    check_finite,
    check_indices,
    glance,
    read_factor,
    read_values,
)
from adapterbay.registry.errors import NoEffect, Rejected
from adapterbay.registry.manifest import WEIGHTS_FILE

MAX_DELTA: Final = 1e38
"""Of scaling * max|A| * max|B|: beyond it an output may be infinity (the largest bfloat16 is 3.39e38)."""
MIN_DELTA: Final = 1e-57
"""Below it every output is zero: the smallest float32 is 1.4e-45, and no input of a layer is near 1e12."""


def check_values(
    source: Source,
    header: Header,
    matched: Matched,
    modules: Sequence[AdaptedModule],
    method: Method,
    settings: Settings,
    base: Base,
) -> int:
    """Returns how many modules change nothing; raises NoEffect if that is all there is, or Rejected (NOT_FINITE)."""
    own = {module.name: module for module in modules}
    read: set[str] = set()
    with open_source(whole_of(source), WEIGHTS_FILE) as file:
        seen = glance(file, header.tensors.values())
        dead = _check_shared(file, header, seen, matched, method, settings, base)
        read |= set(matched.shared.values())
        idle = 0
        for site in matched.sites:
            read |= set(site.tensors.values())
            if site.name in own:
                idle += _check_lora(file, header, seen, site, own[site.name])
            else:
                idle += _check_site(file, header, seen, site, method, settings, base) or dead
        for key, tensor in header.tensors.items():
            if key not in read and key not in seen:
                check_finite(file, tensor, WEIGHTS_FILE)
    more = matched.head or matched.saved or matched.tokens or matched.copies  # copies are compared by the server
    if not more and (dead or (idle == len(matched.sites) and not (method.virtual and matched.shared))):
        raise NoEffect(
            f"The adapter changes nothing: {_what_is_zero(modules, method)}, so it would answer as the base does. "
            "Was it saved before it was trained?"
        )
    return idle


def _what_is_zero(modules: Sequence[AdaptedModule], method: Method) -> str:
    return (
        "on every module B A is zero" if modules else f"all that {method.title} would add or scale is as at its start"
    )


def _check_lora(
    file: BinaryIO, header: Header, seen: Mapping[str, Glance], site: AdaptedSite, module: AdaptedModule
) -> bool:
    """Whether a module changes nothing."""
    a_key, b_key = module.a_key, module.b_key
    a = read_factor(file, header.tensors[a_key], WEIGHTS_FILE, rank_axis=0, seen=seen.get(a_key))
    b = read_factor(file, header.tensors[b_key], WEIGHTS_FILE, rank_axis=1, seen=seen.get(b_key))
    extras = [key for key in site.tensors.values() if key not in (a_key, b_key)]
    values = {key: read_values(file, header.tensors[key], WEIGHTS_FILE, seen.get(key)) for key in extras}
    largest = [abs(module.scaling), a.largest, b.largest]
    if module.diagonal_key:
        largest.append(values[module.diagonal_key].largest)
    delta = math.prod(largest)
    _check_product(delta, module.name, f"the scaling {module.scaling:.3g} times the largest values of A and B")
    # B A is zero if no rank has both a row of A and a column of B. DoRA's magnitudes must be compared with the base.
    if module.blocks_a or module.blocks_b:
        meet = bool(a.ranks.any() and b.ranks.any())
    else:
        meet = bool((a.ranks & b.ranks).any())
    biased = module.bias_key is not None and not values[module.bias_key].zero
    return not (meet and delta > MIN_DELTA) and not biased and module.magnitude_key is None and not module.diagonal_key


def _check_site(
    file: BinaryIO,
    header: Header,
    seen: Mapping[str, Glance],
    site: AdaptedSite,
    method: Method,
    settings: Settings,
    base: Base,
) -> bool:
    """Whether a module changes nothing, as far as its tensors tell."""
    place = base.attention(site.name) if site.kind == "attention" else base.place(site.name)
    if place is None or method.tensors is None:
        return False
    expected = method.tensors(settings, place)
    values: dict[str, Values] = {}
    for suffix, key in site.tensors.items():
        tensor = header.tensors[key]
        if expected[suffix].below:
            check_indices(file, tensor, WEIGHTS_FILE, expected[suffix].below)
        else:
            values[suffix] = read_values(file, tensor, WEIGHTS_FILE, seen.get(key))
    scaling = abs(method.scaling(settings, place))
    for group in method.still:
        there = [values[suffix] for suffix in group if suffix in values]
        largest = math.prod(value.largest for value in there) * scaling
        _check_product(largest, site.name, f"the product of {', '.join(s for s in group if s in values)}")
    return bool(method.still) and all(_is_still(group, values, method.neutral) for group in method.still)


def _is_still(group: Sequence[str], values: Mapping[str, Values], neutral: Mapping[str, float]) -> bool:
    """Whether a product of tensors is at its neutral value; there is nothing to it if none of them is there."""
    there = {suffix: values[suffix] for suffix in group if suffix in values}
    return not there or any(value.one if neutral.get(suffix) == 1.0 else value.zero for suffix, value in there.items())


def _check_product(largest: float, name: str, what: str) -> None:
    if largest > MAX_DELTA:
        raise Rejected(
            f"{WEIGHTS_FILE} was refused: on {name} {what} becomes infinity.",
            reason="NOT_FINITE",
            metadata={"module": name},
        )


def _check_shared(
    file: BinaryIO,
    header: Header,
    seen: Mapping[str, Glance],
    matched: Matched,
    method: Method,
    settings: Settings,
    base: Base,
) -> bool:
    """Whether the adapter's shared tensors alone make it change nothing."""
    if not matched.shared:
        return False
    places = [place for site in matched.sites if (place := base.place(site.name)) is not None]
    expected = method.shared_tensors(settings, base, places)
    zero: dict[str, bool] = {}
    for name, key in matched.shared.items():
        tensor = header.tensors[key]
        if expected[name].below:
            check_indices(file, tensor, WEIGHTS_FILE, expected[name].below)
            continue
        stem = name.partition(".")[0]
        zero[stem] = read_values(file, tensor, WEIGHTS_FILE, seen.get(key)).zero and zero.get(stem, True)
    return any(zero.get(stem, False) for stem in method.still_shared)
