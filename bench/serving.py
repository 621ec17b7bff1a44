"""Serving throughput, ours and PEFT's, side by side in one run.

    python bench/serving.py [--json FILE] [--quick] [--rounds N]

The workload of the field: SmolLM2-135M-Instruct, concurrent requests of about 14 prompt tokens, 64 new tokens each,
greedy, no early stop; adapters are LoRA r=8, alpha 16, on all seven linear layers of each block (4.9M parameters each),
random. Each system runs in a process of its own (so that peak memory is its own); each workload once to warm up, then
`--rounds` times; figures are medians. Systems take turns at the machine, never together.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TOPICS = (
    "the sea", "old trains", "a quiet library", "winter", "bread", "mountains", "the moon", "jazz",
    "gardens", "chess", "bicycles", "rain", "lighthouses", "maps", "coffee", "clocks",
)  # fmt: skip
NEW_TOKENS = 64
RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Measured:
    """One row of the table. Times are medians over the rounds."""

    system: str
    workload: str
    batch: int
    adapters: int
    tokens_per_second: float
    time_to_first_token_ms: float
    peak_memory_mb: float


def prompt(index: int) -> str:
    return f"Write three friendly sentences about {TOPICS[index % len(TOPICS)]} for a young reader, please."


def peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    """Makes ru_maxrss begin anew, so that each workload's peak is its own (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return peak_memory_mb()


# One round of a workload: (tokens, seconds, first token's seconds).
Round = Callable[[], tuple[int, float, float]]


def measure(system: str, workload: str, batch: int, adapters: int, run: Round, rounds: int) -> Measured:
    run()
    reset_peak()
    rates, firsts = [], []
    for _ in range(rounds):
        tokens, seconds, first = run()
        rates.append(tokens / seconds)
        firsts.append(first * 1000)
    return Measured(
        system, workload, batch, adapters, statistics.median(rates), statistics.median(firsts), peak_since_reset_mb()
    )


def run_ours(work: Path, rounds: int, quantize: str, dtype: str) -> Iterator[Measured]:
    """The engine in this process, as the gRPC service calls it."""
    from adapterbay.base.text import encode_text
    from adapterbay.registry import Registry
    from adapterbay.server.config import ServerConfig
    from adapterbay.server.engine import Engine
    from adapterbay.server.requests import ArmSpec, Delta, GenerateTask, Part, Request, SamplingSpec

    registry = Registry.open(work / "registry")
    engine = Engine.create(ServerConfig(registry=str(registry.root), quantize=quantize, dtype=dtype))
    engine.start()

    def arm(name: str | None, weight: float = 1.0, second: str | None = None) -> ArmSpec:
        parts = []
        for reference in filter(None, (name, second)):
            found = registry.resolve(reference)
            parts.append(Part(reference, found.name, found.version, found.digest, weight))
        return ArmSpec(tuple(parts))

    def round_of(arms: list[ArmSpec]) -> Round:
        requests = [(a, tuple(encode_text(engine.tokenizer, prompt(i)))) for i, a in enumerate(arms)]

        def run() -> tuple[int, float, float]:
            done = threading.Semaphore(0)
            firsts: list[float] = []
            tokens = 0

            def listen(event: object) -> None:
                nonlocal tokens
                if isinstance(event, Delta):
                    tokens += len(event.token_ids)
                    return
                if isinstance(event, BaseException):
                    raise event
                firsts.append(event.timings.queue + event.timings.prefill)  # type: ignore[attr-defined]
                done.release()

            began = time.perf_counter()
            for spec, ids in requests:
                engine.submit(
                    [Request(spec, GenerateTask(ids, SamplingSpec(max_tokens=NEW_TOKENS, ignore_end=True)), listen)]
                )
            for _ in requests:
                done.acquire()
            return tokens, time.perf_counter() - began, statistics.median(firsts)

        return run

    adapters = [arm(f"a{i}") for i in range(16)]
    fused = [arm(f"a{i}", 0.5, f"a{(i + 1) % 16}") for i in range(16)]
    name = f"adapterbay {engine.base.quantization} {engine.base.dtype}"
    for workload, batch, count, arms in (
        ("base", 1, 0, [ArmSpec()]),
        ("base", 16, 0, [ArmSpec()] * 16),
        ("one adapter", 1, 1, adapters[:1]),
        ("one adapter", 16, 1, adapters[:1] * 16),
        ("mixed", 16, 16, adapters),
        ("mixed fused pairs", 16, 16, fused),
        ("mixed and base", 16, 8, adapters[:8] + [ArmSpec()] * 8),
    ):
        yield measure(name, workload, batch, count, round_of(arms), rounds)
    engine.stop()


