"""What the operator of a registry server decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args
from urllib.parse import urlsplit

from adapterbay.registry.admission import Limits
from adapterbay.registry.base.reference import BaseReference
from adapterbay.registry.errors import InvalidArgument

Anonymous = Literal["none", "read", "write"]

DEFAULT_PORT: Final = 8470
MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class BaseChoice:
    """A base that the server may use. `name` is what clients call it; None: it is found by its fingerprint only."""

    name: str | None
    reference: BaseReference

    @classmethod
    def parse(cls, text: str) -> BaseChoice:
        """Reads `NAME=REF` or `REF`. Raises InvalidReference."""
        name, separator, reference = text.partition("=")
        if not separator:
            return cls(None, BaseReference.parse(text))
        if not name.strip():
            raise InvalidArgument(f"--base {text[:200]!r}: a name stands before '=': NAME=REF.", field="base")
        return cls(name.strip(), BaseReference.parse(reference))


@dataclass(frozen=True, slots=True)
class Sizes:
    """The most that one request may bring. Sizes in bytes, after decoding.

    Files up to `regular_bytes` travel inside a commit (base64, so 4/3 of it on the wire); larger ones by Git LFS.
    `line_bytes` is a line of a commit without its file's content; `idle_seconds` a pause within a request's body.
    """

    regular_bytes: int = 256 * MIB
    commit_bytes: int = 1024 * MIB
    large_bytes: int = 4096 * MIB
    document_bytes: int = 4 * MIB
    line_bytes: int = 256 * 1024
    files: int = 2000
    idle_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("regular_bytes", "commit_bytes", "large_bytes", "document_bytes", "line_bytes", "files"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}: it must be at least 1.", field=name)
        if self.regular_bytes > self.commit_bytes:
            raise InvalidArgument(
                f"regular_bytes ({self.regular_bytes}) is over commit_bytes ({self.commit_bytes}): no such file could "
                "be committed.",
                field="regular_bytes",
            )


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """All of it. `tokens_file` None: `tokens.json` in the registry; `public_url` None: what the client asked for."""

    registry: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    tokens_file: Path | None = None
    anonymous: Anonymous = "none"
    bases: tuple[BaseChoice, ...] = ()
    public_url: str | None = None
    sizes: Sizes = field(default_factory=Sizes)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.anonymous not in get_args(Anonymous):
            raise InvalidArgument(
                f"anonymous is {self.anonymous!r}: it is one of {', '.join(get_args(Anonymous))}.", field="anonymous"
            )
        if not 0 <= self.port < 65536:
            raise InvalidArgument(f"{self.port} is not a port.", field="port")
        if self.public_url is not None:
            parts = urlsplit(self.public_url)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
                raise InvalidArgument(
                    f"{self.public_url!r} is not a URL such as https://adapters.example.org.", field="public_url"
                )

    @property
    def tokens_path(self) -> Path:
        """Where the tokens are."""
        return self.tokens_file or self.registry / "tokens.json"
