"""What an adapter is said to take on the device is what its stores hold of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_zoo
import pytest
import torch
from engine_tools import Harness
from tiny import make_base
from torch import Tensor

from adapterbay.registry import Registry
from adapterbay.server.adapters.device import device_bytes
from adapterbay.server.mix.linear import Dense, LinearSite
from adapterbay.server.mix.pools import RankPool
from adapterbay.server.mix.sites import Sites

NAMES = (
    "lora", "dora", "lora_bias", "lora_embedding", "lora_tokens", "ia3", "oft", "road", "loha", "ln_tuning",
    "trainable_tokens", "beft", "adaption_prompt", "prompt_tuning",
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_a_form_are_those_of_what_is_placed(dtype: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", layers=2)
    registry = Registry.open(tmp_path / "registry")
    for name in NAMES:
        registry.push(peft_zoo.make(base, tmp_path / name, name), name, base=f"folder:{base}")
    for name in ("oft", "hira", "tinylora"):
        folder = peft_zoo.make(base, tmp_path / f"{name}_table", name, settings={"target_modules": ["embed_tokens"]})
        registry.push(folder, f"{name}_table", base=f"folder:{base}")
    for name, through, targets in (("behind", False, ("down_proj",)), ("through", True, ("norm",))):
        folder = peft_zoo.make_bottleneck(base, tmp_path / name, targets, norm=True, settings={"through_norm": through})
        registry.push(folder, name, base=f"folder:{base}")
    names = (*NAMES, "oft_table", "hira_table", "tinylora_table", "behind", "through")
    with Harness(base, registry, dtype=dtype) as harness:
        adapters, sites = harness.engine.adapters, harness.engine._device._sites
        harness.load(*names)
        wrong = {}
        for name in names:
            form = adapters.memory.form(adapters.resolve(name).digest)
            assert form is not None
            sites.place("key", form)
            held = sum(tensor.nbytes for tensor in placed(sites, "key"))
            told = device_bytes(form, sites)
            sites.remove("key", form)
            if told != held or (not told and name != "prompt_tuning"):
                wrong[name] = (told, held)
            assert not list(placed(sites, "key"))
        assert not wrong


def placed(sites: Sites, key: str) -> Iterator[Tensor]:
    """Every tensor that a store of `sites` holds for one adapter."""
    for layer in sites.linears.values():
        if layer.site is not None:
            yield from of_layer(layer.site, key)
    for table in sites.tables.values():
        yield from tensors_of(table._own.get(key))
    for path, norm in sites._mixed_norms.items():
        mine = norm._own.get(key)
        theirs = {id(p) for p in sites.norms[path].parameters()}
        yield from (tensor for tensor in tensors_of(mine) if id(tensor) not in theirs)
    if sites.prompts is not None:
        for prompts in sites.prompts._layers.values():
            yield from tensors_of(prompts.get(key))


def of_layer(site: LinearSite, key: str) -> Iterator[Tensor]:
    for pool in (site.pool, site.in_scales, site.out_scales, site.biases):
        span = pool.spans.get(key)
        if span is not None:
            rows = slice(span.start, span.start + span.rank)
            yield from (pool.a[rows], pool.b[rows]) if isinstance(pool, RankPool) else (pool.rows[rows],)
    for store in (site.rotations, site.turns, site.dense, site.bottlenecks):
        yield from tensors_of(store.get(key))  # type: ignore[attr-defined]


def tensors_of(thing: Any) -> Iterator[Tensor]:
    """All tensors in an object's attributes, whatever it calls them."""
    if isinstance(thing, Dense):
        yield thing._delta.to_dense() if thing._delta.is_mkldnn else thing._delta
    elif isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_of(value)
    elif isinstance(thing, torch.nn.Module):
        yield from thing.parameters()
    elif hasattr(thing, "__dict__") or hasattr(thing, "__slots__"):
        names = (*getattr(thing, "__slots__", ()), *getattr(thing, "__dict__", ()))
        for name in names:
            if name != "_form":  # what a bottleneck was placed from
                yield from tensors_of(getattr(thing, name))
