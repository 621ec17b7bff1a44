"""What to say of a folder that is no adapter itself: which folders inside it are, and which of them is the best."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from adapterbay.registry.admission.documents import STATE_FILE, read_document
from adapterbay.registry.errors import AdapterbayError, Rejected
from adapterbay.registry.manifest import CONFIG_FILE

MAX_NAMED: Final = 5
MAX_LOOKED_AT: Final = 1000


def missing_file(root: Path | None, required: str) -> Rejected:
    """The error for a folder without `required`, which names the adapters inside it if there are any."""
    text = f"{root or 'What was given'} has no {required}: give a folder that PEFT's save_pretrained wrote."
    inner = inner_adapters(root) if root is not None else []
    if root is not None and inner:
        more = f" and {len(inner) - MAX_NAMED} more" if len(inner) > MAX_NAMED else ""
        text += f" These folders inside it have one: {', '.join(inner[:MAX_NAMED])}{more}."
        best = best_checkpoint(root, inner)
        if best is not None:
            text += f" By its {STATE_FILE}, {best} is the best."
    elif root is not None and (root / "config.json").is_file() and any(root.glob("model*.safetensors")):
        text += " It is a whole model: adapters alone are stored, not what was merged into a base."
    return Rejected(text, reason="MISSING_FILE", metadata={"file": required})


def inner_adapters(root: Path) -> list[str]:
    """The folders directly inside `root` that hold an adapter, `checkpoint-9` before `checkpoint-10`."""
    found = []
    for number, entry in enumerate(root.iterdir()):
        if number >= MAX_LOOKED_AT:
            break
        if entry.name.isprintable() and entry.is_dir() and (entry / CONFIG_FILE).is_file():
            found.append(entry.name)
    return sorted(found, key=_natural)


def is_checkpoint(name: str) -> bool:
    """Whether a folder is named as transformers' Trainer names its checkpoints."""
    return re.fullmatch(r"checkpoint-\d+", name) is not None


def best_checkpoint(root: Path, inner: list[str]) -> str | None:
    """The one of `inner` that transformers' Trainer holds for the best, by the newest state it left; None: unknown."""
    for place in (root, *(root / name for name in reversed(inner[-MAX_NAMED:]))):
        try:
            named = read_document(place / STATE_FILE, STATE_FILE).get("best_model_checkpoint")
        except AdapterbayError:
            continue
        if isinstance(named, str):
            name = (PureWindowsPath if "\\" in named else PurePosixPath)(named).name
            return name if name in inner else None
    return None


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part) for part in re.split(r"(\d+)", name)
    ]
