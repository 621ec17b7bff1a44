"""Bottleneck adapters served beside LoRA and the bare base: each row equals our torch module alone.

Tolerance: 1e-4 in logits and states, float32. Measured below 1e-5.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Harness, held
from peft import PeftModel
from tiny import ENCODERS, TARGETS, make_adapter, make_base
from transformers import AutoModel, AutoModelForCausalLM

from adapterbay.base.bottleneck import PRESETS, BottleneckConfig, attach, load, placement
from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument, Rejected
from adapterbay.server.requests import Pooling

ATOL = 1e-4
TYPES = {"llama": "llama", "gpt2": "gpt2", "bert": "bert", "distilbert": "distilbert"}
NORMS = {
    "bert": {"target_modules": ("output.LayerNorm",), "exclude_modules": ("attention.output.LayerNorm",)},
    "distilbert": {"target_modules": ("sa_layer_norm", "output_layer_norm")},
}
"""What normalizes behind the residual, which the AdapterHub library looks through."""


def plain(base: Path) -> Any:
    """The base as transformers loads it."""
    kind = AutoModel if base.parent.name in ENCODERS else AutoModelForCausalLM
    return kind.from_pretrained(base, dtype=torch.float32).eval()


def make(base: Path, folder: Path, config: BottleneckConfig, seed: int) -> Path:
    """A bottleneck adapter with weights that show."""
    torch.manual_seed(seed)
    model = attach(plain(base), config)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.add_(0.2 * torch.randn(tensor.shape))
    model.save_pretrained(folder)
    return folder


@dataclass
class Bay:
    base: Path
    registry: Registry
    folders: dict[str, Path] = field(default_factory=dict)

    def reference(self, name: str) -> Any:
        if name == "none":
            return plain(self.base)
        if name == "lora":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return PeftModel.from_pretrained(plain(self.base), self.folders[name]).eval()
        return load(self.folders[name], plain(self.base)).eval()


@pytest.fixture(scope="module", params=TYPES)
def bay(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bay:
    name = request.param
    root = tmp_path_factory.mktemp("bay") / name
    bay = Bay(make_base(root / "base", name, layers=2), Registry.open(root / "registry"))
    task = "FEATURE_EXTRACTION" if name in ENCODERS else "CAUSAL_LM"
    configs: dict[str, dict[str, Any]] = {
        "scaled": {"scaling": 0.5, "layer_norm_before": True, "non_linearity": "tanh"}
    }
    configs |= {preset: {"non_linearity": activation} for preset, activation in PRESETS.items()}
    if name in NORMS:
        configs["through"] = {"through_norm": True, **NORMS[name]}
        configs["through_normed"] = {"through_norm": True, "layer_norm_before": True, "scaling": 2.0, **NORMS[name]}
    for index, (kind, settings) in enumerate(configs.items()):
        where = placement("pfeiffer" if kind == "pfeiffer" else "houlsby", TYPES[name])
        places = {"target_modules": where.target_modules, "exclude_modules": where.exclude_modules}
        config = BottleneckConfig(**{**places, "reduction_factor": 8.0, "task_type": task, **settings})
        bay.folders[kind] = make(bay.base, root / kind, config, index)
    make_adapter(bay.base, root / "lora", targets=TARGETS[name][1], rank=4, task=task, scale=0.5)
    bay.folders["lora"] = root / "lora"
    for kind, folder in bay.folders.items():
        bay.registry.push(folder, kind, base=f"folder:{bay.base}")
    return bay


def test_bottlenecks_beside_lora_and_the_base(bay: Bay) -> None:
    texts = {name: [10 + index, *range(20, 26 + 7 * index)] for index, name in enumerate([*bay.folders, "none"])}
    encoder = bay.base.parent.name in ENCODERS
    with Harness(bay.base, bay.registry, step_tokens=1024) as harness:
        harness.load(*bay.folders)
        with held(harness.engine):
            asked = {name: None if name == "none" else name for name in texts}
            answers = {
                name: harness.embed(asked[name], ids, pooling=Pooling.MEAN)
                if encoder
                else harness.generate(asked[name], ids, 4)
                for name, ids in texts.items()
            }
        for answer in answers.values():
            answer.wait()
        assert max(harness.step_sizes) == len(texts)
        base = plain(bay.base)
        for name, answer in answers.items():
            model, result = bay.reference(name), answer.wait()
            with torch.no_grad():
                if encoder:
                    ids = torch.tensor([texts[name]])
                    expected, unchanged = (m(input_ids=ids).last_hidden_state[0].mean(0) for m in (model, base))
                    got = torch.tensor(result.values)
                else:
                    ids = torch.tensor([[*texts[name], *result.token_ids[:-1]]])
                    expected, unchanged = (m(input_ids=ids).logits[0][-4:] for m in (model, base))
                    assert answer.request is not None
                    got = torch.stack(harness.logits[answer.request.id])
            assert (got - expected).abs().max() < ATOL, name
            assert name == "none" or (expected - unchanged).abs().max() > 20 * ATOL, f"{name} has no effect"


def test_what_is_saved_is_what_is_loaded(bay: Bay, tmp_path: Path) -> None:
    for name in ("houlsby", "pfeiffer"):
        loaded = load(bay.folders[name], plain(bay.base))
        loaded.save_pretrained(tmp_path / name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (bay.folders[name] / file).read_bytes()
    two = load(bay.folders["houlsby"], plain(bay.base))
    one = load(bay.folders["pfeiffer"], plain(bay.base))
    assert len(two.layers()) == 2 * len(one.layers()) == 4
    trainable, everything = one.parameter_counts()
    assert trainable == 2 * (2 * 64 * 8 + 64 + 8)
    assert trainable + sum(part.numel() for part in plain(bay.base).parameters()) == everything


def test_a_fresh_bottleneck_is_near_the_identity_and_can_be_switched_off(bay: Bay) -> None:
    base, ids = plain(bay.base), torch.tensor([[10, 20, 30]])
    where = placement("houlsby", TYPES[bay.base.parent.name])
    with torch.no_grad():
        before = base(input_ids=ids)[0]
        model = attach(base, BottleneckConfig(where.target_modules, where.exclude_modules)).eval()
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids)[0], before)
        after = model(input_ids=ids)[0]
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()


def test_what_does_not_fit_is_named(bay: Bay) -> None:
    with pytest.raises(InvalidArgument, match="q_projection matches no linear layer"):
        attach(plain(bay.base), BottleneckConfig(("q_projection",)))
    norm = "ln_1" if bay.base.parent.name == "gpt2" else "norm" if bay.base.parent.name == "llama" else "LayerNorm"
    with pytest.raises(InvalidArgument, match="no linear layer"):
        attach(plain(bay.base), BottleneckConfig((norm,)))
    with pytest.raises(Rejected, match="non_linearity"):
        BottleneckConfig(("dense",), non_linearity="exp")
    with pytest.raises(InvalidArgument, match="No modules are known for a bottleneck in the architecture 'bloom'"):
        placement("houlsby", "bloom")


def test_the_setting_and_the_kind_of_module_agree(tmp_path: Path, bay: Bay) -> None:
    if "through" not in bay.folders:
        pytest.skip("its normalizations come first")
    folder = tmp_path / "wrong"
    folder.mkdir()
    for file in bay.folders["through"].iterdir():
        text = file.read_bytes()
        (folder / file.name).write_bytes(text.replace(b'"through_norm": true', b'"through_norm": false'))
    with pytest.raises(Rejected, match="through_norm=false it can only sit at linear layers"):
        bay.registry.push(folder, "wrong", base=f"folder:{bay.base}")
