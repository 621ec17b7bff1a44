"""Wrong arguments of each method of both clients: named with their place, before anything is sent."""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pandas as pd
import pytest

from adapterbay.client import (
    AsyncClient,
    Client,
    Fusion,
    RequestError,
    RetryPolicy,
    Selection,
    UnavailableError,
    WeightedAdapter,
)
from adapterbay.client.channel import checked
from adapterbay.client.requests import classify, compare_classify, compare_generate, conversation, embed, generate
from adapterbay.client.retry import Deadline

NOBODY = "127.0.0.1:1"
HUGE = 10**400
HUGER = 10**5000  # Python does not print it
ONE = {"adapter": "a"}


def said(content: object, role: object = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


Call = tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]

WRONG_TEXTS: dict[str, tuple[Any, str]] = {
    "None": (None, "takes a sequence of strings, not None."),
    "a number": (3, "takes a sequence of strings, not 3."),
    "one text": ("one", "takes a sequence of strings, not one string."),
    "bytes": (b"one", "takes a sequence of strings, not b'one'."),
    "a set": ({"one"}, "takes a sequence of strings, not a set, which has no order; give a list."),
    "a frozen set": (frozenset({"one"}), "which has no order"),
    "a mapping": ({"one": 1}, "takes a sequence of strings, not a mapping, {'one': 1}; give a list."),
    "a table": (pd.DataFrame({"text": ["one"]}), "takes a sequence of strings, not a table; give one of its columns."),
    "an array of nothing": (np.array("one"), "takes a sequence of strings, not array('one'"),
    "None in it": (["one", None], "[1] takes text, not None."),
    "bytes in it": (["one", "two", b"three"], "[2] takes text, not b'three'."),
    "lists in it": ([["one"]], "[0] takes text, not ['one']."),
    "numbers from a generator": (range(2), "[0] takes text, not 0."),
}
TAKES_TEXTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "classify": ((), ONE),
    "classify_tokens": ((), ONE),
    "embed": ((), ONE),
    "compare_classify": ((["a", "b"],), {}),
}
CALLS: dict[str, Call] = {
    "a message's content": ("generate", (), {"messages": [said("a"), said(None)], **ONE}, TypeError, "messages[1].con"),
    "a message's role": ("generate_stream", (), {"messages": [said("a", 3)], **ONE}, TypeError, "messages[0].role tak"),
    "a message's bytes": ("generate", (), {"messages": [said(b"a")], **ONE}, TypeError, "content takes text, not b'a'"),
    "a message's UTF-8": (
        "generate",
        (),
        {"messages": [said("\udcff")], **ONE},
        RequestError,
        "messages[0].content ho",
    ),
    "no message": ("generate", (), {"messages": [said("a"), None], **ONE}, RequestError, "messages[1] must have"),
    "no messages": ("generate", (), {"messages": 3, **ONE}, TypeError, "messages takes a sequence of {'role'"),
    "messages in a set": ("generate", (), {"messages": {1}, **ONE}, TypeError, "messages takes a sequence of"),
    "a prompt of bytes": ("generate", (b"a",), ONE, TypeError, "prompt takes text, not b'a'."),
    "an adapter of bytes": ("generate", ("a",), {"adapter": b"a"}, TypeError, "adapter takes text, not b'a'."),
    "a temperature of True": (
        "generate",
        ("a",),
        {"temperature": True, **ONE},
        TypeError,
        "temperature takes a number",
    ),
    "a huge temperature": ("generate", ("a",), {"top_p": HUGER, **ONE}, RequestError, "top_p is a very large int"),
    "ignore_end of 2": ("generate", ("a",), {"ignore_end": 2, **ONE}, TypeError, "ignore_end takes True or False, not"),
    "stop": ("generate", ("a",), {"stop": ["a", b"b"], **ONE}, TypeError, "stop[1] takes text, not b'b'."),
    "log_probabilities": (
        "generate",
        ("a",),
        {"log_probabilities": -1, **ONE},
        RequestError,
        "log_probabilities is -1;",
    ),
    "base": ("generate", ("a",), {"base": "no"}, TypeError, "base takes True or False, not 'no'."),
    "base of 1": ("generate", ("a",), {"base": 1}, TypeError, "base takes True or False, not 1."),
    "a fusion's weight": (
        "generate",
        ("a",),
        {"fusion": {"a": "1"}},
        TypeError,
        "The weight of 'a' is '1'; it must be",
    ),
    "a fusion's name": ("generate", ("a",), {"fusion": {3: 1.0}}, TypeError, "fusion's adapter takes text, not 3."),
    "a fusion of nothing": ("generate", ("a",), {"fusion": {}}, RequestError, "The fusion has no adapters"),
    "truncate": ("classify", (["a"],), {"truncate": None, **ONE}, TypeError, "truncate takes True or False, not None."),
    "scores": ("classify_tokens", (["a"],), {"scores": 2, **ONE}, TypeError, "scores takes True or False, not 2."),
    "pooling in a list": ("embed", (["a"],), {"pooling": ["x"], **ONE}, TypeError, "pooling takes one of mean, first"),
    "pooling": (
        "embed",
        (["a"],),
        {"pooling": "x", **ONE},
        RequestError,
        "pooling is 'x'; it must be one of mean, fir",
    ),
    "normalize": ("embed", (["a"],), {"normalize": "no", **ONE}, TypeError, "normalize takes True or False, not 'no'."),
    "an arm": ("compare_classify", (["a", 3], ["a"]), {}, TypeError, "arms[1] takes a Selection or its text, not 3."),
    "an arm's text": ("compare_classify", (["a", "b:x"], ["a"]), {}, RequestError, "arms[1]: The weight 'x' in 'b:x'"),
    "an arm's UTF-8": ("compare_classify", (["a", "\udcff"], ["a"]), {}, RequestError, "arms[1].adapter holds charac"),
    "arms": ("compare_classify", (None, ["a"]), {}, TypeError, "arms takes a sequence of strings, not None."),
    "arms in a set": (
        "compare_generate",
        ({"a", "b"}, ["a"]),
        {},
        TypeError,
        "arms takes a sequence of strings, not a ",
    ),
    "a text's UTF-8": ("compare_classify", (["a", "b"], ["a", "\udcff"]), {}, RequestError, "texts[1] holds charact"),
    "compare's truncate": ("compare_classify", (["a", "b"], ["a"]), {"truncate": 2}, TypeError, "truncate takes True "),
    "inputs": ("compare_generate", (["a", "b"], None), {}, TypeError, "inputs takes a sequence of prompts, not None."),
    "inputs in a set": (
        "compare_generate",
        (["a", "b"], {"a"}),
        {},
        TypeError,
        "inputs takes a sequence of prompts, not",
    ),
    "an input": (
        "compare_generate",
        (["a", "b"], ["a", 3]),
        {},
        TypeError,
        "inputs[1] takes a prompt, or a sequence of",
    ),
    "an input of bytes": (
        "compare_generate",
        (["a", "b"], [b"a"]),
        {},
        TypeError,
        "inputs[0] takes a prompt, or a seq",
    ),
    "an input's UTF-8": ("compare_generate", (["a", "b"], ["\udcff"]), {}, RequestError, "inputs[0] holds characters"),
    "an input's message": ("compare_generate", (["a", "b"], [[said(3)]]), {}, TypeError, "inputs[0][0].content takes"),
    "one message": ("compare_generate", (["a", "b"], [said("a")]), {}, TypeError, "inputs[0] takes a prompt, or a seq"),
    "get": ("get_adapter", (None,), {}, TypeError, "adapter takes text, not None."),
    "load": ("load_adapter", (b"a",), {}, TypeError, "adapter takes text, not b'a'."),
    "unload": ("unload_adapter", (["a"],), {}, TypeError, "adapter takes text, not ['a']."),
    "pin to None": ("pin_adapter", ("a", None), {}, TypeError, "pinned takes True or False, not None."),
    "a prefix": ("list_adapters", (None,), {}, TypeError, "name_prefix takes text, not None."),
    "a page's size": ("list_adapters", (), {"page_size": True}, TypeError, "page_size takes a whole number, not True."),
    "resident_only": (
        "list_adapters",
        (),
        {"resident_only": 2},
        TypeError,
        "resident_only takes True or False, not 2.",
    ),
    "what is watched": ("watch_adapters", (3,), {}, TypeError, "name_prefix takes text, not 3."),
    "a timeout of text": (
        "generate",
        ("a",),
        {"timeout": "1", **ONE},
        TypeError,
        "timeout takes seconds as a number, no",
    ),
    "a timeout of True": (
        "generate_stream",
        ("a",),
        {"timeout": True, **ONE},
        TypeError,
        "timeout takes seconds as a n",
    ),
    "a negative timeout": ("list_adapters", (), {"timeout": -1}, RequestError, "timeout is -1; give seconds"),
} | {
    f"{method}: {what}": (method, (*args, texts), options, TypeError, f"texts{words}" if words[0] == "[" else words)
    for method, (args, options) in TAKES_TEXTS.items()
    for what, (texts, words) in WRONG_TEXTS.items()
}


