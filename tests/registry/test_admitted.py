"""What is admitted, and what it is found to be."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from registry_tools import Draft, Tensors, Tiny
from safetensors.numpy import load_file

from adapterbay.registry import Registry, admit, locate

Spoil = Callable[[Draft], Any]
DraftOf = Callable[[Tiny], Draft]


def tensors(change: Callable[[Tensors], Any]) -> Spoil:
    return lambda draft: draft.edit_tensors(change)


def zero(part: str) -> Spoil:
    def change(found: Tensors) -> None:
        for key in found:
            if part in key:
                found[key][:] = -0.0

    return tensors(change)


def test_what_a_good_adapter_is(llama: Tiny, gpt2: Tiny, bert: Tiny) -> None:
    def report(tiny: Tiny) -> Any:
        base = locate(str(tiny.base))
        files: dict[str, Path | bytes] = {file.name: file for file in tiny.adapter.iterdir()}
        return admit(files, base.tensor_shapes(), base_config=base.config)

    found = report(llama)
    assert found.rank == 4
    assert found.head is None
    assert {module.scaling for module in found.modules} == {2.0}
    down = next(module for module in found.modules if module.name.endswith("0.mlp.down_proj"))
    assert (down.in_features, down.out_features, down.transposed) == (48, 32, False)
    assert found.parameters == sum(
        tensor.size for tensor in load_file(llama.adapter / "adapter_model.safetensors").values()
    )

    found = report(gpt2)
    assert found.rank == 6
    assert (found.head.name, found.head.labels, found.head.has_bias) == ("score", 3, False)
    attention = next(module for module in found.modules if module.name == "transformer.h.0.attn.c_attn")
    assert (attention.in_features, attention.out_features, attention.transposed) == (32, 96, True)
    assert {module.rank for module in found.modules if "attn.c_proj" in module.name} == {6}

    found = report(bert)
    assert (found.head.name, found.head.labels, found.head.has_bias) == ("classifier", 2, True)
    names = {module.name: module.base_name for module in found.modules}
    assert names["bert.encoder.layer.1.attention.self.query"] == "encoder.layer.1.attention.self.query"
    assert {round(module.scaling, 9) for module in found.modules} == {4.0}


def test_only_some_modules_idle_is_a_finding(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    half = draft(llama)
    zero("0.self_attn.q_proj.lora_B")(half)
    receipt = registry.push(half.path, "x")
    assert any(finding.startswith("1 of 6 modules change nothing") for finding in receipt.findings)


def test_a_head_alone_is_an_effect(gpt2: Tiny, draft: DraftOf, registry: Registry) -> None:
    idle = draft(gpt2)
    zero("lora_B")(idle)
    assert registry.push(idle.path, "x").manifest.task == "sequence-classification"


def test_what_trainers_and_downloads_leave_beside_is_left_out(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    full = draft(llama)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (full.path / name).write_bytes(pickle.dumps({}))
    (full.path / "tokenizer.json").write_text("{}")
    (full.path / ".gitattributes").write_text("")
    (full.path / "checkpoint-5").mkdir()
    (full.path / "checkpoint-5" / "optimizer.pt").write_bytes(b"")
    plain, receipt = registry.push(llama.adapter, "x"), registry.push(full.path, "x")
    assert receipt.digest == plain.digest
    assert "left out: .gitattributes, checkpoint-5/, optimizer.pt, rng_state.pth" in receipt.findings[-1]


def test_a_folder_of_the_hub_cache(llama: Tiny, tmp_path: Path, registry: Registry) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / ("1" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(llama.adapter.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert registry.push(snapshot, "x").digest == registry.push(llama.adapter, "x").digest
