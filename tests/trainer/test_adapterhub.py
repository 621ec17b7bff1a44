"""Adapters of the AdapterHub library become folders of ours that compute the same.

The reference is written from the library's source (adapters 1.3.0: `Adapter.pre_forward`, `forward`, `post_forward` in
methods/modeling.py, and the calls in models/bert/modeling_bert.py); its names and files were compared with what the
library itself saves. Tolerance: 1e-5 of logits, float32; the served rows 1e-4.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Harness
from safetensors.torch import load_file, save_file
from tiny import make_base
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.activations import get_activation
from typer.testing import CliRunner

from adapterbay.base.adapterhub import import_adapterhub
from adapterbay.base.bottleneck import load
from adapterbay.registry import Registry
from adapterbay.registry.errors import AdapterbayError, InvalidArgument, NotFound, Rejected, UnsupportedMethod
from adapterbay.server.requests import Pooling
from adapterbay.trainer.cli import app

HIDDEN, LAYERS, IDS = 64, 2, [3, 50, 60, 70, 80, 90, 11, 4]
PFEIFFER = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 8,
    "non_linearity": "relu",
    "original_ln_before": True,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "leave_out": [],
    "dropout": 0.0,
    "init_weights": "bert",
    "phm_layer": False,
    "phm_dim": 4,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
}
HOULSBY = PFEIFFER | {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
CONFIGS = {
    "pfeiffer": PFEIFFER,
    "houlsby": HOULSBY,
    "both_normed": PFEIFFER | {"mh_adapter": True, "ln_before": True, "scaling": "learned", "non_linearity": "gelu"},
    "uneven": HOULSBY | {"reduction_factor": {"0": 4, "default": 8}, "scaling": "channel", "leave_out": []},
    "upper": PFEIFFER | {"leave_out": [0], "scaling": 0.5, "non_linearity": "tanh"},
}
PLACES = {"bert": ("bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output")}
PLACES["roberta"] = tuple(name.replace("bert.", "roberta.", 1) for name in PLACES["bert"])


class HubAdapter(nn.Module):
    """The library's `Adapter`, sequential."""

    def __init__(self, settings: Mapping[str, Any], layer: int) -> None:
        super().__init__()
        factor = settings["reduction_factor"]
        if isinstance(factor, dict):
            factor = factor.get(str(layer), factor["default"])
        size = int(HIDDEN // factor)
        first: list[nn.Module] = [nn.LayerNorm(HIDDEN)] if settings["ln_before"] else []
        if first:
            self.adapter_norm_before = first[0]
        self.adapter_down = nn.Sequential(*first, nn.Linear(HIDDEN, size), get_activation(settings["non_linearity"]))
        self.adapter_up = nn.Linear(size, HIDDEN)
        self.settings = settings
        self.scaling: Any = settings["scaling"]
        if isinstance(self.scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if self.scaling == "learned" else HIDDEN))

    def forward(self, h: Tensor, residual_input: Tensor, norm: nn.Module) -> Tensor:
        residual, x = h, h
        if self.settings["original_ln_before"]:
            x = norm(h + residual_input)
        out = self.adapter_up(self.adapter_down(x)) * self.scaling + residual
        after: Tensor = norm(out + residual_input)
        return after


