"""Several adapters into one by PEFT's own `add_weighted_adapter`. Only small matrices are computed.

The registry finds `fuse` through the entry point `adapterbay.adapter_fusers: peft`, so that it never imports torch
itself. Of the base nothing but config.json is read: PEFT wants a model to put adapters on, so there is one whose
weights are memory that was asked for and never touched.

Where this goes beyond the plain call:
- Each adapter is put on exactly the modules that it has tensors for. PEFT copies `layers_to_transform` and
  `exclude_modules` of the first adapter alone, which would drop layers of the others without a word.
- PEFT keeps `use_rslora` of the first adapter while it sets alpha to the rank, so its result would be √rank times too
  strong. Here the result is plain LoRA with scaling 1, which is what the tensors are made for.
- A module whose rank is not that of the config gets an entry in `rank_pattern` and `alpha_pattern`.
- Heads are whole layers and no deltas, and PEFT refuses them. They are averaged as a server averages them for a fusion
  in a request: Σ wᵢ·headᵢ / Σ wᵢ.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterbay.registry.admission.module_names import CONV1D_MODEL_TYPES
from adapterbay.registry.base import BaseFiles
from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import InvalidArgument, TaskMismatch
from adapterbay.registry.fusing import FusionSettings
from adapterbay.registry.manifest import CONFIG_FILE, WEIGHTS_FILE

_FUSED: Final = "fused"
_PREFIX: Final = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_TARGETING: Final = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter as it was saved. `factors` are A and B by key; `heads` are whole layers by key."""

    config: dict[str, Any]
    factors: dict[str, Tensor]
    heads: dict[str, Tensor]

    @property
    def modules(self) -> set[str]:
        return {match["module"] for key in self.factors if (match := _FACTOR.fullmatch(key))}

    def rank_of(self, module: str) -> int:
        return self.factors[f"{_PREFIX}{module}.lora_A.weight"].shape[0]


