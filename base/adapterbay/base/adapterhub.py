"""Bottleneck adapters of the AdapterHub library (`adapters`, once `adapter-transformers`) into our folder.

Its folder holds adapter_config.json of its own shape, the tensors as adapter.safetensors or pytorch_adapter.bin, and
perhaps a head (head_config.json and model_head.safetensors or pytorch_model_head.bin). The library is not needed; what
its adapters compute is read from its source (adapters 1.3.0, methods/modeling.py). With h a sublayer's output, r its
residual input, N the base's normalization behind them, and A the bottleneck, scaling · up(f(down(norm(·)))):

    original_ln_before=False    N(h + A(h) + r)                     Houlsby: behind the output projection
    original_ln_before=True     z = h + r, N(z + A(N(z)))           Pfeiffer, its default: with `through_norm`,
                                                                    since h + r is all that N gets

Settings that compute something else are refused by name. Nothing is ever unpickled: a .bin is read by torch's reader of
plain tensors (`weights_only`), which runs no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterbay.base.adapterhub_head import TASKS, HubHead, convert_head
from adapterbay.base.bottleneck import PREFIX, BottleneckConfig
from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import InvalidArgument, NotFound, Rejected, UnsupportedMethod
from adapterbay.registry.manifest import CONFIG_FILE, TRAINING_FILE, WEIGHTS_FILE

CONVERSION: Final = (
    "load it once where you trust it, with the adapters library, and save it with "
    "model.save_adapter(FOLDER, NAME, use_safetensors=True)"
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where the layers are, and what the library's two places are called in transformers.

    `norms` are the normalization layers behind the attention and the feed-forward part; None: they come first there.
    """

    prefix: str
    layers: str
    outputs: tuple[str, str]
    norms: tuple[str, str] | None = None


def _bert(prefix: str) -> Architecture:
    outputs = ("attention.output.dense", "output.dense")
    return Architecture(prefix, "encoder.layer", outputs, ("attention.output.LayerNorm", "output.LayerNorm"))


_LLAMA: Final = Architecture("model", "layers", ("self_attn.o_proj", "mlp.down_proj"))
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "bert": _bert("bert"),
    "electra": _bert("electra"),
    "roberta": _bert("roberta"),
    "xlm-roberta": _bert("roberta"),
    "distilbert": Architecture(
        "distilbert", "transformer.layer", ("attention.out_lin", "ffn.lin2"), ("sa_layer_norm", "output_layer_norm")
    ),
    "gpt2": Architecture("transformer", "h", ("attn.c_proj", "mlp.c_proj")),
    "llama": _LLAMA,
    "mistral": _LLAMA,
}

_NAME = re.compile(
    r"(?:.+\.)?(?:layers?|h)\.(?P<index>\d+)\.(?P<where>[a-z_.]+?)"
    r"\.(?:adapters|(?:attention|layer)_text_(?:task|lang)_adapters)\.(?P<name>[^.]+)\.(?P<part>.+)"
)
_WHERE: Final = {"attention.output": 0, "attention_adapters": 0, "output": 1, "output_adapters": 1}

