"""Errors by the names of the call: which adapter is meant, once, and none where it is the base."""

from __future__ import annotations

import pytest

from adapterbay.registry.errors import AdapterbayError, Cancelled, InvalidArgument, NoEffect, Rejected, TaskMismatch
from adapterbay.server.requests import ArmSpec, Part
from adapterbay.server.services.arms import named

ONE, TWO = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


def arm(*versions: tuple[str, int, str]) -> ArmSpec:
    return ArmSpec(tuple(Part(f"{name}@{version}", name, version, digest) for name, version, digest in versions))


def told(error: AdapterbayError, *arms: ArmSpec) -> str:
    return named(error, arms).message


A, B, OTHER = arm(("a", 1, ONE)), arm(("b", 1, ONE)), arm(("c", 3, TWO))
NO_EFFECT = "It changes nothing."


def test_names_of_one_content_are_told_once_and_together() -> None:
    error = InvalidArgument(f"{ONE} takes 9 bytes; {TWO} takes 8.")
    assert told(error, A, B, OTHER, A) == f"a@1, b@1 ({ONE}) takes 9 bytes; c@3 ({TWO}) takes 8."


@pytest.mark.parametrize(
    ("arms", "digest", "message"),
    [
        ((A,), None, f"a@1: {NO_EFFECT}"),
        ((A, OTHER), TWO, f"c@3: {NO_EFFECT}"),
        ((A, OTHER), None, f"a@1 + c@3: {NO_EFFECT}"),
        ((A, B, OTHER), ONE, f"a@1, b@1: {NO_EFFECT}"),
        ((A, B), "sha256:fused", f"a@1, b@1: {NO_EFFECT}"),
        ((ArmSpec(),), None, NO_EFFECT),
        ((), None, NO_EFFECT),
    ],
)
def test_an_adapters_error_names_it(arms: tuple[ArmSpec, ...], digest: str | None, message: str) -> None:
    assert told(NoEffect(NO_EFFECT, metadata={"adapter_digest": digest} if digest else None), *arms) == message


def test_a_name_within_another_is_not_that_name() -> None:
    assert told(Rejected("Files of aa@1 and a@12 are here."), A) == "a@1: Files of aa@1 and a@12 are here."
    assert told(Rejected("Files of a@1 are here."), A) == "Files of a@1 are here."


def test_what_the_base_cannot_do_blames_no_adapter() -> None:
    error = TaskMismatch("The base has no head.", metadata={"base_reference": "package:tiny"})
    assert told(error, ArmSpec(), A) == "The base has no head."
    assert told(TaskMismatch("It has no head."), A) == "a@1: It has no head."
    assert told(Cancelled("The call was cancelled."), A) == "The call was cancelled."
