"""Where adapterbay keeps things on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of caches and of the default registry: `ADAPTERBAY_HOME`, or `~/.adapterbay`."""
    configured = os.environ.get("ADAPTERBAY_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".adapterbay"


def default_registry() -> Path:
    """The local registry that is used when none is named: `ADAPTERBAY_REGISTRY`, or `registry` under `home()`."""
    configured = os.environ.get("ADAPTERBAY_REGISTRY")
    return Path(configured).expanduser() if configured else home() / "registry"


def cache_folder() -> Path:
    """Converted bases and remembered fingerprints. All of it can be deleted at any time."""
    return home() / "cache"
