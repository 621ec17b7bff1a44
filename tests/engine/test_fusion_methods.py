"""The weighted sum over adapters of different methods, each pair of them in one batch with plain rows.

The reference is the algebra of docs/fusion.md on PEFT's own merged weights: each adapter is merged alone by
`merge_and_unload`, W'_p, and the row must compute with W + Σ w_p (W'_p − W), for every parameter of the base: weights,
biases, norms, rows of the embedding. None of our forms takes part. Bottlenecks, which PEFT does not know, are added by
hooks. Tolerance: 1e-4 in logits, float32.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import peft_zoo
import pytest
import torch
from engine_tools import Answer, Harness, held, reference_logits
from peft import PeftModel
from safetensors.torch import load_file
from tiny import load_reference, make_base
from torch import Tensor, nn

from adapterbay.registry import Registry
from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.server.weights import LayerWeights, Weight

ATOL = 1e-4
PROMPT = [*range(40, 52), 10, 20, 30, 77, 61]
WEIGHTS = (0.6, -0.7)

RECIPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("lora", {}),
    "biased": ("lora", {"bias": "all"}),
    "vera": ("vera", {}),
    "loha": ("loha", {}),
    "boft": ("boft", {}),
    "glora": ("glora", {}),
    "norms": ("ln_tuning", {}),
    "tokens": ("trainable_tokens", {}),
    "dora": ("dora", {}),
    "road": ("road", {}),
    "oft": ("oft", {}),
    "ia3": ("ia3", {}),
    "ia3-in": ("ia3", {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}),
    "ia3-out": ("ia3", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
}
"""Names of peft_zoo's recipes, and settings that replace theirs. Two of each are made."""

BEHIND = ("self_attn.o_proj", "down_proj")
"""Modules behind which the bottlenecks sit."""

INPUTS = {"oft": {"q_proj", "v_proj", "down_proj"}, "ia3": {"down_proj"}, "ia3-in": {"down_proj"}}
OUTPUTS = {
    "dora": {"q_proj", "v_proj", "down_proj"},
    "road": {"q_proj", "v_proj", "down_proj"},
    "ia3": {"k_proj", "v_proj"},
    "ia3-out": {"k_proj", "v_proj"},
}
"""Layers whose input, or output, a method scales or turns: what docs/fusion.md refuses where they meet."""


def has_a_sum(one: str, other: str) -> bool:
    if one == other == "bottleneck":
        return False
    sides = [(INPUTS.get(kind, set()), OUTPUTS.get(kind, set())) for kind in (one, other)]
    return not (sides[0][0] & sides[1][1] or sides[1][0] & sides[0][1])


