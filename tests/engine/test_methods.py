"""Every method of PEFT, saved by PEFT, pushed, and served in one mixed batch with all the others: each row equals plain
PEFT alone.

Tolerance: 1e-4 in logits, float32. Measured below 1e-5 on logits of size about 10: both sides sum the same products in
another order, and deltas are computed from the base's weights once, at the load, instead of at every call.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft_zoo
import pytest
import torch
from engine_tools import Answer, Harness, held
from method_tools import EVERYTHING, OTHERS, Shelf, fill
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from table_tools import against_the_table
from tiny import SPECIAL, load_reference

from adapterbay.registry.errors import AdapterbayError
from adapterbay.server.requests import Pooling

ATOL = 1e-4
INVOCATION = [40, 41, 42]


@pytest.fixture(scope="module", params=[*EVERYTHING, *OTHERS])
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return fill(tmp_path_factory.mktemp(request.param), request.param)


def prompt(index: int, name: str) -> list[int]:
    rng = random.Random(index)
    ids = [rng.randrange(6, 262) for _ in range(6 + index % 23)]
    if name == "alora":
        ids[2:5] = INVOCATION
    if "tokens" in name:
        ids[1:4] = [10, 20, 30]
    return ids


def test_one_batch_of_every_method_equals_peft_alone(shelf: Shelf) -> None:
    tasks = {name: shelf.recipe(name).task for name in shelf.folders}
    texts = {name: prompt(index, name) for index, name in enumerate(shelf.folders)}
    if shelf.task == "SEQ_2_SEQ_LM":  # T5's classifier looks at the end token
        texts = {name: [*ids, SPECIAL.index("<|im_end|>")] for name, ids in texts.items()}
    with Harness(shelf.base, shelf.registry, max_rows=128, step_tokens=2048, device_bytes=1 << 30) as harness:
        adapters = harness.engine.adapters
        for loading in [adapters.load(adapters.resolve(name).digest) for name in texts]:
            loading.result(60)
        answers = {}
        with held(harness.engine):
            for name, ids in texts.items():
                answers[name] = ask(harness, name, tasks[name], ids)
            untouched = ask(harness, None, shelf.task, prompt(7, ""))
        for name, answer in answers.items():
            try:
                answer.wait()
            except AdapterbayError as error:
                pytest.fail(f"{name}: {error}")
        assert max(harness.step_sizes) > len(shelf.folders) // 2, "the rows were not batched"
        wrong = {}
        for name, answer in answers.items():
            far, effect = distance(shelf, harness, name, texts[name], answer)
            if not far < ATOL:
                wrong[name] = f"off by {far:.3g}"
            elif not effect > 20 * ATOL:
                wrong[name] = f"has no effect ({effect:.3g}): the comparison says nothing"
        assert not wrong
        forms = {name: adapters.memory.form(adapters.resolve(name).digest) for name in texts}
        assert not {name: told for name, form in forms.items() if (told := against_the_table(form))}
        assert base_distance(shelf, harness, prompt(7, ""), untouched) < ATOL, "an adapter changed the base"


def ask(harness: Harness, name: str | None, task: str, ids: list[int]) -> Answer:
    if task == "SEQ_CLS":
        return harness.classify(name, ids)
    if task == "TOKEN_CLS":
        return harness.classify_tokens(name, ids)
    if task == "FEATURE_EXTRACTION":
        return harness.embed(name, ids, pooling=Pooling.MEAN)
    return harness.generate(name, ids, 4)


def distance(shelf: Shelf, harness: Harness, name: str, ids: list[int], answer: Answer) -> tuple[float, float]:
    """(largest difference from PEFT, largest effect of the adapter) in logits or states."""
    task = shelf.recipe(name).task
    result = answer.wait()
    model = peft_zoo.load(shelf.base, shelf.folders[name], name)
    base = peft_zoo.load_base(shelf.base, task)
    with torch.no_grad():
        if task in ("SEQ_CLS", "TOKEN_CLS"):
            expected = model(input_ids=torch.tensor([ids])).logits[0]
            return apart(torch.tensor(result.logits), expected), apart(under_its_head(model, ids), expected)
        if task == "FEATURE_EXTRACTION":
            states = model(input_ids=torch.tensor([ids]), **peft_zoo.inputs(name)).last_hidden_state[0]
            plain = base(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
            expected = states[-len(ids) :].mean(0)
            return apart(torch.tensor(result.values), expected), apart(plain, expected)
        assert answer.request is not None
        got = torch.stack(harness.logits[answer.request.id])
        if task == "SEQ_2_SEQ_LM":
            start = [model.config.decoder_start_token_id, *result.token_ids[:-1]]
            feed: dict[str, Any] = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([start])}
            expected = model(**feed, **peft_zoo.inputs(name)).logits[0][-len(got) :]
            return apart(got, expected), apart(base(**feed).logits[0], expected)
        whole = torch.tensor([[*ids, *result.token_ids]])
        extra = peft_zoo.inputs(name)
        if name == "alora":
            extra["alora_offsets"] = [whole.shape[1] - 2]
        expected = model(input_ids=whole, **extra).logits[0][-len(got) - 1 : -1]
        plain = base(input_ids=whole).logits[0][-len(got) - 1 : -1]
        return apart(got, expected), apart(plain, expected)


def under_its_head(model: PeftModel, ids: list[int]) -> torch.Tensor:
    """The logits of the adapter's own head over the base's states, as if the adapter changed nothing else."""
    with model.disable_adapter():
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(True)
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def base_distance(shelf: Shelf, harness: Harness, ids: list[int], answer: Answer) -> float:
    """How far a row without adapters is from plain transformers."""
    result = answer.wait()
    base = peft_zoo.load_base(shelf.base, shelf.task)
    with torch.no_grad():
        if shelf.task == "FEATURE_EXTRACTION":
            return apart(torch.tensor(result.values), base(torch.tensor([ids])).last_hidden_state[0].mean(0))
        assert answer.request is not None
        got = torch.stack(harness.logits[answer.request.id])
        if shelf.task == "SEQ_2_SEQ_LM":
            start = torch.tensor([[base.config.decoder_start_token_id, *result.token_ids[:-1]]])
            return apart(got, base(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits[0])
        return apart(got, base(torch.tensor([[*ids, *result.token_ids]])).logits[0][-len(got) - 1 : -1])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one.float() - other.float()).abs().max())


QUANTIZED = ("lora", "dora", "rslora", "ia3", "adalora", "vera", "oft", "randlora", "road", "prompt_tuning")
"""Methods that PEFT itself puts on bitsandbytes' layers, and one that does not look at them."""


