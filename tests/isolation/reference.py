"""Plain PEFT: the adapters of the suite, and the answers that they give alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from isolation.interface import EngineUnderTest, Failed, Feature, Generated, Job, Selection, Stats
from peft import IA3Config, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import greedy, load_reference, make_adapter, peft_model
from transformers import AutoTokenizer

LOGIT_TOLERANCE = 1e-4
"""Of logits and log-probabilities, absolute: both sides compute in float32, in another order."""

RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LABELS = ("no", "yes", "perhaps")

METHODS: Mapping[str, Callable[[], PeftConfig]] = {
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "another-prompt": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}
"""Other methods than LoRA, of three kinds: vectors in the layers, tokens before the text, keys and values before it. Of
the last two each takes as many places as the other."""


class Folders:
    """PEFT folders by number. All generators of a rank are of one size; a number is a seed, so other numbers, other
    weights."""

    def __init__(self, base: Path, root: Path) -> None:
        self._base = base
        self._root = root
        self.generator = lru_cache(None)(self._generator)
        self.classifier = lru_cache(None)(self._classifier)
        self.of_method = lru_cache(None)(self._of_method)

    def _generator(self, number: int, rank: int = RANK) -> Path:
        folder, scale = self._root / f"g{number}-{rank}", (RANK / rank) ** 0.25  # an effect of the same size
        return make_adapter(self._base, folder, targets=TARGETS, rank=rank, seed=number, scale=scale)

    def _classifier(self, number: int, labels: int = 2) -> Path:
        folder, names = self._root / f"c{number}-{labels}", LABELS[:labels]
        return make_adapter(
            self._base, folder, targets=TARGETS, rank=RANK, seed=number, scale=0.5, task="SEQ_CLS", labels=names
        )

    def _of_method(self, method: str) -> Path:
        torch.manual_seed(len(method))
        model = get_peft_model(load_reference(self._base), METHODS[method]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(1.0 if method == "ia3" else 0.0, 0.5)
        model.save_pretrained(self._root / method)
        return self._root / method

    @property
    def bytes(self) -> int:
        """What one generator takes in float32."""
        weights = load_file(self.generator(0) / "adapter_model.safetensors")
        return sum(tensor.nbytes for tensor in weights.values())


class Alone:
    """PEFT with one adapter (or one exact fusion, or the base) and nobody else; answers are remembered."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._model = lru_cache(None)(self._make)
        self._answers: dict[tuple[Any, ...], Generated] = {}

    def ids(self, text: str) -> list[int]:
        """A text's tokens."""
        found: list[int] = self._tokenizer(text)["input_ids"]
        return found

    def generates(self, prompt: str, arm: Path | Mapping[Path, float] | None, tokens: int) -> Generated:
        """The greedy answer by transformers' own generate, end tokens ignored, with its logits."""
        key = arm if not isinstance(arm, Mapping) else tuple(arm.items())
        if (prompt, key, tokens) not in self._answers:
            chosen, logits = greedy(self._model(key), self.ids(prompt), tokens)
            likely = logits.log_softmax(-1)[torch.arange(tokens), list(chosen)]
            self._answers[prompt, key, tokens] = Generated(chosen, tuple(likely.tolist()), logits)
        return self._answers[prompt, key, tokens]

    def classifies(self, text: str, folder: Path, labels: int = 2) -> list[float]:
        """The logits of the adapter's head."""
        model = peft_model(self._base, folder, "SEQ_CLS", num_labels=labels)
        with torch.no_grad():
            logits: list[float] = model(input_ids=torch.tensor([self.ids(text)])).logits[0].tolist()
        return logits

    def cache_bytes(self, tokens: int) -> int:
        """What so many tokens take in a key/value cache in float32."""
        config = self._model(None).config
        size: int = config.hidden_size // config.num_attention_heads
        return tokens * config.num_hidden_layers * config.num_key_value_heads * size * 2 * 4

    def _make(self, key: Path | tuple[tuple[Path, float], ...] | None) -> Any:
        if key is None:
            return load_reference(self._base)
        if isinstance(key, Path):
            return peft_model(self._base, key)
        names = [f"part{index}" for index in range(len(key))]
        model = PeftModel.from_pretrained(load_reference(self._base), key[0][0], adapter_name=names[0])
        for name, (folder, _) in zip(names[1:], key[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        model.add_weighted_adapter(names, [weight for _, weight in key], "fused", combination_type="cat")
        model.set_adapter("fused")
        return model.eval()


def same(got: Generated, want: Generated) -> None:
    """Asserts that an answer is the reference's: every token, and every figure that the engine gives."""
    assert got.tokens == want.tokens
    assert want.log_probabilities is not None
    assert want.logits is not None
    if got.log_probabilities is not None:
        assert got.log_probabilities == pytest.approx(want.log_probabilities, abs=LOGIT_TOLERANCE)
    if got.logits is not None:
        torch.testing.assert_close(got.logits, want.logits, atol=LOGIT_TOLERANCE, rtol=0)


class _Refused:
    """A request that was refused when it came."""

    def __init__(self, error: Failed) -> None:
        self._error = error

    def tokens_so_far(self) -> int:
        return 0

    def wait(self, seconds: float = 60) -> Generated:
        raise self._error

    def cancel(self) -> None:
        """It is over."""


def begin(engine: EngineUnderTest, prompt: str, selection: Selection, tokens: int) -> Job:
    """Like `generate`, for a request that may fail: then its job raises, whenever the engine does."""
    try:
        return engine.generate(prompt, selection, tokens)
    except Failed as error:
        return _Refused(error)


def needs(engine: EngineUnderTest, *features: Feature) -> None:
    """Skips the test if the engine cannot do something."""
    missing = [feature for feature in features if feature not in engine.features]
    if missing:
        pytest.skip(f"this engine has no {' and no '.join(missing)}")


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for something that is to happen soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def idle(engine: EngineUnderTest) -> Stats:
    """Waits until no row is left and no cache is held, and returns what is then."""
    until(lambda: engine.stats().rows == 0 and engine.stats().free_cache == 1)
    return engine.stats()
