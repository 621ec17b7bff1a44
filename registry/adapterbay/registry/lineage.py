"""What a version was made from: its base, its data, its settings, and its parents with all of theirs.

    graph = lineage(registry, "team/sentiment@champion")

Everything is read from manifests. A parent is known by its digest alone; one that is not in this registry is shown as
unknown, with the digest to look for elsewhere. A manifest holds its parents' digests, so no version can be its own
ancestor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from adapterbay.registry.backend import Backend
from adapterbay.registry.digest import is_digest
from adapterbay.registry.errors import NotFound
from adapterbay.registry.local.reading import Reader
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.markdown import plain_text, without_private_path

MAX_VERSIONS: Final = 300
"""Versions that one graph holds; ancestors beyond it are shown as not followed."""

NodeKind = Literal["version", "unknown", "base", "data"]
EdgeKind = Literal["parent", "base", "data"]


@dataclass(frozen=True, slots=True)
class LineageNode:
    """A version, a parent that is not here, a base or a set of training data. `details` are its facts as JSON.

    `id` is the digest of a version; a base has `base:` and its fingerprint, data `data:` and its digest.
    """

    id: str
    kind: NodeKind
    title: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LineageEdge:
    """`target` was made from `source`. `weight` is the parent's in a fusion."""

    source: str
    target: str
    kind: EdgeKind
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Lineage:
    """The graph above one version, and what was made directly from it (name, version, digest), if that is known."""

    root: str
    nodes: tuple[LineageNode, ...]
    edges: tuple[LineageEdge, ...]
    children: tuple[tuple[str, int, str], ...] = ()

    def node(self, id: str) -> LineageNode:
        """The node with this id. Raises KeyError."""
        for found in self.nodes:
            if found.id == id:
                return found
        raise KeyError(id)

    def above(self, id: str, kind: EdgeKind) -> list[tuple[LineageNode, LineageEdge]]:
        """What a node was made from, of one kind, in the order in which it is recorded."""
        return [(self.node(edge.source), edge) for edge in self.edges if edge.target == id and edge.kind == kind]


def lineage(registry: Backend, reference: str) -> Lineage:
    """The lineage of what `reference` means now. Raises NotFound, InvalidReference or Corrupted."""
    resolved = registry.resolve(reference)
    builder = _Builder(registry, resolved.name)
    builder.titles[resolved.digest] = f"{resolved.name}@{resolved.version}"
    if isinstance(registry, Reader):
        root = registry.manifest(resolved.digest)
        children = tuple(registry.children(resolved.digest))
    else:
        root = registry.snapshot(reference).manifest
        children = ()
    builder.add(root)
    return Lineage(root.digest, tuple(builder.nodes.values()), tuple(builder.edges), children)