@pytest.fixture(scope="module")
def unserved() -> Iterator[Client]:
    with Client(NOBODY, timeout=5, retry=RetryPolicy(max_attempts=1)) as client:
        yield client


@pytest.mark.parametrize(("method", "args", "options", "kind", "words"), CALLS.values(), ids=CALLS)
def test_both_clients_name_it_and_send_nothing(
    unserved: Client, method: str, args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    """Nobody listens: had a call been made, the error would be UnavailableError."""

    def ask_plainly() -> None:
        answer = getattr(unserved, method)(*args, **options)
        next(answer)

    async def ask() -> None:
        async with AsyncClient(NOBODY, timeout=5, retry=RetryPolicy(max_attempts=1)) as client:
            answer = getattr(client, method)(*args, **options)
            await (answer if inspect.isawaitable(answer) else anext(answer))

    with pytest.raises(kind, match=re.escape(words)):
        ask_plainly()
    with pytest.raises(kind, match=re.escape(words)):
        asyncio.run(ask())


WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "conversation": (lambda: conversation(3), TypeError, "messages takes a sequence of"),
    "names": (lambda: Fusion(("a", "b")), TypeError, "adapters[0] takes a WeightedAdapter(REFERENCE, weight), not 'a'"),
    "a text": (lambda: Fusion("a:1"), TypeError, "Fusion.of reads 'a:1'."),
    "a mapping": (lambda: Fusion({"a": 1}), TypeError, "Fusion.of reads {'a': 1}."),
    "one": (lambda: Fusion(WeightedAdapter("a")), TypeError, "adapters takes a sequence of WeightedAdapter, not Wei"),
    "none": (lambda: Fusion(()), RequestError, "has no adapters; give at least one"),
    "weight of True": (
        lambda: WeightedAdapter("a", True),
        TypeError,
        "The weight of 'a' is True; it must be a number.",
    ),
    "weight of nan": (
        lambda: WeightedAdapter("a", math.nan),
        RequestError,
        "The weight of 'a' is nan; it must be a fin",
    ),
    "weight of inf": (lambda: Fusion.parse("a:inf"), RequestError, "The weight of 'a' is inf; it must be a finite"),
    "a huge weight": (lambda: WeightedAdapter("a", HUGE), RequestError, "must be a finite number"),
    "layers in a list": (
        lambda: WeightedAdapter("a", 1.0, ["1"]),
        TypeError,
        "layer_weights of 'a' takes {'LAYERS': w",
    ),
    "layers by number": (lambda: WeightedAdapter("a", 1.0, {3: 1.0}), TypeError, "names layers by text, not 3."),
    "a layer's text": (lambda: WeightedAdapter("a", 1.0, {"x": "1"}), TypeError, "The weight of 'a' at 'x' is '1'; it"),
    "a layer's nan": (lambda: WeightedAdapter("a", 1.0, {"x": math.nan}), RequestError, "'a' at 'x' is nan"),
    "density": (lambda: Fusion((WeightedAdapter("a"),), density=True).message(), TypeError, "density takes a number"),
    "an arm's fusion": (lambda: Selection.of(Fusion.of({"a": 1})), TypeError, "is a Selection or its text"),
    "no text": (lambda: Fusion.parse(None), TypeError, "A fusion's text is REFERENCE:WEIGHT"),
    "no term": (lambda: WeightedAdapter.parse(3), TypeError, "text is REFERENCE:WEIGHT, not 3."),
    "timeout": (lambda: Client(NOBODY, timeout="1"), TypeError, "timeout takes seconds as a number, not '1'."),
    "timeout, asyncio": (lambda: AsyncClient(NOBODY, timeout=-1), RequestError, "timeout is -1; give seconds"),
    "minus for ever": (lambda: Deadline(-HUGER, None), RequestError, "timeout is a very large int"),
    "no retry": (lambda: Client(NOBODY, retry=False), TypeError, "RetryPolicy(max_attempts=1) never retries."),
    "credentials": (lambda: AsyncClient(NOBODY, credentials="x"), TypeError, "credentials takes a grpc.ChannelCred"),
    "attempts": (lambda: RetryPolicy(max_attempts="3"), TypeError, "max_attempts takes a whole number, not '3'."),
    "multiplier": (lambda: RetryPolicy(multiplier=math.nan), ValueError, "multiplier is nan; it must be a finite"),
    "backoff": (
        lambda: RetryPolicy(max_backoff_seconds=True),
        TypeError,
        "max_backoff_seconds takes a number, not True",
    ),
}


