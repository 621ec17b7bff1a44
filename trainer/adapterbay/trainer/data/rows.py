"""The three forms a row can take once its columns are understood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Labelled:
    """A text and the index of its class in the head's outputs."""

    text: str
    label: int

    @property
    def key(self) -> str:
        """What makes two rows the same row: the text, ignoring case and spacing."""
        return normalised(self.text)

    def canonical(self) -> Any:
        """The row as it goes into the data digest."""
        return {"text": self.text, "label": self.label}


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and what is to follow it."""

    prompt: str
    completion: str

    @property
    def key(self) -> str:
        """What makes two rows the same row: both texts, ignoring case and spacing."""
        return normalised(self.prompt) + "\x00" + normalised(self.completion)

    def canonical(self) -> Any:
        """The row as it goes into the data digest."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Conversation:
    """Turns of (role, content); every assistant turn is learned."""

    messages: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """What makes two rows the same row: all turns, ignoring case and spacing."""
        return "\x00".join(f"{role}\x01{normalised(content)}" for role, content in self.messages)

    def canonical(self) -> Any:
        """The row as it goes into the data digest."""
        return {"messages": [{"role": role, "content": content} for role, content in self.messages]}


Row = Labelled | PromptCompletion | Conversation


def normalised(text: str) -> str:
    """Case and spacing removed, for comparing only."""
    return " ".join(text.casefold().split())
