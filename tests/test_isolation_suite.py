"""The isolation suite runs on another engine than ours, without adapterbay, and finds one that mixes adapters up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FOUND = (
    "test_a_name_pushed_again_answers_anew_although_its_prompt_is_cached",
    "test_a_row_keeps_the_weights_that_it_began_with",
    "test_one_content_under_two_names_and_two_contents_under_one",
)

STALE = '''
from isolation.example import OneByOne

class Stale(OneByOne):
    """Keeps for ever what a name meant first."""
    def push(self, name, folder, *, alias=None):
        super().push(name, self._folders.get(name, folder))

def start(base, work, limits):
    return Stale(base)
'''


def test_it_passes_the_example_engine_and_finds_a_stale_one(tmp_path: Path) -> None:
    (tmp_path / "adapterbay.py").write_text("raise ImportError('the suite must do without it')\n")
    (tmp_path / "stale_engine.py").write_text(STALE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", "tests/isolation"]
    command += ["tests/isolation/test_names.py", "--isolation-engine", "isolation.example:start"]
    command += ["--isolation-engine", "stale_engine:start"]
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = set(re.findall(r"^FAILED tests/isolation/test_names.py::(\S+)", done.stdout, re.MULTILINE))
    assert failed == {f"{name}[stale_engine:start]" for name in FOUND}, done.stdout
    assert "9 passed, 8 skipped" in re.sub(r"\d+ failed, ", "", done.stdout)
    assert "this engine has no versions" in done.stdout
