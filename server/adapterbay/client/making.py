"""Makes request messages, and says which argument it was when one cannot be sent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Final, TypeGuard, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from adapterbay.client.errors import RequestError

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Ordered = Sequence[T] | Iterator[T]
"""Values that come in an order: a sequence, or a generator, which is read once."""

_WHOLE: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_EXACT: Final[dict[int, tuple[type, ...]]] = {
    **dict.fromkeys(_WHOLE, (int,)),
    FieldDescriptor.CPPTYPE_STRING: (str,),
    FieldDescriptor.CPPTYPE_BOOL: (bool,),
    FieldDescriptor.CPPTYPE_DOUBLE: (float, int),
    FieldDescriptor.CPPTYPE_FLOAT: (float, int),
    FieldDescriptor.CPPTYPE_ENUM: (int,),
}
"""What a field takes without a second look. Protobuf takes more: bytes as text, 2 as a switch, True as a number."""
_BOOLEANS: Final = ("bool", "bool_")
"""numpy's, by name: it is not imported here."""
_KINDS: Final = {
    FieldDescriptor.CPPTYPE_STRING: "text",
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
}


def made(kind: type[M], within: str = "", **fields: Any) -> M:
    """A message; None leaves a field that knows whether it is set as it is by default. `within` goes before names.

    Raises TypeError for an argument of a wrong type, RequestError for one that the message cannot hold; both name it.
    """
    exact = _TABLES.get(kind) or _table(kind)
    for name, value in fields.items():
        if type(value) not in exact[name]:
            _look_again(kind, within, name, value)
    try:
        return kind(**fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise _refusal(kind, within, fields) or error from None


def several(values: Ordered[T], name: str, of: str = "strings") -> Sequence[T]:
    """Values in their order, as a sequence.

    Raises TypeError for what would be taken apart into something else (one string's characters, a mapping's keys, a
    table's column names), for a set, which has no order, and for what has no entries at all.
    """
    if type(values) is list or type(values) is tuple:
        return values
    takes = f"{name} takes a sequence of {of}, not"
    if isinstance(values, str):
        raise TypeError(f"{takes} one string.")
    if isinstance(values, set | frozenset):
        raise TypeError(f"{takes} a set, which has no order; give a list.")
    if isinstance(values, Mapping):
        raise TypeError(f"{takes} a mapping, {shown(values)}; give a list.")
    if isinstance(values, bytes | bytearray | memoryview):
        raise TypeError(f"{takes} {shown(values)}.")
    if hasattr(values, "columns"):
        raise TypeError(f"{takes} a table; give one of its columns.")
    try:
        entries = iter(values)
    except TypeError:
        raise TypeError(f"{takes} {shown(values)}.") from None
    return list(entries)


def strings(values: Ordered[str], name: str) -> Sequence[str]:
    """Texts in their order. Raises TypeError that names the first entry that is none, and as `several` does."""
    texts = several(values, name)
    if not set(map(type, texts)) <= _TEXT:
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"{name}[{place}] takes text, not {shown(text)}.")
    return texts


def shown(value: object) -> str:
    """A value for a message, cut at 80 characters."""
    try:
        text = ascii(value)
    except ValueError:  # a number of more than 4,300 digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}…"


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number. True and False are none."""
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def is_finite(number: float) -> bool:
    """Whether a float holds it, and it is neither nan nor infinite."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


_TEXT: Final = {str}
_TABLES: Final[dict[type[Message], dict[str, tuple[type, ...]]]] = {}


def _table(kind: type[Message]) -> dict[str, tuple[type, ...]]:
    """Field → the types that need no second look; kept, as every request asks for it."""
    table: dict[str, tuple[type, ...]] = {}
    for field in kind.DESCRIPTOR.fields:
        if field.is_repeated:
            table[field.name] = (list, tuple)
        elif field.message_type is not None:
            table[field.name] = (GetMessageClass(cast(Descriptor, field.message_type)), type(None))
        else:
            table[field.name] = _EXACT[field.cpp_type] + ((type(None),) if field.has_presence else ())
    _TABLES[kind] = table
    return table


def _look_again(kind: type[Message], within: str, name: str, value: object) -> None:
    """Raises TypeError for a value that protobuf would take for another; what it refuses itself passes here."""
    field = cast(FieldDescriptor, kind.DESCRIPTOR.fields_by_name[name])
    switch = isinstance(value, bool) or type(value).__name__ in _BOOLEANS
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        wrong = not switch
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING and not field.is_repeated:
        wrong = not isinstance(value, str)
    else:
        wrong = switch or value is None
    if wrong:
        raise _about(within + name, field, value, TypeError())


def _refusal(kind: type[Message], within: str, fields: Mapping[str, Any]) -> TypeError | RequestError | None:
    for name, value in fields.items():
        field = kind.DESCRIPTOR.fields_by_name[name]
        many = field.is_repeated and isinstance(value, list | tuple)
        for place, entry in enumerate(value) if many else [(None, value)]:
            try:
                kind(**{name: [entry] if many else entry})
            except (TypeError, ValueError, OverflowError) as error:
                path = within + (name if place is None else f"{name}[{place}]")
                return _about(path, cast(FieldDescriptor, field), entry, error)
    return None


def _about(name: str, field: FieldDescriptor, value: object, error: Exception) -> TypeError | RequestError:
    given = shown(value)
    if isinstance(error, UnicodeError):
        return RequestError(f"{name} holds characters that UTF-8 has not: {given}.")
    if isinstance(error, OverflowError):
        return RequestError(f"{name} is {given}, which is too large for a number with a point.")
    bounds = _WHOLE.get(field.cpp_type)
    if bounds is not None and isinstance(error, ValueError):
        limit = f"at least {bounds[0]}" if cast(int, value) < bounds[0] else f"at most {bounds[1]}"
        return RequestError(f"{name} is {given}; it must be {limit}.")
    if field.is_repeated and not name.endswith("]"):
        return TypeError(f"{name} takes a sequence, not {given}.")
    takes = "a whole number" if bounds is not None else _KINDS.get(field.cpp_type, f"a {field.name}")
    return TypeError(f"{name} takes {takes}, not {given}.")
