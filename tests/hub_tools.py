"""What tests of registries on the Hub share: contents that differ, and a real server in a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from registry_tools import Draft

REGISTRY = "import adapterbay.registry.cli.serving; from adapterbay.registry.cli import app; app()"


def vary(adapter: Path, target: Path, number: int) -> Path:
    """A copy of an adapter with one value of its own. The same number is the same content."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(adapter, target)
    Draft(target).edit_tensors(lambda tensors: next(iter(tensors.values())).flat.__setitem__(0, 1.0 + number))
    return target


@dataclass
class ServerProcess:
    """`registry serve` over a store. `restart` after `kill` keeps its port, so that clients find it again."""

    store: Path
    base: Path
    arguments: Sequence[str] = ("--anonymous", "write")
    port: int = field(default_factory=lambda: free_port())
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable,
            "-c",
            REGISTRY,
            "serve",
            "--registry",
            str(self.store),
            "--port",
            str(self.port),
            "--base",
            str(self.base),
            *self.arguments,
        ]
        log = self.store.parent / f"server-{self.port}.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + 60
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()[-3000:]}")
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.endpoint}/api/models", timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """As a power cut: SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def serving(store: Path, base: Path, *arguments: str) -> Iterator[ServerProcess]:
    server = ServerProcess(store, base, arguments or ("--anonymous", "write"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


def environment(home: Path, endpoint: str | None = None) -> dict[str, str]:
    """The environment of a process whose caches, tokens and registries are all below `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ADAPTERBAY_"))}
    found = kept | {"HF_HOME": str(home / "hf"), "ADAPTERBAY_HOME": str(home / "adapterbay"), "OMP_NUM_THREADS": "1"}
    return found if endpoint is None else found | {"HF_ENDPOINT": endpoint}