@pytest.mark.parametrize(("wrong", "kind", "words"), WRONG.values(), ids=WRONG)
def test_what_is_made_before_a_call_names_it_too(
    wrong: Callable[[], object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        wrong()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("HTTP://host:1", "HTTP://host:1 is a URL; give HOST:PORT alone"),
        ("grpc://host:1", "is a URL"),
        ("host:1/", "has a path"),
        ("host:1/path", "has a path"),
        ("dns:///host:1/", "ends with a slash"),
        ("host", "'host' is not HOST:PORT"),
        ("host:http", "is not HOST:PORT"),
        ("host:0", "is not HOST:PORT"),
        ("host:65536", "is not HOST:PORT"),
        ("::1", "such as 127.0.0.1:50051 or [::1]:50051"),
        (" host:1", "holds a space"),
        ("my host:1", "holds a space"),
        ("unix:/run/a\tb", "holds a space or a control character"),
        ("host:1\n", "holds a space or a control character"),
        ("h\udcffst:1", "holds a space or a control character"),
    ],
)
def test_an_address_that_grpc_would_misread(address: str, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        checked(address)


@pytest.mark.parametrize(
    "address",
    [
        "host:1",
        "[::1]:50051",
        "dns:1",
        "dns:///host:1",
        "unix:/run/a",
        "unix:///run/a",
        "unix:/run/my dir/s.sock",
        "ipv4:1.2.3.4:5,1.2.3.5:5",
    ],
)
def test_addresses_of_grpcs_own_pass(address: str) -> None:
    assert checked(address) == address


def test_what_has_an_order_is_read_once() -> None:
    texts = ["one", "two", "three"]
    for given in (iter(texts), tuple(texts), dict.fromkeys(texts).keys(), np.array(texts), pd.Series(texts, [5, 1, 3])):
        assert list(classify(given, adapter="a").texts) == texts
    assert list(embed((text for text in texts), adapter="a").texts) == texts
    assert [entry.text for entry in compare_classify(iter(["a", "b"]), iter(texts)).inputs] == texts
    both = compare_generate(["a", "b"], iter(["one", iter([said("two")])]))
    assert both.inputs[0].text == "one"
    assert both.inputs[1].conversation.messages[0].content == "two"
    assert list(generate("a", adapter="a", stop=iter(texts)).sampling.stop) == texts
    assert Fusion([WeightedAdapter("a")]).adapters == (WeightedAdapter("a"),)


def test_what_numpy_counts_and_none_stay_good() -> None:
    request = generate(
        "a", base=True, max_tokens=np.int64(3), temperature=np.float32(0.5), ignore_end=np.True_, stop=None, seed=None
    )
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.ignore_end) == (3, 0.5, True)
    assert not request.sampling.HasField("seed")
    assert not request.sampling.HasField("top_p"), "the server's own default"
    assert generate("", adapter="a").HasField("prompt")


def test_a_timeout_that_no_float_holds_is_none() -> None:
    assert Deadline(HUGE, 1.0).remaining() is None
    assert Deadline(0, 1.0).remaining() == 0.0


def test_the_thousandth_wait_is_the_longest_one() -> None:
    gone = UnavailableError(grpc.StatusCode.UNAVAILABLE, "", "gone", {})
    wait = RetryPolicy(max_attempts=5000, max_backoff_seconds=0.5).wait_seconds(gone, 2000, None)
    assert wait is not None, "2.0 ** 1999 is no float"
    assert 0 <= wait <= 0.5
