"""What PEFT saves of the base beside an adapter (`save_embedding_layers`): it must be the base's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from adapterbay.registry.admission.report import AdaptedModule
from adapterbay.registry.errors import Rejected, UnsupportedMethod
from adapterbay.server.adapters.forms import LinearForm

COMPUTED: Final = 1e-4
"""How far a copy may be from a base that was computed (in float32), relative to the largest weight."""


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises Rejected with reason SHAPE_MISMATCH for a table or a head of another size."""
    if tuple(tensor.shape) != tuple(shape):
        raise Rejected(
            f"{name}.weight has the shape {list(tensor.shape)}, and the base's {list(shape)}: an adapter that "
            "changes the vocabulary is not served.",
            reason="SHAPE_MISMATCH",
        )


def check_copy(name: str, copied: Tensor, own: Tensor, dtype: torch.dtype, where: str, *, exact: bool = True) -> None:
    """Raises UnsupportedMethod unless `copied` is `own`, in the coarser of its dtype and the serving base's, `dtype`.

    `exact`: `own` was read, and not computed. `where` says how the adapter comes to have it.
    """
    check_shape(name, copied, own.shape)
    coarse = max(copied.dtype, dtype, key=lambda each: torch.finfo(each).eps)
    if exact:
        same = torch.equal(copied.to(coarse), own.to(coarse))
    else:
        most = max(COMPUTED, torch.finfo(coarse).eps) * float(own.abs().max())
        same = bool((copied.float() - own).abs().max() <= most)
    if not same:
        raise UnsupportedMethod(
            f"The adapter brings its own {name} {where}: train it with modules_to_save instead, or save with "
            "save_embedding_layers=False if it is the base's.",
            metadata={"module": name},
        )


def changed_base(weight: Tensor, form: LinearForm, module: AdaptedModule, tensors: Mapping[str, Tensor]) -> Tensor:
    """What PEFT leaves of a base's weight [out, in] where LoRA starts from it (PiSSA, KaSA): what the layer computes
    without scaling · B A."""
    a, b = tensors[module.a_key].float(), tensors[module.b_key].float()
    if module.diagonal_key is not None:
        a = tensors[module.diagonal_key].float()[:, None] * a
    left = weight - module.scaling * b @ a
    if form.low_rank is not None:
        left = left + form.low_rank.scaling * form.low_rank.b.float().t() @ form.low_rank.a.float()
    return left if form.dense is None else left + form.dense.float()
