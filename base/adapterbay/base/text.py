"""Text to token ids, the same in training and in serving.

Trained and served prompts must be byte-equal, or accuracy is lost without an error, so both sides call these
functions and nobody else builds a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterbay.registry.errors import InvalidArgument, UnsupportedMethod

Tokenizer = Any  # transformers.PreTrainedTokenizerBase; transformers ships no usable types


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a base folder. No code of the folder is run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def encode_text(tokenizer: Tokenizer, text: str, *, max_length: int | None = None) -> list[int]:
    """Ids of a text to label, embed or continue: the tokenizer's own special tokens, no template.

    With `max_length` (tokens) the text is cut at its end; the special tokens around it stay.
    """
    cut = {"truncation": False} if max_length is None else {"truncation": True, "max_length": max_length}
    return list(tokenizer(text, add_special_tokens=True, verbose=False, **cut)["input_ids"])


def encode_spans(
    tokenizer: Tokenizer, text: str, *, max_length: int | None = None
) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Like `encode_text`, with the place [begin, end) of each token in the text, None for a special token.

    Places are counted in code points. Raises UnsupportedMethod for a tokenizer that does not know them.
    """
    if not tokenizer.is_fast:
        raise UnsupportedMethod("This base's tokenizer does not tell where its tokens lie in a text.")
    cut = {"truncation": False} if max_length is None else {"truncation": True, "max_length": max_length}
    encoded = tokenizer(
        text,
        add_special_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
        **cut,
    )
    places = [
        None if special else (int(begin), int(end))
        for (begin, end), special in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    ]
    return list(encoded["input_ids"]), places


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that follows ids already there, such as a completion after its prompt: no special tokens added."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def render_conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> str:
    """The conversation as text, by the base's chat template.

    Raises InvalidArgument if the base has no chat template or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise InvalidArgument(
            "This base has no chat template; send a raw `prompt` instead of a conversation.", field="conversation"
        )
    try:
        rendered: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        raise InvalidArgument(
            f"The base's chat template refuses this conversation: {error}", field="conversation.messages"
        ) from error
    return rendered


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> list[int]:
    """Ids of a rendered conversation. The template writes its own special tokens, so none are added."""
    rendered = render_conversation(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
