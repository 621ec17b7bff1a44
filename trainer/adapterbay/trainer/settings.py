"""YAML and flags into one `TrainingConfig`; everything that is wrong is reported at once.

A flag is the dotted path of a key (`--optimization.epochs 2`), or its last word where only one section has it
(`--epochs 2`). A value is read as YAML, as it would be in the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from adapterbay.registry.errors import InvalidArgument, NotFound
from adapterbay.trainer.config import Problem, TrainingConfig, impossible_combinations

NEAR_CUTOFF = 0.6  # difflib's own default

TASK_NEAR_MISSES = {
    "classification": "sequence-classification",
    "text-classification": "sequence-classification",
    "sequence_classification": "sequence-classification",
    "seq-cls": "sequence-classification",
    "sft": "causal-lm",
    "causal_lm": "causal-lm",
    "clm": "causal-lm",
    "generation": "causal-lm",
    "text-generation": "causal-lm",
}


def load_config(path: Path | None, overrides: Mapping[str, object] | None = None) -> TrainingConfig:
    """Settings of the YAML file at `path` (None: of `overrides` alone), with `overrides` on top.

    `overrides` maps a dotted path, or an unambiguous last word of one, to a value; text is read as YAML.
    Raises NotFound if there is no such file, and InvalidArgument listing every problem, one a line.
    """
    values = _read_yaml(path) if path is not None else {}
    problems: list[Problem] = []
    for flag, value in (overrides or {}).items():
        _set(values, flag, _parse_value(value), problems)
    return parse_config(values, problems)


def parse_config(values: Mapping[str, Any], problems: Sequence[Problem] = ()) -> TrainingConfig:
    """The settings in `values`, a mapping as YAML gives it. Raises InvalidArgument listing every problem."""
    if not isinstance(values, Mapping):
        raise InvalidArgument(f"Settings are a mapping of key to value, not {values!r:.60}.", field="config")
    found = list(problems)
    config: TrainingConfig | None = None
    try:
        config = TrainingConfig.model_validate(values)
    except ValidationError as error:
        # loc () is the combination check below, which names its paths better.
        found += [_problem(item) for item in error.errors() if item["loc"]]
        found += _combinations_of_the_rest(values, error)
    if found or config is None:
        raise _all_of(found)
    return config


def parse_flags(arguments: Sequence[str]) -> dict[str, object]:
    """`--key value`, `--key=value` and `--switch` (true) into overrides; the last of a repeated flag counts.

    Raises InvalidArgument for a word that belongs to no flag.
    """
    overrides: dict[str, object] = {}
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not word.startswith("--") or len(word) == 2:
            raise InvalidArgument(f"'{word}' belongs to no flag; write --key value or --section.key value.", field=word)
        name, separator, value = word[2:].partition("=")
        if not separator:
            if position < len(arguments) and not arguments[position].startswith("--"):
                value = arguments[position]
                position += 1
            else:
                value = "true"
        overrides[name.replace("-", "_")] = value
    return overrides


def known_paths(model: type[BaseModel] = TrainingConfig, prefix: str = "") -> Iterator[str]:
    """The dotted path of every setting, sections not included."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from known_paths(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key}' is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    loader = _UniqueKeyLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotFound(f"There is no settings file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"The settings file {path} cannot be read: {error}", field="config") from error
    try:
        values = _load_yaml(text)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise InvalidArgument(f"{path} is not valid YAML: {message}", field="config") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidArgument(f"{path} must hold `key: value` lines, not a {type(values).__name__}.", field="config")
    return values


