"""From files to a form: nothing that PEFT reads is lost on the way, and what cannot be computed with is kept out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft_zoo
import pytest
import torch
from engine_tools import Answer, Harness, held, reference_logits
from safetensors.torch import load_file, save_file
from tiny import load_reference, make_adapter, make_base, peft_model
from torch import Tensor, nn

from adapterbay.registry import Registry
from adapterbay.registry.errors import Rejected, UnsupportedMethod
from adapterbay.server.adapters.finite import finite
from adapterbay.server.adapters.forms import LinearForm, LowRank, ServingForm
from adapterbay.server.convert import read
from adapterbay.server.convert.direct import _boft
from adapterbay.server.convert.effect import has_effect, negligible
from adapterbay.server.convert.layers import LayerReader
from adapterbay.server.convert.lora import dora_form
from adapterbay.server.convert.read import read_layers
from adapterbay.server.convert.tree import peft_root, view_of

PROMPT = [7, 10, 20, 30, 9, 50]
ATOL = 1e-4


class Bench:
    """A base and what is made for it."""

    def __init__(self, root: Path, architecture: str) -> None:
        self.root = root
        self.base = make_base(root / "base", architecture, layers=2)
        self.registry = Registry.open(root / "registry")

    def push(self, name: str, folder: Path, **settings: Any) -> Path:
        self.registry.push(folder, name, base=f"folder:{self.base}", **settings)
        return folder

    def add(self, name: str, method: str, labels: list[str] | None = None, **settings: Any) -> Path:
        return self.push(name, peft_zoo.make(self.base, self.root / name, method, settings=settings), labels=labels)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("llama"), "llama")


# Nothing is lost.


def test_a_site_that_has_no_place_here_is_an_error_that_names_it(
    llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama.add("lost", "oft", target_modules=["q_proj", "embed_tokens"])
    gpt2 = Bench(tmp_path, "gpt2")
    gpt2.add("positions", "tinylora", target_modules=["c_proj", "wpe"])
    with Harness(gpt2.base, gpt2.registry) as harness, pytest.raises(UnsupportedMethod, match=r"wpe is not the input"):
        harness.generate("positions", PROMPT, 1).wait()
    monkeypatch.setattr(read, "read_table", lambda *_: None)
    with (
        Harness(llama.base, llama.registry) as harness,
        pytest.raises(UnsupportedMethod, match=r"embed_tokens is not served"),
    ):
        harness.generate("lost", PROMPT, 1).wait()


def test_a_layer_without_effect_is_no_lost_one(llama: Bench) -> None:
    folder = peft_zoo.make(llama.base, llama.root / "half", "loha")
    tensors = load_file(folder / "adapter_model.safetensors")
    still = [key for key in tensors if ".0.self_attn.q_proj.hada_w1_a" in key]
    assert len(still) == 1
    save_file(tensors | {still[0]: torch.zeros_like(tensors[still[0]])}, folder / "adapter_model.safetensors")
    llama.push("half", folder)
    with Harness(llama.base, llama.registry) as harness:
        compare(harness, "half", peft_zoo.load(llama.base, folder, "loha"))
        form = harness.engine.adapters.memory.form(harness.engine.adapters.resolve("half").digest)
        assert form is not None
        assert "layers.0.self_attn.q_proj" not in form.layers
        assert "layers.1.self_attn.q_proj" in form.layers


def test_an_encoders_pooler_is_adapted_by_any_method(tmp_path: Path) -> None:
    """IA³ is read by PEFT over our tree, LoRA without it; both reach the pooler behind which BERT's labels are."""
    bench = Bench(tmp_path, "bert")
    labels = list(peft_zoo.LABELS)
    places = {"target_modules": ["query", "pooler.dense"]}
    bench.add("ia3", "ia3_classifier", labels, **places, feedforward_modules=[])
    bench.add("lora", "lora_classifier", labels, **places)
    with Harness(bench.base, bench.registry) as harness:
        for name in ("ia3", "lora"):
            got = torch.tensor(harness.classify(name, PROMPT).classified().logits)
            model = peft_zoo.load(bench.base, tmp_path / name, f"{name}_classifier")
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([PROMPT])).logits[0]
                for key, parameter in model.named_parameters():
                    if "pooler" in key and ("ia3_l" in key or "lora_B" in key):
                        parameter.fill_(1.0 if name == "ia3" else 0.0)
                without = model(input_ids=torch.tensor([PROMPT])).logits[0]
            torch.testing.assert_close(got, expected, rtol=0, atol=ATOL)
            assert float((without - expected).abs().max()) > 100 * ATOL


