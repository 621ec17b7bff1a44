"""Hostile documents: JSON that explodes, settings of the wrong type, labels and bases that are no names."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_tools import agrees_with_peft, checked, look, peak_bytes, refused
from registry_tools import Draft, Tiny

from adapterbay.registry import Registry
from adapterbay.registry.admission.documents import read_document
from adapterbay.registry.admission.peft_fields import LORA_FIELDS
from adapterbay.registry.base import BaseFiles
from adapterbay.registry.digest import MAX_JSON_DEPTH, canonical_json, parse_json
from adapterbay.registry.errors import (
    AdapterbayError,
    BaseNotFound,
    InvalidArgument,
    Rejected,
    UnsupportedMethod,
    shown,
)
from adapterbay.registry.manifest import Manifest

DraftOf = Callable[[Tiny], Draft]

JSON: dict[str, tuple[bytes, str]] = {
    "a byte order mark": (b"\xef\xbb\xbf{}", "BAD_JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "BAD_JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "BAD_JSON"),
    "an overlong slash": (b'{"a": "\xc0\xaf"}', "BAD_JSON"),
    "a surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "BAD_JSON"),
    "an escaped surrogate": (b'{"a": "\\ud800"}', "BAD_JSON"),
    "an escaped surrogate as a key": (b'{"\\udfff": 1}', "BAD_JSON"),
    "a control character": (b'{"a": "\n"}', "BAD_JSON"),
    "a key twice": (b'{"a": 1, "a": 1}', "BAD_JSON"),
    "a key twice, escaped": (b'{"a": 1, "\\u0061": 1}', "BAD_JSON"),
    "a long key twice": (b'{"' + b"a" * 10**6 + b'": 1, "' + b"a" * 10**6 + b'": 1}', "BAD_JSON"),
    "NaN": (b'{"a": NaN}', "BAD_JSON"),
    "Infinity": (b'{"a": -Infinity}', "BAD_JSON"),
    "1e999": (b'{"a": 1e999}', "BAD_JSON"),
    "5,000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "BAD_JSON"),
    "401 digits": (b'{"a": ' + b"1" * 401 + b"}", "BAD_JSON"),
    "a million digits": (b'{"a": ' + b"1" * 10**6 + b"}", "BAD_JSON"),
    "minus zero": (b'{"a": -0}', "BAD_JSON"),
    "101 deep": (b'{"a":' * 101 + b"1" + b"}" * 101, "BAD_JSON"),
    "500 deep": (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "BAD_JSON"),
    "a million deep": (b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "TOO_LARGE"),
    "never closed": (b'{"a":' + b"[" * 10**5, "BAD_JSON"),
    "a comment": (b'{"a": 1 /* hm */}', "BAD_JSON"),
    "a comma at the end": (b'{"a": 1,}', "BAD_JSON"),
    "two documents": (b"{}{}", "BAD_JSON"),
    "a NUL at the end": (b"{}\0", "BAD_JSON"),
    "nothing": (b"", "BAD_JSON"),
    "a list": (b"[]", "BAD_JSON"),
    "null": (b"null", "BAD_JSON"),
    "text": (b'"a"', "BAD_JSON"),
    "HTML": (b"<!doctype html>", "BAD_JSON"),
    "a list of millions": (b'{"a":[' + b"1," * 3_500_000 + b"1]}", "TOO_LARGE"),
    "lists of nothing": (b'{"a":[' + b"[]," * 2_700_000 + b"[]]}", "TOO_LARGE"),
    "objects of nothing": (b'{"a":[' + b"{}," * 2_700_000 + b"{}]}", "TOO_LARGE"),
    "more than 8 MiB": (b'{"a":"' + b"x" * 8 * 2**20 + b'"}', "TOO_LARGE"),
    "more than 8 MiB of nothing": (b"{" + b" " * 8 * 2**20 + b"}", "TOO_LARGE"),
}


@pytest.mark.parametrize(("data", "reason"), JSON.values(), ids=JSON.keys())
@pytest.mark.parametrize("name", ["adapter_config.json", "training.json", "adapterbay/manifest.json"])
def test_json(llama: Tiny, draft: DraftOf, registry: Registry, name: str, data: bytes, reason: str) -> None:
    bad = draft(llama)
    (bad.path / name).parent.mkdir(exist_ok=True)
    (bad.path / name).write_bytes(data)
    error = refused(reason, lambda: registry.push(bad.path, "x"))
    assert "manifest" in error.message or name in error.message
    assert not [path for path in registry.root.rglob("*/*") if path.is_file()]


@pytest.mark.parametrize(("data", "reason"), JSON.values(), ids=JSON.keys())
def test_json_takes_little_memory_and_time(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    began = time.process_time()
    peak = peak_bytes(lambda: refused(reason, lambda: read_document(path, "x.json")))
    assert peak < 6 * len(data) + 100_000
    assert time.process_time() - began < 5


def test_what_is_just_allowed_is_read_and_written(llama: Tiny) -> None:
    deep = b'{"a":' * (MAX_JSON_DEPTH - 1) + b"[]" + b"}" * (MAX_JSON_DEPTH - 1)
    for data in (
        deep,
        b'{"a": ' + b"1" * 400 + b"}",
        b'{"a": -0.0, "b": 1e-400}',
        '{"a": "\\ud83d\\ude00 语"}'.encode(),
    ):
        value = parse_json(data, "x")
        assert parse_json(canonical_json(value), "x") == value
    manifest = Manifest(
        files=(),
        peft_type="LORA",
        peft_config=json.loads(deep[5:-1]),
        base_reference="hub:a/b",
        base_fingerprint="sha256:" + "0" * 64,
        task="causal-lm",
        rank=1,
    )
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    10**300,
    "",
    "x",
    "\x1b[2J",
    "a" * 100_000,
    [],
    {},
    [[]],
    [None],
]
NASTY += [{"a": 1}, {"a": {"b": []}}, ["a", 1], [1.5], ["\u202e"], {"": None}, [True]]


@pytest.mark.parametrize("key", [*LORA_FIELDS, "unheard_of", ""])
def test_settings_of_any_type(llama: Tiny, base: BaseFiles, model: Any, draft: DraftOf, key: str) -> None:
    """Every setting with every value: refused with a reason, or what PEFT itself makes of it. Never a crash."""
    one = draft(llama)
    original = json.loads((llama.adapter / "adapter_config.json").read_text())
    for value in NASTY:
        changed = original | {key: value}
        (one.path / "adapter_config.json").write_text(json.dumps(changed))
        try:
            found = look(one.path, base=None if key == "base_model_name_or_path" else str(llama.base), task="causal-lm")
        except AdapterbayError as error:
            checked(error)
            continue
        assert found.manifest.peft_config == changed
        assert Manifest.from_bytes(found.manifest.to_bytes()) == found.manifest
        agrees_with_peft(model, one.path, base)


@pytest.mark.parametrize("value", NASTY, ids=lambda value: ascii(value)[:30])
def test_training_records_of_any_type(bert: Tiny, draft: DraftOf, value: Any) -> None:
    one = draft(bert)
    for key in ("base", "task", "labels", "chat_template_digest", "versions", "metrics", "settings"):
        for record in ({key: value}, {key: {"reference": value, "fingerprint": value, "peft": value}}):
            one.write_training(**record)
            try:
                found = look(one.path)
            except AdapterbayError as error:
                checked(error)
                continue
            assert found.manifest.training == record
            assert Manifest.from_bytes(found.manifest.to_bytes()) == found.manifest
            assert all(finding.isprintable() for finding in found.findings)


@pytest.mark.parametrize(
    "name",
    ["config.json", "trainer_state.json", "eval_results.json", "all_results.json", "tokenizer_config.json"],
)
@pytest.mark.parametrize("value", NASTY, ids=lambda value: ascii(value)[:30])
def test_files_beside_of_any_type(bert: Tiny, draft: DraftOf, name: str, value: Any) -> None:
    one = draft(bert)
    keys = ("id2label", "log_history", "global_step", "epoch", "eval_loss", "chat_template", "best_global_step", "x")
    for document in (value, dict.fromkeys(keys, value), {"log_history": [{"step": value, "eval_x": value}, value]}):
        (one.path / name).write_text(json.dumps(document))
        try:
            found = look(one.path)
        except AdapterbayError as error:
            checked(error)
            assert name == "config.json"
            continue
        assert Manifest.from_bytes(found.manifest.to_bytes()) == found.manifest
        assert all(finding.isprintable() for finding in found.findings)


@pytest.mark.parametrize(("data", "_"), JSON.values(), ids=JSON.keys())
@pytest.mark.parametrize("name", ["trainer_state.json", "eval_results.json", "tokenizer_config.json"])
def test_broken_files_beside_are_said_and_not_used(llama: Tiny, draft: DraftOf, name: str, data: bytes, _: str) -> None:
    """They are not stored and decide nothing, so they refuse nothing either."""
    one = draft(llama)
    (one.path / name).write_bytes(data)
    found = look(one.path)
    assert found.manifest == look(llama.adapter).manifest
    assert any("not read" in finding for finding in found.findings)


def test_a_broken_config_beside_is_refused_for_a_head(bert: Tiny, draft: DraftOf, registry: Registry) -> None:
    one = draft(bert)
    (one.path / "config.json").write_bytes(b"{")
    refused("BAD_JSON", lambda: registry.push(one.path, "x"))
    assert registry.push(one.path, "x", labels=["a", "b", "c"]).manifest.labels == ("a", "b", "c")


LABELS: dict[str, tuple[list[str], type[AdapterbayError]]] = {
    "empty": (["a", "", "c"], InvalidArgument),
    "blank": (["a", " \u3000", "c"], InvalidArgument),
    "twice": (["a", "b", "a"], InvalidArgument),
    "a newline": (["a", "b\nc", "d"], InvalidArgument),
    "a NUL": (["a", "b\0", "d"], InvalidArgument),
    "an escape": (["a", "\x1b[31mred", "d"], InvalidArgument),
    "an 8-bit escape": (["a", "\x9b31mred", "d"], InvalidArgument),
    "right to left override": (["a", "\u202egnp.exe", "d"], InvalidArgument),
    "an isolate": (["a", "\u2066x", "d"], InvalidArgument),
    "a line separator": (["a", "b\u2028c", "d"], InvalidArgument),
    "1,001 characters": (["a", "b" * 1001, "d"], InvalidArgument),
    "a megabyte": (["a", "b" * 10**6, "d"], InvalidArgument),
    "one too few": (["a", "b"], Rejected),
    "a thousand too many": (["a"] * 1003, Rejected),
}


@pytest.mark.parametrize(("labels", "error"), LABELS.values(), ids=LABELS.keys())
def test_labels(
    bert: Tiny, draft: DraftOf, registry: Registry, labels: list[str], error: type[AdapterbayError]
) -> None:
    trained, named = draft(bert), draft(bert)
    trained.write_training(labels=labels)
    (named.path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(labels))}))
    for push in (
        lambda: registry.push(trained.path, "x"),
        lambda: registry.push(named.path, "x"),
        lambda: registry.push(bert.adapter, "x", labels=labels),
    ):
        with pytest.raises(error) as caught:
            push()
        checked(caught.value)


def test_labels_of_all_languages_are_fine(bert: Tiny, registry: Registry) -> None:
    labels = ["لا\u200cبأس", "👩\u200d🔬 क्\u200dष", "très  bien"]
    manifest = registry.push(bert.adapter, "x", labels=labels).manifest
    assert manifest.labels == tuple(labels)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


BASES: dict[str, tuple[Any, type[AdapterbayError], str]] = {
    "null": (None, InvalidArgument, "pass --base"),
    "empty": ("", InvalidArgument, "pass --base"),
    "blank": ("  \n", InvalidArgument, "pass --base"),
    "a number": (5, Rejected, "text or null"),
    "a list": (["a"], Rejected, "text or null"),
    "traversal": ("../../../../etc", BaseNotFound, "pass --base"),
    "traversal to the passwords": ("../../../../etc/passwd", BaseNotFound, "pass --base"),
    "a device": ("/dev/zero", BaseNotFound, "pass --base"),
    "a process": ("/proc/self/root", BaseNotFound, "Pass --base|pass --base"),
    "NUL": ("a\0b", Rejected, "Pass --base"),
    "an escape": ("/x\x1b[2J", Rejected, "Pass --base"),
    "a newline": ("/x\ny", Rejected, "Pass --base"),
    "five thousand characters": ("x" * 5000, Rejected, "Pass --base"),
    "a long name": ("/" + "x" * 300, BaseNotFound, "pass --base"),
    "an address": ("https://example.org/model", BaseNotFound, "pass --base"),
    "a file address": ("file:///etc/passwd", BaseNotFound, "pass --base"),
    "an address of a machine": ("http://169.254.169.254/latest", BaseNotFound, "pass --base"),
    "a share": ("\\\\host\\share\\model", BaseNotFound, "pass --base"),
    "another user's home": ("~nobody-of-this-name/x", BaseNotFound, "pass --base"),
    "a package that is none": ("package:../../x", BaseNotFound, "pass --base"),
    "three parts": ("a/b/c", BaseNotFound, "pass --base"),
    "a cache path that leaves": ("/c/models--..--../snapshots/" + "1" * 40, BaseNotFound, "[Pp]ass --base"),
}


@pytest.mark.parametrize(("name", "error", "text"), BASES.values(), ids=BASES.keys())
def test_bases(
    llama: Tiny,
    draft: DraftOf,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    name: Any,
    error: type[AdapterbayError],
    text: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bad = draft(llama)
    bad.edit_config(base_model_name_or_path=name)
    with pytest.raises(error, match=text) as caught:
        registry.push(bad.path, "x")
    assert type(caught.value) is error
    checked(caught.value)
    if name is None or isinstance(name, str):
        assert registry.push(bad.path, "x", base=str(llama.base)).version == 1


@pytest.mark.parametrize(
    ("mapping", "fine"),
    [
        ({"base_model_class": "BertModel", "parent_library": "transformers.models.bert.modeling_bert"}, True),
        ({"base_model_class": "X", "parent_library": "__main__"}, True),
        ({"base_model_class": "X"}, True),
        ({}, True),
        ({"base_model_class": "X", "parent_library": "transformers_modules.evil.modeling"}, False),
        ({"base_model_class": "X", "parent_library": "transformersevil"}, False),
        ({"base_model_class": "X", "parent_library": "os"}, False),
        ({"base_model_class": "X", "parent_library": "antigravity"}, False),
        ({"base_model_class": "X", "parent_library": ""}, False),
        ({"base_model_class": "X", "parent_library": 5}, False),
        ("transformers", False),
        ([], False),
    ],
)
def test_auto_mapping(llama: Tiny, draft: DraftOf, registry: Registry, mapping: Any, fine: bool) -> None:
    one = draft(llama)
    one.edit_config(auto_mapping=mapping)
    if fine:
        assert registry.push(one.path, "x").version == 1
    else:
        refused("BAD_CONFIG", lambda: registry.push(one.path, "x"))


def test_what_is_refused_is_refused_before_a_base_is_fetched(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    one = draft(llama)
    one.edit_config(base_model_name_or_path="org/nowhere", arrow_config={})
    with pytest.raises(UnsupportedMethod):
        registry.push(one.path, "x")
    one.edit_config(arrow_config=None)
    one.weights.write_bytes(one.weights.read_bytes()[:-1])
    refused("TRUNCATED", lambda: registry.push(one.path, "x"))


def test_text_of_strangers_is_shown_without_effect() -> None:
    assert shown("a\x1b[31m\x07\u202eb\ud800\x9b") == "a\\x1b[31m\\x07\\u202eb\\ud800\\x9b"
    assert shown("语\u200d") == "语\u200d"
    assert len(shown("x" * 10**6)) == 4001
    assert AdapterbayError("\x1b]0;x\x07").message == "\\x1b]0;x\\x07"
