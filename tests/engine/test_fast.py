"""The fused path against the base's own modules: prefill and decode together, over mixes, and where it gives way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from tiny import make_base
from torch import Tensor

from adapterbay.server.adapters.forms import (
    AttentionPrompt,
    Bottleneck,
    LinearForm,
    LowRank,
    NormForm,
    ServingForm,
    TableForm,
    Turn,
)
from adapterbay.server.attention import AttentionPlan, Segment
from adapterbay.server.config import ServerConfig
from adapterbay.server.fast.layer import FastLayer
from adapterbay.server.fast.path import FastPath
from adapterbay.server.kv import BlockPool
from adapterbay.server.mix.plan import AdapterMix, Run
from adapterbay.server.model import ServingModel
from adapterbay.server.weights import LayerWeights

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
LIMIT = {"float32": 2e-5, "bfloat16": 6e-2}
LENGTHS = (40, 3, 17, 29, 1)
"""Tokens of the rows before they decode; mistral's window is 24."""


@dataclass
class Pair:
    """The same base twice: by its modules, and fused."""

    plain: ServingModel
    fused: ServingModel

    def place(self, key: str, form: ServingForm) -> None:
        for model in (self.plain, self.fused):
            model.sites.place(key, form)

    def remove(self, key: str, form: ServingForm) -> None:
        for model in (self.plain, self.fused):
            model.sites.remove(key, form)


pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_base(tmp_path_factory.mktemp(name), name, layers=2) for name in ARCHITECTURES}


def load(base: Path, dtype: str = "float32", mode: str = "on", quantize: str = "none") -> ServingModel:
    return ServingModel.load(
        ServerConfig(base=str(base), dtype=dtype, device="cpu", quantize=quantize, compile=mode)  # type: ignore[arg-type]
    )


def pair_of(base: Path, dtype: str = "float32") -> Pair:
    pair = Pair(load(base, dtype, "off"), load(base, dtype))
    assert pair.fused.fast is not None
    assert pair.fused.fast.fused == 2
    return pair


@pytest.fixture(scope="module")
def llama(bases: dict[str, Path]) -> Pair:
    return pair_of(bases["llama"])


@pytest.fixture
def pair(llama: Pair) -> Iterator[Pair]:
    """Emptied behind each test."""
    placed: list[tuple[str, ServingForm]] = []

    class Cleaning(Pair):
        def place(self, key: str, form: ServingForm) -> None:
            placed.append((key, form))
            super().place(key, form)

        def remove(self, key: str, form: ServingForm) -> None:
            placed.remove((key, form))
            super().remove(key, form)

    yield Cleaning(llama.plain, llama.fused)
    for key, form in placed:
        llama.remove(key, form)


def lora(model: ServingModel, seed: int, rank: int, *, only: tuple[str, ...] = ("proj",)) -> ServingForm:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        path: LinearForm(
            LowRank(
                torch.randn(rank, size, generator=generator) * size**-0.5,
                torch.randn(rank, out, generator=generator) * 0.3,
                0.5 + seed % 3,
            )
        )
        for path, (size, out) in model.sites.shapes().items()
        if any(name in path for name in only)
    }
    return ServingForm(digest=f"d{seed}", manifest=None, layers=layers)  # type: ignore[arg-type]


