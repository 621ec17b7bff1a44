"""Where rows are read from: a file, an installed package or the Hugging Face hub, by the form of the source's name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from adapterbay.registry.errors import InvalidArgument, NotFound

FILE_KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%:-]+)?")
_FORMS = "a .csv, .tsv, .jsonl, .json or .parquet file, hf:NAME[:SPLIT], ORG/NAME, or package:NAME/PATH"


@dataclass(frozen=True)
class Table:
    """Rows as read: `columns` in their order, `rows` one mapping each; a missing value is None."""

    source: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]


def read(source: str, *, field: str = "data.source") -> Table:
    """All rows of `source`.

    Raises NotFound where nothing is there, InvalidArgument where it cannot be read or holds no rows; `field` is the
    setting to blame.
    """
    if source.startswith("package:"):
        return _read_file(_in_package(source, field), source, field)
    if source.startswith("hf:"):
        return _read_hub(source.removeprefix("hf:"), source, field)
    path = Path(source).expanduser()
    if path.exists() or path.suffix.lower() in FILE_KINDS:
        return _read_file(path, source, field)
    if _HUB_NAME.fullmatch(source) and not source.startswith("."):
        return _read_hub(source, source, field)
    raise NotFound(f"{field}: there is no file {source}. A source is {_FORMS}.")


def _in_package(source: str, field: str) -> Path:
    """The file a `package:NAME/PATH` means, found without importing (so without running) the package."""
    name, _, inner = source.removeprefix("package:").partition("/")
    if not name or not inner or ".." in PurePosixPath(inner).parts:
        raise InvalidArgument(f"{field}: write package:NAME/PATH, with a path inside the package.", field=field)
    folders: list[Path] = []
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        distribution = None
    if distribution is not None:
        tops = {file.parts[0] for file in distribution.files or () if len(file.parts) > 1}
        folders += [Path(str(distribution.locate_file(top))) for top in sorted(tops) if not top.endswith(".dist-info")]
    folder = name.replace("-", "_")
    if folder.isidentifier() and (specification := importlib.util.find_spec(folder)) is not None:
        folders += [Path(place) for place in specification.submodule_search_locations or ()]
    if not folders:
        raise NotFound(f"{field}: no package {name} is installed here; install it with `pip install {name}`.")
    for candidate in folders:
        if (candidate / inner).is_file():
            return candidate / inner
    held = sorted(
        str(path.relative_to(candidate))
        for candidate in folders
        for path in candidate.rglob("*")
        if path.suffix.lower() in FILE_KINDS
    )
    raise NotFound(f"{field}: package {name} holds no {inner}; it holds {', '.join(held[:5]) or 'no data files'}.")


def _read_file(path: Path, source: str, field: str) -> Table:
    kind = path.suffix.lower()
    if kind not in FILE_KINDS:
        raise InvalidArgument(f"{field}: {path} is of no known kind; a source is {_FORMS}.", field=field)
    try:
        if kind in (".csv", ".tsv"):
            # As text: "NA" is a word a review may hold, and a label is what the file says.
            frame = pd.read_csv(
                path, sep="\t" if kind == ".tsv" else ",", dtype=str, keep_default_na=False, encoding="utf-8-sig"
            )
            return _table(source, field, list(frame.columns), frame.to_dict("records"))
        if kind == ".parquet":
            frame = pd.read_parquet(path)
            return _table(source, field, list(frame.columns), frame.to_dict("records"))
        return _table(source, field, None, list(_json_rows(path, field)))
    except FileNotFoundError:
        raise NotFound(f"{field}: there is no file {path}.") from None
    except pd.errors.EmptyDataError:
        raise InvalidArgument(f"{field}: {path} is empty.", field=field) from None
    except (OSError, ValueError) as error:  # ParserError, UnicodeDecodeError, ArrowInvalid are ValueErrors
        raise InvalidArgument(f"{field}: {path} cannot be read: {' '.join(str(error).split())}", field=field) from error


def _json_rows(path: Path, field: str) -> Iterator[Mapping[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        values = json.loads(text) if text.strip() else []
        numbered = list(enumerate(values, 1)) if isinstance(values, list) else [(1, values)]
    else:
        numbered = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise InvalidArgument(
                        f"{field}: line {number} of {path} is not JSON: {error.msg}.", field=field
                    ) from None
    for number, value in numbered:
        if not isinstance(value, dict):
            raise InvalidArgument(
                f"{field}: row {number} of {path} is a {type(value).__name__}, not an object.", field=field
            )
        yield value


def _read_hub(name: str, source: str, field: str) -> Table:
    repository, _, split = name.partition(":")
    import datasets

    try:
        dataset = datasets.load_dataset(repository, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:  # offline, no such data set, no such split
        reason = " ".join(str(error).split())
        raise NotFound(f"{field}: the data set {repository} cannot be read from the hub: {reason}") from error
    features = dataset.features.items()
    named = {column: feature for column, feature in features if isinstance(feature, datasets.ClassLabel)}
    rows = [dict(row) for row in dataset]
    for column, feature in named.items():
        for row in rows:
            # -1 is the hub's mark for "no label"
            value = row[column]
            row[column] = None if value is None or value < 0 else feature.int2str(value)
    return _table(source, field, list(dataset.column_names), rows)


def _table(source: str, field: str, columns: list[str] | None, rows: list[Any]) -> Table:
    if not rows:
        raise InvalidArgument(f"{field}: {source} holds no rows.", field=field)
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table(source, tuple(str(column) for column in columns), rows)
