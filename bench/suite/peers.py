"""Peers that live in environments of their own: which are installed here, and how each is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from suite.process import BENCH, Worker

PEERS = BENCH / "peers"


@dataclass(frozen=True)
class Peer:
    """`mixes`: whether it can serve different adapters in one batch. `weights`: what it loads, "folder" or "gguf"."""

    name: str
    script: str
    environment: str  # the folder that setup.py makes
    mixes: bool
    weights: str

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return PEERS / self.environment / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether setup.py finished for it."""
        return (PEERS / self.environment / f".ready-{self.name}").is_file() and self.python.is_file()


KNOWN = (
    Peer("vllm-cpu", "vllm_cpu.py", ".venv", mixes=True, weights="folder"),
    Peer("llama-cpp", "llama_cpp.py", ".venv", mixes=False, weights="gguf"),
)


def installed(wanted: Sequence[str]) -> list[Peer]:
    """Those of `wanted` that are there."""
    return [peer for peer in KNOWN if peer.name in wanted and peer.is_installed]


def start(peer: Peer, system: str, work: Path) -> Worker:
    """A process of the peer."""
    log = work / "logs" / f"{system.replace(' ', '-')}.log"
    return Worker(system, [str(peer.python), str(PEERS / peer.script)], log)
