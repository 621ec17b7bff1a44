"""A plain PEFT folder made by anybody: which of its files are stored, which are read, and what refuses the whole."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adapterbay.registry.admission import CODE_SUFFIXES, PICKLE_SUFFIXES, check_path, check_prefix
from adapterbay.registry.admission.neighbours import missing_file
from adapterbay.registry.admission.regular_file import open_regular
from adapterbay.registry.errors import InvalidArgument, NotFound, Rejected
from adapterbay.registry.manifest import CONFIG_FILE, README_FILE, TRAINING_FILE, WEIGHTS_FILE

STORED_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE, README_FILE)
"""The files of a version. Tokenizers belong to the base."""

READ_FILES: Final = frozenset(
    {
        "config.json",  # names of labels
        "trainer_state.json",  # metrics, steps, epochs, learning rate
        "all_results.json",
        "eval_results.json",
        "chat_template.jinja",  # compared with the base's
        "chat_template.json",
        "tokenizer_config.json",
    }
)
"""Read for what they say, never stored."""

OUR_FOLDER: Final = "adapterbay"
_OUR_FILES: Final = ("manifest.json", "model.sig", "README.md")

_TRAINER_STATE = re.compile(
    r"training_args\.bin|(optimizer|scheduler|sampler)(_\d+)?\.(pt|bin)|scaler\.pt|rng_state(_\d+)?\.pth"
    r"|(random_states|custom_checkpoint)_\d+\.pkl|zero_to_fp32\.py"
)
"""What transformers' Trainer, accelerate and DeepSpeed leave beside an adapter: never opened, never stored."""


def is_trainer_state(name: str) -> bool:
    """Whether a file is state of a trainer: never opened, never stored, and no reason to refuse what lies beside."""
    return _TRAINER_STATE.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """`files` are those to store; `beside` those that are read only; `left_out` are names, in order.

    `path` is None if the files do not lie in one folder. The keys are relative paths; the files of a portable folder
    (`adapterbay/…`) are in `beside`.
    """

    path: Path | None
    files: dict[str, Path]
    beside: Mapping[str, Path]
    left_out: tuple[str, ...]

    @property
    def portable(self) -> dict[str, Path]:
        """What `portable.read_claim` looks at: the files to store and those below `adapterbay/`."""
        return self.files | {name: path for name, path in self.beside.items() if name.startswith(f"{OUR_FOLDER}/")}


def read_folder(folder: str | Path) -> PeftFolder:
    """Looks at a folder without reading tensors. Raises NotFound, InvalidArgument if it cannot be read, or Rejected.

    Reasons: MISSING_FILE, PATH_OUTSIDE, NOT_A_FILE, PICKLE, CODE_IN_FOLDER, COMPRESSED.
    """
    given = Path(folder)
    try:
        given = given.expanduser()
        if not given.is_dir():
            raise NotFound(f"There is no folder {given}: give the one that save_pretrained or the trainer wrote.")
        root = given.resolve()
        found = {entry.name: entry for entry in sorted(root.iterdir())}
        ours = found.get(OUR_FOLDER)
        if ours is not None and ours.is_dir() and not ours.is_symlink():
            found |= {f"{OUR_FOLDER}/{name}": ours / name for name in _OUR_FILES if (ours / name).exists()}
        files: dict[str, Path] = {}
        folders = []
        for name, entry in found.items():
            if entry.is_dir() and not entry.is_symlink():
                folders.append(f"{name}/")
            elif is_trainer_state(name):
                files[name] = entry
            else:
                _check_name(name)
                files[name] = _inside(entry, name, root)
    except OSError as error:
        raise InvalidArgument(f"{given} cannot be read: {error.strerror}.", field="folder") from error
    except RuntimeError as error:  # the ~ of a user that is not there
        raise NotFound(f"There is no folder {given}: {error}") from error
    return _sorted_out(root, files, folders)


def from_files(files: Mapping[str, Path]) -> PeftFolder:
    """The same for files that lie anywhere, by relative path: what a repository holds. Raises Rejected.

    Files in folders, other than those of a portable folder, are left out.
    """
    top: dict[str, Path] = {}
    folders = set()
    for name, path in sorted(files.items()):
        if _leaves(name):
            raise Rejected(
                f"The path {name[:200]!r} was refused: it must stay inside the folder.", reason="PATH_OUTSIDE"
            )
        first, slash, rest = name.partition("/")
        if slash and not (first == OUR_FOLDER and rest in _OUR_FILES):
            folders.add(f"{first}/")
        else:
            if not is_trainer_state(name):
                _check_name(name)
            top[name] = path
    return _sorted_out(None, top, sorted(folders))


def _leaves(name: str) -> bool:
    parts = name.split("/")
    return "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts)


def _sorted_out(root: Path | None, found: Mapping[str, Path], folders: list[str]) -> PeftFolder:
    files: dict[str, Path] = {}
    beside: dict[str, Path] = {}
    left_out = list(folders)
    for name, path in found.items():
        ours = name.startswith(f"{OUR_FOLDER}/")
        if not is_trainer_state(name):
            with open_regular(path, name, follow=False) as file:
                check_prefix(name, file.read(9), left_out=not ours and name not in (*STORED_FILES, *READ_FILES))
        if name in STORED_FILES:
            files[name] = path
        elif not ours:
            left_out.append(name)
        if ours or name in READ_FILES:
            beside[name] = path
    for required in (CONFIG_FILE, WEIGHTS_FILE):
        if required not in files:
            raise missing_file(root, required)
    return PeftFolder(root, files, beside, tuple(sorted(left_out)))


def _check_name(name: str) -> None:
    suffix = Path(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES | CODE_SUFFIXES:
        check_path(name if name == _plain(name) else f"x{suffix}")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "", name).lstrip(".")


def _inside(entry: Path, name: str, root: Path) -> Path:
    """The regular file behind `entry`. A link may stay inside, or lead to the blobs of the Hub cache it belongs to."""
    try:
        real = entry.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise Rejected(f"{name} is a link that leads nowhere.", reason="MISSING_FILE") from error
    # Where it led is what counts, not whether `entry` is a link now: it may have been swapped since.
    if real.parent != entry.parent and real.parent != _hub_blobs(root):
        raise Rejected(
            f"{name} is a link that leaves the folder (to {real}): copy the file in its place.",
            reason="PATH_OUTSIDE",
            metadata={"file": name},
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise Rejected(f"{name} is not a regular file.", reason="NOT_A_FILE", metadata={"file": name})
    return real


def _hub_blobs(root: Path) -> Path | None:
    """`…/blobs`, if `root` lies in `…/snapshots/<commit>`."""
    for place in (root, *root.parents):
        if place.parent.name == "snapshots":
            return place.parent.parent / "blobs"
    return None
