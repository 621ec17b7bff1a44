"""The manifest of a version: its content and nothing else.

No name, version number or time is in it, so the same content has the same digest in every registry. The digest of the
canonical JSON is the identity of the version everywhere: registry, cache keys, responses, logs.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from adapterbay.registry.digest import canonical_json, digest_bytes, is_digest, parse_json_object
from adapterbay.registry.errors import Rejected

SCHEMA_VERSION: Final = 1

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
TRAINING_FILE: Final = "training.json"
README_FILE: Final = "README.md"

TaskName = Literal["causal-lm", "sequence-classification", "feature-extraction"]

_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


def _digest(value: str) -> str:
    if not is_digest(value):
        raise ValueError("a digest is 'sha256:' and 64 lower-case hex digits")
    return value


def inside_path(value: str) -> str:
    """Returns a relative POSIX path that stays inside its folder. ValueError otherwise."""
    if len(value) > 255 or _PATH.fullmatch(value) is None or ".." in value:
        raise ValueError("a path must be relative, plain, and stay inside the folder")
    return value


Digest = Annotated[str, AfterValidator(_digest)]


class FileEntry(BaseModel):
    """One file of the version. `size` is in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: Annotated[str, AfterValidator(inside_path)]
    digest: Digest
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """What a version is. `rank` is the largest over its layers; `labels` are in the head's row order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    files: tuple[FileEntry, ...]
    peft_type: str
    peft_config: dict[str, Any]
    base_reference: str
    base_fingerprint: Digest
    task: TaskName
    labels: tuple[str, ...] = ()
    rank: int = Field(ge=0)
    chat_template_digest: Digest | None = None
    tokenizer_digest: Digest | None = None
    library_versions: dict[str, str] = Field(default_factory=dict)
    training: dict[str, Any] | None = None
    parents: tuple[Digest, ...] = ()
    signature: None = None

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Reads a manifest. Raises Rejected with reason BAD_MANIFEST or BAD_JSON."""
        document = parse_json_object(data, "the manifest")
        try:
            manifest = cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise Rejected(f"The manifest is not valid: {place}: {first['msg']}.", reason="BAD_MANIFEST") from error
        paths = [entry.path for entry in manifest.files]
        if len(set(paths)) != len(paths):
            raise Rejected("The manifest names a file twice.", reason="BAD_MANIFEST")
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
