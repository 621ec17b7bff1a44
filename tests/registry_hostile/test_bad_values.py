"""Hostile values and polyglots: numbers that nobody can compute with, and files with two meanings."""

from __future__ import annotations

import gzip
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_tools import files_of, peak_bytes, refused, split, torch_zip, with_header
from registry_tools import Draft, Tiny
from safetensors.numpy import load_file, save_file

from adapterbay.registry import Limits, Registry, admit, locate
from adapterbay.registry.errors import AdapterbayError, NoEffect, Rejected

DraftOf = Callable[[Tiny], Draft]


def spoil(draft: Draft, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], part: str = "lora_B") -> None:
    tensors = load_file(draft.weights)
    key = next(key for key in tensors if part in key)
    tensors[key] = change(tensors[key])
    save_file(tensors, draft.weights)


def with_value(dtype: str, value: float) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    def change(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        array = array.astype(dtype)
        array.flat[-1] = value
        return array

    return change


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, value) for dtype in ("float16", "float32", "float64") for value in (math.nan, math.inf, -math.inf)]
    + [("float64", 1e39), ("float64", -1e300), ("float64", 3.4e38), ("float32", 3.4e38), ("float32", -3.4028e38)],
)
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_values_that_are_infinity_when_served(
    llama: Tiny, draft: DraftOf, registry: Registry, dtype: str, value: float, part: str
) -> None:
    bad = draft(llama)
    spoil(bad, with_value(dtype, value), part)
    refused("NOT_FINITE", lambda: registry.push(bad.path, "x"))


@pytest.mark.parametrize(("value", "fine"), [(3.38e38, True), (3.4e38, False), (-1e39, False), (1e-300, True)])
@pytest.mark.parametrize("part", ["classifier.weight", "classifier.bias"])
def test_large_values_in_heads(
    bert: Tiny, draft: DraftOf, registry: Registry, part: str, value: float, fine: bool
) -> None:
    one = draft(bert)
    spoil(one, with_value("float64", value), part)
    if fine:
        assert registry.push(one.path, "x").version == 1
    else:
        refused("NOT_FINITE", lambda: registry.push(one.path, "x"))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7F81, 0xFFFF, 0x7FC0])