def run_peft(work: Path, rounds: int, dtype: str) -> Iterator[Measured]:
    """Plain PEFT: transformers' generate on the base, and one mixed batch by `adapter_names`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from adapterbay.base.text import load_tokenizer
    from adapterbay.registry.base import locate

    folder = locate().folder
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def round_of(model: Any, batch: int, names: list[str] | None) -> Round:
        inputs = tokenizer([prompt(i) for i in range(batch)], return_tensors="pt", padding=True)
        extra = {"adapter_names": names} if names is not None else {}

        def generate(count: int) -> float:
            began = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    **inputs, **extra, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
                )
            assert out.shape[1] == inputs["input_ids"].shape[1] + count
            return time.perf_counter() - began

        def run() -> tuple[int, float, float]:
            # generate() streams for one row only, so the first token is timed by a run of its own
            first = generate(1)
            return batch * NEW_TOKENS, generate(NEW_TOKENS), first

        return run

    name = f"peft {dtype}"
    yield measure(name, "base", 1, 0, round_of(model, 1, None), rounds)
    yield measure(name, "base", 16, 0, round_of(model, 16, None), rounds)
    peft = PeftModel.from_pretrained(model, work / "a0", adapter_name="a0").eval()
    for index in range(1, 16):
        peft.load_adapter(work / f"a{index}", adapter_name=f"a{index}")
    yield measure(name, "one adapter", 1, 1, round_of(peft, 1, ["a0"]), rounds)
    yield measure(name, "mixed", 16, 16, round_of(peft, 16, [f"a{i}" for i in range(16)]), rounds)


def make_adapters(work: Path) -> None:
    """Sixteen random LoRA adapters, saved by PEFT and pushed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from adapterbay.registry import Registry
    from adapterbay.registry.base import locate

    base = locate()
    registry = Registry.open(work / "registry")
    for index in range(16):
        torch.manual_seed(index)
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False
        )
        peft = get_peft_model(model, config)
        for parameter_name, parameter in peft.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.mul_(0.1)
        peft.save_pretrained(work / f"a{index}")
        registry.push(work / f"a{index}", f"a{index}", base=base.reference)


def worker(system: str, work: Path, rounds: int) -> None:
    """Runs one system in this process and prints one JSON object for each figure."""
    kind, _, rest = system.partition(":")
    if kind == "ours":
        quantize, _, dtype = rest.partition(",")
        rows = run_ours(work, rounds, quantize, dtype)
    else:
        rows = run_peft(work, rounds, rest)
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": os.cpu_count(), "memory_gb": round(pages / 2**30, 1), "system": platform.platform()}


def versions() -> dict[str, str]:
    names = ("adapterbay", "torch", "transformers", "peft", "bitsandbytes")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def ratio(rows: list[Measured], top: tuple[str, str, int], bottom: tuple[str, str, int]) -> float:
    def find(key: tuple[str, str, int]) -> float:
        return next(
            r.tokens_per_second for r in rows if r.system.startswith(key[0]) and (r.workload, r.batch) == key[1:]
        )

    return find(top) / find(bottom)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--systems", nargs="*", default=["ours:auto,auto", "peft:bfloat16"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    if options.worker:
        worker(options.worker, options.work, rounds)
        return
    with tempfile.TemporaryDirectory(prefix="adapterbay-bench-") as folder:
        work = Path(folder)
        print("making sixteen adapters …", file=sys.stderr)
        make_adapters(work)
        rows: list[Measured] = []
        for system in options.systems:
            print(f"measuring {system} …", file=sys.stderr)
            command = [sys.executable, __file__, "--worker", system, "--work", folder, "--rounds", str(rounds)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows += [Measured(**json.loads(line)) for line in finished.stdout.splitlines() if line.startswith("{")]
    ratios = {
        "mixed 16 over PEFT's mixed 16": ratio(rows, ("adapterbay", "mixed", 16), ("peft", "mixed", 16)),
        "mixed 16 over our base 16": ratio(rows, ("adapterbay", "mixed", 16), ("adapterbay", "base", 16)),
        "one adapter over our base, batch 1": ratio(rows, ("adapterbay", "one adapter", 1), ("adapterbay", "base", 1)),
        "base 16 over transformers' base 16": ratio(rows, ("adapterbay", "base", 16), ("peft", "base", 16)),
    }
    for label, value in ratios.items():
        print(f"{value:6.2f}×  {label}")
    print(f"\n{'system':<26}{'workload':<20}{'batch':>6}{'adapters':>9}{'tok/s':>9}{'first ms':>10}{'peak MB':>9}")
    for row in rows:
        print(
            f"{row.system:<26}{row.workload:<20}{row.batch:>6}{row.adapters:>9}{row.tokens_per_second:>9.1f}"
            f"{row.time_to_first_token_ms:>10.0f}{row.peak_memory_mb:>9.0f}"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "results": [asdict(row) for row in rows],
            "ratios": ratios,
            "machine": machine(),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", "bench/serving.py", *sys.argv[1:]]),
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
