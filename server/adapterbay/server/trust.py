"""Who must have signed what this server loads."""

from __future__ import annotations

from pathlib import Path

from adapterbay.registry.signing import TrustedKeys
from adapterbay.server.config import ServerConfig


def trusted_keys(config: ServerConfig) -> TrustedKeys | None:
    """The keys of which one must have signed a version; None if nothing need be signed.

    Raises InvalidArgument for a file that is no public key, MissingExtra if model-signing is not installed.
    """
    return (
        TrustedKeys.read(Path(file).expanduser() for file in config.trusted_keys) if config.require_signature else None
    )
