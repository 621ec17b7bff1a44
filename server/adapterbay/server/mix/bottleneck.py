"""A bottleneck adapter at a module: a small network of its own on its own tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from adapterbay.server.adapters.forms import Bottleneck


class PlacedBottleneck:
    """One resident bottleneck, computed in float32."""

    def __init__(self, form: Bottleneck, device: torch.device) -> None:
        self._form = form

        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, torch.float32)

        self._down, self._down_bias = form.down.to(device, torch.float32), there(form.down_bias)
        self._up, self._up_bias = form.up.to(device, torch.float32), there(form.up_bias)
        self._norm = {name: tensor.to(device, torch.float32) for name, tensor in (form.norm or {}).items()}
        self._activation = ACT2FN[form.activation]

    def delta(self, h: Tensor) -> Tensor:
        """What is added to `h` [rows, hidden]."""
        x = h.float()
        if self._norm:
            x = F.layer_norm(x, (x.shape[-1],), self._norm.get("weight"), self._norm.get("bias"))
        down = self._activation(F.linear(x, self._down, self._down_bias))
        up: Tensor = F.linear(down, self._up, self._up_bias) * self._form.scaling
        return up.to(h.dtype)
