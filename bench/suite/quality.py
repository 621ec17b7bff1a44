"""Perplexity of the base as it is served: through the engine, its kernels, its cache and its decoding steps.

A window's first tokens are the prompt; the rest is what the engine "generates", each token forced to be the text's own
while its log-probability is noted. So what is measured is what a decoding request gets, not a forward of another path.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adapterbay.server import sampling
from adapterbay.server.requests import ArmSpec, Delta, GenerateTask, Request, SamplingSpec

ROWS = 16
"""Windows that run at once, as in the field's workload."""


class Forced(SamplingSpec):
    """Draws the text's own tokens. `text` is what is left of them, `total` the sum of their log-probabilities."""

    __slots__ = ("text", "total")

    text: list[int]
    total: float

    @classmethod
    def of(cls, text: Sequence[int]) -> Forced:
        """Forces `text`, token by token."""
        made = cls(max_tokens=len(text), ignore_end=True)
        object.__setattr__(made, "text", list(text))
        object.__setattr__(made, "total", 0.0)
        return made


def forced_draw(logits: Tensor, specs: Sequence[SamplingSpec], generators: Any) -> list[sampling.Drawn]:
    """Stands in for `sampling.draw`; every row must be forced."""
    del generators
    chances = logits.float().log_softmax(-1)
    drawn = []
    for row, spec in enumerate(specs):
        assert isinstance(spec, Forced)
        token = spec.text.pop(0)
        object.__setattr__(spec, "total", spec.total + float(chances[row, token]))
        drawn.append(sampling.Drawn(token, bool(torch.isfinite(chances[row, token]))))
    return drawn


@contextmanager
def forced() -> Iterator[None]:
    """Puts `forced_draw` wherever the engine has `draw`."""
    original = sampling.draw
    places = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("adapterbay.server") and getattr(module, "draw", None) is original
    ]
    if len(places) < 2:
        raise RuntimeError("the engine no longer draws by sampling.draw: perplexity needs another way in")
    for module in places:
        module.draw = forced_draw  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in places:
            module.draw = original  # type: ignore[attr-defined]


def served_perplexity(engine: Any, windows: Sequence[Sequence[int]], context: int) -> float:
    """exp of the mean negative log-likelihood of the tokens after the first `context` of each window, by the base."""
    specs = [Forced.of(window[context:]) for window in windows]
    count = sum(len(spec.text) for spec in specs)
    with forced():
        for start in range(0, len(windows), ROWS):
            done = threading.Semaphore(0)
            failures: list[BaseException] = []

            def listen(event: object, done: threading.Semaphore = done, failures: Any = failures) -> None:
                if isinstance(event, Delta):
                    return
                if isinstance(event, BaseException):
                    failures.append(event)
                done.release()

            chosen = range(start, min(start + ROWS, len(windows)))
            for index in chosen:
                task = GenerateTask(tuple(windows[index][:context]), specs[index])
                engine.submit([Request(ArmSpec(), task, listen)])
            for _ in chosen:
                done.acquire()
            if failures:
                raise failures[0]
    if any(spec.text for spec in specs):
        raise RuntimeError("the engine stopped before a window's end")
    return math.exp(-sum(spec.total for spec in specs) / count)
