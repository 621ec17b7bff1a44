"""The fingerprint of a base: the same for the same computation, another for another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registry_tools import Tiny
from safetensors.numpy import load_file, save_file

from adapterbay.registry import locate
from adapterbay.registry.errors import Rejected

Change = Callable[[Path], None]


def edit_json(name: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(document, indent=7))

    return change


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def template_to_file(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(config.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def flip_one_weight_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def store_as_half(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.astype(np.float16) for name, tensor in load_file(file).items()}, file)


def same_bits_as_integers(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"', 1))


def rename_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm2.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file)


SAME: dict[str, Change] = {
    "shards": shard,
    "chat template in a file": template_to_file,
    "library version": edit_json("config.json", transformers_version="1.0", _name_or_path="/elsewhere"),
    "storage dtype": edit_json("config.json", dtype="bfloat16", torch_dtype="float16"),
    "a head's settings": edit_json("config.json", id2label={"0": "no"}, architectures=["X"], use_cache=False),
    "last padding": edit_json("tokenizer.json", truncation={"max_length": 3}, padding={}),
    "tokenizer's place": edit_json("tokenizer_config.json", name_or_path="/elsewhere"),
    "a readme": lambda folder: (folder / "README.md").write_text("hello") and None,
}
OTHER: dict[str, Change] = {
    "one bit": flip_one_weight_bit,
    "dtype of tensors": store_as_half,
    "dtype alone": same_bits_as_integers,
    "name of a tensor": rename_tensor,
    "rope": edit_json("config.json", rope_theta=1.0),
    "norm": edit_json("config.json", rms_norm_eps=0.5),
    "vocabulary": edit_json("tokenizer.json", model={"vocab": {"b": 0}}),
    "special token": edit_json("tokenizer_config.json", eos_token="b"),
    "chat template": edit_json("tokenizer_config.json", chat_template="{{ other }}"),
    "added tokens": lambda folder: (folder / "added_tokens.json").write_text('{"<x>": 95}') and None,
}


@pytest.fixture
def copy(llama: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.base, tmp_path / "copy"))


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_same_computation_same_fingerprint(llama: Tiny, copy: Path, change: Change) -> None:
    change(copy)
    assert locate(copy.as_posix()).fingerprint == locate(llama.base.as_posix()).fingerprint


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_other_computation_other_fingerprint(llama: Tiny, copy: Path, change: Change) -> None:
    before = locate(copy.as_posix()).fingerprint
    change(copy)
    assert locate(copy.as_posix()).fingerprint != before == locate(llama.base.as_posix()).fingerprint


def test_parts_have_digests_of_their_own(copy: Path) -> None:
    before = locate(str(copy))
    assert before.tokenizer_digest
    assert before.chat_template_digest
    edit_json("tokenizer_config.json", chat_template="{{ other }}")(copy)
    after = locate(str(copy))
    assert after.tokenizer_digest == before.tokenizer_digest
    assert after.chat_template_digest != before.chat_template_digest


def test_asking_again_reads_no_weights(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    first = locate(str(llama.base)).fingerprint

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read again")

    monkeypatch.setattr("adapterbay.registry.base.fingerprint.compute", never)
    assert locate(str(llama.base)).fingerprint == first


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": 1}', b"\xff\xfe", "forged"])
def test_a_damaged_cache_is_made_again(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | str
) -> None:
    monkeypatch.setenv("ADAPTERBAY_HOME", str(tmp_path / "home"))
    first = locate(str(copy)).fingerprint
    (entry,) = (tmp_path / "home" / "cache" / "fingerprints").iterdir()
    if isinstance(damage, bytes):
        entry.write_bytes(damage)
    else:
        document = json.loads(entry.read_text())
        document["value"] = {"fingerprint": "sha256:xyz", "tokenizer_digest": 1, "chat_template_digest": None}
        entry.write_text(json.dumps(document))
    assert locate(str(copy)).fingerprint == first
    assert json.loads(entry.read_text())["value"]["fingerprint"] == first


def test_a_cache_that_cannot_be_written_is_not_needed(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Tiny
) -> None:
    expected = locate(str(llama.base)).fingerprint
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ADAPTERBAY_HOME", str(tmp_path / "file"))
    assert locate(str(copy)).fingerprint == expected


def test_truncated_base_weights_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Rejected) as caught:
        _ = locate(str(copy)).fingerprint
    assert caught.value.reason == "TRUNCATED"
