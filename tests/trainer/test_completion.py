"""The loss mask: exactly the completion and its end token, after exactly the ids the server sends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapterbay.base.text import encode_conversation, encode_text, load_tokenizer
from adapterbay.registry.errors import InvalidArgument
from adapterbay.trainer.batches import IGNORED, PadRight, padding_id_for_classes
from adapterbay.trainer.data import CleaningReport, Conversation, PromptCompletion
from adapterbay.trainer.tasks.causal_lm import CausalLanguageModelling
from adapterbay.trainer.tasks.completion import encode_messages, encode_pair

from .tiny_bases import CHAT_TEMPLATE, byte_tokenizer


def learned_text(tokenizer: object, learned: object) -> str:
    ids = [label for label in learned.labels if label != IGNORED]  # type: ignore[attr-defined]
    text: str = tokenizer.decode(ids)  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize(
    "completion", ["a warm film .", "\nstarts with a break", "ends with a break\n", "<|im_end|> inside"]
)
def test_pair_with_chat_template(chat_base: Path, completion: str) -> None:
    tokenizer = load_tokenizer(chat_base)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    end = frozenset({tokenizer.eos_token_id})
    learned = encode_pair(tokenizer, PromptCompletion("Write a review.", completion), end)
    prompt = encode_conversation(
        tokenizer, [{"role": "user", "content": "Write a review."}], add_generation_prompt=True
    )
    assert learned.input_ids[: len(prompt)] == prompt
    assert learned.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert learned.labels[len(prompt) :] == learned.input_ids[len(prompt) :]
    assert learned_text(tokenizer, learned) == completion + "<|im_end|>"


def test_pair_without_chat_template(gpt2_base: Path) -> None:
    tokenizer = load_tokenizer(gpt2_base)
    learned = encode_pair(tokenizer, PromptCompletion("A good film:", " warm ."), frozenset({tokenizer.eos_token_id}))
    prompt = encode_text(tokenizer, "A good film:")
    assert learned.input_ids[: len(prompt)] == prompt
    assert learned_text(tokenizer, learned) == " warm .<|endoftext|>"


def test_every_assistant_turn_is_learned(chat_base: Path) -> None:
    tokenizer = load_tokenizer(chat_base)
    end = frozenset({tokenizer.eos_token_id})
    turns = (("system", "be brief"), ("user", "hi"), ("assistant", "yo"), ("user", "more"), ("assistant", "no"))
    learned = encode_messages(tokenizer, Conversation((*turns, ("user", "ignored"))), end)
    assert learned_text(tokenizer, learned) == "yo<|im_end|>no<|im_end|>"
    assert learned.labels[-1] == tokenizer.eos_token_id
    history = [{"role": role, "content": content} for role, content in turns[:4]]
    second = encode_conversation(tokenizer, history, add_generation_prompt=True)
    assert learned.input_ids[: len(second)] == second


def test_a_template_that_leaves_turns_open_gets_the_end_token() -> None:
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "")
    learned = encode_pair(tokenizer, PromptCompletion("q", "a"), frozenset({tokenizer.eos_token_id}))
    assert learned.labels[-1] == tokenizer.eos_token_id


def test_a_template_that_rewrites_the_beginning_is_refused() -> None:
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages | length }} turns:" + CHAT_TEMPLATE
    with pytest.raises(InvalidArgument, match="training cannot match serving"):
        encode_pair(tokenizer, PromptCompletion("q", "a"), frozenset({tokenizer.eos_token_id}))


def test_cut_completions_are_dropped_and_counted(gpt2_base: Path) -> None:
    tokenizer = load_tokenizer(gpt2_base)
    task = CausalLanguageModelling(tokenizer, 12, frozenset({tokenizer.eos_token_id}))
    report = CleaningReport()
    rows = [PromptCompletion("x" * 40, "cut"), PromptCompletion("q:", "y" * 40), PromptCompletion("q:", "short")]
    encoded = task.encode(rows, report)
    assert (report.completion_cut, report.truncated, encoded.rows) == (1, 1, tuple(rows[1:]))
    assert len(encoded.examples[0]["input_ids"]) == 12
    assert encoded.examples[0]["labels"][-1] != tokenizer.eos_token_id
    with pytest.raises(InvalidArgument, match="max_length 12 cuts off the completion of all 1 rows"):
        task.encode(rows[:1], report)


def test_padding_is_masked_by_position_not_by_id() -> None:
    batch = PadRight(2)([{"input_ids": [5, 6, 2], "labels": [IGNORED, 6, 2]}, {"input_ids": [7], "labels": [7]}])
    assert batch["labels"].tolist() == [[IGNORED, 6, 2], [7, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    classes = PadRight(0)([{"input_ids": [5], "labels": 1}, {"input_ids": [6, 7], "labels": 0}])
    assert torch.equal(classes["labels"], torch.tensor([1, 0]))


def test_padding_id_is_never_the_last_token_of_a_row() -> None:
    rows = [{"input_ids": [4, 2], "labels": 0}, {"input_ids": [2, 0], "labels": 0}]
    assert padding_id_for_classes(rows, 3, 10) == 3
    assert padding_id_for_classes(rows, 2, 10) == 1
    assert padding_id_for_classes(rows, None, 10) == 1
    with pytest.raises(InvalidArgument, match="no padding token is left"):
        padding_id_for_classes(rows, 2, 1)
