"""That no text of a stranger breaks out of a model card: labels, settings and names are shown as they are."""

from __future__ import annotations

import html.parser
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from adapterbay.registry import Manifest
from adapterbay.registry.card import render_card
from adapterbay.registry.markdown import escaped, plain_text, without_private_path


def manifest(**facts: Any) -> Manifest:
    content: dict[str, Any] = {
        "files": (),
        "peft_type": "LORA",
        "peft_config": {},
        "base_reference": "hub:org/base",
        "base_fingerprint": "sha256:" + "ab" * 32,
        "task": "sequence-classification",
        "rank": 8,
    }
    return Manifest(**(content | facts))


class Tags(html.parser.HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


OURS = {
    "h1",
    "h2",
    "p",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "strong",
    "code",
    "pre",
    "details",
    "summary",
    "br",
}


def check_harmless(made: Manifest, shown: list[str]) -> None:
    content = render_card(made, name="team/x", version=1).decode()
    parsed = ModelCard(content)
    assert parsed.data.to_dict().keys() <= {
        *("base_model", "base_model_relation", "datasets", "language", "library_name", "license", "model-index"),
        *("pipeline_tag", "tags"),
    }
    assert parsed.data.library_name == "peft"
    page = Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(parsed.text))
    assert page.tags <= OURS
    assert page.attributes <= {"class"}  # of a fenced block: its language
    for value in shown:
        assert plain_text(value, 80) in page.text


HOSTILE = [
    "a | b",
    "</td></table><script>alert(1)</script>",
    "`code` ``` ```",
    "[x](javascript:alert(1)) ![y](http://e/z.png)",
    "*a* _b_ ~~c~~ # d",
    "\n---\nlicense: evil\n---\n",
    "&lt;b&gt; &#60;script&#62;",
    r"\(x\) $$y$$ \| \` C:\Users",
    "<!-- x --> <!DOCTYPE a> <?php ?>",
    "{{ template }} {% x %}",
    "\u202egnp.exe\u2066 \x00\x1b[31m",
    "'quote\": - [ * & ! % @ ,",
    "</code></details><img src=x onerror=alert(1)>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(text: str) -> None:
    training = {
        "data": {"source": text, "digest": text, "language": text},
        "license": text,
        "metrics": {text: 0.5, "accuracy": 0.5},
        "settings": {text: {text: text}},
        "versions": {text: text},
        "fusion": {"method": text, "parents": [text], "weights": [text]},
    }
    # Manifests have no control characters in labels and bases; training records may.
    plain = plain_text(text)
    check_harmless(manifest(labels=(plain, "b"), training=training, base_reference=plain), [text])


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.characters(), min_size=1, max_size=60).filter(lambda text: bool(plain_text(text))))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    training = {"settings": {"x": text}, "metrics": {text: 1}}
    check_harmless(manifest(labels=(plain_text(text), "b"), training=training), [text])


def test_escaping() -> None:
    assert escaped("a_b macro_f1 _x_ *y*") == r"a_b macro_f1 \_x\_ \*y\*"
    assert plain_text("a\u2028b\tc\x00d\u202ee", 80) == "a b c d\ufffde"
    assert plain_text("x" * 300) == "x" * 199 + "…"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/base", "…/base"),
        ("folder:/home/me/base/", "folder:…/base"),
        ("gguf:~/x.gguf", "gguf:…/x.gguf"),
        (r"C:\Users\me\x.csv", "…/x.csv"),
        ("../x/y.csv", "…/y.csv"),
        ("data/x.csv", "data/x.csv"),
        ("package:a/b", "package:a/b"),
        ("hub:a/b", "hub:a/b"),
        ("/", "…/"),
    ],
)
def test_private_paths(text: str, expected: str) -> None:
    assert without_private_path(text) == expected
