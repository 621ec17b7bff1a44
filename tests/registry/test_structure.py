"""Structures are remembered, values never; and many small tensors at one glance are what each of them is alone."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registry_tools import Draft, Tensors, Tiny
from safetensors.numpy import save

from adapterbay.registry import Admission, Limits, admit, locate
from adapterbay.registry.admission import match_tensors
from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.registry.admission.structure import Structure, StructureKey, Structures
from adapterbay.registry.admission.tensor_values import glance, read_factor, read_values
from adapterbay.registry.errors import NoEffect, Rejected

DraftOf = Callable[[Tiny], Draft]


def files_of(folder: Path) -> dict[str, Path | bytes]:
    return {file.name: file for file in folder.iterdir()}


@pytest.fixture
def matched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one whenever a structure is worked out."""
    calls: list[object] = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return match_tensors(*arguments)

    monkeypatch.setattr("adapterbay.registry.admission.match_tensors", counted)
    return calls


def admission_of(tiny: Tiny, limits: Limits | None = None) -> Admission:
    base = locate(str(tiny.base))
    return Admission(base.tensor_shapes(), base.config, limits)


def changed(change: Callable[[Tensors], Any], draft: Draft) -> dict[str, Path | bytes]:
    draft.edit_tensors(change)
    return files_of(draft.path)


def test_what_is_known_is_what_would_be_found_again(llama: Tiny, gpt2: Tiny, bert: Tiny, matched: list[object]) -> None:
    for tiny in (llama, gpt2, bert):
        del matched[:]
        base, files, admission = locate(str(tiny.base)), files_of(tiny.adapter), admission_of(tiny)
        alone = admit(files, base.tensor_shapes(), base_config=base.config)
        assert [admission.admit(files), admission.admit(files)] == [alone, alone]
        assert len(matched) == 2


def test_values_are_looked_at_every_time(llama: Tiny, draft: DraftOf, matched: list[object]) -> None:
    """Other adapters of the same structure: one is refused, one does nothing, one is good but for a module."""
    admission = admission_of(llama)
    good = admission.admit(changed(dict.copy, draft(llama)))

    def spoil(found: Tensors) -> None:
        found[max(found)][...] = math.nan

    def silence(found: Tensors, parts: str = "lora_B") -> None:
        for key in found:
            if parts in key:
                found[key][...] = 0

    with pytest.raises(Rejected, match="NaN"):
        admission.admit(changed(spoil, draft(llama)))
    with pytest.raises(NoEffect):
        admission.admit(changed(silence, draft(llama)))
    partly = admission.admit(changed(lambda found: silence(found, "0.mlp.down_proj.lora_B"), draft(llama)))
    assert partly.findings == (*good.findings, f"1 of {len(good.sites)} modules change nothing (a factor is all zero)")
    assert len(matched) == 1


def test_labels_are_compared_every_time(bert: Tiny, matched: list[object]) -> None:
    admission, files = admission_of(bert), files_of(bert.adapter)
    for labels in (["a", "b"], None, ["c", "d"]):
        admission.admit(files, labels=labels)
    with pytest.raises(Rejected, match="3 labels"):
        admission.admit(files, labels=["a", "b", "c"])
    assert len(matched) == 1


def test_other_settings_or_shapes_are_another_structure(llama: Tiny, draft: DraftOf, matched: list[object]) -> None:
    admission = admission_of(llama)
    first = admission.admit(files_of(llama.adapter))
    other = draft(llama)
    settings = json.loads((other.path / "adapter_config.json").read_text())
    (other.path / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]}))
    found = admission.admit(files_of(other.path))
    assert found.modules[0].scaling == 2 * first.modules[0].scaling
    half = draft(llama)
    half.edit_tensors(lambda tensors: tensors.update({k: t.astype(np.float16) for k, t in tensors.items()}))
    assert {entry.dtype for entry in admission.admit(files_of(half.path)).entries.values()} == {"F16"}
    assert len(matched) == 3


