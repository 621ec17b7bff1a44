"""What a training run is told: one frozen model behind the YAML file, the command-line flags and the library call.

Knows nothing about files, flags, torch or data; `adapterbay.trainer.settings` reads YAML and flags into it.
Each default names where it comes from.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Task = Literal["sequence-classification", "causal-lm"]
Precision = Literal["auto", "float32", "bfloat16"]


def template_fields(template: str) -> tuple[str, ...]:
    """The field names of a template, in order of appearance.

    Only `{name}` is allowed: no positions, attributes, indices, conversions or format specifications, so that a
    template can read a row and nothing else. Raises ValueError saying what is not allowed.
    """
    names = []
    for _, name, specification, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or specification or conversion:
            raise ValueError(f"'{{{name}}}' is not a plain field: only {{name}} is allowed (write {{{{ for a brace)")
        names.append(name)
    return tuple(names)


def _check_template(value: object) -> object:
    if isinstance(value, str):
        template_fields(value)
    return value


def _label_mapping(value: object) -> object:
    """A list of names means labels 0, 1, 2, …; keys and names that YAML read as numbers or booleans become text."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    return _text_mapping(value)


def _text_mapping(value: object) -> object:
    if isinstance(value, dict):
        return {_scalar_text(key): _scalar_text(item) for key, item in value.items()}
    return value