class Shelf:
    """A base with biases, two adapters of every kind on it, and what PEFT makes of each alone."""

    def __init__(self, root: Path) -> None:
        self.base = make_base(root / "base", "qwen2", layers=2)
        self.registry = Registry.open(root / "registry")
        self.folders: dict[str, Path] = {}
        for kind, (recipe, settings) in RECIPES.items():
            for seed in (1, 2):
                folder = root / f"{kind}-{seed}"
                peft_zoo.make(self.base, folder, recipe, seed=seed, settings=settings)
                self._push(f"{kind}-{seed}", folder)
        for seed in (1, 2):
            folder = peft_zoo.make_bottleneck(self.base, root / f"bottleneck-{seed}", BEHIND, seed=seed)
            self._push(f"bottleneck-{seed}", folder)
        self.model = load_reference(self.base)
        self.plain = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.merged = {name: self._merged(name) for name in self.folders if not name.startswith("bottleneck")}

    def _push(self, name: str, folder: Path) -> None:
        self.folders[name] = folder
        self.registry.push(folder, name, base=f"folder:{self.base}")

    def _merged(self, name: str) -> dict[str, Tensor]:
        """W' − W of what differs, by the base's own names."""
        peft = PeftModel.from_pretrained(copy.deepcopy(self.model), self.folders[name])
        state: dict[str, Tensor] = peft.merge_and_unload().state_dict()
        changes = {at: state[at] - self.plain.get(at, torch.zeros(())) for at in state}
        found = {at: change for at, change in changes.items() if change.abs().max() > 0}
        assert found, f"{name} changes nothing"
        return found

    @contextmanager
    def fused(self, weights: Mapping[str, Weight]) -> Iterator[Any]:
        """The base with W + Σ w (W' − W) in place of W; bottlenecks behind that, scaled."""
        state = dict(self.plain)
        with ExitStack() as undo, torch.no_grad():
            for name, weight in weights.items():
                if name.startswith("bottleneck"):
                    undo.enter_context(self._bottlenecks(name, weight))
                    continue
                for at, change in self.merged[name].items():
                    there = state.get(at)
                    if there is None:  # a bias where the base has none
                        module = self.model.get_submodule(at.removesuffix(".bias"))
                        module.bias = nn.Parameter(torch.zeros_like(change))
                        undo.callback(setattr, module, "bias", None)
                        there = torch.zeros_like(change)
                    state[at] = there + of_layer(weight, at) * change
            self.model.load_state_dict(state)
            yield self.model

    @contextmanager
    def _bottlenecks(self, name: str, weight: Weight) -> Iterator[None]:
        tensors = load_file(self.folders[name] / "adapter_model.safetensors")
        with ExitStack() as undo:
            for key in tensors:
                if key.endswith("adapter_down.weight"):
                    path = key.removeprefix("base_model.model.").removesuffix(".adapter_down.weight")
                    parts = {
                        part: tensors[key.replace("down.weight", part)]
                        for part in ("down.weight", "down.bias", "up.weight", "up.bias")
                    }
                    hook = _behind(parts, of_layer(weight, path))
                    undo.callback(self.model.get_submodule(path).register_forward_hook(hook).remove)
            yield


def _behind(parts: Mapping[str, Tensor], weight: float) -> Any:
    def hook(_module: nn.Module, _inputs: Any, h: Tensor) -> Tensor:
        hidden = (h @ parts["down.weight"].t() + parts["down.bias"]).relu()
        return h + weight * (hidden @ parts["up.weight"].t() + parts["up.bias"])

    return hook


def of_layer(weight: Weight, name: str) -> float:
    """A weight at a parameter of the base. Of layer weights the tests know one pattern: the first layer's factor."""
    if isinstance(weight, LayerWeights):
        ((pattern, factor),) = weight.rules
        assert pattern == "layers.0"
        return weight.weight * (factor if ".layers.0." in f".{name}" else 1.0)
    assert isinstance(weight, float)
    return weight


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("fusion-methods"))


@pytest.fixture(scope="module")
def harness(shelf: Shelf) -> Iterator[Harness]:
    with Harness(shelf.base, shelf.registry, max_rows=256, step_tokens=8192, device_bytes=1 << 30) as harness:
        for name in shelf.folders:  # on the device, so that all rows of a test enter in one step
            harness.embed(name, PROMPT).wait()
        yield harness


KINDS = (*RECIPES, "bottleneck")
PAIRS = [(f"{one}-1", f"{other}-2") for one, other in itertools.combinations_with_replacement(KINDS, 2)]
LAYERED = LayerWeights(0.8, (("layers.0", -0.5),))
MORE: list[dict[str, Weight]] = [
    {"lora-1": 0.5, "loha-1": 0.5, "norms-1": 0.5, "tokens-1": 0.5, "bottleneck-1": 0.5},
    {"oft-1": 0.4, "oft-2": 0.3, "ia3-in-1": -0.5, "biased-1": 1.0},
    {"dora-1": 0.4, "road-2": 0.3, "ia3-out-1": -0.5, "lora-2": 1.0},
    {"ia3-1": LAYERED, "lora-1": 1.0, "norms-2": LAYERED},
    {"loha-1": LAYERED, "glora-2": LAYERED, "bottleneck-2": LAYERED},
    {"dora-2": LAYERED},
    *[dict[str, Weight]({f"{kind}-1": weight}) for kind in KINDS for weight in (0.5, 1.0)],
    {},
]
"""Three and more, weights by layer, a scale on one, and plain rows: each adapter alone, and the base."""


