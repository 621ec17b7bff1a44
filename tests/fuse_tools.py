"""What tests of fusions share: adapters of one base in a registry, fused by us and by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny import VOCABULARY, load_reference, make_adapter, peft_model

from adapterbay.registry import PushReceipt, Registry
from adapterbay.registry.fusing import FusionSettings, fuse_versions, parse_weighted, read_part

FUSION_TARGETS = {
    "llama": (["q_proj", "v_proj"], ["q_proj", "down_proj"]),
    "gpt2": (["c_attn", "c_fc"], ["c_attn", "mlp.c_proj"]),
}
"""Two sets of modules that share some of their layers."""


class Bench:
    """A base, its registry, and adapters of it."""

    def __init__(self, base: Path, registry: Registry, root: Path) -> None:
        self.base = base
        self.registry = registry
        self.root = root
        self.folders: dict[str, Path] = {}

    def add(self, name: str, training: dict[str, Any] | None = None, **settings: Any) -> Path:
        folder = make_adapter(self.base, self.root / name, **{"seed": len(self.folders), "rank": 4, **settings})
        if training is not None:
            (folder / "training.json").write_text(json.dumps(training))
        self.registry.push(folder, name, base=f"folder:{self.base}", labels=settings.get("labels"))
        self.folders[name] = folder
        return folder

    def fuse(self, parts: Sequence[str], settings: FusionSettings, out: str = "out", **options: Any) -> PushReceipt:
        found = [read_part(self.registry, parse_weighted(part)) for part in parts]
        return fuse_versions(self.registry, out, found, settings, **options)

    def by_hand(self, weights: Sequence[float], settings: FusionSettings, **options: Any) -> Any:
        """What a user of PEFT does: load, load, add_weighted_adapter, set_adapter."""
        names = list(self.folders)
        model = PeftModel.from_pretrained(load_reference(self.base), self.folders[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(self.folders[name], adapter_name=name)
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        model.add_weighted_adapter(
            names,
            list(weights),
            "fused",
            combination_type=settings.method,
            svd_rank=settings.rank,
            density=settings.density,
            majority_sign_method=settings.majority_sign or "total",
            **options,
        )
        model.set_adapter("fused")
        return model.eval()

    def pulled(self, receipt: PushReceipt) -> Path:
        return self.registry.pull(f"{receipt.name}@{receipt.version}", self.root / f"pulled-{receipt.version}")

    def logits(self, receipt: PushReceipt, task: str = "CAUSAL_LM", **settings: Any) -> torch.Tensor:
        """Of the pulled folder, the way a user of plain PEFT loads it."""
        return logits(peft_model(self.base, self.pulled(receipt), task, **settings))


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(5)
    ids = torch.randint(6, VOCABULARY, (3, 12))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double()


def deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: module.get_delta_weight(adapter)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
