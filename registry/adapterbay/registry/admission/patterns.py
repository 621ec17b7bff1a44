"""How PEFT matches modules against its settings, so that a tensor which PEFT would ignore is refused here.

The settings may be written by strangers: regular expressions are matched in linear time, and lists are looked up, so
that no setting takes long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from adapterbay.registry.admission.linear_regex import MAX_LENGTH, LinearPattern, UnusablePattern
from adapterbay.registry.errors import Rejected

MAX_KEYS: Final = 5000
MAX_STEPS_TOGETHER: Final = 4000
"""Of all expressions in one rank_pattern or alpha_pattern (see `LinearPattern.size`)."""
MAX_LAYER_PATTERNS: Final = 50

_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")


def _refuse(pattern: str, detail: str) -> Rejected:
    return Rejected(
        f"The pattern {pattern[:80]!r} in adapter_config.json was refused: {detail}. Name the modules plainly.",
        reason="BAD_PATTERN",
    )


def compile_pattern(pattern: str) -> LinearPattern:
    """Compiles an expression. Raises Rejected with reason BAD_PATTERN."""
    try:
        return LinearPattern(pattern)
    except UnusablePattern as error:
        raise _refuse(pattern, str(error)) from error


class ModulePatterns:
    """The keys of a rank_pattern or alpha_pattern, in their order (PEFT's `get_pattern_key`).

    A key means a module if `(.*\\.)?(KEY)$` matches it. Raises Rejected with reason BAD_PATTERN.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._means: list[tuple[str, Callable[[str], bool]]] = []
        steps = 0
        for key in keys:
            if len(self._means) >= MAX_KEYS:
                raise _refuse(key, f"it is one of more than {MAX_KEYS}")
            if _LITERAL.fullmatch(key):
                self._means.append((key, _end_matcher(key)))
                continue
            compile_pattern(key)  # it must be an expression by itself, not only within what is put around it
            pattern = compile_pattern(rf"(?:.*\.)?(?:{key})")
            steps += pattern.size
            if steps > MAX_STEPS_TOGETHER:
                raise _refuse(key, "together with the patterns before it, it is too large")
            self._means.append((key, pattern.fullmatch))

    def first(self, module: str) -> str | None:
        """The first key that means `module`; None: none does."""
        return next((key for key, means in self._means if means(module)), None)


def _end_matcher(key: str) -> Callable[[str], bool]:
    """Whether a name is `key`, or ends with it after a dot. A dot in `key` means any character."""
    length = len(key)
    if "." not in key:
        return lambda module: module.endswith(key) and module[:-length][-1:] in ("", ".")
    end = re.compile(key)
    return lambda module: module[:-length][-1:] in ("", ".") and end.fullmatch(module[-length:]) is not None


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """The first key of a rank_pattern or alpha_pattern that means `module`. Raises Rejected (BAD_PATTERN)."""
    return ModulePatterns(patterns).first(module)


class SearchPatterns:
    """Keys that mean a module if they match anywhere in its name (`re.search`). Raises Rejected (BAD_PATTERN)."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._patterns: list[tuple[str, LinearPattern]] = []
        steps = 0
        for key in keys:
            compile_pattern(key)  # it must be an expression by itself, not only within what is put around it
            pattern = compile_pattern(f".*(?:{key}).*")
            steps += pattern.size
            if steps > MAX_STEPS_TOGETHER:
                raise _refuse(key, "together with the patterns before it, it is too large")
            self._patterns.append((key, pattern))

    def first(self, module: str) -> str | None:
        """The first key that means `module`; None: none does."""
        return next((key for key, pattern in self._patterns if pattern.fullmatch(module)), None)


class Targets:
    """Which modules PEFT would adapt (PEFT's `check_target_module_exists`, 0.21), by the settings of a config.

    Raises Rejected with reason BAD_PATTERN.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._excluded = _named(config.get("exclude_modules") or [])
        target: Any = config.get("target_modules")
        self._everything = target == "all-linear"
        self._targeted = _named([] if self._everything else target or [])
        self._by_layer = isinstance(target, list)
        self._direct = frozenset(target) if isinstance(target, list) else frozenset()
        self._saved = frozenset(config.get("modules_to_save") or [])
        layers = config.get("layers_to_transform")
        self._layers = frozenset([layers] if isinstance(layers, int) else layers or [])
        patterns = config.get("layers_pattern") or []
        names = [patterns] if isinstance(patterns, str) else patterns
        if len(names) > MAX_LAYER_PATTERNS:
            raise _refuse(names[0], f"it is one of more than {MAX_LAYER_PATTERNS}")
        self._layer_patterns = [_layer(name) for name in names]
        if not self._layer_patterns:
            self._layer_patterns = [re.compile(r".*?\.[^.]*\.(?P<index>\d{1,9})\.")]

    def __contains__(self, module: str) -> bool:
        if self._excluded(module) or any(f".{name}." in f".{module}." for name in self._saved):
            return False
        if self._everything or module in self._direct:
            return True
        return self._targeted(module) and (not self._by_layer or self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        if not self._layers:
            return True
        for pattern in self._layer_patterns:
            if match := pattern.match(module):
                return int(match["index"]) in self._layers
        return False


def _layer(name: str) -> re.Pattern[str]:
    if len(name) > MAX_LENGTH or not _LITERAL.fullmatch(name):
        raise _refuse(name, "layers_pattern takes plain names")
    return re.compile(rf"(?:^|.*?\.){name}\.(?P<index>\d{{1,9}})\.")


def _named(names: str | list[str]) -> Callable[[str], bool]:
    """An expression for whole names, or a list of names and of their ends."""
    if isinstance(names, str):
        return compile_pattern(names).fullmatch
    wanted = frozenset(names)
    return lambda module: any(end in wanted for end in _ends(module))


def _ends(module: str) -> Iterable[str]:
    """`a.b.c`, `b.c` and `c`."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would put an adapter on `module`. Raises Rejected (BAD_PATTERN)."""
    return module in Targets(config)
