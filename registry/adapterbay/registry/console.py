"""What every command line of adapterbay shares: errors as one line, exit codes, JSON on standard output.

0    done
1    the request was understood and failed (not found, refused, stale alias, …)
2    usage: a wrong argument, a missing part, no disk
130  interrupted
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel
from typer import Exit

from adapterbay.registry.errors import AdapterbayError

USAGE_EXIT_CODE = 2


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Turns a user's mistake into `error: …` on standard error and an exit code. Programming errors pass through.

    Works as a decorator too.
    """
    try:
        yield
    except AdapterbayError as error:
        fail(error.message, error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output went away (`registry list | head`): what Python flushes at exit has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Exit(0) from None
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        fail(f"{error.strerror or error}{place}", USAGE_EXIT_CODE)


def fail(message: str, exit_code: int) -> NoReturn:
    """One line on standard error, then exit."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise Exit(exit_code)


def write_json(value: Any) -> None:
    """One JSON object, as the last line of standard output."""
    sys.stdout.write(f"{json.dumps(plain(value), ensure_ascii=False, allow_nan=False)}\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """Dataclasses, models, paths and times as JSON has them; times in RFC 3339."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value
