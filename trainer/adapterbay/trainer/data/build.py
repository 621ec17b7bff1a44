"""Table rows into training rows: which columns are read, what is cleaned, what is counted as unusable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapterbay.registry.errors import InvalidArgument
from adapterbay.trainer.config import DataSettings, TrainingConfig, template_fields
from adapterbay.trainer.data import columns
from adapterbay.trainer.data.cleaning import CleaningReport, is_missing, without_html_breaks
from adapterbay.trainer.data.labels import LabelSet, label_text
from adapterbay.trainer.data.rows import Conversation, Labelled, PromptCompletion, Row
from adapterbay.trainer.data.sources import Table

ROLES = ("system", "user", "assistant", "tool")
FOUND_BY_MEANING: Mapping[str, columns.Part] = {"text": "text", "label": "label"}
"""Template fields that mean a part of the row; any other field is the column of that name."""
MakeRow = Callable[[Mapping[str, Any], CleaningReport], Row | None]


class RowBuilder:
    """Makes rows of one form. `labels` is set where the form reads labels."""

    def __init__(self, make: Callable[[Table], MakeRow], labels: LabelSet | None = None) -> None:
        self._make = make
        self.labels = labels

    def build(self, table: Table, report: CleaningReport) -> list[Row]:
        """The usable rows of `table`; the others are counted in `report`."""
        make = self._make(table)
        return [row for raw in table.rows if (row := make(raw, report)) is not None]


def builder_for(config: TrainingConfig, tables: Sequence[Table]) -> RowBuilder:
    """The builder for the task and the columns that the first table has. Raises InvalidArgument naming the columns."""
    settings, table = config.data, tables[0]
    if config.task == "sequence-classification":
        labels = _label_set(settings, tables)
        return RowBuilder(lambda table: _labelled(table, settings, labels), labels)
    if settings.prompt_template is not None and settings.completion_template is not None:
        names = {*template_fields(settings.prompt_template), *template_fields(settings.completion_template)}
        labels_or_none = None
        if "label" in names and columns.find(table, "label", settings.columns) is not None:
            labels_or_none = _label_set(settings, tables)
        return RowBuilder(lambda table: _templated(table, settings, labels_or_none), labels_or_none)
    mapped = settings.columns
    has_pair = columns.find(table, "prompt", mapped) and columns.find(table, "completion", mapped)
    if columns.find(table, "messages", mapped) and not (mapped.prompt or mapped.completion):
        return RowBuilder(lambda table: _conversation(table, settings))
    if not has_pair:
        raise InvalidArgument(
            f"{table.source} has neither a messages column nor a prompt and a completion column; it has "
            f"{', '.join(table.columns)}. Map them with data.columns, or make them with data.prompt_template and "
            "data.completion_template.",
            field="data.columns",
        )
    return RowBuilder(lambda table: _pair(table, settings))


def _label_set(settings: DataSettings, tables: Sequence[Table]) -> LabelSet:
    written = []
    for table in tables:
        column = columns.require(table, "label", settings.columns)
        written += [label_text(row.get(column)) for row in table.rows if not is_missing(row.get(column))]
    return LabelSet(written, settings.label_names, source=settings.source)


def _cleaned(value: Any, settings: DataSettings, report: CleaningReport, *, strip: bool = True) -> str:
    text = str(value)
    if settings.cleaning.html_breaks and "<" in text:
        without = without_html_breaks(text)
        report.html_breaks += without != text
        text = without
    return text.strip() if strip else text


def _labelled(table: Table, settings: DataSettings, labels: LabelSet) -> MakeRow:
    text_column = columns.require(table, "text", settings.columns)
    label_column = columns.require(table, "label", settings.columns)

    def make(raw: Mapping[str, Any], report: CleaningReport) -> Row | None:
        value, label = raw.get(text_column), raw.get(label_column)
        if is_missing(value) or not (text := _cleaned(value, settings, report)):
            report.empty += 1
            return None
        if is_missing(label):
            report.missing_label += 1
            return None
        return Labelled(text, labels.index(label_text(label)))

    return make


def _templated(table: Table, settings: DataSettings, labels: LabelSet | None) -> MakeRow:
    prompt, completion = settings.prompt_template or "", settings.completion_template or ""
    source_of: dict[str, str] = {}
    for name, setting in [
        *((name, "data.prompt_template") for name in template_fields(prompt)),
        *((name, "data.completion_template") for name in template_fields(completion)),
    ]:
        part = FOUND_BY_MEANING.get(name)
        column = columns.find(table, part, settings.columns) if part is not None else name
        if column is None or column not in table.columns:
            raise columns.missing(table, name, setting)
        source_of[name] = column

    def make(raw: Mapping[str, Any], report: CleaningReport) -> Row | None:
        fields: dict[str, str] = {}
        for name, column in source_of.items():
            value = raw.get(column)
            if is_missing(value):
                report.missing_label += name == "label"
                report.empty += name != "label"
                return None
            if name == "label" and labels is not None:
                fields[name] = labels.name(label_text(value))
            else:
                fields[name] = _cleaned(value, settings, report)
        row = PromptCompletion(prompt.format_map(fields), completion.format_map(fields))
        return _unless_empty(row, report)

    return make


def _pair(table: Table, settings: DataSettings) -> MakeRow:
    prompt_column = columns.require(table, "prompt", settings.columns)
    completion_column = columns.require(table, "completion", settings.columns)

    def make(raw: Mapping[str, Any], report: CleaningReport) -> Row | None:
        prompt, completion = raw.get(prompt_column), raw.get(completion_column)
        if is_missing(prompt) or is_missing(completion):
            report.empty += 1
            return None
        # Not stripped: for a base without a chat template the spacing between the two is the user's.
        row = PromptCompletion(
            _cleaned(prompt, settings, report, strip=False), _cleaned(completion, settings, report, strip=False)
        )
        return _unless_empty(row, report)

    return make


def _unless_empty(row: PromptCompletion, report: CleaningReport) -> Row | None:
    if row.prompt.strip() and row.completion.strip():
        return row
    report.empty += 1
    return None


def _conversation(table: Table, settings: DataSettings) -> MakeRow:
    column = columns.require(table, "messages", settings.columns)

    def make(raw: Mapping[str, Any], report: CleaningReport) -> Row | None:
        turns = _turns(raw.get(column), table, column)
        messages = tuple((role, _cleaned(content, settings, report, strip=False)) for role, content in turns)
        if not any(role == "assistant" and content.strip() for role, content in messages):
            report.empty += 1
            return None
        return Conversation(messages)

    return make


def _turns(value: Any, table: Table, column: str) -> list[tuple[str, str]]:
    """(role, content) of a list of messages, also where it came as JSON text (CSV) or an array (Parquet)."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = [value]
    if value is None or isinstance(value, str | float):
        return []
    turns = []
    for message in value:
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if role not in ROLES or not isinstance(content, str):
            raise InvalidArgument(
                f"The {column} column of {table.source} must hold lists of {{role, content}} with a role of "
                f"{', '.join(ROLES)} and a text; one holds {str(message)[:80]!r}.",
                field="data.columns.messages",
            )
        turns.append((role, content))
    return turns
