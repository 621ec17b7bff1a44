"""GGUF to a Hugging Face folder, once; `adapterbay.registry.base` caches the result under the file's digest.

The registry finds `convert` through the entry point `adapterbay.base_converters: gguf`, so that it never imports
torch itself.
"""

from __future__ import annotations

from pathlib import Path

from adapterbay.registry.errors import InvalidArgument

CONVERTER_VERSION = "1"
"""Goes into the cache key: raise it whenever the same file would convert to other bytes."""


def convert(gguf: Path, destination: Path) -> None:
    """Dequantizes `gguf` to bfloat16 and writes config, weights (safetensors) and tokenizer into `destination`.

    bfloat16 is what the models behind small GGUF files were trained in, and halves the cache against float32.
    Raises InvalidArgument when transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise InvalidArgument(f"transformers cannot read {gguf} as a GGUF base: {error}", field="base") from error
    # What the checkpoint was read from is not part of what it computes.
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    model.to(torch.bfloat16).save_pretrained(destination)
    tokenizer.save_pretrained(destination)
