"""How PEFT matches modules against its settings, so that a tensor which PEFT would ignore is refused here.

The settings may be regular expressions written by strangers, and Python's matcher backtracks: only expressions
whose running time is bounded are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from adapterbay.registry.errors import Rejected

MAX_PATTERN_LENGTH: Final = 2000
MAX_REPEATS: Final = 8
"""Matching takes at most O(length of the name ^ number of repeats); names have some tens of characters."""

_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")


def _refuse(pattern: str, detail: str) -> Rejected:
    return Rejected(
        f"The pattern {pattern[:80]!r} in adapter_config.json was refused: {detail}. Name the modules plainly.",
        reason="BAD_PATTERN",
    )


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles an expression that cannot run away. Raises Rejected with reason BAD_PATTERN."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise _refuse(pattern, f"it has {len(pattern)} characters, {MAX_PATTERN_LENGTH} are allowed")
    if not _LITERAL.fullmatch(pattern):
        _check_repeats(pattern)
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _refuse(pattern, f"it is not a regular expression ({error})") from error


def _check_repeats(pattern: str) -> None:
    """No repeat of a group that repeats or branches ((a+)+ and (a|a)* take exponential time), no backreference."""
    repeats = 0
    open_groups: list[bool] = []  # whether a repeat or a branch was seen inside
    closed = False  # whether the group that was just closed holds one
    position = 0
    while position < len(pattern):
        character = pattern[position]
        was_closed, closed = closed, False
        if character == "\\":
            if pattern[position + 1 : position + 2].isdigit():
                raise _refuse(pattern, "it refers back to a group")
            position += 1
        elif character == "[":
            position = _end_of_set(pattern, position)
        elif character == "(":
            open_groups.append(False)
            if pattern[position + 1 : position + 2] == "?":
                if (
                    pattern[position + 2 : position + 3] not in (":", "P")
                    or pattern[position + 2 : position + 4] == "P="
                ):
                    raise _refuse(pattern, "it looks ahead, behind or back")
                position += 2
        elif character == ")":
            closed = bool(open_groups) and open_groups.pop()
            if closed and open_groups:
                open_groups[-1] = True
        elif character in "*+{?" and position > 0:
            if was_closed and character != "?":
                raise _refuse(pattern, "it repeats a group that itself repeats or branches")
            repeats += 1
            closed = False
            if open_groups:
                open_groups[-1] = True
            if character == "{":
                position = max(position, pattern.find("}", position))
            if pattern[position + 1 : position + 2] in ("?", "+"):  # lazy or possessive
                position += 1
        elif character == "|" and open_groups:
            open_groups[-1] = True
        position += 1
    if repeats > MAX_REPEATS:
        raise _refuse(pattern, f"it has {repeats} repeats, {MAX_REPEATS} are allowed")


def _end_of_set(pattern: str, begin: int) -> int:
    position = begin + 1
    if pattern[position : position + 1] == "^":
        position += 1
    if pattern[position : position + 1] == "]":
        position += 1
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """The first key of a rank_pattern or alpha_pattern that means `module` (PEFT's `get_pattern_key`)."""
    for pattern in patterns:
        compile_pattern(pattern)
        if _LITERAL.fullmatch(pattern) and "." not in pattern:
            if module == pattern or module.endswith(f".{pattern}"):
                return pattern
        elif re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return None


def is_targeted(config: dict[str, Any], module: str) -> bool:
    """Whether PEFT would put an adapter on `module` (PEFT's `check_target_module_exists`, 0.21)."""
    exclude = config.get("exclude_modules")
    if exclude and _matches(exclude, module):
        return False
    target = config.get("target_modules")
    if target is None or target == "all-linear":
        return True
    if isinstance(target, str):
        return compile_pattern(target).fullmatch(module) is not None
    if module in target:
        return True
    return _matches(target, module) and _in_layers(config, module)


def _matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return compile_pattern(names).fullmatch(module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _in_layers(config: dict[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    match: re.Match[str] | None
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)
    else:
        match = None
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            compile_pattern(pattern)
            match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
            if match:
                break
    if match is None:
        return False
    index = int(match.group("index"))
    return index == layers if isinstance(layers, int) else index in layers
