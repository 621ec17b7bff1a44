"""What a folder of PEFT's means on its base, at the edges: tied heads, heads alone, copies, biases, large ranks. What
is served equals the folder as plain PEFT loads it; what is refused is refused for a reason that is true."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Harness, reference_logits
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_zoo import LABELS, load_base, randomize
from safetensors.torch import load_file, save_file
from tiny import END, make_base
from transformers import AutoModelForCausalLM

from adapterbay.registry import Registry
from adapterbay.registry.errors import Rejected, UnsupportedMethod
from adapterbay.server.adapters.forms import ServingForm
from adapterbay.server.requests import Pooling

PROMPT = [7, 10, 20, 30, 9, 50]
ATOL = 2e-5
WEIGHTS = "adapter_model.safetensors"


class Bench:
    """A base with an engine, and adapters that PEFT makes on it."""

    def __init__(self, root: Path, architecture: str, *, tied: bool = False, **settings: Any) -> None:
        self.root, self.base = root, make_base(root / "base", architecture, layers=2)
        if tied:
            model = AutoModelForCausalLM.from_pretrained(self.base)
            model.config.tie_word_embeddings = True
            model.tie_weights()
            model.save_pretrained(self.base)
        self.registry = Registry.open(root / "registry")
        self.harness = Harness(self.base, self.registry, **settings)

    def make(self, name: str, kind: str, task: str = "CAUSAL_LM", *, save: Any = None, **config: Any) -> Path:
        """The folder, with random values in every trained tensor."""
        folder = self.root / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(len(name))
            made = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type=task, **config)
            model = get_peft_model(load_base(self.base, task), made)
            randomize(model, len(name))
            model.save_pretrained(folder, **(save or {}))
        return folder

    def push(self, name: str) -> None:
        self.registry.push(self.root / name, name, base=f"folder:{self.base}")

    def serve(self, name: str, kind: str, task: str = "CAUSAL_LM", **config: Any) -> None:
        """Makes it and brings it into the engine's host memory. Raises what refuses it."""
        folder = self.make(name, kind, task, **config)
        labels = list(LABELS) if task == "SEQ_CLS" else None
        self.registry.push(folder, name, base=f"folder:{self.base}", labels=labels)
        self.harness.load(name)

    def plain(self, name: str, task: str = "CAUSAL_LM") -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(load_base(self.base, task), self.root / name).eval()

    def form(self, name: str) -> ServingForm:
        adapters = self.harness.engine.adapters
        return adapters.memory.form(adapters.resolve(name).digest)

    def check(self, *names: str) -> None:
        """Generates with all of them in one batch, and compares each with PEFT alone."""
        base = load_base(self.base, "CAUSAL_LM")
        answers = {name: self.harness.generate(name, PROMPT, 3) for name in names}
        for name, answer in answers.items():
            tokens = answer.generated().token_ids
            assert answer.request is not None
            got = torch.stack(self.harness.logits[answer.request.id])
            want = reference_logits(self.plain(name), PROMPT, tokens)
            torch.testing.assert_close(got, want, rtol=0, atol=ATOL, msg=lambda text, name=name: f"{name}: {text}")
            assert float((want - reference_logits(base, PROMPT, tokens)).abs().max()) > 100 * ATOL, name

    def check_classes(self, name: str) -> None:
        ids = [*PROMPT, END]
        got = torch.tensor(self.harness.classify(name, ids).classified().logits)
        with torch.no_grad():
            want = self.plain(name, "SEQ_CLS")(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(got, want, rtol=0, atol=ATOL)

    def check_states(self, name: str) -> None:
        got = torch.tensor(self.harness.embed(name, PROMPT, pooling=Pooling.MEAN).wait().values)
        with torch.no_grad():
            want = self.plain(name, "FEATURE_EXTRACTION")(torch.tensor([PROMPT])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(got, want, rtol=0, atol=ATOL)


def _bench(factory: pytest.TempPathFactory, architecture: str, **settings: Any) -> Iterator[Bench]:
    bench = Bench(factory.mktemp(architecture), architecture, **settings)
    with bench.harness:
        yield bench


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from _bench(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from _bench(tmp_path_factory, "llama", tied=True)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from _bench(tmp_path_factory, "t5")


def _push_and_load(bench: Bench, name: str) -> None:
    bench.push(name)
    bench.harness.load(name)


# A head that is tied to the embedding.


@pytest.mark.parametrize(
    ("architecture", "layer", "table"), [("gemma", "q_proj", "embed_tokens"), ("opt", "q_proj", "embed_tokens")]
)
def test_what_peft_ties_is_tied(
    architecture: str, layer: str, table: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for bench in _bench(tmp_path_factory, architecture):
        ways: dict[str, dict[str, Any]] = {
            "saved": {"target_modules": [layer], "modules_to_save": [table]},
            "saved.head": {"target_modules": [layer], "modules_to_save": ["lm_head"]},
            "adapted": {"target_modules": [layer, table]},
            "adapted.head": {"target_modules": [layer, "lm_head"], "alpha_pattern": {"lm_head": 4}},
            "pattern": {"target_modules": f".*({layer}|{table})"},
        }
        for name, config in ways.items():
            bench.serve(name, "LORA", ensure_weight_tying=True, **config)
        bench.serve("apart", "LORA", target_modules=[layer, table])
        bench.check(*ways, "apart")


def test_gpt2_is_not_tied_whatever_the_flag_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    """PEFT knows the names embed_tokens and lm_head alone, and GPT-2's embedding is wte."""
    for bench in _bench(tmp_path_factory, "gpt2"):
        ways: dict[str, dict[str, Any]] = {
            "saved": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
            "saved.head": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
            "adapted": {"target_modules": ["c_attn", "wte"]},
        }
        for name, config in ways.items():
            bench.serve(name, "LORA", ensure_weight_tying=True, **config)
        bench.check(*ways)
        with pytest.raises(Rejected, match="PEFT would ignore them"):
            bench.serve("head", "LORA", ensure_weight_tying=True, target_modules=["c_attn", "lm_head"])


@pytest.mark.parametrize(
    ("kind", "part"), [("saved", "lm_head.weight"), ("adapted", "lm_head.lora_B.weight"), ("adapted", None)]
)
def test_tied_tensors_that_differ_are_refused(tied: Bench, kind: str, part: str | None) -> None:
    name = f"differs.{kind}.{'x' if part is None else 'y'}"
    where: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    if kind == "adapted":
        where = {"target_modules": ["q_proj", "embed_tokens"]}
    folder = tied.make(name, "LORA", ensure_weight_tying=True, **where)
    tensors = load_file(folder / WEIGHTS)
    if part is None:
        tensors = {key: tensor for key, tensor in tensors.items() if "lm_head.lora" not in key}
    else:
        tensors[f"base_model.model.{part}"] += 0.01
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(Rejected, match="tensors differ" if part else "among the tensors"):
        _push_and_load(tied, name)


@pytest.mark.parametrize("init", ["pissa", "kasa"])
def test_a_start_that_changes_a_tied_head_is_refused(tied: Bench, init: str) -> None:
    """PEFT changes the embedding with it."""
    how: dict[str, Any] = {"init_lora_weights": init} if init == "pissa" else {"kasa_config": {}}
    with pytest.raises(UnsupportedMethod, match="the embedding that shares its weight"):
        tied.serve(init, "LORA", target_modules=["q_proj", "lm_head"], save={"save_embedding_layers": False}, **how)


def test_rows_over_rows_are_refused_by_what_peft_does(tied: Bench) -> None:
    tied.make("twice", "TRAINABLE_TOKENS", token_indices=[10, 20], target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(UnsupportedMethod, match="its own model cannot run"):
        tied.push("twice")


# An encoder-decoder's tables.


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("shared", {"modules_to_save": ["shared"]}, "modules_to_save on shared.*no stack.*calls"),
        ("both", {"modules_to_save": ["shared", "lm_head"]}, "modules_to_save on shared.*no stack.*calls"),
        ("tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "on shared.*no stack.*calls"),
        ("stacks", {"modules_to_save": ["embed_tokens"]}, "modules_to_save on decoder.embed_tokens.*no table of rows"),
        ("lora", {"target_modules": ["q", "shared"]}, "LORA on shared.*no stack.*calls"),
        ("bias", {"target_modules": ["q", "relative_attention_bias"]}, "LORA on .*bias.*no table of rows is"),
    ],
)
def test_tables_of_an_encoder_decoder_are_refused(t5: Bench, name: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedMethod, match=reason):
        t5.serve(name, "LORA", "SEQ_2_SEQ_LM", **{"target_modules": ["q"], **config})


def test_all_biases_beside_a_head_of_two_layers(t5: Bench, tmp_path_factory: pytest.TempPathFactory) -> None:
    """PEFT writes the head's biases three times."""
    t5.serve("biased", "LORA", "SEQ_CLS", target_modules=["q"], bias="all", modules_to_save=["classification_head"])
    t5.check_classes("biased")
    for bench in _bench(tmp_path_factory, "roberta"):
        bench.serve("biased", "LORA", "SEQ_CLS", target_modules=["query"], bias="all")
        bench.check_classes("biased")


@pytest.mark.parametrize("architecture", ["electra", "albert"])
def test_a_projection_of_the_embeddings_is_a_linear_layer(
    architecture: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for bench in _bench(tmp_path_factory, architecture):
        bench.serve("all", "LORA", "FEATURE_EXTRACTION", target_modules="all-linear")
        bench.serve("biased", "LORA", "FEATURE_EXTRACTION", target_modules=["query"], bias="all")
        assert any("embedding" in path for path in bench.form("all").layers)
        bench.check_states("all")
        bench.check_states("biased")


# The head alone.

HEAD_ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("VERA", {"r": 4}),
    "loha": ("LOHA", {"r": 4}),
    "ia3": ("IA3", {"feedforward_modules": []}),
    "adalora": ("ADALORA", {"total_step": 9}),
    "boft": ("BOFT", {"boft_block_size": 2}),
    "shira": ("SHIRA", {"r": 2}),
    "hra": ("HRA", {"r": 2}),
    "vblora": ("VBLORA", {"vector_length": 2, "num_vectors": 7}),
    "pissa": ("LORA", {"init_lora_weights": "pissa", "use_rslora": True}),
    "olora": ("LORA", {"init_lora_weights": "olora"}),
    "kasa": ("LORA", {"kasa_config": {}}),
}


def test_every_kind_of_method_on_the_head_alone(llama: Bench) -> None:
    for name, (kind, config) in HEAD_ALONE.items():
        llama.serve(f"head.{name}", kind, target_modules=["lm_head"], **config)
    llama.check(*(f"head.{name}" for name in HEAD_ALONE))


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_changed_head_beside_lora_is_refused(llama: Bench, init: bool | str) -> None:
    name = f"changed.{init}".lower()
    folder = llama.make(name, "LORA", target_modules=["lm_head"], init_lora_weights=init)
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.weight"] += 1e-3
    save_file(tensors, folder / WEIGHTS)
    llama.push(name)
    with pytest.raises(UnsupportedMethod, match="its own lm_head beside LORA on it"):
        llama.harness.load(name)


def test_a_copy_of_fewer_bits_is_the_bases_own(llama: Bench) -> None:
    folder = llama.make("rounded", "LORA", target_modules=["q_proj", "lm_head", "embed_tokens"])
    tensors = load_file(folder / WEIGHTS)
    key = "base_model.model.lm_head.base_layer.weight"
    rounded = tensors[key].bfloat16()
    assert not torch.equal(rounded.float(), tensors[key])
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / WEIGHTS)
    llama.push("rounded")
    llama.harness.load("rounded")
    changed = {name: tensor.bfloat16() for name, tensor in tensors.items()} | {key: (tensors[key] + 0.01).bfloat16()}
    (llama.root / "other").mkdir()
    (llama.root / "other" / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    save_file(changed, llama.root / "other" / WEIGHTS)
    llama.push("other")
    with pytest.raises(UnsupportedMethod, match="its own lm_head"):
        llama.harness.load("other")


# Ranks.


def test_ranks_that_cost_nothing_are_served(llama: Bench) -> None:
    """VeRA's paper has 1024; LoKr's rank is given as a number that no layer reaches, for whole matrices."""
    q = {"target_modules": ["q_proj", "lm_head"]}
    llama.serve("vera.wide", "VERA", r=1024, save_projection=False, **q)
    llama.serve("pvera.wide", "PVERA", r=1024, target_modules=["q_proj"])
    llama.serve("lokr.whole", "LOKR", r=10000, alpha=10000, **q)
    llama.serve("loha.wide", "LOHA", r=600, target_modules=["q_proj"])
    llama.serve("hira.pattern", "HIRA", r=3, rank_pattern={"q_proj": 7}, target_modules=["q_proj", "v_proj"])
    llama.check("vera.wide", "pvera.wide", "lokr.whole", "loha.wide", "hira.pattern")
    factors = llama.form("vera.wide").layers["layers.0.self_attn.q_proj"].low_rank
    assert factors is not None
    assert factors.a.shape[0] == 64


def test_ranks_that_cost_too_much_are_refused(llama: Bench) -> None:
    llama.make("vera.huge", "VERA", r=2**20, target_modules=["q_proj"], save_projection=False)
    llama.make("lora.huge", "LORA", r=513, target_modules=["q_proj"])
    for name, reason in (("vera.huge", "projections of 134217728 values"), ("lora.huge", "over the limit of 512")):
        with pytest.raises(Rejected, match=reason) as caught:
            llama.push(name)
        assert caught.value.reason == "RANK_TOO_LARGE"


def test_methods_of_factors_stay_factors_whatever_their_rank(llama: Bench) -> None:
    """As the table of methods has it: batched with LoRA, and fused by any method."""
    all_of = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    wide = {"delora": 60, "hra": 40, "deft": 50, "psoft": 30, "vera": 200}
    for name, rank in wide.items():
        llama.serve(f"wide.{name}", name.upper(), r=rank, **all_of)
        for layer in llama.form(f"wide.{name}").layers.values():
            assert layer.low_rank is not None
            assert layer.dense is None
    llama.check(*(f"wide.{name}" for name in wide))


def test_ln_tuning_of_a_linear_layer_is_refused_by_name(llama: Bench) -> None:
    llama.make("ln", "LN_TUNING", target_modules=["q_proj"])
    with pytest.raises(UnsupportedMethod, match=r"served on normalization layers, and .*q_proj is none"):
        llama.push("ln")
