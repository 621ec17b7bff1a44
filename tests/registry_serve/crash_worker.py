"""Run as a script without torch: servers and clients that are killed at random instants. Prints one JSON object.

crash_worker.py REGISTRY ADAPTER BASE COUNT SEED

Servers and clients are forks of this process, so that a start takes milliseconds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.utils import logging as hub_logging

from adapterbay.registry import Registry
from adapterbay.registry.local.commits import CommitLog
from adapterbay.registry.serve.running import run
from adapterbay.registry.serve.settings import BaseChoice, ServeSettings, Sizes
from adapterbay.registry.serve.tokens import TokenFile

REGULAR_BYTES = 2**20
PER_NAME = 10


@dataclass
class Content:
    """What one client uploads: new weights, and a file that goes by LFS or inside the commit."""

    weights: bytes
    more: bytes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Crash:
    def __init__(self, root: Path, adapter: Path, base: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.root, self.adapter = root, adapter
        self.store = Registry.open(root)
        self.log = CommitLog(root)
        _, self.token = TokenFile(root / "tokens.json").create("crash", "write")
        self.settings = ServeSettings(
            root,
            port=free_port(),
            bases=(BaseChoice.parse(f"{base.name}={base}"),),
            sizes=Sizes(regular_bytes=REGULAR_BYTES),
        )
        self.server = 0
        self.number = 0
        self.template = (adapter / "adapter_model.safetensors").read_bytes()

    def start_server(self) -> None:
        self.server = os.fork()
        if self.server == 0:
            code = 1
            try:
                log = os.open(self.root.parent / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 2)
                run(self.settings, lambda _: None)
                code = 0
            finally:
                os._exit(code)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.settings.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def new_content(self) -> Content:
        self.number += 1
        large = self.number % 2 == 0
        weights = self.template[:-4] + (0x3C000000 + self.number).to_bytes(4, "little")
        return Content(weights, self.dice.randbytes(3 * REGULAR_BYTES if large else REGULAR_BYTES * 3 // 4))

    def start_client(self, name: str, content: Content) -> tuple[int, int]:
        """Forks a client. Returns its process, and a pipe that first says it begins and then what was acknowledged."""
        reading, writing = os.pipe()
        client = os.fork()
        if client == 0:
            code = 1
            try:
                os.close(reading)
                hub_logging.set_verbosity(hub_logging.CRITICAL)
                api = HfApi(endpoint=f"http://127.0.0.1:{self.settings.port}", token=self.token)
                os.write(writing, b"!")
                operations = [
                    CommitOperationAdd("adapter_config.json", self.adapter / "adapter_config.json"),
                    CommitOperationAdd("adapter_model.safetensors", content.weights),
                    CommitOperationAdd("more.dat", content.more),
                ]
                oid = api.create_commit(name, operations, commit_message="Crash").oid
                os.write(writing, oid.encode())
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        os.read(reading, 1)
        return client, reading

    def finish_client(self, client: int, reading: int) -> str | None:
        """Waits for a client; what was acknowledged to it."""
        os.waitpid(client, 0)
        acknowledged = os.read(reading, 100).decode()
        os.close(reading)
        return acknowledged or None

    def create(self, name: str) -> None:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                HfApi(endpoint=f"http://127.0.0.1:{self.settings.port}", token=self.token).create_repo(name)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0

    def state(self, name: str) -> tuple[int, int]:
        """How many versions and commits there are."""
        head = self.log.head(name)
        return len(self.log.versions(name)), head.number if head else 0

    def check(self, name: str, before: tuple[int, int], acknowledged: str | None) -> str:
        """Everything that must hold after a kill; says whether the commit landed."""
        now = self.state(name)
        assert now in (before, (before[0] + 1, before[1] + 1)), (before, now)
        landed = now != before
        head = self.log.head(name)
        assert head is not None
        if acknowledged is not None:
            assert landed, "an acknowledged commit is lost"
            assert head.sha == acknowledged
        history = self.log.until(name, head.number, 1000)
        for newer, older in itertools.pairwise(history):
            assert newer.parent == older.sha
        assert [commit.version for commit in reversed(history)][1:] == list(range(1, now[0] + 1))
        for digest, size in head.tree.values():
            self.log.check_blob(digest, size, name)
        report = self.store.verify(name)
        assert report.ok, report.problems
        if now[0]:
            self.store.snapshot(f"{name}@{now[0]}")
        events = self.store.events(limit=100_000)
        assert [event.sequence for event in events] == list(range(1, self.store.last_event() + 1))
        return "landed" if landed else "not landed"

    def on_disk(self) -> dict[str, set[tuple[str, int]]]:
        found: dict[str, set[tuple[str, int]]] = {"tmp": set(), "blobs": set(), "adapters": set()}
        for kind, places in found.items():
            for folder, folders, files in os.walk(self.root / kind):  # passes over what a living server tidies away
                for path in (Path(folder, name) for name in (*folders, *files)):
                    with contextlib.suppress(FileNotFoundError):
                        places.add((str(path), path.stat().st_ino))
        return found

    def stage(self, before: dict[str, set[tuple[str, int]]]) -> str:
        after = self.on_disk()
        for kind in ("adapters", "blobs", "tmp"):
            if after[kind] - before[kind]:
                return {"adapters": "record", "blobs": "blobs", "tmp": "staging"}[kind]
        return "before"

    def run(self, count: int) -> dict[str, Any]:
        self.start_server()
        self.create("team/warm")
        durations = []
        for _ in range(6):
            began = time.perf_counter()
            assert self.finish_client(*self.start_client("team/warm", self.new_content()))
            durations.append(time.perf_counter() - began)
        duration = statistics.median(durations)
        outcomes: Counter[str] = Counter()
        kills = resumed = 0
        while kills < count:
            name = f"team/x{kills // PER_NAME}"
            if not self.log.exists(name):
                self.create(name)
            content = self.new_content()
            before, disk = self.state(name), self.on_disk()
            client, reading = self.start_client(name, content)
            time.sleep(self.dice.uniform(0, 1.1 * duration))
            victim = self.dice.choice(("server", "client"))
            if victim == "server":
                os.kill(self.server, signal.SIGKILL)
                os.waitpid(self.server, 0)
                stage, outcome = self.stage(disk), self.check(name, before, None)
                # Started again: the client goes on by itself if it was at a request that it repeats.
                self.start_server()
                acknowledged = self.finish_client(client, reading)
                self.check(name, before, acknowledged)
            else:
                os.kill(client, signal.SIGKILL)
                acknowledged = self.finish_client(client, reading)
                stage = self.stage(disk)
                if acknowledged is None:
                    self.settle(name)
                outcome = self.check(name, before, acknowledged)
            kills += 1
            outcomes[f"{victim}: {stage}, {outcome}"] += 1
            if kills % 4 == 0:
                # The very upload that was cut off works again, whether it landed or not, and makes one version.
                again = self.finish_client(*self.start_client(name, content))
                assert again is not None
                assert self.state(name) == (before[0] + 1, before[1] + 1)
                self.check(name, before, again)
                resumed += 1
        self.read_back(f"team/x{(kills - 1) // PER_NAME}")
        os.kill(self.server, signal.SIGTERM)
        _, status = os.waitpid(self.server, 0)
        report = self.store.verify()
        return {
            "kills": kills,
            "resumed": resumed,
            "milliseconds": round(1000 * duration),
            "outcomes": dict(sorted(outcomes.items())),
            "ok": report.ok,
            "server": status,
            "versions": sum(adapter.versions for adapter in self.store.adapters()),
        }

    def settle(self, name: str) -> None:
        """The server may still be at work on what a killed client had sent whole."""
        last, quiet = self.state(name), 0
        while quiet < 5 or list((self.root / "tmp").glob(f"*-{self.server}-*")):
            time.sleep(0.01)
            now = self.state(name)
            quiet, last = (quiet + 1 if now == last else 0), now

    def read_back(self, name: str) -> None:
        """The real client reads the newest version as it is stored."""
        child = os.fork()
        if child == 0:
            endpoint = f"http://127.0.0.1:{self.settings.port}"
            place = self.root.parent / "cache"
            path = hf_hub_download(
                name, "adapter_model.safetensors", endpoint=endpoint, token=self.token, cache_dir=place
            )
            newest = self.store.snapshot(name).read("adapter_model.safetensors")
            os._exit(0 if Path(path).read_bytes() == newest else 1)
        assert os.waitpid(child, 0)[1] == 0


def main() -> None:
    registry, adapter, base, count, seed = sys.argv[1:]
    folder = Path(registry).parent / "source"
    shutil.copytree(adapter, folder)
    crash = Crash(Path(registry), folder, Path(base), int(seed))
    try:
        answer = crash.run(int(count))
    except BaseException:
        if crash.server:
            os.kill(crash.server, signal.SIGKILL)
        raise
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
