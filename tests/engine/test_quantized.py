"""`--quantize int8` and `int4` on a CPU: what is served equals plain PEFT on the same quantized base.

The reference is a folder with the weights that the kernels compute with (`dense()`), loaded by plain transformers and
PEFT in float32. The kernels also round a layer's inputs to eight bits, each 32 neighbours with a scale of their own.
So there are two comparisons. Against PEFT with inputs rounded in the same way, most rows are within 1e-4 of the largest
logit (measured: 1e-6), and none is off by more than 1 %: a last bit that differs in a float32 sum can move an input by
a whole step (measured: 0.4 %). Against PEFT as it is, 4 %, which is what rounded inputs cost on these random bases,
whose weights are large (measured: 3 %; the weights in four bits alone cost 14 to 49 %).

In bfloat16 no two ways to compute agree so closely. A rounding to eight significant bits is off by 2^-8 / √6 = 0.16 %
(root mean square), and some 35 lie on the way through three layers: √35 · 0.16 % = 0.9 %. Inputs that are off by so
much fall to another of 127 steps now and then, which is 0.5 % at each of 12 inputs, 1.6 %. Together 1.9 % of the
logits' spread, and the layers between make it 1.5 to 3.3 % (measured on 64 rows: four seeds of both bases and kinds).
Of the largest logit it is 4.8 % at most; the limit is 6 %. That alone would let small mistakes pass, so PEFT in
bfloat16 with the same rounded inputs is measured, too: both are as far from float32, ours 0.86 to 1.24 of PEFT's by row
and 0.92 to 1.10 by batch. The limits are 1.5 and 1.25. Scales that are wrong by 1 % in all layers give 1.7, and by 5 %
in one 1.9.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import peft_zoo
import pytest
import torch
from engine_tools import Answer, Harness, held, reference_logits
from method_tools import Shelf, fill
from peft import PeftModel
from tiny import TARGETS, load_reference, make_base
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import Zoo

from adapterbay.base.load import load_base, pick_quantization
from adapterbay.registry import Registry
from adapterbay.registry.errors import AdapterbayError, InvalidArgument, Unavailable
from adapterbay.server import fewer_bits
from adapterbay.server.config import ServerConfig
from adapterbay.server.kernels import loader
from adapterbay.server.kernels.quantized import Int4Linear, Int8Linear
from adapterbay.server.model import ServingModel
from adapterbay.server.requests import Pooling

KINDS = {"int8": Int8Linear, "int4": Int4Linear}
METHODS = ("lora", "dora", "pissa", "ia3", "vera", "oft", "hra", "loha", "randlora", "prompt_tuning", "lora_classifier")
ROUNDING = ("lora", "dora", "ia3", "vera", "lora_classifier")
"""Methods whose layers call the base's own, so that the reference can round its inputs."""
FEW = ("lora", "dora", "ia3", "hra", "lora_classifier")
EQUAL, STEPS, ROUNDED, BFLOAT16 = 1e-4, 1e-2, 4e-2, 6e-2
"""Of the largest logit."""


def prompt(index: int) -> list[int]:
    return torch.randint(6, 262, (9 + index,), generator=torch.Generator().manual_seed(index)).tolist()


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that are quantized, by name."""
    kept = ("lm_head", "score", "classifier", "pooler")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not any(part in kept for part in name.split("."))
    }


def dequantized(base: Path, folder: Path, quantize: str, task: str) -> Path:
    """The base once more, with the weights that the kernels compute with."""
    model = load_reference(base, "FEATURE_EXTRACTION" if task == "SEQ_CLS" else task)
    for layer in linears(model).values():
        dense = KINDS[quantize].of(layer).dense()
        layer.weight.data = (dense.t() if isinstance(layer, Conv1D) else dense).contiguous()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


def eight_bits(x: Tensor) -> Tensor:
    """`x` [..., in] rounded as the kernels round it, each 32 neighbours with a scale of their own."""
    groups = x.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round().nan_to_num(0) * scale).flatten(-2)


def round_inputs(model: nn.Module, names: Collection[str]) -> None:
    """Has the base's own layers compute with inputs of eight bits."""

    def rounded(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (eight_bits(inputs[0]),)

    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(name.removesuffix(".base_layer").endswith(f".{wanted}") for wanted in names)
    }
    assert len(found) == len(names)
    for module in found.values():
        module.register_forward_pre_hook(rounded)


