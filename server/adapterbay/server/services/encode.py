"""Text to token ids for requests, with the base's length held. Knows nothing of gRPC or the engine."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from adapterbay.base.text import Tokenizer, encode_conversation, encode_spans, encode_text
from adapterbay.registry.errors import InvalidArgument

DEFAULT_MAX_TOKENS = 256
LONGEST_TOKEN = 256
"""Characters. No vocabulary in use has longer tokens, so a text beyond this for each token need not be tokenized."""

SHORT = 1_000
"""Characters. What is not longer is tokenized in half a millisecond, which a turn on another thread takes, too."""
TEMPLATE = 50
"""Characters that a chat template puts around a message, about."""

Span = tuple[int, int]
"""Where a token lies in a text, [begin, end) in code points."""


class Encoder:
    """Encodes requests on any thread.

    It has its own copy of the tokenizer behind a lock: a fast tokenizer keeps its truncation setting as state, so
    two threads, or the engine decoding at the same time, must not share one.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, apart: bool = False) -> None:
        """`apart`: the base reads the prompt and writes the answer in contexts of their own (encoder-decoder)."""
        self._tokenizer = copy.deepcopy(tokenizer)
        self._max_length = max_length
        self._apart = apart
        self._lock = threading.RLock()

    @contextmanager
    def at_once(self, texts: Sequence[str]) -> Iterator[bool]:
        """Whether texts can be encoded together inside the block without keeping this thread waiting: they are few and
        short, and no other thread encodes meanwhile."""
        short = sum(len(text) + TEMPLATE for text in texts) <= SHORT
        free = short and self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()

    def prompt(self, prompt: str, field: str) -> tuple[int, ...]:
        """Ids of a raw prompt that leaves room for at least one token."""
        self._refuse_huge(prompt, field)
        with self._lock:
            ids = encode_text(self._tokenizer, prompt)
        return self._leaving_room(ids, field)

    def conversation(self, messages: Sequence[Mapping[str, str]], field: str) -> tuple[int, ...]:
        """Ids of a conversation with the generation prompt appended, leaving room for at least one token."""
        self._refuse_huge("".join(message["content"] for message in messages), field)
        try:
            with self._lock:
                ids = encode_conversation(self._tokenizer, messages, add_generation_prompt=True)
        except InvalidArgument as error:
            raise InvalidArgument(error.message, field=field, reason=error.reason) from error
        return self._leaving_room(ids, field)

    def text(self, text: str, *, limit: int, truncate: bool, field: str) -> tuple[tuple[int, ...], bool]:
        """Ids of a text to label or embed, and whether it was cut to `limit` tokens.

        A cut keeps the special tokens, as the tokenizer's own truncation in training does. Without `truncate` the
        base's length is the only limit.
        """
        if truncate:
            text = text[: (limit + 1) * LONGEST_TOKEN]
        self._refuse_huge(text, field)
        with self._lock:
            ids = encode_text(self._tokenizer, text)
            cut = truncate and len(ids) > limit
            if cut:
                ids = encode_text(self._tokenizer, text, max_length=limit)
        return self._fitting(ids, field), cut

    def spans(
        self, text: str, *, limit: int, truncate: bool, field: str
    ) -> tuple[tuple[int, ...], tuple[Span | None, ...], bool]:
        """Like `text`, with each token's place in the text; None for a special token."""
        if truncate:
            text = text[: (limit + 1) * LONGEST_TOKEN]
        self._refuse_huge(text, field)
        with self._lock:
            ids, places = encode_spans(self._tokenizer, text)
            cut = truncate and len(ids) > limit
            if cut:
                ids, places = encode_spans(self._tokenizer, text, max_length=limit)
        return self._fitting(ids, field), tuple(places), cut

    def new_tokens(self, prompt_tokens: int, asked: int | None, field: str) -> int:
        """How many tokens may be generated: what was asked for, or 256, or what the context leaves if that is less."""
        if self._apart and asked is not None and asked > self._max_length:
            raise InvalidArgument(
                f"{asked} tokens were asked for; the base generates at most {self._max_length}.", field=field
            )
        left = self._max_length - (0 if self._apart else prompt_tokens)
        if asked is None:
            return min(DEFAULT_MAX_TOKENS, left)
        if asked > left:
            raise InvalidArgument(
                f"The prompt has {prompt_tokens} tokens and {asked} more were asked for, the base takes "
                f"{self._max_length} in all; at most {left} can be generated.",
                field=field,
            )
        return asked

    def _refuse_huge(self, text: str, field: str) -> None:
        most = (self._max_length + 1) * LONGEST_TOKEN
        if len(text) > most:
            raise InvalidArgument(
                f"The text has {len(text):,} characters, far more than the {self._max_length:,} tokens that the base "
                "takes.",
                field=field,
            )

    def _fitting(self, ids: list[int], field: str) -> tuple[int, ...]:
        if not ids:
            raise InvalidArgument("The text has no tokens.", field=field)
        if len(ids) > self._max_length:
            raise InvalidArgument(
                f"The text has {len(ids)} tokens, the base takes {self._max_length}; shorten it or set `truncate`.",
                field=field,
            )
        return tuple(ids)

    def _leaving_room(self, ids: list[int], field: str) -> tuple[int, ...]:
        if not ids:
            raise InvalidArgument("The prompt has no tokens.", field=field)
        if self._apart:
            return self._fitting(ids, field)
        if len(ids) >= self._max_length:
            raise InvalidArgument(
                f"The prompt has {len(ids)} tokens, the base takes {self._max_length} with the completion.", field=field
            )
        return tuple(ids)
