"""The same verbs where versions lie on a hub: a real `registry serve`, by the real client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_tools import deltas
from hub_tools import serving
from huggingface_hub import ModelCard, hf_hub_download
from tiny import make_adapter, peft_model

from adapterbay.registry import Registry
from adapterbay.registry.backend import Backend
from adapterbay.registry.diff import diff_versions
from adapterbay.registry.fusing import FusionSettings, fuse_versions, parse_weighted, read_part
from adapterbay.registry.hub.backend import HubRegistry
from adapterbay.registry.lineage import lineage
from adapterbay.registry.lineage_text import tree_lines


@pytest.fixture
def endpoint(bases: dict[str, Path], tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path / "store", bases["llama"]) as running:
        yield running.endpoint


@pytest.fixture
def hub(endpoint: str, tmp_path: Path) -> HubRegistry:
    return HubRegistry("hub:team", endpoint=endpoint, cache=tmp_path / "cache")


@pytest.fixture
def folders(bases: dict[str, Path], tmp_path: Path) -> list[Path]:
    return [
        make_adapter(bases["llama"], tmp_path / name, targets=["q_proj"], rank=4, seed=index)
        for index, name in enumerate("ab")
    ]


def test_fusing_across_registries(
    hub: HubRegistry, registry: Registry, folders: list[Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    base = f"folder:{bases['llama']}"
    there = hub.push(folders[0], "team/a", base=base)
    here = registry.push(folders[1], "b", base=base)
    places: list[tuple[Backend, str]] = [(hub, "team/a@1:0.5"), (registry, "b:2")]
    parts = [read_part(place, parse_weighted(text)) for place, text in places]
    receipts = [
        fuse_versions(target, name, parts, FusionSettings("cat")) for target, name in ((hub, "team/f"), (registry, "f"))
    ]
    assert {receipt.digest for receipt in receipts} == {receipts[0].digest}
    assert receipts[0].manifest.parents == (there.digest, here.digest)
    ours = deltas(peft_model(bases["llama"], hub.pull("team/f@1", tmp_path / "pulled")), "default")
    one, two = (deltas(peft_model(bases["llama"], folder), "default") for folder in folders)
    for name, delta in ours.items():
        assert delta.allclose(0.5 * one[name] + 2 * two[name], atol=1e-6)
    found = diff_versions(hub.snapshot("team/f"), registry.snapshot("f"))
    assert found.a == found.b
    assert found.overall.distance == 0.0


def test_lineage_on_the_hub(hub: HubRegistry, folders: list[Path], bases: dict[str, Path]) -> None:
    """Of parents in the same repository the number is known, of others the digest."""
    base = f"folder:{bases['llama']}"
    first = hub.push(folders[0], "team/a", base=base)
    other = "sha256:" + "9" * 64
    hub.push(folders[1], "team/a", base=base, parents=[first.digest, other])
    graph = lineage(hub, "team/a@2")
    assert [(node.kind, node.title) for node in graph.nodes if node.kind != "base"] == [
        ("version", "team/a@2"),
        ("unknown", "team/a@1"),
        ("unknown", "sha256:999999999999…"),
    ]
    lines = tree_lines(graph)
    assert lines[-2].endswith("(its manifest was not read)")
    assert lines[-1].endswith("(it is not in this repository)")


def test_the_card_of_a_repository(
    hub: HubRegistry, endpoint: str, folders: list[Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT's card with its local path was replaced; the Hub's own client reads ours."""
    assert str(bases["llama"]) in (folders[0] / "README.md").read_text()
    hub.push(folders[0], "team/a", base=f"folder:{bases['llama']}")
    file = hf_hub_download(
        "team/a", "README.md", revision="v1", endpoint=endpoint, token=False, cache_dir=tmp_path / "plain"
    )
    card = ModelCard.load(file)
    assert card.data.library_name == "peft"
    assert "base_model" not in card.data.to_dict()
    assert str(bases["llama"].parent) not in card.content
