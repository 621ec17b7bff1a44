"""Admission of every PEFT method: what PEFT saves is admitted, and what is wrong with it is found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft_zoo
import pytest
from safetensors.numpy import load_file, save
from tiny import make_base

from adapterbay.registry import AdmissionReport, BaseFiles, admit, locate
from adapterbay.registry.admission import Limits
from adapterbay.registry.admission.methods import METHODS
from adapterbay.registry.admission.methods.lora import OLD_FIELDS
from adapterbay.registry.admission.peft_fields import check_fields, read_method
from adapterbay.registry.errors import NoEffect, Rejected, UnsupportedMethod

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ARCHITECTURES = ("llama", "gpt2", "bert")
ELSEWHERE = {
    "gpt2": ("lora", "dora", "bias_all", "lora_embedding", "lora_lm_head", "lora_tokens", "ia3", "vera", "frod"),
    "bert": ("lora", "bias_all", "glora", "lora_norms", "lora_classifier", "lora_tagger", "ia3_classifier", "adalora"),
}
"""On the first architecture everything is made; on the others, what they have another shape or another name for."""
UNTRAINED_IS_TOLD_BY_THE_BASE = {
    *("LN_TUNING", "TRAINABLE_TOKENS", "OSF", "HRA", "PSOFT", "FROD", "DEFT", "ADAMSS"),
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE", "CPT"),
}
"""Methods of which the tensors alone do not tell whether they change anything."""


@dataclass
class Made:
    """An adapter in memory, to be spoiled."""

    base: BaseFiles
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def admit(
        self, config: Mapping[str, Any] | None = None, change: Callable[[dict[str, np.ndarray]], Any] | None = None
    ) -> AdmissionReport:
        tensors = dict(self.tensors)
        if change:
            change(tensors)
        files: dict[str, Path | bytes] = {
            CONFIG: json.dumps({**self.config, **(config or {})}).encode(),
            WEIGHTS: save(tensors),
        }
        return admit(files, self.base.tensor_shapes(), base_config=self.base.config)


class Shelf:
    """Every adapter is made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._bases: dict[str, Path] = {}
        self._made: dict[tuple[str, str], Made] = {}

    def base(self, architecture: str) -> Path:
        if architecture not in self._bases:
            self._bases[architecture] = make_base(self._root / architecture, architecture, layers=2)
        return self._bases[architecture]

    def folder(self, architecture: str, name: str, **settings: Any) -> Path:
        folder = self._root / f"{architecture}-{name}"
        if not folder.exists():
            peft_zoo.make(self.base(architecture), folder, name, **settings)
        return folder

    def made(self, architecture: str, name: str) -> Made:
        if (architecture, name) not in self._made:
            self._made[architecture, name] = self.read(architecture, self.folder(architecture, name))
        return self._made[architecture, name]

    def read(self, architecture: str, folder: Path) -> Made:
        config = json.loads((folder / CONFIG).read_text())
        return Made(locate(str(self.base(architecture))), config, load_file(folder / WEIGHTS))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("methods"))


def _names(architecture: str) -> Iterator[str]:
    for name, recipe in peft_zoo.recipes(architecture).items():
        if not peft_zoo.skipped(recipe) and name in ELSEWHERE.get(architecture, (name,)):
            yield name


EVERY = [(architecture, name) for architecture in ARCHITECTURES for name in _names(architecture)]


def test_every_method_and_every_field_of_peft_is_classified() -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert {kind.value for kind in PeftType} | {"BOTTLENECK"} == set(METHODS)
    for kind in PeftType:
        theirs = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind.value])}
        ours = set(METHODS[kind.value].fields) - (set(OLD_FIELDS) if kind.value == "LORA" else set())
        assert ours == theirs, kind.value


