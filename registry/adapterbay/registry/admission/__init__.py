"""Whether an adapter's files may be stored and served. Fail-closed: what is not understood is refused.

Used at push, and again when a server loads the files. The reasons of `Rejected`, which never change their meaning:

    MISSING_FILE        adapter_config.json or adapter_model.safetensors is not there
    PATH_OUTSIDE        a path or a link that leaves the folder
    NOT_A_FILE          a device, a pipe or a socket in place of a file
    PICKLE              a pickle, or a zip made by torch.save, under whatever name
    CODE_IN_FOLDER      a Python file
    BAD_JSON            JSON that is not UTF-8, has a key twice, NaN or Infinity, or is nested too deeply
    BAD_CONFIG          a setting of the wrong type or out of its range
    BAD_PATTERN         a regular expression that does not compile or could run without end
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
    NOT_FINITE          NaN or infinity
    BAD_MANIFEST        a manifest that is not valid

A method or setting that is known and not served is UnsupportedMethod; an adapter that changes nothing is NoEffect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from adapterbay.registry.admission.lora_config import LoraSettings, read_settings
from adapterbay.registry.admission.lora_tensors import AdaptedModule, Head, match_tensors
from adapterbay.registry.admission.safetensors_file import Header, open_source, read_header, refuse_other_formats
from adapterbay.registry.admission.tensor_values import nonzero_mask
from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import NoEffect, Rejected
from adapterbay.registry.manifest import CONFIG_FILE, WEIGHTS_FILE, inside_path

__all__ = ["AdaptedModule", "AdmissionReport", "Head", "Limits", "admit", "check_path", "check_prefix"]

PICKLE_SUFFIXES: Final = frozenset({".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
CODE_SUFFIXES: Final = frozenset({".dll", ".dylib", ".py", ".pyc", ".pyd", ".pyi", ".pyz", ".sh", ".so"})


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
    for path, source in files.items():
        check_path(path)
        with open_source(source) as file:
            check_prefix(path, file.read(9))
    for required in (CONFIG_FILE, WEIGHTS_FILE):
        if required not in files:
            raise Rejected(
                f"{required} is missing: it is not a folder that PEFT's save_pretrained wrote.", reason="MISSING_FILE"
            )
    config = _read_config(files[CONFIG_FILE], limits)
    settings = read_settings(config)
    weights = files[WEIGHTS_FILE]
    header = _read_weights_header(weights, limits)
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


def check_path(path: str) -> None:
    """Refuses a path that leaves its folder, and names of pickles and of code. Raises Rejected."""
    try:
        inside_path(path)
    except ValueError as error:
        raise Rejected(f"The path {path[:200]!r} was refused: {error}.", reason="PATH_OUTSIDE") from error
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise Rejected(
            f"{path} was refused: pickles can run code. Save with safe_serialization=True and remove it.",
            reason="PICKLE",
            metadata={"file": path},
        )
    if suffix in CODE_SUFFIXES:
        raise Rejected(
            f"{path} was refused: code is never taken from an adapter. Remove it.",
            reason="CODE_IN_FOLDER",
            metadata={"file": path},
        )


def check_prefix(path: str, prefix: bytes) -> None:
    """Refuses a pickle or a zip under another name, by its first 9 bytes. Raises Rejected with reason PICKLE."""
    refuse_other_formats(prefix, path)


def _read_config(source: Path | bytes, limits: Limits) -> dict[str, Any]:
    with open_source(source) as file:
        data = file.read(limits.document_bytes + 1)
    if len(data) > limits.document_bytes:
        raise Rejected(f"{CONFIG_FILE} is over the limit of {limits.document_bytes} bytes.", reason="TOO_LARGE")
    return parse_json_object(data, CONFIG_FILE)


def _read_weights_header(source: Path | bytes, limits: Limits) -> Header:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > limits.weights_bytes:
        raise Rejected(
            f"{WEIGHTS_FILE} has {size} bytes, over the limit of {limits.weights_bytes}.", reason="TOO_LARGE"
        )
    header = read_header(source, WEIGHTS_FILE, max_header_bytes=limits.header_bytes)
    if len(header.tensors) > limits.tensors:
        raise Rejected(f"{WEIGHTS_FILE} has {len(header.tensors)} tensors: too many.", reason="TOO_LARGE")
    if not header.tensors:
        raise NoEffect("The adapter has no tensors: it would answer as the base does. Train it first.")
    return header


def _check_values(source: Path | bytes, header: Header, modules: Sequence[AdaptedModule], head: Head | None) -> int:
    """Reads every value once. Returns how many modules change nothing; raises NoEffect if that is all there is."""
    idle = 0
    with open_source(source) as file:
        for module in modules:
            a = nonzero_mask(file, header.tensors[module.a_key], WEIGHTS_FILE).any(axis=1)
            b = nonzero_mask(file, header.tensors[module.b_key], WEIGHTS_FILE).any(axis=0)
            # B A is zero if no rank has both a row of A and a column of B.
            idle += not ((a & b).any() and module.scaling != 0.0)
        for key in head.keys if head else ():
            nonzero_mask(file, header.tensors[key], WEIGHTS_FILE)
    if head is None and idle == len(modules):
        raise NoEffect(
            "The adapter changes nothing: on every module B A is exactly zero, so it would answer as the base does. "
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
