"""The server's settings: one frozen object, built once, passed whole."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

KIBIBYTE = 1 << 10
MEBIBYTE = 1 << 20


class ServerConfig(BaseModel):
    """Every setting of a server. Sizes are in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = Field(default=None, description="Base reference; none means the default base.")
    registry: str | None = Field(default=None, description="Registry folder; none means the default one.")
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535, description="0 picks a free port.")
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(default=None, ge=0, le=65535, description="None: no metrics; 0 picks a free port.")

    quantize: str = Field(default="auto", description="none, nf4, int8, int4, int8-bnb, or auto by device.")
    dtype: str = Field(default="auto", description="float32, bfloat16, float16, or auto by device.")
    device: str = Field(default="auto", description="cpu, cuda, or auto.")
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="Kernels for the CPU, compiled at the first start; auto: where there is a compiler."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of the base; none leaves torch's own.")
    max_length: int | None = Field(default=None, ge=1, description="Lowers the base's context.")

    max_rows: int = Field(default=32, ge=1, description="Rows that run at once.")
    max_queue: int = Field(default=256, ge=1, description="Rows that may wait; one more is refused.")
    step_tokens: int = Field(default=512, ge=16, description="Tokens of one step; longer prompts go in chunks.")

    kv_bytes: int = Field(default=1024 * MEBIBYTE, ge=MEBIBYTE, description="Budget of the key/value cache.")
    prefix_cache: bool = Field(default=True, description="Rows with equal beginnings share keys and values.")
    host_bytes: int = Field(default=2048 * MEBIBYTE, ge=64 * KIBIBYTE, description="Budget of adapters in host memory.")
    device_bytes: int = Field(
        default=1024 * MEBIBYTE, ge=64 * KIBIBYTE, description="Budget of adapters on the device."
    )
    load_threads: int = Field(default=2, ge=1, description="Adapters that load at once.")

    require_signature: bool = Field(default=False, description="Load only versions that a trusted key signed.")
    trusted_keys: tuple[str, ...] = Field(default=(), description="Files of the public keys that are trusted.")

    drain_seconds: float = Field(default=30.0, ge=0, description="How long running rows may finish at a stop.")

    @model_validator(mode="after")
    def _trust_is_whole(self) -> Self:
        if self.require_signature and not self.trusted_keys:
            raise ValueError("require_signature needs a trusted key: name the file of a public key")
        if self.trusted_keys and not self.require_signature:
            raise ValueError("trusted keys change nothing without require_signature: set it, too")
        return self
