"""Hours of churn in little: is every answer right, and does memory stay flat?

    python bench/soak.py [--minutes N] [--seed N] [--json FILE]

A tiny random base, sixteen adapters with two versions each, and budgets for a quarter of them. Requests come under
aliases that move, versions, weighted fusions and the base alone; rows are cancelled or too late; adapters are loaded,
unloaded, pinned; some loads fail because their files were altered. Every whole answer is compared with that of plain
PEFT with the same weights, computed beforehand.

Fails (exit status 1) when an answer is wrong, an error is not the one that was due, a tier of memory goes beyond its
budget, or the line through resident memory after the warm-up (the first third) rises by more than 1 % of it, or 8 MiB
if that is more. At the end everything is unloaded, and every byte must be back that adapters took: in host memory, on
the device, in the layers' pools. Prints a line every ten seconds.

`in_use` is what malloc has given out and not got back (glibc): where it is flat, what rises is the allocator's own.
Python's table of interned strings (parts of paths) grows once, by 3.7 MiB, after some 10,000 answers.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for the tiny base and its adapters

from memory import in_use_mib, resident_mib, rise, taken_bytes  # noqa: E402
from peft import PeftModel  # noqa: E402
from tiny import TARGETS, load_reference, make_adapter, make_base  # noqa: E402

from adapterbay.registry import Registry  # noqa: E402
from adapterbay.registry.errors import (  # noqa: E402
    Cancelled,
    Corrupted,
    DeadlineExceeded,
    InvalidArgument,
    QueueFull,
    Unavailable,
)
from adapterbay.server.config import ServerConfig  # noqa: E402
from adapterbay.server.engine import Engine  # noqa: E402
from adapterbay.server.requests import (  # noqa: E402
    ArmSpec,
    Delta,
    Event,
    GenerateResult,
    GenerateTask,
    Part,
    Request,
    SamplingSpec,
)

ADAPTERS = 16
VERSIONS = 2
TOKENS = 10
OUTSTANDING = 24
MARGIN = 1e-2
"""How much likelier the reference's token must be than the next one; closer calls are not asked."""
SAMPLE_SECONDS = 1.0
PRINT_SECONDS = 10.0
PROMPTS = tuple(
    tuple(range(20, 20 + length)) + tuple(range(60, 60 + tail)) for length, tail in ((40, 0), (40, 9), (5, 0))
)
FUSIONS = (((0, 0.7), (1, 0.3)), ((0, 0.3), (1, 0.7)), ((2, 1.0), (3, -0.5)), ((4, 0.5), (5, 0.5)))

Arm = tuple[tuple[int, int, float], ...]  # (adapter, version, weight); none is the base


