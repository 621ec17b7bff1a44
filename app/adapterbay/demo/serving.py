"""A real server in a process of its own, on a free port, and what is asked of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterbay.client import Client, ClientError, Selection
from adapterbay.registry import Registry
from adapterbay.registry.errors import Unavailable

START_SECONDS = 180
STOP_SECONDS = 60


@dataclass
class RunningServer:
    """A started server: where it listens, what it printed, and its exit code once it has stopped."""

    address: str
    holds: str
    exit_code: int | None = None


@contextmanager
def server(base: str, registry: Path, folder: Path) -> Iterator[RunningServer]:
    """Starts `server start` on a free port and stops it with SIGTERM. Raises Unavailable with its last words if it
    does not come up."""
    port_file, log = folder / "port", folder / "server.log"
    command = [sys.executable, "-c", "from adapterbay.cli.main import run_server; run_server()", "start"]
    command += ["--base", base, "--registry", str(registry), "--port", "0", "--port-file", str(port_file)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + START_SECONDS
            while not port_file.exists():
                if process.poll() is not None or time.monotonic() > until:
                    raise Unavailable(f"The server did not come up: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.05)
            running = RunningServer(f"127.0.0.1:{port_file.read_text().strip()}", log.read_text(errors="replace"))
            yield running
            process.send_signal(signal.SIGTERM)
            running.exit_code = process.wait(STOP_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Question:
    """One request of the crowd. `kind` is "generate" or "classify"."""

    kind: str
    who: str
    selection: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Reply:
    """What came of a question; `error` is empty when it was answered."""

    question: Question
    text: str = ""
    versions: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str = ""


def ask_all(client: Client, questions: Sequence[Question]) -> list[Reply]:
    """All questions at once, each from a thread of its own."""

    def ask(question: Question) -> Reply:
        began = time.monotonic()
        try:
            if question.kind == "classify":
                answer = client.classify([question.text], **question.selection)
                text = f"{answer[0].label} ({answer[0].probability:.0%})"
                provenance = answer.provenance
            else:
                generation = client.generate(
                    messages=[{"role": "user", "content": question.text}], max_tokens=40, **question.selection
                )
                text, provenance = generation.text, generation.provenance
        except ClientError as error:
            return Reply(question, error=str(error))
        versions = tuple(f"{use.name}@{use.version}" for use in provenance.adapters)
        return Reply(question, " ".join(text.split()), versions, time.monotonic() - began)

    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(ask, questions))


@dataclass
class Swap:
    """An alias moved under load. `versions` counts answers by version; `after_move` is the first full second's."""

    answered: dict[int, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    stale: int = 0
    old_digest: str = ""
    new_digest: str = ""


def swap_under_load(
    client: Client,
    registry: Registry,
    name: str,
    alias: str,
    versions: tuple[int, int],
    texts: Sequence[str],
    *,
    workers: int = 4,
    seconds: float = 2.0,
) -> Swap:
    """Asks NAME@ALIAS without a pause from several threads, moves the alias in the middle, and goes on.

    `stale` counts answers by the old version to requests that were sent after the move.
    """
    swap = Swap()
    lock, stop = threading.Lock(), threading.Event()
    moved_at = float("inf")

    def flow(worker: int) -> None:
        at = worker
        while not stop.is_set():
            sent = time.monotonic()
            try:
                answer = client.classify([texts[at % len(texts)]], adapter=f"{name}@{alias}")
            except ClientError as error:
                with lock:
                    swap.failed.append(str(error))
                continue
            at += workers
            used = answer.provenance.adapters[0]
            with lock:
                swap.answered[used.version] = swap.answered.get(used.version, 0) + 1
                if used.version == versions[0]:
                    swap.old_digest = used.digest
                    swap.stale += sent > moved_at
                else:
                    swap.new_digest = used.digest

    threads = [threading.Thread(target=flow, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    registry.set_alias(name, alias, versions[1], expected=versions[0])
    moved_at = time.monotonic()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return swap


def labels_of_two(client: Client, arms: tuple[str, str], texts: Sequence[str], advance: Any) -> list[list[str]]:
    """Every text through both arms, by Compare; the labels of each arm in the order of the texts."""
    labels = [[""] * len(texts) for _ in arms]
    for answer in client.compare_classify([Selection(adapter=arm) for arm in arms], texts):
        assert answer.classification is not None
        labels[answer.arm_index][answer.input_index] = answer.classification.label
        advance()
    return labels


def labels_of_base(client: Client, texts: Sequence[str], names: Sequence[str], advance: Any) -> list[str]:
    """What the untouched base says when it is asked: the label whose first token is likelier as the next word.

    The base has no head, so this is the fairest question to it: instructed in its own chat format, forced to choose.
    """

    def ask(text: str) -> str:
        question = (
            f"Is this movie review {names[0]} or {names[1]}? Answer with one word, {names[0]} or {names[1]}.\n\n{text}"
        )
        answer = client.generate(
            messages=[{"role": "user", "content": question}], base=True, max_tokens=1, log_probabilities=100
        )
        advance()
        best: dict[str, float] = {}
        for chance in answer.log_probabilities[0].top:
            word = chance.token.strip().lower()
            for name in names:
                if word and name.startswith(word):
                    best[name] = max(best.get(name, float("-inf")), chance.log_probability)
        return max(best, key=lambda name: best[name]) if best else ""

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, texts))
