"""When to try again: on UNAVAILABLE only, with exponential backoff and full jitter, never past the deadline."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import grpc

from adapterbay.client.errors import RequestError, ServerError
from adapterbay.client.making import is_finite, is_number, shown


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `max_attempts` tries; before try n+1 a random wait of up to initial · multiplier^(n-1) seconds."""

    max_attempts: int = 5
    initial_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 2.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int):
            raise TypeError(f"max_attempts takes a whole number, not {shown(self.max_attempts)}.")
        for name in ("initial_backoff_seconds", "max_backoff_seconds", "multiplier"):
            value = getattr(self, name)
            if not is_number(value):
                raise TypeError(f"{name} takes a number, not {shown(value)}.")
            if not is_finite(value):
                raise ValueError(f"{name} is {shown(value)}; it must be a finite number.")
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
        try:
            ceiling = min(self.max_backoff_seconds, self.initial_backoff_seconds * self.multiplier ** (attempt - 1))
        except OverflowError:  # 2.0 ** 1024
            ceiling = self.max_backoff_seconds
        wait = random.uniform(0, ceiling)
        return None if remaining is not None and wait >= remaining else wait


FOR_EVER_SECONDS = 1e8
"""A timeout of three years is none; gRPC counts the time that is left in nanoseconds."""


def checked_timeout(timeout: float | None) -> float | None:
    """Seconds from 0, or None. Raises TypeError for what is no number, RequestError for nan and what is below 0."""
    if timeout is None:
        return None
    if not is_number(timeout):
        raise TypeError(f"timeout takes seconds as a number, not {shown(timeout)}.")
    if not timeout >= 0:
        raise RequestError(f"timeout is {shown(timeout)}; give seconds, or math.inf for none.")
    return timeout


def checked_policy(retry: RetryPolicy | None) -> RetryPolicy:
    """The policy given, or the default one. Raises TypeError for anything else."""
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise TypeError(f"retry takes a RetryPolicy, not {shown(retry)}; RetryPolicy(max_attempts=1) never retries.")
    return RetryPolicy() if retry is None else retry


class Deadline:
    """A timeout that counts over all tries of a call. Raises as `checked_timeout` does; `default` was checked."""

    def __init__(self, timeout: float | None, default: float | None) -> None:
        chosen = default if timeout is None else checked_timeout(timeout)
        unlimited = chosen is None or chosen > FOR_EVER_SECONDS
        self._at = None if unlimited or chosen is None else time.monotonic() + chosen

    def remaining(self) -> float | None:
        """Seconds left, not below zero; None without a deadline."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())
