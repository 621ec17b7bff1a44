"""What tests of the registry share: folders to spoil, and a registry's files to compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from adapterbay.registry.cli import app

Tensors = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Tiny:
    """A base folder and an adapter folder as `save_pretrained` wrote them."""

    base: Path
    adapter: Path


@dataclass(frozen=True)
class Draft:
    """A copy of an adapter folder that a test spoils."""

    path: Path

    def edit_config(self, **changes: Any) -> None:
        """Sets keys of adapter_config.json; a value of `...` removes the key."""
        file = self.path / "adapter_config.json"
        config = json.loads(file.read_text())
        for key, value in changes.items():
            if value is ...:
                config.pop(key, None)
            else:
                config[key] = value
        file.write_text(json.dumps(config))

    @property
    def weights(self) -> Path:
        return self.path / "adapter_model.safetensors"

    def edit_tensors(self, change: Callable[[Tensors], None]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights)

    def write_training(self, **content: Any) -> None:
        (self.path / "training.json").write_text(json.dumps(content))


def tree(root: Path) -> Mapping[str, bytes | None]:
    """Every path below a registry with its content; the index's own files are left out."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
        if not path.name.startswith("index.sqlite")
    }


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object) -> Any:
    output = run(*arguments, "--json").stdout
    assert output.count("\n") == 1
    return json.loads(output)


def told(*arguments: object, code: int) -> str:
    """The one line on standard error."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line
