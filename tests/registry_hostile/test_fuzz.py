"""Whatever comes: an answer that means something, or an error of ours. Set ADAPTERBAY_FUZZ=100 to fuzz at length."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hostile_tools import agrees_with_peft, checked, fuzz, json_values, look
from hypothesis import assume, event, given
from hypothesis import strategies as st
from registry_tools import Tiny

from adapterbay.registry import BaseReference, HubReference, Reference, parse_reference
from adapterbay.registry.admission.documents import read_document
from adapterbay.registry.admission.front_matter import front_matter
from adapterbay.registry.base import BaseFiles
from adapterbay.registry.digest import canonical_json, digest_bytes, parse_json
from adapterbay.registry.errors import AdapterbayError, InvalidReference, Rejected
from adapterbay.registry.manifest import Manifest, inside_path

# names

segments = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,14}", fullmatch=True)
names = st.lists(segments, min_size=1, max_size=9).map("/".join)
revisions = st.one_of(
    st.none(),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,20}", fullmatch=True),
    st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{40}", fullmatch=True),
    st.integers(-1, 10**19).map(str),
    st.sampled_from(["latest", "champion", "v1", "main", "refs/pr/1"]),
)
parts = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,10}", fullmatch=True)
texts = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="aZ0-_./@:%~\\ \t\0а．é\u202e", max_size=40),
    st.builds("{}@{}".format, names, revisions),
    st.builds("hub:{}/{}@{}".format, parts, parts, revisions),
    st.builds("hub:{}/{}".format, parts, parts),
)


@fuzz(400)
@given(names, revisions)
def test_references_print_what_they_parse(name: str, revision: str | None) -> None:
    try:
        reference = Reference(name, int(revision) if revision and revision.isdecimal() else revision)
    except InvalidReference as error:
        checked(error)
        return
    assert Reference.parse(str(reference)) == reference == parse_reference(str(reference))


@fuzz(400)
@given(parts, parts, revisions)
def test_hub_references_print_what_they_parse(org: str, repo: str, revision: str | None) -> None:
    for kind in (lambda: HubReference(org, repo, revision), lambda: BaseReference("hub", f"{org}/{repo}", revision)):
        try:
            reference = kind()
        except InvalidReference as error:
            checked(error)
            continue
        assert type(reference).parse(str(reference)) == reference


@fuzz(800)
@given(texts)
def test_any_text_is_a_reference_or_is_refused(text: str) -> None:
    for parse in (parse_reference, BaseReference.parse):
        try:
            reference = parse(text)
        except InvalidReference as error:
            checked(error)
            continue
        assert parse(str(reference)) == reference
        if parse is parse_reference:
            assert str(reference) == text.removesuffix("@latest")
            assert str(reference).isascii()


@fuzz(400)
@given(st.one_of(texts, st.text(alphabet="aC./-_\\0nul", max_size=12)))
def test_any_path_stays_inside_or_is_refused(text: str) -> None:
    try:
        path = inside_path(text)
    except ValueError:
        return
    assert path == text
    root = Path("/root/of/all")
    assert (root / path).resolve().is_relative_to(root)
    assert Path(path).as_posix() == path


# manifests

ZERO = "sha256:" + "0" * 64
VALID = Manifest.model_validate(
    {
        "files": [
            {"path": "adapter_config.json", "digest": ZERO, "size": 3},
            {"path": "a/b", "digest": ZERO, "size": 0},
        ],
        "peft_type": "LORA",
        "peft_config": {"r": 4, "target_modules": ["q_proj"], "lora_alpha": 8.5},
        "base_reference": "hub:org/base@main",
        "base_fingerprint": ZERO,
        "task": "sequence-classification",
        "labels": ["no", "ja"],
        "rank": 4,
        "library_versions": {"peft": "0.21.2"},
        "training": {"metrics": {"loss": 1e-9}, "text": "语\\"},
        "parents": [ZERO],
    }
)
DOCUMENT: dict[str, Any] = json.loads(VALID.to_bytes())


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths_of(inner, (*path, key))
    return found


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    document = copy.deepcopy(document)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


def is_a_manifest_or_refused(data: bytes) -> None:
    try:
        manifest = Manifest.from_bytes(data)
    except Rejected as error:
        checked(error)
        event("refused")
        return
    event("a manifest")
    assert manifest.to_bytes() == data
    assert manifest.digest == digest_bytes(data)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    for file in manifest.files:
        assert inside_path(file.path) == file.path


@fuzz(600)
@given(st.sampled_from(paths_of(DOCUMENT)), json_values)
def test_a_manifest_with_any_value_anywhere(path: tuple[Any, ...], value: Any) -> None:
    changed = put(DOCUMENT, path, value)
    is_a_manifest_or_refused(canonical_json(changed))
    is_a_manifest_or_refused(json.dumps(changed).encode())


@fuzz(400)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID.to_bytes()) - 1), st.integers(0, 255)), max_size=4), st.integers(0, 5)
)
def test_a_manifest_with_any_bytes(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(VALID.to_bytes())
    for place, value in changes:
        data[place] = value
    is_a_manifest_or_refused(bytes(data[: len(data) - cut]))


@fuzz(300)
@given(st.one_of(json_values.map(canonical_json), st.binary(max_size=100), st.text(max_size=60).map(str.encode)))
def test_any_json_as_a_manifest(data: bytes) -> None:
    is_a_manifest_or_refused(data)


@fuzz(500)
@given(st.one_of(st.binary(max_size=60), st.text(alphabet='[]{}",:0123-+.eE \\u\n', max_size=40).map(str.encode)))
def test_any_json_is_read_as_by_python_or_refused(data: bytes) -> None:
    try:
        value = parse_json(data, "x")
    except Rejected as error:
        checked(error)
        return
    assert value == json.loads(data)
    assert parse_json(canonical_json(value), "x") == value


# folders


CONFIG_VALUES = st.one_of(
    json_values,
    st.sampled_from(["q_proj", ["q_proj"], ["v_proj", "q_proj"], r".*_proj", "all-linear", 2, 4, 8, 0.5, True, None]),
    st.sampled_from([{"q_proj": 2}, {"layers.0.self_attn.q_proj": 2}, {"^x": 2, ".*": 4}, [0], [0, 1], "layers", ""]),
)


@fuzz(120)
@given(st.data())
def test_a_folder_with_any_config(
    llama: Tiny, base: BaseFiles, model: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Refused, or served as what PEFT itself makes of it."""
    config: dict[str, Any] = json.loads((llama.adapter / "adapter_config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        places = [path for path in paths_of(config) if path]
        path = data.draw(
            st.sampled_from([*places, ("added",), ("rank_pattern", "q_proj"), ("alpha_pattern", "v_proj")])
        )
        assume(path in places or len(path) == 1 or isinstance(config.get(path[0]), dict))
        config = put(config, path, data.draw(CONFIG_VALUES))
    folder = tmp_path_factory.getbasetemp() / "any-config"
    folder.mkdir(exist_ok=True)
    for file in llama.adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        found = look(folder, base=str(llama.base))
    except AdapterbayError as error:
        checked(error)
        event("refused")
        return
    event("accepted")
    assert found.manifest.peft_config == config
    assert found.manifest == Manifest.from_bytes(found.manifest.to_bytes())
    agrees_with_peft(model, folder, base)


# what is read beside


@fuzz(400)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_card(text: bytes) -> None:
    for card in (text, b"---\n" + text + b"\n---\n", b"---\nlicense: " + text + b"\ndatasets:\n- " + text + b"\n---\n"):
        found = front_matter(card)
        assert found.keys() <= {"datasets", "license", "language", "base_model"}
        assert all(value.isascii() and value.isprintable() for values in found.values() for value in values)


@fuzz(200)
@given(json_values)
def test_any_trainer_state(llama: Tiny, tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    from adapterbay.registry.admission.evidence import training_evidence

    path = tmp_path_factory.getbasetemp() / "state.json"
    log = [{"step": 4, "eval_a": value, "loss": value}, value]
    for document in (value, {"log_history": log, "global_step": 4, "epoch": value, "best_global_step": value}):
        path.write_text(json.dumps(document))
        found = training_evidence({"trainer_state.json": path, "eval_results.json": path}, None)
        assert found.record is None or parse_json(canonical_json(found.record), "x") == found.record
        if isinstance(document, dict):
            assert read_document(path, "x") == document
