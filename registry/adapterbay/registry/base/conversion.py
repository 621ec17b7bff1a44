"""GGUF files, converted once into Hugging Face format under `home()/cache/bases/<sha256>-<converter version>`.

The converter needs torch and lives elsewhere; it is found by its entry point. Two processes that convert the same
file at once both succeed: each writes a folder of its own, and the first rename wins.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from adapterbay.registry.base.filecache import remembered
from adapterbay.registry.digest import digest_file, is_digest
from adapterbay.registry.errors import BaseNotFound, Corrupted, MissingExtra, Rejected, StorageFull
from adapterbay.registry.paths import cache_folder

ENTRY_POINT_GROUP: Final = "adapterbay.base_converters"

_log = logging.getLogger(__name__)


def gguf_digest(gguf: Path) -> str:
    """The digest of a GGUF file, remembered by path, size, time and inode."""
    found = remembered(
        "gguf-digests",
        1,
        [gguf],
        lambda: {"digest": digest_file(gguf)},
        lambda value: isinstance(value.get("digest"), str) and is_digest(value["digest"]),
    )
    return str(found["digest"])


def converted(gguf: Path) -> Path:
    """The folder that `gguf` converts to; the first time takes as long as the conversion.

    Raises BaseNotFound for a missing file, Rejected (BAD_GGUF) for another kind of file, MissingExtra without torch.
    """
    if not gguf.is_file():
        raise BaseNotFound(f"There is no GGUF file at {gguf}: check the path of the base.")
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise Rejected(f"{gguf} is not a GGUF file: it does not begin with 'GGUF'.", reason="BAD_GGUF")
    convert, version = _converter()
    destination = cache_folder() / "bases" / f"{gguf_digest(gguf).removeprefix('sha256:')}-{version}"
    if not (destination / "config.json").is_file():
        _convert(convert, gguf, destination)
    return destination


def _converter() -> tuple[Callable[[Path, Path], None], str]:
    entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name="gguf")
    if not entries:
        raise MissingExtra("Reading a GGUF base needs torch and transformers: pip install 'adapterbay[server]'.")
    entry = next(iter(entries))
    try:
        module: Any = importlib.import_module(entry.module)
        convert: Callable[[Path, Path], None] = entry.load()
    except ImportError as error:
        raise _missing(error) from error
    return convert, str(module.CONVERTER_VERSION)


def _missing(error: ImportError) -> MissingExtra:
    return MissingExtra(f"Reading a GGUF base needs more: pip install 'adapterbay[server]' ({error}).")


def _convert(convert: Callable[[Path, Path], None], gguf: Path, destination: Path) -> None:
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f"{destination.name}.tmp-"))
    except OSError as error:
        raise _storage(error, destination.parent) from error
    _log.info("Converting %s; this is done once.", gguf)
    try:
        try:
            convert(gguf, temporary)
        except ImportError as error:
            raise _missing(error) from error
        if not (temporary / "config.json").is_file() or not list(temporary.glob("*.safetensors")):
            raise Corrupted(f"Converting {gguf} gave no config.json or no weights: reinstall adapterbay[server].")
        temporary.chmod(0o755)
        _sync(temporary)
        _take(temporary, destination)
    except OSError as error:
        raise _storage(error, destination.parent) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take(temporary: Path, destination: Path) -> None:
    try:
        temporary.rename(destination)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not (destination / "config.json").is_file():
            raise
        _log.info("%s was converted by another process meanwhile.", destination.name)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _storage(error: OSError, folder: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"No space left in {folder} for the converted base: free some, or set ADAPTERBAY_HOME.")
    return error