_DEFAULTS: Final[Mapping[str, Any]] = {
    "mh_adapter": False,
    "output_adapter": False,
    "reduction_factor": 16,
    "non_linearity": "relu",
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "leave_out": [],
    "phm_layer": False,
}
"""Of the library's BnConfig."""
_TRAINING: Final = frozenset({"init_weights", "init_weights_seed", "dropout", "stochastic_depth", "architecture"})
_OF_OTHERS: Final = re.compile(
    r"phm_.*|.*_phm|.*_phm_.*|factorized_phm_W|hypercomplex_nonlinearity|inv(ertible)?_adapter.*"
)
"""What has no meaning without the settings that are refused."""
_PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    name: values
    for names, values in (
        (("pfeiffer", "seq_bn"), {"output_adapter": True, "original_ln_before": True}),
        (("houlsby", "double_seq_bn"), {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish"}),
    )
    for name in names
}
_ACTIVATIONS: Final = {
    **{name: name for name in ("relu", "gelu", "gelu_new", "swish", "silu", "tanh")},
    "leakyrelu": "leaky_relu",
}
_OLD_ACTIVATIONS: Final = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Before the library wrote its version into the file."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of it. `labels` are empty where the names are not known, `left_out` says what was not taken along."""

    config: BottleneckConfig
    task: str
    labels: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def import_adapterhub(folder: Path, output: Path, *, head: bool = True) -> Imported:
    """Converts the adapter in `folder` and writes it to `output`, which must be empty or not there.

    `head=False` leaves a head out, so that the adapter embeds or generates. Raises NotFound, InvalidArgument, Rejected
    for files that are not what they should be, and UnsupportedMethod for what is known and not served.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidArgument(f"{output} exists and is not empty; name another folder.", field="output")
    document = _document(folder, CONFIG_FILE)
    settings = _settings(document)
    model_type = str(document.get("model_type"))
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise UnsupportedMethod(
            f"AdapterHub's adapters for the architecture {model_type!r} are not imported; those for "
            f"{', '.join(ARCHITECTURES)} are."
        )
    through = _through_norm(settings, architecture)
    activation = _activation(settings, document)
    sites = _sites(_weights(folder, "adapter"), settings, str(document.get("name")))
    found, left_out = _head(folder, model_type, wanted=head)
    task = found.task if found else ("CAUSAL_LM" if architecture.norms is None else "FEATURE_EXTRACTION")
    places = (architecture.norms or architecture.outputs) if through else architecture.outputs
    layers = architecture.layers if task == "FEATURE_EXTRACTION" else f"{architecture.prefix}.{architecture.layers}"
    named = {f"{layers}.{index}.{places[where]}": site for (index, where), site in sites.items()}
    size = max(site["adapter_down.weight"].shape[0] for site in named.values())
    tensors = {f"{PREFIX}{name}.{part}": t for name, site in named.items() for part, t in _padded(site, size).items()}
    if found:
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in found.tensors.items()}
    config = BottleneckConfig(
        target_modules=tuple(named),
        bottleneck_size=size,
        non_linearity=activation,
        scaling=1.0 if isinstance(settings["scaling"], str) else float(settings["scaling"]),
        layer_norm_before=bool(settings["ln_before"]),
        through_norm=through,
        modules_to_save=found.modules if found else (),
        task_type=task,
        base_model_name_or_path=document.get("model_name") or None,
    )
    imported = Imported(config, TASKS[task], found.labels if found else (), left_out)
    _write(output, imported, tensors, document)
    return imported


def _document(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise NotFound(f"{folder} has no {name}: it is not a folder that model.save_adapter wrote.")
    return parse_json_object(path.read_bytes(), name)


def _weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of `adapter` or `model_head`, in float32."""
    pickled = {"adapter": "pytorch_adapter.bin", "model_head": "pytorch_model_head.bin"}[stem]
    safe, plain = folder / f"{stem}.safetensors", folder / pickled
    if safe.is_file():
        try:
            return {name: tensor.float() for name, tensor in load_file(safe).items()}
        except SafetensorError as error:
            raise Rejected(f"{safe.name} is no safetensors file: {error}.", reason="BAD_HEADER") from error
    if not plain.is_file():
        raise NotFound(f"{folder} has neither {safe.name} nor {plain.name}.")
    try:
        loaded = torch.load(plain, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no error of its own for a file that it will not read
        raise Rejected(
            f"{plain.name} holds more than plain tensors, or is damaged: {CONVERSION}.", reason="PICKLE"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise Rejected(f"{plain.name} holds more than tensors by name: {CONVERSION}.", reason="PICKLE")
    return {name: tensor.detach().float() for name, tensor in loaded.items()}


def _settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """The library's BnConfig, complete and checked. Raises Rejected or UnsupportedMethod."""
    given: Any = document.get("config")
    if isinstance(given, str):
        given = _PRESETS.get(given) or _refuse("config", given, "only pfeiffer and houlsby are known by name")
    if not isinstance(given, Mapping):
        raise Rejected(
            f"{CONFIG_FILE} has no config object: it is no adapter of the AdapterHub library.", reason="BAD_CONFIG"
        )
    if given.get("architecture") is not None:
        _refuse("architecture", given["architecture"], "only bottleneck adapters are imported")
    unknown = sorted(
        key
        for key, value in given.items()
        if key not in _DEFAULTS and key not in _TRAINING and not _OF_OTHERS.fullmatch(key) and value
    )
    if unknown:
        raise Rejected(
            f"{CONFIG_FILE} has settings that are not known: {', '.join(unknown)}.", reason="UNKNOWN_CONFIG_KEY"
        )
    settings = {key: given.get(key, default) for key, default in _DEFAULTS.items()}
    if not settings["inv_adapter"] and given.get("invertible_adapter"):
        settings["inv_adapter"] = "nice"
    if settings["inv_adapter"] and document.get("type") == "text_task":
        settings["inv_adapter"] = None  # old files say so of task adapters, which have none
    for key, why in (
        ("inv_adapter", "invertible adapters at the embedding are not served"),
        ("is_parallel", "parallel adapters read what the sublayer reads, and are not served"),
        ("use_gating", "gates over all tokens are not served"),
        ("phm_layer", "Compacter's layers are not served"),
        ("cross_adapter", "adapters behind the cross-attention are not served"),
        ("ln_after", "a normalization behind the adapter is not served"),
    ):
        if settings[key]:
            _refuse(key, settings[key], why)
    if isinstance(settings["scaling"], str) and settings["scaling"] not in ("learned", "channel"):
        _refuse("scaling", settings["scaling"], "it is a number, 'learned' or 'channel'")
    if not settings["mh_adapter"] and not settings["output_adapter"]:
        _refuse("output_adapter", False, "without mh_adapter there is no adapter at all")
    return settings


def _through_norm(settings: Mapping[str, Any], architecture: Architecture) -> bool:
    """Whether the adapter looks through the base's normalization. Raises UnsupportedMethod for other arrangements."""
    if not settings["original_ln_after"]:
        _refuse("original_ln_after", False, "it leaves out the base's residual and normalization behind the adapter")
    residual = settings["residual_before_ln"]
    if not settings["original_ln_before"]:
        if residual == "post_add":
            _refuse("residual_before_ln", residual, "it has no meaning without original_ln_before")
        return False
    if architecture.norms is None:
        _refuse(
            "original_ln_before",
            True,
            "in this architecture the adapter would read the sum with the residual, which the layer it sits at never "
            "sees; houlsby's arrangement (original_ln_before=false) is served",
        )
    if residual is not True:
        _refuse("residual_before_ln", residual, "beside original_ln_before the residual would be added twice")
    return True


def _activation(settings: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    name = str(settings["non_linearity"])
    if "version" not in document:
        name = _OLD_ACTIVATIONS.get(name, name)
    return _ACTIVATIONS.get(name.lower()) or _refuse("non_linearity", name, f"{', '.join(_ACTIVATIONS)} are served")


Site = dict[str, Tensor]


def _sites(weights: Mapping[str, Tensor], settings: Mapping[str, Any], name: str) -> dict[tuple[int, int], Site]:
    """The bottlenecks by (layer, place), place 0 the attention and 1 the feed-forward part, under our names."""
    raw: dict[tuple[int, int], dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        found = _NAME.fullmatch(key)
        where = _WHERE.get(found["where"]) if found else None
        if found is None or where is None or found["name"] != name:
            raise Rejected(
                f"The tensor {key[:200]!r} belongs to no bottleneck of the adapter {name!r}.", reason="UNKNOWN_TENSOR"
            )
        raw.setdefault((int(found["index"]), where), {})[found["part"]] = tensor
    wanted = {where for where, flag in enumerate(("mh_adapter", "output_adapter")) if settings[flag]}
    left_out = {int(index) for index in settings["leave_out"] or ()}
    last = max((index for index, _ in raw), default=-1)
    expected = {(index, where) for index in range(last + 1) if index not in left_out for where in wanted}
    if not raw or raw.keys() != expected:
        layer = min(expected ^ raw.keys(), default=(0, 0))[0]
        raise Rejected(
            f"The tensors are not those that the settings ask for, for instance at layer {layer}.",
            reason="MISSING_TENSOR",
        )
    return {place: _site(parts, settings, place) for place, parts in sorted(raw.items())}


def _site(parts: Mapping[str, Tensor], settings: Mapping[str, Any], place: tuple[int, int]) -> Site:
    parts = dict(parts)
    first = int(bool(settings["ln_before"]))
    names = {
        **{f"adapter_down.{first}.{end}": f"adapter_down.{end}" for end in ("weight", "bias")},
        **{f"adapter_up.{end}": f"adapter_up.{end}" for end in ("weight", "bias")},
    }
    if first:
        names |= {f"adapter_down.0.{end}": f"adapter_norm.{end}" for end in ("weight", "bias")}
        for end in ("weight", "bias"):  # the same tensors under a second name
            parts.pop(f"adapter_norm_before.{end}", None)
    learned = isinstance(settings["scaling"], str)
    if parts.keys() != names.keys() | ({"scaling"} if learned else set()):
        odd = sorted(parts.keys() ^ (names.keys() | ({"scaling"} if learned else set())))
        reason = "UNKNOWN_TENSOR" if odd[0] in parts else "MISSING_TENSOR"
        raise Rejected(f"{odd[0]} of layer {place[0]} is not what the settings ask for.", reason=reason)
    site = {ours: parts[theirs] for theirs, ours in names.items()}
    if learned:  # s · (U x + b), for one s or one for each output
        scale = parts["scaling"].view(-1)
        site["adapter_up.weight"] = site["adapter_up.weight"] * scale[:, None]
        site["adapter_up.bias"] = site["adapter_up.bias"] * scale
    return site


def _padded(site: Site, size: int) -> Site:
    """The same bottleneck with units that nothing comes out of, where layers have different widths."""
    more = size - site["adapter_down.weight"].shape[0]
    if not more:
        return site
    return site | {
        "adapter_down.weight": F.pad(site["adapter_down.weight"], (0, 0, 0, more)),
        "adapter_down.bias": F.pad(site["adapter_down.bias"], (0, more)),
        "adapter_up.weight": F.pad(site["adapter_up.weight"], (0, more)),
    }


def _head(folder: Path, model_type: str, *, wanted: bool) -> tuple[HubHead | None, tuple[str, ...]]:
    there = any((folder / name).is_file() for name in ("model_head.safetensors", "pytorch_model_head.bin"))
    if not there:
        return None, ()
    if not wanted:
        return None, ("the head",)
    return convert_head(_document(folder, "head_config.json"), _weights(folder, "model_head"), model_type), ()


def _write(output: Path, imported: Imported, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    made = {name: tensor.clone().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(made, output / WEIGHTS_FILE, metadata={"format": "pt"})
    record: dict[str, Any] = {
        "schema": 1,
        "task": imported.task,
        "labels": list(imported.labels),
        "imported": {key: document.get(key) for key in ("name", "model_name", "version")} | {"format": "adapterhub"},
    }
    for name, values in ((CONFIG_FILE, imported.config.as_dict()), (TRAINING_FILE, record)):
        (output / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse(key: str, value: object, why: str) -> NoReturn:
    raise UnsupportedMethod(f"{key}={value!r} of AdapterHub's config is not served: {why}.", metadata={"field": key})