def steps(model: ServingModel, parts: list[tuple[Any, ...]]) -> list[Tensor]:
    """Rows of LENGTHS tokens under `parts`: the first two whole, then those decoding beside the others, of which the
    third comes in two chunks, then all decoding. The logits of every step."""
    pool = BlockPool(model.cache_shapes, 1 << 20, model.dtype, model.device)
    blocks = [pool.ledger.take(4) for _ in LENGTHS]
    ids = torch.randint(10, 250, (5, 64), generator=torch.Generator().manual_seed(7))

    def slot(row: int, at: int) -> int:
        return blocks[row][at // 16] * 16 + at % 16

    def step(decoding: list[tuple[int, int]], filling: list[tuple[int, int, int]]) -> Tensor:
        shares = [(row, at, at + 1) for row, at in decoding] + filling
        plan = AttentionPlan(causal=True, decode_rows=len(decoding), pool=pool)
        if decoding:
            plan.block_table = torch.tensor([blocks[row] for row, _ in decoding])
            plan.lengths = torch.tensor([at + 1 for _, at in decoding])
        plan.write_slots = torch.tensor([slot(row, at) for row, start, stop in shares for at in range(start, stop)])
        segments, runs, ends, total = [], [], [], 0
        for row, start, stop in shares:
            end = total + stop - start
            if parts[row]:
                runs.append(Run(total, end, parts[row]))
            if (row, start) not in decoding or (row, start, stop) in filling:
                earlier = torch.tensor([slot(row, at) for at in range(stop)]) if start else None
                segments.append(Segment(total, end, earlier))
            total = end
            ends.append(end - 1)
        plan.segments = tuple(segments)
        mix = AdapterMix(total, runs, model.dtype, model.device) if runs else None
        flat = torch.cat([ids[row, start:stop] for row, start, stop in shares])
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in shares])
        with torch.inference_mode():
            logits = model.forward(flat, positions, mix, plan, logits_at=torch.tensor(ends), want_hidden=False)[1]
        assert logits is not None
        return logits

    one, two, three, four, five = LENGTHS
    return [
        step([], [(0, 0, one), (1, 0, two)]),
        step([(0, one), (1, two)], [(2, 0, 9), (3, 0, four), (4, 0, five)]),
        step([(0, one + 1), (1, two + 1)], [(2, 9, three)]),
        step([(row, length + 4) for row, length in enumerate(LENGTHS)], []),
    ]


def near(one: list[Tensor], other: list[Tensor], dtype: str = "float32") -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.float() - b.float()).abs().max() <= LIMIT[dtype] * a.float().abs().max().clamp_min(1.0)


MIXES: dict[str, list[tuple[Any, ...]]] = {
    "base": [(), (), (), (), ()],
    "distinct": [(("a", 1.0),), (("b", 1.0),), (("c", 1.0),), (("d", 1.0),), (("a", -0.5),)],
    "some": [(), (("b", 1.0),), (), (("b", 1.0),), (("e", 1.0),)],
    "fused": [(("a", 0.5), ("b", 0.7)), (("d", 1.0), ("e", -1.0), ("c", 0.2)), (), (("a", 0.5), ("b", 0.7)), ()],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mixed_steps_equal_the_modules(bases: dict[str, Path], architecture: str, dtype: str) -> None:
    pair = pair_of(bases[architecture], dtype)
    for seed, (key, rank) in enumerate((("a", 1), ("b", 8), ("c", 64), ("d", 3))):
        pair.place(key, lora(pair.plain, seed, rank))
    pair.place("e", lora(pair.plain, 9, 16, only=("k_proj", "up_proj", "o_proj")))
    base = steps(pair.fused, MIXES["base"])
    for name, parts in MIXES.items():
        got = steps(pair.fused, parts)
        near(got, steps(pair.plain, parts), dtype)
        for row, used in enumerate(parts):  # in the last step each row is one
            if not used:
                assert torch.equal(got[-1][row], base[-1][row]), (name, row)
            else:
                assert (got[-1][row] - base[-1][row]).abs().max() > 0.05


def test_weights_that_differ_from_layer_to_layer(pair: Pair) -> None:
    pair.place("a", lora(pair.plain, 1, 8))
    weight = LayerWeights(1.0, (("layers.0.self_attn.q_proj", 0.0), ("layers.1.mlp", -0.5)))
    parts = [(("a", weight),), (("a", 1.0),), (), (), (("a", 2.0),)]
    near(steps(pair.fused, parts), steps(pair.plain, parts))


def test_an_adapter_in_anothers_place(pair: Pair) -> None:
    """Plans and pools that are kept between steps are not kept when what they stand for changes."""
    parts: list[tuple[Any, ...]] = [(("a", 1.0),), (("a", 1.0),), (), (), ()]
    forms = [lora(pair.plain, seed, 8) for seed in (1, 2)]
    wide = lora(pair.plain, 5, 300)
    seen = []
    for form in (*forms, forms[0]):
        pair.place("a", form)
        pair.place("b", wide)  # the pools grow
        seen.append(steps(pair.fused, parts))
        near(seen[-1], steps(pair.plain, parts))
        pair.remove("a", form)
        pair.remove("b", wide)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True))
    assert not torch.equal(seen[0][0], seen[1][0])


