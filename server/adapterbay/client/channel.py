"""How both clients open their channel."""

from __future__ import annotations

from adapterbay.client.errors import RequestError

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


def checked(address: str) -> str:
    """An address that gRPC can look for: HOST:PORT, or one of its own schemes. Raises RequestError, or TypeError."""
    if not isinstance(address, str):
        raise TypeError(f"address takes HOST:PORT as text, not {address!r}.")
    if not address.strip():
        raise RequestError("The server's address is empty; give HOST:PORT.")
    if address.startswith(("http://", "https://")):
        raise RequestError(f"{address} is a URL; give HOST:PORT alone, such as {DEFAULT_ADDRESS}.")
    return address
