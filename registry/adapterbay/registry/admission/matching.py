"""The tensors of a checkpoint matched with the modules of its base: every one has its place, or the adapter is refused.

PEFT writes, for a module of the base:

    base_model.model.<module>.<what the method adds>         lora_A.weight, ia3_l, oft_R.weight …
    base_model.model.<module>.token_adapter.trainable_tokens_delta
    base_model.model.<module>.weight                         a module of modules_to_save, or a head
    base_model.model.<module>.bias, .base_layer.bias         with bias="all", or on an adapted module
    base_model.model.<embedding>.base_layer.weight           the base's own, with save_embedding_layers
    base_model.<shared>                                      vera_A, vblora_vector_bank …

and `prompt_embeddings` and the like with virtual tokens, where modules follow `base_model.` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from adapterbay.registry.admission.heads import ROOTS, find_head, head_part
from adapterbay.registry.admission.methods import Method, Settings, Tensor
from adapterbay.registry.admission.module_names import BASE_MODEL_PREFIXES
from adapterbay.registry.admission.places import Base, Place
from adapterbay.registry.admission.replaced import Replaced, trained_tokens
from adapterbay.registry.admission.report import AdaptedSite, Matched, TrainedTokens
from adapterbay.registry.admission.safetensors_file import Header, TensorInfo
from adapterbay.registry.admission.tensor_values import FLOAT_DTYPES, INDEX_DTYPES
from adapterbay.registry.admission.tying import HEAD, Tying, tying
from adapterbay.registry.errors import Rejected, UnsupportedMethod

SHARED_PREFIX: Final = "base_model."
TOKENS: Final = "token_adapter.trainable_tokens_delta"
_NAME = re.compile(r"[A-Za-z0-9_.]+")

Keys = dict[str, dict[str, TensorInfo]]
"""Tensors by module and by what follows the module."""


def match_tensors(header: Header, method: Method, settings: Settings, base: Base) -> Matched:
    """Gives every tensor its place, or raises Rejected or UnsupportedMethod. No tensor is left over."""
    suffix = re.compile(rf"(?P<module>.+?)\.(?P<suffix>{'|'.join((*method.suffixes, re.escape(TOKENS)))})")
    shared_name = re.compile("|".join(method.shared) or "(?!)")
    placed: Keys = {}
    heads: Keys = {}
    tokens: dict[str, TensorInfo] = {}
    shared: dict[str, TensorInfo] = {}
    rest: dict[str, TensorInfo] = {}
    for key, tensor in header.tensors.items():
        name = key if method.virtual else key.removeprefix(SHARED_PREFIX)
        if (method.virtual or name != key) and shared_name.fullmatch(name):
            shared[name] = tensor
            continue
        if not key.startswith(method.prefix) or not _NAME.fullmatch(key):
            raise no_place(key)
        inner = key.removeprefix(method.prefix)
        if found := suffix.fullmatch(inner):
            if found["suffix"] == TOKENS:
                tokens[found["module"]] = tensor
            else:
                placed.setdefault(found["module"], {})[found["suffix"]] = tensor
        elif part := head_part(inner):
            heads.setdefault(part[0], {})[part[1]] = tensor
        else:
            rest[inner] = tensor
    tied = tying(settings, base, {*placed, *(name.rpartition(".")[0] for name in rest)})
    places = _places(placed, method, settings, base, tied)
    sites = {place.name: place for place in places}
    replaced = Replaced(settings, base, sites, heads, (HEAD,) if tied == "saved" else ())
    for inner, tensor in rest.items():
        if not replaced.take(inner, tensor):
            raise _no_home(tensor.name, inner)
    _check_sites(placed, sites, method, settings)
    _check_shared(shared, method, settings, base, places)
    for tensor in (tensor for parts in heads.values() for tensor in parts.values()):
        check_dtype(tensor)
    found_tokens = trained_tokens(tokens, settings, base)
    adapted = tuple(AdaptedSite.at(place, _keys(placed.get(place.name, {}))) for place in places)
    matched = Matched(
        sites=adapted,
        shared={name: tensor.name for name, tensor in sorted(shared.items())},
        tokens=found_tokens or _whole_method(method, settings, places, adapted, base),
        head=find_head(heads, settings.config, base.config),
        saved=replaced.saved(),
        copies=replaced.copies(),
        ignored=tuple(replaced.ignored),
        tying=tied,
    )
    _check_one_naming([*matched.sites, *matched.saved, *matched.copies])
    return matched


def _whole_method(
    method: Method, settings: Settings, places: list[Place], sites: tuple[AdaptedSite, ...], base: Base
) -> tuple[TrainedTokens, ...]:
    """The rows of a method that is nothing but rows. An embedding under a second name is not named twice."""
    if method.peft_type != "TRAINABLE_TOKENS":
        return ()
    tokens = settings.integers("token_indices")
    return tuple(
        TrainedTokens(site.name, site.base_name, tokens, *site.tensors.values())
        for place, site in zip(places, sites, strict=True)
        if place.kind == "output" or not base.is_tied(place)
    )


def check_dtype(tensor: TensorInfo, expected: Tensor | None = None) -> None:
    """Raises Rejected with reason UNSUPPORTED_DTYPE unless it holds numbers, or indices where they are expected."""
    if tensor.dtype in FLOAT_DTYPES or (expected and expected.below and tensor.dtype in INDEX_DTYPES):
        return
    wanted = "whole numbers" if expected and expected.below else "F32, BF16 or F16"
    raise Rejected(
        f"The tensor {tensor.name[:200]!r} has the dtype {tensor.dtype}: save it as {wanted}.",
        reason="UNSUPPORTED_DTYPE",
        metadata={"tensor": tensor.name[:200]},
    )


def no_place(key: str) -> Rejected:
    """A tensor that is no part of the method."""
    return Rejected(
        f"The tensor {key[:200]!r} has no place: it is neither of the adapter's method nor a head.",
        reason="UNKNOWN_TENSOR",
        metadata={"tensor": key[:200]},
    )


def _no_home(key: str, inner: str) -> Exception:
    if inner.partition(".")[0] in ROOTS:
        return UnsupportedMethod(
            f"The head tensor {key[:200]!r} is not served: heads of one linear layer, of RoBERTa's, DistilBERT's and "
            "T5's kind are."
        )
    return no_place(key)


def _keys(parts: Mapping[str, TensorInfo]) -> dict[str, str]:
    return {suffix: tensor.name for suffix, tensor in sorted(parts.items())}


def _places(placed: Keys, method: Method, settings: Settings, base: Base, tied: Tying | None) -> list[Place]:
    if method.suffixes and not placed and method.shared:
        return _targeted(method, settings, base)
    places = [_place(name, method, settings, base, tied) for name in sorted(placed)]
    if tied == "adapted":
        tables = [place.name for place in places if place.kind == "embedding" and place.last != "embed_positions"]
        if bool(tables) != (HEAD in placed):
            raise Rejected(
                f"ensure_weight_tying adapts the embedding and {HEAD} alike, and only {(tables or [HEAD])[0]} is among "
                "the tensors.",
                reason="MISSING_TENSOR",
                metadata={"module": HEAD},
            )
    return places


def _targeted(method: Method, settings: Settings, base: Base) -> list[Place]:
    """The modules of a method that saves nothing for each of them, in the order of the checkpoint."""
    places = []
    for name in base.modules():
        names = (name, *(f"{prefix}.{name}" for prefix in sorted(BASE_MODEL_PREFIXES)))
        place = base.place(name)
        if place and place.kind in method.kinds and any(each in settings.targets for each in names):
            places.append(place)
    if not places:
        raise Rejected("No module of the base is among the adapter's target_modules.", reason="UNKNOWN_MODULE")
    return places


def _place(name: str, method: Method, settings: Settings, base: Base, tying: Tying | None) -> Place:
    attention = "attention" in method.kinds
    place = base.attention(name) if attention else base.place(name)
    if place is None or place.kind not in method.kinds:
        raise _unknown(name, place, method)
    targeted = f".{name}".endswith(f".{settings.config['target_modules']}") if attention else name in settings.targets
    # With trained tokens PEFT saves the rows of tied tables as well, which are those of the embedding.
    tied = (tying == "adapted" and name == HEAD) or (method.peft_type == "TRAINABLE_TOKENS" and base.is_tied(place))
    if not targeted and not tied:
        raise Rejected(
            f"The adapter has tensors for {name}, but its own target_modules leave it out: PEFT would ignore them.",
            reason="UNKNOWN_TENSOR",
            metadata={"module": name},
        )
    return place


def _unknown(name: str, place: Place | None, method: Method) -> Exception:
    """A module that the base does not have, or where the method is not served."""
    outer = name.removesuffix(".base_layer")
    if place is not None and method.peft_type == "LN_TUNING":  # PEFT trains a copy of whatever it is put on
        return UnsupportedMethod(
            f"{method.title} is served on normalization layers, and {name} is none: leave it out of target_modules, or "
            "train it with modules_to_save.",
            metadata={"peft_type": method.peft_type, "module": name},
        )
    if outer != name and method.peft_type == "TRAINABLE_TOKENS":
        return UnsupportedMethod(
            f"PEFT put one layer of trained rows over another on {outer}, which is tied to the embedding, and its own "
            f"model cannot run: leave {outer} out of target_modules.",
            metadata={"peft_type": method.peft_type, "module": outer},
        )
    detail = f"it is no module there that {method.title} is put on" if place else "the base has no such module"
    return Rejected(
        f"The adapter has tensors for {name}, but {detail}: was it trained on another base?",
        reason="UNKNOWN_MODULE",
        metadata={"module": name},
    )


def _check_sites(placed: Keys, sites: Mapping[str, Place], method: Method, settings: Settings) -> None:
    if method.tensors is None:
        return
    for name, parts in placed.items():
        place = sites[name]
        expected = method.tensors(settings, place)
        for suffix, tensor in parts.items():
            if suffix not in expected:
                raise Rejected(
                    f"The adapter's own settings have no use for {tensor.name[:200]!r}: PEFT would ignore it.",
                    reason="UNKNOWN_TENSOR",
                    metadata={"tensor": tensor.name[:200]},
                )
            _check_shape(tensor, expected[suffix], f"{place.base_name} {list(place.weight_shape)}")
        _check_complete(name, parts, expected)
        method.verify(settings, place, {suffix: tensor.shape for suffix, tensor in parts.items()})


def _check_complete(name: str, parts: Mapping[str, TensorInfo], expected: Mapping[str, Tensor]) -> None:
    missing = [suffix for suffix, tensor in expected.items() if tensor.needed and suffix not in parts]
    if missing:
        there = f" has {min(parts)} but" if parts else ""
        raise Rejected(
            f"{name}{there} lacks {', '.join(missing)[:200]}.", reason="MISSING_TENSOR", metadata={"module": name}
        )


def _check_shared(
    shared: Mapping[str, TensorInfo], method: Method, settings: Settings, base: Base, places: list[Place]
) -> None:
    expected = method.shared_tensors(settings, base, places)
    for name, tensor in shared.items():
        if name not in expected:
            raise Rejected(
                f"The adapter's own settings have no use for {tensor.name[:200]!r}: PEFT would ignore it.",
                reason="UNKNOWN_TENSOR",
                metadata={"tensor": tensor.name[:200]},
            )
        _check_shape(tensor, expected[name], "the base")
    _check_complete("The adapter", shared, expected)


def _check_shape(tensor: TensorInfo, expected: Tensor, where: str) -> None:
    check_dtype(tensor, expected)
    wanted = expected.shape
    if len(tensor.shape) != len(wanted) or any(
        size is not None and size != own for own, size in zip(tensor.shape, wanted, strict=False)
    ):
        shown = "[" + ", ".join("any" if size is None else str(size) for size in wanted) + "]"
        raise Rejected(
            f"{tensor.name[:200]} has the shape {list(tensor.shape)}, but its settings on {where} need {shown}. "
            "Was it trained on another base?",
            reason="SHAPE_MISMATCH",
            metadata={"tensor": tensor.name[:200]},
        )


def _check_one_naming(sites: list[AdaptedSite]) -> None:
    """All modules differ from the base's names by the same prefix, and no two names mean the same module."""
    if len({site.base_name for site in sites}) != len({site.name for site in sites}):
        raise Rejected("Two modules of the adapter mean the same layer of the base.", reason="UNKNOWN_MODULE")
    # A language-model head stands beside the backbone, whatever the backbone's prefix is.
    prefixes = {_prefix(site.name, site.base_name) for site in sites if site.kind != "output"}
    if len(prefixes) > 1:
        raise Rejected(
            "The adapter names its modules in two ways, so they cannot all be of one model.", reason="UNKNOWN_MODULE"
        )


def _prefix(name: str, base_name: str) -> tuple[str, str]:
    if name.endswith(base_name):
        return name.removesuffix(base_name), ""
    return "", base_name.removesuffix(name)