def recorded_parents(training: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The digests that a training record names as `parents`, each once, in order; what is no digest is left out."""
    found = (training or {}).get("parents")
    named = found if isinstance(found, list) else []
    return tuple(dict.fromkeys(item for item in named if isinstance(item, str) and is_digest(item)))


class _Builder:
    """Collects the graph, breadth first."""

    def __init__(self, registry: Backend, name: str) -> None:
        self._registry = registry
        self._name = name
        self._numbers: dict[str, int] | None = None
        self.nodes: dict[str, LineageNode] = {}
        self.edges: list[LineageEdge] = []
        self.titles: dict[str, str] = {}

    def add(self, root: Manifest) -> None:
        """`root` and all of its ancestors, until MAX_VERSIONS."""
        waiting = [root]
        self._add_version(root)
        versions = 1
        while waiting:
            manifest = waiting.pop(0)
            for parent, weight in _parents(manifest):
                self.edges.append(LineageEdge(parent, manifest.digest, "parent", weight))
                if parent in self.nodes:
                    continue
                versions += 1
                found = self._read(parent) if versions <= MAX_VERSIONS else "its ancestors were not followed"
                if isinstance(found, str):
                    self._add_unknown(parent, found)
                else:
                    self._add_version(found)
                    waiting.append(found)

    def _read(self, digest: str) -> Manifest | str:
        """The manifest, or why there is none here."""
        if not isinstance(self._registry, Reader):
            return "it is not in this repository" if self._number(digest) is None else "its manifest was not read"
        try:
            return self._registry.manifest(digest)
        except NotFound as error:
            deleted = " was deleted" in error.message
            return error.message if deleted else "it is not in this registry"

    def _title(self, digest: str) -> str:
        """Where the content is found here; the digest's beginning if it is not."""
        if digest in self.titles:
            return self.titles[digest]
        if isinstance(self._registry, Reader):
            places = self._registry.places(digest)
            if places:
                name, version = places[0]
                return f"{name}@{version}"
        elif (number := self._number(digest)) is not None:
            return f"{self._name}@{number}"
        return short(digest)

    def _number(self, digest: str) -> int | None:
        if self._numbers is None:
            self._numbers = {record.digest: record.version for record in self._registry.versions(self._name)}
        return self._numbers.get(digest)

    def _add_unknown(self, digest: str, why: str) -> None:
        self.nodes[digest] = LineageNode(digest, "unknown", self._title(digest), {"digest": digest, "why": why})

    def _add_version(self, manifest: Manifest) -> None:
        digest = manifest.digest
        self.nodes[digest] = LineageNode(digest, "version", self._title(digest), _version_details(manifest))
        base = f"base:{manifest.base_fingerprint}"
        if base not in self.nodes:
            reference = manifest.base_reference
            facts = {"reference": reference, "fingerprint": manifest.base_fingerprint}
            self.nodes[base] = LineageNode(base, "base", _base_title(reference), facts)
        self.edges.append(LineageEdge(base, digest, "base"))
        data = _data_details(manifest.training or {})
        if data:
            key = f"data:{data.get('digest') or data.get('source')}"
            title = without_private_path(str(data.get("source") or short(str(data.get("digest")))))
            self.nodes.setdefault(key, LineageNode(key, "data", title, data))
            self.edges.append(LineageEdge(key, digest, "data"))


def _base_title(reference: str) -> str:
    """A base as it is named, a commit by its first ten digits."""
    return re.sub(r"(@[0-9a-f]{10})[0-9a-f]{30}", r"\1", without_private_path(reference))


def short(digest: str) -> str:
    """The first twelve digits of a digest, for people."""
    return f"{digest[:19]}…" if is_digest(digest) else plain_text(digest, 24)


def _parents(manifest: Manifest) -> list[tuple[str, float | None]]:
    """The parents with their weights in a fusion, each once."""
    parents = tuple(dict.fromkeys(manifest.parents)) or recorded_parents(manifest.training)
    fusion = (manifest.training or {}).get("fusion")
    weights: dict[str, float] = {}
    if isinstance(fusion, Mapping):
        names, values = fusion.get("parents"), fusion.get("weights")
        if isinstance(names, list) and isinstance(values, list) and len(names) == len(values):
            weights = {
                str(name): float(value)
                for name, value in zip(names, values, strict=True)
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
    return [(parent, weights.get(parent)) for parent in parents]


def _version_details(manifest: Manifest) -> dict[str, Any]:
    training = manifest.training or {}
    config = manifest.peft_config
    facts: dict[str, Any] = {
        "digest": manifest.digest,
        "task": manifest.task,
        "method": manifest.peft_type,
        "rank": manifest.rank,
        "alpha": config.get("lora_alpha"),
        "labels": list(manifest.labels),
        "libraries": dict(manifest.library_versions),
    }
    for key in ("fusion", "seed", "settings", "metrics", "code_version"):
        if key in training:
            facts[key] = training[key]
    return facts


def _data_details(training: Mapping[str, Any]) -> dict[str, Any]:
    data = training.get("data")
    if not isinstance(data, Mapping):
        return {}
    kept = {key: data[key] for key in ("source", "digest", "train_rows", "eval_rows", "revision") if key in data}
    return kept if isinstance(kept.get("source"), str) or isinstance(kept.get("digest"), str) else {}
