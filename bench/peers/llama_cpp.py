"""llama.cpp as a system under test: its own `llama-batched-bench` on the Q4 GGUF, all cores.

It has no mixed batches, so it is measured on the base only; random tokens instead of the prompts, as many of them. Time
is what the program itself tells: prompt and generation, without loading.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from suite.process import answer  # noqa: E402 - after the path to it

PROGRAM = HERE / ".venv" / "llama.cpp" / "llama-batched-bench"
PROMPT_TOKENS = 15


class LlamaCpp:
    """Each round is a run of the program."""

    def __init__(self) -> None:
        self._model = ""

    def open(self, base: str, adapters: dict[str, str]) -> dict[str, Any]:
        """`base` is a GGUF file."""
        if adapters:
            raise ValueError("llama.cpp never mixes different adapters in a batch")
        self._model = base
        return {"versions": {"llama.cpp": (PROGRAM.parent / "VERSION").read_text().strip()}, "seconds": 0.0}

    def play(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of as many rows, all equally long."""
        batch, tokens = len(requests), requests[0]["tokens"]
        threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
        context = str((PROMPT_TOKENS + tokens) * batch + 64)
        command = [str(PROGRAM), "-m", self._model, "-c", context, "-t", threads, "-npp", str(PROMPT_TOKENS)]
        command += ["-ntg", str(tokens), "-npl", str(batch), "--output-format", "jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise RuntimeError(f"{PROGRAM.name} ended with {done.returncode}: {done.stderr[-2000:]}")
        found = json.loads(lines[-1])
        if (found["pl"], found["tg"]) != (batch, tokens):
            raise RuntimeError(f"{PROGRAM.name} measured something else: {found}")
        seconds = found["t_pp"] + found["t_tg"]
        return {
            "tokens": batch * tokens,
            "requests": batch,
            "seconds": seconds,
            "first": [found["t_pp"]],
            "total": [seconds],
        }

    def reset_peak(self) -> None:
        """Nothing to do: every round is a process of its own."""

    def peak_mb(self) -> float:
        """The largest of the programs that ran so far."""
        import resource

        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


if __name__ == "__main__":
    answer(LlamaCpp())
