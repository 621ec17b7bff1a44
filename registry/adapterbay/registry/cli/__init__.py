"""The commands of `registry`. Exit codes: see `adapterbay.registry.console`.

Each module adds its commands to `app` when it is imported; the order here is the order in the help.
"""

from __future__ import annotations

# isort: off
from adapterbay.registry.cli import versions as _versions
from adapterbay.registry.cli import lifecycle as _lifecycle
from adapterbay.registry.cli import reading as _reading
from adapterbay.registry.cli import fusing as _fusing
from adapterbay.registry.cli import signing as _signing
from adapterbay.registry.cli import keeping as _keeping
from adapterbay.registry.cli import mirroring as _mirroring
from adapterbay.registry.cli import serving as _serving
from adapterbay.registry.cli.common import app

# isort: on

__all__ = ["app"]
_MODULES = (_versions, _lifecycle, _reading, _fusing, _signing, _keeping, _mirroring, _serving)
