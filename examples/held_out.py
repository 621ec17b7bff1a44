"""The held-out reviews of a trainer's settings, one JSON object with `text` and `label` a line.

    python examples/held_out.py examples/sentiment.yaml > held-out.jsonl

They are what `adapterbay compare --inputs` takes, and no training run with these settings has seen them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from adapterbay.trainer import load_config
from adapterbay.trainer.data import Labelled, prepare

data = prepare(load_config(Path(sys.argv[1])))
for row in data.evaluation:
    if isinstance(row, Labelled):
        sys.stdout.write(json.dumps({"text": row.text, "label": data.labels[row.label]}, ensure_ascii=False) + "\n")
