"""Whether an adapter's files may be stored and served. Fail-closed: what is not understood is refused.

Used at push, and again when a server loads the files. The reasons of `Rejected`, which never change their meaning:

    MISSING_FILE        adapter_config.json or adapter_model.safetensors is not there
    PATH_OUTSIDE        a path or a link that leaves the folder
    NOT_A_FILE          a device, a pipe or a socket in place of a file
    PICKLE              a pickle, or a zip made by torch.save, under whatever name
    COMPRESSED          a gzip, zstd, xz or other archive under another name: nothing is ever unpacked
    CODE_IN_FOLDER      Python, shell or a shared library
    BAD_TEXT            a README.md that is not text in UTF-8
    BAD_JSON            JSON that is not UTF-8, has a key twice, NaN or Infinity, or is nested too deeply
    BAD_CONFIG          a setting of the wrong type or out of its range
    BAD_PATTERN         a regular expression that does not compile, is too large, or looks ahead or back
    UNKNOWN_CONFIG_KEY  a setting that this version does not know
    TRUNCATED           the file ends before its data does
    BAD_HEADER          a safetensors header that contradicts itself or the file
    TOO_LARGE           a file, a header or a document over its limit
    RANK_TOO_LARGE      a rank over its limit
    UNSUPPORTED_DTYPE   tensors that are not floating point of 16, 32 or 64 bits, or indices that are not whole
    UNKNOWN_TENSOR      a tensor that is no part of the adapter's method or a head, or that its config would ignore
    UNKNOWN_MODULE      a tensor for a module that the base does not have
    MISSING_TENSOR      a part of a module without its partners, such as A without B, or a classifier without a head
    SHAPE_MISMATCH      shapes that contradict the base, the config or the labels
    NOT_FINITE          NaN or infinity, or values so large that they become infinity in bfloat16
    BAD_MANIFEST        a manifest that is not valid, or not written in its canonical form
    MANIFEST_MISMATCH   a folder that is not what the manifest says that it brings

A method or setting that is known and not served is UnsupportedMethod; an adapter that changes nothing is NoEffect.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from adapterbay.registry.admission.arriving import whole_of
from adapterbay.registry.admission.documents import read_bytes, read_document
from adapterbay.registry.admission.lora_modules import lora_modules, variants
from adapterbay.registry.admission.matching import match_tensors
from adapterbay.registry.admission.methods import Method, Settings
from adapterbay.registry.admission.methods.lora import initialisation
from adapterbay.registry.admission.peft_fields import read_method
from adapterbay.registry.admission.places import Base, Place
from adapterbay.registry.admission.report import (
    AdaptedModule,
    AdaptedSite,
    AdmissionReport,
    Head,
    Matched,
    TrainedTokens,
)
from adapterbay.registry.admission.safetensors_file import (
    Header,
    Source,
    open_source,
    read_header,
    refuse_other_formats,
)
from adapterbay.registry.admission.structure import Structure, StructureKey, Structures
from adapterbay.registry.admission.values import check_values
from adapterbay.registry.errors import NoEffect, Rejected
from adapterbay.registry.manifest import CONFIG_FILE, README_FILE, WEIGHTS_FILE, inside_path

__all__ = [
    "AdaptedModule",
    "AdaptedSite",
    "Admission",
    "AdmissionReport",
    "Head",
    "Limits",
    "TrainedTokens",
    "admit",
    "check_path",
    "check_prefix",
]

PICKLE_SUFFIXES: Final = frozenset({".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
CODE_SUFFIXES: Final = frozenset({".dll", ".dylib", ".py", ".pyc", ".pyd", ".pyi", ".pyz", ".sh", ".so"})

HOW_TO_CONVERT: Final = (
    "Load the adapter once where you trust it, with PeftModel.from_pretrained(base, FOLDER), and save it with "
    "save_pretrained(NEW_FOLDER), which writes adapter_model.safetensors"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that an adapter may bring. Sizes in bytes."""

    weights_bytes: int = 4 * 2**30
    header_bytes: int = 16 * 2**20
    document_bytes: int = 8 * 2**20
    rank: int = 512  # of factors that each layer is served with
    drawn_values: int = 2**26  # that PEFT draws from a seed: 256 MiB
    virtual_tokens: int = 8192
    tensors: int = 100_000


def admit(
    files: Mapping[str, Source],
    base_shapes: Mapping[str, tuple[int, ...]],
    *,
    base_config: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    limits: Limits | None = None,
) -> AdmissionReport:
    """Checks an adapter's files (by relative path) against its base (`BaseFiles.tensor_shapes()`, `.config`).

    `labels`, if given, must be as many as the head has rows. Raises Rejected, UnsupportedMethod or NoEffect.
    """
    return Admission(base_shapes, base_config, limits).admit(files, labels=labels)


