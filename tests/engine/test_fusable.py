"""Which forms can be one, which layers a weight is for, and what makes two computations the same. Needs no engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adapterbay.registry.errors import InvalidArgument, NoEffect, UnsupportedMethod
from adapterbay.registry.fusing import METHODS, FusionSettings
from adapterbay.registry.manifest import Manifest
from adapterbay.server.adapters.forms import (
    AttentionPrompt,
    Bottleneck,
    LinearForm,
    LowRank,
    NormForm,
    Prompt,
    ServingForm,
)
from adapterbay.server.adapters.fusing import check_fusable, fuse_forms
from adapterbay.server.requests import ArmSpec, Part
from adapterbay.server.weights import LayerWeights, check_pattern, matches

PATH = "layers.0.self_attn.q_proj"


def form(method: str, **parts: Any) -> ServingForm:
    """A form of a method, with what it does to a base whose layers have 64 features on either side."""
    return ServingForm(digest=method, manifest=Manifest.model_construct(peft_type=method), **parts)


@pytest.fixture
def lora() -> ServingForm:
    torch.manual_seed(0)
    return form("LORA", layers={PATH: LinearForm(LowRank(torch.randn(4, 64), torch.randn(4, 64), 0.5))})


def arm_of(*forms: ServingForm, settings: FusionSettings | None = None, weight: float = 0.5) -> ArmSpec:
    parts = (Part(form.digest, f"part{at}", 1, f"{form.digest}{at}", weight) for at, form in enumerate(forms))
    return ArmSpec(tuple(parts), settings)


def test_which_methods_have_a_sum(lora: ServingForm) -> None:
    ones = torch.ones(64)

    def layer(method: str, **change: Any) -> ServingForm:
        return form(method, layers={PATH: LinearForm(**change)})

    inward, outward = layer("IA3", in_scale=ones), layer("LORA", out_scale=ones)
    turned = layer("OFT", rotation=torch.eye(8).expand(8, 8, 8))
    both = layer("BOFT", rotation=torch.eye(8).expand(8, 8, 8), out_scale=ones)
    dense, biased = layer("LOHA", dense=torch.eye(64)), layer("LORA", bias=ones)
    norm = form("LN_TUNING", norms={"norm": NormForm({"weight": ones})})
    behind = form("BOTTLENECK", bottlenecks={PATH: Bottleneck(ones[None], None, ones[:, None], None, "relu")})
    prompt = form("PROMPT_TUNING", virtual=Prompt(torch.zeros(2, 64)))
    late, later = (form("LORA", layers=lora.layers, invocation=tokens) for tokens in ((1, 2), (1, 3)))

    def refused(*forms: ServingForm, words: str, weight: float = 0.5) -> None:
        with pytest.raises(UnsupportedMethod, match=words):
            check_fusable(arm_of(*forms, weight=weight), forms)

    for forms in (
        [lora, inward, inward, turned],
        [lora, outward, outward, dense],
        [norm, norm, lora],
        [biased, behind],
    ):
        check_fusable(arm_of(*forms), forms)
    for alone in (prompt, both, late, behind):
        check_fusable(arm_of(alone, weight=1.0), [alone])
    check_fusable(arm_of(late, late), [late, late])
    elsewhere = dataclasses.replace(outward, layers={"layers.1.self_attn.q_proj": outward.layers[PATH]})
    check_fusable(arm_of(inward, elsewhere), [inward, elsewhere])
    check_fusable(arm_of(both, lora, weight=1.0), [both, lora])
    refused(inward, outward, words=r"part0@1 \(IA3\) and part1@1 \(LORA\).*input of layers.0")
    refused(turned, outward, words="OFT.*LORA")
    refused(both, lora, words="BOFT")
    refused(both, inward, words="BOFT", weight=1.0)
    refused(prompt, words="PROMPT_TUNING.*virtual tokens")
    refused(lora, prompt, words="PROMPT_TUNING", weight=1.0)
    refused(late, later, words="same invocation tokens")
    refused(late, lora, words="same invocation tokens", weight=1.0)
    refused(behind, behind, words="bottleneck")
    for odd in (inward, outward, turned, dense, biased, norm, behind):
        settings = FusionSettings("svd")
        with pytest.raises(UnsupportedMethod, match=rf"part1@1 \({odd.manifest.peft_type}\).*svd"):
            fuse_forms(arm_of(lora, odd, settings=settings), [lora, odd])


def test_parts_that_cancel_out_leave_nothing(lora: ServingForm) -> None:
    opposite = form(
        "LORA",
        layers={
            path: LinearForm(LowRank(layer.low_rank.a, layer.low_rank.b, -layer.low_rank.scaling))
            for path, layer in lora.layers.items()
            if layer.low_rank is not None
        },
    )
    settings = FusionSettings("magnitude_prune_svd", density=1.0)
    with pytest.raises(NoEffect, match="part0@1 and part1@1"):
        fuse_forms(arm_of(lora, opposite, settings=settings), [lora, opposite])


MATCHING = {
    "q_proj": True,
    "layers.3": True,
    "layers.0-9": True,
    "layers.4-9": False,
    "3.self_attn": True,
    "layers.*.self_attn": True,
    "*": True,
    "layers.3.self_attn.q_proj": True,
    "layers.3.self_attn.q_proj.*": False,
    "layers.q_proj": False,
    "q_pro": False,
    "layers.30": False,
    "3": True,
}


def test_patterns_of_layers() -> None:
    for pattern, matching in MATCHING.items():
        check_pattern(pattern)
        assert matches(pattern, "layers.3.self_attn.q_proj") is matching, pattern
    for wrong in ("", "a..b", ".a", "9-0", "a b", "(a+)+", "x" * 300, "é", "layers.-1"):
        with pytest.raises(InvalidArgument):
            check_pattern(wrong)
    weights = LayerWeights(2.0, (("layers.0", 0.5), ("q_proj", -1.0)))
    assert [weights.at(f"layers.{at}.q_proj") for at in (0, 1)] == [1.0, -2.0]
    assert weights.at("layers.1.v_proj") == 2.0
    keys = [("a", 1.0), ("a", weights), ("a", LayerWeights(1.0, (("x", 1.0),))), ("a", -1.0)]
    backwards = keys[::-1]
    assert sorted(keys) == sorted(backwards), "rows are sorted by them"


def test_the_key_is_the_whole_computation() -> None:
    def part(digest: str, weight: float = 1.0, layers: LayerWeights | None = None) -> Part:
        return Part("r", "n", 1, digest, weight, layers)

    a, b = part("sha256:a"), part("sha256:b", 0.5)
    layered = part("sha256:a", 1.0, LayerWeights(1.0, (("q_proj", 0.5),)))
    arms = [
        ArmSpec(),
        ArmSpec((a,)),
        ArmSpec((part("sha256:a", 2.0),)),
        ArmSpec((layered,)),
        ArmSpec((a, b)),
        ArmSpec((layered, b)),
        *(ArmSpec((a, b), FusionSettings(name)) for name in METHODS if name != "linear"),
        ArmSpec((layered, b), FusionSettings("svd")),
        ArmSpec((a, part("sha256:b", 0.25)), FusionSettings("svd")),
        ArmSpec((a, b), FusionSettings("svd", rank=3)),
        ArmSpec((a, b), FusionSettings("ties", density=0.25)),
        ArmSpec((a, b), FusionSettings("ties", majority_sign="frequency")),
        ArmSpec((a, b), FusionSettings("dare_linear", seed=1)),
    ]
    assert len({arm.key for arm in arms}) == len(arms)
    assert ArmSpec((b, a), FusionSettings("ties")).key == ArmSpec((a, b), FusionSettings("ties", 0.5)).key
    assert (
        ArmSpec((a, b), FusionSettings("ties", majority_sign="total")).key
        == ArmSpec((a, b), FusionSettings("ties")).key
    )
    assert ArmSpec((Part("other", "name", 7, "sha256:a"),)).key == ArmSpec((a,)).key, "names are no part of it"


def test_an_adapter_without_weight_at_a_layer_has_no_vote_there(lora: ServingForm) -> None:
    voter = form(
        "LORA", layers={path: LinearForm(LowRank(-torch.ones(4, 64), torch.ones(4, 64), 1.0)) for path in (PATH, "q")}
    )
    arm = arm_of(lora, voter, settings=FusionSettings("ties", density=1.0))
    silent = dataclasses.replace(arm.parts[1], layer_weights=LayerWeights(0.5, ((PATH, 0.0),)))
    for second, alone in ((arm.parts[1], False), (silent, True)):
        fused = fuse_forms(dataclasses.replace(arm, parts=(arm.parts[0], second)), [lora, voter]).layers[PATH].low_rank
        only = lora.layers[PATH].low_rank
        assert fused is not None
        assert only is not None
        expected = arm.parts[0].weight * only.scaling * only.b.t() @ only.a
        assert torch.allclose(fused.b.t() @ fused.a, expected, atol=1e-5) is alone


def test_weights_by_layer_reach_attention_prompts() -> None:
    """LLaMA-Adapter changes attention layers and no linear one: patterns mean those."""
    prompt = AttentionPrompt(1.0, torch.ones(2, 2, 16), torch.ones(2, 2, 16))
    prompted = form("ADAPTION_PROMPT", attention={2: prompt, 3: prompt})
    part = arm_of(prompted).parts[0]

    def check(*layers: tuple[str, float], overall: float = 1.0) -> None:
        weighted = dataclasses.replace(part, layer_weights=LayerWeights(overall, layers))
        check_fusable(ArmSpec((weighted,)), [prompted])

    check(("layers.3", 0.5))
    check(("self_attn", 0.5))
    with pytest.raises(InvalidArgument, match=r"layers\.1"):
        check(("layers.1", 0.5))
    with pytest.raises(NoEffect):
        check(("layers.2-3", 0.0))
    with pytest.raises(NoEffect):
        check_fusable(arm_of(prompted, prompted, weight=0.0), [prompted, prompted])
