"""What is written beside the weights: `training.json`, the loss curve and a short card."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECORD_SCHEMA = 1
_LIBRARIES = ("adapterbay", "torch", "transformers", "peft", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of every library that the result depends on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """`training.json`, sorted keys, UTF-8."""
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "training.json").write_text(text, encoding="utf-8")


def write_loss_curve(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Training loss (each step, and smoothed where there are many) and held-out loss, in nats, over steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [step for step, _ in training], [loss for _, loss in training]
    smooth = len(losses) >= 20
    axes.plot(steps, losses, color="tab:blue", alpha=0.35 if smooth else 1.0, linewidth=1, label="training loss")
    if smooth:
        axes.plot(steps, _smoothed(losses), color="tab:blue", linewidth=2, label="training loss, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color="tab:orange", label="held-out loss")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average with the weight of its start corrected (as in Adam, Kingma & Ba 2015)."""
    decay, mean, result = 0.9, 0.0, []
    for count, value in enumerate(values, 1):
        mean = decay * mean + (1 - decay) * value
        result.append(mean / (1 - decay**count))
    return result


def write_card(folder: Path, record: Mapping[str, Any], hub_base: str | None) -> None:
    """README.md: a model card as the Hub reads it. `base_model` is only written for a base that the Hub has."""
    library = "peft" if record["settings"]["method"]["name"] == "lora" else "adapterbay"
    header = ["---", f"library_name: {library}", f"pipeline_tag: {_PIPELINES[record['task']]}", "tags:", "- adapterbay"]
    if hub_base is not None:
        header += [f"- base_model:adapter:{hub_base}", f"base_model: {hub_base}"]
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(record["metrics"].items()))
    settings, data = record["settings"], record["data"]
    body = f"""---

# Adapter for {record["base"]["reference"]}

A {record["task"]} {_method(settings)} with
{record["trainable_parameters"]:,} trained parameters, made by adapterbay from {data["train_rows"]} rows of
`{data["source"]}`; {data["eval_rows"]} rows were held out.
{"Labels: " + ", ".join(record["labels"]) + "." if record["labels"] else ""}

| held-out metric | value |
|---|---|
{metrics}

Base fingerprint `{record["base"]["fingerprint"]}`, data digest `{data["digest"]}`.
Everything else is in `training.json`.

![loss](loss.png)
"""
    (folder / "README.md").write_text("\n".join(header) + "\n" + body, encoding="utf-8")


def _method(settings: Mapping[str, Any]) -> str:
    if settings["method"]["name"] == "lora":
        return f"LoRA adapter of rank {settings['lora']['rank']}"
    return (
        f"bottleneck adapter ({settings['method']['preset']}, hidden size / {settings['method']['reduction_factor']:g})"
    )


_PIPELINES = {"sequence-classification": "text-classification", "causal-lm": "text-generation"}


def portable_adapter_config(folder: Path, *, base: str, revision: str | None) -> None:
    """Rewrites `adapter_config.json` to name the base as others can find it, with sorted keys and lists.

    PEFT writes the folder the base was loaded from, a cache path of this machine, and sets in an order that changes
    between runs, which would give equal adapters different digests.
    """
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    config["revision"] = revision
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