def hub_model(base: Path, kind: str, settings: Mapping[str, Any], labels: int = 3) -> tuple[Any, dict[str, Tensor]]:
    """transformers' classifier with the library's adapters in it, and their tensors by the library's names."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32).eval()
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for place, flag in zip(PLACES[kind], ("mh_adapter", "output_adapter"), strict=True):
            if not settings[flag] or layer in settings["leave_out"]:
                continue
            name = place.format(layer)
            block = model.get_submodule(name)
            adapter = HubAdapter(settings, layer).eval()
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.add_(0.2 * torch.randn(parameter.shape))
            tensors |= {f"{name}.adapters.mine.{key}": value.clone() for key, value in adapter.state_dict().items()}
            block.forward = _forward(block, adapter)
    return model, tensors


def _forward(block: Any, adapter: HubAdapter) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda states, residual: adapter(block.dense(states), residual, block.LayerNorm)


def write(
    folder: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    kind: str = "bert",
    safe: bool = True,
    head: Mapping[str, Any] | None = None,
    head_tensors: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> Path:
    """A folder as `model.save_adapter` writes it."""
    folder.mkdir(parents=True)
    document = {"config": settings, "hidden_size": HIDDEN, "model_class": "BertAdapterModel", "model_name": "a/base"}
    document |= {"model_type": kind, "name": "mine", "version": "adapters.1.3.0", **more}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    for stem, values, pickled in (
        ("adapter", tensors, "pytorch_adapter.bin"),
        ("model_head", head_tensors, "pytorch_model_head.bin"),
    ):
        if values is None:
            continue
        if safe:
            save_file(dict(values), folder / f"{stem}.safetensors")
        else:
            torch.save(dict(values), folder / pickled)
    if head is not None:
        (folder / "head_config.json").write_text(json.dumps({"model_type": kind, "name": "mine", **head}))
    return folder


@pytest.fixture(scope="module", params=["bert", "roberta"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("hub") / request.param / "base", request.param, layers=LAYERS)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("one") / "bert" / "base", "bert", layers=LAYERS)


def static_head(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith("classifier")}


def test_the_librarys_arrangements_are_computed_exactly(base: Path, tmp_path: Path) -> None:
    kind, expected = base.parent.name, {}
    registry = Registry.open(tmp_path / "registry")
    for index, (name, settings) in enumerate(CONFIGS.items()):
        model, tensors = hub_model(base, kind, settings)
        with torch.no_grad():
            expected[name] = model(input_ids=torch.tensor([IDS])).logits[0]
        head = {"config": None, "model_class": f"{type(model).__name__}", "label2id": {"z": 0, "x": 1, "y": 2}}
        unsafe = settings["ln_before"]  # one tensor under two names, which safetensors does not take
        folder = write(
            tmp_path / name, settings, tensors, kind=kind, safe=not unsafe and index % 2 == 0, head=head,
            head_tensors=static_head(model),
        )  # fmt: skip
        found = import_adapterhub(folder, tmp_path / "out" / name)
        assert (found.task, found.labels) == ("sequence-classification", ("z", "x", "y"))
        assert found.config.through_norm == settings["original_ln_before"]
        fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
        alone = load(tmp_path / "out" / name, fresh).eval()
        with torch.no_grad():
            got = alone(input_ids=torch.tensor([IDS])).logits[0]
            with alone.disable_adapter():
                bare = alone(input_ids=torch.tensor([IDS])).logits[0]
        assert (got - expected[name]).abs().max() < 1e-5, name
        assert (bare - expected[name]).abs().max() > 0.01, f"{name} has no effect"
        registry.push(tmp_path / "out" / name, name, base=f"folder:{base}")
    with Harness(base, registry) as harness:
        harness.load(*expected)
        answers = {name: harness.classify(name, IDS) for name in expected}
        for name, answer in answers.items():
            assert (torch.tensor(answer.wait().logits) - expected[name]).abs().max() < 1e-4, name


def test_flexible_heads(base: Path, tmp_path: Path) -> None:
    """heads.NAME is dropout, linear, tanh, dropout, linear over the first token."""
    kind = base.parent.name
    model, tensors = hub_model(base, kind, PFEIFFER)
    torch.manual_seed(5)
    dense, out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2)
    parts = {"1.weight": dense.weight, "1.bias": dense.bias, "4.weight": out.weight, "4.bias": out.bias}
    settings = {"head_type": "classification", "layers": 2, "activation_function": "tanh", "use_pooler": False}
    folder = write(
        tmp_path / "flexible", PFEIFFER, tensors, kind=kind,
        head={"config": settings | {"label2id": {"no": 0, "yes": 1}}},
        head_tensors={f"heads.mine.{key}": value.detach().clone() for key, value in parts.items()},
    )  # fmt: skip
    assert import_adapterhub(folder, tmp_path / "out").labels == ("no", "yes")
    registry = Registry.open(tmp_path / "registry")
    registry.push(tmp_path / "out", "flexible", base=f"folder:{base}")
    with torch.no_grad():
        first = model.base_model(input_ids=torch.tensor([IDS])).last_hidden_state[0, 0]
        expected = out(torch.tanh(dense(first)))
    with Harness(base, registry) as harness:
        got = torch.tensor(harness.classify("flexible", IDS).wait().logits)
    assert (got - expected).abs().max() < 1e-4


def test_without_its_head_an_adapter_embeds_by_the_command(bert: Path, tmp_path: Path) -> None:
    model, tensors = hub_model(bert, "bert", PFEIFFER)
    odd = {"config": {"head_type": "question_answering", "layers": 1}}
    folder = write(
        tmp_path / "a", PFEIFFER, tensors, head=odd, head_tensors={"heads.mine.1.weight": torch.ones(2, HIDDEN)}
    )
    refused = CliRunner().invoke(app, ["import-adapterhub", str(folder), str(tmp_path / "out")])
    assert refused.exit_code == 2
    assert "question_answering" in refused.output
    assert "--no-head" in refused.output
    made = CliRunner().invoke(app, ["import-adapterhub", str(folder), str(tmp_path / "out"), "--no-head"])
    assert made.exit_code == 0, made.output
    assert "2 bottlenecks of size 8 before normalization layers, feature-extraction, without the head" in made.output
    registry = Registry.open(tmp_path / "registry")
    registry.push(tmp_path / "out", "a", base=f"folder:{bert}")
    with torch.no_grad():
        expected = model.base_model(input_ids=torch.tensor([IDS])).last_hidden_state[0].mean(0)
    with Harness(bert, registry) as harness:
        got = torch.tensor(harness.embed("a", IDS, pooling=Pooling.MEAN).wait().values)
    assert (got - expected).abs().max() < 1e-4


def test_old_files(bert: Path, tmp_path: Path) -> None:
    """Of adapter-transformers 1: no version, other names, gelu meaning gelu_new, an unused invertible adapter."""
    settings = PFEIFFER | {"non_linearity": "gelu_new"}
    _, tensors = hub_model(bert, "bert", settings)
    old = {key.replace(".adapters.", ".layer_text_task_adapters."): value for key, value in tensors.items()}
    said = {key: PFEIFFER[key] for key in list(PFEIFFER)[:10]} | {"non_linearity": "gelu"}
    said["invertible_adapter"] = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}
    folder = write(tmp_path / "old", said, old, safe=False, version=None, type="text_task")
    document = json.loads((folder / "adapter_config.json").read_text())
    del document["version"]
    (folder / "adapter_config.json").write_text(json.dumps(document))
    found = import_adapterhub(folder, tmp_path / "out")
    assert (found.config.non_linearity, found.task) == ("gelu_new", "feature-extraction")
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(
        got["base_model.model.encoder.layer.1.output.LayerNorm.adapter_up.weight"],
        tensors["bert.encoder.layer.1.output.adapters.mine.adapter_up.weight"],
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_parallel": True}, "is_parallel=True"),
        ({"inv_adapter": "nice"}, "invertible"),
        ({"phm_layer": True}, "Compacter"),
        ({"use_gating": True}, "use_gating"),
        ({"ln_after": True}, "ln_after"),
        ({"residual_before_ln": False}, "added twice"),
        ({"residual_before_ln": "post_add"}, "added twice"),
        ({"original_ln_after": False}, "original_ln_after"),
        ({"non_linearity": "mish"}, "relu, gelu"),
        ({"architecture": "prefix_tuning"}, "only bottleneck adapters"),
        ({"scaling": "both"}, "scaling='both'"),
        ({"output_adapter": False}, "no adapter at all"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = write(tmp_path / "a", PFEIFFER | change, {"x": torch.ones(1)})
    with pytest.raises(UnsupportedMethod, match=words):
        import_adapterhub(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_normalizations_come_first_only_houlsbys_arrangement_is_served(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedMethod, match="houlsby's arrangement"):
        import_adapterhub(write(tmp_path / "a", PFEIFFER, {"x": torch.ones(1)}, kind="gpt2"), tmp_path / "out")
    with pytest.raises(UnsupportedMethod, match="'bart'"):
        import_adapterhub(write(tmp_path / "b", PFEIFFER, {"x": torch.ones(1)}, kind="bart"), tmp_path / "out")
    tensors = {
        f"transformer.h.0.{place}.adapters.mine.{part}": torch.ones(shape)
        for place in ("attention_adapters", "output_adapters")
        for part, shape in (
            ("adapter_down.0.weight", (8, HIDDEN)),
            ("adapter_down.0.bias", (8,)),
            ("adapter_up.weight", (HIDDEN, 8)),
            ("adapter_up.bias", (HIDDEN,)),
        )
    }
    found = import_adapterhub(write(tmp_path / "c", HOULSBY, tensors, kind="gpt2"), tmp_path / "out")
    assert found.task == "causal-lm"
    assert set(found.config.target_modules) == {"transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"}


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-run"),))


def test_files_that_are_not_what_they_should_be(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, tensors = hub_model(bert, "bert", PFEIFFER)
    some = dict(list(tensors.items())[:-1])
    cases: list[tuple[Path, type[AdapterbayError], str]] = [
        (write(tmp_path / "lacks", PFEIFFER, some), Rejected, "adapter_up"),
        (write(tmp_path / "more", PFEIFFER, {**tensors, "x.y": torch.ones(1)}), Rejected, "'x.y' belongs to no"),
        (write(tmp_path / "other", HOULSBY, tensors), Rejected, "not those that the settings ask for"),
        (write(tmp_path / "key", PFEIFFER | {"twist": 2}, tensors), Rejected, "twist"),
        (write(tmp_path / "none", PFEIFFER, tensors), NotFound, "neither adapter.safetensors nor pytorch_adapter.bin"),
        (write(tmp_path / "broken", PFEIFFER, tensors), Rejected, "no safetensors file"),
        (write(tmp_path / "evil", PFEIFFER, tensors, safe=False), Rejected, "use_safetensors=True"),
        (write(tmp_path / "objects", PFEIFFER, tensors, safe=False), Rejected, "more than tensors by name"),
    ]
    (tmp_path / "none" / "adapter.safetensors").unlink()
    (tmp_path / "broken" / "adapter.safetensors").write_bytes(b"no")
    (tmp_path / "evil" / "pytorch_adapter.bin").write_bytes(pickle.dumps(_Evil()))
    torch.save({"a": [1]}, tmp_path / "objects" / "pytorch_adapter.bin")
    for folder, error, words in cases:
        with pytest.raises(error, match=words):
            import_adapterhub(folder, tmp_path / "out")
    assert not (tmp_path / "was-run").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotFound, match=r"no adapter_config\.json"):
        import_adapterhub(tmp_path, tmp_path / "out")
    with pytest.raises(InvalidArgument, match="is not empty"):
        import_adapterhub(tmp_path / "evil", tmp_path / "evil")
