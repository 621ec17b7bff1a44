"""Drives a real engine from a test: submit, wait, and see the logits that it computed."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from adapterbay.registry import Registry
from adapterbay.registry.errors import AdapterbayError
from adapterbay.registry.fusing import FusionSettings
from adapterbay.server.batch import Share
from adapterbay.server.config import ServerConfig
from adapterbay.server.engine import Engine
from adapterbay.server.requests import (
    ArmSpec,
    ClassifyResult,
    ClassifyTask,
    ClassifyTokensTask,
    Delta,
    EmbedTask,
    Event,
    GenerateResult,
    GenerateTask,
    Part,
    Request,
    SamplingSpec,
    Task,
)
from adapterbay.server.runner import StepResult
from adapterbay.server.weights import LayerWeights

Selection = str | Mapping[str, float] | None
Asked = Selection | ArmSpec


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Stops the engine's thread between two steps, so that what a test does meanwhile falls into one pause."""
    began, go_on = threading.Event(), threading.Event()

    def stand_still() -> None:
        began.set()
        go_on.wait(60)

    engine._loop.post(stand_still)
    assert began.wait(60)
    try:
        yield
    finally:
        go_on.set()


class Answer:
    """Collects what one request hears."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.final: Any = None
        self.events_after_end = 0
        self.done = threading.Event()
        self.request: Request | None = None
        self.engine: Engine | None = None
        self.steps_at_end = 0
        self.on_delta: Any = None

    def __call__(self, event: Event) -> None:
        if self.done.is_set():
            self.events_after_end += 1
        elif isinstance(event, Delta):
            self.deltas.append(event)
            if self.on_delta is not None:
                self.on_delta(self)
        else:
            self.final = event
            if self.engine is not None:
                self.steps_at_end = self.engine.stats().steps
            self.done.set()

    def wait(self, seconds: float = 60) -> Any:
        """The result; raises the error if it ended in one."""
        assert self.done.wait(seconds), "no answer came"
        if isinstance(self.final, AdapterbayError):
            raise self.final
        return self.final

    def generated(self) -> GenerateResult:
        result = self.wait()
        assert isinstance(result, GenerateResult)
        assert result.text == "".join(delta.text for delta in self.deltas)
        assert result.token_ids == tuple(token for delta in self.deltas for token in delta.token_ids)
        return result

    def classified(self) -> ClassifyResult:
        result = self.wait()
        assert isinstance(result, ClassifyResult)
        return result


class Harness(AbstractContextManager["Harness"]):
    """An engine over a base and a registry, with every row's logits recorded."""

    def __init__(self, base: Path | str, registry: Registry | Path, **settings: Any) -> None:
        self.registry = registry if isinstance(registry, Registry) else Registry.open(registry)
        settings = {"dtype": "float32", "quantize": "none", "device": "cpu", "kv_bytes": 64 << 20} | settings
        config = ServerConfig(base=str(base), registry=str(self.registry.root), **settings)
        self.engine = Engine.create(config)
        self.logits: dict[int, list[Tensor]] = defaultdict(list)
        self.step_sizes: list[int] = []
        self.kinds: list[set[str]] = []
        self._record()

    def __enter__(self) -> Harness:
        self.engine.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.engine.stop()

    def arm(self, selection: Asked) -> ArmSpec:
        if isinstance(selection, ArmSpec):
            return selection
        if selection is None:
            return ArmSpec()
        return self.fused({selection: 1.0} if isinstance(selection, str) else selection)

    def fused(self, weighted: Mapping[str, float | LayerWeights], settings: FusionSettings | None = None) -> ArmSpec:
        """Adapters as one, by the weighted sum or as `settings` say."""
        parts = []
        for reference, weight in weighted.items():
            found = self.engine.adapters.resolve(reference)
            layers = weight if isinstance(weight, LayerWeights) else None
            overall = weight.weight if isinstance(weight, LayerWeights) else weight
            parts.append(Part(reference, found.name, found.version, found.digest, overall, layers))
        return ArmSpec(tuple(parts), settings)

    def request(self, selection: Asked, task: Task, **settings: Any) -> tuple[Answer, Request]:
        answer = Answer()
        request = Request(arm=self.arm(selection), task=task, listener=answer, **settings)
        answer.request, answer.engine = request, self.engine
        return answer, request

    def submit(self, selection: Asked, task: Task, **settings: Any) -> Answer:
        answer, request = self.request(selection, task, **settings)
        self.engine.submit([request])
        return answer

    def generate(self, selection: Asked, prompt: Sequence[int], most: int = 12, **sampling: Any) -> Answer:
        sampling.setdefault("ignore_end", True)
        return self.submit(selection, GenerateTask(tuple(prompt), SamplingSpec(max_tokens=most, **sampling)))

    def classify(self, selection: Asked, ids: Sequence[int]) -> Answer:
        return self.submit(selection, ClassifyTask(tuple(ids)))

    def load(self, *names: str) -> None:
        """Brings adapters into host memory, so that the rows that name them are ready at once."""
        for name in names:
            self.engine.adapters.load(self.engine.adapters.resolve(name).digest).result(60)

    def classify_tokens(self, selection: Asked, ids: Sequence[int]) -> Answer:
        return self.submit(selection, ClassifyTokensTask(tuple(ids)))

    def embed(self, selection: Asked, ids: Sequence[int], **settings: Any) -> Answer:
        return self.submit(selection, EmbedTask(tuple(ids), **settings))

    def idle(self, seconds: float = 20) -> None:
        """Waits until nothing runs and every block is back."""
        until = time.monotonic() + seconds
        while True:
            stats = self.engine.stats()
            if stats.running == stats.waiting == 0 and stats.free_blocks == stats.blocks:
                return
            assert time.monotonic() < until, f"the engine is not idle: {stats}"
            time.sleep(0.005)

    def _record(self) -> None:
        runner = self.engine._loop._runner
        run = runner.run

        def recording(shares: Sequence[Share]) -> StepResult:
            result = run(shares)
            self.step_sizes.append(len(shares))
            self.kinds.append({type(share.row.request.task).__name__ for share in shares})
            if result.logits is not None:
                for row, logits in zip(result.drawing, result.logits, strict=True):
                    self.logits[row.request.id].append(logits.float().clone())
            return result

        runner.run = recording  # type: ignore[method-assign]


