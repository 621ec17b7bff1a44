"""The smallest engine that the suite can examine: plain PEFT, one request after the other.

pytest tests/isolation --isolation-engine isolation.example:start
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from isolation.interface import Failed, Feature, Generated, Limits, Selection, Stats
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class Done:
    """A request that was answered before anybody could ask how far it is."""

    def __init__(self, answer: Generated) -> None:
        self._answer = answer

    def tokens_so_far(self) -> int:
        return len(self._answer.tokens)

    def wait(self, seconds: float = 60) -> Generated:
        return self._answer

    def cancel(self) -> None:
        raise NotImplementedError


class OneByOne:
    """Loads the adapter anew for every request, so that nothing of another can be left. As safe as it is slow."""

    features: frozenset[Feature] = frozenset()

    def __init__(self, base: Path) -> None:
        self._base = base
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._folders: dict[str, Path] = {}
        self._lock = threading.Lock()

    def push(self, name: str, folder: Path, *, alias: str | None = None) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(self._base)
        if weights.keys() - get_peft_model_state_dict(PeftModel.from_pretrained(model, folder)).keys():
            raise Failed(f"{name} has weights for layers that are not there: they would have no effect.")
        if not any(tensor.any() for key, tensor in weights.items() if "lora_B" in key):
            raise Failed(f"{name} has no effect: every B is zero.")
        self._folders[name] = folder

    def generate(self, prompt: str, selection: Selection, tokens: int) -> Done:
        if not isinstance(selection, str | None) or (selection is not None and selection not in self._folders):
            raise Failed(f"{selection} is not there.")
        with self._lock, torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32)
            if selection is not None:
                model = PeftModel.from_pretrained(model, self._folders[selection])
            ids, chosen = self._tokenizer(prompt)["input_ids"], []
            for _ in range(tokens):
                logits = model.eval()(input_ids=torch.tensor([[*ids, *chosen]])).logits[0, -1]
                if not logits.isfinite().all():
                    raise Failed(f"The logits are not finite: {selection} overflows.")
                chosen.append(int(logits.argmax()))
        return Done(Generated(tuple(chosen)))

    def load(self, adapter: str) -> None:
        if adapter not in self._folders:
            raise Failed(f"{adapter} is not there.")

    def close(self) -> None:
        pass

    def move_alias(self, name: str, alias: str, version: int) -> None:
        raise NotImplementedError

    def classify(self, text: str, adapter: str) -> Sequence[float]:
        raise NotImplementedError

    def unload(self, adapter: str) -> None:
        raise NotImplementedError

    def stored_weights(self, adapter: str) -> Path:
        raise NotImplementedError

    def hold_loads(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError


def start(base: Path, work: Path, limits: Limits) -> OneByOne:
    """The engine; it stores nothing and needs no room."""
    return OneByOne(base)
