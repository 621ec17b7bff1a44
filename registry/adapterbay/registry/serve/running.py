"""Running the server: uvicorn, one line that says where it is, and a quiet end on SIGTERM."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import Final

import uvicorn

from adapterbay.registry.errors import Unavailable
from adapterbay.registry.serve.app import make_app
from adapterbay.registry.serve.settings import ServeSettings

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
SHUTDOWN_SECONDS: Final = 30
KEEP_ALIVE_SECONDS: Final = 75
MAX_HEADER_BYTES: Final = 64 * 1024


def run(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; requests under way are finished. `say` gets the one line of the start.

    Raises Unavailable if the address cannot be had, and whatever `make_app` raises.
    """
    app = make_app(settings)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    listening = _listen(settings)
    port = listening.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = settings.public_url or f"http://{host}:{port}"
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        lifespan="on",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    server = uvicorn.Server(config)

    def stop(*_: object) -> None:
        """For a signal before uvicorn has its own handler, and after: it raises it once more when all is finished."""
        server.should_exit = True

    signal.signal(signal.SIGTERM, stop)
    if settings.host not in LOOPBACK and not url.startswith("https:"):
        say(
            "Tokens travel unencrypted: put a proxy with TLS in front and say where it is with --public-url https://..."
        )
    say(f"registry {settings.registry} at {url}   (clients: export HF_ENDPOINT={url} HF_TOKEN=...)")
    server.run(sockets=[listening])


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named, or asyncio leaves Nagle's algorithm on, which costs 40 ms an answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise Unavailable(
            f"The server cannot listen at {settings.host}:{settings.port}: {error.strerror}. Choose another --port."
        ) from error
    return listening