def reference_logits(model: Any, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """What the reference computes for each generated position, in one unpadded forward. [generated, vocabulary]"""
    ids = torch.tensor([[*prompt, *generated]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits[0]
    return logits[len(prompt) - 1 : -1].float()


class References:
    """Plain PEFT over one base: each arm alone, through `set_adapter`; fusions by PEFT's own exact `cat`.

    All arms are made before the first forward: bitsandbytes repacks 4-bit weights at the first forward on a CPU, and
    loading another adapter after that was seen to change the base's output (bitsandbytes 0.50.2, peft 0.21.2).
    """

    def __init__(self, model: Any, folders: Mapping[str, Path], selections: Iterable[Selection]) -> None:
        wanted = list(selections)
        names = sorted({name for selection in wanted for name in _names(selection)})
        first = names[0] if names else next(iter(folders))
        self._peft = PeftModel.from_pretrained(model, folders[first], adapter_name=first).eval()
        for name in names[1:]:
            self._peft.load_adapter(folders[name], adapter_name=name)
        for selection in wanted:
            fused = _fused_name(selection)
            if isinstance(selection, Mapping) and fused not in self._peft.peft_config:
                self._peft.add_weighted_adapter(
                    list(selection), list(selection.values()), fused, combination_type="cat"
                )
        self._peft.eval()

    @contextmanager
    def of(self, selection: Selection) -> Iterator[Any]:
        """A context in which calling the model is the arm and nothing else."""
        if selection is None:
            with self._peft.disable_adapter():
                yield self._peft
            return
        self._peft.set_adapter(_fused_name(selection))
        yield self._peft


def _names(selection: Selection) -> list[str]:
    return [selection] if isinstance(selection, str) else list(selection or ())


def _fused_name(selection: Selection) -> str:
    if isinstance(selection, str) or selection is None:
        return selection or ""
    return "fused_" + "_".join(f"{name}_{weight}".replace(".", "_") for name, weight in selection.items())


def wait_for(answers: Iterable[Answer]) -> None:
    for answer in answers:
        answer.wait()
