"""The manifest of a version: its content and nothing else.

No name, version number or time is in it, so the same content has the same digest in every registry. The digest of the
canonical JSON is the identity of the version everywhere: registry, cache keys, responses, logs.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapterbay.registry.digest import canonical_json, digest_bytes, is_digest, parse_json_object
from adapterbay.registry.errors import Rejected
from adapterbay.registry.reference import WINDOWS_DEVICES

SCHEMA_VERSION: Final = 1

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
TRAINING_FILE: Final = "training.json"
README_FILE: Final = "README.md"

TaskName = Literal["causal-lm", "sequence-classification", "token-classification", "feature-extraction", "seq2seq-lm"]
HEAD_TASKS: Final = frozenset({"sequence-classification", "token-classification"})
"""Tasks whose adapters have a head and labels."""

MAX_BYTES: Final = 32 * 2**20
MAX_VALUES: Final = 1_000_000
MAX_FILES: Final = 10_000
MAX_FILE_BYTES: Final = 2**48
MAX_RANK: Final = 2**31
MAX_LABELS: Final = 100_000
MAX_LABEL: Final = 1000
MAX_BASE_REFERENCE: Final = 4096

_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_NOT_PLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls, line separators, the marks that turn the direction of text around, and halves of characters."""


def _digest(value: str) -> str:
    if not is_digest(value):
        raise ValueError("a digest is 'sha256:' and 64 lower-case hex digits")
    return value


def inside_path(value: str) -> str:
    """Returns a relative POSIX path that stays inside its folder on every file system. ValueError otherwise."""
    if len(value) > 255 or _PATH.fullmatch(value) is None or ".." in value:
        raise ValueError("a path must be relative, plain, and stay inside the folder")
    for part in value.split("/"):
        if part.endswith(".") or part.split(".", 1)[0].lower() in WINDOWS_DEVICES:
            raise ValueError(f"{part!r} means something else on Windows")
    return value


def is_plain(text: str) -> bool:
    """Whether `text` has no control characters and nothing that turns its direction around: safe to show in a line."""
    return _NOT_PLAIN.search(text) is None


def plain_label(label: str) -> str:
    """Returns a label that can be shown and told from others. ValueError otherwise."""
    if not label.strip():
        raise ValueError("it is empty")
    if len(label) > MAX_LABEL:
        raise ValueError(f"it has {len(label)} characters, {MAX_LABEL} are allowed")
    if not is_plain(label):
        raise ValueError(f"{label[:40]!r} has control characters")
    return label


def _plain(value: str) -> str:
    if not is_plain(value):
        raise ValueError("it has control characters")
    return value


def unusable(error: ValidationError) -> Rejected:
    """The first thing that is wrong with a manifest."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ".".join(part if isinstance(part, str) and part.isidentifier() else repr(part) for part in first["loc"])
    return Rejected(f"The manifest is not valid: {place[:100]}: {first['msg'][:300]}.", reason="BAD_MANIFEST")


Digest = Annotated[str, AfterValidator(_digest)]
Plain = Annotated[str, AfterValidator(_plain)]


class FileEntry(BaseModel):
    """One file of the version. `size` is in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: Annotated[str, AfterValidator(inside_path)]
    digest: Digest
    size: int = Field(ge=0, le=MAX_FILE_BYTES)


class Manifest(BaseModel):
    """What a version is. `rank` is the largest over its layers; `labels` are in the head's row order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    files: tuple[FileEntry, ...] = Field(max_length=MAX_FILES)
    peft_type: Plain = Field(min_length=1, max_length=64)
    peft_config: dict[str, Any]
    base_reference: Plain = Field(min_length=1, max_length=MAX_BASE_REFERENCE)
    base_fingerprint: Digest
    task: TaskName
    labels: tuple[Annotated[str, AfterValidator(plain_label)], ...] = Field(default=(), max_length=MAX_LABELS)
    rank: int = Field(ge=0, le=MAX_RANK)
    chat_template_digest: Digest | None = None
    tokenizer_digest: Digest | None = None
    library_versions: dict[Plain, Plain] = Field(default_factory=dict)
    training: dict[str, Any] | None = None
    parents: tuple[Digest, ...] = Field(default=(), max_length=MAX_FILES)
    signature: None = None

    @model_validator(mode="after")
    def _no_two_files_collide(self) -> Self:
        """Not on a file system without upper and lower case either, nor a file with a folder."""
        seen: set[str] = set()
        for path in (entry.path.casefold() for entry in self.files):
            if path in seen:
                raise ValueError(f"it names the file {path!r} twice")
            seen.add(path)
        for path in seen:
            place = path
            while "/" in place:
                place = place.rpartition("/")[0]
                if place in seen:
                    raise ValueError(f"{place!r} is a file and a folder")
        return self

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Reads what `to_bytes` wrote, and nothing else, so that equal manifests have equal bytes.

        Raises Rejected with reason BAD_MANIFEST, BAD_JSON or TOO_LARGE.
        """
        if len(data) > MAX_BYTES:
            raise Rejected(f"The manifest has {len(data)} bytes; {MAX_BYTES} are allowed.", reason="TOO_LARGE")
        document = parse_json_object(data, "the manifest", max_values=MAX_VALUES)
        try:
            manifest = cls.model_validate(document)
        except ValidationError as error:
            raise unusable(error) from error
        if manifest.to_bytes() != data:
            raise Rejected(
                "The manifest is not written in its canonical form, so its digest would be another one.",
                reason="BAD_MANIFEST",
            )
        return manifest

    @functools.cached_property
    def _canonical(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    def to_bytes(self) -> bytes:
        """The canonical JSON."""
        return self._canonical

    @property
    def digest(self) -> str:
        """`sha256:` and the hex digest of the canonical JSON."""
        return digest_bytes(self._canonical)

    @property
    def size_bytes(self) -> int:
        """The size of all files together."""
        return sum(entry.size for entry in self.files)
