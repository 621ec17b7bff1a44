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
    UNSUPPORTED_DTYPE   tensors that are not floating point of 16, 32 or 64 bits
    UNKNOWN_TENSOR      a tensor that is no part of a LoRA adapter or a head, or that its config would ignore
    UNKNOWN_MODULE      a tensor for a module that the base does not have
    MISSING_TENSOR      A without B, B without A, or a classifier without a head
    SHAPE_MISMATCH      shapes that contradict the base, the config or the labels
    NOT_FINITE          NaN or infinity, or values so large that they become infinity in bfloat16
    BAD_MANIFEST        a manifest that is not valid, or not written in its canonical form
    MANIFEST_MISMATCH   a folder that is not what the manifest says that it brings

A method or setting that is known and not served is UnsupportedMethod; an adapter that changes nothing is NoEffect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from adapterbay.registry.admission.documents import read_bytes, read_document
from adapterbay.registry.admission.lora_config import LoraSettings, read_settings
from adapterbay.registry.admission.lora_tensors import AdaptedModule, Head, match_tensors
from adapterbay.registry.admission.safetensors_file import Header, open_source, read_header, refuse_other_formats
from adapterbay.registry.admission.tensor_values import check_finite, read_factor
from adapterbay.registry.errors import NoEffect, Rejected
from adapterbay.registry.manifest import CONFIG_FILE, README_FILE, WEIGHTS_FILE, inside_path

__all__ = ["AdaptedModule", "AdmissionReport", "Head", "Limits", "admit", "check_path", "check_prefix"]

PICKLE_SUFFIXES: Final = frozenset({".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
CODE_SUFFIXES: Final = frozenset({".dll", ".dylib", ".py", ".pyc", ".pyd", ".pyi", ".pyz", ".sh", ".so"})

MAX_DELTA: Final = 1e38
"""Of scaling * max|A| * max|B|: beyond it an output may be infinity (the largest bfloat16 is 3.39e38)."""
MIN_DELTA: Final = 1e-57
"""Below it every output is zero: the smallest float32 is 1.4e-45, and no input of a layer is near 1e12."""

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
    rank: int = 512
    tensors: int = 100_000


@dataclass(frozen=True, slots=True)
class AdmissionReport:
    """What the files are. `rank` is the largest over the modules; `parameters` counts every value, head included."""

    peft_type: str
    config: dict[str, Any]
    modules: tuple[AdaptedModule, ...]
    head: Head | None
    rank: int
    parameters: int
    findings: tuple[str, ...]


def admit(
    files: Mapping[str, Path | bytes],
    base_shapes: Mapping[str, tuple[int, ...]],
    *,
    base_config: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    limits: Limits | None = None,
) -> AdmissionReport:
    """Checks an adapter's files (by relative path) against its base (`BaseFiles.tensor_shapes()`, `.config`).

    `labels`, if given, must be as many as the head has rows. Raises Rejected, UnsupportedMethod or NoEffect.
    """
    limits = limits or Limits()
    config, settings, header = understand(files, limits)
    weights = files[WEIGHTS_FILE]
    matched = match_tensors(header, config, settings, base_shapes, base_config)
    rank = max((module.rank for module in matched.modules), default=0)
    if rank > limits.rank:
        raise Rejected(f"The rank {rank} is over the limit of {limits.rank}.", reason="RANK_TOO_LARGE")
    if labels is not None and matched.head is not None and len(labels) != matched.head.labels:
        raise Rejected(
            f"The head has {matched.head.labels} rows, but there are {len(labels)} labels.", reason="SHAPE_MISMATCH"
        )
    idle = _check_values(weights, header, matched.modules, matched.head)
    findings = list(_describe(settings, matched.modules, matched.head))
    if idle:
        findings.append(f"{idle} of {len(matched.modules)} modules change nothing (a factor is all zero)")
    parameters = sum(_count(tensor.shape) for tensor in header.tensors.values())
    return AdmissionReport("LORA", config, matched.modules, matched.head, rank, parameters, tuple(findings))


def understand(files: Mapping[str, Path | bytes], limits: Limits) -> tuple[dict[str, Any], LoraSettings, Header]:
    """What can be checked without the base: the kinds of the files, the settings, the header of the tensors.

    Raises Rejected, UnsupportedMethod or NoEffect.
    """
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
    config = read_document(files[CONFIG_FILE], CONFIG_FILE, limits.document_bytes)
    return config, read_settings(config), _read_weights_header(files[WEIGHTS_FILE], limits)


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


def check_text(path: str, source: Path | bytes, max_bytes: int) -> None:
    """Refuses what is not text. Raises Rejected with reason BAD_TEXT or TOO_LARGE."""
    data = read_bytes(source, path, max_bytes)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(
            f"{path} is not text in UTF-8 (at byte {error.start}): save it as UTF-8, or remove it.", reason="BAD_TEXT"
        ) from error
    if b"\0" in data:
        raise Rejected(f"{path} is not text: it has bytes that are zero. Remove it.", reason="BAD_TEXT")


def _read_weights_header(source: Path | bytes, limits: Limits) -> Header:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > limits.weights_bytes:
        raise Rejected(
            f"{WEIGHTS_FILE} has {size} bytes, over the limit of {limits.weights_bytes}.", reason="TOO_LARGE"
        )
    header = read_header(source, WEIGHTS_FILE, max_header_bytes=limits.header_bytes, max_tensors=limits.tensors)
    if not header.tensors:
        raise NoEffect("The adapter has no tensors: it would answer as the base does. Train it first.")
    return header


def _check_values(source: Path | bytes, header: Header, modules: Sequence[AdaptedModule], head: Head | None) -> int:
    """Reads every value once. Returns how many modules change nothing; raises NoEffect if that is all there is."""
    idle = 0
    with open_source(source, WEIGHTS_FILE) as file:
        for module in modules:
            a = read_factor(file, header.tensors[module.a_key], WEIGHTS_FILE, rank_axis=0)
            b = read_factor(file, header.tensors[module.b_key], WEIGHTS_FILE, rank_axis=1)
            delta = abs(module.scaling) * a.largest * b.largest
            if delta > MAX_DELTA:
                raise Rejected(
                    f"{WEIGHTS_FILE} was refused: on {module.name} the scaling {module.scaling:.3g} times the largest "
                    f"values of A ({a.largest:.3g}) and B ({b.largest:.3g}) becomes infinity.",
                    reason="NOT_FINITE",
                    metadata={"module": module.name},
                )
            # B A is zero if no rank has both a row of A and a column of B.
            idle += not ((a.ranks & b.ranks).any() and delta > MIN_DELTA)
        for key in head.keys if head else ():
            check_finite(file, header.tensors[key], WEIGHTS_FILE)
    if head is None and idle == len(modules):
        raise NoEffect(
            "The adapter changes nothing: on every module B A is zero, so it would answer as the base does. "
            "Was it saved before it was trained?"
        )
    return idle


def _describe(settings: LoraSettings, modules: Sequence[AdaptedModule], head: Head | None) -> list[str]:
    found = []
    if modules:
        ranks = sorted({module.rank for module in modules})
        kinds = sorted({module.name.rpartition(".")[2] for module in modules})
        text = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        method = "rsLoRA" if settings.use_rslora else "LoRA"
        found.append(f"{method} of rank {text} on {len(modules)} modules ({', '.join(kinds)})")
    if head:
        found.append(f"a head {head.name} with {head.labels} rows{' and a bias' if head.has_bias else ''}")
    return found


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
