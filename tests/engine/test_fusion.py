"""Fused rows beside plain ones: every method equal to PEFT's own `add_weighted_adapter`, computed once, never mixed up.

Tolerance: 1e-4 in logits, float32, as for plain adapters; see test_parity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from engine_tools import Answer, Asked, Harness, held, reference_logits
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from tiny import TARGETS, load_reference, make_base
from torch import Tensor
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument, NoEffect, TaskMismatch
from adapterbay.registry.fusing import METHODS, FusionSettings
from adapterbay.server.adapters.merging import layer_generator
from adapterbay.server.weights import LayerWeights, Weight, weight_at

ATOL = 1e-4
PROMPT = list(range(30, 55))
MOST = 3
WEIGHTS: dict[str, Weight] = {"x": 0.7, "y": -0.4, "z": 1.2}
OTHERS: dict[str, Weight] = {"x": 1.1, "y": 0.5, "z": -0.3}
LAYERED: dict[str, Weight] = {
    "x": LayerWeights(0.7, (("layers.0", 0.25), ("q_proj", -1.5))),
    "y": LayerWeights(-0.4, (("layers.0-1.self_attn", 2.0),)),
    "z": 1.2,
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Adapters of equal rank on overlapping layers, scaled differently, and two of other ranks."""
    root = tmp_path_factory.mktemp("fusion")
    zoo = Zoo(make_base(root / "base", "llama", layers=2), Registry.open(root / "registry"))
    made: dict[str, tuple[list[str], int, int, dict[str, Any]]] = {
        "x": (["q_proj", "v_proj"], 4, 8, {}),
        "y": (["q_proj", "k_proj", "down_proj"], 4, 3, {"use_rslora": True}),
        "z": (["v_proj", "down_proj", "up_proj"], 4, 4, {}),
        "thin": (["q_proj", "up_proj"], 1, 2, {}),
        "ex": (["embed_tokens", "q_proj"], 4, 3, {}),
        "ey": (["embed_tokens", "v_proj"], 4, 8, {}),
        "wide": (TARGETS["llama"][1], 12, 6, {"use_rslora": True}),
    }
    for seed, (name, (targets, rank, alpha, settings)) in enumerate(made.items()):
        zoo.add(name, root / name, targets=targets, rank=rank, alpha=alpha, seed=seed, scale=0.5, settings=settings)
    for name, labels in {"c0": ["no", "yes"], "c1": ["no", "yes"], "c2": ["a", "b", "c"]}.items():
        folder = root / name
        zoo.add(
            name, folder, targets=["q_proj"], rank=4, seed=len(zoo.folders), task="SEQ_CLS", labels=labels, scale=0.5
        )
    return zoo


@pytest.fixture(scope="module")
def harness(zoo: Zoo) -> Iterator[Harness]:
    with Harness(zoo.base, zoo.registry, max_rows=48) as harness:
        yield harness


