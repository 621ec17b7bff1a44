"""LoftQ adapters that were saved as they are: PEFT repeats the start when it loads them, and so do we."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import peft_zoo
import pytest
import torch
from engine_tools import Harness, reference_logits
from peft.tuners.lora import layer as lora_layer
from peft.utils import loftq_utils
from tiny import make_base, peft_model

from adapterbay.registry import Registry
from adapterbay.registry.errors import UnsupportedMethod

PROMPT = [7, 10, 20, 30, 9, 50]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own `loftq_init`, line by line, which names CUDA as the one device that it computes on."""
    source = inspect.getsource(loftq_utils.loftq_init)
    assert source.count('"cuda"') == 1
    names: dict[str, Any] = dict(vars(loftq_utils))
    exec(source.replace('"cuda"', '"cpu"'), names)
    monkeypatch.setattr(lora_layer, "loftq_init", names["loftq_init"])


def made(base: Path, folder: Path, iterations: int, bits: int = 4) -> Path:
    settings = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": bits, "loftq_iter": iterations}}
    peft_zoo.make(base, folder, "lora", seed=iterations, settings=settings)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "loftq", "PEFT must repeat it"
    return folder


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_start_is_repeated_on_the_base_at_hand(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured below 1e-5 in logits of size about 10. What int8 takes away is a tenth of what NF4 does."""
    base = make_base(tmp_path / "base", "llama", layers=2)
    registry = Registry.open(tmp_path / "registry")
    models = {}
    for iterations in (1, 3):
        folder = made(base, tmp_path / f"a{iterations}", iterations, bits)
        registry.push(folder, f"a{iterations}", base=f"folder:{base}")
        models[f"a{iterations}"] = peft_model(base, folder)
        plain = json.loads((folder / "adapter_config.json").read_text()) | {"init_lora_weights": True}
        (folder / "adapter_config.json").write_text(json.dumps(plain | {"loftq_config": {}}))
        models[f"plain{iterations}"] = peft_model(base, folder)
    monkeypatch.undo()  # from here on PEFT's needs CUDA again
    with Harness(base, registry) as harness:
        for iterations in (1, 3):
            name = f"a{iterations}"
            answer = harness.generate(name, PROMPT, 4)
            tokens = answer.generated().token_ids
            assert answer.request is not None
            got = torch.stack(harness.logits[answer.request.id])
            torch.testing.assert_close(got, reference_logits(models[name], PROMPT, tokens), rtol=0, atol=1e-4)
            without = reference_logits(models[f"plain{iterations}"], PROMPT, tokens)
            shows = 0.05 if bits == 4 else 0.005
            assert float((got - without).abs().max()) > shows, "what LoftQ takes from the base must show"


@pytest.mark.usefixtures("on_cpu")
def test_what_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    """PEFT itself fails on a Conv1D, so that the settings are put into the config of another LoRA."""
    base = make_base(tmp_path / "base", "gpt2", layers=1)
    registry = Registry.open(tmp_path / "registry")
    folder = peft_zoo.make(base, tmp_path / "a", "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    registry.push(folder, "a", base=f"folder:{base}")
    with Harness(base, registry) as harness, pytest.raises(UnsupportedMethod, match="a Conv1D, is not served"):
        harness.generate("a", PROMPT, 1).wait()
