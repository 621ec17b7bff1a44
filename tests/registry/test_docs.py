"""What docs/registry.md and the READMEs say to paste works as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from registry_tools import Draft, Tiny

ROOT = Path(__file__).resolve().parents[2]
DraftOf = Callable[[Tiny], Draft]


def block(document: str, heading: str) -> str:
    """The first shell block under a heading."""
    text = (ROOT / document).read_text(encoding="utf-8")
    match = re.search(rf"^## {re.escape(heading)}$.*?^```(?:ba)?sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert match is not None, heading
    return match[1]


def train(bert: Tiny, draft: DraftOf, out: Path, accuracies: dict[str, float]) -> None:
    out.mkdir()
    for name, accuracy in accuracies.items():
        made = draft(bert)
        made.edit_tensors(lambda tensors, value=accuracy: next(iter(tensors.values())).flat.__setitem__(0, value))
        made.write_training(metrics={"accuracy": accuracy})
        made.path.rename(out / name)


def paste(script: str, place: Path) -> subprocess.CompletedProcess[str]:
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place,
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "ADAPTERBAY_ACTOR": "ann"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    ("document", "publish", "swap", "review"),
    [
        ("README.md", "Train and publish", "Swap", "Review, promote, roll back"),
        ("README.zh-CN.md", "训练与发布", "切换", "评审、上线、回退"),
    ],
)
def test_the_readme_from_push_to_rollback(
    bert: Tiny, draft: DraftOf, tmp_path: Path, document: str, publish: str, swap: str, review: str
) -> None:
    accuracies = {"sentiment": 0.81, "critic": 0.5, "sentiment-2": 0.82, "sentiment-3": 0.83}
    train(bert, draft, tmp_path / "out", accuracies)
    pasted = "".join(block(document, heading) for heading in (publish, swap, review))
    trained = re.findall(r"^trainer run (\S+)", pasted, re.MULTILINE)
    assert len(trained) == len(accuracies)
    assert all((ROOT / settings).is_file() for settings in trained)
    registry_only = re.sub(r"^(trainer run|python examples/held_out.py) .*$", "", pasted, flags=re.MULTILINE)
    compared, lines = re.subn(  # what it records is given by hand: no server runs here
        r"^adapterbay compare (\S+) (\S+) --inputs .*$",
        r"registry record-comparison \1 \2 --metric accuracy --value 0.83 --other 0.82 --inputs 240 --verdict better",
        registry_only,
        flags=re.MULTILINE,
    )
    assert lines == 1
    done = paste(f"export ADAPTERBAY_REGISTRY=$PWD/store\n{compared}", tmp_path)
    assert "sentiment@champion → 3 (was 2)" in done.stdout
    assert "sentiment@champion → 2 (was 3)" in done.stdout
    assert (tmp_path / "lineage.svg").read_text(encoding="utf-8").startswith("<svg")


def test_a_teams_day(bert: Tiny, draft: DraftOf, tmp_path: Path) -> None:
    train(bert, draft, tmp_path / "out", {"sentiment": 0.79, "sentiment-2": 0.82})
    done = paste(block("docs/registry.md", "A team's day, to paste"), tmp_path)
    assert "refused, as it should be" in done.stdout
    assert "a comparison with the version it points or pointed at" in done.stderr
    assert "champion → 2 (was 1)" in done.stdout
    assert "overruled: accuracy" not in done.stdout
    assert "overruled: a comparison with" in done.stdout
    assert (tmp_path / "sentiment-v1" / "adapter_model.safetensors").is_file()
    assert "nothing is wrong" in done.stdout