@dataclass
class World:
    """What is served, and what PEFT answers: tokens by arm and prompt."""

    base: Path
    registry: Registry
    answers: dict[tuple[Arm, int], tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Asked:
    """One request and what is due to it."""

    request: Request
    want: tuple[int, ...] | None  # None: its load is to fail
    may_end: tuple[type[Exception], ...] = ()


class Wrong(Exception):
    """Something was not as it must be."""


def prepare(root: Path) -> World:
    """Makes base, adapters and registry, and asks PEFT for every answer."""
    world = World(make_base(root / "base", "llama"), Registry.open(root / "registry"))
    folders: dict[tuple[int, int], Path] = {}
    for number in range(ADAPTERS):
        for version in range(1, VERSIONS + 1):
            folder = folders[number, version] = root / f"n{number}-{version}"
            make_adapter(
                world.base,
                folder,
                targets=TARGETS["llama"][number % 2],
                rank=(4, 8, 16)[number % 3],
                seed=100 * version + number,
                scale=0.5,
            )
            world.registry.push(folder, f"n{number}", base=f"folder:{world.base}")
        world.registry.set_alias(f"n{number}", "live", 1)
    make_adapter(world.base, root / "bad", targets=["q_proj"], rank=8, seed=999)
    world.registry.push(root / "bad", "bad", base=f"folder:{world.base}")
    file = world.registry.open_snapshot(world.registry.resolve("bad").digest).files["adapter_model.safetensors"]
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")

    arms: list[Arm] = [(), *(((number, version, 1.0),) for number, version in folders)]
    arms += [tuple((number, 1, weight) for number, weight in fusion) for fusion in FUSIONS]
    for arm in arms:
        model = load_reference(world.base)
        if arm:
            names = [f"part{index}" for index in range(len(arm))]
            model = PeftModel.from_pretrained(model, folders[arm[0][:2]], adapter_name=names[0])
            for name, part in zip(names[1:], arm[1:], strict=True):
                model.load_adapter(folders[part[:2]], adapter_name=name)
            if len(arm) > 1:
                model.add_weighted_adapter(names, [part[2] for part in arm], "fused", combination_type="cat")
                model.set_adapter("fused")
        for index, prompt in enumerate(PROMPTS):
            tokens = _greedy(model.eval(), prompt)
            if tokens is not None:
                world.answers[arm, index] = tokens
    return world


@torch.no_grad()
def _greedy(model: Any, prompt: tuple[int, ...]) -> tuple[int, ...] | None:
    """Greedy tokens, or None where one is not clearly the likeliest."""
    ids = list(prompt)
    for _ in range(TOKENS):
        likeliest = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        first, second = likeliest.values.tolist()
        if first - second < MARGIN:
            return None
        ids.append(int(likeliest.indices[0]))
    return tuple(ids[len(prompt) :])


class Churn:
    """Asks, disturbs and checks, from one thread."""

    def __init__(self, world: World, engine: Engine, seed: int) -> None:
        self._world = world
        self._engine = engine
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._under_way: dict[int, Asked] = {}
        self._room = threading.Semaphore(OUTSTANDING)
        self._live = dict.fromkeys(range(ADAPTERS), 1)
        self._serial = 0
        self._asks = sorted(world.answers)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def step(self) -> None:
        """One act, chosen at random."""
        act = self._rng.choices(
            (self._ask, self._ask_bad, self._cancel, self._unload, self._load, self._move, self._pin),
            weights=(76, 2, 7, 2, 5, 5, 3),
        )[0]
        act()

    def settle(self, seconds: float = 60) -> None:
        """Waits for everything that is under way."""
        end = time.monotonic() + seconds
        while self._under_way or self._engine.stats().running or self._engine.stats().waiting:
            if time.monotonic() > end:
                self.wrong.append(f"{len(self._under_way)} requests never ended")
                return
            time.sleep(0.01)

    def _ask(self) -> None:
        arm, prompt = self._rng.choice(self._asks)
        if len(arm) == 1:  # a popular one: the asks are as many for each, which is not what traffic looks like
            number = int(self._rng.paretovariate(0.7) - 1) % ADAPTERS
            version = self._rng.choice((self._live[number], arm[0][1]))
            arm = ((number, version, 1.0),)
            if (arm, prompt) not in self._world.answers:
                return
        parts = []
        for number, version, weight in arm:
            tag = "live" if version == self._live[number] and self._rng.random() < 0.5 else str(version)
            reference = f"n{number}@{tag}"
            found = self._world.registry.resolve(reference)
            if found.version != version:
                raise Wrong(f"{reference} is version {found.version}, not {version}")
            parts.append(Part(reference, found.name, found.version, found.digest, weight))
        ends: tuple[type[Exception], ...] = (DeadlineExceeded,) if self._rng.random() < 0.04 else ()  # too late
        deadline = time.monotonic() + self._rng.random() * 0.05 if ends else None
        self._submit(parts, prompt, self._world.answers[arm, prompt], deadline, ends)

    def _ask_bad(self) -> None:
        found = self._world.registry.resolve("bad")
        self._submit([Part("bad", found.name, found.version, found.digest)], 0, None, None, (Corrupted,))

    def _submit(
        self,
        parts: list[Part],
        prompt: int,
        want: tuple[int, ...] | None,
        deadline: float | None,
        ends: tuple[type[Exception], ...],
    ) -> None:
        self._room.acquire()
        self._serial += 1
        key = self._serial
        task = GenerateTask(PROMPTS[prompt], SamplingSpec(max_tokens=TOKENS, ignore_end=True))
        request = Request(ArmSpec(tuple(parts)), task, lambda event: self._heard(key, event), deadline)
        with self._lock:
            self._under_way[key] = Asked(request, want, ends)
        try:
            self._engine.submit([request])
        except (QueueFull, *ends):  # too late already, where that may be
            with self._lock:
                del self._under_way[key]
            self._room.release()

    def _heard(self, key: int, event: Event) -> None:
        if isinstance(event, Delta):
            return
        with self._lock:
            asked = self._under_way.pop(key)
        self._room.release()
        self.counts[type(event).__name__] += 1
        if isinstance(event, GenerateResult):
            if event.token_ids != asked.want:
                self.wrong.append(f"{asked.request.arm} gave {event.token_ids}, not {asked.want}")
        elif not isinstance(event, asked.may_end):
            self.wrong.append(f"{asked.request.arm}: {event!r}")

    def _cancel(self) -> None:
        with self._lock:
            if not self._under_way:
                return
            asked = self._rng.choice(list(self._under_way.values()))
            asked.may_end += (Cancelled,)
        self._engine.cancel(asked.request)

    def _digest(self) -> str:
        number, version = self._rng.randrange(ADAPTERS), self._rng.randint(1, VERSIONS)
        return self._world.registry.resolve(f"n{number}@{version}").digest

    def _unload(self) -> None:
        digest = self._digest()
        if not self._engine.adapters.residency(digest).pinned:
            self._engine.adapters.unload(digest)
            self.counts["unloads"] += 1

    def _load(self) -> None:
        try:
            self._engine.adapters.load(self._digest()).result(30)
        except (Unavailable, QueueFull, InvalidArgument):  # unloaded by us while it waited for room; or there is none
            self.counts["loads refused"] += 1
        else:
            self.counts["loads asked for"] += 1

    def _move(self) -> None:
        number = self._rng.randrange(ADAPTERS)
        self._live[number] = self._rng.randint(1, VERSIONS)
        self._world.registry.set_alias(f"n{number}", "live", self._live[number])
        self.counts["alias moves"] += 1

    def _pin(self) -> None:
        digest = self._world.registry.resolve(f"n{self._rng.randrange(3)}@1").digest  # never more than a few
        try:
            self._engine.adapters.pin(digest, self._rng.random() < 0.4)
        except InvalidArgument as error:
            self.wrong.append(str(error))
        self.counts["pins and unpins"] += 1


def unload_all(world: World, engine: Engine) -> dict[str, int]:
    """Unpins and unloads everything; what adapters take then."""
    for number in range(ADAPTERS):
        for version in range(1, VERSIONS + 1):
            digest = world.registry.resolve(f"n{number}@{version}").digest
            engine.adapters.pin(digest, False)
            engine.adapters.unload(digest).result(30)
    until = time.monotonic() + 10  # the engine's thread vacates the device
    while any(taken_bytes(engine).values()) and time.monotonic() < until:
        time.sleep(0.01)
    return taken_bytes(engine)


def soak(world: World, minutes: float, seed: int) -> dict[str, Any]:
    """Churns for so long; the figures, with `wrong` telling everything that was."""
    size = max(
        sum(file.size for file in world.registry.manifest(world.registry.resolve(f"n{n}@1").digest).files)
        for n in range(ADAPTERS)
    )
    config = ServerConfig(
        base=str(world.base),
        registry=str(world.registry.root),
        dtype="float32",
        quantize="none",
        device="cpu",
        max_rows=8,
        kv_bytes=1 << 20,
        host_bytes=8 * size,
        device_bytes=4 * size,
    )
    engine = Engine.create(config)
    engine.start()
    churn = Churn(world, engine, seed)
    at_first = taken_bytes(engine)
    samples: list[tuple[float, float, float]] = []  # minutes, resident and in use in MiB
    began = sampled = printed = time.monotonic()
    most_host = most_device = 0
    while (now := time.monotonic()) < began + 60 * minutes and not churn.wrong:
        churn.step()
        stats = engine.stats()
        most_host, most_device = max(most_host, stats.host_bytes), max(most_device, stats.device_bytes)
        if now - sampled >= SAMPLE_SECONDS:
            sampled = now
            samples.append(((now - began) / 60, resident_mib(), in_use_mib()))
        if now - printed >= PRINT_SECONDS:
            printed = now
            tally = engine.adapters.memory.tally
            print(
                f"{(now - began) / 60:6.2f} min  {samples[-1][1]:8.1f} MiB  {stats.steps:7d} steps  "
                f"{churn.counts['GenerateResult']:7d} answers  {sum(tally.load_seconds.read()[0]):6d} loads  "
                f"{tally.evictions.of():6d} + {engine.device_tally.evictions.of():6d} evictions",
                flush=True,
            )
    churn.settle()
    churned, at_last = taken_bytes(engine), unload_all(world, engine)
    engine.stop(5.0)
    stats, wrong = engine.stats(), churn.wrong
    if at_last != at_first or stats.free_blocks != stats.blocks:
        wrong.append(f"something is left: {at_last} after {at_first}, {stats}")
    if most_host > config.host_bytes or most_device > config.device_bytes:
        wrong.append(f"a budget was exceeded: {most_host}, {most_device} of {config.host_bytes}, {config.device_bytes}")
    steady = [sample for sample in samples if sample[0] > minutes / 3]
    grown, grown_in_use = (rise((sample[0], sample[at]) for sample in steady) for at in (1, 2))
    allowed = max(8.0, 0.01 * statistics.median(mib for _, mib, _ in steady))
    if grown > allowed:
        wrong.append(f"resident memory rose by {grown:.1f} MiB after the warm-up; {allowed:.1f} are allowed")
    return {
        "command": f"python bench/soak.py --minutes {minutes:g} --seed {seed}",
        "minutes": minutes,
        "steps": stats.steps,
        "host_loads": sum(engine.adapters.memory.tally.load_seconds.read()[0]),
        "host_evictions": engine.adapters.memory.tally.evictions.of(),
        "device_evictions": engine.device_tally.evictions.of(),
        "counts": dict(churn.counts),
        "resident_mib": {"first": samples[0][1], "after_warm_up": steady[0][1], "last": samples[-1][1]},
        "rise_mib": round(grown, 2),
        "allowed_mib": round(allowed, 2),
        "rise_in_use_mib": round(grown_in_use, 2),
        "bytes": {
            "host_budget": config.host_bytes,
            "host_most": most_host,
            "device_budget": config.device_bytes,
            "device_most": most_device,
            "at_first": at_first,
            "before_unloading": churned,
            "at_last": at_last,
        },
        "samples": [[round(value, 3) for value in sample] for sample in samples[:: max(len(samples) // 120, 1)]],
        "wrong": wrong[:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = prepare(Path(folder))
        print(f"{len(world.answers)} answers known from PEFT", flush=True)
        figures = soak(world, options.minutes, options.seed)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key != "samples"}, indent=1))
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
