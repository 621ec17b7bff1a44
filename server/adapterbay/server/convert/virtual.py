"""Virtual tokens as PEFT saves them: prompts that went through their encoder already, prefixes as keys and values.

On an encoder-decoder PEFT puts prompts before the encoder's text and prefixes before the decoder's answer. It saves
twice as many prompt embeddings as there are virtual tokens (`num_transformer_submodules` is 2); what generates uses the
first half of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from adapterbay.registry.errors import Rejected, UnsupportedMethod
from adapterbay.server.adapters.forms import Prefix, Prompt
from adapterbay.server.kv import LayerShape

EMBEDDINGS: Final = "prompt_embeddings"
PROMPTS: Final = frozenset({"PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING"})
PREFIXES: Final = frozenset({"PREFIX_TUNING", "CARTRIDGE"})


def check_apart(method: str, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedMethod for virtual tokens that have no one meaning on an encoder-decoder."""
    task, sides = config.get("task_type"), config.get("num_transformer_submodules")
    why = None
    if task == "SEQ_CLS":
        why = "PEFT cannot compute it for a classifier of whole texts: T5's takes no embeddings and no keys and values"
    elif method == "CPT":
        why = "PEFT makes it for decoders alone"
    elif method in PREFIXES and task != "SEQ_2_SEQ_LM":
        why = f"it stands in the decoder, which the task {task} does not use"
    elif method in PREFIXES and sides != 2:
        why = (
            f"with num_transformer_submodules={sides} PEFT puts the prefix into the text's keys and values, too, and "
            "its forward pass and its generation do not agree; leave the setting out"
        )
    elif task not in ("SEQ_2_SEQ_LM", "TOKEN_CLS", "FEATURE_EXTRACTION"):
        why = f"it was made for the task {task}"
    if why is not None:
        raise UnsupportedMethod(
            f"{method} of this kind is not served on an encoder-decoder: {why}.", metadata={"peft_type": method}
        )


def read_prompt(method: str, tensors: Mapping[str, Tensor], count: int | None = None) -> Prompt:
    """Input embeddings [count, hidden]: the first `count` of those saved, or all.

    Multitask prompts (Wang et al. 2023, arXiv:2303.02861, equation 1) are P ⊙ (u_k ⊗ v_k) for task k. Raises
    UnsupportedMethod if there are several tasks: a request has no way to choose one.
    """
    embeddings = tensors[EMBEDDINGS].float()
    if method != "MULTITASK_PROMPT_TUNING":
        return Prompt(embeddings[:count])
    tasks = int(tensors["prefix_task_cols"].shape[0])
    if tasks != 1:
        raise UnsupportedMethod(
            f"MULTITASK_PROMPT_TUNING with {tasks} tasks is not served: save each task's prompt as an adapter of its "
            "own (num_tasks=1), so that it has a name.",
            metadata={"peft_type": method},
        )
    task = torch.matmul(tensors["prefix_task_cols"][0].float(), tensors["prefix_task_rows"][0].float())
    return Prompt((embeddings * task)[:count])


def read_prefix(
    method: str, tensors: Mapping[str, Tensor], shapes: Sequence[LayerShape], *, apart: bool = False
) -> Prefix:
    """Keys and values for each attention layer from [count, layers · 2 · heads · size].

    `shapes` are the base's attention layers in order; of an encoder-decoder (`apart`) its decoder's. There PEFT repeats
    what it saved and gives each layer four parts in turn, of which self-attention takes two: layer i gets the keys and
    values that were saved for layer 2i, modulo their number. Raises Rejected if the tensor does not fit.
    """
    flat = tensors[EMBEDDINGS].float()
    count = flat.shape[0]
    first = shapes[0] if shapes else LayerShape(0, 0, 0)
    if any(shape != first for shape in shapes) or first.key_size != first.value_size:
        raise UnsupportedMethod(f"{method} is served on bases whose attention layers are all alike.")
    per_layer = 2 * first.heads * first.key_size
    saved_layers = max(flat.shape[1] // max(per_layer, 1), len(shapes)) if apart else len(shapes)
    expected = saved_layers * per_layer
    if flat.shape[1] != expected:
        raise Rejected(
            f"The prefix has {flat.shape[1]} values for each virtual token; this base's {len(shapes)} layers with "
            f"{first.heads} key/value heads of {first.key_size} need {expected}.",
            reason="SHAPE_MISMATCH",
        )
    parts = flat.view(count, saved_layers * 2, first.heads, first.key_size)
    saved = [2 * layer % saved_layers if apart else layer for layer in range(len(shapes))]
    return Prefix(
        keys=tuple(parts[:, 2 * layer].contiguous() for layer in saved),
        values=tuple(parts[:, 2 * layer + 1].contiguous() for layer in saved),
    )