def test_a_mix_that_is_kept_between_steps_sees_what_changed(pair: Pair) -> None:
    mix = AdapterMix(3, [Run(0, 3, (("a", 1.0),))], torch.float32, torch.device("cpu"))
    plan = AttentionPlan(causal=True, segments=(Segment(0, 3, None),))
    for form in (lora(pair.plain, 1, 8), lora(pair.plain, 2, 8), others(pair.plain)["dense"]):
        pair.place("a", form)
        arguments = (torch.arange(20, 23), torch.arange(3), mix, plan)
        with torch.inference_mode():
            states = [
                model.forward(*arguments, logits_at=None, want_hidden=True)[0] for model in (pair.fused, pair.plain)
            ]
        near(states[:1], states[1:])  # type: ignore[arg-type]
        pair.remove("a", form)


def others(model: ServingModel) -> dict[str, ServingForm]:
    """Forms that the kernels do not compute, in the last layer."""
    g = torch.Generator().manual_seed(3)

    def linear(path: str, form: LinearForm) -> dict[str, Any]:
        return {"layers": {f"layers.1.{path}": form}}

    kinds: dict[str, dict[str, Any]] = {
        "input scale": linear("mlp.down_proj", LinearForm(in_scale=torch.rand(128, generator=g))),
        "output scale": linear("self_attn.k_proj", LinearForm(out_scale=torch.rand(32, generator=g))),
        "bias": linear("self_attn.o_proj", LinearForm(bias=torch.randn(64, generator=g))),
        "dense": linear("self_attn.q_proj", LinearForm(dense=torch.randn(64, 64, generator=g) * 0.1)),
        "rotation": linear("mlp.up_proj", LinearForm(rotation=torch.randn(8, 8, 8, generator=g) * 0.3)),
        "turn": linear(
            "self_attn.v_proj",
            LinearForm(turn=Turn(torch.randn(32, generator=g), torch.arange(32).flip(0))),
        ),
        "bottleneck": {
            "bottlenecks": {
                "layers.1.mlp.down_proj": Bottleneck(
                    torch.randn(8, 64, generator=g), None, torch.randn(64, 8, generator=g), None, "relu"
                )
            }
        },
        "norm": {"norms": {"layers.1.input_layernorm": NormForm({"weight": torch.rand(64, generator=g)})}},
        "last norm": {"norms": {"norm": NormForm({"weight": torch.rand(64, generator=g)})}},
        "attention prompt": {
            "attention": {
                1: AttentionPrompt(0.7, torch.randn(4, 2, 16, generator=g), torch.randn(4, 2, 16, generator=g))
            }
        },
        "table": {"tables": {"embed_tokens": TableForm(torch.arange(10, 250), torch.randn(240, 64, generator=g))}},
        "head": {"layers": {"lm_head": LinearForm(LowRank(torch.randn(2, 64), torch.randn(2, 262), 0.5))}},
    }
    return {name: ServingForm(digest=name, manifest=None, **form) for name, form in kinds.items()}  # type: ignore[arg-type]


def test_what_the_kernels_do_not_compute_is_computed_by_the_modules(pair: Pair) -> None:
    pair.place("a", lora(pair.plain, 1, 8))
    base = steps(pair.fused, MIXES["base"])
    called: list[Any] = []
    hooks = [
        layer.register_forward_hook(lambda module, *_: called.append(module))
        for layer in pair.fused.base.backbone.layers  # type: ignore[union-attr]
    ]
    for name, form in others(pair.plain).items():
        pair.place("x", form)
        parts: list[tuple[Any, ...]] = [(("x", 1.0),), (("a", 1.0),), (), (("x", 0.5), ("a", 0.5)), (("x", 1.0),)]
        got = steps(pair.fused, parts)
        near(got, steps(pair.plain, parts))
        assert (got[-1][0] - base[-1][0]).abs().max() > 1e-3, name
        near([got[-1][2]], [base[-1][2]])
        beside: list[tuple[Any, ...]] = [(), (("a", 1.0),), (), (), ()]  # resident, but not in the step
        before = len(called)
        steps(pair.fused, beside)
        assert len(called) == before, name
        pair.remove("x", form)
    for hook in hooks:
        hook.remove()
    last = pair.fused.base.backbone.layers[1]  # type: ignore[index]
    assert called
    assert all(module is last for module in called)


