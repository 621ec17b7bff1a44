"""`trainer run CONFIG.yaml [--key value …]` and `trainer import-adapterhub`. No torch is imported before it is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

from adapterbay.registry.console import USAGE_EXIT_CODE, guarded, write_json
from adapterbay.registry.errors import AdapterbayError, Cancelled, MissingExtra
from adapterbay.registry.threads import be_a_good_neighbour
from adapterbay.trainer import StepReport, TrainingResult, load_config, parse_flags, run

app = typer.Typer(name="trainer", help="Train adapters for a base.", no_args_is_help=True, add_completion=False)

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@app.callback()
def _group() -> None:
    """Train adapters for a base."""


@app.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_command(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="Settings as YAML; docs/trainer.md lists them.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
) -> None:
    """Train the adapter that CONFIG describes.

    Any setting can be given again as a flag after CONFIG: --section.key value, or --key value where only one section
    has the key; --data.train_samples 64, --epochs=2, --overwrite.
    """
    be_a_good_neighbour()
    # It warns at import of a 4-bit kernel that training does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with _reported_errors():
        settings = load_config(config, parse_flags(context.args))
        with _Display(silent=quiet) as display:
            result = run(settings, progress=display)
        if not quiet:
            _summary(result)
        if as_json:
            write_json(_as_json(result))


@app.command("import-adapterhub")
def import_command(
    folder: Annotated[Path, typer.Argument(help="What model.save_adapter of the AdapterHub library wrote.")],
    output: Annotated[Path, typer.Argument(help="The folder to make, for `registry push`.")],
    head: Annotated[bool, typer.Option("--head/--no-head", help="Take the head along, if there is one.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a bottleneck adapter of the AdapterHub library (`adapters`) into a folder that can be pushed.

    Files in safetensors are read, and .bin files that hold plain tensors only: nothing is ever unpickled.
    """
    with _reported_errors():
        try:
            from adapterbay.base.adapterhub import import_adapterhub
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("adapterbay"):
                raise
            raise MissingExtra(
                f"The conversion needs {error.name}; install it with `pip install 'adapterbay[trainer]'`."
            ) from error
        found = import_adapterhub(folder, output, head=head)
        config = found.config
        if as_json:
            labels, left_out = list(found.labels), list(found.left_out)
            write_json({"output": str(output), "task": found.task, "labels": labels, "left_out": left_out})
            return
        where = "before normalization layers" if config.through_norm else "behind linear layers"
        typer.echo(
            f"{output}: {len(config.target_modules)} bottlenecks of size {config.bottleneck_size} {where}, "
            f"{found.task}{', without ' + ' and '.join(found.left_out) if found.left_out else ''}"
        )


def _as_json(result: TrainingResult) -> dict[str, object]:
    record = result.training_record
    shown = ("base", "task", "labels", "data", "trainable_parameters", "duration_seconds")
    return {
        "output": str(result.output),
        "metrics": dict(result.metrics),
        **{name: record[name] for name in shown},
    }


def _summary(result: TrainingResult) -> None:
    record = result.training_record
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in sorted(result.metrics.items()):
        table.add_row(name, f"{value:.4g}")
    changed = {name: count for name, count in record["data"]["cleaning"].items() if count and name != "read"}
    cleaning = ", ".join(f"{name} {count}" for name, count in changed.items()) or "nothing to clean"
    data = record["data"]
    console = Console(stderr=True)
    console.print(f"[bold]{result.output}[/bold] in {record['duration_seconds']:.0f} s", highlight=False)
    console.print(
        f"{data['train_rows']} rows trained on, {data['eval_rows']} held out; cleaning: {cleaning}; "
        f"{record['trainable_parameters']:,} trained parameters",
        highlight=False,
    )
    console.print(table)


@contextmanager
def _reported_errors() -> Iterator[None]:
    """`console.guarded`, except that a list of problems keeps its lines and exit codes are those of a run:

    2 for every mistake (a file, base or column that is not there is as much one as a wrong value), 130 interrupted.
    """
    with guarded():
        try:
            yield
        except AdapterbayError as error:
            typer.echo(f"error: {error.message}", err=True)
            raise typer.Exit(INTERRUPTED if isinstance(error, Cancelled) else USAGE_EXIT_CODE) from None


class _Display:
    """Progress on standard error: the stage in words, then a bar with loss and learning rate."""

    def __init__(self, *, silent: bool) -> None:
        self._console = Console(stderr=True, quiet=silent)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Remaining(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        self._console.print(f"· {text}", highlight=False)

    def step(self, report: StepReport) -> None:
        if self._task is None:
            self._task = self._progress.add_task("training", total=report.total_steps, detail="")
        detail = f"loss {report.loss:.3f}  rate {report.learning_rate:.1e}"
        self._progress.update(self._task, completed=report.step, detail=detail)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))
        self._console.print(f"· after step {step}: {shown}", highlight=False)
