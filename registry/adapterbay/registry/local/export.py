"""A version as a plain PEFT folder again."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from adapterbay.registry import durable
from adapterbay.registry.digest import digest_file
from adapterbay.registry.errors import Corrupted, InvalidArgument
from adapterbay.registry.views import Snapshot


def write_folder(snapshot: Snapshot, destination: Path) -> Path:
    """Copies the files of `snapshot` to `destination`, which must not exist or be empty. Whole or not at all."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise InvalidArgument(f"{destination} is not a folder: choose another destination.", field="destination")
    if destination.is_dir() and any(destination.iterdir()):
        raise InvalidArgument(
            f"{destination} is not empty: choose another destination, nothing was written.", field="destination"
        )
    target = destination.absolute()
    with durable.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            for entry in snapshot.manifest.files:
                copy = temporary / entry.path
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(snapshot.files[entry.path], copy)
                if digest_file(copy) != entry.digest:
                    raise Corrupted(f"{entry.path} was altered while it was copied ({entry.digest}): try again.")
                durable.sync_file(copy)
            temporary.chmod(0o755)
            durable.sync_folder(temporary)
            durable.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target
