"""Typed reading of adapter_config.json: every value is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar

from adapterbay.registry.admission.patterns import ModulePatterns, SearchPatterns, Targets
from adapterbay.registry.errors import Rejected, UnsupportedMethod

MAX_NUMBER: Final = 1e9

T = TypeVar("T")


def refuse(key: str, value: Any, wanted: str) -> NoReturn:
    """Raises Rejected with reason BAD_CONFIG."""
    raise Rejected(
        f"adapter_config.json has {key}={repr(value)[:80]}, but it must be {wanted}.",
        reason="BAD_CONFIG",
        metadata={"field": key},
    )


def is_int(value: Any) -> bool:
    """Whether it is a whole number, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


class Settings:
    """A config. Every reader raises Rejected with reason BAD_CONFIG; null and a missing key mean the default."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.method = str(config.get("peft_type"))
        self._patterns: dict[str, ModulePatterns] = {}
        self._searches: dict[str, SearchPatterns] = {}
        self._targets: Targets | None = None
        self._known: dict[Callable[[Settings], Any], Any] = {}

    @property
    def targets(self) -> Targets:
        """Which modules PEFT would adapt."""
        if self._targets is None:
            self._targets = Targets(self.config)
        return self._targets

    def once(self, read: Callable[[Settings], T]) -> T:
        """What `read` makes of these settings, for something that is asked on every module. It is not read twice."""
        if read not in self._known:
            self._known[read] = read(self)
        found: T = self._known[read]
        return found

    def integer(self, key: str, default: int, *, least: int = 1, most: int = 2**31) -> int:
        """A whole number from `least` to `most`."""
        return as_integer(key, self._value(key, default), least=least, most=most)

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return as_number(key, self._value(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            refuse(key, value, "true or false")
        return value

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        """One of some texts."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in choices:
            refuse(key, value, " or ".join(choices))
        return value

    def integers(self, key: str, *, below: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers of at least 0."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(is_int(item) and item >= 0 for item in value):
            refuse(key, value, "a list of whole numbers")
        for item in value:
            if below is not None and item >= below:
                refuse(key, item, f"below {below}")
        return tuple(value)

    def names(self, key: str) -> str | tuple[str, ...]:
        """Text, or a list of names."""
        value = self._value(key, [])
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            refuse(key, value, "text or a list of names")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            refuse(key, value, "an object")
        return value

    def of(self, pattern_key: str, module: str, default: Any) -> Any:
        """What a pattern such as rank_pattern says of `module` (PEFT's `get_pattern_key`), unchecked."""
        values = self.mapping(pattern_key)
        if not values:
            return default
        if pattern_key not in self._patterns:
            self._patterns[pattern_key] = ModulePatterns(values)
        key = self._patterns[pattern_key].first(module)
        return default if key is None else values[key]

    def searched(self, pattern_key: str, module: str, default: Any) -> Any:
        """As `of`, for a pattern whose keys PEFT looks for anywhere in a name."""
        values = self.mapping(pattern_key)
        if pattern_key not in self._searches:
            self._searches[pattern_key] = SearchPatterns(values)
        key = self._searches[pattern_key].first(module)
        return default if key is None else values[key]

    def rank(self, module: str, default: int, *, key: str = "r", pattern: str = "rank_pattern") -> int:
        """The rank of a module: that of the pattern, or that of `key`."""
        return as_integer(pattern, self.of(pattern, module, self.integer(key, default)))

    def unserved(self, key: str, why: str) -> NoReturn:
        """Raises UnsupportedMethod for a setting."""
        raise UnsupportedMethod(
            f"{key}={repr(self.config.get(key))[:80]} is not served: {why}.",
            metadata={"peft_type": self.method, "field": key},
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value


def as_integer(key: str, value: Any, *, least: int = 1, most: int = 2**31) -> int:
    """A whole number from `least` to `most`. Raises Rejected with reason BAD_CONFIG."""
    if not is_int(value) or not least <= value <= most:
        refuse(key, value, f"a whole number from {least} to {most}")
    return int(value)


def as_number(key: str, value: Any) -> float:
    """A finite number. Raises Rejected with reason BAD_CONFIG."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        refuse(key, value, "a finite number")
    return float(value) if math.isfinite(value) else refuse(key, value, "a finite number")
