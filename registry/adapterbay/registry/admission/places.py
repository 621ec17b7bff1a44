"""Modules of the base, by the names that adapters give to them: what they are and how large."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from adapterbay.registry.admission.module_names import (
    BASE_MODEL_PREFIXES,
    CONV1D_MODEL_TYPES,
    EMBEDDINGS,
    OUTPUTS,
    backbone_path,
    hidden_size,
)

Kind = Literal["linear", "conv1d", "embedding", "norm", "output", "attention"]
"""`conv1d` is transformers' linear layer with weights stored as [in, out], `output` the language-model head."""

Shapes = Mapping[str, tuple[int, ...]]

INPUT_EMBEDDINGS: Final = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared")


@dataclass(frozen=True, slots=True)
class Place:
    """A module of the base. `name` is what the adapter calls it, `base_name` what the checkpoint does.

    A matrix maps `in_features` to `out_features`; an embedding has `in_features` rows of `out_features`; a norm has
    `out_features` weights, and an attention that of the hidden state. `bias`: the base has a bias there.
    """

    name: str
    base_name: str
    kind: Kind
    in_features: int
    out_features: int
    bias: bool

    @property
    def last(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """As the base stores it."""
        if self.kind in ("norm", "attention"):
            return (self.out_features,)
        if self.kind in ("conv1d", "embedding"):
            return (self.in_features, self.out_features)
        return (self.out_features, self.in_features)


class Base:
    """The base's modules. `shapes` are those of its checkpoint, `config` its config.json."""

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        self.shapes = shapes
        self.config = config
        self.hidden = hidden_size(config)
        self.conv1d = config.get("model_type") in CONV1D_MODEL_TYPES

    def place(self, name: str) -> Place | None:
        """The module that an adapter calls `name`; None: the base has none with a weight of one or two dimensions."""
        last = name.rpartition(".")[2]
        base_name = backbone_path(name, self.shapes)
        if base_name is None:
            return self._tied(name, last)
        shape = self.shapes[f"{base_name}.weight"]
        bias = f"{base_name}.bias" in self.shapes
        if len(shape) == 1:
            return Place(name, base_name, "norm", shape[0], shape[0], bias)
        if len(shape) != 2:
            return None
        if last in OUTPUTS:
            return Place(name, base_name, "output", shape[1], shape[0], bias)
        if last in EMBEDDINGS or ("embed" in last and not bias and "proj" not in last):
            return Place(name, base_name, "embedding", shape[0], shape[1], bias)
        if self.conv1d:
            return Place(name, base_name, "conv1d", shape[0], shape[1], bias)
        return Place(name, base_name, "linear", shape[1], shape[0], bias)

    def attention(self, name: str) -> Place | None:
        """A module without a weight of its own, such as `layers.0.self_attn`."""
        first, _, rest = name.partition(".")
        candidates = [name, *(f"{prefix}.{name}" for prefix in sorted(BASE_MODEL_PREFIXES))]
        if first in BASE_MODEL_PREFIXES:
            candidates.append(rest)
        for candidate in candidates:
            if candidate and self.hidden and any(key.startswith(f"{candidate}.") for key in self.shapes):
                return Place(name, candidate, "attention", self.hidden, self.hidden, bias=False)
        return None

    def modules(self) -> Iterator[str]:
        """The names of all modules with a weight, in the order of the checkpoint."""
        return (key.removesuffix(".weight") for key in self.shapes if key.endswith(".weight"))

    def layers(self) -> int | None:
        """The number of layers, by the names that architectures give to it."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, Mapping) else {}):
            for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
                value = config.get(key)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    def vocabulary(self) -> int | None:
        """How many rows the input embedding has."""
        embedding = self._input_embedding()
        return None if embedding is None else self.shapes[embedding][0]

    def is_tied(self, place: Place) -> bool:
        """Whether a module is the input embedding under another name."""
        if f"{place.base_name}.weight" not in self.shapes:
            return True
        return place.kind == "output" and self.config.get("tie_word_embeddings") is True

    def _input_embedding(self) -> str | None:
        for last in INPUT_EMBEDDINGS:
            for key in self.shapes:
                if key == f"{last}.weight" or key.endswith(f".{last}.weight"):
                    return key
        return None

    def _tied(self, name: str, last: str) -> Place | None:
        """What the checkpoint leaves out, since it is the input embedding: a language-model head, or a side's own table
        of an encoder-decoder.
        """
        embedding = self._input_embedding()
        if embedding is None:
            return None
        rows, columns = self.shapes[embedding]
        if last in OUTPUTS and "." not in name:
            return Place(name, name, "output", columns, rows, bias=False)
        if embedding == "shared.weight" and name in ("encoder.embed_tokens", "decoder.embed_tokens"):
            return Place(name, name, "embedding", rows, columns, bias=False)
        return None
