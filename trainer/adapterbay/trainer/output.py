"""The output folder: whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterbay.registry.errors import InvalidArgument, StorageFull

_OURS = ("training.json", "adapter_config.json")


def check(output: Path, *, overwrite: bool) -> None:
    """Whether `output` may be written, asked before any work is done. Raises InvalidArgument if it may not."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InvalidArgument(f"output: {output} is not a folder; name another.", field="output")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise InvalidArgument(
                f"output: {output} exists and is not empty; name another folder, or say --overwrite to replace it.",
                field="output",
            )
        if not any((output / name).is_file() for name in _OURS):
            raise InvalidArgument(
                f"output: {output} holds something else than an adapter, so --overwrite does not delete it; name "
                "another folder.",
                field="output",
            )
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"output: {output.parent} cannot be made: {error.strerror}.", field="output") from error
    if not os.access(output.absolute().parent, os.W_OK):
        raise InvalidArgument(f"output: {output.parent} cannot be written to.", field="output")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A fresh folder beside `output` that takes its name when the block ends well, and is removed when it does not.

    Raises StorageFull if the disk fills up. What was at `output` before stays until the new folder is complete.
    """
    output = output.absolute()
    staging = output.parent / f".{output.name}.{os.getpid()}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        yield staging
        _publish(staging, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"No space left for {output}; nothing was kept of this run.") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, output: Path) -> None:
    for path in staging.rglob("*"):
        if path.is_file():
            _flush(path)
    _flush(staging)
    if output.exists():
        replaced = output.parent / f".{output.name}.{os.getpid()}.replaced"
        output.rename(replaced)
        try:
            staging.rename(output)
        except OSError:
            replaced.rename(output)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        staging.rename(output)
    _flush(output.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
