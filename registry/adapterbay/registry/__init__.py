"""Versions of adapters, content-addressed, with movable names; and the bases they belong to. Without torch."""

from __future__ import annotations

from adapterbay.registry.admission import Admission, AdmissionReport, Limits, admit
from adapterbay.registry.base import BaseFiles, BaseReference, default_base, home, locate
from adapterbay.registry.local.store import Registry
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.reference import HubReference, Reference, parse_reference
from adapterbay.registry.views import (
    ANY,
    AdapterSummary,
    AliasMove,
    Problem,
    PushReceipt,
    RegistryEvent,
    Resolved,
    Snapshot,
    VerifyReport,
    VersionRecord,
)

__all__ = [
    "ANY",
    "AdapterSummary",
    "Admission",
    "AdmissionReport",
    "AliasMove",
    "BaseFiles",
    "BaseReference",
    "HubReference",
    "Limits",
    "Manifest",
    "Problem",
    "PushReceipt",
    "Reference",
    "Registry",
    "RegistryEvent",
    "Resolved",
    "Snapshot",
    "VerifyReport",
    "VersionRecord",
    "admit",
    "default_base",
    "home",
    "locate",
    "parse_reference",
]
