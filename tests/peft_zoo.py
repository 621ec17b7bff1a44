"""Adapters of every PEFT method on any tiny base, made and saved by PEFT itself, with a clear effect.

    recipes("llama")                             {name: Recipe}: what can be made on that architecture
    make(base, folder, "boft", seed=1)           one of them, by its name
    skipped(recipe)                              why it cannot be made here (a library that is missing), or None

Names are the methods' own in lower case (`lora`, `ia3`, `p_tuning`) and variants (`dora`, `pissa`, `lora_lm_head`). An
architecture is what `model_type` of the base's config.json says.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_layouts import CLASSIFIERS, LAYOUTS, Layout
from tiny import SPECIAL
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

LABELS: Final = ("bad", "so-so", "good")


@dataclass(frozen=True)
class Recipe:
    """One adapter: PEFT's type, the settings of its config, its task, and what it needs."""

    peft_type: str
    settings: Mapping[str, Any]
    task: str
    served: bool = True  # False: adapterbay refuses it by name
    needs: str | None = None  # a module that PEFT needs in order to make it
    fill: Mapping[str, float] = field(default_factory=dict)  # how large the noise is, by part of a tensor's name


def _layered(layout: Layout) -> dict[str, tuple[str, dict[str, Any]]]:
    """Methods that change layers: type and settings beside target_modules."""
    return {
        "adalora": ("ADALORA", {"total_step": 10, "init_r": 6, "target_r": 4}),
        "adamss": ("ADAMSS", {"r": 8, "num_subspaces": 2}),
        "beft": ("BEFT", {}),
        "boft": ("BOFT", {"boft_block_size": 4}),
        "boft_butterfly": ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
        "c3a": ("C3A", {"block_size": 16}),
        "deft": ("DEFT", {"r": 4}),
        "deft_qr": ("DEFT", {"r": 4, "decomposition_method": "qr"}),
        "deft_para": ("DEFT", {"r": 4, "para": True}),
        "delora": ("DELORA", {"r": 4, "delora_lambda": 2}),
        "fourierft": ("FOURIERFT", {"n_frequency": 30}),
        "frod": ("FROD", {"progressbar": False}),
        "glora": ("GLORA", {"r": 4}),
        "glora_vectors": ("GLORA", {"r": 4, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
        "gralora": ("GRALORA", {"r": 8, "alpha": 16}),
        "gralora_hybrid": ("GRALORA", {"r": 8, "hybrid_r": 4, "alpha": 16}),
        "hira": ("HIRA", {"r": 4}),
        "hra": ("HRA", {"r": 4}),
        "hra_gs": ("HRA", {"r": 4, "apply_GS": True}),
        "loha": ("LOHA", {"r": 4}),
        "lokr": ("LOKR", {"r": 4}),
        "lokr_low_rank": ("LOKR", {"r": 2, "decompose_both": True, "decompose_factor": 8}),
        "miss": ("MISS", {"r": 8}),
        "miss_bat": ("MISS", {"r": 8, "init_weights": "bat"}),
        "miss_mini": ("MISS", {"r": 8, "mini_r": 4, "init_weights": "mini"}),
        "oft": ("OFT", {"oft_block_size": 4}),
        "oft_shared": ("OFT", {"oft_block_size": 4, "block_share": True}),
        "oft_exact": ("OFT", {"oft_block_size": 4, "use_cayley_neumann": False}),
        "coft": ("OFT", {"oft_block_size": 4, "coft": True, "eps": 0.05, "use_cayley_neumann": False}),
        "osf": ("OSF", {}),
        "peanut": ("PEANUT", {"r": 8}),
        "peanut_deep": ("PEANUT", {"r": 8, "depth": 2}),
        "psoft": ("PSOFT", {"r": 8}),
        "pvera": ("PVERA", {"r": 8}),
        "randlora": ("RANDLORA", {"r": 8, "randlora_alpha": 16}),
        "road": ("ROAD", {"group_size": 16}),
        "road_2": ("ROAD", {"group_size": 16, "variant": "road_2"}),
        "road_4": ("ROAD", {"group_size": 16, "variant": "road_4"}),
        "shira": ("SHIRA", {"r": 2, "random_seed": 7}),
        "supertuning": ("SUPERTUNING", {"sparsity": 0.95}),
        "supertuning_low_rank": ("SUPERTUNING", {"sparsity": 0.95, "r": 4, "lora_alpha": 8}),
        "tinylora": ("TINYLORA", {"u": 8}),
        "unilora": ("UNILORA", {}),
        "unilora_indices": ("UNILORA", {"save_indices": True}),
        "vblora": ("VBLORA", {"vector_length": 16, "num_vectors": 16}),
        "vblora_topk": ("VBLORA", {"vector_length": 16, "num_vectors": 16, "save_only_topk_weights": True}),
        "vera": ("VERA", {"r": 8}),
        "waveft": ("WAVEFT", {"n_frequency": 30}),
        # refused by name
        "lily": ("LILY", {"r": 4}),
        "poly": ("POLY", {"r": 4, "n_tasks": 2, "n_skills": 2}),
        "shadow": ("SHADOW", {"r": 4}),
    }


def _lora(layout: Layout) -> dict[str, dict[str, Any]]:
    """LoRA and its variants: settings that differ from rank 4 on the layout's linear layers."""
    first, last = layout.linear[0], layout.linear[-1]
    variants: dict[str, dict[str, Any]] = {
        "lora": {},
        "rslora": {"use_rslora": True},
        "rank_pattern": {"rank_pattern": {last: 2}, "alpha_pattern": {first: 16}},
        "dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True},
        "eva": {"init_lora_weights": "eva"},
        "gaussian": {"init_lora_weights": "gaussian"},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "lora_embedding": {"target_modules": [*layout.linear, layout.embedding]},
        "lora_tokens": {"trainable_token_indices": [10, 20, 30]},
        "lora_norms": {"modules_to_save": [layout.norms[0]]},
        "lora_saved_embedding": {"modules_to_save": [layout.embedding]},
        "alora": {"alora_invocation_tokens": [40, 41, 42]},
        "qalora": {"use_qalora": True, "qalora_group_size": 4},
        "kasa": {"kasa_config": {}},
    }
    if layout.output is not None:
        variants["lora_lm_head"] = {"target_modules": [*layout.linear, layout.output]}
        variants["lora_saved_lm_head"] = {"modules_to_save": [layout.output]}
    if layout.bias:
        variants["bias_all"] = {"bias": "all"}
        variants["bias_lora_only"] = {"bias": "lora_only"}
    return variants


def _virtual(layout: Layout) -> dict[str, tuple[str, dict[str, Any]]]:
    """Methods that put virtual tokens before the text."""
    return {
        "prompt_tuning": ("PROMPT_TUNING", {"num_virtual_tokens": 4}),
        "multitask_prompt_tuning": ("MULTITASK_PROMPT_TUNING", {"num_virtual_tokens": 4, "num_tasks": 1}),
        "p_tuning": ("P_TUNING", {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
        "p_tuning_lstm": (
            "P_TUNING",
            {"num_virtual_tokens": 4, "encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
        ),
        "prefix_tuning": ("PREFIX_TUNING", {"num_virtual_tokens": 4}),
        "prefix_projection": (
            "PREFIX_TUNING",
            {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 16},
        ),
        "cartridge": ("CARTRIDGE", {"num_virtual_tokens": 4}),
        "cpt": (
            "CPT",
            {"cpt_token_ids": [10, 11, 12, 13], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
        ),
        "adaption_prompt": ("ADAPTION_PROMPT", {"adapter_len": 4, "adapter_layers": 2}),
    }


REFUSED: Final = frozenset({"lily", "poly", "shadow"})
NEEDS: Final = {"adamss": "sklearn", "waveft": "pywt"}


def recipes(architecture: str, *, refused: bool = False) -> dict[str, Recipe]:
    """What can be made on an architecture. `refused`: with those, too, that adapterbay refuses by name."""
    layout = LAYOUTS[architecture]
    target = {"target_modules": list(layout.linear)}
    found: dict[str, Recipe] = {}
    for name, settings in _lora(layout).items():
        base = {"r": 4, "lora_alpha": 8, **target}
        found[name] = Recipe("LORA", {**base, **settings}, layout.task)
    found["ia3"] = Recipe(
        "IA3", {"target_modules": list(layout.ia3), "feedforward_modules": [layout.down]}, layout.task
    )
    found["ln_tuning"] = Recipe("LN_TUNING", {"target_modules": list(layout.norms)}, layout.task)
    found["trainable_tokens"] = Recipe(
        "TRAINABLE_TOKENS", {"token_indices": [10, 20, 30], "target_modules": [layout.embedding]}, layout.task
    )
    for name, (kind, settings) in _layered(layout).items():
        found[name] = Recipe(
            kind, {**target, **settings}, layout.task, served=name not in REFUSED, needs=NEEDS.get(name)
        )
    for name, (kind, settings) in _virtual(layout).items():
        found[name] = Recipe(kind, settings, layout.task)
    head = {"modules_to_save": list(layout.head)} if layout.head else {}
    if architecture in CLASSIFIERS:
        lora = {"r": 4, "lora_alpha": 8, **target}
        found["lora_classifier"] = Recipe("LORA", {**lora, **head}, "SEQ_CLS")
        found["ia3_classifier"] = Recipe("IA3", {**found["ia3"].settings, **head}, "SEQ_CLS")
        if architecture != "t5":
            found["lora_tagger"] = Recipe("LORA", lora, "TOKEN_CLS")
    return {name: recipe for name, recipe in found.items() if name not in layout.lacks and (refused or recipe.served)}


def skipped(recipe: Recipe) -> str | None:
    """Why PEFT cannot make it here; None: it can."""
    if recipe.needs and importlib.util.find_spec(recipe.needs) is None:
        return f"PEFT makes {recipe.peft_type} only with {recipe.needs} installed"
    return None


def architecture_of(base: Path) -> str:
    """`model_type` of a base's config.json."""
    return str(json.loads((base / "config.json").read_text())["model_type"])


def load_base(base: Path, task: str, labels: tuple[str, ...] = LABELS) -> PreTrainedModel:
    """The base as plain transformers loads it for a task of PEFT, in float32."""
    settings: dict[str, Any] = {"dtype": torch.float32}
    plain = {"CAUSAL_LM": AutoModelForCausalLM, "FEATURE_EXTRACTION": AutoModel, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}
    if task in plain:
        return plain[task].from_pretrained(base, **settings).eval()
    settings |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    kind = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForTokenClassification
    model = kind.from_pretrained(base, **settings)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = SPECIAL.index("<|im_end|>")
    return model.eval()


def make(
    base: Path,
    folder: Path,
    method: str,
    seed: int = 0,
    *,
    settings: Mapping[str, Any] | None = None,
    labels: tuple[str, ...] = LABELS,
    trained: bool = True,
) -> Path:
    """Makes an adapter by its recipe, gives every trained tensor random values, and lets PEFT save it.

    `settings` replace those of the recipe; `trained`: with the random values. Returns the folder.
    """
    recipe = recipes(architecture_of(base), refused=True)[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1000 + seed)
        config = PEFT_TYPE_TO_CONFIG_MAPPING[recipe.peft_type](
            task_type=recipe.task, **{**recipe.settings, **(settings or {})}
        )
        model = get_peft_model(copy.deepcopy(_loaded(base, recipe.task, labels)), config)
        if trained:
            randomize(model, seed)
        model.save_pretrained(folder)
    return folder


@functools.cache
def _loaded(base: Path, task: str, labels: tuple[str, ...]) -> PreTrainedModel:
    """A base that is copied, not changed: loading takes longer than all the rest."""
    return load_base(base, task, labels)


def load(base: Path, folder: Path, method: str, *, labels: tuple[str, ...] = LABELS) -> PeftModel:
    """The adapter alone on the base, the way a user of plain PEFT loads it: what everything is compared with."""
    recipe = recipes(architecture_of(base), refused=True)[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_base(base, recipe.task, labels), folder).eval()


def make_bottleneck(
    base: Path,
    folder: Path,
    targets: tuple[str, ...],
    seed: int = 0,
    *,
    size: int = 8,
    norm: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A bottleneck adapter (our own type, of which PEFT knows nothing) behind the modules whose names end so."""
    from safetensors.torch import save_file

    architecture = architecture_of(base)
    layout = LAYOUTS[architecture]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in _loaded(base, layout.task, LABELS).named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not f".{name}".endswith(tuple(f".{target}" for target in targets)):
            continue
        hidden = weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0]
        shapes = {
            "down.weight": (size, hidden),
            "down.bias": (size,),
            "up.weight": (hidden, size),
            "up.bias": (hidden,),
        }
        if norm:
            shapes |= {"norm.weight": (hidden,), "norm.bias": (hidden,)}
        for part, shape in shapes.items():
            values = 0.2 * torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{name}.adapter_{part}"] = values + 1 if part == "norm.weight" else values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "BOTTLENECK",
        "task_type": layout.task,
        "base_model_name_or_path": str(base),
        "target_modules": list(targets),
        "bottleneck_size": size,
        "non_linearity": "relu",
        "scaling": 1.0,
        "layer_norm_before": norm,
        "modules_to_save": None,
        **(settings or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def inputs(method: str, rows: int = 1) -> dict[str, Any]:
    """What PEFT's forward pass of a method wants beside the tokens."""
    return {"task_ids": torch.zeros(rows, dtype=torch.long)} if method in ("multitask_prompt_tuning", "poly") else {}


# How trained tensors get values that show: a factor around 1, or noise of a standard deviation. The first that matches.
_AROUND_ONE: Final = re.compile(
    r"ia3_l|ln_tuning|[nN]orm|\bln_|magnitude|boft_s|road_alpha|psoft_R.*vector_[ab]\b|S_low|w_norm|delora_lambda"
)
_NOISE: Final[tuple[tuple[str, float], ...]] = (
    (r"\.bias$|_bias", 0.1),
    (r"vblora_logits", 2.0),
    (r"lora_E|c3a_kernel|adaption_gate", 1.0),
    (r"vblora_vector_bank|unilora_theta_d|tinylora_v|hira_|p?vera_lambda|hada_", 0.3),
    (r"fourierft_spectrum|road_theta|shira_weight|prompt|prefix|adaption", 0.2),
    (r"lora_|deft_|oft_", 0.05),
    (r"", 0.1),
)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0, noise: Callable[[str], float] | None = None) -> None:
    """Moves every tensor that would be trained away from its initial value, by a noise fit for its name."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        random = torch.randn(parameter.shape, generator=generator)
        if _AROUND_ONE.search(name):
            parameter.mul_(1 + 0.3 * random)
            if name.endswith("bias") or not parameter.any():  # Gemma's norms are counted from 1
                parameter.add_(0.2 * random)
            continue
        scale = next(scale for pattern, scale in _NOISE if re.search(pattern, name))
        parameter.add_((noise(name) if noise else scale) * random)
