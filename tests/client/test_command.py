"""The command `adapterbay` against a real server: what it prints, and one line with an exit code when it cannot."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from serving_tools import Served

from adapterbay.cli import main
from adapterbay.cli.console import asking
from adapterbay.cli.lazy import missing_extra
from adapterbay.cli.options import choose, parse_arm, parse_weighted
from adapterbay.client import Client, Fusion, Selection, UnavailableError, WeightedAdapter
from adapterbay.client.errors import from_status
from adapterbay.registry.errors import InvalidArgument

DIGEST = "sha256:" + "1" * 64


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return parsed


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], served: Served) -> Run:
    """Runs the console script in this process."""

    def run(*arguments: str, stdin: str = "", entry: Callable[[], None] = main.run) -> Ended:
        monkeypatch.setattr("sys.argv", ["adapterbay", *arguments])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        monkeypatch.setenv("ADAPTERBAY_SERVER", served.address)
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            entry()
        captured = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def test_predict(run: Run) -> None:
    shown = run("predict", "sentiment@champion", "a [bold]delight[/bold]", "a bore")
    assert shown.code == 0, shown.err
    assert "a [bold]delight[/bold]" in shown.out
    assert "sentiment@1" in shown.out
    found = run("predict", "sentiment@champion", "a delight", "a bore", "--json").json
    classifications = found["classifications"]
    assert isinstance(classifications, list)
    assert [entry["text"] for entry in classifications] == ["a delight", "a bore"]
    assert all(entry["label"] in {"no", "yes"} for entry in classifications)
    assert found["provenance"]["adapters"][0]["digest"].startswith("sha256:")


def test_generate_prints_the_text_alone_on_stdout(run: Run) -> None:
    options = ("--max-tokens", "8")
    whole = run("generate", "Once upon", "--adapter", "tales", *options)
    assert whole.code == 0, whole.err
    assert "tales@1" in whole.err
    found = run("generate", "Once upon", "--adapter", "tales", *options, "--json").json
    assert whole.out == f"{found['text']}\n"
    streamed = run("generate", "Once upon", "--adapter", "tales", *options, "--stream")
    assert streamed.out == whole.out
    lines = run("generate", "Once upon", "--adapter", "tales", *options, "--stream", "--json").out.splitlines()
    pieces = [json.loads(line) for line in lines]
    assert "".join(piece["text"] for piece in pieces) == found["text"]
    assert run("generate", "-", "--adapter", "tales", *options, stdin="Once upon").out == whole.out


def test_generate_with_a_fusion_and_a_conversation(run: Run) -> None:
    fused = run(
        *("generate", "a", "--fuse", "tales:0.5", "--fuse", "songs@1:-0.25", "--max-tokens", "2", "--json"),
        *("--temperature", "0.8", "--top-p", "0.9", "--top-k", "20", "--seed", "3", "--stop", "zz"),
    ).json
    uses = fused["provenance"]["adapters"]
    assert [(use["reference"], use["weight"]) for use in uses] == [("tales", 0.5), ("songs@1", -0.25)]
    scaled = run("generate", "a", "--adapter", "tales:0.5[layers.0=0]", "--max-tokens", "2")
    assert "answered by 0.5 × tales@1 (sha256:" in scaled.err
    assert ")[layers.0=0]; 2 tokens" in scaled.err
    svd = run("generate", "a", "--adapter", "svd(tales:1+songs:1, rank=2)", "--max-tokens", "2")
    assert "answered by svd of tales@1 (sha256:" in svd.err, svd.err
    labelled = run("predict", "sentiment:0.5+sentiment-b:0.5", "a delight", "--json").json
    assert [use["weight"] for use in labelled["provenance"]["adapters"]] == [0.5, 0.5]
    chat = run("generate", "Hi", "--base", "--chat", "--system", "Be brief", "--max-tokens", "1", "--json").json
    assert chat["prompt_tokens"] > len("Hi") + len("Be brief")  # type: ignore[operator]


def test_compare(run: Run, tmp_path: Path) -> None:
    lines = tmp_path / "inputs.jsonl"
    lines.write_text('{"text": "first"}\n\n{"text": "second", "label": "no"}\n')
    shown = run("compare", "sentiment", "sentiment-b", "--inputs", str(lines))
    assert shown.code == 0, shown.err
    assert "first" in shown.out
    assert "The arms agree on" in shown.out
    plain = tmp_path / "inputs.txt"
    plain.write_text("one\ntwo\n")
    answers = [
        json.loads(line)
        for line in run(
            *("compare", "tales", "base", "tales:0.5+songs:0.5", "--inputs", str(plain), "--input", "three"),
            *("--max-tokens", "3", "--json"),
        ).out.splitlines()
    ]
    assert {answer["arm"] for answer in answers} == {"tales", "base", "tales:0.5+songs:0.5"}
    assert len(answers) == 9
    assert all(answer["generation"]["text"] is not None for answer in answers)
    classified = run("compare", "sentiment", "stars", "--input", "a", "--task", "classify", "--json")
    assert len(classified.out.splitlines()) == 2


def test_a_comparison_is_scored_and_recorded(run: Run, served: Served, tmp_path: Path) -> None:
    texts = [f"a film {number}" for number in range(8)]
    with Client(served.address) as client:
        right = [answer.label for answer in client.classify(texts, adapter="sentiment")]
        other = [answer.label for answer in client.classify(texts, adapter="sentiment-b")]
    lines = tmp_path / "inputs.jsonl"
    lines.write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in zip(texts, right, strict=True))
    )
    store = served.zoo.registry
    asked = ("compare", "sentiment", "sentiment-b", "--inputs", str(lines), "--record")
    recorded = run(*asked, "--registry", str(store.root), "--json")
    assert recorded.code == 0, recorded.err
    paired = recorded.json["paired"]
    share = sum(a == b for a, b in zip(right, other, strict=True)) / len(texts)
    assert share < 1.0, "the two must differ, or nothing tells which is which"
    assert paired["first"]["accuracy"] == 1.0
    assert paired["second"]["accuracy"] == share
    candidate, against = store.resolve("sentiment"), store.resolve("sentiment-b")
    found = store.comparisons("sentiment", candidate.version)[-1]
    assert (found.against, found.metric, found.value, found.other) == (against.digest, "accuracy", 1.0, share)
    assert (found.inputs, found.p_value) == (len(texts), paired["p_value"])
    assert f"sentiment@{candidate.version}" in recorded.err
    unlabelled = run("compare", "sentiment", "sentiment-b", "--input", "a", "--record")
    assert (unlabelled.code, "have a label" in unlabelled.err) == (2, True)
    nowhere = run(*asked, "--registry", str(tmp_path / "nothing"))
    assert (nowhere.code, nowhere.out) == (2, ""), "told before anything is computed"
    assert len(store.comparisons("sentiment", candidate.version)) == 1


FAILURES = {
    "misspelt": (("predict", "sentimnet", "a"), 1, "Did you mean"),
    "no head": (("predict", "tales", "a"), 1, "tales@1: This adapter has no classification head"),
    "foreign": (("generate", "a", "--adapter", "foreign:1+tales:1"), 1, "foreign@1: The adapter was trained on base"),
    "empty": (("predict", "sentiment", ""), 2, "empty"),
    "greedy top_p": (("generate", "a", "--base", "--top-p", "0.5"), 2, "top_p"),
    "no selection": (("generate", "a"), 2, "exactly one"),
    "two selections": (("generate", "a", "--base", "--adapter", "tales"), 2, "exactly one"),
    "weightless": (("generate", "a", "--fuse", "tales"), 2, "REFERENCE:WEIGHT"),
    "wordy weight": (("generate", "a", "--fuse", "tales:much"), 2, "not a number"),
    "no method": (("generate", "a", "--adapter", "mean(tales:1+songs:1)"), 2, "ties_svd"),
    "no density": (("compare", "cat(tales:1+songs:1, density=1)", "base", "--input", "a"), 2, "no density"),
    "unequal ranks": (("generate", "a", "--adapter", "ties(tales:1+songs:1)"), 2, "equal ranks"),
    "twice": (("generate", "a", "--fuse", "tales:1", "--fuse", "tales:2"), 2, "twice"),
    "system alone": (("generate", "a", "--base", "--system", "x"), 2, "--chat"),
    "no inputs": (("compare", "a", "b"), 2, "--input"),
    "no file": (("compare", "a", "b", "--inputs", "/no/such/file"), 2, "/no/such/file"),
    "one arm": (("compare", "tales", "--input", "a"), 2, "arms"),
    "no server": (("predict", "a", "b", "--server", "127.0.0.1:1"), 1, "127.0.0.1:1"),
    "which text": (("predict", "sentiment", "a", ""), 2, "(texts[1])"),
    "tokens of texts": (("predict", "--tokens", "sentiment", "a"), 1, "sentiment@1: This head labels texts"),
    "huge": (("generate", "a", "--base", "--max-tokens", "99999999999999"), 2, "max_tokens is 99999999999999"),
    "negative seed": (("generate", "a", "--base", "--seed", "-1"), 2, "seed is -1"),
    "not UTF-8": (("generate", "a\udcff", "--base"), 2, "prompt holds characters"),
    "half a digest": (("generate", "a", "--adapter", "tales@sha256:12ab"), 2, "64 hex digits"),
    "a URL": (("generate", "a", "--base", "--server", "http://127.0.0.1:1"), 2, "HOST:PORT alone"),
    "no address": (("generate", "a", "--base", "--server", ""), 2, "address is empty"),
    "deadline": (("generate", "a", "--base", "--max-tokens", "500", "--timeout", "0.01"), 1, "See --timeout."),
}


@pytest.mark.parametrize(("arguments", "code", "words"), FAILURES.values(), ids=FAILURES)
def test_failures_are_one_line(run: Run, arguments: tuple[str, ...], code: int, words: str) -> None:
    ended = run(*arguments)
    assert ended.code == code, ended.err
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert ended.out == ""


def test_a_connection_that_is_lost_is_not_called_a_server_that_never_was() -> None:
    for told, words in (
        ("Stream removed (recvmsg:Connection reset by peer (104))", "went away before its answer was whole"),
        ("failed to connect to all addresses; last error: Connection refused", "No server answers at host:1"),
    ):
        with pytest.raises(UnavailableError, match=words), asking("host:1"):
            raise from_status(grpc.StatusCode.UNAVAILABLE, told, None)


STARTS = {
    "a device": (("--device", "gpu"), "'gpu' is no device; it must be one of auto, cpu, cuda."),
    "a GPU too many": (("--device", "cuda:99"), "The device 'cuda:99' is not there"),
    "a Hub": (("--registry", "hub:some-org"), "hub:some-org is on a Hub"),
    "a slip of the pen": (("--registry", "no-such-registry"), "There is no registry no-such-registry"),
    "no folder for the port": (("--port-file", "/no/such/folder/port"), "/no/such/folder/port cannot be written"),
    "an option by its own name": (("--max-batch", "0"), "--max-batch 0: Input should be greater"),
}


@pytest.mark.parametrize(("arguments", "words"), STARTS.values(), ids=STARTS)
def test_a_server_that_cannot_start_says_why(run: Run, served: Served, arguments: tuple[str, ...], words: str) -> None:
    usual = ("--base", str(served.zoo.base), "--port", "0", "--registry", str(served.zoo.registry.root))
    ended = run("server", "start", *usual, *arguments)
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize(
    ("content", "words"), [("{nonsense", "line 1"), ('{"text": 3}\n', "text"), (b"\xff\xfe", "UTF-8")]
)
def test_files_that_are_no_inputs(run: Run, tmp_path: Path, content: str | bytes, words: str) -> None:
    file = tmp_path / "inputs"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = run("compare", "tales", "songs", "--inputs", str(file))
    assert ended.code == 2
    assert words in ended.err


def test_groups_take_over_everything_after_their_name(run: Run) -> None:
    listed = run("registry", "--help")
    assert listed.code == 0
    assert "push" in listed.out
    assert run("registry", "--help", entry=main.run).out == listed.out
    assert run("registry", "no-such-command").code == 2
    assert "--port-file" in run("server", "start", "--help").out


def test_help_and_version(run: Run) -> None:
    shown = run("--help")
    assert shown.code == 0
    for name in ("registry", "trainer", "server", "predict", "generate", "compare", "demo", "version"):
        assert name in shown.out
    assert run("version", "--json").json["adapterbay"] == "0.1.0"


def test_arms_are_read_as_they_are_written() -> None:
    assert parse_arm("base") == Selection(base=True)
    for reference in ("tales", "tales@3", "tales@champion", f"tales@{DIGEST}", "base@latest", "hub:org/repo@main"):
        assert parse_arm(reference) == Selection(adapter=reference)
    assert parse_arm("tales:0.5") == Selection(fusion={"tales": 0.5})
    assert parse_arm(f"tales@{DIGEST}:0.5+songs@2:-1") == Selection(fusion={f"tales@{DIGEST}": 0.5, "songs@2": -1.0})
    assert parse_weighted("a@champion:1e-3", "fuse") == WeightedAdapter("a@champion", 1e-3)
    assert parse_arm("hub:org/repo@main:0.5+tales:1e+2") == Selection(fusion={"hub:org/repo@main": 0.5, "tales": 100.0})
    assert parse_arm("dare_ties(a:1+b:-1, density=0.2,seed=3)") == Selection(
        fusion=Fusion((WeightedAdapter("a"), WeightedAdapter("b", -1.0)), "dare_ties", density=0.2, seed=3)
    )
    for wrong in ("svd(a:1+b:1, rank=-1)", "svd(a:1", "a+b"):
        with pytest.raises(InvalidArgument):
            parse_arm(wrong)
    for wrong in (f"tales@{DIGEST}", "tales", "tales:"):
        with pytest.raises(InvalidArgument) as caught:
            parse_weighted(wrong, "fuse")
        assert caught.value.field == "fuse"
    assert choose(None, ["a:1", "b:2"], base=False) == Selection(fusion={"a": 1.0, "b": 2.0})


def test_a_missing_package_names_the_extra() -> None:
    lacking = ModuleNotFoundError("No module named 'torch'", name="torch.nn")
    assert "pip install 'adapterbay[trainer]'" in missing_extra("adapterbay.trainer.cli:app", lacking).message
    assert "adapterbay[server]" in missing_extra("adapterbay.server.cli:app", lacking).message
    assert "adapterbay[all]" in missing_extra("adapterbay.demo.cli:demo", lacking).message
    ours = ModuleNotFoundError("No module named 'adapterbay.oops'", name="adapterbay.oops")
    with pytest.raises(ModuleNotFoundError):
        missing_extra("adapterbay.demo.cli:demo", ours)
