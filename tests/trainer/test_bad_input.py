"""Every mistake is named, says what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from adapterbay.registry.errors import AdapterbayError, Cancelled, InvalidArgument, NotFound, StorageFull
from adapterbay.trainer import StepReport, run
from adapterbay.trainer.cli import app

from .conftest import Configure
from .tiny_bases import make_bert, write_jsonl


class InterruptedAt:
    """Raises `error` at the second step."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def stage(self, text: str) -> None:
        return

    def step(self, report: StepReport) -> None:
        if report.step == 2:
            raise self._error

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        return


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"lora": {"target_modules": ["q_proj", "query"]}},
            InvalidArgument,
            "query matches no linear module of this base; it has down_proj, gate_proj, k_proj, o_proj, q_proj",
        ),
        ({"lora": {"layers": [0, 7]}}, InvalidArgument, "7 is no layer of this base; it has 0 to 1"),
        ({"lora": {"rank_pattern": {"query": 2}}}, InvalidArgument, "'query' matches no adapted module"),
        ({"lora": {"rank_pattern": {"(": 2}}}, InvalidArgument, "'(' is no pattern"),
        ({"base": "/nowhere/base"}, NotFound, "/nowhere/base"),
        ({"max_length": 100_000}, InvalidArgument, "is more than the 512 positions of this base"),
        ({"data": {"label_names": {"positive": "good", "other": "bad"}}}, InvalidArgument, "'negative' (48 rows)"),
        ({"optimization": {"learning_rate": 1e30}}, InvalidArgument, "lower optimization.learning_rate"),
        (
            {
                "task": "causal-lm",
                "max_length": 8,
                "data": {"prompt_template": "Write a {label} review.", "completion_template": "{text}"},
            },
            InvalidArgument,
            "cuts off the completion of all 32 rows",
        ),
    ],
)
def test_named_and_nothing_left(
    changes: dict[str, Any], error: type[AdapterbayError], message: str, configure: Configure, chat_base: Path
) -> None:
    changes = dict(changes)
    base = Path(changes.pop("base", chat_base))
    config = configure(base, **changes)
    before = sorted(config.output.parent.iterdir())
    with pytest.raises(error) as caught:
        run(config)
    assert message in caught.value.message
    assert sorted(config.output.parent.iterdir()) == before


def test_a_base_without_a_language_model_head_cannot_learn_to_write(configure: Configure, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{index}", "completion": "a"} for index in range(40)])
    headless = make_bert(tmp_path / "bert")
    config = BertConfig.from_pretrained(headless, is_decoder=True)
    BertModel(config).save_pretrained(headless)
    with pytest.raises(InvalidArgument, match="it is no language model for task causal-lm: it has no weights for cls"):
        run(configure(headless, task="causal-lm", data={"source": str(source)}))


def test_an_output_that_exists_is_refused_or_replaced(configure: Configure, chat_base: Path) -> None:
    config = configure(chat_base, optimization={"max_steps": 1}, data={"eval_samples": 0})
    config.output.mkdir()
    run(config)
    (config.output / "mine.txt").write_text("x")
    with pytest.raises(InvalidArgument, match="exists and is not empty; name another folder, or say --overwrite"):
        run(config)
    assert (config.output / "mine.txt").exists()
    again = config.model_copy(update={"overwrite": True})
    run(again)
    assert not (config.output / "mine.txt").exists()
    assert (config.output / "training.json").exists()
    for name in ("training.json", "adapter_config.json"):
        (config.output / name).unlink()
    with pytest.raises(InvalidArgument, match="holds something else than an adapter"):
        run(again)
    file = config.model_copy(update={"output": config.output / "README.md"})
    with pytest.raises(InvalidArgument, match="is not a folder"):
        run(file)
    below = config.model_copy(update={"output": config.output / "README.md" / "out"})
    with pytest.raises(InvalidArgument, match="cannot be made"):
        run(below)


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (KeyboardInterrupt(), Cancelled, "Training was interrupted; nothing was written"),
        (OSError(28, "No space left on device"), StorageFull, "No space left for"),
    ],
)
def test_an_interrupted_run_leaves_the_old_output_as_it_was(
    raised: BaseException, error: type[AdapterbayError], message: str, configure: Configure, chat_base: Path
) -> None:
    config = configure(chat_base, optimization={"max_steps": 4}, data={"eval_samples": 0}, overwrite=True)
    run(config)
    before = (config.output / "training.json").read_bytes()
    with pytest.raises(error, match=message):
        run(config.model_copy(update={"seed": 5}), progress=InterruptedAt(raised))
    assert (config.output / "training.json").read_bytes() == before
    assert not [path for path in config.output.parent.iterdir() if path.name.startswith(".")]


def yaml_of(tmp_path: Path, base: Path, review_csv: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"base: {base}\ntask: sequence-classification\noutput: {tmp_path / 'out'}\nmax_length: 64\n"
        f"data: {{source: {review_csv}, train_samples: 16, eval_samples: 8}}\n"
    )
    return path


def test_cli_trains_and_prints_one_json_object_last(tmp_path: Path, chat_base: Path, review_csv: Path) -> None:
    path = yaml_of(tmp_path, chat_base, review_csv)
    result = CliRunner().invoke(app, ["run", str(path), "--json", "--epochs=1", "--optimization.batch_size", "4"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout.splitlines()[-1])
    assert Path(shown["output"], "adapter_model.safetensors").is_file()
    assert {"accuracy", "macro_f1", "majority_accuracy", "eval_loss", "train_loss"} == set(shown["metrics"])
    record = json.loads(Path(shown["output"], "training.json").read_text())
    assert (record["settings"]["optimization"]["batch_size"], len(record["loss_history"])) == (4, 5)


def test_cli_errors_are_lines_on_stderr_with_exit_code_2(tmp_path: Path, chat_base: Path, review_csv: Path) -> None:
    path = yaml_of(tmp_path, chat_base, review_csv)
    runner = CliRunner()
    one = runner.invoke(app, ["run", str(path), "--lora.rnk", "3"])
    assert (one.exit_code, one.stdout) == (2, "")
    assert one.stderr == "error: lora.rnk: is not a setting; did you mean rank?\n"
    several = runner.invoke(app, ["run", str(path), "--lora.rnk", "3", "--seed", "x"])
    assert several.exit_code == 2
    assert several.stderr.splitlines()[0] == "error: 2 settings are wrong:"
    missing = runner.invoke(app, ["run", str(tmp_path / "none.yaml")])
    assert missing.exit_code == 2
    assert missing.stderr == f"error: There is no settings file {tmp_path / 'none.yaml'}.\n"
    no_base = runner.invoke(app, ["run", str(path), "--base", "/nowhere", "--quiet"])
    assert no_base.exit_code == 2
    assert len(no_base.stderr.splitlines()) == 1


def test_cli_help_is_quick_and_says_how_flags_work() -> None:
    code = "from adapterbay.trainer.cli import app; import sys; app(['run', '--help'], standalone_mode=False)"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"}
    )
    assert "--section.key value" in shown.stdout
