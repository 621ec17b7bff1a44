"""How both clients open their channel."""

from __future__ import annotations

import re
from typing import Final

import grpc

from adapterbay.client.errors import RequestError
from adapterbay.client.making import shown

MEBIBYTE = 1 << 20

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 256 * MEBIBYTE),
    ("grpc.max_send_message_length", 64 * MEBIBYTE),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Retries are ours (UNAVAILABLE, with backoff); gRPC's own wait before it dials again must not be longer.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # in truth how long a dial may take before it is given up
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 60.0


_SCHEMES: Final = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds", "google-c2p")
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?://|(?![0-9]+$))")
"""What stands before `://`, or before a colon that no port follows."""
_HOST_PORT = re.compile(r"(?:\[[^\[\]/]+\]|[^:\[\]/]+):(?P<port>[0-9]{1,5})")


def checked(address: str, credentials: grpc.ChannelCredentials | None = None) -> str:
    """An address that gRPC can look for: HOST:PORT, or one of its own schemes. Raises RequestError, or TypeError."""
    if not isinstance(address, str):
        raise TypeError(f"address takes HOST:PORT as text, not {shown(address)}.")
    if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
        raise TypeError(f"credentials takes a grpc.ChannelCredentials, not {shown(credentials)}.")
    if not address.strip():
        raise RequestError("The server's address is empty; give HOST:PORT.")
    found = _SCHEME.match(address)
    known = found is not None and found["scheme"] in _SCHEMES
    if not address.isprintable() or (" " in address and not known):  # a socket's path may hold spaces
        raise RequestError(f"address {shown(address)} holds a space or a control character; give HOST:PORT.")
    if known:
        if address.endswith("/"):
            raise RequestError(f"address {shown(address)} ends with a slash; leave it out.")
        return address
    if "://" in address:
        raise RequestError(f"{address} is a URL; give HOST:PORT alone, such as {DEFAULT_ADDRESS}.")
    if "/" in address:
        raise RequestError(f"address {shown(address)} has a path; give HOST:PORT alone, such as {DEFAULT_ADDRESS}.")
    parts = _HOST_PORT.fullmatch(address)
    if parts is None or not 0 < int(parts["port"]) < 1 << 16:
        raise RequestError(f"address {shown(address)} is not HOST:PORT, such as {DEFAULT_ADDRESS} or [::1]:50051.")
    return address
