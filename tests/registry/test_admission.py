"""Every bad input, one by one: refused at push with its reason, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registry_tools import Draft, Tensors, Tiny, tree
from safetensors.numpy import save_file

from adapterbay.registry import Limits, Registry, admit, locate
from adapterbay.registry.admission.peft_fields import read_method
from adapterbay.registry.errors import (
    AdapterbayError,
    BaseMismatch,
    BaseNotFound,
    InvalidArgument,
    NoEffect,
    Rejected,
    TaskMismatch,
    UnsupportedMethod,
)

Spoil = Callable[[Draft], Any]
DraftOf = Callable[[Tiny], Draft]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def put(name: str, data: bytes = b"x") -> Spoil:
    return lambda draft: (draft.path / name).write_bytes(data)


def config(**changes: Any) -> Spoil:
    return lambda draft: draft.edit_config(**changes)


def tensors(change: Callable[[Tensors], Any]) -> Spoil:
    return lambda draft: draft.edit_tensors(change)


def raw(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda draft: draft.weights.write_bytes(change(draft.weights.read_bytes()))


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Rewrites the header and leaves the data as it is."""

    def spoil(draft: Draft) -> None:
        data = draft.weights.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        document = json.loads(data[8 : 8 + length])
        change(document)
        text = json.dumps(document).encode()
        draft.weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def link(name: str, target: Path | str) -> Spoil:
    def spoil(draft: Draft) -> None:
        (draft.path / name).unlink(missing_ok=True)
        (draft.path / name).symlink_to(target)

    return spoil


def link_config_out(draft: Draft) -> None:
    outside = draft.path.parent / "outside.json"
    shutil.move(draft.path / "adapter_config.json", outside)
    link("adapter_config.json", outside)(draft)


def set_value(value: float, dtype: str = "float32") -> Spoil:
    def change(found: Tensors) -> None:
        key = f"{Q}.lora_B.weight"
        found[key] = found[key].astype(dtype)
        found[key].flat[7] = value

    return tensors(change)


def set_bf16_nan(draft: Draft) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    found = {key: value.to(torch.bfloat16) for key, value in load_torch(draft.weights).items()}
    found[f"{Q}.lora_A.weight"][1, 2] = float("inf")
    save_torch(found, draft.weights)


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


def swap_offsets(document: dict[str, Any]) -> None:
    first, second = [key for key in document if key != "__metadata__" and "q_proj.lora_A" in key][:2]
    document[first]["data_offsets"] = document[second]["data_offsets"]


def shift_last(document: dict[str, Any]) -> None:
    last = max((key for key in document if key != "__metadata__"), key=lambda key: document[key]["data_offsets"])
    document[last]["data_offsets"] = [offset + 16 for offset in document[last]["data_offsets"]]


def first_entry(document: dict[str, Any]) -> dict[str, Any]:
    entry = document[f"{Q}.lora_A.weight"]
    assert isinstance(entry, dict)
    return entry


def reshape(side: str, shape: tuple[int, ...]) -> Spoil:
    def change(found: Tensors) -> None:
        found[f"{Q}.lora_{side}.weight"] = np.ones(shape, dtype=np.float32)

    return tensors(change)


def move(old: str, new: str) -> Spoil:
    def change(found: Tensors) -> None:
        for key in [key for key in found if old in key]:
            found[key.replace(old, new)] = found.pop(key)

    return tensors(change)


def add(key: str, shape: tuple[int, ...] = (4, 32), dtype: str = "float32") -> Spoil:
    return tensors(lambda found: found.update({key: np.ones(shape, dtype=dtype)}))


def zero(part: str) -> Spoil:
    def change(found: Tensors) -> None:
        for key in found:
            if part in key:
                found[key][:] = -0.0

    return tensors(change)


def both(*spoils: Spoil) -> Spoil:
    return lambda draft: [spoil(draft) for spoil in spoils]


