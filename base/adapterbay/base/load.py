"""A base in memory: located, checked, quantized, ready to compute. Trainer and server load it alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from adapterbay.base.text import Tokenizer, load_tokenizer
from adapterbay.registry.base import BaseFiles, locate
from adapterbay.registry.errors import InvalidArgument, UnsupportedMethod

Kind = Literal["causal-lm", "encoder", "encoder-decoder"]
Quantization = Literal["none", "nf4", "int8", "int4", "int8-bnb"]

QUANTIZATIONS = ("auto", "none", "nf4", "int8", "int4", "int8-bnb")
"""How a base can be held; docs/decisions/0003 says what computes each. `int8-bnb` is bitsandbytes on every device."""
BY_KERNELS = ("int8", "int4")
"""What the server's own kernels compute on a CPU; where there are none, torch in their place."""
DTYPES = ("auto", "float32", "bfloat16", "float16")

ENCODER_DECODERS = ("t5",)
"""Model types; each needs attention of its own."""

ROBERTA_LIKE = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Model types whose positions begin after the padding's index."""

KEPT_WHOLE = ("lm_head", "score", "classifier", "pooler")
"""Heads are never quantized: they are small, and PEFT trains or replaces them."""


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What a base is and how it is held."""

    reference: str
    fingerprint: str
    kind: Kind
    quantization: Quantization
    dtype: str
    device: str
    parameters: int
    bytes: int
    hidden_size: int
    max_length: int
    vocabulary_size: int


@dataclass(slots=True)
class LoadedBase:
    """`model` is the whole model (`*ForCausalLM`, or the bare encoder), in eval mode, gradients off."""

    info: BaseInfo
    files: BaseFiles
    model: nn.Module
    tokenizer: Tokenizer
    has_pooler: bool

    @property
    def backbone(self) -> nn.Module:
        """The part that adapters adapt: ids in, hidden states out."""
        prefix = str(self.model.base_model_prefix)
        return self.model.get_submodule(prefix) if hasattr(self.model, prefix) else self.model


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one. Raises InvalidArgument for what is no device, or not on this machine."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = torch.device("meta")
    if picked.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"{device!r} is no device; it must be one of auto, cpu, cuda.", field="device")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise InvalidArgument(
            f"The device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices. Take cpu, or "
            "install a torch that is built for CUDA.",
            field="device",
        )
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it natively, else float32 (CPU) or float16 (CUDA)."""
    if dtype not in DTYPES:
        raise InvalidArgument(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.", field="dtype")
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def pick_quantization(quantize: str, device: torch.device) -> Quantization:
    """`auto` is nf4 on CUDA and none on a CPU; docs/decisions/0003 says why.

    Raises InvalidArgument for another name, and for int4 elsewhere than on a CPU.
    """
    if quantize not in QUANTIZATIONS:
        raise InvalidArgument(
            f"quantize is {quantize!r}; it must be one of {', '.join(QUANTIZATIONS)}.", field="quantize"
        )
    if quantize == "auto":
        return "nf4" if device.type == "cuda" else "none"
    if quantize == "int4" and device.type != "cpu":
        raise InvalidArgument(
            f"quantize is 'int4', which only CPUs compute; on {device.type} take nf4.", field="quantize"
        )
    return quantize  # type: ignore[return-value]


def by_kernels(quantization: Quantization, device: torch.device) -> bool:
    """Whether the server holds it in its kernels' layout: such a base is loaded whole, and the server quantizes it."""
    return device.type == "cpu" and quantization in BY_KERNELS


def kind_of(config: Any) -> Kind:
    """Whether a base generates, encodes, or does the one after the other.

    Raises UnsupportedMethod for encoder-decoders other than T5 and for what transformers has no such class for.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        if config.model_type in ENCODER_DECODERS:
            return "encoder-decoder"
        raise UnsupportedMethod(
            f"{config.model_type} is an encoder-decoder; of these only {', '.join(ENCODER_DECODERS)} is served."
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "encoder"
    if config.get_text_config() is not config:
        raise UnsupportedMethod(f"{config.model_type} takes more than text, which is not served; take its text model.")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "causal-lm"
    raise UnsupportedMethod(f"transformers has no causal or encoder class for model type {config.model_type!r}.")


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """The bitsandbytes settings behind a name, None for `none` and for what bitsandbytes does not compute.

    INT8 runs without outlier decomposition (threshold 0): with it, which columns are outliers depends on every row
    in the batch, so one user's text would change another's logits.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(KEPT_WHOLE),
        )
    if quantization in ("int8", "int8-bnb"):
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=list(KEPT_WHOLE))
    return None