def reference(model: Any, ids: list[int], name: str, task: str) -> Tensor:
    """Logits of a label or of the next token, or the mean of an encoder's states."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), **peft_zoo.inputs(name))
    if task == "FEATURE_EXTRACTION":
        mean: Tensor = out.last_hidden_state[0, -len(ids) :].mean(0)
        return mean
    found: Tensor = out.logits[0]
    return found if task == "SEQ_CLS" else found[-1]


def ask(harness: Harness, name: str, ids: list[int], task: str) -> Answer:
    if task == "SEQ_CLS":
        return harness.classify(name, ids)
    if task == "FEATURE_EXTRACTION":
        return harness.embed(name, ids, pooling=Pooling.MEAN)
    return harness.generate(name, ids, 1)


def served(harness: Harness, answer: Answer, task: str) -> Tensor:
    result = answer.wait()
    if task == "CAUSAL_LM":
        assert answer.request is not None
        return harness.logits[answer.request.id][0]
    return torch.tensor(result.logits if task == "SEQ_CLS" else result.values)


@pytest.mark.parametrize(
    ("architecture", "quantize", "mode"),
    [
        ("llama", "int8", "auto"),
        ("llama", "int4", "auto"),
        ("gpt2", "int8", "auto"),
        ("bert", "int8", "auto"),
        ("llama", "int8", "off"),
        ("gpt2", "int4", "off"),
        ("bert", "int8", "off"),
    ],
)
def test_served_is_peft_on_the_same_quantized_base(architecture: str, quantize: str, mode: str, tmp_path: Path) -> None:
    """One mixed batch; over the fused path (llama), GPT-2's transposed layers, and an encoder; with the kernels where
    they can be had, and by torch's own operations."""
    shelf: Shelf = fill(tmp_path, architecture, only=METHODS if mode == "auto" else FEW)
    texts = {name: prompt(index) for index, name in enumerate(shelf.folders)}
    tasks = {name: shelf.recipe(name).task for name in texts}
    base = dequantized(shelf.base, tmp_path / "dequantized", quantize, shelf.task)
    names = linears(load_reference(base, "FEATURE_EXTRACTION"))
    settings = {"quantize": quantize, "compile": mode}
    with Harness(shelf.base, shelf.registry, max_rows=32, step_tokens=1024, **settings) as harness:
        assert harness.engine.base.quantization == quantize
        assert mode != "off" or harness.engine.kernels == "off (switched off)"
        harness.load(*texts)
        with held(harness.engine):
            answers = {name: ask(harness, name, ids, tasks[name]) for name, ids in texts.items()}
        wrong, rounded = {}, []
        for name, answer in answers.items():
            got = served(harness, answer, tasks[name])
            model = peft_zoo.load(base, shelf.folders[name], name)
            whole = reference(peft_zoo.load(shelf.base, shelf.folders[name], name), texts[name], name, tasks[name])
            far = {
                "whole base": apart(got, whole),
                "plain": apart(got, reference(model, texts[name], name, tasks[name])),
            }
            if name in ROUNDING:
                round_inputs(model, names)
                far["rounded"] = apart(got, reference(model, texts[name], name, tasks[name]))
            assert quantize != "int4" or far["whole base"] > 2 * ROUNDED, f"{name}: this is no quantized base"
            if far["plain"] > ROUNDED or far.get("rounded", 0) > STEPS:
                wrong[name] = far
            rounded.extend([far["rounded"]] if "rounded" in far else [])
        assert not wrong
        assert sorted(rounded)[len(rounded) // 2] < EQUAL


def apart(one: Tensor, other: Tensor) -> float:
    """Of the largest value."""
    assert one.shape == other.shape
    return float((one.float() - other).abs().max() / other.abs().max())


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A base and LoRAs of three ranks on all of its layers."""
    return make_ranks(tmp_path_factory.mktemp(request.param), request.param)


def make_ranks(root: Path, architecture: str, seed: int = 0) -> Zoo:
    zoo = Zoo(make_base(root / "base", architecture, seed=seed), Registry.open(root / "registry"))
    for rank in (2, 8, 32):
        scale = 0.5 * (8 / rank) ** 0.25
        zoo.add(f"r{rank}", root / f"r{rank}", targets=TARGETS["llama"][1], rank=rank, seed=seed, scale=scale)
    return zoo


def in_sixteen_bits(base: Path, folder: Path | None, quantize: str | None, dtype: torch.dtype, *, exact: bool) -> Any:
    """PEFT over the base with its parameters, and the adapter's, rounded to `dtype`, and the weights that the kernels
    make of those. All is computed in `dtype` but the sums of a base's product; `exact`: in float32."""
    model: Any = load_reference(base)
    layers = list(linears(model).values())
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for layer in layers:
        layer.forward = partial(_product, layer, None if quantize is None else KINDS[quantize].of(layer).dense())
    if exact:
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    return model


def _product(layer: nn.Linear, dense: Tensor | None, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    if dense is None:
        return nn.functional.linear(x.float(), layer.weight.float(), bias).to(x)
    return nn.functional.linear(eight_bits(x.float()), dense, bias).to(x)


def spread(one: Tensor, other: Tensor) -> float:
    """The mean error of logits [tokens, vocabulary], as a share of their own spread (root mean squares)."""
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


def compare_ranks(
    zoo: Zoo, quantize: str, dtype: str = "bfloat16", mode: str = "auto"
) -> dict[str | None, tuple[float, float, float, float]]:
    """By arm: how far what is served is from the exact reference in the mean and at most, how far the reference in
    `dtype` is, and how far the exact one of the whole base."""
    arms: list[str | None] = [*zoo.folders, None]
    found = {}
    with Harness(zoo.base, zoo.registry, dtype=dtype, quantize=quantize, compile=mode) as harness:
        assert harness.engine.base.quantization == quantize
        harness.load(*zoo.folders)
        with held(harness.engine):
            answers = [harness.generate(arm, prompt(10 + at), 8) for at, arm in enumerate(arms)]
        for at, (arm, answer) in enumerate(zip(arms, answers, strict=True)):
            tokens = answer.generated().token_ids
            folder = None if arm is None else zoo.folders[arm]
            exact, coarse, whole = (
                reference_logits(
                    in_sixteen_bits(zoo.base, folder, bits, getattr(torch, dtype), exact=alike), prompt(10 + at), tokens
                )
                for bits, alike in ((quantize, True), (quantize, False), (None, True))
            )
            assert answer.request is not None
            got = torch.stack(harness.logits[answer.request.id])
            found[arm] = (spread(got, exact), apart(got, exact), spread(coarse, exact), spread(whole, exact))
        assert max(harness.step_sizes) == len(arms)
    return found


@pytest.mark.parametrize("quantize", KINDS)
def test_a_bfloat16_base_is_as_near_as_bfloat16_lets_it(ranks: Zoo, quantize: str) -> None:
    """LoRAs of three ranks and the base in one batch, eight tokens each; see above for what is compared."""
    near_enough(compare_ranks(ranks, quantize), quantize)


@pytest.mark.parametrize(("quantize", "dtype"), [("int8", "float16"), ("int4", "float16"), ("int4", "bfloat16")])
def test_so_is_one_that_torch_computes(
    quantize: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernels do not compute in float16, whether they are there or not; in bfloat16 they are switched off."""
    zoo = make_ranks(tmp_path, "llama")
    near_enough(compare_ranks(zoo, quantize, dtype, "off" if dtype == "bfloat16" else "auto"), quantize)
    assert "many times slower" in caplog.text


def near_enough(found: dict[str | None, tuple[float, float, float, float]], quantize: str) -> None:
    for arm, (mean, most, alike, whole) in found.items():
        assert most < BFLOAT16, arm
        assert mean < 1.5 * alike, arm
        assert quantize != "int4" or whole > 4 * mean, f"{arm}: this is no quantized base"
    ours, theirs = (sum(each[at] ** 2 for each in found.values()) for at in (0, 2))
    assert ours < 1.25**2 * theirs


def test_a_tied_head_has_eight_bits_and_its_adapters_are_peft_s(tmp_path: Path) -> None:
    """The reference has the dequantized weight in the head and the whole one in the embedding. Trained tokens are the
    adapter's own rows in both, whatever the base's are; a copy of the whole head beside a LoRA is recognized."""
    base = tmp_path / "base"
    make_base(base, "llama")
    model = load_reference(base)
    model.resize_token_embeddings(272)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    shelf = Shelf(base, Registry.open(tmp_path / "registry"))
    names = ("lora", "trainable_tokens", "lora_lm_head", "lora_embedding")
    for name in names:
        shelf.folders[name] = peft_zoo.make(base, tmp_path / name, name, seed=1)
        shelf.registry.push(shelf.folders[name], name, base=f"folder:{base}")
    quantized = dequantized(base, tmp_path / "dequantized", "int4", "CAUSAL_LM")
    texts = {name: [10, 20, 30, *prompt(index)] for index, name in enumerate(names)}
    with Harness(base, shelf.registry, quantize="int4", max_rows=8) as harness:
        head = harness.engine._model.sites.linears["lm_head"].base_layer
        assert type(head) is Int8Linear
        answers = {name: harness.generate(name, ids, 1) for name, ids in texts.items()}
        for name, answer in answers.items():
            got = served(harness, answer, "CAUSAL_LM")
            model = peft_zoo.load(quantized, shelf.folders[name], name)
            own = [
                m
                for n, m in model.named_modules()
                if isinstance(m, nn.Linear) and n.endswith(("lm_head", "lm_head.base_layer"))
            ]
            assert len(own) == 1
            own[0].weight = nn.Parameter(head.dense(), requires_grad=False)
            round_inputs(model, [*linears(load_reference(base, "FEATURE_EXTRACTION")), "lm_head"])
            expected = reference(model, texts[name], name, "CAUSAL_LM")
            assert apart(got, expected) < STEPS, name
        adapters = harness.engine.adapters
        form = adapters.memory.form(adapters.resolve("trainable_tokens").digest)
        (rows,) = form.tables.values()
        change = form.layers["lm_head"].low_rank
        assert rows.tokens is not None
        assert rows.rows is not None
        assert change is not None
        assert (head.dense()[rows.tokens] + change.scaling * change.a - rows.rows).abs().max() < 1e-6


def test_what_cannot_be_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(make_base(tmp_path, "llama", layers=1))

    def refused(error: type[AdapterbayError], match: str, **settings: Any) -> None:
        with pytest.raises(error, match=match):
            ServingModel.load(ServerConfig(base=base, device="cpu", **{"dtype": "float32", **settings}))

    refused(InvalidArgument, "not float16", quantize="int4", dtype="float16", compile="on")
    refused(InvalidArgument, "int3", quantize="int3")
    with pytest.raises(InvalidArgument, match="int8-bnb"):
        load_base(base, quantize="int8", device="cpu")
    with pytest.raises(InvalidArgument, match="nf4"):
        pick_quantization("int4", torch.device("cuda"))
    assert pick_quantization("int8", torch.device("cuda")) == "int8"
    monkeypatch.setattr(loader, "_state", None)
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    refused(Unavailable, "no C.. compiler.*--compile off", quantize="int4", compile="on")


def test_without_a_compiler_it_is_served_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And with the kernels as plain loops, for a processor without AVX512-VNNI, that is said, too."""
    base = make_base(tmp_path / "base", "llama", layers=1)
    if loader.load("auto").loaded:
        monkeypatch.setattr(fewer_bits, "native", lambda: False)
        assert load(base).kernels.loaded
        assert "no AVX512-VNNI" in caplog.text
    monkeypatch.setattr(loader, "_state", None)
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    caplog.clear()
    model = load(base)
    assert not model.kernels.loaded
    assert model.base.info.quantization == "int8"
    assert "no C++ compiler" in caplog.text
    assert "many times slower" in caplog.text
    assert "int8-bnb" in caplog.text


def test_layers_that_do_not_fit_stay_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Inputs must be a multiple of 32. Of a hidden size of 80 only the MLP's 160 are one, of 72 none is."""
    with pytest.raises(InvalidArgument, match="No layer"):
        load(make_base(tmp_path / "none", "gpt2", hidden=72, layers=1))
    with caplog.at_level(logging.WARNING):
        model = load(make_base(tmp_path / "some", "gpt2", hidden=80, layers=1))
    assert "3 layers stay whole" in caplog.text
    kinds = {path: type(layer.base_layer) for path, layer in model.sites.linears.items()}
    assert [path for path, kind in kinds.items() if kind is Int8Linear] == ["h.0.mlp.c_proj"]


def load(base: Path) -> ServingModel:
    return ServingModel.load(ServerConfig(base=str(base), device="cpu", dtype="float32", quantize="int8"))


def test_memory_is_that_of_the_bits(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", layers=1)
    held = {}
    for quantize in ("none", "int8", "int4"):
        model = ServingModel.load(ServerConfig(base=str(base), device="cpu", dtype="float32", quantize=quantize))
        held[quantize] = model.base.info.bytes
    weights = sum(layer.weight.numel() for layer in linears(load_reference(base)).values())  # type: ignore[operator,union-attr]
    assert held["none"] - held["int4"] == weights * 4 - weights * 5 // 8
    assert weights * 2.8 < held["none"] - held["int8"] < weights * 3