BAD: dict[str, tuple[Spoil, type[AdapterbayError], str]] = {
    # files
    "no config": (lambda d: (d.path / "adapter_config.json").unlink(), Rejected, "MISSING_FILE"),
    "no weights": (lambda d: d.weights.unlink(), Rejected, "MISSING_FILE"),
    "pickled weights": (put("adapter_model.bin", pickle.dumps({})), Rejected, "PICKLE"),
    "a .pt": (put("x.pt"), Rejected, "PICKLE"),
    "a .PKL": (put("x.PKL"), Rejected, "PICKLE"),
    "a pickle renamed to safetensors": (raw(lambda _: pickle.dumps({"a": [1] * 500})), Rejected, "PICKLE"),
    "a small pickle renamed to safetensors": (raw(lambda _: pickle.dumps({}, protocol=2)), Rejected, "PICKLE"),
    "torch.save renamed to safetensors": (raw(lambda _: torch_zip()), Rejected, "PICKLE"),
    "a pickle renamed to text": (put("notes.txt", pickle.dumps({"a": 1}, protocol=4)), Rejected, "PICKLE"),
    "code": (put("modeling.py"), Rejected, "CODE_IN_FOLDER"),
    "a library": (put("x.so"), Rejected, "CODE_IN_FOLDER"),
    "a link out": (link_config_out, Rejected, "PATH_OUTSIDE"),
    "a link to /etc": (link("README.md", "/etc/passwd"), Rejected, "PATH_OUTSIDE"),
    "a broken link": (link("README.md", "nowhere"), Rejected, "MISSING_FILE"),
    "a link to itself": (link("README.md", "README.md"), Rejected, "MISSING_FILE"),
    "a pipe": (lambda d: ((d.path / "README.md").unlink(), os.mkfifo(d.path / "README.md")), Rejected, "NOT_A_FILE"),
    # the safetensors file
    "empty": (raw(lambda _: b""), Rejected, "TRUNCATED"),
    "cut in the data": (raw(lambda data: data[:-1]), Rejected, "TRUNCATED"),
    "cut in the header": (raw(lambda data: data[:200]), Rejected, "TRUNCATED"),
    "bytes after the end": (raw(lambda data: data + b"\0"), Rejected, "BAD_HEADER"),
    "a huge header": (raw(lambda data: struct.pack("<Q", 2**40) + data[8:]), Rejected, "TOO_LARGE"),
    "a header over the file": (raw(lambda data: struct.pack("<Q", 10**7) + data[8:]), Rejected, "TRUNCATED"),
    "a header that is no JSON": (raw(lambda data: data[:8] + b"{" + b"x" + data[10:]), Rejected, "BAD_JSON"),
    "overlapping tensors": (header(swap_offsets), Rejected, "BAD_HEADER"),
    "a gap": (header(shift_last), Rejected, "BAD_HEADER"),
    "offsets that lie": (header(lambda d: first_entry(d).update(data_offsets=[0, 4])), Rejected, "BAD_HEADER"),
    "offsets backwards": (header(lambda d: first_entry(d).update(data_offsets=[512, 0])), Rejected, "BAD_HEADER"),
    "a negative shape": (header(lambda d: first_entry(d).update(shape=[-4, -32])), Rejected, "BAD_HEADER"),
    "a shape that overflows": (header(lambda d: first_entry(d).update(shape=[2**61, 8])), Rejected, "BAD_HEADER"),
    "an unknown dtype": (header(lambda d: first_entry(d).update(dtype="F31")), Rejected, "BAD_HEADER"),
    "another key in an entry": (header(lambda d: first_entry(d).update(code="x")), Rejected, "BAD_HEADER"),
    # values
    "NaN": (set_value(float("nan")), Rejected, "NOT_FINITE"),
    "infinity": (set_value(float("-inf")), Rejected, "NOT_FINITE"),
    "NaN in float16": (set_value(float("nan"), "float16"), Rejected, "NOT_FINITE"),
    "NaN in float64": (set_value(float("nan"), "float64"), Rejected, "NOT_FINITE"),
    "infinity in bfloat16": (set_bf16_nan, Rejected, "NOT_FINITE"),
    "integers": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.ones((4, 32), "int32")})),
        Rejected,
        "UNSUPPORTED_DTYPE",
    ),
    "B all zero": (zero("lora_B"), NoEffect, "NO_EFFECT"),
    "A all zero": (zero("lora_A"), NoEffect, "NO_EFFECT"),
    "alpha zero": (config(lora_alpha=0), NoEffect, "NO_EFFECT"),
    "no tensors": (lambda d: save_file({}, d.weights), NoEffect, "NO_EFFECT"),
    # tensors against the base
    "A of another width": (reshape("A", (4, 33)), Rejected, "SHAPE_MISMATCH"),
    "B of another height": (reshape("B", (31, 4)), Rejected, "SHAPE_MISMATCH"),
    "another rank": (both(reshape("A", (5, 32)), reshape("B", (32, 5))), Rejected, "SHAPE_MISMATCH"),
    "a vector": (reshape("A", (128,)), Rejected, "SHAPE_MISMATCH"),
    "A without B": (tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), Rejected, "MISSING_TENSOR"),
    "a layer too many": (move("layers.1.", "layers.2."), Rejected, "UNKNOWN_MODULE"),
    "an unknown module": (move("q_proj", "qq_proj"), Rejected, "UNKNOWN_MODULE"),
    "a norm": (both(move("0.mlp.down_proj", "0.input_layernorm")), Rejected, "UNKNOWN_MODULE"),
    "another prefix": (move("model.model.layers", "model.foo.model.layers"), Rejected, "UNKNOWN_MODULE"),
    "the prefix twice": (move("model.model.layers", "model.model.model.layers"), Rejected, "UNKNOWN_MODULE"),
    "two prefixes": (move("model.model.layers.0", "model.layers.0"), Rejected, "UNKNOWN_MODULE"),
    "without PEFT's prefix": (move("base_model.model.", ""), Rejected, "UNKNOWN_TENSOR"),
    "an adapter's name in the key": (move("lora_A.weight", "lora_A.default.weight"), Rejected, "UNKNOWN_TENSOR"),
    "a tensor of no place": (add("base_model.model.x"), Rejected, "UNKNOWN_TENSOR"),
    "a target that its config leaves out": (config(target_modules=["v_proj", "down_proj"]), Rejected, "UNKNOWN_TENSOR"),
    "an excluded target": (config(exclude_modules=["q_proj"]), Rejected, "UNKNOWN_TENSOR"),
    "a layer that its config leaves out": (config(layers_to_transform=[0]), Rejected, "UNKNOWN_TENSOR"),
    "rank_pattern against the tensors": (config(rank_pattern={"q_proj": 2}), Rejected, "SHAPE_MISMATCH"),
    "r against the tensors": (config(r=8), Rejected, "SHAPE_MISMATCH"),
    "LoRA on lm_head, which its config leaves out": (
        both(add("base_model.model.lm_head.lora_A.weight"), add("base_model.model.lm_head.lora_B.weight", (96, 4))),
        Rejected,
        "UNKNOWN_TENSOR",
    ),
    "LoRA on the embedding, which its config leaves out": (
        add("base_model.model.model.embed_tokens.lora_embedding_A", (4, 96)),
        Rejected,
        "UNKNOWN_TENSOR",
    ),
    "a head of another width": (add("base_model.model.score.weight", (2, 31)), Rejected, "SHAPE_MISMATCH"),
    "a head's bias of another height": (
        both(add("base_model.model.score.weight", (2, 32)), add("base_model.model.score.bias", (3,))),
        Rejected,
        "SHAPE_MISMATCH",
    ),
    "half of a head of two layers": (
        add("base_model.model.classifier.out_proj.weight", (2, 32)),
        Rejected,
        "MISSING_TENSOR",
    ),
    "a head of another kind": (
        add("base_model.model.classifier.0.weight", (2, 32)),
        UnsupportedMethod,
        "UNSUPPORTED_METHOD",
    ),
    "a head on a language model": (add("base_model.model.score.weight", (2, 32)), TaskMismatch, "TASK_MISMATCH"),
    "a classifier without a head": (config(task_type="SEQ_CLS"), Rejected, "MISSING_TENSOR"),
    # the config
    "not JSON": (put("adapter_config.json", b"{"), Rejected, "BAD_JSON"),
    "not UTF-8": (put("adapter_config.json", b'{"a": "\xff"}'), Rejected, "BAD_JSON"),
    "a list": (put("adapter_config.json", b"[]"), Rejected, "BAD_JSON"),
    "a key twice": (put("adapter_config.json", b'{"peft_type": "LORA", "peft_type": "LORA"}'), Rejected, "BAD_JSON"),
    "NaN in JSON": (put("adapter_config.json", b'{"lora_alpha": NaN}'), Rejected, "BAD_JSON"),
    "an overflow in JSON": (put("adapter_config.json", b'{"lora_alpha": 1e999}'), Rejected, "BAD_JSON"),
    "a lone surrogate": (put("adapter_config.json", b'{"a": "\\ud800"}'), Rejected, "BAD_JSON"),
    "deep JSON": (put("adapter_config.json", b"[" * 100_000), Rejected, "BAD_JSON"),
    "long JSON": (put("adapter_config.json", b"[" + b" " * 9_000_000 + b"]"), Rejected, "TOO_LARGE"),
    "bad training.json": (put("training.json", b"{"), Rejected, "BAD_JSON"),
    "no method": (config(peft_type=...), Rejected, "BAD_CONFIG"),
    "an unknown method": (config(peft_type="QUANTUM"), UnsupportedMethod, "UNSUPPORTED_METHOD"),
    "a method that is known and not served": (config(peft_type="XLORA"), UnsupportedMethod, "UNSUPPORTED_METHOD"),
    "another method's settings": (config(peft_type="IA3"), Rejected, "UNKNOWN_CONFIG_KEY"),
    "DoRA without magnitudes": (config(use_dora=True), Rejected, "MISSING_TENSOR"),
    "two variants": (config(use_dora=True, kasa_config={}), UnsupportedMethod, "UNSUPPORTED_METHOD"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), UnsupportedMethod, "UNSUPPORTED_METHOD"),
    "a bias that PEFT does not know": (config(bias="lora"), Rejected, "BAD_CONFIG"),
    "a whole module that is missing": (config(modules_to_save=["lm_head"]), Rejected, "MISSING_TENSOR"),
    "a tagger without a head": (config(task_type="TOKEN_CLS"), Rejected, "MISSING_TENSOR"),
    "another task": (config(task_type="QUESTION_ANS"), UnsupportedMethod, "UNSUPPORTED_METHOD"),
    "an unknown setting": (config(use_quantum=True), Rejected, "UNKNOWN_CONFIG_KEY"),
    "an unknown setting that is false": (config(use_quantum=False), Rejected, "UNKNOWN_CONFIG_KEY"),
    "a rank that is no number": (config(r="4"), Rejected, "BAD_CONFIG"),
    "a rank that is true": (config(r=True), Rejected, "BAD_CONFIG"),
    "a rank of zero": (config(r=0), Rejected, "BAD_CONFIG"),
    "an alpha that is text": (config(lora_alpha="8"), Rejected, "BAD_CONFIG"),
    "targets that are numbers": (config(target_modules=[1]), Rejected, "BAD_CONFIG"),
    "a pattern that runs away": (config(target_modules="(a+)+$"), Rejected, "UNKNOWN_TENSOR"),
    "a pattern that looks ahead": (config(target_modules="(?=.*q_proj).*"), Rejected, "BAD_PATTERN"),
    "a pattern that is none": (config(target_modules="("), Rejected, "BAD_PATTERN"),
    # the base
    "no base": (config(base_model_name_or_path=None), InvalidArgument, "INVALID_ARGUMENT"),
    "a base that is not here": (config(base_model_name_or_path="/nowhere"), BaseNotFound, "BASE_NOT_FOUND"),
    "another base's fingerprint": (
        lambda d: d.write_training(base={"fingerprint": "sha256:" + "0" * 64}),
        BaseMismatch,
        "BASE_MISMATCH",
    ),
}