def load_base(
    reference: str | None = None,
    *,
    quantize: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    attention: str | None = None,
    max_length: int | None = None,
) -> LoadedBase:
    """Loads a base once.

    `attention` names a transformers attention implementation; None is transformers' own default. `max_length` can
    lower the context, never raise it. Raises NotFound for a base that is not there, InvalidArgument for settings
    that make no sense, or that only the server's kernels can compute, and UnsupportedMethod for an architecture that is
    not served.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    files = locate(reference)
    where = pick_device(device)
    torch_dtype = pick_dtype(dtype, where)
    quantization = pick_quantization(quantize, where)
    if by_kernels(quantization, where):
        raise InvalidArgument(
            f"quantize is {quantization!r}, which on a CPU only the server computes; take nf4 or int8-bnb.",
            field="quantize",
        )
    config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    kind = kind_of(config)
    settings: dict[str, Any] = {"dtype": torch_dtype, "trust_remote_code": False, "output_loading_info": True}
    if attention is not None:
        settings["attn_implementation"] = attention
    if quantization != "none":
        settings["quantization_config"] = quantization_config(quantization, torch_dtype)
        settings["device_map"] = {"": where}
    classes = {"causal-lm": AutoModelForCausalLM, "encoder": AutoModel, "encoder-decoder": AutoModelForSeq2SeqLM}
    try:
        model, loading = classes[kind].from_pretrained(files.folder, **settings)
    except KeyError as error:
        if error.args != (attention,):
            raise
        raise UnsupportedMethod(f"{config.model_type} takes no other attention than its own.") from error
    missing = {name for name in loading["missing_keys"] if not name.startswith("pooler.")}
    if missing:
        raise InvalidArgument(
            f"The checkpoint of base {files.reference} lacks {len(missing)} weights "
            f"({', '.join(sorted(missing)[:3])}, …); it cannot be served as a {kind} base.",
            field="base",
        )
    if quantization == "none":
        model.to(where)
    model.eval().requires_grad_(False)
    limit = context_length(config)
    if max_length is not None and not 0 < max_length <= limit:
        raise InvalidArgument(f"max_length is {max_length}; this base takes 1 to {limit} tokens.", field="max_length")
    info = BaseInfo(
        reference=str(files.reference),
        fingerprint=files.fingerprint,
        kind=kind,
        quantization=quantization,
        dtype=str(torch_dtype).removeprefix("torch."),
        device=str(where),
        parameters=model.num_parameters(),
        bytes=model.get_memory_footprint(),
        hidden_size=state_size(config),
        max_length=max_length or limit,
        vocabulary_size=config.vocab_size,
    )
    has_pooler = getattr(model, "pooler", None) is not None and not any(
        name.startswith("pooler.") for name in loading["missing_keys"]
    )
    return LoadedBase(
        info=info, files=files, model=model, tokenizer=load_tokenizer(files.folder), has_pooler=has_pooler
    )


def state_size(config: Any) -> int:
    """The width of the last hidden states. OPT's smallest models project them to the width of their embeddings."""
    size: int = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    return size


def context_length(config: Any) -> int:
    """The most positions that the base has. T5's distances know no limit; without n_positions it is what it was
    trained on, 512, for the text and for the answer each."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value - position_offset(config)
    if config.model_type in ENCODER_DECODERS:
        return 512
    raise UnsupportedMethod(f"The config of {config.model_type!r} does not say how many positions it takes.")


def position_offset(config: Any) -> int:
    """What must be added to a position counted from 0: RoBERTa's table begins after its padding index."""
    return (config.pad_token_id or 0) + 1 if config.model_type in ROBERTA_LIKE else 0
