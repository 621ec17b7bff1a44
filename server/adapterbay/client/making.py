"""Makes request messages, and says which argument it was when one cannot be sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from adapterbay.client.errors import RequestError

M = TypeVar("M", bound=Message)

_WHOLE: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_KINDS: Final = {
    FieldDescriptor.CPPTYPE_STRING: "text",
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
}


def made(kind: type[M], **fields: Any) -> M:
    """A message; None leaves a field as it is by default.

    Raises TypeError for an argument of a wrong type, RequestError for one that the message cannot hold; both name it.
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise _refusal(kind, fields) or error from None


def _refusal(kind: type[Message], fields: Mapping[str, Any]) -> TypeError | RequestError | None:
    for name, value in fields.items():
        field = kind.DESCRIPTOR.fields_by_name[name]
        many = field.is_repeated and isinstance(value, list | tuple)
        for place, entry in enumerate(value) if many else [(None, value)]:
            try:
                kind(**{name: [entry] if many else entry})
            except (TypeError, ValueError, OverflowError) as error:
                return _about(name if place is None else f"{name}[{place}]", cast(FieldDescriptor, field), entry, error)
    return None


def _about(name: str, field: FieldDescriptor, value: object, error: Exception) -> TypeError | RequestError:
    shown = ascii(value) if len(ascii(value)) <= 80 else f"{ascii(value)[:80]}…"
    if isinstance(error, UnicodeError):
        return RequestError(f"{name} holds characters that UTF-8 has not: {shown}.")
    if isinstance(error, OverflowError):
        return RequestError(f"{name} is {shown}, which is too large for a number with a point.")
    bounds = _WHOLE.get(field.cpp_type)
    if bounds is not None and isinstance(error, ValueError):
        limit = f"at least {bounds[0]}" if cast(int, value) < bounds[0] else f"at most {bounds[1]}"
        return RequestError(f"{name} is {shown}; it must be {limit}.")
    if field.is_repeated and "[" not in name:
        return TypeError(f"{name} takes a sequence, not {shown}.")
    takes = "a whole number" if bounds is not None else _KINDS.get(field.cpp_type, f"a {field.name}")
    return TypeError(f"{name} takes {takes}, not {shown}.")
