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
from peft import PeftModel
from safetensors.torch import load_file
from tiny import load_reference, make_adapter, peft_model
from transformers import AutoTokenizer

LOGIT_TOLERANCE = 1e-4
"""Of logits and log-probabilities, absolute: both sides compute in float32, in another order."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LABELS = ("no", "yes")


class Folders:
    """PEFT folders by number. All generators are of one size; a number is a seed, so other numbers, other weights."""

    def __init__(self, base: Path, root: Path) -> None:
        self._base = base
        self._root = root
        self.generator = lru_cache(None)(self._generator)
        self.classifier = lru_cache(None)(self._classifier)

    def _generator(self, number: int) -> Path:
        return make_adapter(self._base, self._root / f"g{number}", targets=TARGETS, rank=8, seed=number, scale=1.0)

    def _classifier(self, number: int) -> Path:
        folder = self._root / f"c{number}"
        return make_adapter(
            self._base, folder, targets=TARGETS, rank=8, seed=number, scale=0.5, task="SEQ_CLS", labels=LABELS
        )

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
            ids = torch.tensor([self.ids(prompt)])
            with torch.no_grad():
                out = self._model(key).generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    eos_token_id=None,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            chosen, logits = out.sequences[0, ids.shape[1] :], torch.cat(out.logits)
            likely = logits.log_softmax(-1)[torch.arange(tokens), chosen]
            self._answers[prompt, key, tokens] = Generated(tuple(chosen.tolist()), tuple(likely.tolist()), logits)
        return self._answers[prompt, key, tokens]

    def classifies(self, text: str, folder: Path) -> list[float]:
        """The logits of the adapter's head."""
        model = peft_model(self._base, folder, "SEQ_CLS", num_labels=len(LABELS))
        with torch.no_grad():
            logits: list[float] = model(input_ids=torch.tensor([self.ids(text)])).logits[0].tolist()
        return logits

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
