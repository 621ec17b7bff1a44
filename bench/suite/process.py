"""A system under test in a process of its own, spoken to in JSON lines. Standard library only: peers run it, too.

Every system has its own process, so that its peak memory, its threads and its allocator are its own. A process lives
through the whole comparison and sleeps while others have their turn, so that rounds of different systems interleave
without anybody's start-up in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BENCH = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 3600.0
STOP_SECONDS = 30.0


class SystemFailed(Exception):
    """A system could not be started, or what it was asked for failed; the message has its traceback or last words."""


class Worker:
    """The parent's end. `call(method, …)` runs a method of the system there and returns what it returned."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, name=f"read-{name}", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def call(self, method: str, **arguments: Any) -> Any:
        """Raises SystemFailed when the method raised, the process ended, or no answer came within an hour."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=ANSWER_SECONDS)
        except (BrokenPipeError, queue.Empty) as error:
            raise SystemFailed(f"{self.name}: no answer to {method} ({error!r}). {self._last_words()}") from error
        if line is None:
            raise SystemFailed(f"{self.name} ended during {method}. {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemFailed(f"{self.name}: {method} failed.\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Ends the process and whatever it started."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        # Its own session, so this reaches its children and nobody else's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        return f"Its log, {self._log}, ends:\n{self._log.read_text(errors='replace')[-2000:]}"


def answer(system: object) -> None:
    """The child's end: answers calls of `system`'s methods until the parent closes the pipe.

    What libraries print to standard output goes to the log instead.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            reply = {"result": getattr(system, method)(**arguments)}
        except Exception:  # noqa: BLE001 - the parent tells what it was
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
    # The parent wants nothing more. Threads of a system that was not closed would keep the interpreter here.
    sys.stderr.flush()
    os._exit(0)


def python_worker(name: str, module: str, folder: Path) -> Worker:
    """A system that runs in this very environment: `python -m module`."""
    return Worker(name, [sys.executable, "-m", module], folder / "logs" / f"{name.replace(' ', '-')}.log")


def reset_peak() -> None:
    """Makes the peak of resident memory begin anew (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The peak of this process and its children since `reset_peak`, in MB; children that are forked share pages that
    are counted in each."""
    return sum(_peak_of(pid) for pid in (os.getpid(), *_descendants(os.getpid())))


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _peak_of(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0
