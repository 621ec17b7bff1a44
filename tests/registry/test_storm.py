"""Every kind of change at once, by many processes and threads, and processes killed in the middle of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from registry_tools import Tiny

WORKER = Path(__file__).with_name("storm_worker.py")


def storm(mode: str, place: Path, adapter: Path, *numbers: int) -> Any:
    done = subprocess.run(
        [sys.executable, str(WORKER), mode, str(place), str(adapter), *map(str, numbers)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_many_processes_and_threads_change_everything_at_once(llama: Tiny, tmp_path: Path) -> None:
    answer = storm("together", tmp_path / "store", llama.adapter, 6, 12)
    assert answer["failures"] == []
    assert answer["rebuilt"] is True
    assert answer["temporary"] == 0
    assert {"push", "alias", "tag", "delete", "guard", "gc", "sign"} <= answer["done"].keys()


@pytest.mark.slow
def test_killed_in_the_middle_of_any_change(llama: Tiny, tmp_path: Path) -> None:
    answer = storm("kill", tmp_path / "store", llama.adapter, 80, 7)
    assert answer["kills"] == 80
    assert answer["events"] > 100
    assert answer["rebuilt"] is True
