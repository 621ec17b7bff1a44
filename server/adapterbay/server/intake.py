"""What a row turns out to need once its adapters are in memory: virtual tokens, an activation, names for blocks."""

from __future__ import annotations

from collections.abc import Sequence

from adapterbay.registry.errors import InvalidArgument, UnsupportedMethod
from adapterbay.server.adapters.forms import Prefix, Prompt, ServingForm
from adapterbay.server.batch import Row
from adapterbay.server.heads import HeadPooling
from adapterbay.server.kv import LayerShape
from adapterbay.server.prefix import BlockNames, seed
from adapterbay.server.requests import ArmSpec, ClassifyTask, ClassifyTokensTask, EmbedTask, GenerateTask, Pooling


def fit_row(row: Row, shapes: Sequence[LayerShape], limit: int, *, shares_blocks: bool) -> None:
    """Fills in what the adapters decide, before the row is ready to start.

    `shapes` are those of the base's attention layers, `limit` the base's context. Raises InvalidArgument for a text
    that is too long with the virtual tokens or lacks the invocation tokens, UnsupportedMethod for a prefix that was
    made for other layers.
    """
    forms = [resident.ready for resident in row.residents]
    for form in forms:  # an adapter with virtual tokens is the only one
        _put_before(row, form, shapes)
    _leave_room(row, limit)
    if forms and forms[0].invocation is not None:  # fused ones have the same
        row.active_from = _activation(row, forms[0].invocation)
    row.reuses = _last_state_is_enough(row)
    if shares_blocks:
        row.names = _names(row)


def give_source(row: Row, start_token: int) -> None:
    """Makes a row one of an encoder-decoder. The encoder reads the text; the decoder begins with the start token. A
    text to label follows that, as in T5's own head, and its label is at the text's last token."""
    task = row.request.task
    if isinstance(task, EmbedTask | ClassifyTokensTask):
        row.encoded_only = True
        return
    row.source = tuple(row.tokens)
    row.tokens = [start_token] if isinstance(task, GenerateTask) else [start_token, *row.tokens[:-1]]


def last_start(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted` begins in `tokens` for the last time; None if it does not."""
    wanted = list(wanted)
    starts = range(len(tokens) - len(wanted), -1, -1)
    return next((start for start in starts if list(tokens[start : start + len(wanted)]) == wanted), None)


def _put_before(row: Row, form: ServingForm, shapes: Sequence[LayerShape]) -> None:
    virtual = form.virtual
    if virtual is None:
        return
    if isinstance(virtual, Prompt):
        if row.source:  # the encoder's, as the text is
            row.source_prompt, row.source = virtual, (0,) * virtual.count + row.source
            return
        row.prompt = virtual
    else:
        if row.encoded_only:
            raise UnsupportedMethod(
                f"{form.manifest.peft_type} puts its prefix into the decoder of this encoder-decoder, which this "
                "request does not use: it would be answered by the base alone. Such an adapter can only generate."
            )
        _check_prefix(virtual, shapes)
        row.prefix = virtual
    row.tokens[:0] = [0] * virtual.count


def _check_prefix(prefix: Prefix, shapes: Sequence[LayerShape]) -> None:
    theirs = [(*keys.shape[1:], *values.shape[1:]) for keys, values in zip(prefix.keys, prefix.values, strict=True)]
    ours = [(shape.heads, shape.key_size, shape.heads, shape.value_size) for shape in shapes]
    if theirs != ours:
        raise UnsupportedMethod(
            f"The adapter's prefix has keys and values for {len(theirs)} layers that do not fit the {len(ours)} "
            "numbered attention layers of this base."
        )


def _leave_room(row: Row, limit: int) -> None:
    """Virtual tokens count. Who asked for no number of new tokens gets what is left."""
    task, virtual = row.request.task, row.virtual_tokens
    if row.source:
        _leave_room_apart(row, limit)
        return
    if not virtual:
        return
    left = limit - len(row.tokens)
    behind = f"behind the adapter's {virtual} virtual tokens; this base takes {limit} in all."
    if not isinstance(task, GenerateTask):
        if left < 0:
            raise InvalidArgument(f"The text has {row.prompt_tokens} tokens {behind}", field="texts")
        return
    if task.sampling.max_tokens is None:
        row.max_new_tokens = min(row.max_new_tokens, left)
    if left < max(row.max_new_tokens, 1):
        raise InvalidArgument(
            f"The prompt has {row.prompt_tokens} tokens and {max(row.max_new_tokens, 1)} more are asked for, {behind}",
            field="sampling.max_tokens" if left > 0 else "input",
        )


def _leave_room_apart(row: Row, limit: int) -> None:
    """The same for an encoder-decoder: the text has a context, in which a prompt stands, and the answer has another, in
    which a prefix stands."""
    if row.source_prompt is not None and len(row.source) > limit:
        raise InvalidArgument(
            f"The text has {row.prompt_tokens} tokens behind the adapter's {row.source_prompt.count} virtual tokens; "
            f"this base takes {limit} in all.",
            field="input",
        )
    task, left = row.request.task, limit - row.placed
    if not row.placed or not isinstance(task, GenerateTask):
        return
    if task.sampling.max_tokens is None:
        row.max_new_tokens = min(row.max_new_tokens, left)
    if left < max(row.max_new_tokens, 1):
        raise InvalidArgument(
            f"{max(row.max_new_tokens, 1)} tokens are asked for behind the adapter's {row.placed} virtual tokens; the "
            f"answers of this base have {limit} in all.",
            field="sampling.max_tokens",
        )


def _activation(row: Row, invocation: Sequence[int]) -> int:
    start = last_start(row.tokens, invocation)
    if start is None:
        who = ", ".join(part.name for part in row.request.arm.parts)
        raise InvalidArgument(
            f"Adapter {who} is activated by the tokens {list(invocation)}, which are not in the prompt; without them "
            "it would be the base.",
            field="input",
        )
    return start


def _last_state_is_enough(row: Row) -> bool:
    """Whether nobody will ask for the states of tokens before the last."""
    task = row.request.task
    if isinstance(task, GenerateTask):
        return True
    if isinstance(task, EmbedTask):
        return task.pooling is Pooling.LAST
    return isinstance(task, ClassifyTask) and row.head.pooling is HeadPooling.LAST and row.output.at is None


def _names(row: Row) -> BlockNames:
    own = seed(row.request.arm.key, row.virtual_tokens)
    if not row.active_from:
        return BlockNames(own)
    lasting = any(resident.ready.lasts for resident in row.residents)
    before = seed(("before the activation", row.request.arm.key)) if lasting else seed(ArmSpec().key)
    return BlockNames(before, (row.active_from, own))
