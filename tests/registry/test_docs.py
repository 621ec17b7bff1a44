"""What docs/registry.md says to paste works as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from registry_tools import Draft, Tiny

DOCS = Path(__file__).resolve().parents[2] / "docs"


def block(document: str, heading: str) -> str:
    """The first bash block under a heading."""
    text = (DOCS / document).read_text(encoding="utf-8")
    match = re.search(rf"^## {re.escape(heading)}$.*?^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert match is not None, heading
    return match[1]


def test_a_teams_day(bert: Tiny, draft: Callable[[Tiny], Draft], tmp_path: Path) -> None:
    for name, accuracy in (("sentiment", 0.79), ("sentiment-2", 0.82)):
        made = draft(bert)
        made.edit_tensors(lambda tensors, value=accuracy: next(iter(tensors.values())).flat.__setitem__(0, value))
        made.write_training(metrics={"accuracy": accuracy})
        (tmp_path / "out").mkdir(exist_ok=True)
        made.path.rename(tmp_path / "out" / name)
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block("registry.md", "A team's day, to paste")],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "ADAPTERBAY_ACTOR": "ann"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused, as it should be" in done.stdout
    assert "a comparison with the version it points at now" in done.stderr
    assert "champion → 2 (was 1)" in done.stdout
    assert "overruled: accuracy" not in done.stdout
    assert "overruled: a comparison with" in done.stdout
    assert (tmp_path / "sentiment-v1" / "adapter_model.safetensors").is_file()
    assert "nothing is wrong" in done.stdout
