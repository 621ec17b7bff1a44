"""YAML and flags are one model, and every mistake is reported at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from adapterbay.registry.errors import InvalidArgument, NotFound
from adapterbay.trainer import TrainingConfig, load_config, parse_config, parse_flags

MINIMAL = {"task": "sequence-classification", "output": "out", "data": {"source": "rows.csv"}}


def test_all_problems_are_reported_at_once_with_near_names(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        """
task: classification
outputt: out
data:
  source: rows.csv
  train_sample: 3
  eval_samples: 5
  eval_fraction: 0.2
  prompt_template: "{a.b}"
lora: {rank: -1, alpha: many, target_modules: []}
optimization: {epoch: 3, epochs: 0}
"""
    )
    with pytest.raises(InvalidArgument) as caught:
        load_config(path)
    lines = caught.value.message.splitlines()
    for expected in (
        "task: must be 'sequence-classification' or 'causal-lm', not 'classification'. "
        "Did you mean sequence-classification?",
        "outputt: is not a setting; did you mean output?",
        "output: is required",
        "data.train_sample: is not a setting; did you mean train_samples?",
        "data.prompt_template: '{a.b}' is not a plain field: only {name} is allowed (write {{ for a brace)",
        "lora.rank: should be greater than or equal to 1, not -1",
        "optimization.epoch: is not a setting; did you mean epochs?",
        "optimization.epochs: should be greater than 0, not 0",
        "data.eval_fraction: give either eval_samples or eval_fraction, not both",
        "lora.target_modules: names no module; leave it out for all-linear",
    ):
        assert f"  {expected}" in lines
    assert any(line.startswith("  lora.alpha: should be a valid number") for line in lines)
    assert lines[0] == f"{len(lines) - 1} settings are wrong:"
    assert "lora.rank" in caught.value.field


def test_flags_equal_yaml(tmp_path: Path) -> None:
    in_file, with_flags = tmp_path / "all.yaml", tmp_path / "some.yaml"
    in_file.write_text(
        "task: causal-lm\noutput: out\noverwrite: true\n"
        "data: {source: a.csv, filter: {source: imdb}, train_samples: 7}\n"
        "lora: {rank: 4, target_modules: [q_proj, v_proj], layers: [1, 2]}\n"
        "optimization: {epochs: 1.5, learning_rate: 1e-3}\n"
    )
    with_flags.write_text("task: sequence-classification\noutput: out\ndata: {source: a.csv}\n")
    flags = (
        "--task causal-lm --overwrite --data.filter.source imdb --train-samples=7 --lora.rank 4 "
        "--target_modules q_proj,v_proj --lora.layers [1,2] --optimization.epochs 1.5 --learning_rate 1e-3"
    )
    assert load_config(with_flags, parse_flags(flags.split())) == load_config(in_file)


def test_an_ambiguous_or_unknown_flag_is_named() -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_config(None, {"ranks": "3", "text.x": 1, **MINIMAL})
    assert "ranks: is not a setting; did you mean rank?" in caught.value.message
    assert "text: is not a setting" in caught.value.message
    with pytest.raises(InvalidArgument, match="belongs to no flag"):
        parse_flags(["epochs", "3"])


def test_a_setting_in_the_wrong_section_is_found_elsewhere() -> None:
    with pytest.raises(InvalidArgument, match=r"rank: is not a setting; did you mean lora\.rank\?"):
        parse_config({**MINIMAL, "rank": 8})


def test_one_problem_is_one_line() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_config({**MINIMAL, "max_length": 1})
    assert caught.value.message == "max_length: should be greater than or equal to 2, not 1"
    assert caught.value.field == "max_length"


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"data": {"source": "a", "completion_template": "{text}", "prompt_template": "x"}}, "data.prompt_template"),
        ({"task": "causal-lm", "data": {"source": "a", "prompt_template": "x"}}, "data.completion_template"),
        ({"task": "causal-lm", "data": {"source": "a", "label_names": ["a", "b"]}}, "data.label_names"),
        ({"data": {"source": "a", "label_names": {0: "same", 1: "same"}}}, "data.label_names"),
        ({"data": {"source": "a", "eval_source": "b", "eval_fraction": 0.1}}, "data.eval_fraction"),
        ({"data": {"source": "a", "eval_source": "b", "eval_samples": 0}}, "data.eval_samples"),
        ({"lora": {"layers": []}}, "lora.layers"),
        ({"method": "bottleneck"}, "method"),
        ({"data": {"source": "a", "columns": {"messages": "m", "prompt": "p"}}}, "data.columns.messages"),
    ],
)
def test_impossible_combinations(change: dict[str, object], path: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"{path}: "):
        parse_config({**MINIMAL, **change})
    with pytest.raises(ValidationError):
        TrainingConfig.model_validate({**MINIMAL, **change})


def test_settings_are_frozen_and_label_names_take_a_list() -> None:
    config = parse_config({**MINIMAL, "data": {"source": "a", "label_names": ["no", "yes"]}})
    assert config.data.label_names == {"0": "no", "1": "yes"}
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no settings file"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "c.yaml"
    path.write_text("task: [")
    with pytest.raises(InvalidArgument, match="not valid YAML"):
        load_config(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(InvalidArgument, match="must hold `key: value` lines"):
        load_config(path)
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(InvalidArgument, match="the key 'seed' is given twice"):
        load_config(path)


def test_cli_module_imports_without_torch() -> None:
    code = (
        "import sys, adapterbay.trainer.cli; "
        "print([name for name in ('torch', 'transformers', 'pandas', 'peft') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("value", [3, ["lora"], True, None, "lora"])
def test_a_method_that_is_no_section_says_what_is_one(value: object, tmp_path: Path) -> None:
    words = f"method: is a section, not {value!r}; write {{name: lora}} or {{name: bottleneck}}"
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps({**MINIMAL, "method": value}))
    for read in (lambda: parse_config({**MINIMAL, "method": value}), lambda: load_config(path)):
        with pytest.raises(InvalidArgument, match=re.escape(words)) as caught:
            read()
        assert caught.value.metadata["field"] == "method"


@pytest.mark.parametrize("value", [3, None, [], "x"])
def test_another_section_lists_its_settings(value: object) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"lora: is a section, not {value!r}; write")) as caught:
        parse_config({**MINIMAL, "lora": value})
    assert "(rank, alpha, dropout" in caught.value.message
    assert "leave it out for the defaults" in caught.value.message
    with pytest.raises(InvalidArgument, match="data: is a section") as caught:
        parse_config({**MINIMAL, "data": value})
    assert "leave it out" not in caught.value.message, "there is no data by default"
    with pytest.raises(InvalidArgument, match="Settings are a mapping of key to value, not"):
        parse_config(value)  # type: ignore[arg-type]


def test_an_output_that_is_no_path() -> None:
    with pytest.raises(InvalidArgument, match="output: must be a path as text, not 3"):
        parse_config({**MINIMAL, "output": 3})