@pytest.mark.parametrize("quantize", ["nf4", "int8-bnb"])
def test_methods_over_the_same_quantized_base(quantize: str, tmp_path: Path) -> None:
    """What a form takes from the base (DoRA's norm) is taken from the dequantized weights, as PEFT does.

    Tolerance 0.1 in logits of size up to 5; the adapters' effects are above 0.3. bitsandbytes' products on a CPU round
    activations to bfloat16 (NF4) or to 8 bits (INT8), so a last bit that differs upstream becomes a whole step.
    """
    from adapterbay.base.load import quantization_config

    shelf = fill(tmp_path, "llama", only=QUANTIZED)
    texts = {name: prompt(index, name) for index, name in enumerate(shelf.folders)}
    assert set(texts) == set(QUANTIZED)

    def base() -> Any:
        return load_reference(shelf.base, quantization_config=quantization_config(quantize, torch.float32))

    alone = base()
    with Harness(shelf.base, shelf.registry, quantize=quantize, max_rows=32) as harness:
        answers = {name: harness.generate(name, ids, 1) for name, ids in texts.items()}
        for name, answer in answers.items():
            answer.wait()
            # a base for each: bitsandbytes repacks weights at the first forward, and PEFT's DoRA changes INT8 layers
            model = PeftModel.from_pretrained(base(), shelf.folders[name]).eval()
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([texts[name]])).logits[0, -1]
                plain = alone(input_ids=torch.tensor([texts[name]])).logits[0, -1]
            assert answer.request is not None
            got = harness.logits[answer.request.id][0]
            assert apart(got, expected) < 0.1, name
            assert apart(plain, expected) > 0.3, name
