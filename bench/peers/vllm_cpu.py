"""vLLM's CPU build as a system under test: run by its own environment's Python, spoken to by `suite.process`.

By hand, to see that it works:  bench/peers/.venv/bin/python bench/peers/vllm_cpu.py --base FOLDER
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from suite.process import answer, peak_mb, reset_peak
from suite.workloads import field

ENVIRONMENT = {
    "OMP_NUM_THREADS": str(os.cpu_count()),
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VllmCpu:
    """One `LLM`. LoRA is on when `adapters` (name to PEFT folder) are given."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._adapters: dict[str, Any] = {}

    def open(self, base: str, adapters: dict[str, str], rank: int = 8) -> dict[str, Any]:
        """Loads the base folder; returns versions and how long it took."""
        began = time.perf_counter()
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        lora: dict[str, Any] = {}
        if adapters:
            lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": rank}
        self._llm = LLM(model=base, dtype="bfloat16", enable_prefix_caching=False, max_model_len=2048, seed=0, **lora)
        self._adapters = {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(adapters.items())}
        versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
        return {"versions": versions, "seconds": time.perf_counter() - began}

    def play(self, requests: list[dict[str, Any]], first: bool = True) -> dict[str, Any]:
        """All requests at once. The first token is timed by a run of its own, since `generate` tells whole answers."""
        firsts = [self._generate(requests, 1)] if first else []
        seconds = self._generate(requests, None)
        return {
            "tokens": sum(r["tokens"] for r in requests),
            "requests": len(requests),
            "seconds": seconds,
            "first": firsts,
            "total": [seconds],
        }

    def reset_peak(self) -> None:
        """Begins to watch memory anew (of this process; the engine's own keeps its peak)."""
        reset_peak()

    def peak_mb(self) -> float:
        """Peak memory of this process and the engine's."""
        return peak_mb()

    def _generate(self, requests: list[dict[str, Any]], tokens: int | None) -> float:
        from vllm import SamplingParams

        prompts = [r["prompt"] if isinstance(r["prompt"], str) else {"prompt_token_ids": r["prompt"]} for r in requests]
        params = [SamplingParams(temperature=0.0, max_tokens=tokens or r["tokens"], ignore_eos=True) for r in requests]
        chosen = [self._adapters[r["adapter"]] if r["adapter"] is not None else None for r in requests]
        began = time.perf_counter()
        outputs = self._llm.generate(prompts, params, lora_request=chosen if self._adapters else None, use_tqdm=False)
        seconds = time.perf_counter() - began
        for output, wanted in zip(outputs, params, strict=True):
            if len(output.outputs[0].token_ids) != wanted.max_tokens:
                raise RuntimeError(f"asked for {wanted.max_tokens} tokens, got {len(output.outputs[0].token_ids)}")
        return seconds


def main() -> None:
    """Answers calls, or with --base runs the base at batch 1 and 16 and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--base", help="a base folder")
    parser.add_argument("--adapter", action="append", default=[], help="a PEFT folder; may be repeated")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    system = VllmCpu()
    if options.base is None:
        answer(system)
        return
    names = {f"a{index}": path for index, path in enumerate(options.adapter)}
    print(json.dumps(system.open(options.base, names)))
    for selections in ([None], [None] * 16, *([list(names)] if names else [])):
        system.play(field(selections, options.tokens))
        print(json.dumps({"batch": len(selections), **system.play(field(selections, options.tokens))}))


if __name__ == "__main__":
    main()
