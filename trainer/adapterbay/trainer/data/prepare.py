"""Sources and settings into clean rows, split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapterbay.registry.errors import InvalidArgument
from adapterbay.trainer.config import DataSettings, TrainingConfig
from adapterbay.trainer.data import columns, sources
from adapterbay.trainer.data.build import RowBuilder, builder_for
from adapterbay.trainer.data.cleaning import CleaningReport, without_duplicates, without_overlap
from adapterbay.trainer.data.labels import label_text
from adapterbay.trainer.data.rows import Labelled, Row
from adapterbay.trainer.data.sources import Table

DEFAULT_EVAL_FRACTION = 0.1


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is judged by. `labels` are the classes in head order, empty for causal-lm."""

    source: str
    train: tuple[Row, ...]
    evaluation: tuple[Row, ...]
    labels: tuple[str, ...]
    cleaning: CleaningReport

    def class_counts(self, rows: Sequence[Row]) -> dict[str, int]:
        """Rows of each class, every class named, in head order."""
        counts = Counter(row.label for row in rows if isinstance(row, Labelled))
        return {name: counts[index] for index, name in enumerate(self.labels)}


def prepare(config: TrainingConfig) -> TrainingData:
    """Reads, filters, cleans, shuffles and splits.

    The order is: filter, clean, remove duplicates, shuffle with `shuffle_seed`, take the held-out rows, then the
    training rows. So the held-out rows are the same whatever `train_samples` is.
    Raises NotFound and InvalidArgument as the data deserves.
    """
    settings, report = config.data, CleaningReport()
    tables = [_filtered(sources.read(settings.source), settings, report)]
    if settings.eval_source is not None:
        tables.append(_filtered(sources.read(settings.eval_source, field="data.eval_source"), settings, report))
    builder = builder_for(config, tables)
    pool, *others = (_rows(builder, table, settings, report) for table in tables)
    train, evaluation = _split(pool, others[0] if others else None, settings, report)
    if builder.labels is not None:
        _check_classes(train, builder.labels.names, settings.source)
    return TrainingData(
        settings.source,
        tuple(train),
        tuple(evaluation),
        builder.labels.names if builder.labels is not None and config.task == "sequence-classification" else (),
        report,
    )


def digest(train: Iterable[Row], evaluation: Iterable[Row]) -> str:
    """`sha256:` over the canonical JSON of the rows used, in order."""
    content = {"train": [row.canonical() for row in train], "eval": [row.canonical() for row in evaluation]}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _filtered(table: Table, settings: DataSettings, report: CleaningReport) -> Table:
    report.read += len(table.rows)
    rows = table.rows
    for column, wanted in settings.filter.items():
        if column not in table.columns:
            raise columns.missing(table, column, "data.filter")
        kept = [row for row in rows if label_text(row.get(column)) == wanted]
        if not kept:
            values = Counter(label_text(row.get(column)) for row in rows)
            listed = ", ".join(f"'{value}'" for value, _ in values.most_common(5))
            raise InvalidArgument(
                f"data.filter: no row of {table.source} has {column} = '{wanted}'; it has {listed}.",
                field=f"data.filter.{column}",
            )
        rows = kept
    report.filtered_out += len(table.rows) - len(rows)
    return Table(table.source, table.columns, rows)


def _rows(builder: RowBuilder, table: Table, settings: DataSettings, report: CleaningReport) -> list[Row]:
    rows = builder.build(table, report)
    if settings.cleaning.duplicates:
        rows = without_duplicates(rows, report)
    if not rows:
        raise InvalidArgument(
            f"{table.source} has no usable row: of {len(table.rows)}, {report.empty} have no text and "
            f"{report.missing_label} no label.",
            field="data.source",
        )
    random.Random(settings.shuffle_seed).shuffle(rows)
    return rows


def _split(
    pool: list[Row], held_out: list[Row] | None, settings: DataSettings, report: CleaningReport
) -> tuple[list[Row], list[Row]]:
    if held_out is not None:
        evaluation = held_out[: settings.eval_samples]
        rest = pool
    else:
        count = settings.eval_samples
        if count is None:
            count = max(1, round(len(pool) * (settings.eval_fraction or DEFAULT_EVAL_FRACTION)))
        evaluation, rest = pool[:count], pool[count:]
    train = without_overlap(rest, evaluation, report)[: settings.train_samples]
    if not train:
        raise InvalidArgument(
            f"{settings.source} has {len(pool)} usable rows and the {len(evaluation)} held out leave none to train on; "
            "hold out fewer with data.eval_samples.",
            field="data.eval_samples",
        )
    return train, evaluation


def _check_classes(train: Sequence[Row], names: tuple[str, ...], source: str) -> None:
    present = {row.label for row in train if isinstance(row, Labelled)}
    if any(isinstance(row, Labelled) for row in train) and len(present) < 2:
        only = names[next(iter(present))]
        raise InvalidArgument(
            f"All {len(train)} training rows of {source} have one class, '{only}'; a classifier needs two or more. "
            "Look at data.filter, data.train_samples and data.columns.label.",
            field="data.source",
        )