@pytest.mark.parametrize(("architecture", "name"), EVERY)
def test_what_peft_saves_is_admitted_and_every_tensor_has_its_place(shelf: Shelf, architecture: str, name: str) -> None:
    made = shelf.made(architecture, name)
    report = made.admit()
    assert report.peft_type == peft_zoo.recipes(architecture)[name].peft_type
    placed = [*report.method_keys, *(report.head.keys if report.head else ())]
    placed += [key for site in (*report.saved, *report.copies) for key in site.tensors.values()]
    if report.peft_type != "TRAINABLE_TOKENS":
        placed += [rows.key for rows in report.tokens]
    assert sorted(placed) == sorted(made.tensors)
    assert len({site.base_name for site in report.sites}) == len(report.sites)
    shapes = made.base.tensor_shapes()
    for site in report.sites:
        below = [key for key in shapes if key.startswith(f"{site.base_name}.")]
        assert below or site.kind == "output"
    assert report.parameters == sum(tensor.size for tensor in made.tensors.values())


@pytest.mark.parametrize("name", ["poly", "lily"])
def test_what_is_refused_is_refused_by_name(shelf: Shelf, name: str) -> None:
    made = shelf.made("llama", name)
    with pytest.raises(UnsupportedMethod, match=name.upper()) as caught:
        made.admit()
    assert len(caught.value.message) > 60


SINGLE = list(_names("llama"))


def _first_of_each_kind(report: AdmissionReport) -> list[str]:
    """One key of every suffix, and of every stem of a shared tensor."""
    found = {suffix: key for site in report.sites for suffix, key in site.tensors.items()}
    found |= {name.partition(".")[0]: key for name, key in report.shared.items()}
    return list(found.values())


def _widen(key: str) -> Callable[[dict[str, np.ndarray]], Any]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        value = tensors[key]
        tensors[key] = np.concatenate([value, value[..., :1]], axis=-1)

    return change


FREE = ("randlora_A", "adamss_")
"""The copies of RandLoRA's projections, which PEFT does not read, may have any width."""


@pytest.mark.parametrize("name", SINGLE)
def test_spoiled_tensors_are_found(shelf: Shelf, name: str) -> None:
    made = shelf.made("llama", name)
    report = made.admit()
    for key in _first_of_each_kind(report):
        value = made.tensors[key]
        if not (key.endswith(FREE) and "layers" in key):
            _refused(made, "SHAPE_MISMATCH", _widen(key))
        if np.issubdtype(value.dtype, np.floating):
            _refused(made, "NOT_FINITE", lambda t, k=key, v=value: t.update({k: np.full_like(v, np.nan)}))
            _refused(made, "NOT_FINITE", lambda t, k=key, v=value: t.update({k: np.full_like(v, 3.4e38)}))
            _refused(made, "UNSUPPORTED_DTYPE", lambda t, k=key, v=value: t.update({k: np.zeros(v.shape, np.bool_)}))
        else:
            largest = np.iinfo(value.dtype).max
            _refused(made, "SHAPE_MISMATCH", lambda t, k=key, v=value, n=largest: t.update({k: np.full_like(v, n)}))
        _refused(made, "UNKNOWN_TENSOR", lambda t, k=key: t.update({f"{k}_more": t.pop(k)}))