class PeftFusions:
    """What a user of PEFT does, on one model: load, load, add_weighted_adapter, set_adapter.

    Three things are set right around the call: each layer's weights are its own, each layer's chances are those of our
    generator (PEFT draws from the process's one), and the scaling of the result is 1, for which its tensors are made
    (PEFT keeps the first adapter's use_rslora, so that it would be √rank).
    """

    def __init__(self, zoo: Zoo) -> None:
        names = [name for name in zoo.folders if not name.startswith("c")]
        self.model = PeftModel.from_pretrained(load_reference(zoo.base), zoo.folders[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(zoo.folders[name], adapter_name=name)

    def logits(
        self, weights: Mapping[str, Weight], settings: FusionSettings, answer: Answer, order: list[str]
    ) -> Tensor:
        """`order` is that in which the parts are merged."""
        model: Any = self.model
        settings = settings.completed()
        with pytest.MonkeyPatch.context() as patch:
            for name, at in (("_generalized_task_arithmetic_weighted_adapter", 3),
                             ("_svd_generalized_task_arithmetic_weighted_adapter", 4)):  # fmt: skip
                patch.setattr(LoraModel, name, self._by_layer(getattr(LoraModel, name), at, weights, settings))
            model.add_weighted_adapter(
                order,
                [weight_at(weights[name], "") for name in order],
                "fused",
                combination_type=settings.method,
                svd_rank=settings.rank,
                density=settings.density,
                majority_sign_method=settings.majority_sign or "total",
            )
        for module in model.modules():
            if isinstance(module, LoraLayer) and "fused" in module.scaling:
                module.scaling["fused"] = 1.0
        model.set_adapter("fused")
        model.eval()
        logits = reference_logits(model, PROMPT, answer.generated().token_ids)
        model.delete_adapter("fused")
        return logits

    def _by_layer(self, method: Any, at: int, weights: Mapping[str, Weight], settings: FusionSettings) -> Any:
        paths = {
            id(module): name.removeprefix("base_model.model.model.") for name, module in self.model.named_modules()
        }

        def patched(this: Any, kind: str, adapters: list[str], _: list[float], *rest: Any, **named: Any) -> Any:
            path = paths[id(rest[at - 3])]
            if settings.seed is not None:
                torch.manual_seed(layer_generator(settings.seed, path).initial_seed())
            return method(this, kind, adapters, [weight_at(weights[name], path) for name in adapters], *rest, **named)

        return patched

    def sum_logits(self, weights: Mapping[str, Weight], answer: Answer) -> Tensor:
        """The weighted sum by hand: B of each layer scaled, all adapters on at once."""
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for name, module in self.model.named_modules():
                for adapter in weights:
                    if isinstance(module, LoraLayer) and adapter in module.lora_B:
                        values = module.lora_B[adapter].weight
                        kept.append((values, values.clone()))
                        values.mul_(weight_at(weights[adapter], name.removeprefix("base_model.model.model.")))
        self.model.base_model.set_adapter(list(weights))
        self.model.eval()
        logits = reference_logits(self.model, PROMPT, answer.generated().token_ids)
        with torch.no_grad():
            for values, before in kept:
                values.copy_(before)
        return logits

    def base_logits(self, answer: Answer) -> Tensor:
        """Without any adapter."""
        self.model.eval()
        with self.model.disable_adapter():
            return reference_logits(self.model, PROMPT, answer.generated().token_ids)


@pytest.fixture(scope="module")
def peft(zoo: Zoo) -> PeftFusions:
    return PeftFusions(zoo)


def settings_of(method: str) -> FusionSettings:
    plain = FusionSettings(method)
    return FusionSettings(
        method,
        density=0.6 if plain.prunes else None,
        rank=3 if plain.decomposes else None,
        seed=11 if plain.drops_at_random else None,
        majority_sign="frequency" if method == "ties" else None,
    )


def got(harness: Harness, answer: Answer) -> Tensor:
    answer.wait()
    assert answer.request is not None
    return torch.stack(harness.logits[answer.request.id])


def merged_in(harness: Harness, weights: Mapping[str, Weight]) -> list[str]:
    """The order in which parts are merged, which decides what DARE drops of which."""
    return sorted(weights, key=lambda name: harness.arm(name).parts[0].digest)


def ask(harness: Harness, asked: Asked) -> Answer:
    return harness.generate(asked, PROMPT, MOST)


def test_every_method_equals_peft_beside_plain_rows_and_other_weights(harness: Harness, peft: PeftFusions) -> None:
    cases = [(WEIGHTS, settings_of(name)) for name in METHODS if name != "linear"]
    cases += [(OTHERS, settings_of(name)) for name in ("cat", "ties", "dare_linear_svd")]
    different_ranks: dict[str, Weight] = {"thin": 1.5, "wide": -0.5, "x": 0.8}
    cases += [(different_ranks, settings_of(name)) for name in ("cat", "svd", "dare_ties_svd")]
    cases.append((WEIGHTS, FusionSettings("svd")))
    embedding: dict[str, Weight] = {"ex": 0.75, "ey": -0.5}
    cases += [(embedding, settings_of(name)) for name in ("cat", "dare_linear", "ties_svd")]
    cases += [(LAYERED, settings_of(name)) for name in ("svd", "ties", "dare_linear", "magnitude_prune_svd")]
    plain: list[Asked] = ["x", "z", None, {"x": 0.7, "y": -0.4}]
    for weights, settings in cases:
        harness.embed(harness.fused(weights, settings), PROMPT).wait()  # all are in memory, so that all enter at once
    with held(harness.engine):
        answers = [ask(harness, harness.fused(weights, settings)) for weights, settings in cases]
        beside = [ask(harness, selection) for selection in plain]
    seen = []
    for (weights, settings), answer in zip(cases, answers, strict=True):
        logits = got(harness, answer)
        expected = peft.logits(weights, settings, answer, merged_in(harness, weights))
        torch.testing.assert_close(logits, expected, rtol=0, atol=ATOL, msg=lambda m, s=settings: f"{s}: {m}")
        seen.append(logits[0])
    for selection, answer in zip(plain, beside, strict=True):
        expected = peft.sum_logits(harness_weights(selection), answer) if selection else peft.base_logits(answer)
        torch.testing.assert_close(got(harness, answer), expected, rtol=0, atol=ATOL)
    apart = [(one - other).abs().max() for index, one in enumerate(seen) for other in seen[:index]]
    assert min(apart) > 1e-3, "two fusions that should differ do not"
    assert max(harness.step_sizes) == len(cases) + len(plain), "the rows were not batched"


def harness_weights(selection: Asked) -> dict[str, Weight]:
    if isinstance(selection, str):
        return {selection: 1.0}
    return dict(selection) if isinstance(selection, Mapping) else {}


SUMS: dict[str, dict[str, Weight]] = {
    "a scale": {"x": 0.5},
    "a negative scale": {"wide": -1.0},
    "negative weights": {"x": 0.7, "wide": -0.3, "thin": 1.5},
    "by layer": LAYERED,
    "a scale by layer": {"wide": LayerWeights(1.0, (("layers.1-9.mlp", 0.0), ("v_proj", -2.0)))},
}


def test_weighted_sums_with_weights_for_each_layer(harness: Harness, peft: PeftFusions) -> None:
    with held(harness.engine):
        answers = [ask(harness, harness.fused(weights)) for weights in SUMS.values()]
    for weights, answer in zip(SUMS.values(), answers, strict=True):
        torch.testing.assert_close(got(harness, answer), peft.sum_logits(weights, answer), rtol=0, atol=ATOL)


def fused_in(harness: Harness) -> list[str]:
    return [digest for digest in harness.engine.adapters.resident() if digest.startswith("fusion:")]


def test_a_fusion_is_computed_once_and_again_after_it_had_to_go(zoo: Zoo) -> None:
    computed: list[str] = []
    ties = FusionSettings("ties", density=0.5)
    with Harness(zoo.base, zoo.registry) as harness:
        manager = harness.engine.adapters
        manager.subscribe(lambda event: computed.append(event.digest) if event.kind == "loaded" else None)
        one = harness.fused({"x": 1.0, "y": 0.5}, ties)
        first = got(harness, ask(harness, one))
        assert computed == [one.key[0][0]], "the parts are read for the fusion, and do not stay"
        again = got(harness, ask(harness, harness.fused({"y": 0.5, "x": 1.0}, FusionSettings("ties"))))
        assert torch.equal(first, again), "the same set in another order, with the default spelled out, is the same"
        assert len(computed) == 1
        other = harness.fused({"x": 1.0, "y": 0.25}, ties)
        assert (got(harness, ask(harness, other)) - first).abs().max() > 1e-3
        assert len(computed) == 2
        assert len({one.key, other.key, harness.fused({"x": 1.0, "y": 0.5}).key}) == 3
        harness.idle()
        # one fusion fits into what is left: the other gives way
        manager.memory.books.budget = manager.memory.used_bytes + 1000
        svd = harness.fused({"x": 1.0, "y": 0.5}, FusionSettings("svd", rank=2))
        ask(harness, svd).wait()
        assert one.key[0][0] not in fused_in(harness)
        assert torch.equal(got(harness, ask(harness, one)), first)
        assert computed.count(one.key[0][0]) == 2
        harness.idle()
        assert manager.memory.used_bytes <= manager.memory.books.budget


def test_unloading_an_adapter_unloads_what_was_fused_from_it(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry) as harness:
        for parts in ({"x": 1.0, "y": 1.0}, {"y": 1.0, "z": 1.0}):
            ask(harness, harness.fused(parts, FusionSettings("cat"))).wait()
        ask(harness, "x").wait()
        harness.idle()
        size = harness.engine.adapters.memory.used_bytes
        freed = harness.engine.adapters.unload(harness.arm("x").parts[0].digest).result(10)
        assert fused_in(harness) == [harness.fused({"y": 1.0, "z": 1.0}, FusionSettings("cat")).key[0][0]]
        assert 0 < harness.engine.adapters.memory.used_bytes < size
        assert freed >= size - harness.engine.adapters.memory.used_bytes


def test_recipes_of_fusions_that_are_gone_are_forgotten(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterbay.server.adapters.manager.FUSED_RECIPES", 4)
    with Harness(zoo.base, zoo.registry) as harness:
        manager = harness.engine.adapters
        manager._most_fused = 4
        for index in range(9):
            arm = harness.fused({"x": 1.0, "y": 1.0 + index}, FusionSettings("cat"))
            ask(harness, arm).wait()
            harness.idle()
            manager.memory.unload(arm.key[0][0]).result(10)
        assert len(manager._fused) <= 5


def test_heads_are_averaged_where_they_can_be(harness: Harness) -> None:
    weights = {"c0": 0.75, "c1": 0.25}
    ties = harness.fused(weights, FusionSettings("ties", density=1.0))
    summed, fused = (harness.classify(arm, PROMPT).classified() for arm in (weights, ties))
    assert fused.labels == summed.labels == ("no", "yes")
    assert fused.logits != summed.logits
    exact = harness.classify(harness.fused(weights, FusionSettings("cat")), PROMPT).classified()
    torch.testing.assert_close(torch.tensor(exact.logits), torch.tensor(summed.logits), rtol=0, atol=ATOL)
    odd = harness.fused({"c0": 1.0, "c2": 1.0}, FusionSettings("cat"))
    with pytest.raises(TaskMismatch, match=r"c0@1 and c2@1 has no classification head"):
        harness.classify(odd, PROMPT).wait()
    plain = got(harness, ask(harness, {"c0": 1.0, "c2": 1.0}))
    torch.testing.assert_close(got(harness, ask(harness, odd)), plain, rtol=0, atol=ATOL)


REFUSED: dict[str, tuple[dict[str, Weight], FusionSettings | None, type[Exception], str]] = {
    "ranks": ({"x": 1.0, "wide": 1.0}, FusionSettings("ties"), InvalidArgument, "needs equal ranks.*4 and 12"),
    "pattern": ({"x": LayerWeights(1.0, (("k_proj", 0.5),)), "y": 1.0}, None, InvalidArgument, "k_proj.*x@1 .LORA"),
    "scale pattern": ({"x": LayerWeights(1.0, (("layers.9", 0.5),))}, None, InvalidArgument, "layers.9"),
    "fused pattern": (
        {"x": LayerWeights(1.0, (("h.0", 1.0),)), "y": 1.0},
        FusionSettings("svd"),
        InvalidArgument,
        "h.0",
    ),
    "nothing": ({"x": LayerWeights(1.0, (("layers", 0.0),)), "y": 1.0}, None, NoEffect, "x@1 .LORA.*0 at every"),
    "overflow": ({"x": 1e300, "y": 1.0}, FusionSettings("svd"), InvalidArgument, "too large"),
}


@pytest.mark.parametrize(("weights", "settings", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fused_is_refused_by_name(
    harness: Harness, weights: dict[str, Weight], settings: FusionSettings | None, error: type[Exception], words: str
) -> None:
    beside = ask(harness, "x")
    with pytest.raises(error, match=words):
        ask(harness, harness.fused(weights, settings)).wait()
    beside.wait()