def wrong(shelf: Shelf, harness: Harness, weights: Mapping[str, Weight], answer: Answer) -> float:
    tokens = answer.generated().token_ids
    assert answer.request is not None
    got = torch.stack(harness.logits[answer.request.id])
    with shelf.fused(weights) as model:
        return float((got - reference_logits(model, PROMPT, tokens)).abs().max())


def test_every_pair_beside_plain_rows(shelf: Shelf, harness: Harness) -> None:
    asked: list[dict[str, Weight]] = [
        dict(zip(pair, WEIGHTS, strict=True)) for pair in PAIRS if has_a_sum(pair[0][:-2], pair[1][:-2])
    ]
    asked += MORE
    with held(harness.engine):
        answers = [harness.generate(harness.fused(weights), PROMPT, 2) for weights in asked]
    off = {
        "+".join(weights) or "base": far
        for weights, answer in zip(asked, answers, strict=True)
        if not (far := wrong(shelf, harness, weights, answer)) < ATOL
    }
    assert not off
    assert max(harness.step_sizes) == len(asked) > 100, "the rows were not batched"
    first = {str(weights): harness.logits[answer.request.id][0] for weights, answer in zip(asked, answers, strict=True)
             if answer.request is not None}  # fmt: skip
    apart = {
        (one, other): float((first[one] - first[other]).abs().max()) for one, other in itertools.combinations(first, 2)
    }
    assert min(apart.values()) > 5 * ATOL, min(apart, key=lambda pair: apart[pair])


def test_pairs_without_a_sum_are_refused_by_name(shelf: Shelf, harness: Harness) -> None:
    refused = [pair for pair in PAIRS if not has_a_sum(pair[0][:-2], pair[1][:-2])]
    assert len(refused) == 9
    beside = harness.generate("ia3-1", PROMPT, 2)
    for one, other in refused:
        words = "no sum" if one.startswith("bottleneck") else "has no weighted sum"
        with pytest.raises(UnsupportedMethod, match=words) as caught:
            harness.generate({one: 1.0, other: 1.0}, PROMPT, 2).wait()
        assert f"{one}@1 (" in str(caught.value)
        assert f"{other}@1 (" in str(caught.value)
    assert wrong(shelf, harness, {"ia3-1": 1.0}, beside) < ATOL


def test_ia3_and_what_peft_makes_of_its_scales(shelf: Shelf, harness: Harness) -> None:
    """PEFT adds the scales up, Σ w s. That is the weighted sum where the weights add up to 1; elsewhere it also scales
    the base itself: half an IA³ would be half of the base's layer."""
    model: Any = PeftModel.from_pretrained(load_reference(shelf.base), shelf.folders["ia3-1"], adapter_name="ia3-1")
    model.load_adapter(shelf.folders["ia3-2"], adapter_name="ia3-2")
    for weights, same in (((0.25, 0.75), True), ((1.5, -0.5), True), ((0.5, 0.25), False)):
        name = f"sum{len(model.peft_config)}"
        model.base_model.add_weighted_adapter(["ia3-1", "ia3-2"], list(weights), name)
        model.set_adapter(name)
        answer = harness.generate(dict(zip(("ia3-1", "ia3-2"), weights, strict=True)), PROMPT, 2)
        tokens = answer.generated().token_ids
        assert answer.request is not None
        got = torch.stack(harness.logits[answer.request.id])
        far = float((got - reference_logits(model.eval(), PROMPT, tokens)).abs().max())
        assert far < ATOL if same else far > 1000 * ATOL, (weights, far)
