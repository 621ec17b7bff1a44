"""Where adapterbay keeps things on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from adapterbay.registry.errors import InvalidArgument


def home() -> Path:
    """The folder of caches and of the default registry: `ADAPTERBAY_HOME`, or `~/.adapterbay`."""
    configured = os.environ.get("ADAPTERBAY_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".adapterbay"


def expanded(place: str | Path) -> Path:
    """A path from the root on; `~` is somebody's home. Raises InvalidArgument for what is no path."""
    try:
        return Path(place).expanduser().absolute()
    except RuntimeError as error:  # ~ of a user that is not there
        raise InvalidArgument(f"{str(place)[:200]!r} is no path: {error}", field="registry") from error


def default_registry() -> Path:
    """The local registry that is used when none is named: `ADAPTERBAY_REGISTRY`, or `registry` under `home()`."""
    configured = os.environ.get("ADAPTERBAY_REGISTRY")
    return Path(configured).expanduser() if configured else home() / "registry"


def cache_folder() -> Path:
    """Converted bases and remembered fingerprints. All of it can be deleted at any time."""
    return home() / "cache"
