"""What an adapter is but for its values. Fine-tunes of one base with the same settings share it, and so does the same
adapter when it comes again: to read it off settings and header takes longer than to look at all values.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from adapterbay.registry.admission.methods import Method, Settings
from adapterbay.registry.admission.report import AdmissionReport, Matched
from adapterbay.registry.admission.safetensors_file import Header, Source, open_source
from adapterbay.registry.manifest import WEIGHTS_FILE

MOST_BYTES: Final = 2 << 20
"""Of headers and settings, in all: Python takes some ten times as much for what they say."""


@dataclass(frozen=True, slots=True)
class Structure:
    """An adapter's settings and header, understood and matched with a base. Nothing of it may be changed."""

    method: Method
    settings: Settings
    header: Header
    matched: Matched
    report: AdmissionReport  # but for what values tell


@dataclass(frozen=True, slots=True)
class StructureKey:
    """What decides a structure, beside base and limits: the bytes of settings and header, and the size of the file."""

    settings: bytes  # their SHA-256
    header: bytes
    file_bytes: int
    size: int  # of settings and header

    @classmethod
    def of(cls, settings: bytes, weights: Source, file_bytes: int) -> StructureKey | None:
        """None where the header is too long to be kept, or there is none."""
        with open_source(weights, WEIGHTS_FILE) as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or len(settings) + length > MOST_BYTES:
                return None
            header = prefix + file.read(length)
        digests = hashlib.sha256(settings).digest(), hashlib.sha256(header).digest()
        return cls(*digests, file_bytes, len(settings) + len(header))


class Structures:
    """Structures on one base within the same limits, the last ones that were asked for. Thread-safe."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._known: OrderedDict[StructureKey, Structure] = OrderedDict()

    def find(self, key: StructureKey) -> Structure | None:
        """What is known under a key."""
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
            return found

    def keep(self, key: StructureKey, structure: Structure) -> None:
        """Keeps one, and lets go of those that were not asked for longest."""
        with self._lock:
            if key not in self._known:
                self._bytes += key.size
            self._known[key] = structure
            while self._bytes > self._most:
                self._bytes -= self._known.popitem(last=False)[0].size
