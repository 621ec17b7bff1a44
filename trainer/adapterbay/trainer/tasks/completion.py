"""Which tokens of a prompt and its completion are learned.

The ids before a completion are exactly those the server feeds the model at that point: `encode_conversation(…,
add_generation_prompt=True)`, or the raw prompt where the base has no chat template. Labels are set by position, never
by token id, so an end token that is also the padding token is learned (trl issue 1623).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterbay.base.text import Tokenizer, encode_continuation, encode_conversation, encode_text, render_conversation
from adapterbay.registry.errors import InvalidArgument
from adapterbay.trainer.batches import IGNORED
from adapterbay.trainer.data import Conversation, PromptCompletion


@dataclass(frozen=True)
class Learned:
    """`labels[i]` is `input_ids[i]` where that token is learned, else IGNORED; both have one length."""

    input_ids: list[int]
    labels: list[int]


def encode_pair(tokenizer: Tokenizer, row: PromptCompletion, end_ids: frozenset[int]) -> Learned:
    """A prompt and its completion: as a conversation of two turns where the base has a chat template."""
    if tokenizer.chat_template:
        turns = (("user", row.prompt), ("assistant", row.completion))
        return encode_messages(tokenizer, Conversation(turns), end_ids)
    prompt = encode_text(tokenizer, row.prompt)
    completion = encode_continuation(tokenizer, row.completion)
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    return Learned(prompt + completion, [IGNORED] * len(prompt) + completion)


def encode_messages(tokenizer: Tokenizer, row: Conversation, end_ids: frozenset[int]) -> Learned:
    """A conversation; every assistant turn is learned, with the end token that closes it.

    What follows the last assistant turn is left out. Raises InvalidArgument where the template writes a conversation
    in another way than it wrote its beginning, since then no training can match what the server will send.
    """
    messages = [{"role": role, "content": content} for role, content in row.messages]
    input_ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_conversation(tokenizer, messages[:index], add_generation_prompt=True)
        if prompt[: len(input_ids)] != input_ids:
            raise _broken_template()
        labels += [IGNORED] * (len(prompt) - len(labels))
        turn = _turn(tokenizer, messages[: index + 1], prompt)
        learned, closing = _split_at_end(turn, end_ids)
        last = all(later["role"] != "assistant" for later in messages[index + 1 :])
        if last and not (set(learned[-1:]) & end_ids) and tokenizer.eos_token_id is not None:
            # A template that does not close the turn: the server stops at the end token, so it must be learned.
            learned, closing = [*learned, tokenizer.eos_token_id], []
        input_ids = prompt + learned + ([] if last else closing)
        labels += learned + ([] if last else [IGNORED] * len(closing))
    return Learned(input_ids, labels)


def _turn(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], prompt: list[int]) -> list[int]:
    """The ids of the last message of `messages`, which follow the ids `prompt`."""
    whole = encode_conversation(tokenizer, messages, add_generation_prompt=False)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    # The tokenizer joined the end of the prompt with the beginning of the answer. The server never sees that, because
    # the prompt comes alone; so the answer is tokenized alone too.
    before = render_conversation(tokenizer, messages[:-1], add_generation_prompt=True)
    text = render_conversation(tokenizer, messages, add_generation_prompt=False)
    if not text.startswith(before):
        raise _broken_template()
    return encode_continuation(tokenizer, text.removeprefix(before))


def _split_at_end(turn: list[int], end_ids: frozenset[int]) -> tuple[list[int], list[int]]:
    """A turn up to its last end token, and what the template writes behind it (often a line break)."""
    for position in range(len(turn) - 1, -1, -1):
        if turn[position] in end_ids:
            return turn[: position + 1], turn[position + 1 :]
    return turn, []


def _broken_template() -> InvalidArgument:
    return InvalidArgument(
        "The base's chat template does not keep the beginning of a conversation as it was when an assistant turn is "
        "added, so training cannot match serving. Use another base, or train on a raw prompt with a base that has no "
        "template.",
        field="base",
    )