class Admission:
    """Admits adapters to one base. Remembers structures, never values: each of them is looked at every time.

    Thread-safe.
    """

    def __init__(
        self,
        base_shapes: Mapping[str, tuple[int, ...]],
        base_config: Mapping[str, Any],
        limits: Limits | None = None,
    ) -> None:
        self._base = Base(base_shapes, base_config)
        self._limits = limits or Limits()
        self._structures = Structures()

    def admit(self, files: Mapping[str, Source], *, labels: Sequence[str] | None = None) -> AdmissionReport:
        """See the function `admit`."""
        _check_files(files, self._limits)
        found = self._structure(files)
        report, head = found.report, found.matched.head
        if labels is not None and head is not None and len(labels) != head.labels:
            raise Rejected(
                f"The head has {head.labels} rows, but there are {len(labels)} labels.", reason="SHAPE_MISMATCH"
            )
        idle = check_values(
            files[WEIGHTS_FILE],
            found.header,
            found.matched,
            report.modules,
            found.method,
            found.settings,
            self._base,
        )
        findings = report.findings
        if idle:
            findings += (f"{idle} of {len(report.sites)} modules change nothing (a factor is all zero)",)
        return replace(report, config=copy.deepcopy(report.config), findings=findings)

    def _structure(self, files: Mapping[str, Source]) -> Structure:
        weights = files[WEIGHTS_FILE]
        written = read_bytes(whole_of(files[CONFIG_FILE]), CONFIG_FILE, self._limits.document_bytes)
        key = StructureKey.of(written, weights, _size_of(weights))
        known = None if key is None else self._structures.find(key)
        if known is not None:
            return known
        config, method, header = _read(written, weights, self._limits)
        settings = Settings(config)
        matched = match_tensors(header, method, settings, self._base)
        lora = method.peft_type == "LORA"
        modules = lora_modules(matched, settings) if lora else ()
        rank, virtual = _check_sizes(matched, method, settings, self._base, self._limits)
        report = AdmissionReport(
            peft_type=method.peft_type,
            config=config,
            modules=modules,
            head=matched.head,
            rank=rank,
            parameters=sum(math.prod(tensor.shape) for tensor in header.tensors.values()),
            findings=tuple(_describe(method, settings, matched, modules, virtual)),
            sites=matched.sites,
            shared=matched.shared,
            tokens=matched.tokens,
            saved=matched.saved,
            copies=matched.copies,
            virtual_tokens=virtual,
            initialisation=initialisation(settings) if lora else None,
            invocation=settings.integers("alora_invocation_tokens") if lora else (),
            entries=header.tensors,
            tying=matched.tying,
        )
        found = Structure(method, settings, header, matched, report)
        if key is not None:
            self._structures.keep(key, found)
        return found


def understand(files: Mapping[str, Source], limits: Limits) -> dict[str, Any]:
    """The settings, once all was checked that can be without the base: the kinds of the files, the settings
    themselves, the header of the tensors. Raises Rejected, UnsupportedMethod or NoEffect.
    """
    _check_files(files, limits)
    written = read_bytes(whole_of(files[CONFIG_FILE]), CONFIG_FILE, limits.document_bytes)
    return _read(written, files[WEIGHTS_FILE], limits)[0]


def _check_files(files: Mapping[str, Source], limits: Limits) -> None:
    for path, source in files.items():
        check_path(path)
        with open_source(source, path) as file:
            check_prefix(path, file.read(9))
        if path == README_FILE:
            check_text(path, source, limits.document_bytes)
    for required in (CONFIG_FILE, WEIGHTS_FILE):
        if required not in files:
            raise Rejected(
                f"{required} is missing: it is not a folder that PEFT's save_pretrained wrote.", reason="MISSING_FILE"
            )


def _read(written: bytes, weights: Source, limits: Limits) -> tuple[dict[str, Any], Method, Header]:
    config = read_document(written, CONFIG_FILE, limits.document_bytes)
    return config, read_method(config), _read_weights_header(weights, limits)


def check_path(path: str) -> None:
    """Refuses a path that leaves its folder, and names of pickles and of code. Raises Rejected."""
    try:
        inside_path(path)
    except ValueError as error:
        raise Rejected(f"The path {path[:200]!r} was refused: {error}.", reason="PATH_OUTSIDE") from error
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        what_to_do = f"{HOW_TO_CONVERT}." if path == "adapter_model.bin" else "Remove it."
        raise Rejected(
            f"{path} was refused: pickles can run code. {what_to_do}",
            reason="PICKLE",
            metadata={"file": path},
        )
    if suffix in CODE_SUFFIXES:
        raise Rejected(
            f"{path} was refused: code is never taken from an adapter. Remove it.",
            reason="CODE_IN_FOLDER",
            metadata={"file": path},
        )


