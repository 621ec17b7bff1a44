"""Methods whose form can be read from PEFT's layer without running it on the identity matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from adapterbay.server.adapters.forms import LinearForm, LowRank, Turn
from adapterbay.server.convert.effect import negligible

ADAPTER: Final = "default"
"""The name under which PEFT holds the adapter that is being read."""


def _beft(layer: Any, _: Tensor) -> LinearForm:
    return LinearForm(bias=layer.beft_bias[ADAPTER].detach().flatten().float())


def _ia3(layer: Any, _: Tensor) -> LinearForm:
    """IA³ (Liu et al. 2022, arXiv:2205.05638): keys and values are scaled behind the layer, feed-forward before it."""
    scale = layer.ia3_l[ADAPTER].detach().flatten().float()
    return LinearForm(in_scale=scale) if layer.is_feedforward else LinearForm(out_scale=scale)


def _adalora(layer: Any, _: Tensor) -> LinearForm:
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): B diag(E) A; PEFT divides by the number of ranks left."""
    a, b, e = (getattr(layer, f"lora_{part}")[ADAPTER].detach().float() for part in "ABE")
    scaling = float(layer.scaling[ADAPTER]) / (float(layer.ranknum[ADAPTER]) + 1e-5)
    return LinearForm(low_rank=LowRank(a=a * e, b=b.t().contiguous(), scaling=scaling))


def _vera(layer: Any, _: Tensor) -> LinearForm:
    """VeRA (Kopiczko et al. 2023, arXiv:2310.11454): diag(b) B diag(d) A, with A and B shared by all layers."""
    a = layer.vera_A[ADAPTER].detach().float()[:, : layer.in_features]
    b = layer.vera_B[ADAPTER].detach().float()[: layer.out_features]
    d, scale = layer.vera_lambda_d[ADAPTER].detach().float(), layer.vera_lambda_b[ADAPTER].detach().float()
    factors = LowRank(a=d[:, None] * a, b=(scale[:, None] * b).t().contiguous(), scaling=1.0)
    return LinearForm(low_rank=_no_wider(factors))


def _no_wider(factors: LowRank) -> LowRank:
    """The same of no more ranks than the layer has inputs: VeRA's r is that of all layers, and 1024 in its paper."""
    rank, width = factors.a.shape
    if rank <= width:
        return factors
    return LowRank(a=torch.eye(width), b=factors.a.t() @ factors.b, scaling=factors.scaling)


def _hra(layer: Any, weight: Tensor) -> LinearForm:
    """HRA (Yuan et al. 2024, arXiv:2405.17484): W times r reflections. R - I has rank r, so W(R - I) = (W P) Q."""
    from adapterbay.server.convert.layers import factor

    change = layer.get_delta_weight(ADAPTER).detach().float()
    change.diagonal().sub_(1)
    if negligible(change, torch.ones(1)):
        return LinearForm()
    factors = factor(change, 4e-6 * float(change.abs().max()), at_any_rank=True)
    assert factors is not None
    return LinearForm(low_rank=LowRank(a=factors.a, b=(weight @ factors.b.t()).t().contiguous(), scaling=1.0))


def _boft(layer: Any, weight: Tensor) -> LinearForm:
    """BOFT (Liu et al. 2023, arXiv:2311.06243): a product of butterfly rotations of the weight, and a scale of rows."""
    rotation, scale = layer.get_delta_weight(ADAPTER)
    turned = torch.mm(rotation.detach().float(), weight.t()).t() * scale.detach().float().view(-1, 1)
    change = turned - weight
    return LinearForm() if negligible(change, weight) else LinearForm(dense=change)


def _oft(layer: Any, _: Tensor) -> LinearForm:
    """OFT (Qiu et al. 2023, arXiv:2306.07280): a block-diagonal rotation of the layer's input."""
    return LinearForm(rotation=rotation_of(layer.oft_R[ADAPTER]))


def rotation_of(module: Any) -> Tensor:
    """The blocks [blocks, size, size] of PEFT's `OFTRotationModule`, each to be multiplied with a column."""
    size, features = int(module.block_size), int(module.in_features)
    turned = module(torch.eye(features))
    blocks = turned.view(features // size, size, features // size, size)
    diagonal = torch.stack([blocks[block, :, block] for block in range(features // size)])
    return diagonal.transpose(1, 2).contiguous()


def _road(layer: Any, _: Tensor) -> LinearForm:
    """RoAd (Petrushkov et al. 2024, arXiv:2409.00119): outputs turned in pairs."""
    from peft.tuners.road.layer import _get_delta_weight

    rotation = _get_delta_weight(
        layer.variant[ADAPTER], layer.group_size[ADAPTER], layer.road_theta[ADAPTER], layer.road_alpha[ADAPTER]
    ).float()
    crossed = rotation - torch.diag(rotation.diagonal())
    partner = crossed.abs().argmax(1)
    values = crossed.gather(1, partner[:, None])[:, 0]
    return LinearForm(out_scale=rotation.diagonal().clone(), turn=Turn(values=values, partner=partner))


DIRECT: Final[Mapping[str, Callable[[Any, Tensor], LinearForm]]] = {
    "ADALORA": _adalora,
    "BEFT": _beft,
    "BOFT": _boft,
    "HRA": _hra,
    "IA3": _ia3,
    "OFT": _oft,
    "ROAD": _road,
    "VERA": _vera,
}
