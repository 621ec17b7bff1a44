"""Whether a form can be computed with: what an adapter's files hold is checked by admission, what follows from them and
the base is checked here. One infinity in a pool that rows share would be NaN in every row, since 0 · ∞ is NaN."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from adapterbay.registry.errors import Rejected
from adapterbay.server.adapters.forms import ServingForm

AS_WIDE: Final = (torch.float32, torch.bfloat16)
"""What admission finds finite in bfloat16 is finite in these."""


def check_finite(form: ServingForm, dtype: torch.dtype, *, admitted: bytes = b"") -> None:
    """Raises Rejected (NOT_FINITE) unless every number of the form is finite in `dtype`, the base's.

    `admitted`: the weights file, at all of whose numbers admission has just looked. What of it the form holds as it is
    there is not looked at again.
    """
    numbers = list(_numbers(form))
    if admitted and dtype in AS_WIDE:
        first = torch.frombuffer(admitted, dtype=torch.uint8).data_ptr()
        there = range(first, first + len(admitted))
        numbers = [(where, tensor) for where, tensor in numbers if tensor.data_ptr() not in there]
    if finite((tensor for _, tensor in numbers), dtype):
        return
    where = next(where for where, tensor in numbers if not finite([tensor], dtype))
    raise Rejected(
        f"The {form.manifest.peft_type} adapter gives {where} values that are no finite numbers in the base's "
        f"{str(dtype).removeprefix('torch.')}: its tensors are too large, or not of this base.",
        reason="NOT_FINITE",
        metadata={"module": where},
    )


def finite(tensors: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Whether all that tensors hold is finite once it is rounded to `dtype`. Whole numbers always are."""
    extremes = [
        extreme.float()
        for tensor in tensors
        if tensor.is_floating_point() and tensor.numel()
        for extreme in _as_stored(tensor).aminmax()  # NaN is both the least and the largest
    ]
    return not extremes or bool(torch.stack(extremes).to(dtype).isfinite().all())


def _as_stored(tensor: Tensor) -> Tensor:
    """The same numbers in their own order: a transposed matrix is read three times slower."""
    return tensor.t() if tensor.dim() == 2 and tensor.stride(0) == 1 else tensor


def _numbers(form: ServingForm) -> Iterator[tuple[str, Tensor]]:
    """All of a form but its head, which comes from the files as it is and stays in float32."""
    for kind in (form.layers, form.lasting, form.norms, form.tables, form.bottlenecks, form.attention):
        for path, part in kind.items():
            for tensor in part.tensors():
                yield str(path), tensor
    scalings = [low_rank.scaling for _, low_rank in form.low_ranks()]
    if scalings:
        yield "its low-rank deltas", torch.tensor(scalings)
    if form.virtual is not None:
        for tensor in form.virtual.tensors():
            yield "its virtual tokens", tensor