def check_prefix(path: str, prefix: bytes, *, left_out: bool = False) -> None:
    """Refuses a pickle or a zip under another name, and an archive unless it is left out, by the first 9 bytes.

    Raises Rejected with reason PICKLE or COMPRESSED.
    """
    refuse_other_formats(prefix, path, archives=not left_out)


def check_text(path: str, source: Source, max_bytes: int) -> None:
    """Refuses what is not text. Raises Rejected with reason BAD_TEXT or TOO_LARGE."""
    data = read_bytes(whole_of(source), path, max_bytes)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(
            f"{path} is not text in UTF-8 (at byte {error.start}): save it as UTF-8, or remove it.", reason="BAD_TEXT"
        ) from error
    if b"\0" in data:
        raise Rejected(f"{path} is not text: it has bytes that are zero. Remove it.", reason="BAD_TEXT")


def _read_weights_header(source: Source, limits: Limits) -> Header:
    size = _size_of(source)
    if size > limits.weights_bytes:
        raise Rejected(
            f"{WEIGHTS_FILE} has {size} bytes, over the limit of {limits.weights_bytes}.", reason="TOO_LARGE"
        )
    header = read_header(source, WEIGHTS_FILE, max_header_bytes=limits.header_bytes, max_tensors=limits.tensors)
    if not header.tensors:
        raise NoEffect("The adapter has no tensors: it would answer as the base does. Train it first.")
    return header


def _size_of(source: Source) -> int:
    if isinstance(source, Path):
        return source.stat().st_size
    return len(source) if isinstance(source, bytes) else source.size


def _check_sizes(matched: Matched, method: Method, settings: Settings, base: Base, limits: Limits) -> tuple[int, int]:
    """The largest rank, and the number of virtual tokens. Raises Rejected: RANK_TOO_LARGE or TOO_LARGE."""
    places = [place for site in matched.sites if (place := _place_of(site, base)) is not None]
    ranks = [method.rank(settings, place) for place in places] or [method.rank(settings, None)]
    rank = max(ranks)
    if method.factors and rank > limits.rank:
        raise Rejected(f"The rank {rank} is over the limit of {limits.rank}.", reason="RANK_TOO_LARGE")
    drawn = method.drawn(settings, places)
    if drawn > limits.drawn_values:
        raise Rejected(
            f"The rank {rank} makes projections of {drawn} values, over the limit of {limits.drawn_values}.",
            reason="RANK_TOO_LARGE",
        )
    virtual = settings.integer("num_virtual_tokens", 0, least=0) if method.virtual else 0
    if virtual > limits.virtual_tokens:
        raise Rejected(
            f"The adapter has {virtual} virtual tokens, over the limit of {limits.virtual_tokens}.", reason="TOO_LARGE"
        )
    return rank, virtual


def _place_of(site: AdaptedSite, base: Base) -> Place | None:
    return base.attention(site.name) if site.kind == "attention" else base.place(site.name)


def _describe(
    method: Method, settings: Settings, matched: Matched, modules: Sequence[AdaptedModule], virtual: int
) -> list[str]:
    found = []
    kinds = ", ".join(sorted({site.name.rpartition(".")[2] for site in matched.sites}))
    if modules:
        ranks = sorted({module.rank for module in modules})
        text = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        name = "rsLoRA" if settings.flag("use_rslora") else "LoRA"
        found.append(f"{name} of rank {text} on {len(modules)} modules ({kinds})")
        found += variants(settings, modules)
    elif matched.sites:
        found.append(f"{method.title} on {len(matched.sites)} modules ({kinds})")
    elif virtual:
        found.append(f"{method.title} of {virtual} virtual tokens")
    found += [f"{len(rows.tokens)} trained tokens in {rows.name}" for rows in matched.tokens]
    if matched.saved:
        names = ", ".join(sorted({site.name.rpartition(".")[2] for site in matched.saved}))
        found.append(f"{len(matched.saved)} modules of the base replaced, in whole or their biases ({names})")
    if matched.copies:
        found.append(f"copies of the base's own {', '.join(site.name for site in matched.copies)}")
    head = matched.head
    if head:
        found.append(f"a head {head.name} with {head.labels} rows{' and a bias' if head.has_bias else ''}")
    return found