def test_nan_and_infinity_in_bfloat16_and_in_heads(bert: Tiny, draft: DraftOf, registry: Registry, bits: int) -> None:
    header, data = split((bert.adapter / "adapter_model.safetensors").read_bytes())
    for part in ("lora_A", "classifier.weight", "classifier.bias"):
        key = next(key for key in header if part in key)
        tensors = {
            name: np.frombuffer(data[slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        changed: dict[str, Any] = {}
        body = b""
        for name, array in tensors.items():
            halves = (array.view(np.uint32) >> 16).astype(np.uint16)
            if name == key:
                halves.flat[3 % halves.size] = bits
            changed[name] = {
                "dtype": "BF16",
                "shape": list(array.shape),
                "data_offsets": [len(body), len(body) + 2 * array.size],
            }
            body += halves.tobytes()
        bad = draft(bert)
        bad.weights.write_bytes(with_header(changed, body))
        assert (
            "classifier" in refused("NOT_FINITE", lambda bad=bad: registry.push(bad.path, "x")).message
            or part == "lora_A"
        )


@pytest.mark.parametrize(
    ("dtype", "size", "idle"),
    [
        ("float32", 1e-45, True),  # the smallest: a product of two is nothing
        ("float32", 1e-30, True),
        ("float64", 1e-300, True),
        ("float64", 7e-46, True),  # rounds to zero in float32
        ("float16", 6e-8, False),  # the smallest of float16: small, and an effect
        ("float32", 1e-20, False),
        ("float32", 0.0, True),
        ("float32", -0.0, True),
    ],
)
def test_the_smallest_values(
    llama: Tiny, draft: DraftOf, registry: Registry, dtype: str, size: float, idle: bool
) -> None:
    small = draft(llama)
    small.edit_tensors(
        lambda found: found.update({key: np.full(array.shape, size, dtype) for key, array in found.items()})
    )
    if idle:
        with pytest.raises(NoEffect):
            registry.push(small.path, "x")
    else:
        assert registry.push(small.path, "x").version == 1


def test_a_product_that_is_infinity(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    large = draft(llama)
    large.edit_tensors(lambda found: found.update({key: np.full_like(array, 1e20) for key, array in found.items()}))
    refused("NOT_FINITE", lambda: registry.push(large.path, "x"))
    scaled = draft(llama)
    scaled.edit_config(lora_alpha=1e9)
    assert registry.push(scaled.path, "x").version == 1


def test_values_are_read_in_little_memory(llama: Tiny, tmp_path: Path) -> None:
    """A head of 64 MB, on a base that is made for it."""
    rows = 2**20
    base = locate(str(llama.base))
    tensors = load_file(llama.adapter / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = np.ones((rows, 16), np.float32)
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path)
    files = files_of(llama.adapter) | {"adapter_model.safetensors": path}
    peak = peak_bytes(lambda: admit(files, base.tensor_shapes(), base_config=base.config))
    assert peak < path.stat().st_size / 2


# Polyglots: a file has one meaning here, the one of its name


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.place, "w"))


def test_a_pickle_in_the_values_of_a_safetensors_file(
    llama: Tiny, draft: DraftOf, registry: Registry, tmp_path: Path
) -> None:
    """Bytes of tensors may spell anything. Nothing here unpickles or unzips, so they stay numbers."""
    proof = tmp_path / "was-run"
    code = pickle.dumps(Evil(str(proof)), 0)
    both = draft(llama)

    def hide(found: dict[str, np.ndarray[Any, Any]]) -> None:
        key = next(key for key in found if "lora_A" in key)
        data = bytearray(found[key].tobytes())
        data[: len(code)] = code[: len(data)]
        found[key] = np.nan_to_num(np.frombuffer(bytes(data), found[key].dtype).reshape(found[key].shape), posinf=1.0)

    both.edit_tensors(hide)
    receipt = registry.push(both.path, "x")
    snapshot = registry.open_snapshot(receipt.digest)
    base = locate(str(llama.base))
    admit(snapshot.files, base.tensor_shapes(), base_config=base.config)
    assert not proof.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "training.json", "README.md", "adapter_model.safetensors", "notes"]
)
def test_pickles_under_other_names(
    llama: Tiny, draft: DraftOf, registry: Registry, tmp_path: Path, name: str, protocol: int
) -> None:
    """Protocols 0 and 1 have no magic number: then a document is no JSON, weights are no safetensors, a README is text
    that nobody runs, and what is left out is not stored."""
    proof = tmp_path / "was-run"
    bad = draft(llama)
    code = pickle.dumps([Evil(str(proof)), *([b"\xff" * 300] if protocol else [])], protocol)
    (bad.path / name).write_bytes(code)
    if protocol == 0 and name in ("README.md", "notes"):
        stored = registry.open_snapshot(registry.push(bad.path, "x").digest).files
        assert "notes" not in stored
        assert name != "README.md" or stored["README.md"].read_bytes() == code
    elif protocol == 1 and name == "notes":
        registry.push(bad.path, "x")
    else:
        with pytest.raises(Rejected) as caught:
            registry.push(bad.path, "x")
        expected = {"README.md": "BAD_TEXT", "adapter_model.safetensors": "BAD_HEADER"}.get(name, "BAD_JSON")
        assert caught.value.reason == (expected if protocol < 2 else "PICKLE")
        assert registry.adapters() == []
    assert not proof.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n", "BAD_TEXT"),
        (b"\x7fELF\x02\x01\x01\x00", "BAD_TEXT"),
        ("naïve".encode("latin-1"), "BAD_TEXT"),
        (b"a\x00b", "BAD_TEXT"),
        (gzip.compress(b"x" * 10**6), "COMPRESSED"),
        (torch_zip(), "PICKLE"),
    ],
)
def test_a_readme_that_is_no_text(llama: Tiny, draft: DraftOf, registry: Registry, data: bytes, reason: str) -> None:
    bad = draft(llama)
    (bad.path / "README.md").write_bytes(data)
    refused(reason, lambda: registry.push(bad.path, "x"))
    base = locate(str(llama.base))
    refused(reason, lambda: admit(files_of(bad.path), base.tensor_shapes(), base_config=base.config))


def test_a_readme_with_a_script_is_text(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    page = draft(llama)
    (page.path / "README.md").write_text("---\nlicense: mit\n---\n<script>alert(1)</script>\x1b[31m")
    found = registry.open_snapshot(registry.push(page.path, "x").digest)
    assert found.files["README.md"].read_text() == (page.path / "README.md").read_text()


def test_limits_are_kept_for_bytes_in_memory_too(llama: Tiny) -> None:
    base = locate(str(llama.base))
    files = {name: Path(str(path)).read_bytes() for name, path in files_of(llama.adapter).items()}
    for limits in (Limits(weights_bytes=100), Limits(header_bytes=100), Limits(tensors=3), Limits(document_bytes=100)):
        with pytest.raises(AdapterbayError) as caught:
            admit(files, base.tensor_shapes(), base_config=base.config, limits=limits)
        assert caught.value.reason == "TOO_LARGE"
