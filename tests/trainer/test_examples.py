"""The examples: what they give, and one line with exit code 2 for a caller's mistake."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def held_out(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of examples/held_out.py with some arguments."""
    main = runpy.run_path(str(EXAMPLES / "held_out.py"))["main"]

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return run


def settings(folder: Path) -> str:
    rows = [{"text": f"review {number}", "label": ["bad", "good"][number % 2]} for number in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "settings.yaml"
    source = {"source": str(folder / "rows.jsonl"), "eval_samples": 4}
    path.write_text(json.dumps({"task": "sequence-classification", "output": str(folder / "out"), "data": source}))
    return str(path)


def test_the_held_out_rows_are_printed(held_out: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, printed, errors = held_out(settings(tmp_path))
    assert (code, errors) == (0, "")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert len(rows) == 4
    for row in rows:
        number = int(row["text"].removeprefix("review "))
        assert row["label"] == ["bad", "good"][number % 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "usage: python examples/held_out.py SETTINGS.yaml"),
        (("a.yaml", "b.yaml"), "usage: python"),
        (("nowhere.yaml",), "error: There is no settings file nowhere.yaml."),
        ((str(EXAMPLES),), "cannot be read"),
        ((str(EXAMPLES / "held_out.py"),), "error: "),
        ((str(EXAMPLES / "critic.yaml"),), "is for task causal-lm; only sequence-classification has labelled rows."),
    ],
)
def test_a_mistake_is_one_line(
    held_out: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], words: str
) -> None:
    code, printed, errors = held_out(*arguments)
    assert code == 2
    assert words in errors
    assert len(errors.splitlines()) == 1
    assert printed == ""


def test_the_script_ends_with_its_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "held_out.py"), "nowhere.yaml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: There is no settings file nowhere.yaml.\n"