def _parse_value(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return _load_yaml(value)
    except yaml.YAMLError:
        return value


def _set(values: dict[str, Any], flag: str, value: object, problems: list[Problem]) -> None:
    """Puts `value` at the dotted path that `flag` means; a section in the way that is no mapping is a problem."""
    path = _full_path(flag, problems)
    if path is None:
        return
    *sections, key = path.split(".")
    target = values
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        inner = target[section]
        if not isinstance(inner, dict):
            problems.append(Problem(path, f"cannot be set: {section} is not a section in the file"))
            return
        target = inner
    target[key] = value


def _full_path(flag: str, problems: list[Problem]) -> str | None:
    paths = list(known_paths())
    if "." in flag or flag in TrainingConfig.model_fields:
        return flag
    matches = [path for path in paths if path.rpartition(".")[2] == flag]
    if len(matches) == 1:
        return matches[0]
    if matches:
        problems.append(Problem(flag, f"could mean {' or '.join(matches)}; write one of them"))
        return None
    problems.append(Problem(flag, "is not a setting" + _near(flag, [*(p.rpartition(".")[2] for p in paths), *paths])))
    return None


def _problem(item: Any) -> Problem:
    """One pydantic error as a line: the dotted path and what is wrong with it."""
    kind = item["type"]
    # pydantic puts the branch of a union into the path; a user's path has none
    location = tuple(part for part in item["loc"] if not str(part).startswith(("list[", "literal[")))
    path = ".".join(str(part) for part in location)
    given = item.get("input")
    if kind == "extra_forbidden":
        return Problem(path, "is not a setting" + _near(str(location[-1]), _siblings(location), location[:-1]))
    if kind == "missing":
        return Problem(path, "is required")
    if kind == "literal_error":
        meant = TASK_NEAR_MISSES.get(str(given).lower()) if path == "task" else None
        hint = f" Did you mean {meant}?" if meant else ""
        return Problem(path, f"must be {item['ctx']['expected']}, not {given!r}.{hint}")
    if kind == "path_type":
        return Problem(path, f"must be a path as text, not {given!r:.60}")
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = repr(given)
    return Problem(path, message if kind == "value_error" or len(shown) > 80 else f"{message}, not {shown}")


def _siblings(location: Sequence[Any]) -> list[str]:
    model: Any = TrainingConfig
    for part in location[:-1]:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def _near(name: str, names: Sequence[str], section: Sequence[Any] = ()) -> str:
    near = difflib.get_close_matches(name.lower(), list(dict.fromkeys(names)), n=1, cutoff=NEAR_CUTOFF)
    if near:
        return f"; did you mean {near[0]}?"
    elsewhere = [path for path in known_paths() if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    if section:
        return f"; {'.'.join(map(str, section))} has {', '.join(names)}"
    return ""


def _combinations_of_the_rest(values: Mapping[str, Any], error: ValidationError) -> list[Problem]:
    """Impossible combinations among the values that are valid by themselves, so that one run shows all errors."""
    rest = _copy(values)
    wrong_task = False
    for item in error.errors():
        location = item["loc"]
        if location:
            wrong_task |= location[0] == "task"
            _remove(rest, location)
    rest.setdefault("task", "causal-lm")
    rest.setdefault("output", "out")
    data = rest.setdefault("data", {})
    data.setdefault("source", "rows.csv")
    try:
        fields = {
            name: field.annotation(**rest[name])
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            else rest[name]
            for name, field in TrainingConfig.model_fields.items()
            if name in rest
        }
    except (ValidationError, TypeError):
        return []
    found = impossible_combinations(TrainingConfig.model_construct(None, **fields))
    return [problem for problem in found if not (wrong_task and problem.needs_task)]


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _remove(values: dict[str, Any], location: Sequence[Any]) -> None:
    """Drops the value at `location`, or the deepest mapping entry on the way to it."""
    target = values
    for part, following in zip(location, [*location[1:], None], strict=True):
        if part not in target:
            return
        inner = target[part]
        if following is None or not isinstance(inner, dict) or following not in inner:
            del target[part]
            return
        target = inner


def _all_of(problems: Sequence[Problem]) -> InvalidArgument:
    lines = [f"{problem.path}: {problem.message}" for problem in dict.fromkeys(problems)]
    fields = ", ".join(dict.fromkeys(problem.path for problem in problems))
    if len(lines) == 1:
        return InvalidArgument(lines[0], field=fields)
    listed = "\n".join(f"  {line}" for line in lines)
    return InvalidArgument(f"{len(lines)} settings are wrong:\n{listed}", field=fields)
