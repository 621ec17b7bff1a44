"""A real server process, and the real clients in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from adapterbay.registry.serve.tokens import TokenFile

REGISTRY = (
    "from adapterbay.registry.cli import serving, versions\n"
    "from adapterbay.registry.cli.common import app\n"
    "app(prog_name='registry')\n"
)


def registry_command(*arguments: object) -> list[str]:
    """The command line of `registry`."""
    return [sys.executable, "-c", REGISTRY, *map(str, arguments)]


def run_registry(*arguments: object) -> str:
    """Runs `registry …` and returns what it prints."""
    done = subprocess.run(registry_command(*arguments), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def new_weights(source: Path, target: Path, number: int) -> Path:
    """A copy of an adapter folder with other weights: the last value differs."""
    shutil.copytree(source, target)
    weights = target / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = (0x3C000000 + number).to_bytes(4, "little")
    weights.write_bytes(data)
    return target


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path → bytes; the client's own notes are left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.parts
    }


@dataclass
class Hub:
    """One registry and its server process, which can be killed and started again on the same port."""

    root: Path
    options: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[str] | None = None
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Hub:
        """Starts the server, and waits until it listens."""
        command = registry_command("serve", "--registry", self.store, "--port", self.port, *self.options)
        with (self.root / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            match = re.search(r"at http://127\.0\.0\.1:(\d+)", line)
            if match:
                self.port = int(match[1])
                return self
        raise AssertionError((self.root / "server.log").read_text())

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def token(self, name: str, scope: str = "write", only: str | None = None) -> str:
        """The token of this name, made the first time."""
        if name not in self.tokens:
            _, self.tokens[name] = TokenFile(self.store / "tokens.json").create(name, scope, only)
        return self.tokens[name]

    def api(self, name: str = "alice", scope: str = "write", only: str | None = None) -> HfApi:
        """The real client."""
        return HfApi(endpoint=self.url, token=self.token(name, scope, only))

    def environment(self, home: Path, name: str = "alice", **more: str) -> dict[str, str]:
        """The environment of a client process."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token(name),
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def python(self, code: str, home: Path, environment: Mapping[str, str] | None = None) -> Any:
        """Runs code in a process of its own; returns the JSON of its last line."""
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=self.environment(home, **(environment or {})),
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    def hf(self, home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs `hf …`."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("hf")), *map(str, arguments)],
            env=self.environment(home, **environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
