"""Versions as messages, and listing them page by page. Reads the registry, so it runs off the event loop."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from adapterbay.registry import AdapterSummary, VersionRecord
from adapterbay.registry.errors import InvalidArgument, NotFound
from adapterbay.server.services.ports import EnginePort
from adapterbay.v1 import adapters_pb2

DEFAULT_PAGE = 100
MAX_PAGE = 1000

Place = tuple[str, int]  # (name, version), the order of every listing


@dataclass(frozen=True, slots=True)
class Listing:
    """Which versions to list. Without `all_versions`: the latest of each name, and those that an alias points at."""

    name_prefix: str = ""
    resident_only: bool = False
    all_versions: bool = False

    @property
    def mark(self) -> str:
        """Ties a page token to the listing that it continues."""
        text = json.dumps([self.name_prefix, self.resident_only, self.all_versions])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_page_size(size: int) -> int:
    """The page size; 0 is the default."""
    if not 0 <= size <= MAX_PAGE:
        raise InvalidArgument(
            f"`page_size` is {size}; it must be 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}.", field="page_size"
        )
    return size or DEFAULT_PAGE


def write_token(listing: Listing, last: Place) -> str:
    """An opaque token for what follows `last`."""
    return base64.urlsafe_b64encode(json.dumps([listing.mark, *last]).encode()).decode()


def read_token(listing: Listing, token: str) -> Place | None:
    """What the page before ended with; None for the first page. Raises InvalidArgument for any other text."""
    if not token:
        return None
    try:
        mark, name, version = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, TypeError, binascii.Error) as error:
        raise InvalidArgument("`page_token` is not a token of this server.", field="page_token") from error
    if mark != listing.mark or not isinstance(name, str) or not isinstance(version, int):
        raise InvalidArgument("`page_token` belongs to a listing with other filters.", field="page_token")
    return name, version


class Catalog:
    """The registry with what of it is in memory, as messages."""

    def __init__(self, engine: EnginePort) -> None:
        self._engine = engine
        self._registry = engine.adapters.registry

    def page(self, listing: Listing, after: Place | None, size: int) -> tuple[list[adapters_pb2.Adapter], Place | None]:
        """One page, and where it ended if more follows."""
        page: list[VersionRecord] = []
        for record in self._records(listing, after):
            if len(page) == size:
                return [self.message(entry) for entry in page], (page[-1].name, page[-1].version)
            page.append(record)
        return [self.message(entry) for entry in page], None

    def all(self, listing: Listing) -> list[adapters_pb2.Adapter]:
        """Everything that matches."""
        return [self.message(record) for record in self._records(listing, None)]

    def find(self, name: str, version: int) -> adapters_pb2.Adapter:
        """One version; only its place if it was deleted meanwhile."""
        try:
            return self.message(self._registry.version(name, version))
        except NotFound:
            return adapters_pb2.Adapter(name=name, version=version)

    def with_digest(self, digest: str) -> list[adapters_pb2.Adapter]:
        """The versions that have a digest: the same content may have been pushed under several names."""
        return [self.find(*place) for place in self._registry.places(digest)]

    def manifest_json(self, digest: str) -> str:
        """The canonical JSON that the digest was computed over."""
        return self._registry.manifest(digest).to_bytes().decode()

    def message(self, record: VersionRecord) -> adapters_pb2.Adapter:
        """A version as it is in the registry, with where its weights are now."""
        residency = self._engine.adapters.residency(record.digest)
        created_at = Timestamp()
        created_at.FromDatetime(record.created_at)
        return adapters_pb2.Adapter(
            name=record.name,
            version=record.version,
            digest=record.digest,
            aliases=record.aliases,
            task=record.task,
            method=record.peft_type,
            rank=record.rank,
            labels=record.labels,
            base_reference=record.base_reference,
            base_fingerprint=record.base_fingerprint,
            size_bytes=record.size_bytes,
            created_at=created_at,
            servable=record.base_fingerprint == self._engine.base.fingerprint,
            residency=adapters_pb2.Residency.Value(f"RESIDENCY_{residency.state.name}"),
            resident_bytes=residency.bytes,
            pinned=residency.pinned,
            active_rows=residency.active_rows,
        )

    def _records(self, listing: Listing, after: Place | None) -> Iterator[VersionRecord]:
        """What the listing has after a place, by name and then by version."""
        resident = set(self._engine.adapters.resident()) if listing.resident_only else None
        for summary in self._registry.adapters(listing.name_prefix):
            if after is not None and summary.name < after[0]:
                continue
            for record in self._versions(summary, listing.all_versions):
                if after is not None and (record.name, record.version) <= after:
                    continue
                if resident is None or record.digest in resident:
                    yield record

    def _versions(self, summary: AdapterSummary, everyone: bool) -> list[VersionRecord]:
        if not everyone and set(summary.alias_versions.values()) <= {summary.version}:
            return [summary]  # the summary is the latest version's record: no need to ask again
        versions = self._registry.versions(summary.name)
        return [record for record in versions if everyone or record.aliases or record.version == summary.version]
