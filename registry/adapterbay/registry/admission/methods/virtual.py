"""Virtual tokens: prompt tuning, multitask prompt tuning, P-tuning, CPT; prefixes: prefix tuning, cartridges; gated
prompts inside of attention: adaption prompts (LLaMA-Adapter).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from adapterbay.registry.admission.methods.fields import Fields, fields, harmless, obeyed, training
from adapterbay.registry.admission.methods.method import Expected, Method, shapes
from adapterbay.registry.admission.methods.settings import Settings, refuse
from adapterbay.registry.admission.places import Base, Place
from adapterbay.registry.errors import Rejected

PROMPT: Final[Fields] = fields(
    obeyed(
        modules_to_save="heads and other modules, whole",
        num_virtual_tokens="the number of virtual tokens; must agree with the tensors",
        token_dim="the width of a virtual token; must agree with the base",
        num_transformer_submodules="whether an encoder-decoder has prompts on both sides",
        num_attention_heads="how a prefix is split into heads",
        num_layers="how a prefix is split into layers",
    )
)
_TEXT: Final[Fields] = {
    **training("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"),
    "tokenizer_name_or_path": harmless("the tokenizer of an initialisation; it is never opened"),
}


def virtual_tokens(settings: Settings) -> int:
    """How many positions come before the text. Raises Rejected with reason BAD_CONFIG or TOO_LARGE."""
    count = settings.integer("num_virtual_tokens", 0, least=0)
    if count < 1:
        refuse("num_virtual_tokens", settings.config.get("num_virtual_tokens"), "a whole number above 0")
    return count


def _check(settings: Settings) -> None:
    virtual_tokens(settings)
    settings.integer("num_transformer_submodules", 1, most=2)


def _prompt(settings: Settings, base: Base, _: Sequence[Place]) -> Expected:
    count = virtual_tokens(settings) * settings.integer("num_transformer_submodules", 1, most=2)
    return shapes(prompt_embeddings=(count, _embedding_size(base)))


def _embedding_size(base: Base) -> int:
    size = base.config.get("word_embed_proj_dim") or base.config.get("embedding_size") or base.hidden
    if not isinstance(size, int):
        raise Rejected("The base does not say how wide its embeddings are.", reason="SHAPE_MISMATCH")
    return size


def _prompts(peft_type: str, title: str, more: Fields, check: Callable[[Settings], None] = _check) -> Method:
    return Method(
        peft_type,
        title,
        fields(PROMPT, more),
        shared=("prompt_embeddings",),
        shared_tensors=_prompt,
        check=check,
        virtual=True,
    )


PROMPT_TUNING: Final = _prompts("PROMPT_TUNING", "prompt tuning", _TEXT)

P_TUNING: Final = _prompts(
    "P_TUNING",
    "P-tuning",
    # PEFT saves what the encoder makes of its own weights.
    training("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
)


def _check_cpt(settings: Settings) -> None:
    lengths = {len(settings.integers(key)) for key in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")}
    if lengths != {virtual_tokens(settings)}:
        refuse("cpt_token_ids", settings.config.get("cpt_token_ids"), "as long as num_virtual_tokens, as its masks are")


CPT: Final = _prompts(
    "CPT",
    "CPT",
    {
        **obeyed(
            cpt_token_ids="the tokens that the prompt began as",
            cpt_mask="their attention mask",
            cpt_tokens_type_mask="their kinds",
            opt_projection_epsilon="how far they may move",
            opt_projection_format_epsilon="how far they may move",
        ),
        **training("opt_weighted_loss_type", "opt_loss_decay_factor"),
        "tokenizer_name_or_path": harmless("the tokenizer of an initialisation; it is never opened"),
    },
    _check_cpt,
)


def _check_multitask(settings: Settings) -> None:
    _check(settings)
    if settings.integer("num_tasks", 1) > 1:
        settings.unserved(
            "num_tasks",
            "a request would have to say which of the tasks it means. Save the prompt of one task alone, with "
            "num_tasks=1 and its own row of prefix_task_cols and prefix_task_rows",
        )


def _multitask(settings: Settings, base: Base, places: Sequence[Place]) -> Expected:
    tasks, ranks = settings.integer("num_tasks", 1), settings.integer("num_ranks", 1)
    found = dict(_prompt(settings, base, places))
    (count, width) = found["prompt_embeddings"].shape
    return found | shapes(prefix_task_cols=(tasks, count, ranks), prefix_task_rows=(tasks, ranks, width))


MULTITASK_PROMPT_TUNING: Final = Method(
    "MULTITASK_PROMPT_TUNING",
    "multitask prompt tuning",
    fields(
        PROMPT,
        _TEXT,
        training("prompt_tuning_init_task"),
        {"prompt_tuning_init_state_dict_path": harmless("a file of the initialisation; it is never opened")},
        obeyed(num_tasks="1: the prompt is the product of its factors", num_ranks="the rank of a task's factor"),
    ),
    shared=("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"),
    shared_tensors=_multitask,
    rank=lambda settings, _: settings.integer("num_ranks", 1),
    check=_check_multitask,
    virtual=True,
)


def _prefix(settings: Settings, base: Base, _: Sequence[Place]) -> Expected:
    """Keys and values of every layer: [tokens, layers · 2 · width]."""
    layers, width = settings.integer("num_layers", base.layers() or 1), key_width(base)
    if base.layers() is not None and layers != base.layers():
        refuse("num_layers", layers, f"{base.layers()}, as the base has")
    return shapes(prompt_embeddings=(virtual_tokens(settings), None if width is None else layers * 2 * width))


def key_width(base: Base) -> int | None:
    """The width of all keys of a position; None: the base does not say."""
    text = base.config.get("text_config")
    config = text if isinstance(text, dict) else base.config
    for heads_key in ("num_attention_heads", "n_head", "num_heads", "n_heads"):
        heads = config.get(heads_key)
        if isinstance(heads, int) and heads > 0 and base.hidden:
            size = config.get("head_dim") or config.get("d_kv") or base.hidden // heads
            kept = config.get("num_key_value_heads") or heads
            return int(kept) * int(size) if isinstance(size, int) and isinstance(kept, int) else None
    return None


def _prefixes(peft_type: str, title: str, more: Fields) -> Method:
    return Method(
        peft_type,
        title,
        fields(PROMPT, more),
        shared=("prompt_embeddings",),
        shared_tensors=_prefix,
        check=_check,
        virtual=True,
    )


PREFIX_TUNING: Final = _prefixes(
    "PREFIX_TUNING",
    "prefix tuning",
    # PEFT saves what the projection makes of its own weights.
    training("init_weights", "encoder_hidden_size", "prefix_projection"),
)
CARTRIDGE: Final = _prefixes("CARTRIDGE", "cartridge", training("num_frozen_tokens"))


def _adaption(settings: Settings, place: Place) -> Expected:
    length = settings.integer("adapter_len", 1)
    return shapes(adaption_prompt=(1, length, place.out_features), adaption_gate=(1,))


def _check_adaption(settings: Settings) -> None:
    if not isinstance(settings.config.get("target_modules"), str):
        refuse("target_modules", settings.config.get("target_modules"), "the name of the attention modules")
    settings.integer("adapter_len", 0)
    settings.integer("adapter_layers", 0)


ADAPTION_PROMPT: Final = Method(
    "ADAPTION_PROMPT",
    "adaption prompt",
    fields(
        obeyed(
            target_modules="the attention modules",
            adapter_len="the number of learned tokens",
            adapter_layers="how many of the last layers have them",
        )
    ),
    frozenset({"attention"}),
    ("adaption_prompt", "adaption_gate"),
    tensors=_adaption,
    still=(("adaption_gate",),),
    check=_check_adaption,
)
