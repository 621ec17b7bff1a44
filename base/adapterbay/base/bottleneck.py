"""Bottleneck adapters as torch modules: our own method, since PEFT has none, in a folder of PEFT's shape.

A small network of its own sits behind a linear layer (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021,
arXiv:2005.00247), with h [..., hidden] that layer's output:

    h + scaling · up(f(down(norm(h))))          norm is left out unless `layer_norm_before`

With `through_norm` the modules are the base's normalization layers N instead, and the network sits before N and looks
through it, with x what N gets (a sublayer's output plus its residual):

    N(x + scaling · up(f(down(norm(N(x))))))

which is what the AdapterHub library computes by default (`original_ln_before`).

    model = attach(base, BottleneckConfig(target_modules=("mlp.down_proj",)))
    model.save_pretrained(folder)
    model = load(folder, base)

The server has its own form of this, and is tested against this one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from adapterbay.registry.admission.methods import Settings
from adapterbay.registry.admission.methods.bottleneck import BOTTLENECK, bottleneck_size
from adapterbay.registry.admission.peft_fields import read_method
from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import InvalidArgument, Rejected
from adapterbay.registry.manifest import CONFIG_FILE, WEIGHTS_FILE

PREFIX: Final = "base_model.model."
"""What PEFT puts before the names of modules."""
PARTS: Final = ("adapter_norm", "adapter_down", "adapter_up")


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """adapter_config.json of a bottleneck adapter. `target_modules` and the rest of PEFT's names mean what PEFT means.

    The width is `bottleneck_size`, or hidden // `reduction_factor`; without either, hidden // 16. `modules_to_save` are
    trained and saved whole, such as heads. Raises Rejected for values that admission would refuse.
    """

    target_modules: tuple[str, ...]
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    bottleneck_size: int | None = None
    reduction_factor: float | None = None
    non_linearity: str = "relu"
    scaling: float = 1.0
    layer_norm_before: bool = False
    through_norm: bool = False
    adapter_dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        read_method(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """As it is written: lists sorted, an empty one as null."""
        values: dict[str, Any] = {"peft_type": BOTTLENECK.peft_type}
        for name, value in asdict(self).items():
            values[name] = (sorted(value) or None) if isinstance(value, tuple | list) else value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BottleneckConfig:
        """What a file says. Raises Rejected or UnsupportedMethod."""
        if read_method(values).peft_type != BOTTLENECK.peft_type:
            raise InvalidArgument(f"{CONFIG_FILE} is of a {values.get('peft_type')} adapter, not of a bottleneck.")
        if isinstance(values.get("target_modules"), str):
            raise Rejected("target_modules must be a list of names here.", reason="BAD_CONFIG")
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {name: value for name, value in values.items() if name in known and value is not None}
        if isinstance(given.get("layers_to_transform"), int):
            given["layers_to_transform"] = [given["layers_to_transform"]]
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return cls(**given)


class BottleneckLayer(nn.Module):
    """A layer of the base (`base_layer`, frozen) and the bottleneck behind it, or before it if it is a norm."""

    def __init__(self, base_layer: nn.Module, hidden: int, size: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self._scaling = config.scaling
        self._through = config.through_norm
        self._activation = ACT2FN[config.non_linearity]
        weight = next(base_layer.parameters())
        self.adapter_norm = nn.LayerNorm(hidden, device=weight.device) if config.layer_norm_before else None
        self.adapter_down = nn.Linear(hidden, size, device=weight.device)
        self.adapter_up = nn.Linear(size, hidden, device=weight.device)
        self.adapter_dropout = nn.Dropout(config.adapter_dropout)
        for layer in (self.adapter_down, self.adapter_up):
            # Houlsby et al. 2019, section 2.1: near the identity, a normal of 0.01 cut off at two standard deviations
            nn.init.trunc_normal_(layer.weight, std=1e-2, a=-2e-2, b=2e-2)
            nn.init.zeros_(layer.bias)

    @property
    def weight(self) -> Tensor:
        """The base layer's own; some models look at its dtype."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's own."""
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    def delta(self, h: Tensor) -> Tensor:
        """What is added, for `h` [..., hidden]; computed in the dtype of the bottleneck's own weights, float32."""
        x = h.to(self.adapter_down.weight.dtype)
        if self.adapter_norm is not None:
            x = self.adapter_norm(x)
        up: Tensor = self.adapter_dropout(self.adapter_up(self._activation(self.adapter_down(x)))) * self._scaling
        return up.to(h.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x` as the base's layer takes it."""
        h: Tensor = self.base_layer(x)
        if not self.enabled:
            return h
        if self._through:
            through: Tensor = self.base_layer(x + self.delta(h))
            return through
        return h + self.delta(h)


class BottleneckModel(nn.Module):
    """A base (`model`) with bottlenecks in it; only they and `modules_to_save` are trainable. Made by `attach`."""

    def __init__(self, model: nn.Module, config: BottleneckConfig) -> None:
        super().__init__()
        self.model = model
        self.bottleneck_config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own forward."""
        return self.model(*args, **kwargs)

    def layers(self) -> dict[str, BottleneckLayer]:
        """The bottlenecks, by the name of the module that each is at."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, BottleneckLayer)}

    def parameter_counts(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        sizes = [(part.numel(), part.requires_grad) for part in self.parameters()]
        return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the bottlenecks are off. Modules that are saved whole stay as they were trained."""
        layers = self.layers().values()
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.enabled = True

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What is saved, by the names that PEFT would give."""
        own = {f"{name}.{key}": t for name, layer in self.layers().items() for key, t in _own_tensors(layer).items()}
        for name in saved_modules(self.model, self.bottleneck_config):
            module = self.model.get_submodule(name)
            own |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        return {f"{PREFIX}{name}": tensor for name, tensor in own.items()}

    def save_pretrained(self, folder: Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in sorted(self.adapter_tensors().items())}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(self.bottleneck_config.as_dict(), indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")


def attach(model: Any, config: BottleneckConfig) -> BottleneckModel:
    """Freezes `model` and puts fresh bottlenecks into it, in place. Works for any transformers model.

    Raises InvalidArgument if a target matches nothing, or what is no linear layer (no norm, with `through_norm`).
    """
    found = _targets(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    settings = Settings(config.as_dict())
    for name, module in found.items():
        hidden = _hidden(module)
        layer = BottleneckLayer(module, hidden, bottleneck_size(settings, hidden), config)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(model.training))
    for name in saved_modules(model, config):
        model.get_submodule(name).requires_grad_(True)
    return BottleneckModel(model, config)


def load(folder: Path, model: Any) -> BottleneckModel:
    """The adapter in `folder` on `model`, in place. Raises Rejected for tensors that do not fit."""
    config = BottleneckConfig.from_dict(parse_json_object((folder / CONFIG_FILE).read_bytes(), CONFIG_FILE))
    loaded = attach(model, config)
    tensors = load_file(folder / WEIGHTS_FILE)
    places = loaded.adapter_tensors()
    if odd := sorted(tensors.keys() ^ places.keys()):
        where = "has no place in this model" if odd[0] in tensors else "is missing"
        raise Rejected(f"{WEIGHTS_FILE}: {odd[0]} {where}.", reason="UNKNOWN_TENSOR")
    with torch.no_grad():
        for name, place in places.items():
            if place.shape != tensors[name].shape:
                raise Rejected(
                    f"{name} has the shape {list(tensors[name].shape)}, but {list(place.shape)} is needed here.",
                    reason="SHAPE_MISMATCH",
                )
            place.copy_(tensors[name])
    return loaded


def saved_modules(model: nn.Module, config: BottleneckConfig) -> list[str]:
    """The modules that `modules_to_save` means, as PEFT finds them: by the ends of their names."""
    if not config.modules_to_save:
        return []
    return [name for name, _ in model.named_modules() if name.endswith(config.modules_to_save)]


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, of whatever kind: quantized, or GPT-2's."""
    return isinstance(module, nn.Linear | Conv1D)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalization layer with parameters."""
    weight = module._parameters.get("weight")
    return not list(module.children()) and isinstance(weight, Tensor) and weight.dim() == 1


def _own_tensors(layer: BottleneckLayer) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in layer.state_dict().items() if key.partition(".")[0] in PARTS}


def _hidden(module: nn.Module) -> int:
    if isinstance(module, Conv1D):
        return int(module.nf)
    if isinstance(module, nn.Linear):
        return int(module.out_features)
    weight: Any = module.weight
    return int(weight.shape[0])


def _targets(model: nn.Module, config: BottleneckConfig) -> dict[str, nn.Module]:
    fits, kind = (is_norm, "normalization layer") if config.through_norm else (is_linear, "linear layer")
    targets = Settings(config.as_dict()).targets
    found = {name: module for name, module in model.named_modules() if name and name in targets}
    for name, module in found.items():
        if not fits(module):
            raise InvalidArgument(
                f"target_modules means {name}, which is no {kind}: a bottleneck sits at those.", field="target_modules"
            )
    for target in config.target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in found):
            there = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if fits(module)})
            raise InvalidArgument(
                f"target_modules: {target} matches no {kind} of this base; it has {', '.join(there)}.",
                field="target_modules",
            )
    return found


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the bottlenecks of a preset sit."""

    target_modules: tuple[str, ...]
    exclude_modules: tuple[str, ...] = ()


PRESETS: Final[Mapping[str, str]] = {"houlsby": "swish", "pfeiffer": "relu"}
"""The activation of each preset, as in the AdapterHub library."""

_BERT: Final = ("attention.output.dense", "output.dense")
_LLAMA: Final = ("self_attn.o_proj", "mlp.down_proj")
_OUTPUTS: Final[Mapping[str, tuple[str, str]]] = {
    "albert": ("attention.dense", "ffn_output"),
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), _BERT),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), _LLAMA),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
}
"""By model type: the output projections of the attention and of the feed-forward part."""


def placement(preset: str, model_type: str) -> Placement:
    """Where the bottlenecks of a preset sit in an architecture.

    `houlsby`: behind the output projections of the attention and of the feed-forward part, both before the residual is
    added; `pfeiffer`: behind that of the feed-forward part only.
    Raises InvalidArgument for an architecture that has no defaults.
    """
    outputs = _OUTPUTS.get(model_type)
    if outputs is None:
        raise InvalidArgument(
            f"No modules are known for a bottleneck in the architecture {model_type!r} ({', '.join(sorted(_OUTPUTS))} "
            "are): name them, such as the output projections of the attention and of the feed-forward part.",
            field="target_modules",
        )
    attention, feed_forward = outputs
    if preset == "houlsby":
        return Placement(outputs)
    # In BERT the one's name ends as the other's.
    ambiguous = f".{attention}".endswith(f".{feed_forward}")
    return Placement((feed_forward,), (attention,) if ambiguous else ())


__all__ = [
    "PRESETS",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "Placement",
    "attach",
    "load",
    "placement",
    "saved_modules",
]
