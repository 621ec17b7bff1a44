"""The commands of `registry`. Exit codes: see `adapterbay.registry.console`.

Each module adds its commands to `app` when it is imported.
"""

from __future__ import annotations

from adapterbay.registry.cli import versions as _versions
from adapterbay.registry.cli.common import app

__all__ = ["app"]
_ = (_versions,)
