"""Hostile weights: what is no safetensors file, headers that lie, values that nobody can compute with."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_tools import checked, files_of, peak_bytes, refused, split, with_header
from registry_tools import Draft, Tiny
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load_file, save, save_file

from adapterbay.registry import Limits, Registry, admit, locate
from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.registry.errors import AdapterbayError, NoEffect, Rejected

DraftOf = Callable[[Tiny], Draft]
F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = b"\0" * 8
VALID = save({"a": np.arange(4, dtype=np.float32)})


def entry(**changes: Any) -> bytes:
    return with_header({"a": F | changes}, EIGHT)


def raw(text: str, data: bytes = EIGHT) -> bytes:
    return with_header(text.encode(), data)


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "TRUNCATED"),
    "a length alone": (struct.pack("<Q", 0), "BAD_HEADER"),
    "an empty header": (struct.pack("<Q", 0) + b"{}", "BAD_HEADER"),
    "the longest length": (b"\xff" * 8 + b"{}", "TOO_LARGE"),
    "a length of 2^63": (struct.pack("<Q", 2**63) + b"{}", "TOO_LARGE"),
    "a length of 16 MiB and one": (struct.pack("<Q", 2**24 + 1) + b"{}" + b" " * 100, "TOO_LARGE"),
    "a length one too long": (struct.pack("<Q", 3) + b"{}", "TRUNCATED"),
    "a header that ends in NUL": (raw('{"a":1}\0', b""), "BAD_JSON"),
    "two headers": (raw("{}{}", b""), "BAD_JSON"),
    "a byte order mark": (with_header(b"\xef\xbb\xbf{}", b""), "BAD_HEADER"),
    "space before the header": (with_header(b" {}", b""), "BAD_HEADER"),
    "not UTF-8": (with_header(b'{"\xff": 1}', b""), "BAD_JSON"),
    "a lone surrogate": (raw('{"\\ud800": {}}', b""), "BAD_JSON"),
    "a name twice": (raw('{"a": %s, "a": %s}' % (('{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',) * 2)), "BAD_JSON"),
    "an entry that is a number": (with_header({"a": 1}, b""), "BAD_HEADER"),
    "metadata that is a number": (with_header({"__metadata__": 1}, b""), "BAD_HEADER"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}}, b""), "BAD_HEADER"),
    "metadata that is null": (with_header({"__metadata__": None}, b""), "BAD_HEADER"),
    "bytes without a tensor": (raw("{}"), "BAD_HEADER"),
    "offsets past the end": (entry(shape=[4], data_offsets=[0, 16]), "TRUNCATED"),
    "offsets far past the end": (entry(shape=[2**59], data_offsets=[0, 2**61]), "TRUNCATED"),
    "offsets that begin later": (entry(data_offsets=[8, 16]), "BAD_HEADER"),
    "offsets backwards": (entry(data_offsets=[8, 0]), "BAD_HEADER"),
    "negative offsets": (entry(data_offsets=[-8, 0]), "BAD_HEADER"),
    "minus nothing": (raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}'), "BAD_JSON"),
    "offsets in floating point": (raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8.0]}}'), "BAD_HEADER"),
    "offsets with an exponent": (raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8e0]}}'), "BAD_HEADER"),
    "offsets that are true": (entry(data_offsets=[False, 8]), "BAD_HEADER"),
    "offsets as text": (entry(data_offsets=["0", "8"]), "BAD_HEADER"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "BAD_HEADER"),
    "no offsets": (entry(data_offsets=[]), "BAD_HEADER"),
    "offsets of 2^64": (entry(data_offsets=[2**64, 2**64 + 8]), "BAD_HEADER"),
    "a number of 5,000 digits": (raw('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % ("9" * 5000)), "BAD_JSON"),
    "1e999": (raw('{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}'), "BAD_JSON"),
    "a shape that wraps around": (entry(shape=[2**61, 8]), "BAD_HEADER"),
    "a shape whose product is huge": (entry(shape=[2**61] * 8), "BAD_HEADER"),
    "a negative shape": (entry(shape=[-2, -1]), "BAD_HEADER"),
    "a shape of nine dimensions": (entry(shape=[1] * 8 + [2]), "BAD_HEADER"),
    "a shape that is a number": (entry(shape=2), "BAD_HEADER"),
    "another shape than the bytes": (entry(shape=[3]), "BAD_HEADER"),
    "another dtype than the bytes": (entry(dtype="F64"), "BAD_HEADER"),
    "a dtype that is a list": (entry(dtype=["F32"]), "BAD_HEADER"),
    "a dtype in small letters": (entry(dtype="f32"), "BAD_HEADER"),
    "a dtype of a megabyte": (entry(dtype="F" * 2**20), "BAD_HEADER"),
    "an unknown key": (entry(code="import os"), "BAD_HEADER"),
    "no dtype": (with_header({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "BAD_HEADER"),
    "overlapping tensors": (with_header({"a": F, "b": F}, EIGHT), "BAD_HEADER"),
    "tensors that share a byte": (
        with_header({"a": F, "b": F | {"data_offsets": [7, 15]}}, b"\0" * 15),
        "BAD_HEADER",
    ),
    "a gap": (with_header({"a": F, "b": F | {"data_offsets": [9, 17]}}, b"\0" * 17), "BAD_HEADER"),
    "a byte too many": (with_header({"a": F}, EIGHT + b"\0"), "BAD_HEADER"),
    "a byte too few": (with_header({"a": F}, EIGHT[:-1]), "TRUNCATED"),
    "an empty tensor between two bytes": (
        with_header({"a": F, "b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}, EIGHT),
        "BAD_HEADER",
    ),
    "a name of a megabyte that lies": (with_header({"a" * 2**20: F | {"shape": [3]}}, EIGHT), "BAD_HEADER"),
    "a name that writes to terminals": (with_header({"\x1b[2J\u202eevil": F | {"shape": [3]}}, EIGHT), "BAD_HEADER"),
    "deep metadata": (raw('{"__metadata__":' + "[" * 500 + "]" * 500 + "}"), "BAD_JSON"),
    "very deep metadata": (raw('{"__metadata__":' + "[" * 100_000 + "]" * 100_000 + "}"), "BAD_JSON"),
    # other formats under the name of safetensors
    **{f"a pickle of protocol {number}": (pickle.dumps({"a": [1.5] * 50}, number), reason) for number, reason in
       enumerate(["BAD_HEADER", "BAD_HEADER", "PICKLE", "PICKLE", "PICKLE", "PICKLE"])},
    "torch.save": (torch_zip(), "PICKLE"),
    "an empty zip": (b"PK\x05\x06" + b"\0" * 18, "PICKLE"),
    "gzip": (gzip.compress(VALID), "COMPRESSED"),
    "bzip2": (bz2.compress(VALID), "COMPRESSED"),
    "xz": (lzma.compress(VALID), "COMPRESSED"),
    "zstd": (b"\x28\xb5\x2f\xfd" + VALID, "COMPRESSED"),
    "zlib": (zlib.compress(VALID), "BAD_HEADER"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "BAD_HEADER"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "BAD_HEADER"),
    "JSON": (b'{"a": [1, 2, 3], "b": 4}', "BAD_HEADER"),
    "HTML": (b"<html><script>alert(1)</script></html>", "BAD_HEADER"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "MISSING_FILE"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "reason"), LIES.values(), ids=LIES.keys())
def test_lies_are_refused_in_little_time_and_memory(file: bytes, reason: str, tmp_path: Path) -> None:
    began = time.perf_counter()
    refused(reason, lambda: read_header(file, "x.safetensors", max_header_bytes=2**24, max_tensors=100_000))
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    peak = peak_bytes(
        lambda: refused(reason, lambda: read_header(path, "x", max_header_bytes=2**24, max_tensors=100_000))
    )
    assert peak < 4 * len(file) + 200_000
    assert time.perf_counter() - began < 2


def test_the_library_takes_none_of_them_or_we_are_stricter() -> None:
    """Where the safetensors library (0.8) reads what we refuse, it is one of these."""
    stricter = set()
    for name, (file, _) in LIES.items():
        try:
            deserialize(file)
        except SafetensorError:
            continue
        stricter.add(name)
    assert stricter <= {
        "a name twice",
        "metadata that is null",
        "a shape of nine dimensions",
        "an unknown key",
        "an entry that is a number",
    }


BOMBS: dict[str, bytes] = {
    "empty lists": raw('{"a":[' + "[]," * 5_000_000 + "[]]}"),
    "empty objects": raw('{"a":[' + "{}," * 5_000_000 + "{}]}"),
    "numbers": raw('{"a":[' + "1," * 8_000_000 + "1]}"),
    "short texts": raw('{"__metadata__":{"a":[' + '"",' * 5_000_000 + '""]}}'),
    "one long text": raw('{"__metadata__":{"a":"' + "x" * 16_000_000 + '"}}'),
    "one long text in Chinese": raw('{"__metadata__":{"a":"' + "语" * 5_000_000 + '"}}'),
    "one long escaped text": raw('{"__metadata__":{"a":"' + "\\u0001" * 2_700_000 + '"}}'),
    "one long name": raw('{"' + "x" * 16_000_000 + '":1}'),
    "keys": raw('{"a":{' + ",".join(f'"{number:x}":1' for number in range(1_400_000)) + "}}"),
    "spaces": raw("{" + " " * 16_000_000 + "}"),
    "digits": raw('{"a":' + "9" * 16_000_000 + "}"),
    "brackets": raw("{" + '"a":{' * 3_000_000),
}


@pytest.mark.parametrize("file", BOMBS.values(), ids=BOMBS.keys())
def test_headers_of_16_mib_are_refused_in_little_time_and_memory(file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    began = time.process_time()

    def read() -> None:
        with pytest.raises(Rejected) as caught:
            read_header(path, "x", max_header_bytes=2**24, max_tensors=100_000)
        checked(caught.value)

    peak = peak_bytes(read)
    assert peak < 6 * len(file)
    assert time.process_time() - began < 10  # tracemalloc slows it down several times


def test_a_file_of_many_tensors_is_read_within_bounds(tmp_path: Path) -> None:
    count = 100_000
    header = {
        f"t{number}": {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]} for number in range(count)
    }
    path = tmp_path / "x"
    path.write_bytes(with_header(header, b"\0" * count))
    assert len(read_header(path, "x", max_tensors=count).tensors) == count
    refused("TOO_LARGE", lambda: read_header(path, "x", max_tensors=count - 1))


def test_a_huge_claim_on_a_sparse_file_reads_nothing(tmp_path: Path) -> None:
    """4 GiB of nothing: refused by its header, not by reading it."""
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**24) + b"{")
        file.truncate(2**32)
    peak = peak_bytes(lambda: refused("BAD_JSON", lambda: read_header(path, "x", max_header_bytes=2**24)))
    assert peak < 6 * 2**24


# Values


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
    code = pickle.dumps([Evil(str(proof)), b"\xff" * 300], protocol)
    (bad.path / name).write_bytes(code)
    if protocol == 0 and name in ("README.md", "notes"):
        stored = registry.open_snapshot(registry.push(bad.path, "x").digest).files
        assert ("README.md" in stored) and "notes" not in stored
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
    [(b"\x89PNG\r\n\x1a\n", "BAD_TEXT"), (b"\x7fELF\2\1\1\0", "BAD_TEXT"), ("naïve".encode("latin-1"), "BAD_TEXT")]
    + [(b"a\0b", "BAD_TEXT"), (gzip.compress(b"x" * 10**6), "COMPRESSED"), (torch_zip(), "PICKLE")],
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
