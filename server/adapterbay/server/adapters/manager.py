"""The engine's adapters: what the registry has, what of it is in memory, and what is fused from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from typing import Any

from adapterbay.registry import Registry, Resolved
from adapterbay.registry.errors import AdapterbayError, BaseMismatch, UnsupportedMethod
from adapterbay.registry.manifest import FileEntry, Manifest
from adapterbay.server.adapters.build import build_form
from adapterbay.server.adapters.claims import Claim
from adapterbay.server.adapters.events import AdapterEvent
from adapterbay.server.adapters.finite import check_finite
from adapterbay.server.adapters.forms import ServingForm
from adapterbay.server.adapters.fusing import fuse_forms
from adapterbay.server.adapters.memory import HostMemory
from adapterbay.server.adapters.residency import Residency, ResidencyInfo, Resident
from adapterbay.server.config import ServerConfig
from adapterbay.server.model import ServingModel
from adapterbay.server.requests import ArmSpec
from adapterbay.server.trust import trusted_keys

FUSED_RECIPES = 1024
"""When so many ways to fuse are known, those that are not in memory are forgotten."""


class AdapterManager:
    """The engine's adapters: what the registry has, and what of it is in memory. Thread-safe."""

    def __init__(
        self,
        registry: Registry,
        model: ServingModel,
        config: ServerConfig,
        *,
        vacate: Callable[[Any], None],
        wake: Callable[[], None],
    ) -> None:
        self.registry = registry
        self._model = model
        self._trust = trusted_keys(config)
        self._fusing = threading.Lock()
        self._fused: dict[str, ArmSpec] = {}  # by digest, how each derived adapter is made
        self._most_fused = FUSED_RECIPES
        self.manifest = lru_cache(maxsize=4096)(registry.manifest)
        self._header_bytes = lru_cache(maxsize=4096)(partial(_header_bytes, registry))
        self.memory = HostMemory(
            self._load,
            self._size_of,
            budget_bytes=config.host_bytes,
            threads=config.load_threads,
            vacate=vacate,
            wake=wake,
        )

    def resolve(self, reference: str) -> Resolved:
        """What a reference means now; see `Registry.resolve`."""
        return self.registry.resolve(reference)

    def resolve_at_once(self, reference: str) -> Resolved | None:
        """See `Registry.resolve_at_once`."""
        return self.registry.resolve_at_once(reference)

    def load(self, digest: str) -> Future[float]:
        """Begins to load; see `HostMemory.load`."""
        self.check_base(digest)
        return self.memory.load(digest)

    def hold(self, digest: str, arm: ArmSpec, claim: Claim) -> Resident:
        """What computes a row of `arm` under this digest, one of its key's; see `HostMemory.hold`."""
        if arm.fusion is None:
            return self.memory.hold(digest, claim)
        for part in arm.parts:
            self._size_of(part.digest)  # files are looked at before others have to wait; the sizes are kept
        with self._fusing:
            self._fused[digest] = arm
            resident = self.memory.hold(digest, claim)
            if len(self._fused) > self._most_fused:
                self._forget()
            return resident

    def unload(self, digest: str) -> Future[int]:
        """Gives memory back, that of everything fused from the adapter too; see `HostMemory.unload`."""
        freed = [self.memory.unload(digest)]
        with self._fusing:
            fused = [key for key, arm in self._fused.items() if any(part.digest == digest for part in arm.parts)]
        freed.extend(self.memory.unload(key) for key in fused)
        return freed[0] if len(freed) == 1 else _sum_of(freed)

    def pin(self, digest: str, pinned: bool) -> None:
        """Keeps in memory, or lets go; see `HostMemory.pin`."""
        if pinned:
            self.check_base(digest)
        self.memory.pin(digest, pinned)

    def residency(self, digest: str) -> ResidencyInfo:
        """What of a digest is in memory."""
        return self.memory.residency(digest)

    def resident(self) -> tuple[str, ...]:
        """The digests in memory."""
        return self.memory.resident()

    def subscribe(self, listener: Callable[[AdapterEvent], None]) -> Callable[[], None]:
        """Tells of loads and unloads; see `Listeners.subscribe`."""
        return self.memory.listeners.subscribe(listener)

    def servable(self, digest: str) -> bool:
        """Whether the adapter was made for the base at hand."""
        return self.manifest(digest).base_fingerprint == self._model.base.info.fingerprint

    def check_base(self, digest: str) -> Manifest:
        """The manifest. Raises BaseMismatch for an adapter of another base."""
        manifest = self.manifest(digest)
        ours = self._model.base.info.fingerprint
        if manifest.base_fingerprint != ours:
            mismatch = BaseMismatch(
                f"The adapter was trained on base {manifest.base_reference} ({manifest.base_fingerprint}); this server "
                f"holds {self._model.base.info.reference} ({ours}). Name one of its adapters, or start a server with "
                f"--base {manifest.base_reference}.",
                expected=ours,
                actual=manifest.base_fingerprint,
            )
            mismatch.metadata["adapter_digest"] = digest
            raise mismatch
        return manifest

    def _size_of(self, digest: str) -> int:
        arm = self._fused.get(digest)
        if arm is not None:
            return sum(self._size_of(part.digest) for part in arm.parts)
        files = self.manifest(digest).files
        return sum(self._tensor_bytes(file) for file in files if file.path.endswith(".safetensors"))

    def _tensor_bytes(self, file: FileEntry) -> int:
        """A file without its header, which may be larger than the tensors of a small adapter."""
        try:
            header = self._header_bytes(file.digest)
        except OSError:  # the load will say so
            header = 0
        return file.size - header if header < file.size else file.size

    def _load(self, digest: str) -> ServingForm:
        """On a loading thread. Parts that are not in memory are read for the fusion alone: a loading thread that waited
        for others to load them could wait for ever."""
        arm = self._fused.get(digest)
        if arm is None:
            return self._read(digest)
        fused = fuse_forms(arm, [self.memory.form(part.digest) or self._read(part.digest) for part in arm.parts])
        check_finite(fused, self._model.dtype)
        return fused

    def _forget(self) -> None:
        """Drops the recipes of what is neither in memory nor on its way."""
        for digest in list(self._fused):
            found = self.memory.residency(digest)
            if found.state is Residency.REGISTRY and not found.active_rows:
                del self._fused[digest]
        self._most_fused = max(FUSED_RECIPES, 2 * len(self._fused))

    def _read(self, digest: str) -> ServingForm:
        """Errors hold the digest: of a fusion's parts it may be any."""
        try:
            return self._form(digest)
        except AdapterbayError as error:
            error.metadata.setdefault("adapter_digest", digest)
            raise

    def _form(self, digest: str) -> ServingForm:
        manifest = self.check_base(digest)
        if self._trust is not None:
            snapshot = self.registry.open_snapshot(digest)
            self._trust.check(snapshot, snapshot.signature)
        contents = self.registry.contents(manifest)
        intact = self.memory.meanwhile(contents.verify)
        try:
            form = build_form(manifest, contents.files, self._model)
        finally:
            intact()  # files that were altered are told as that, whatever else is wrong with them
        if self._model.seq2seq is not None and form.invocation is not None:
            raise UnsupportedMethod(
                "Activated adapters are not served on an encoder-decoder: their invocation tokens are in the text, and "
                "what they change lies in the encoder and in the decoder."
            )
        return form


def _header_bytes(registry: Registry, digest: str) -> int:
    """What stands before the tensors of a safetensors file. Raises OSError."""
    with registry.blobs.path(digest).open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def _sum_of(futures: Sequence[Future[int]]) -> Future[int]:
    """The sum, once all are there."""
    total: Future[int] = Future()
    lock, left = threading.Lock(), list(futures)

    def one_done(future: Future[int]) -> None:
        with lock:
            left.remove(future)
            last = not left
        if last:
            total.set_result(sum(each.result() for each in futures))

    for future in futures:
        future.add_done_callback(one_done)
    return total
