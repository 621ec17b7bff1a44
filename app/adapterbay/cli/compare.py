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
from adapterbay.client import Client, ComparisonAnswer, Selection
from adapterbay.registry.console import write_json
from adapterbay.registry.errors import InvalidArgument


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
    server: options.Server = options.SERVER,
    timeout: options.Timeout = 3600.0,
    as_json: options.Json = False,
) -> None:
    """Run the same inputs through several arms on the same base, and show the answers side by side."""
    selections = [options.parse_arm(arm) for arm in arms]
    texts = [*(inputs or []), *(read_inputs(file) if file is not None else [])]
    if not texts:
        raise InvalidArgument("There is nothing to compare on: give --input TEXT or --inputs FILE.", field="inputs")
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
                    write_json({"arm": arms[answer.arm_index], **dataclasses.asdict(answer)})
            else:
                _show(arms, texts, list(answers))


def read_inputs(file: Path) -> list[str]:
    """Inputs of a file: JSON lines if its first line begins with a brace, else one text a line; blank lines skipped.

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
        return [line for _, line in lines]
    return [_json_text(file, number, line) for number, line in lines]


def _json_text(file: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{file}, line {number}: not JSON ({error.msg}).", field="inputs") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise InvalidArgument(f"{file}, line {number}: an object with a string `text` is needed.", field="inputs")
    text: str = entry["text"]
    return text


def _task(client: Client, task: TaskChoice, arms: Sequence[Selection]) -> TaskChoice:
    """The task asked for, or what the first arm that has an adapter was trained for."""
    if task is not TaskChoice.AUTO:
        return task
    for arm in arms:
        reference = arm.adapter or next(iter(arm.fusion or {}), None)
        if reference is not None:
            trained = client.get_adapter(reference).task
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