def test_a_misspelt_method_gets_near_names() -> None:
    with pytest.raises(UnsupportedMethod, match=r"does not know it\. Did you mean LORA") as caught:
        read_method({"peft_type": "lora"})
    assert "`adapterbay server methods`" in caught.value.message


@pytest.mark.parametrize(("spoil", "error", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_nothing_is_left_behind(
    llama: Tiny, draft: DraftOf, registry: Registry, spoil: Spoil, error: type[AdapterbayError], reason: str
) -> None:
    registry.push(llama.adapter, "there/before")
    bad = draft(llama)
    spoil(bad)
    before, last = tree(registry.root), registry.last_event()
    with pytest.raises(error) as caught:
        registry.push(bad.path, "team/bad", aliases=["champion"])
    assert type(caught.value) is error
    assert caught.value.reason == reason
    assert len(caught.value.message) > 30
    assert tree(registry.root) == before
    assert registry.last_event() == last
    assert [adapter.name for adapter in registry.adapters()] == ["there/before"]
    assert registry.verify().ok


def test_the_reasons_are_listed() -> None:
    import adapterbay.registry.admission as module

    listed = set(re.findall(r"^    ([A-Z_]+)  ", module.__doc__ or "", re.MULTILINE))
    assert {reason for _, error, reason in BAD.values() if error is Rejected} <= listed


def test_a_rank_and_a_size_over_the_limit(llama: Tiny, tmp_path: Path) -> None:
    small = Registry.open(tmp_path / "a", limits=Limits(rank=3))
    with pytest.raises(Rejected) as caught:
        small.push(llama.adapter, "x")
    assert caught.value.reason == "RANK_TOO_LARGE"
    small = Registry.open(tmp_path / "b", limits=Limits(weights_bytes=100))
    with pytest.raises(Rejected) as caught:
        small.push(llama.adapter, "x")
    assert caught.value.reason == "TOO_LARGE"
    small = Registry.open(tmp_path / "c", limits=Limits(header_bytes=100))
    with pytest.raises(Rejected) as caught:
        small.push(llama.adapter, "x")
    assert caught.value.reason == "TOO_LARGE"


def test_the_adapter_of_another_base(llama: Tiny, gpt2: Tiny, bert: Tiny, registry: Registry) -> None:
    for wrong in (gpt2.base, bert.base):
        with pytest.raises(Rejected) as caught:
            registry.push(llama.adapter, "x", base=str(wrong))
        assert caught.value.reason == "UNKNOWN_MODULE"


@pytest.mark.parametrize("path", ["../x.json", "/x.json", "a/../../x", "a\\b", "C:\\x", "a\0b", ".", "", "a//b"])
def test_paths_that_leave_the_folder_at_load(llama: Tiny, path: str) -> None:
    base = locate(str(llama.base))
    files: dict[str, Path | bytes] = {file.name: file for file in llama.adapter.iterdir()}
    with pytest.raises(Rejected) as caught:
        admit(files | {path: b"{}"}, base.tensor_shapes(), base_config=base.config)
    assert caught.value.reason == "PATH_OUTSIDE"
