"""Virtual tokens as PEFT saves them: prompts that went through their encoder already, prefixes as keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from adapterbay.registry.errors import Rejected, UnsupportedMethod
from adapterbay.server.adapters.forms import Prefix, Prompt
from adapterbay.server.kv import LayerShape

EMBEDDINGS: Final = "prompt_embeddings"
PROMPTS: Final = frozenset({"PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING"})
PREFIXES: Final = frozenset({"PREFIX_TUNING", "CARTRIDGE"})


def read_prompt(method: str, tensors: Mapping[str, Tensor]) -> Prompt:
    """Input embeddings [count, hidden].

    Multitask prompts (Wang et al. 2023, arXiv:2303.02861, equation 1) are P ⊙ (u_k ⊗ v_k) for task k. Raises
    UnsupportedMethod if there are several tasks: a request has no way to choose one.
    """
    embeddings = tensors[EMBEDDINGS].float()
    if method != "MULTITASK_PROMPT_TUNING":
        return Prompt(embeddings)
    tasks = int(tensors["prefix_task_cols"].shape[0])
    if tasks != 1:
        raise UnsupportedMethod(
            f"MULTITASK_PROMPT_TUNING with {tasks} tasks is not served: save each task's prompt as an adapter of its "
            "own (num_tasks=1), so that it has a name.",
            metadata={"peft_type": method},
        )
    task = torch.matmul(tensors["prefix_task_cols"][0].float(), tensors["prefix_task_rows"][0].float())
    return Prompt(embeddings * task)


def read_prefix(method: str, tensors: Mapping[str, Tensor], shapes: Sequence[LayerShape]) -> Prefix:
    """Keys and values for each attention layer from [count, layers · 2 · heads · size].

    `shapes` are the base's attention layers in order. Raises Rejected if the tensor does not fit them.
    """
    flat = tensors[EMBEDDINGS].float()
    count = flat.shape[0]
    first = shapes[0] if shapes else LayerShape(0, 0, 0)
    if any(shape != first for shape in shapes) or first.key_size != first.value_size:
        raise UnsupportedMethod(f"{method} is served on bases whose attention layers are all alike.")
    expected = len(shapes) * 2 * first.heads * first.key_size
    if flat.shape[1] != expected:
        raise Rejected(
            f"The prefix has {flat.shape[1]} values for each virtual token; this base's {len(shapes)} layers with "
            f"{first.heads} key/value heads of {first.key_size} need {expected}.",
            reason="SHAPE_MISMATCH",
        )
    parts = flat.view(count, len(shapes) * 2, first.heads, first.key_size)
    return Prefix(
        keys=tuple(parts[:, 2 * layer].contiguous() for layer in range(len(shapes))),
        values=tuple(parts[:, 2 * layer + 1].contiguous() for layer in range(len(shapes))),
    )
