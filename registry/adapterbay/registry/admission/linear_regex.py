"""Regular expressions whose matching takes linear time, whatever they are.

Python's matcher backtracks: `(.|.)(.|.)…x` takes time that doubles with every group. This one runs all alternatives at
once (Thompson 1968, https://swtch.com/~rsc/regexp/regexp1.html) and remembers the sets of states that it saw, so it
takes at most O(length of the text * size of the expression). It answers only whether a whole text matches, and it knows
only what regular languages have: no look-around, no back-references, no possessive repeats, no flags.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final, TypeAlias

MAX_LENGTH: Final = 2000
MAX_STEPS: Final = 2000
MAX_DEPTH: Final = 50
_MAX_REMEMBERED: Final = 200_000
"""Places in the sets of states that are kept."""

_REPEAT = re.compile(r"[*+?]|\{(?!\})(?P<least>[0-9]*)(?P<comma>,(?P<most>[0-9]*))?\}")
_GROUP = re.compile(r"\((?:\?(?::|P<[A-Za-z_][A-Za-z0-9_]{0,40}>))?")


class Look(enum.Enum):
    """What holds between two characters."""

    START = "^"
    END = "$"
    BOUNDARY = "b"
    NO_BOUNDARY = "B"


_LOOKS: Final = {"A": Look.START, "Z": Look.END, "b": Look.BOUNDARY, "B": Look.NO_BOUNDARY}


@dataclass(frozen=True, slots=True)
class _Fork:
    """Goes on at all of these places, counted from its own."""

    offsets: tuple[int, ...]


_Step: TypeAlias = "re.Pattern[str] | Look | _Fork"
"""One character of a kind, a condition, or a fork. After the first two it goes on at the next step."""
_State: TypeAlias = "tuple[frozenset[int], bool, bool]"
"""Where it is, whether at the start of the text, and whether after a word character."""


class UnusablePattern(ValueError):
    """The expression is no regular expression, too large, or of a kind that is not used; the text says which."""


class LinearPattern:
    """A compiled expression. Raises UnusablePattern."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_LENGTH:
            raise UnusablePattern(f"it has {len(pattern)} characters, {MAX_LENGTH} are allowed")
        self._steps = _Compiler(pattern).compile()
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UnusablePattern(f"it is not a regular expression ({error})") from error
        self._next: dict[tuple[_State, str], _State] = {}
        self._remembered = 0

    @property
    def size(self) -> int:
        """The number of steps."""
        return len(self._steps)

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text, one line, matches."""
        state: _State = (frozenset({0}), True, False)
        for character in text:
            found = self._next.get((state, character))
            if found is None:
                found = self._after(state, character)
                self._remember(state, character, found)
            state = found
        return len(self._steps) in self._reached(state, None)

    def _remember(self, state: _State, character: str, found: _State) -> None:
        if self._remembered > _MAX_REMEMBERED:
            self._next.clear()
            self._remembered = 0
        self._remembered += len(found[0]) + 1
        self._next[state, character] = found

    def _after(self, state: _State, character: str) -> _State:
        places = set()
        for place in self._reached(state, character):
            step = self._steps[place] if place < len(self._steps) else None
            if isinstance(step, re.Pattern) and step.fullmatch(character):
                places.add(place + 1)
        return frozenset(places), False, _is_word(character)

    def _reached(self, state: _State, following: str | None) -> set[int]:
        """All places that are reached without a character. The place after the last step means a match."""
        places, at_start, after_word = state
        boundary = after_word != (following is not None and _is_word(following))
        holds = {
            Look.START: at_start,
            Look.END: following is None,
            Look.BOUNDARY: boundary,
            Look.NO_BOUNDARY: not boundary,
        }
        reached: set[int] = set()
        waiting = list(places)
        while waiting:
            place = waiting.pop()
            if place in reached:
                continue
            reached.add(place)
            step = self._steps[place] if place < len(self._steps) else None
            if isinstance(step, _Fork):
                waiting += (place + offset for offset in step.offsets)
            elif isinstance(step, Look) and holds[step]:
                waiting.append(place + 1)
        return reached


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


class _Compiler:
    """Recursive descent over the grammar of Python's `re`, as far as it is used here."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._position = 0
        self._depth = 0

    def compile(self) -> list[_Step]:
        steps = self._alternatives()
        if self._position < len(self._pattern):
            raise UnusablePattern("it closes a group that was not opened")
        return steps

    def _peek(self, count: int = 1) -> str:
        return self._pattern[self._position : self._position + count]

    def _alternatives(self) -> list[_Step]:
        branches = [self._sequence()]
        while self._peek() == "|":
            self._position += 1
            branches.append(self._sequence())
        steps = branches.pop()
        for branch in reversed(branches):
            steps = _bounded([_Fork((1, len(branch) + 2)), *branch, _Fork((len(steps) + 1,)), *steps])
        return steps

    def _sequence(self) -> list[_Step]:
        steps: list[_Step] = []
        while self._peek() not in ("", "|", ")"):
            steps = _bounded([*steps, *self._repeated(self._atom())])
        return steps

    def _repeated(self, steps: list[_Step]) -> list[_Step]:
        found = _REPEAT.match(self._pattern, self._position)
        if found is None:
            return steps
        self._position = found.end()
        if self._peek() == "?":  # lazy: another order, the same texts
            self._position += 1
        elif self._peek() == "+":
            raise UnusablePattern("it has a possessive repeat")
        least, most = _bounds(found)
        rest = len(steps)
        if max(least, most or 0) * max(rest, 1) > MAX_STEPS:
            raise UnusablePattern("it repeats too much")
        if most is None:
            loop: list[_Step] = [_Fork((1, rest + 2)), *steps, _Fork((-rest - 1,))]
            return _bounded(steps * least + loop)
        optional: list[_Step] = [_Fork((1, rest + 1)), *steps]
        return _bounded(steps * least + optional * (most - least))

    def _atom(self) -> list[_Step]:
        character = self._peek()
        if character == "(":
            return self._group()
        if character == "[":
            return [_kind(self._take(_end_of_set(self._pattern, self._position) - self._position))]
        if character == "\\":
            escape = self._take(2)
            name = escape[1:]
            if name in _LOOKS:
                return [_LOOKS[name]]
            if name in tuple("dDsSwW") or (name and not name.isalnum()):
                return [_kind(escape)]
            raise UnusablePattern(f"it uses {escape}")
        self._position += 1
        if character in "^$":
            return [Look(character)]
        return [_kind("." if character == "." else re.escape(character))]

    def _group(self) -> list[_Step]:
        opening = _GROUP.match(self._pattern, self._position)
        if opening is None or (opening[0] == "(" and self._peek(2) == "(?"):
            raise UnusablePattern("it looks ahead, behind or back, or sets flags")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnusablePattern(f"its groups are more than {MAX_DEPTH} deep")
        self._position = opening.end()
        steps = self._alternatives()
        if self._take(1) != ")":
            raise UnusablePattern("it opens a group that is not closed")
        self._depth -= 1
        return steps

    def _take(self, count: int) -> str:
        taken = self._peek(count)
        self._position += count
        return taken