def _scalar_text(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _one_or_many(value: object) -> object:
    """`q_proj` and `q_proj,v_proj` mean lists, as they are written in flags."""
    if isinstance(value, str) and value != "all-linear":
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


Template = Annotated[str, BeforeValidator(_check_template)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the settings: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _is_a_section(cls, given: object) -> object:
        if isinstance(given, Mapping | cls):
            return given
        raise ValueError(f"is a section, not {given!r:.60}; {cls._to_write()}")

    @classmethod
    def _to_write(cls) -> str:
        """What to write in place of a value that is no section."""
        needed = any(field.is_required() for field in cls.model_fields.values())
        or_nothing = "" if needed else ", or leave it out for the defaults"
        return f"write its settings as key: value below it ({', '.join(cls.model_fields)}){or_nothing}"


class ColumnSettings(Section):
    """Which column holds what. Left out, a column is found by its name (`adapterbay.trainer.data.columns`)."""

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None


class CleaningSettings(Section):
    """What is cleaned; every step counts what it did. Rows without a label or without text can never be used."""

    html_breaks: bool = True
    """`<br />` becomes a space: the IMDB text is full of them (Maas et al. 2011)."""
    duplicates: bool = True
    """The same text twice (ignoring case and spacing): only the first is kept."""


class DataSettings(Section):
    """Where rows come from, which of them are used, and what of them."""

    source: str = Field(min_length=1)
    """A .csv, .tsv, .jsonl, .json or .parquet path; `hf:NAME[:SPLIT]` or `ORG/NAME`; `package:NAME/PATH`."""
    eval_source: str | None = None
    """Held-out rows of their own. Without it they are split off `source`."""
    columns: ColumnSettings = ColumnSettings()
    filter: Annotated[dict[str, str], BeforeValidator(_text_mapping)] = {}
    """Column → value: only rows equal in all of them are used."""
    label_names: Annotated[dict[str, str], BeforeValidator(_label_mapping)] = {}
    """Label as written in the data → its name; the order is the order of the head's outputs."""
    prompt_template: Template | None = None
    """causal-lm: the prompt made of a row, e.g. `Write a review of a {label} film.`"""
    completion_template: Template | None = None
    """causal-lm: the completion made of a row, e.g. `{text}`"""
    train_samples: Count | None = None
    eval_samples: Annotated[int, Field(ge=0)] | None = None
    """Held-out rows. They are drawn before the training rows, so they stay the same when `train_samples` changes."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of `source` held out where neither `eval_samples` nor `eval_source` is given: 0.1."""
    shuffle_seed: int = 0
    cleaning: CleaningSettings = CleaningSettings()


class LoraSettings(Section):
    """LoRA (Hu et al. 2021), as `peft.LoraConfig` takes it."""

    rank: Count = 8
    """8: Hu et al. 2021, table 6 (little is gained above it); PEFT's default too."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """2 × rank: the usual scaling in Hugging Face's PEFT examples and in QLoRA's code."""
    dropout: Fraction = 0.0
    """0: runs here are short; QLoRA (Dettmers et al. 2023) found 0.05 of use on small models and none on large."""
    target_modules: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_one_or_many)] = "all-linear"
    """All linear layers: QLoRA, figure 2; `LoRA Without Regret` (Schulman et al. 2025). A list matches name endings."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Only these layers, counted from 0. With the upper ones only, the backward pass ends early."""
    use_rslora: bool = False
    """Scale by alpha/√rank (Kalajdzievski 2023): of use at rank 32 and above."""
    rank_pattern: dict[str, Count] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}


class MethodSettings(Section):
    """What is trained: LoRA, by the section `lora`, or bottleneck adapters, by the rest of this section."""

    name: Literal["lora", "bottleneck"] = "lora"
    preset: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """pfeiffer: half of Houlsby's parameters and as good (Pfeiffer et al. 2021, arXiv:2005.00247)."""
    behind: Annotated[list[str], BeforeValidator(_one_or_many)] | None = None
    """Name endings of the linear layers behind which a bottleneck sits. None: those of the preset."""
    reduction_factor: Annotated[float, Field(ge=1)] = 16
    """The width is hidden / this; 16 in Pfeiffer et al. 2021, and in the AdapterHub library."""
    non_linearity: Literal["relu", "gelu", "gelu_new", "leaky_relu", "swish", "silu", "tanh"] | None = None
    """None: the preset's own, relu for pfeiffer and swish for houlsby."""
    scaling: float = 1.0
    layer_norm_before: bool = False
    adapter_dropout: Fraction = 0.0

    @classmethod
    def _to_write(cls) -> str:
        return "write {name: lora} or {name: bottleneck}, or leave it out for lora"


class OptimizationSettings(Section):
    """The optimizer (AdamW), its schedule, and what a step is made of."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Count | None = None
    """Stop after so many optimizer steps, whatever `epochs` says."""
    batch_size: Count = 16
    gradient_accumulation: Count = 1
    eval_batch_size: Count = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """5e-4: measured on SmolLM2 (docs/trainer.md); LoRA wants about ten times full fine-tuning's rate."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1
    """Share of the steps during which the rate rises from 0; 0.06–0.1 in Hu et al. 2021, table 9."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    evaluate: Literal["epoch", "end"] = "epoch"
    """When held-out data is evaluated: after every epoch, or once at the end."""


class Problem(NamedTuple):
    """One thing that is wrong in the settings. `path` is dotted; `needs_task` marks what depends on `task`."""

    path: str
    message: str
    needs_task: bool = False


class TrainingConfig(Section):
    """Everything a training run is told.

    Raises pydantic.ValidationError when built from wrong values; `adapterbay.trainer.load_config` and
    `parse_config` raise InvalidArgument with all of them listed instead.
    """

    task: Task
    output: Path
    """The folder that becomes the adapter. It must not exist or be empty, unless `overwrite`."""
    base: str | None = None
    """`hub:ORG/REPO`, `gguf:PATH`, `package:NAME` or a folder. None: the default base, SmolLM2-135M-Instruct."""
    data: DataSettings
    method: MethodSettings = MethodSettings()
    lora: LoraSettings = LoraSettings()
    optimization: OptimizationSettings = OptimizationSettings()
    max_length: Annotated[int, Field(ge=2)] = 256
    """Tokens of a row, special tokens included; what is longer is cut at the end and counted."""
    precision: Precision = "auto"
    """bfloat16 means float32 weights under autocast. auto: bfloat16 where the processor computes in it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    threads: Count | None = None
    """CPU threads; None leaves torch's choice."""
    overwrite: bool = False

    @model_validator(mode="after")
    def _no_impossible_combination(self) -> TrainingConfig:
        if problems := impossible_combinations(self):
            raise ValueError("; ".join(f"{problem.path}: {problem.message}" for problem in problems))
        return self


def impossible_combinations(config: TrainingConfig) -> list[Problem]:
    """Settings that are each valid and cannot go together."""
    data, found = config.data, []
    templates = {"prompt_template": data.prompt_template, "completion_template": data.completion_template}
    given = [name for name, template in templates.items() if template is not None]
    if config.task == "sequence-classification":
        found += [Problem(f"data.{name}", "is for task causal-lm only", True) for name in given]
        found += [
            Problem(f"data.columns.{name}", "is for task causal-lm only", True)
            for name in ("prompt", "completion", "messages")
            if getattr(data.columns, name) is not None
        ]
    else:
        if len(given) == 1:
            (missing,) = set(templates) - set(given)
            found.append(Problem(f"data.{missing}", f"is needed beside data.{given[0]}", True))
        if data.label_names and not given:
            found.append(
                Problem("data.label_names", "has no use for causal-lm without prompt and completion templates", True)
            )
    if data.columns.messages and (data.columns.prompt or data.columns.completion):
        found.append(Problem("data.columns.messages", "cannot go with data.columns.prompt or .completion"))
    if data.eval_samples is not None and data.eval_fraction is not None:
        found.append(Problem("data.eval_fraction", "give either eval_samples or eval_fraction, not both"))
    if data.eval_source is not None and data.eval_fraction is not None:
        found.append(Problem("data.eval_fraction", "has no use beside data.eval_source; use eval_samples"))
    if data.eval_source is not None and data.eval_samples == 0:
        found.append(Problem("data.eval_samples", "0 means no evaluation, but data.eval_source is given"))
    if isinstance(config.lora.target_modules, list) and not config.lora.target_modules:
        found.append(Problem("lora.target_modules", "names no module; leave it out for all-linear"))
    if config.lora.layers is not None and not config.lora.layers:
        found.append(Problem("lora.layers", "names no layer; leave it out for all of them"))
    found += _of_another_method(config)
    names = list(data.label_names.values())
    if data.label_names and len(set(names)) < 2:
        found.append(Problem("data.label_names", "names fewer than two classes"))
    return found


def _of_another_method(config: TrainingConfig) -> list[Problem]:
    method = config.method
    if method.name == "lora":
        given = sorted(method.model_fields_set - {"name"})
        return [Problem(f"method.{name}", "is for method.name bottleneck only") for name in given]
    found = [
        Problem(f"lora.{name}", f"has no use for method.name {method.name}; see method")
        for name in sorted(config.lora.model_fields_set)
    ]
    if method.behind is not None and not method.behind:
        found.append(Problem("method.behind", "names no module; leave it out for those of the preset"))
    if method.scaling == 0:
        found.append(Problem("method.scaling", "0 means an adapter that changes nothing"))
    return found