def fuse(
    base: BaseFiles,
    task: str,
    adapters: Sequence[Mapping[str, Path]],
    weights: Sequence[float],
    settings: FusionSettings,
    destination: Path,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors (float32) into `destination`.

    `adapters` are the files of admitted adapters of `base`, by name. Raises InvalidArgument where PEFT cannot combine
    them so, TaskMismatch where heads do not go together.
    """
    parts = [_read(files) for files in adapters]
    if settings.needs_equal_ranks:
        _check_ranks(parts, settings.method)
    # Layers are filled with random values as they are made: torch's own generator is left as it was.
    with _quiet(), torch.random.fork_rng(devices=[]):
        tensors, config = _fused(_skeleton(base, task), base, parts, weights, settings)
    tensors |= _averaged_heads([part.heads for part in parts], weights)
    (destination / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # Adding 0.0 turns -0.0 into 0.0: PEFT pads with random values times zero, whose signs would change the digest.
    ordered = {key: (tensors[key].detach().to(torch.float32) + 0.0).contiguous() for key in sorted(tensors)}
    save_file(ordered, destination / WEIGHTS_FILE, metadata={"format": "pt"})


@contextmanager
def _quiet() -> Iterator[None]:
    """No notices about optional kernels and deprecations of the libraries' inside; as it was afterwards."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message="The density 1", category=UserWarning)
            yield
    finally:
        log.setLevel(level)


def _fused(
    skeleton: nn.Module, base: BaseFiles, parts: Sequence[_Adapter], weights: Sequence[float], settings: FusionSettings
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A and B of the fused adapter by key, and its adapter_config.json."""
    from peft import get_peft_model_state_dict

    model = _with_adapters(skeleton, base, parts)
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    try:
        model.add_weighted_adapter(
            [f"part{index}" for index in range(len(parts))],
            list(weights),
            _FUSED,
            combination_type=settings.method,
            svd_rank=settings.rank,
            # The same first singular vectors, without those that are cut off.
            svd_full_matrices=False,
            density=settings.density,
            majority_sign_method=settings.majority_sign or "total",
        )
    except ValueError as error:
        raise InvalidArgument(f"PEFT cannot fuse them by {settings.method}: {error}", field="method") from error
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=_FUSED, save_embedding_layers=False)
    return tensors, _config(model.peft_config[_FUSED], parts, tensors)


def _read(files: Mapping[str, Path]) -> _Adapter:
    config = parse_json_object(files[CONFIG_FILE].read_bytes(), CONFIG_FILE)
    tensors = {key: tensor.to(torch.float32) for key, tensor in load_file(files[WEIGHTS_FILE]).items()}
    factors = {key: tensor for key, tensor in tensors.items() if _FACTOR.fullmatch(key)}
    return _Adapter(config, factors, {key: tensor for key, tensor in tensors.items() if key not in factors})


def _check_ranks(parts: Sequence[_Adapter], method: str) -> None:
    """Equal ranks in the configs may still be different ones on a module, by rank_pattern."""
    for module in sorted(set.union(*(part.modules for part in parts))):
        ranks = {part.rank_of(module) for part in parts if module in part.modules}
        if len(ranks) > 1:
            raise InvalidArgument(
                f"The method {method} needs equal ranks, but {module} has {' and '.join(map(str, sorted(ranks)))}: "
                "use cat or svd.",
                field="method",
            )


def _skeleton(base: BaseFiles, task: str) -> nn.Module:
    """The architecture of the base, its weights float32 memory that is never touched."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    classes = {"causal-lm": AutoModelForCausalLM, "sequence-classification": AutoModelForSequenceClassification}
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    with torch.device("meta"):
        model: nn.Module = classes.get(task, AutoModel).from_config(config, dtype=torch.float32)
    return model.to_empty(device="cpu").requires_grad_(False).eval()


def _with_adapters(skeleton: nn.Module, base: BaseFiles, parts: Sequence[_Adapter]) -> Any:
    from peft import PeftModel, set_peft_model_state_dict

    model: Any = None
    for index, part in enumerate(parts):
        name = f"part{index}"
        config = _plain_config(part, transposed=base.config.get("model_type") in CONV1D_MODEL_TYPES)
        try:
            if model is None:
                model = PeftModel(skeleton, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            loaded = set_peft_model_state_dict(model, part.factors, adapter_name=name)
        except (ValueError, RuntimeError) as error:
            raise InvalidArgument(f"PEFT cannot put the adapters on one model: {error}", field="parts") from error
        lost = [*loaded.unexpected_keys, *(key for key in loaded.missing_keys if f".{name}." in key)]
        if lost:
            raise InvalidArgument(
                f"The adapters name their modules in different ways ({lost[0]}): train them on one model class.",
                field="parts",
            )
    return model


def _plain_config(part: _Adapter, *, transposed: bool) -> Any:
    """What decides the computation, on exactly the modules that the adapter has; heads are taken care of apart."""
    from peft import LoraConfig

    config = part.config
    return LoraConfig(
        r=config.get("r", 8),
        lora_alpha=config.get("lora_alpha", 8),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
        fan_in_fan_out=transposed,
        target_modules=sorted(part.modules),
        init_lora_weights=False,
        inference_mode=True,
    )


def _config(fused: Any, parts: Sequence[_Adapter], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """adapter_config.json: sorted, and true for each of `tensors`, whose scaling is 1."""
    first = parts[0].config
    ranks = {
        match["module"]: tensor.shape[0]
        for key, tensor in sorted(tensors.items())
        if (match := _FACTOR.fullmatch(key)) and match["side"] == "A"
    }
    odd = {re.escape(module): rank for module, rank in ranks.items() if rank != fused.r}
    config: dict[str, Any] = _jsonable(fused.to_dict())
    config |= {
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "revision": first.get("revision"),
        "task_type": first.get("task_type"),
        "modules_to_save": first.get("modules_to_save"),
        "use_rslora": False,
        "lora_alpha": fused.r,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),
    }
    targeting = [{key: _jsonable(part.config.get(key)) for key in _TARGETING} for part in parts]
    if all(item == targeting[0] for item in targeting) and targeting[0]["target_modules"]:
        # All say it in the same few words: so does the result.
        config |= targeting[0]
    return config


def _jsonable(value: Any) -> Any:
    """Sets and lists of names sorted, enumerations as their text: the same adapters give the same bytes."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return sorted(value)
    return getattr(value, "value", value)


def _averaged_heads(heads: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Σ wᵢ·headᵢ / Σ wᵢ; the sum of the biases is over the heads that have one, as in `adapterbay.server.pooling`."""
    if not any(heads):
        return {}
    names = {key.rpartition(".")[0] for head in heads for key in head}
    total = sum(weights)
    if len(names) != 1 or not all(heads) or total <= 0:
        raise TaskMismatch(f"These heads cannot be averaged: {', '.join(sorted(names))}, weights {list(weights)}.")
    found: dict[str, Tensor] = {}
    for head, weight in zip(heads, weights, strict=True):
        for key, tensor in head.items():
            share = tensor * (weight / total)
            if key in found and found[key].shape != share.shape:
                raise TaskMismatch(f"The heads have different shapes: {key}.")
            found[key] = found[key] + share if key in found else share
    return found
