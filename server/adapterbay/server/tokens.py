"""Tokens to text as they come: whole characters only, stop strings never shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders print for bytes that are not a whole character yet."""


class StreamDecoder:
    """Decodes a growing token sequence. The pieces joined are the text of the whole.

    Tokens are decoded in a window that begins a few tokens back, because many tokenizers write a token's leading space
    only after another token; this is the way of text-generation-inference and vLLM.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        context = list(prompt_ids[-6:])
        self._ids = context
        self._prefix = 0
        self._read = len(context)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        before, after = self._decode(self._ids[self._prefix : self._read]), self._decode(self._ids[self._prefix :])
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """What is left at the end, unfinished bytes included."""
        before, after = self._decode(self._ids[self._prefix : self._read]), self._decode(self._ids[self._prefix :])
        self._prefix = self._read = len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopWatch:
    """Holds back text that may become a stop string, and ends at the first one that does."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """The text that can be shown now. After a hit, `hit` names the stop string and nothing more is shown."""
        if not self._stops:
            return text
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.hit = min(found, key=lambda item: (item[0], -len(item[1])))
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, at the end without a hit."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that begins `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
