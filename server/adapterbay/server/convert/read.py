"""Has PEFT read an adapter: its config, its tensors, its layers, over a tree that shows the base."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterbay.registry.admission.patterns import ModulePatterns, SearchPatterns, Targets, compile_pattern
from adapterbay.registry.errors import AdapterbayError, Rejected, UnsupportedMethod
from adapterbay.server.adapters.forms import LinearForm, TableForm
from adapterbay.server.convert.direct import ADAPTER
from adapterbay.server.convert.layers import LayerReader, tuner_layers
from adapterbay.server.convert.loftq import is_loftq, rewrite_base
from adapterbay.server.convert.tables import read_table
from adapterbay.server.convert.tree import View, make_plain

_PEFT = threading.Lock()
"""PEFT warns, patches and seeds globally: one adapter at a time."""

_OF_PEFT: Final = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError)
"""What PEFT raises for configs and tensors that do not fit each other; it checks few of them itself."""

PLAIN_ONLY: Final = frozenset({"GLORA"})
"""Methods that take nothing but torch's own nn.Linear, no subclass of it."""

SHAPES_ONLY: Final = frozenset(
    {"ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "HRA", "IA3", "LOHA", "LOKR", "OFT", "ROAD", "VBLORA", "VERA"}
    | {"WAVEFT"}
)
"""Methods that look at no value of the base's weights while they are built: reading them would take the time."""


def read_layers(
    root: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, LinearForm | TableForm]:
    """The forms of all linear layers and embeddings that PEFT adapts, by their path in `root` (see `tree.peft_root`). A
    form without tensors is that of a layer that computes what the base's does. LoRA's embeddings are not read here.

    `config` is adapter_config.json, `tensors` its tensors without heads, saved modules and biases; `dtype` that of the
    serving base. Raises Rejected for tensors that PEFT has no place for, and UnsupportedMethod for what PEFT itself
    refuses on this base.
    """
    method = str(config["peft_type"])
    rewrites_base = method == "LORA"  # PiSSA and its like subtract their start from the base's weight
    for module in root.modules():
        if isinstance(module, View):
            module.keeps = rewrites_base
            module.shows_values = method not in SHAPES_ONLY
    if method in PLAIN_ONLY:
        make_plain(root)
    with _PEFT, torch.no_grad(), _quiet(), _own_randomness():
        model = _inject(root, config, method)
        _load(model, tensors, method)
        if is_loftq(config):
            rewrite_base(tuner_layers(model.base_model.model), config)
        for module in root.modules():
            if isinstance(module, View):
                module.shows_values = True
        reader = LayerReader(method, dtype)
        forms: dict[str, LinearForm | TableForm] = {}
        for path, layer in tuner_layers(model.base_model.model).items():
            base_layer = layer.get_base_layer()
            if isinstance(base_layer, nn.Embedding):
                table = read_table(method, layer)
                if table is not None:
                    forms[path] = table
                continue
            layer.eval().float()  # never what stands over an embedding, which is the base's own
            forms[path] = _read(reader, layer, base_layer, path, method)
        return forms


def _read(reader: LayerReader, layer: Any, base_layer: nn.Module, path: str, method: str) -> LinearForm:
    try:
        return reader.read(layer, base_layer, path)
    except AdapterbayError:
        raise
    except Exception as error:
        raise UnsupportedMethod(
            f"PEFT's {method} layer on {path} cannot be computed: {str(error)[:300]}",
            metadata={"peft_type": method, "module": path},
        ) from error


def without_expressions(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """The same settings with every pattern replaced by the names that it means among `modules`.

    A stranger's regular expression is matched in linear time here, and never by PEFT, which would hand it to Python's
    backtracking matcher. Raises Rejected with reason BAD_PATTERN.
    """
    targets = Targets(config)
    names = [name for name in modules if name in targets]
    settings = dict(config)
    if "target_modules" in settings:
        settings["target_modules"] = names
    settings |= {key: None for key in ("exclude_modules", "layers_to_transform", "layers_pattern") if key in settings}
    inner = settings.get("feedforward_modules")
    if inner is not None:
        means = compile_pattern(inner).fullmatch if isinstance(inner, str) else lambda name: name.endswith(tuple(inner))
        settings["feedforward_modules"] = [name for name in names if means(name)]
    kind = SearchPatterns if config.get("peft_type") == "OSF" else ModulePatterns
    for key, value in config.items():
        if key.endswith("_pattern") and isinstance(value, Mapping) and config.get("peft_type") != "ADALORA":
            patterns = kind(value)
            found = {name: patterns.first(name) for name in names}
            settings[key] = {name: value[pattern] for name, pattern in found.items() if pattern is not None}
    return settings


def _inject(root: nn.Module, config: Mapping[str, Any], method: str) -> Any:
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    known = {field.name for field in dataclasses.fields(config_class)}
    matrices = (path for path, module in root.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding))
    settings = {key: value for key, value in without_expressions(config, matrices).items() if key in known}
    overrides: dict[str, Any] = {
        "modules_to_save": None,
        "bias": "none",
        "trainable_token_indices": None,
        "base_model_name_or_path": None,
        "auto_mapping": None,
        "inference_mode": True,
    }
    if is_loftq(config):  # PEFT's own start needs CUDA: `loftq` does it
        overrides |= {"init_lora_weights": True, "loftq_config": {}}
    settings |= {key: value for key, value in overrides.items() if key in settings}
    try:
        return PeftModel(root, config_class(**settings), adapter_name=ADAPTER)
    except (*_OF_PEFT, ImportError) as error:
        raise UnsupportedMethod(
            f"PEFT cannot put this {method} adapter on this base: {str(error)[:300]}", metadata={"peft_type": method}
        ) from error


def _load(model: Any, tensors: Mapping[str, Tensor], method: str) -> None:
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(model, dict(tensors), adapter_name=ADAPTER)
    except _OF_PEFT as error:
        raise Rejected(
            f"PEFT cannot load the tensors of this {method} adapter: {str(error)[:300]}", reason="SHAPE_MISMATCH"
        ) from error
    unexpected = result.unexpected_keys
    if unexpected:
        raise Rejected(
            f"PEFT has no place for {len(unexpected)} tensors, such as {unexpected[0][:200]!r}.",
            reason="UNKNOWN_TENSOR",
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings: what matters is said by our own errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """PEFT draws initial values before the saved ones replace them; nobody else's random stream may notice."""
    with torch.random.fork_rng(devices=[]):
        yield
