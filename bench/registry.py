"""The registry's speed: lookups as it grows, push and pull against the disk's own copy, what duplicates cost.

    python bench/registry.py [--json FILE] [--adapters N] [--megabytes N]

Adapters are LoRA on a made-up Llama of one small layer; the big one is LoRA r=512 on twelve projections of 2048.
Growing writes manifests and records as pushes do and has the index built from them (30,000 pushes one by one would
take half an hour of fsync); some are then pushed for real. Every figure is a median; the peer of push and pull is a
plain copy of the same files with fsync, on the same disk in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from adapterbay.registry import Registry
from adapterbay.registry.digest import canonical_json
from adapterbay.registry.local.records import VersionFile, now
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.views import Listing, MetricBound

PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def modules(layers: int) -> Iterator[str]:
    for layer in range(layers):
        for block, names in PROJECTIONS.items():
            yield from (f"model.layers.{layer}.{block}.{name}" for name in names)


def make_base(folder: Path, hidden: int, layers: int) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.standard_normal((hidden, hidden), dtype=np.float32).astype(np.float16)
        for name in modules(layers)
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_adapter(folder: Path, base: Path, hidden: int, names: list[str], rank: int, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in names:
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((rank, hidden), dtype=np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((hidden, rank), dtype=np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in names}),
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "training.json").write_text(json.dumps({"metrics": {"accuracy": round(rng.uniform(0.5, 1), 3)}}))
    return folder


def median_ms(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times), 3)


def grow(registry: Registry, manifest: Manifest, first: int, last: int) -> None:
    """Adds adapters `first` to `last` with three versions each to the disk, and builds the index from it."""
    sequence = registry.last_event()
    for number in range(first, last):
        name = f"team{number % 97}/adapter-{number:05d}"
        for version in (1, 2, 3):
            sequence += 1
            training = {"metrics": {"accuracy": 0.5 + (number * 7 + version) % 500 / 1000}, "seed": number}
            made = manifest.model_copy(update={"training": training | {"version": version}})
            fresh = Manifest.from_bytes(canonical_json(made.model_dump(mode="json")))
            blob = registry.blobs.path(fresh.digest)
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(fresh.to_bytes())
            record = VersionFile(name, version, fresh.digest, now(), sequence, "bench")
            place = registry.records.version_path(name, version)
            place.parent.mkdir(parents=True, exist_ok=True)
            document = {"record_version": 2, **{key: getattr(record, key) for key in record.__slots__}}
            place.write_bytes(canonical_json(document))
    registry.rebuild_index()


def lookups(registry: Registry, adapters: int) -> dict[str, float]:
    dice = random.Random(1)

    def name() -> str:
        number = dice.randrange(adapters)
        return f"team{number % 97}/adapter-{number:05d}"

    digests = [registry.resolve(name()).digest for _ in range(50)]
    high = Listing(metrics=(MetricBound.parse("accuracy>=0.998"),), limit=50)
    return {
        "resolve NAME": median_ms(lambda: registry.resolve(name()), 300),
        "resolve NAME@2": median_ms(lambda: registry.resolve(f"{name()}@2"), 300),
        "resolve by digest": median_ms(lambda: registry.places(dice.choice(digests)), 300),
        "versions NAME": median_ms(lambda: registry.versions(name()), 100),
        "history NAME": median_ms(lambda: registry.history(name()), 100),
        "list, a page of 50": median_ms(lambda: registry.adapters(listing=Listing(limit=50)), 50),
        "list --prefix (a hundredth)": median_ms(lambda: registry.adapters(f"team{dice.randrange(97)}/"), 30),
        "list --metric, first 50": median_ms(lambda: registry.adapters(listing=high), 20),
        "list, all of them": median_ms(lambda: registry.adapters(), 5),
    }


def pushes(registry: Registry, folders: list[Path]) -> float:
    times = []
    for number, folder in enumerate(folders):
        began = time.perf_counter()
        registry.push(folder, f"pushed/{number}", aliases=["champion"])
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times), 1)


def copied(source: Path, target: Path) -> None:
    """A plain copy of a folder, durable as a push is."""
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as reading, (target / path.name).open("wb") as writing:
            shutil.copyfileobj(reading, writing, 4 * 2**20)
            writing.flush()
            os.fsync(writing.fileno())


def big(work: Path, megabytes: int, rounds: int) -> dict[str, float]:
    hidden, rank = 2048, 512
    names = list(modules(2))[: max(1, round(megabytes * 1e6 / (2 * 4 * rank * hidden)))]
    base = make_base(work / "big-base", hidden, 2)
    registry = Registry.open(work / "big-store")
    registry.push(make_adapter(work / "warm", base, hidden, names[:1], 8, 0), "warm")  # the base's fingerprint
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        folder = make_adapter(work / "big", base, hidden, names, rank, number + 1)
        size = sum(path.stat().st_size for path in folder.iterdir())
        for step, (what, call) in enumerate(
            (
                ("push", partial(registry.push, folder, "big")),
                ("push of the same content", partial(registry.push, folder, "again")),
                ("pull", partial(registry.pull, "big", work / f"pull-{number}")),
            )
        ):
            # Each beside a copy of its own: the disk's speed changes from minute to minute.
            copy = partial(copied, folder, work / f"copy-{step}")
            for name, timed in ((f"copy beside {what}", copy), (what, call)):
                os.sync()  # what was written before is not waited for in this figure
                began = time.perf_counter()
                timed()
                times.setdefault(name, []).append(time.perf_counter() - began)
            shutil.rmtree(work / f"copy-{step}")
        shutil.rmtree(work / f"pull-{number}")
    figures = {"size MB": round(size / 1e6, 1)}
    for name, found in times.items():
        figures[f"{name}, ms"] = round(1000 * statistics.median(found), 1)
    for what in ("push", "pull"):
        pairs = zip(times[f"copy beside {what}"], times[what], strict=True)
        figures[f"{what} at this share of the copy's speed"] = round(statistics.median(a / b for a, b in pairs), 2)
    return figures


def stored(registry: Registry) -> int:
    return sum(path.stat().st_size for _, path in registry.blobs.all())


def duplicates(work: Path, base: Path) -> dict[str, float]:
    """50 fine-tunes; then each again under another name, as a team that promotes by copying does."""
    registry = Registry.open(work / "fifty")
    logical = 0
    figures = {}
    for name, count in (("50 fine-tunes", 50), ("each pushed twice", 50)):
        for number in range(count):
            folder = make_adapter(work / "fine-tune", base, 64, list(modules(1)), 8, number)
            receipt = registry.push(folder, f"{name.split()[0]}/{number}")
            logical += receipt.manifest.size_bytes + len(receipt.manifest.to_bytes())
        figures[f"{name}: bytes pushed over bytes stored"] = round(logical / stored(registry), 2)
    return figures


def show(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:<52}{value if not isinstance(value, list) else '  '.join(f'{each:>9}' for each in value)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help="where to work; a folder on the disk to measure")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="adapterbay-bench-", dir=arguments.place))
    os.environ.setdefault("ADAPTERBAY_HOME", str(work / "home"))
    try:
        base = make_base(work / "base", 64, 1)
        folders = [
            make_adapter(work / "small" / str(number), base, 64, list(modules(1)), 8, number) for number in range(120)
        ]
        registry = Registry.open(work / "store")
        manifest = registry.push(folders[0], "first").manifest
        sizes = [size for size in (100, 1_000, 10_000) if size < arguments.adapters] + [arguments.adapters]
        tables, push_ms, before = [], [], 0
        for step, size in enumerate(sizes):
            grow(registry, manifest, before, size)
            before = size
            tables.append(lookups(registry, size))
            push_ms.append(pushes(registry, folders[1 + 30 * step : 31 + 30 * step]))
            print(f"{size} adapters × 3 versions: measured", file=sys.stderr)
        rows = {name: [table[name] for table in tables] for name in tables[0]}
        rows["push of a small adapter, with an alias"] = push_ms
        result = {
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "adapters": sizes,
            "milliseconds": rows,
            "big": big(work, arguments.megabytes, arguments.rounds),
            "duplicates": duplicates(work, base),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show("push and pull against a copy", result["big"])
    show("duplicate content", result["duplicates"])
    show(f"milliseconds, with {' / '.join(map(str, sizes))} adapters of 3 versions", rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
