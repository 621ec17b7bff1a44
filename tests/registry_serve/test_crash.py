"""kill -9 of servers and of clients at random points of uploads and commits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from registry_serve.tools import run_registry
from registry_tools import Tiny

WORKER = Path(__file__).with_name("crash_worker.py")


@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_at_random_instants(
    llama: Tiny, tmp_path: Path, count: int, record_property: Callable[[str, object], None]
) -> None:
    command = [
        sys.executable,
        str(WORKER),
        str(tmp_path / "store"),
        str(llama.adapter),
        str(llama.base),
        str(count),
        "7",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    record_property("kills", json.dumps(answer))
    assert answer["kills"] == count
    assert answer["resumed"] == count // 4
    assert answer["ok"]
    assert answer["server"] == 0
    assert "Traceback" not in (tmp_path / "server.log").read_text()
    if count >= 100:
        # The kills strike before and after the commit, and while bytes come in; how often each depends on the machine.
        outcomes = answer["outcomes"]
        assert sum(n for what, n in outcomes.items() if what.endswith(", landed")) >= 5, outcomes
        assert sum(n for what, n in outcomes.items() if "staging" in what) >= 1, outcomes
        assert sum(n for what, n in outcomes.items() if what.endswith(", not landed")) >= 5, outcomes
    assert "checked" in run_registry_verify(tmp_path / "store")


def run_registry_verify(store: Path) -> str:
    """`registry verify` exits with 0 only if everything is well."""
    return run_registry("verify", "--registry", store)
