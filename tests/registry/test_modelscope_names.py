"""The names of repositories on ModelScope: printing and parsing are inverse, and nothing else is a name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterbay.registry import BaseReference
from adapterbay.registry.errors import InvalidReference

parts = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True).filter(
    lambda p: ".." not in p and "--" not in p
)
revisions = st.one_of(st.none(), st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,40}", fullmatch=True))


@given(parts, parts, revisions.filter(lambda revision: revision is None or ".." not in revision))
def test_what_is_printed_parses_to_the_same(org: str, repo: str, revision: str | None) -> None:
    reference = BaseReference("modelscope", f"{org}/{repo}", revision)
    assert BaseReference.parse(str(reference)) == reference


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused_and_prints_back(text: str) -> None:
    try:
        reference = BaseReference.parse(f"modelscope:{text}")
    except InvalidReference:
        return
    assert str(reference) == f"modelscope:{text}"
    assert reference.scheme == "modelscope"


@pytest.mark.parametrize(
    "text",
    ["", "org", "org/", "/repo", "a/b/c", "a--b/c", "../x", "a/..b", "org/re po", "org/x@", "org/x@../y", "组织/模型"],
)
def test_outside_the_grammar(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        BaseReference.parse(f"modelscope:{text}")
    assert caught.value.field == "base"


@pytest.mark.parametrize("scheme", ["gguf", "folder", "package"])
def test_only_repositories_have_revisions(scheme: Any) -> None:
    with pytest.raises(InvalidReference, match="only hub: and modelscope: have a revision"):
        BaseReference(scheme, "x", "main")
