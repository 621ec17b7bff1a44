"""Bottleneck adapters trained, pushed and served: what the server answers is what our torch module computes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import Harness
from safetensors.torch import load_file
from tiny import make_base
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from adapterbay.base.bottleneck import load
from adapterbay.base.text import encode_text, load_tokenizer
from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument
from adapterbay.trainer import parse_config, run
from adapterbay.trainer.data import Labelled, prepare

from .conftest import Configure

ATOL = 1e-4
SHORT = {"epochs": 8, "batch_size": 8, "learning_rate": 1e-2, "evaluate": "end"}
MINIMAL = {"task": "sequence-classification", "output": "out", "data": {"source": "rows.csv"}}


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with weights large enough that its frozen layers pass on what they read."""
    return make_base(tmp_path_factory.mktemp("llama") / "base", "llama", layers=2)


@pytest.mark.parametrize(("kind", "preset"), [("llama", "pfeiffer"), ("bert", "houlsby")])
def test_a_trained_classifier_is_served_beside_a_lora(
    kind: str, preset: str, configure: Configure, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bert = kind == "bert"
    base = make_base(tmp_path / "bert", "bert", layers=2) if bert else request.getfixturevalue("llama_base")
    method = {"name": "bottleneck", "preset": preset, "reduction_factor": 4}
    optimization = SHORT | ({"max_steps": 6} if bert else {})
    config = configure(base, method=method, optimization=optimization, data={"train_samples": None, "eval_samples": 20})
    result = run(config)
    # A random BERT's frozen attention lets too little through to the first token for anything to be learned.
    assert bert or result.metrics["accuracy"] > max(0.8, result.metrics["majority_accuracy"])
    weights = load_file(result.output / "adapter_model.safetensors")
    assert result.training_record["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    adapter = json.loads((result.output / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["reduction_factor"]) == ("BOTTLENECK", 4)
    assert adapter["non_linearity"] == ("swish" if bert else "relu")
    assert adapter["modules_to_save"] == ["classifier", "score"]
    assert f"bottleneck adapter ({preset}" in (result.output / "README.md").read_text()
    lora = run(configure(base, output=str(tmp_path / "lora"), optimization={"max_steps": 2}))

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    alone = load(result.output, model).eval()
    registry = Registry.open(tmp_path / "registry")
    registry.push(result.output, "bottleneck")
    registry.push(lora.output, "lora")
    tokenizer = load_tokenizer(base)
    rows = [row for row in prepare(config).evaluation if isinstance(row, Labelled)]
    right = 0
    with Harness(base, registry) as harness:
        harness.load("bottleneck", "lora")
        texts = [encode_text(tokenizer, row.text) for row in rows]
        answers = [harness.classify("bottleneck", ids) for ids in texts]
        others = [harness.classify("lora", ids) for ids in texts]
        for row, ids, answer in zip(rows, texts, answers, strict=True):
            with torch.no_grad():
                expected = alone(input_ids=torch.tensor([ids])).logits[0]
            assert (torch.tensor(answer.wait().logits) - expected).abs().max() < ATOL
            right += int(expected.argmax()) == row.label
        for answer in others:
            answer.wait()
    assert right / len(rows) == pytest.approx(result.metrics["accuracy"])


def test_a_trained_language_model_is_served(configure: Configure, llama_base: Path, tmp_path: Path) -> None:
    config = configure(
        llama_base,
        task="causal-lm",
        data={"prompt_template": "Write a {label} review.", "completion_template": "{text}"},
        method={"name": "bottleneck", "reduction_factor": 4},
        optimization=SHORT | {"epochs": 4},
    )
    result = run(config)
    assert result.metrics["perplexity"] < 0.5 * result.metrics["base_perplexity"]
    adapter = json.loads((result.output / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["mlp.down_proj"]
    alone = load(result.output, AutoModelForCausalLM.from_pretrained(llama_base, dtype=torch.float32)).eval()
    registry = Registry.open(tmp_path / "registry")
    registry.push(result.output, "critic")
    ids = encode_text(load_tokenizer(llama_base), "a warm film")
    with Harness(llama_base, registry) as harness:
        harness.load("critic")
        mine, bare = harness.generate("critic", ids, 4), harness.generate(None, ids, 4)
        token_ids = mine.wait().token_ids
        bare.wait()
        assert mine.request is not None
        got = torch.stack(harness.logits[mine.request.id])
    with torch.no_grad():
        expected = alone(input_ids=torch.tensor([[*ids, *token_ids[:-1]]])).logits[0][-4:]
    assert (got - expected).abs().max() < ATOL


def test_named_modules(configure: Configure, gpt2_base: Path) -> None:
    method = {"name": "bottleneck", "behind": "attn.c_proj", "non_linearity": "gelu", "layer_norm_before": True}
    result = run(configure(gpt2_base, method=method, optimization={"max_steps": 2}))
    names = load_file(result.output / "adapter_model.safetensors")
    assert {name.partition(".adapter_")[0].rpartition("h.")[2] for name in names if "adapter_" in name} == {
        "0.attn.c_proj",
        "1.attn.c_proj",
    }
    assert sum("adapter_norm" in name for name in names) == 4
    with pytest.raises(
        InvalidArgument, match=r"method\.behind: o_proj matches no linear module of this base; it has c_"
    ):
        run(configure(gpt2_base, method={"name": "bottleneck", "behind": ["o_proj"]}, overwrite=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": {"name": "bottlneck"}}, "method.name: must be 'lora' or 'bottleneck', not 'bottlneck'"),
        ({"method": {"name": "bottleneck", "preset": "parallel"}}, "method.preset: must be 'houlsby' or 'pfeiffer'"),
        ({"method": {"name": "bottleneck", "reduction": 4}}, "did you mean reduction_factor?"),
        ({"method": {"name": "bottleneck", "reduction_factor": 0}}, "method.reduction_factor: should be greater"),
        ({"method": {"name": "bottleneck", "non_linearity": "exp"}}, "method.non_linearity: must be 'relu'"),
        ({"method": {"name": "bottleneck", "scaling": 0}}, "method.scaling: 0 means an adapter that changes nothing"),
        ({"method": {"name": "bottleneck", "behind": []}}, "method.behind: names no module"),
        ({"method": {"name": "bottleneck"}, "lora": {"rank": 4}}, "lora.rank: has no use for method.name bottleneck"),
        ({"method": {"preset": "houlsby"}}, "method.preset: is for method.name bottleneck only"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_config({**MINIMAL, **values})
    assert message in caught.value.message


def test_a_factor_beyond_the_hidden_size(configure: Configure, bert_base: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"reduction_factor=1000000\.0, but it must be above 0 and at most"):
        run(configure(bert_base, method={"name": "bottleneck", "reduction_factor": 1e6}))
