"""Opening files that strangers put there: a regular file or an error, never a pipe that blocks or a device."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from adapterbay.registry.errors import InvalidArgument, Rejected

_NO_WAIT: Final = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)


def open_regular(path: Path, what: str, *, follow: bool = True) -> BinaryIO:
    """Opens a regular file to read; `what` names it in messages. Without `follow`, the path itself may be no link.

    What was checked is what is read: the type is asked of the open file. Raises Rejected (MISSING_FILE, NOT_A_FILE,
    PATH_OUTSIDE), or InvalidArgument if it may not be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a device may act when it is opened
            raise _not_a_file(what)
        handle = os.open(path, os.O_RDONLY | _NO_WAIT | (0 if follow else _NO_LINK))
    except OSError as error:
        raise _named(error, what) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_a_file(what)
    return os.fdopen(handle, "rb")


def _named(error: OSError, what: str) -> Exception:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Rejected(f"{what} is not there any more: try again.", reason="MISSING_FILE", metadata={"file": what})
    if error.errno == errno.ELOOP:
        return Rejected(
            f"{what} is a link where a file was expected: copy the file in its place.",
            reason="PATH_OUTSIDE",
            metadata={"file": what},
        )
    if error.errno == errno.ENXIO:
        return _not_a_file(what)
    return InvalidArgument(f"{what} cannot be read: {error.strerror}.", field="folder")


def _not_a_file(what: str) -> Rejected:
    return Rejected(f"{what} is not a regular file.", reason="NOT_A_FILE", metadata={"file": what})
