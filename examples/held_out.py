"""The held-out reviews of a trainer's settings, one JSON object with `text` and `label` a line.

    python examples/held_out.py examples/sentiment.yaml > held-out.jsonl

They are what `adapterbay compare --inputs` takes, and no training run with these settings has seen them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from adapterbay.registry.console import USAGE_EXIT_CODE
from adapterbay.registry.errors import AdapterbayError, InvalidArgument
from adapterbay.trainer import load_config
from adapterbay.trainer.data import Labelled, prepare


def held_out(settings: Path) -> list[dict[str, str]]:
    """Text and label of each held-out row. Raises AdapterbayError."""
    config = load_config(settings)
    if config.task != "sequence-classification":
        raise InvalidArgument(f"{settings} is for task {config.task}; only sequence-classification has labelled rows.")
    data = prepare(config)
    return [{"text": row.text, "label": data.labels[row.label]} for row in data.evaluation if isinstance(row, Labelled)]


def main(arguments: list[str]) -> int:
    """Prints the rows. Returns the exit code: 2, after one line on standard error, for a mistake of the caller."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python examples/held_out.py SETTINGS.yaml > held-out.jsonl\n")
        return USAGE_EXIT_CODE
    try:
        rows = held_out(Path(arguments[0]))
    except AdapterbayError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return USAGE_EXIT_CODE
    sys.stdout.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