def test_hidden_states_and_virtual_tokens(pair: Pair) -> None:
    from adapterbay.server.mix.context import step_context

    outs = []
    for model in (pair.plain, pair.fused):
        plan = AttentionPlan(causal=True, segments=(Segment(0, 6, None),))
        step_context.virtual = (torch.tensor([0, 1]), torch.ones(2, 64))
        try:
            with torch.inference_mode():
                arguments = (torch.arange(20, 26), torch.arange(6), None, plan)
                hidden, logits = model.forward(*arguments, logits_at=torch.tensor([5]), want_hidden=True)
                states, none = model.forward(*arguments, logits_at=None, want_hidden=True)
        finally:
            step_context.virtual = None
        assert none is None
        assert torch.equal(hidden, states)  # type: ignore[arg-type]
        outs.append([hidden, logits])
    near(outs[0], outs[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_held_once(bases: dict[str, Path], dtype: str) -> None:
    pair = pair_of(bases["qwen2"], dtype)
    storages: dict[int, int] = {}
    for path, layer in pair.fused.sites.linears.items():
        if path == "lm_head":
            continue
        was = pair.plain.sites.linears[path].base_layer
        mine: Any = layer.base_layer
        weight = was.dense() if hasattr(was, "dense") else was.weight
        assert torch.equal(mine.dense() if hasattr(mine, "dense") else mine.weight, weight)
        held: Tensor = getattr(mine, "packed", None) if hasattr(mine, "packed") else mine.weight
        storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    assert pair.fused.fast is not None
    for fused in pair.fused.fast.layers:
        assert isinstance(fused, FastLayer)
        for weight, _ in (fused._qkv, fused._o, fused._gate_up, fused._down):
            assert weight.untyped_storage().data_ptr() in storages
        assert not fused._was
    size = pair.plain.dtype.itemsize
    assert sum(storages.values()) == size * sum(
        a * b for path, (a, b) in pair.plain.sites.shapes().items() if path != "lm_head"
    )


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_base_is_fused(bases: dict[str, Path], quantize: str) -> None:
    """As its modules one by one, up to what a float32 sum in another order moves an input across a step."""
    if not torch.ops.adapterbay.native_int8():
        pytest.skip("this processor has no AVX512-VNNI")
    models = [load(bases["qwen2"], quantize=quantize) for _ in range(2)]
    for model in models:
        assert model.fast is not None
        assert model.fast.fused == 2
        model.sites.place("b", lora(model, 1, 8))
        model.sites.place("e", lora(model, 9, 16))
    models[0].fast = None
    for a, b in zip(*(steps(model, MIXES["some"]) for model in models), strict=True):
        assert (a - b).abs().max() < 0.02 * a.abs().max()


def test_a_layer_that_would_differ_is_computed_by_its_modules(
    bases: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(bases["llama"], mode="off")
    layer: Any = model.base.backbone.layers[1]  # type: ignore[index]
    mlp = layer.mlp
    forward = mlp.forward
    mlp.forward = MethodType(lambda _self, x: forward(x) * 1.01, mlp)
    expected = steps(model, MIXES["base"])
    was = mlp.gate_proj.base_layer
    built = FastPath.build(model)
    assert isinstance(built, FastPath)
    assert built.fused == 1
    assert "layer 1 is not fused" in caplog.text
    assert mlp.gate_proj.base_layer is was
    model.fast = built
    near(steps(model, MIXES["base"]), expected)


def test_compile_off_uses_nothing_of_it(bases: dict[str, Path]) -> None:
    model = load(bases["llama"], mode="off")
    assert model.fast is None
    assert not model.kernels.loaded
