"""What tests with hostile input share: safetensors files with any header, refusals, and settings for fuzzing."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from adapterbay.registry import admit
from adapterbay.registry.admission.candidate import Candidate, Wishes, examine
from adapterbay.registry.admission.folder import PeftFolder, read_folder
from adapterbay.registry.base import BaseFiles
from adapterbay.registry.digest import digest_file
from adapterbay.registry.errors import AdapterbayError, Rejected
from adapterbay.registry.local.blobs import Staged
from adapterbay.registry.manifest import is_plain

FACTOR = float(os.environ.get("ADAPTERBAY_FUZZ", "0"))
"""Set it to fuzz at random, with so many times the examples; unset, the examples are always the same."""


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=int(examples * (FACTOR or 1)),
        derandomize=not FACTOR,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
    )


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=10,
)  # fmt: skip
"""Any JSON."""


def with_header(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a valid safetensors file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def torch_zip() -> bytes:
    """What torch.save writes: a zip with a pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


def refused(reason: str, call: Callable[[], Any]) -> Rejected:
    with pytest.raises(Rejected) as caught:
        call()
    assert caught.value.reason == reason, caught.value
    checked(caught.value)
    return caught.value


def checked(error: AdapterbayError) -> None:
    """An error is one readable piece of text, however hostile what it speaks of."""
    assert 20 < len(error.message) < 5000
    assert is_plain(error.message), error.message
    assert all(len(value) < 3000 for value in error.metadata.values())


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that Python and numpy had allocated at once while `call` ran."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def files_of(folder: Path) -> dict[str, Path | bytes]:
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}


def look(folder: Path, **wishes: Any) -> Candidate:
    """What a push would find in a folder, without storing anything."""
    found = read_folder(folder)
    return examine(found, unstaged(found), Wishes(**wishes))


def unstaged(folder: PeftFolder) -> dict[str, Staged]:
    """The files of a folder as if they were staged, where they lie."""
    return {
        name: Staged(path, digest_file(path), path.stat().st_size, stored=False) for name, path in folder.files.items()
    }


def agrees_with_peft(model: Any, folder: Path, base: BaseFiles) -> None:
    """Plain PEFT loads the folder, with the ranks and factors that admission found."""
    from peft import PeftModel

    report = admit(files_of(folder), base.tensor_shapes(), base_config=base.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): layer
        for name, layer in loaded.named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }
    assert {module.name for module in report.modules} <= layers.keys()
    for module in report.modules:
        layer = layers[module.name]
        assert layer.r["default"] == module.rank
        assert layer.scaling["default"] == pytest.approx(module.scaling)
        assert type(layer).__name__ == "Linear"
        assert not layer.lora_variant
