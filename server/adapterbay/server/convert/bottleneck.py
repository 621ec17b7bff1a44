"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247): small modules
behind layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapterbay.server.adapters.forms import Bottleneck


def bottleneck(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Bottleneck:
    """One module by its tensors, whose names follow the layer's, and the adapter's settings."""
    norm = {name.removeprefix("adapter_norm."): t for name, t in parts.items() if name.startswith("adapter_norm.")}
    return Bottleneck(
        down=parts["adapter_down.weight"],
        down_bias=parts.get("adapter_down.bias"),
        up=parts["adapter_up.weight"],
        up_bias=parts.get("adapter_up.bias"),
        activation=str(config.get("non_linearity") or "relu"),
        scaling=float(config.get("scaling") or 1.0),
        norm=norm or None,
    )