def _bounds(found: re.Match[str]) -> tuple[int, int | None]:
    """How often at least and at most; None: any number of times."""
    if found[0] in ("*", "+", "?"):
        return int(found[0] == "+"), 1 if found[0] == "?" else None
    least = int(found["least"] or 0)
    if found["comma"] is None:
        return least, least
    most = int(found["most"]) if found["most"] else None
    if most is not None and most < least:
        raise UnusablePattern("it repeats at least more often than at most")
    return least, most


def _bounded(steps: list[_Step]) -> list[_Step]:
    if len(steps) > MAX_STEPS:
        raise UnusablePattern("it is too large")
    return steps


def _kind(text: str) -> re.Pattern[str]:
    """A kind of character, in Python's own notation."""
    plain = re.sub(r"\\.", "", text)
    if text.startswith("[") and ("[" in plain[1:] or any(sign in plain for sign in ("--", "&&", "||", "~~"))):
        raise UnusablePattern("it has a set in a set")  # Python warns that these will mean something else
    try:
        return re.compile(text)
    except re.error as error:
        raise UnusablePattern(f"it is not a regular expression ({error})") from error


def _end_of_set(pattern: str, begin: int) -> int:
    """The place behind the set that begins at `begin`."""
    position = begin + 1
    if pattern[position : position + 1] == "^":
        position += 1
    if pattern[position : position + 1] == "]":
        position += 1
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1