def test_rows_of_a_tied_head_and_a_lora_on_it_are_summed(tmp_path: Path) -> None:
    """Gemma's head shares the embedding. PEFT puts the LoRA around the head with its rows replaced."""
    bench = Bench(tmp_path, "gemma")
    tokens = {"trainable_token_indices": [10, 20]}
    settings: dict[str, dict[str, Any]] = {
        "both": {"targets": ["q_proj", "lm_head"], "settings": tokens},
        "biased": {"targets": ["lm_head"], "settings": tokens | {"lora_bias": True}},
        "rows": {"targets": ["q_proj"], "settings": {"trainable_token_indices": {"lm_head": [10, 20]}}},
        "dora": {"targets": ["q_proj", "lm_head"], "settings": tokens | {"use_dora": True}},
    }
    for name, each in settings.items():
        folder = make_adapter(bench.base, tmp_path / name, **each, seed=3)
        tensors = load_file(folder / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(5)
        for key, tensor in tensors.items():
            if "trainable_tokens" in key:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            if key.endswith("lora_B.bias"):
                tensor.add_(torch.randn(tensor.shape, generator=generator))
        save_file(tensors, folder / "adapter_model.safetensors")
        bench.push(name, folder)
    for name, target in (("table", "embed_tokens"), ("head", "lm_head")):
        bench.add(name, "trainable_tokens", target_modules=[target])
    with Harness(bench.base, bench.registry) as harness:
        for name in ("both", "biased", "rows", "table", "head"):
            compare(harness, name, peft_model(bench.base, tmp_path / name))
        with pytest.raises(UnsupportedMethod, match="Trained tokens on a language-model head"):
            harness.generate("dora", PROMPT, 1).wait()


def compare(harness: Harness, name: str, model: Any) -> None:
    """Each logit of a row under an adapter against PEFT alone."""
    check(harness, harness.generate(name, PROMPT, 4), model)


def check(harness: Harness, answer: Answer, model: Any) -> None:
    tokens = answer.generated().token_ids
    assert answer.request is not None
    got = torch.stack(harness.logits[answer.request.id])
    torch.testing.assert_close(got, reference_logits(model, PROMPT, tokens), rtol=0, atol=ATOL)


# What cannot be computed with.


def test_an_infinity_that_only_the_base_brings_out_reaches_nobody(llama: Bench) -> None:
    """A magnitude that float32 holds, over a norm below 1, is none that it holds: admission cannot see that."""
    good = llama.add("good", "dora")
    folder = peft_zoo.make(llama.base, llama.root / "bad", "dora", seed=2)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "magnitude" in key:
            tensor.fill_(3.3e38)
    save_file(tensors, folder / "adapter_model.safetensors")
    llama.push("bad", folder)
    model = peft_zoo.load(llama.base, good, "dora")
    with Harness(llama.base, llama.registry) as harness:
        for ask in (lambda: harness.load("bad"), lambda: harness.generate("bad", PROMPT, 4).wait()):
            with pytest.raises(Rejected, match="adapter gives layers") as caught:
                ask()
            assert caught.value.reason == "NOT_FINITE"
        with held(harness.engine):  # one batch
            answers = [harness.generate(name, PROMPT, 4) for name in ("good", "bad", "good")]
        for answer in answers[::2]:
            check(harness, answer, model)
        with pytest.raises(Rejected):
            answers[1].wait()


def test_what_a_file_holds_is_looked_at_again_for_halves(llama: Bench) -> None:
    """Admission finds it finite in bfloat16, which a base in float16 is not wide enough for."""
    folder = llama.add("large", "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    next(tensor for key, tensor in sorted(tensors.items()) if "lora_A" in key)[0, 0] = 7e4
    save_file(tensors, folder / "adapter_model.safetensors")
    llama.push("large", folder)
    for dtype in ("float32", "bfloat16"):
        with Harness(llama.base, llama.registry, dtype=dtype) as harness:
            harness.load("large")
    with Harness(llama.base, llama.registry, dtype="float16") as harness:
        with pytest.raises(Rejected, match="base's float16") as caught:
            harness.load("large")
        assert caught.value.reason == "NOT_FINITE"


def test_what_is_finite_depends_on_the_bases_dtype() -> None:
    for value, halves in ((7e4, False), (65519.0, True), (-7e4, False), (float("nan"), False), (1.0, True)):
        tensor = torch.tensor([[0.0, value], [1.0, 2.0]])
        assert finite(tensor, torch.float16) is halves
        assert finite(tensor, torch.float32) is not tensor.isnan().any().item()
    assert finite(torch.tensor([3.4e38]), torch.float32)
    assert not finite(torch.tensor([3.4e38]), torch.bfloat16)
    assert finite(torch.tensor([2**62]), torch.float16), "indices are no numbers to compute with"
    assert finite(torch.zeros(0, 4), torch.float16)


@pytest.mark.parametrize(
    "config",
    [
        {"init_r": 4, "rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": 7}},
        {"init_r": 4, "rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 9}},
        {"init_r": 4, "rank_pattern": {"model.layers.7.self_attn.q_proj.lora_E": [True]}},
    ],
)
def test_what_peft_trips_over_is_a_mistake_of_the_adapter(llama: Bench, config: Mapping[str, Any]) -> None:
    """Whatever Python raises inside PEFT for a config that does not fit its tensors."""
    model = load_reference(llama.base)
    root = peft_root(model, model.model, "model", prefixed=True, head=True)
    settings = {"peft_type": "ADALORA", "target_modules": ["q_proj"], "total_step": 10, "task_type": "CAUSAL_LM"}
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_E": torch.ones(4, 1)}
    with pytest.raises((Rejected, UnsupportedMethod), match="ADALORA"):
        read_layers(root, settings | dict(config), tensors, torch.float32)


# What has an effect.


def form_of(layer: LinearForm) -> ServingForm:
    return ServingForm("d", None, layers={"q": layer})  # type: ignore[arg-type]


def test_a_small_effect_is_one_and_rounding_is_none() -> None:
    tiny = torch.full((4, 4), 1e-9)
    for layer in (LinearForm(dense=tiny), LinearForm(bias=tiny[0]), LinearForm(low_rank=LowRank(tiny, tiny, 1.0))):
        assert has_effect(form_of(layer), None)  # type: ignore[arg-type]
    assert not has_effect(form_of(LinearForm(dense=0 * tiny, bias=0 * tiny[0])), None)  # type: ignore[arg-type]
    torch.manual_seed(0)
    a, b, weight, bias = torch.randn(2, 48), torch.zeros(40, 2), torch.randn(40, 48), torch.randn(40)
    magnitude = torch.linalg.norm(weight.double(), dim=1).float() * (1 + 1e-7)
    untrained = dora_form(a, b, 2.0, magnitude, weight, bias)
    assert not has_effect(form_of(untrained), None)  # type: ignore[arg-type]
    for broken in (float("inf"), float("nan")):
        assert not negligible(torch.tensor([broken]), torch.tensor([broken]))
    trained = dora_form(a, b, 2.0, magnitude * torch.linspace(1, 1.001, 40), weight, bias)
    assert has_effect(form_of(trained), None)  # type: ignore[arg-type]


def test_rotations_by_nothing_leave_no_noise() -> None:
    class Turned:
        def get_delta_weight(self, _: str) -> tuple[Tensor, Tensor]:
            return torch.eye(48) + 1e-8 * torch.randn(48, 48), torch.ones(40, 1)

    assert _boft(Turned(), torch.randn(40, 48)) == LinearForm()


class Adding(nn.Module):
    """A layer as PEFT has them: `said` is what it would merge, `done` what it adds. `sides` of both may differ."""

    def __init__(self, view: nn.Module, said: Tensor | None, done: Tensor) -> None:
        super().__init__()
        self.view, self.said, self.done, self.asked = view, said, done, 0

    def get_delta_weight(self, _: str) -> Tensor:
        self.asked += 1
        if self.said is None:
            raise NotImplementedError
        return self.said

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.view(x) + x @ self.done.t()
        return result


def test_a_layer_is_checked_by_the_size_of_what_it_gives() -> None:
    """A base with small weights, whose outputs are far below 1: a delta that is not what the layer adds is noticed."""
    torch.manual_seed(0)
    view = view_of(nn.Linear(48, 40))
    with torch.no_grad():
        for parameter in view._layer[0].parameters():
            parameter.mul_(1e-5)
        said, done = 1e-6 * torch.randn(40, 48), 1e-6 * torch.randn(40, 48)
        form = LayerReader("LOKR", torch.float32).read(Adding(view, said, done), view, "q")
    assert form.dense is not None
    torch.testing.assert_close(form.dense, done, rtol=0, atol=1e-9)


def test_a_method_without_a_delta_is_asked_for_it_once() -> None:
    reader = LayerReader("MISS", torch.float32)
    view = view_of(nn.Linear(48, 40))
    layers = [Adding(view, None, torch.randn(40, 48)) for _ in range(3)]
    with torch.no_grad():
        for layer in layers:
            reader.read(layer, view, "q")
    assert [layer.asked for layer in layers] == [1, 0, 0]


def test_layers_that_overflow_while_they_are_read_are_refused() -> None:
    view = view_of(nn.Linear(48, 40))
    with torch.no_grad(), pytest.raises(Rejected) as caught:
        LayerReader("LOKR", torch.float32).read(Adding(view, None, torch.full((40, 48), 1e38)), view, "q")
    assert caught.value.reason == "NOT_FINITE"
