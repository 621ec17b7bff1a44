"""A plain PEFT folder made by anybody: which of its files are taken, which are left out, and what refuses the whole."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adapterbay.registry.admission import CODE_SUFFIXES, PICKLE_SUFFIXES, check_path, check_prefix
from adapterbay.registry.errors import NotFound, Rejected
from adapterbay.registry.manifest import CONFIG_FILE, README_FILE, TRAINING_FILE, WEIGHTS_FILE

STORED_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE, README_FILE)
"""The files of a version. config.json is read for its labels, and tokenizers belong to the base."""

_TRAINER_STATE = re.compile(r"training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")
"""What transformers' Trainer leaves beside an adapter. Pickles: never opened and never stored."""


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """`files` are those to store; `config_json` is config.json, if there is one; `left_out` are names."""

    path: Path
    files: dict[str, Path]
    config_json: Path | None
    left_out: tuple[str, ...]


def read_folder(folder: str | Path) -> PeftFolder:
    """Looks at a folder without reading tensors. Raises NotFound, or Rejected.

    Reasons: MISSING_FILE, PATH_OUTSIDE, NOT_A_FILE, PICKLE, CODE_IN_FOLDER.
    """
    given = Path(folder).expanduser()
    if not given.is_dir():
        raise NotFound(f"There is no folder {given}: give the one that save_pretrained or the trainer wrote.")
    root = given.resolve()
    files: dict[str, Path] = {}
    left_out: list[str] = []
    config_json: Path | None = None
    for entry in sorted(root.iterdir()):
        name = entry.name
        if entry.is_dir() and not entry.is_symlink():
            left_out.append(f"{name}/")
            continue
        if _TRAINER_STATE.fullmatch(name):
            left_out.append(name)
            continue
        if entry.suffix.lower() in PICKLE_SUFFIXES | CODE_SUFFIXES:
            check_path(f"x{entry.suffix.lower()}" if name != _plain(name) else name)
        real = _inside(entry, root)
        with real.open("rb") as file:
            check_prefix(name, file.read(9))
        if name in STORED_FILES:
            files[name] = real
        else:
            left_out.append(name)
            if name == "config.json":
                config_json = real
    for required in (CONFIG_FILE, WEIGHTS_FILE):
        if required not in files:
            raise Rejected(_missing(root, required), reason="MISSING_FILE", metadata={"file": required})
    return PeftFolder(root, files, config_json, tuple(left_out))


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "", name).lstrip(".")


def _inside(entry: Path, root: Path) -> Path:
    """The regular file behind `entry`. A link may stay inside, or lead to the blobs of a Hub cache it belongs to."""
    try:
        real = entry.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise Rejected(f"{entry.name} is a link that leads nowhere.", reason="MISSING_FILE") from error
    hub_blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if entry.is_symlink() and real.parent != root and (hub_blobs is None or real.parent != hub_blobs):
        raise Rejected(
            f"{entry.name} is a link that leaves the folder (to {real}): copy the file in its place.",
            reason="PATH_OUTSIDE",
            metadata={"file": entry.name},
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise Rejected(f"{entry.name} is not a regular file.", reason="NOT_A_FILE", metadata={"file": entry.name})
    return real


def _missing(root: Path, required: str) -> str:
    text = f"{root} has no {required}: give a folder that PEFT's save_pretrained wrote."
    inner = sorted(path.parent.name for path in root.glob(f"*/{CONFIG_FILE}"))
    if inner:
        text += f" These folders inside it have one: {', '.join(inner[:5])}."
    return text
