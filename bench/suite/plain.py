"""Plain transformers and plain PEFT as systems under test, the way their documentation runs them.

Runs as a process of its own (`python -m suite.plain`). All requests of a workload go in one padded batch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from suite.process import answer, peak_mb, reset_peak

LOADERS: dict[str, Any] = {
    "generate": AutoModelForCausalLM,
    "classify": AutoModelForSequenceClassification,
    "embed": AutoModel,
}


class Plain:
    """One model; with adapters it is a PeftModel."""

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self._adapted = False

    def open(
        self, base: str, adapters: dict[str, str], dtype: str, task: str = "generate", labels: int = 2
    ) -> dict[str, Any]:
        """Loads a base folder, and PEFT folders by name onto it."""
        began = time.perf_counter()
        self._tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        extra = {"num_labels": labels} if task == "classify" else {}
        model = LOADERS[task].from_pretrained(base, dtype=getattr(torch, dtype), **extra).eval()
        self._adapted = bool(adapters)
        for index, (name, folder) in enumerate(adapters.items()):
            if index == 0:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name, autocast_adapter_dtype=False)
            else:
                model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        self._model = model.eval()
        # What PEFT adds is float32 where its files are; a user who serves in bfloat16 casts it.
        self._model.to(getattr(torch, dtype))
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        return {"seconds": time.perf_counter() - began, "versions": versions}

    def play(self, requests: list[dict[str, Any]], first: bool = True) -> dict[str, Any]:
        """All at once, all of one length; the first token is timed by a run of its own, for `generate` streams for
        one row only."""
        lengths = {r["tokens"] for r in requests}
        if len(lengths) != 1:
            raise ValueError("plain generate() makes all rows equally long")
        inputs = self._tokenizer([r["prompt"] for r in requests], return_tensors="pt", padding=True)
        names = [r["adapter"] for r in requests]
        firsts = [self._generate(inputs, names, 1)] if first else []
        tokens = lengths.pop()
        seconds = self._generate(inputs, names, tokens)
        return {
            "tokens": tokens * len(requests),
            "requests": len(requests),
            "seconds": seconds,
            "first": firsts,
            "total": [seconds],
        }

    def classify(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One forward over rows of one length: seconds, and the index of each row's label where there is a head."""
        ids = torch.tensor([row["ids"] for row in rows])
        extra, quiet = self._selection([row["adapter"] for row in rows])
        with torch.inference_mode(), quiet:
            began = time.perf_counter()
            out = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
            seconds = time.perf_counter() - began
        logits = getattr(out, "logits", None)
        return {"seconds": seconds, "labels": [] if logits is None else logits.argmax(-1).tolist()}

    def perplexity(self, windows: list[list[int]], context: int) -> float:
        """exp of the mean negative log-likelihood of the tokens after the first `context` of each window."""
        total, count = 0.0, 0
        for start in range(0, len(windows), 8):
            ids = torch.tensor(windows[start : start + 8])
            with torch.inference_mode():
                chances = self._model(input_ids=ids).logits.float().log_softmax(-1)
            picked = chances[:, context - 1 : -1].gather(-1, ids[:, context:, None])
            total, count = total - float(picked.sum()), count + picked.numel()
        return math.exp(total / count)

    def reset_peak(self) -> None:
        """Begins to watch memory anew."""
        reset_peak()

    def peak_mb(self) -> float:
        """Peak memory of this process."""
        return peak_mb()

    def _generate(self, inputs: Any, names: list[str | None], tokens: int) -> float:
        extra, quiet = self._selection(names)
        with torch.inference_mode(), quiet:
            began = time.perf_counter()
            out = self._model.generate(
                **inputs, **extra, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None
            )
            seconds = time.perf_counter() - began
        if out.shape[1] != inputs["input_ids"].shape[1] + tokens:
            raise RuntimeError(f"generate gave {out.shape[1]} columns")
        return seconds

    def _selection(self, names: list[str | None]) -> tuple[dict[str, Any], Any]:
        """`adapter_names` for a mixed batch; a context without adapters where all rows want the base."""
        if not self._adapted:
            return {}, contextlib.nullcontext()
        if not any(names):
            return {}, self._model.disable_adapter()
        return {"adapter_names": [name or "__base__" for name in names]}, contextlib.nullcontext()


if __name__ == "__main__":
    answer(Plain())
