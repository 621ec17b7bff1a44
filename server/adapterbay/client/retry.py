"""When to try again: on UNAVAILABLE only, with exponential backoff and full jitter, never past the deadline."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

import grpc

from adapterbay.client.errors import RequestError, ServerError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `max_attempts` tries; before try n+1 a random wait of up to initial · multiplier^(n-1) seconds."""

    max_attempts: int = 5
    initial_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 2.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be at least 1.")
        if min(self.initial_backoff_seconds, self.max_backoff_seconds) < 0 or self.multiplier < 1:
            raise ValueError("Backoffs must not be negative, and the multiplier must be at least 1.")

    def wait_seconds(self, error: ServerError, attempt: int, remaining: float | None) -> float | None:
        """How long to wait after the failed try number `attempt` (from 1), or None to give up.

        `remaining` is what is left of the deadline; a wait that would outlast it is not worth waiting for.
        """
        if error.code is not grpc.StatusCode.UNAVAILABLE or attempt >= self.max_attempts:
            return None
        ceiling = min(self.max_backoff_seconds, self.initial_backoff_seconds * self.multiplier ** (attempt - 1))
        wait = random.uniform(0, ceiling)
        return None if remaining is not None and wait >= remaining else wait


FOR_EVER_SECONDS = 1e8
"""A timeout of three years is none; gRPC counts the time that is left in nanoseconds."""


class Deadline:
    """A timeout that counts over all tries of a call. Raises RequestError if it is no number."""

    def __init__(self, timeout: float | None, default: float | None) -> None:
        chosen = default if timeout is None else timeout
        if chosen is not None and math.isnan(chosen):
            raise RequestError("timeout is nan; give seconds, or math.inf for none.")
        unlimited = chosen is None or chosen > FOR_EVER_SECONDS
        self._at = None if unlimited or chosen is None else time.monotonic() + chosen

    def remaining(self) -> float | None:
        """Seconds left, not below zero; None without a deadline."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())
