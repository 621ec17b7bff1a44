"""`adapterbay compare`: the same inputs through several arms, in one batch."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from adapterbay.cli import options
from adapterbay.cli.console import asking
from adapterbay.client import Client, ComparisonAnswer, Fusion, Selection
from adapterbay.comparison import PairedComparison, compare_paired, require_statistics
from adapterbay.registry import Registry
from adapterbay.registry.console import write_json
from adapterbay.registry.errors import InvalidArgument, MissingExtra
from adapterbay.registry.gate import BASE_ARM as GATE_BASE_ARM
from adapterbay.registry.gate import Comparison, Verdict

VERDICTS: dict[str, Verdict] = {
    "first is better": "better",
    "second is better": "worse",
    "inconclusive": "inconclusive",
}


class TaskChoice(enum.StrEnum):
    """What the arms do with the inputs."""

    AUTO = "auto"
    GENERATE = "generate"
    CLASSIFY = "classify"


def compare(
    arms: Annotated[
        list[str],
        typer.Argument(metavar="ARM ARM...", help="References, fusions REF:WEIGHT+REF:WEIGHT, or the word base."),
    ],
    inputs: Annotated[list[str] | None, typer.Option("--input", help="One input; may be repeated.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE", help="One input a line, or JSON lines with `text`; - is stdin."),
    ] = None,
    task: Annotated[TaskChoice, typer.Option("--task", help="auto asks the first adapter.")] = TaskChoice.AUTO,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long; classify.")] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="Record how the first arm did against the second in the registry; needs labelled inputs."
        ),
    ] = False,
    registry: Annotated[
        Path | None, typer.Option("--registry", metavar="PATH", help="The registry for --record [ADAPTERBAY_REGISTRY].")
    ] = None,
    server: options.Server = options.SERVER,
    timeout: options.Timeout = 3600.0,
    as_json: options.Json = False,
) -> None:
    """Run the same inputs through several arms on the same base, and show the answers side by side.

    JSON lines with a `label` beside the `text` are scored: accuracies with intervals, and an exact paired test of the
    first two arms.
    """
    selections = [options.parse_arm(arm) for arm in arms]
    labelled = [*((text, None) for text in inputs or ()), *(read_inputs(file) if file is not None else ())]
    texts = [text for text, _ in labelled]
    labels = [label for _, label in labelled if label is not None]
    if not texts:
        raise InvalidArgument("There is nothing to compare on: give --input TEXT or --inputs FILE.", field="inputs")
    if record and (len(labels) != len(texts) or len(arms) != 2):
        raise InvalidArgument(
            "--record needs two arms, and inputs that all have a label: JSON lines with `text` and `label`.",
            field="record",
        )
    if record and (selections[0].adapter is None or selections[1].fusion is not None):
        raise InvalidArgument("--record is for one adapter against another, or against the base.", field="record")
    store = None
    if record:  # what may fail, before anything is computed
        require_statistics()
        store = Registry.open(registry, create=False)
    found: list[ComparisonAnswer] = []
    with Client(server, timeout=timeout) as client, asking(server):
        if _task(client, task, selections) is TaskChoice.CLASSIFY:
            stream = client.compare_classify(selections, texts, truncate=truncate, timeout=timeout)
        else:
            stream = client.compare_generate(
                selections,
                texts,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                stop=stop or (),
                timeout=timeout,
            )
        with contextlib.closing(stream) as answers:
            if as_json:
                for answer in answers:
                    found.append(answer)
                    write_json({"arm": arms[answer.arm_index], **dataclasses.asdict(answer)})
            else:
                found = list(answers)
                _show(arms, texts, found)
    if len(labels) == len(texts) and len(arms) > 1:
        try:
            scored = score(labels, found)
        except MissingExtra as error:
            typer.echo(f"not scored: {error.message}", err=True)
            return
        if as_json:
            write_json({"paired": dataclasses.asdict(scored)})
        else:
            _show_score(arms, scored)
        if store is not None:
            _record(scored, found, store)


def score(labels: Sequence[str], answers: Sequence[ComparisonAnswer]) -> PairedComparison:
    """The first two arms against the true labels. Raises MissingExtra without statsmodels."""
    by_place = {(answer.input_index, answer.arm_index): _outcome(answer).strip() for answer in answers}
    first, second = ([by_place[index, arm] for index in range(len(labels))] for arm in (0, 1))
    return compare_paired(labels, first, second)


def _show_score(arms: Sequence[str], scored: PairedComparison) -> None:
    for arm, accuracy in zip(arms, (scored.first, scored.second), strict=False):
        typer.echo(f"{arm}: accuracy {accuracy.accuracy:.3f} (95 % interval {accuracy.low:.3f} to {accuracy.high:.3f})")
    typer.echo(f"{scored.verdict} (exact McNemar test on {scored.inputs} inputs, p = {scored.p_value:.3g})")


def _record(scored: PairedComparison, answers: Sequence[ComparisonAnswer], store: Registry) -> None:
    first, second = (next(answer for answer in answers if answer.arm_index == arm).provenance for arm in (0, 1))
    candidate = first.adapters[0]
    comparison = Comparison(
        against=second.adapters[0].digest if second.adapters else GATE_BASE_ARM,
        metric="accuracy",
        value=scored.first.accuracy,
        other=scored.second.accuracy,
        inputs=scored.inputs,
        verdict=VERDICTS[scored.verdict],
        test="mcnemar-exact",
        p_value=scored.p_value,
    )
    store.record_comparison(candidate.name, candidate.version, comparison)
    typer.echo(f"recorded for {candidate.name}@{candidate.version}: {comparison.verdict}", err=True)


def read_inputs(file: Path) -> list[tuple[str, str | None]]:
    """Inputs of a file: JSON lines if its first line begins with a brace, else one text a line; blank lines skipped.

    Each with its label, if the line has one.

    Raises InvalidArgument that names the line.
    """
    try:
        content = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"{file} cannot be read: {error.strerror}.", field="inputs") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{file} is not UTF-8 text.", field="inputs") from error
    lines = [(number, line) for number, line in enumerate(content.splitlines(), start=1) if line.strip()]
    if not lines or not lines[0][1].lstrip().startswith("{"):
        return [(line, None) for _, line in lines]
    return [_json_text(file, number, line) for number, line in lines]


def _json_text(file: Path, number: int, line: str) -> tuple[str, str | None]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{file}, line {number}: not JSON ({error.msg}).", field="inputs") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise InvalidArgument(f"{file}, line {number}: an object with a string `text` is needed.", field="inputs")
    label = entry.get("label")
    if label is not None and not isinstance(label, str):
        raise InvalidArgument(f"{file}, line {number}: the label must be text.", field="inputs")
    return entry["text"], label


def _task(client: Client, task: TaskChoice, arms: Sequence[Selection]) -> TaskChoice:
    """The task asked for, or what the first arm that has an adapter was trained for."""
    if task is not TaskChoice.AUTO:
        return task
    for arm in arms:
        fused = Fusion.of(arm.fusion).adapters if arm.fusion is not None else ()
        reference = arm.adapter or next((adapter.reference for adapter in fused), None)
        if reference is not None:
            trained = client.get_adapter(reference).task
            if trained == "token-classification":
                raise InvalidArgument(
                    f"{reference} labels tokens, which comparisons do not take; --task generate has it write.",
                    field="task",
                )
            return TaskChoice.CLASSIFY if trained == "sequence-classification" else TaskChoice.GENERATE
    return TaskChoice.GENERATE


def _show(arms: Sequence[str], texts: Sequence[str], answers: Sequence[ComparisonAnswer]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    by_place = {(answer.input_index, answer.arm_index): answer for answer in answers}
    table = Table(header_style="bold", show_lines=True)
    for heading in ("input", *arms):
        table.add_column(Text(heading))
    agreeing = 0
    for index, text in enumerate(texts):
        row = [by_place[index, arm] for arm in range(len(arms))]
        agree = len({_outcome(answer) for answer in row}) == 1
        agreeing += agree
        table.add_row(Text(text), *(Text(_cell(answer), style="" if agree else "bold") for answer in row))
    console = Console()
    console.print(table)
    for index, arm in enumerate(arms):
        console.print(Text(f"{arm}: {options.answered_by(by_place[0, index].provenance)}", style="dim"))
    console.print(f"The arms agree on {agreeing} of {len(texts)} inputs.", highlight=False)


def _outcome(answer: ComparisonAnswer) -> str:
    """What arms agree or disagree on: the label, or the text."""
    if answer.classification is not None:
        return answer.classification.label
    return answer.generation.text if answer.generation is not None else ""


def _cell(answer: ComparisonAnswer) -> str:
    if answer.classification is not None:
        return f"{answer.classification.label} ({answer.classification.probability:.3f})"
    return _outcome(answer)
