"""Who does something, as it is recorded: `ADAPTERBAY_ACTOR`, or the user and host of the process."""

from __future__ import annotations

import getpass
import os
import socket


def actor() -> str:
    """One line of at most 200 printable characters."""
    configured = os.environ.get("ADAPTERBAY_ACTOR", "").strip()
    return plain(configured or f"{_user()}@{socket.gethostname()}")


def plain(text: str) -> str:
    """Any text as one short printable line."""
    return "".join(character if character.isprintable() else "?" for character in text)[:200]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for its user
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"