def _refused(made: Made, reason: str, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    with pytest.raises(Rejected) as caught:
        made.admit(change=change)
    assert caught.value.reason == reason, caught.value.message


@pytest.mark.parametrize("name", SINGLE)
def test_missing_and_misplaced_tensors_are_found(shelf: Shelf, name: str) -> None:
    made = shelf.made("llama", name)
    report = made.admit()
    method = METHODS[report.peft_type]
    for site in report.sites:
        if len(site.tensors) > 1 and not name.startswith("randlora"):
            for key in site.tensors.values():
                _refused(made, "MISSING_TENSOR", lambda t, k=key: t.pop(k))
            break
    for key in report.shared.values() if len(made.tensors) > 1 else ():
        _refused(made, "MISSING_TENSOR", lambda t, k=key: t.pop(k))
    layered = [key for key in report.method_keys if ".layers.0." in key]
    if layered:
        key = layered[0]
        _refused(made, "UNKNOWN_MODULE", lambda t, k=key: t.update({k.replace("layers.0.", "layers.7."): t.pop(k)}))
    if not method.virtual:
        other = "other" if isinstance(made.config["target_modules"], str) else ["other"]
        with pytest.raises(Rejected) as caught:
            made.admit(
                config={"target_modules": other, "feedforward_modules": None}
                if name == "ia3"
                else {"target_modules": other}
            )
        assert caught.value.reason == ("UNKNOWN_MODULE" if name == "unilora" else "UNKNOWN_TENSOR")


@pytest.mark.parametrize("name", SINGLE)
def test_settings_that_this_version_does_not_know_are_refused(shelf: Shelf, name: str) -> None:
    config = shelf.made("llama", name).config
    read_method(config)
    with pytest.raises(Rejected) as caught:
        read_method({**config, "use_quantum": False})
    assert caught.value.reason == "UNKNOWN_CONFIG_KEY"
    for key, value in config.items():
        if type(value) is int and not key.endswith("dropout") and METHODS[config["peft_type"]].fields[key].why:
            check_fields({**config, key: value})


@pytest.mark.parametrize("name", SINGLE)
def test_an_adapter_that_changes_nothing(shelf: Shelf, name: str) -> None:
    """The neutral value of every method, where its tensors tell."""
    made = shelf.made("llama", name)
    method = METHODS[made.config["peft_type"]]
    recipe = peft_zoo.recipes("llama")[name]
    if recipe.task != "CAUSAL_LM" or made.admit().saved or made.admit().tokens or made.admit().copies:
        return
    if method.peft_type in UNTRAINED_IS_TOLD_BY_THE_BASE or name in ("dora", "kasa"):
        assert (not method.still and not method.still_shared) or method.peft_type == "LORA"
        return

    def still(tensors: dict[str, np.ndarray]) -> None:
        for key, value in tensors.items():
            if np.issubdtype(value.dtype, np.floating):
                one = any(key.endswith(suffix) for suffix in method.neutral)
                tensors[key] = np.full_like(value, 1.0 if one else -0.0)

    with pytest.raises(NoEffect):
        made.admit(change=still)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ia3", {}),
        ("vera", {}),
        ("oft", {}),
        ("boft", {}),
        ("loha", {}),
        ("lokr", {}),
        ("road", {}),
        ("tinylora", {}),
        ("hira", {}),
        ("randlora", {}),
        ("gralora_hybrid", {}),
        ("glora", {}),
        ("c3a", {"init_weights": True}),
        ("waveft", {}),
        ("lora_bias", {}),
        ("adaption_prompt", {}),
    ],
)
def test_what_peft_saves_before_it_was_trained_changes_nothing(
    shelf: Shelf, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    folder = peft_zoo.make(shelf.base("llama"), tmp_path / name, name, settings=settings, trained=False)
    with pytest.raises(NoEffect):
        shelf.read("llama", folder).admit()


def test_what_variants_of_lora_add(shelf: Shelf) -> None:
    plain = shelf.made("llama", "lora").admit()
    assert plain.plain
    assert {module.kind for module in plain.modules} == {"linear"}
    dora = shelf.made("llama", "dora").admit()
    assert {m.magnitude_key for m in dora.modules} == {f"{PREFIX}{m.name}.lora_magnitude_vector" for m in dora.modules}
    biased = shelf.made("llama", "lora_bias").admit()
    assert {m.bias_key for m in biased.modules} == {f"{PREFIX}{m.name}.lora_B.bias" for m in biased.modules}
    kasa = shelf.made("llama", "kasa").admit()
    assert all(module.diagonal_key for module in kasa.modules)
    assert shelf.made("llama", "pissa").admit().initialisation == "pissa"
    assert shelf.made("llama", "olora").admit().initialisation == "olora"
    assert shelf.made("llama", "alora").admit().invocation == (40, 41, 42)
    patterned = shelf.made("llama", "rank_pattern").admit()
    ranks = {module.name.rpartition(".")[2]: module.rank for module in patterned.modules}
    assert ranks == {"q_proj": 4, "v_proj": 4, "down_proj": 2}
    for name in ("dora", "lora_bias", "kasa", "pissa", "alora", "lora_embedding", "lora_norms", "lora_tokens"):
        assert not shelf.made("llama", name).admit().plain, name


def test_embeddings_output_and_saved_modules(shelf: Shelf) -> None:
    tables = shelf.made("llama", "lora_embedding").admit()
    table = next(module for module in tables.modules if module.kind == "embedding")
    assert (table.a_key, table.in_features, table.out_features) == (
        "base_model.model.model.embed_tokens.lora_embedding_A",
        262,
        64,
    )
    assert [site.name for site in tables.copies] == ["model.embed_tokens"]
    output = next(m for m in shelf.made("gpt2", "lora_lm_head").admit().modules if m.kind == "output")
    assert (output.base_name, output.in_features, output.out_features, output.transposed) == ("lm_head", 64, 262, False)
    norms = shelf.made("llama", "lora_norms").admit().saved
    assert {(site.name, site.kind) for site in norms} == {
        (f"model.layers.{layer}.input_layernorm", "norm") for layer in (0, 1)
    }
    rows = shelf.made("llama", "lora_tokens").admit().tokens
    assert [(row.base_name, row.tokens) for row in rows] == [("model.embed_tokens", (10, 20, 30))]
    biases = shelf.made("gpt2", "bias_all").admit().saved
    assert {tuple(site.tensors) for site in biases} == {("bias",)}
    assert "transformer.h.0.attn.c_attn" in {site.name for site in biases}


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("lora_norms", {"modules_to_save": ["post_attention_layernorm"]}, "UNKNOWN_TENSOR"),
        ("lora_tokens", {"trainable_token_indices": [10, 20]}, "SHAPE_MISMATCH"),
        ("lora_tokens", {"trainable_token_indices": [10, 20, 262]}, "BAD_CONFIG"),
        ("lora_tokens", {"trainable_token_indices": {"lm_head": [1, 2, 3]}}, "UNKNOWN_TENSOR"),
        ("lora_tokens", {"trainable_token_indices": None}, "UNKNOWN_TENSOR"),
        ("adalora", {"init_r": 5}, "SHAPE_MISMATCH"),
        ("oft", {"r": 4}, "BAD_CONFIG"),
        ("road", {"group_size": 15}, "BAD_CONFIG"),
        ("c3a", {"block_size": 24}, "SHAPE_MISMATCH"),
        ("miss", {"init_weights": "bat"}, "SHAPE_MISMATCH"),
        ("prompt_tuning", {"num_virtual_tokens": 5}, "SHAPE_MISMATCH"),
        ("prefix_tuning", {"num_layers": 3}, "BAD_CONFIG"),
        ("cpt", {"cpt_mask": [1]}, "BAD_CONFIG"),
        ("vera", {"r": 9}, "SHAPE_MISMATCH"),
        ("vera", {"r": True}, "BAD_CONFIG"),
        ("ia3", {"feedforward_modules": []}, "SHAPE_MISMATCH"),
        ("ia3", {"feedforward_modules": "(?=x)"}, "BAD_PATTERN"),
        ("lora", {"loftq_config": {"loftq_iter": 17}, "init_lora_weights": "loftq"}, "BAD_CONFIG"),
    ],
)
def test_settings_against_the_tensors(shelf: Shelf, name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        shelf.made("llama", name).admit(settings)
    assert caught.value.reason == reason, caught.value.message


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pvera", {"sample_at_inference": True}),
        ("multitask_prompt_tuning", {"num_tasks": 2}),
        ("lora", {"arrow_config": {}}),
        ("lora", {"target_parameters": ["mlp.experts"]}),
        ("lora", {"layer_replication": [[0, 1]]}),
        ("lora", {"init_lora_weights": "corda"}),
        ("alora", {"task_type": "SEQ_CLS"}),
        ("dora", {"alora_invocation_tokens": [1]}),
    ],
)
def test_settings_that_are_not_served(shelf: Shelf, name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedMethod, match=next(iter(settings)) if name != "alora" else "alora"):
        shelf.made("llama", name).admit(settings)


def test_limits_hold_for_every_method(shelf: Shelf) -> None:
    for name, limits, reason in (
        ("deft", Limits(rank=3), "RANK_TOO_LARGE"),
        ("vera", Limits(drawn_values=7), "RANK_TOO_LARGE"),
        ("prompt_tuning", Limits(virtual_tokens=3), "TOO_LARGE"),
    ):
        made = shelf.made("llama", name)
        files: dict[str, Path | bytes] = {CONFIG: json.dumps(made.config).encode(), WEIGHTS: save(made.tensors)}
        with pytest.raises(Rejected) as caught:
            admit(files, made.base.tensor_shapes(), base_config=made.base.config, limits=limits)
        assert caught.value.reason == reason