def test_a_file_that_is_cut_off_is_refused_though_its_header_is_known(llama: Tiny) -> None:
    admission, files = admission_of(llama), files_of(llama.adapter)
    admission.admit(files)
    whole = (llama.adapter / "adapter_model.safetensors").read_bytes()
    for data, reason in ((whole[:-4], "TRUNCATED"), (whole + b"\0\0\0\0", "BAD_HEADER"), (whole[:6], "TRUNCATED")):
        with pytest.raises(Rejected) as refused:
            admission.admit(files | {"adapter_model.safetensors": data})
        assert refused.value.reason == reason


def test_what_a_caller_does_to_a_report_stays_with_it(llama: Tiny) -> None:
    admission, files = admission_of(llama), files_of(llama.adapter)
    admission.admit(files).config["target_modules"].clear()
    assert admission.admit(files).config["target_modules"]


def test_structures_are_kept_within_bytes(llama: Tiny) -> None:
    def key(name: str, size: int) -> StructureKey:
        return StructureKey(name.encode(), b"", 0, size)

    structures, some = Structures(100), Structure(*([None] * 5))  # type: ignore[arg-type]
    for name in "abc":
        structures.keep(key(name, 30), some)
    assert structures.find(key("a", 30)) is some
    structures.keep(key("a", 30), some)  # it does not count twice
    structures.keep(key("d", 40), some)
    assert [name for name in "abcd" if structures.find(key(name, 40 if name == "d" else 30))] == ["a", "c", "d"]
    long = b"\xff\xff\xff\x00\x00\x00\x00\x00{"
    assert StructureKey.of(b"{}", long, len(long)) is None
    assert StructureKey.of(b"{}", b"\x01", 1) is None


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_glance_tells_what_a_close_look_does(dtype: str) -> None:
    """Every tensor as if it were the only one, whatever its neighbours hold."""
    rng = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(dtype)

    gaps = some(4, 6)
    gaps[:, 0] = gaps[1] = 0
    broken = some(3, 2)
    broken[2, 1] = np.inf
    tensors = {
        "matrix": some(8, 30),
        "tall": -some(30, 8),
        "gaps": gaps,
        "zeros": np.zeros((3, 5), dtype),
        "signs": np.full((2, 2), -0.0, dtype),
        "ones": np.ones(7, dtype),
        "minus": -np.ones(7, dtype),
        "nearly": np.array([1, 1, 0.5], dtype),
        "number": some(),
        "empty": some(0, 3),
        "broken": broken,
        "cube": some(2, 3, 4),
        "whole": np.arange(5),
        "last": some(1, 1),
    }
    data = save(tensors)
    header = read_header(data, "it").tensors
    seen = glance(io.BytesIO(data), header.values())
    assert set(tensors) - set(seen) == {"empty", "broken", "whole"}
    for name, own in seen.items():
        file = io.BytesIO(data)
        assert read_values(file, header[name], "it", own) == read_values(file, header[name], "it"), name
        if len(header[name].shape) == 2:
            for axis in (0, 1):
                quick = read_factor(file, header[name], "it", rank_axis=axis, seen=own)
                close = read_factor(file, header[name], "it", rank_axis=axis)
                assert quick.largest == close.largest
                assert np.array_equal(quick.ranks, close.ranks), name
    assert not glance(io.BytesIO(data[: len(data) // 2]), [header[max(header, key=lambda name: header[name].begin)]])


def test_large_tensors_are_left_to_a_close_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterbay.registry.admission.tensor_values.CHUNK_VALUES", 10)
    tensors = {f"t{number}": np.full(size, 2.0, np.float32) for number, size in enumerate((6, 4, 1, 11, 3, 10))}
    data = save(tensors)
    header = read_header(data, "it").tensors
    assert sorted(glance(io.BytesIO(data), header.values())) == ["t0", "t1", "t2", "t4", "t5"]
