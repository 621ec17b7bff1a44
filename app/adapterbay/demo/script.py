"""The demo's story, step by step; each step checks what it claims, and the report says what held."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterbay.client import Client
from adapterbay.comparison import ArmAccuracy, PairedComparison, compare_paired
from adapterbay.demo import recipes, serving
from adapterbay.demo.console import Narrator
from adapterbay.registry import Registry, locate

NAME, ALIAS = "sentiment", "champion"
ASK_CRITIC = "Write a one-sentence review of a good movie."
CLEARLY = 0.1
"""By how much in accuracy a trained adapter must beat the untouched base."""


class Demo:
    """Runs every step in `folder` and collects `report`. `checks` maps what was claimed to whether it held."""

    def __init__(self, folder: Path, narrator: Narrator) -> None:
        self._folder = folder
        self._tell = narrator
        self._registry = Registry.open(folder / "registry")
        self.report: dict[str, Any] = {}
        self.checks: dict[str, bool] = {}

    def run(self) -> dict[str, Any]:
        """All steps in order. Returns the report, `ok` only if every check held."""
        recipes.check_packages()
        self._base()
        self._train()
        self._push()
        with (
            tempfile.TemporaryDirectory(prefix="adapterbay-server-") as scratch,
            self._server(Path(scratch)) as running,
            Client(running.address, timeout=300) as client,
        ):
            self._crowd(client)
            self._swap(client)
            self._compare(client)
        self._stopped(running)
        self.report["checks"] = self.checks
        self.report["seconds"] = round(self._tell.seconds, 1)
        self.report["ok"] = all(self.checks.values())
        return self.report

    def _base(self) -> None:
        self._tell.step("One base model")
        with self._tell.bar("unpacking the base (once; later runs find it converted)"):
            base = locate(recipes.BASE)
        self._tell.say(f"{base.reference}: SmolLM2-135M-Instruct, {base.weight_bytes / 1e6:.0f} MB of weights.")
        self._tell.say(f"Its fingerprint is {base.fingerprint[:19]}…; adapters of any other base are refused.")
        self.report["base"] = {"reference": str(base.reference), "fingerprint": base.fingerprint}

    def _train(self) -> None:
        self._tell.step("Train three adapters on real movie reviews")
        few = recipes.recipe(recipes.SENTIMENT, self._folder / "sentiment-few", train_samples=recipes.FEW)
        more = recipes.recipe(recipes.SENTIMENT, self._folder / "sentiment-more")
        critic = recipes.recipe(recipes.CRITIC, self._folder / "critic")
        self.report["training"] = {
            "sentiment few": self._train_one(f"sentiment, {recipes.FEW} reviews", few),
            "sentiment more": self._train_one(f"sentiment, {recipes.MORE} reviews", more),
            "critic": self._train_one("critic, writes reviews itself", critic),
        }
        metrics = self.report["training"]["critic"]["metrics"]
        self.checks["critic lowers held-out perplexity below the base's"] = (
            metrics["perplexity"] < 0.8 * metrics["base_perplexity"]
        )

    def _train_one(self, title: str, settings: dict[str, Any]) -> dict[str, Any]:
        from adapterbay.trainer import parse_config, run

        with self._tell.bar(title) as bar:
            result = run(parse_config(settings), progress=bar)
        record = result.training_record
        shown = {name: round(float(value), 4) for name, value in result.metrics.items()}
        figures = (
            f"accuracy {shown['accuracy']:.3f}"
            if "accuracy" in shown
            else f"perplexity of real reviews {shown['perplexity']:.1f}, the base's {shown['base_perplexity']:.1f}"
        )
        self._tell.say(f"{title}: {record['duration_seconds']:.0f} s, held-out {figures}.")
        return {"metrics": shown, "seconds": round(record["duration_seconds"], 1), "data": record["data"]["digest"]}

    def _push(self) -> None:
        self._tell.step("Push them: immutable versions, movable aliases")
        pushed = [
            self._registry.push(self._folder / "sentiment-few", NAME, aliases=[ALIAS]),
            self._registry.push(self._folder / "sentiment-more", NAME, aliases=["challenger"]),
            self._registry.push(self._folder / "critic", "critic"),
        ]
        self._tell.table(
            ["version", "aliases", "digest"],
            [[f"{p.name}@{p.version}", ", ".join(p.aliases), p.digest[:19] + "…"] for p in pushed],
        )
        self.report["versions"] = {f"{p.name}@{p.version}": p.digest for p in pushed}
        self.checks["the registry verifies"] = not self._registry.verify().problems

    def _server(self, scratch: Path) -> Any:
        self._tell.step("Start one server: one base in memory, adapters on demand")
        return serving.server(recipes.BASE, self._registry.root, scratch)

    def _crowd(self, client: Client) -> None:
        self._tell.say("It is up. Sixteen requests at once: adapters, fusions and the base, in one mixed batch.")
        reviews = self._held_out[0]
        classifiers: list[tuple[str, dict[str, Any]]] = [
            ("sentiment@1", {"adapter": f"{NAME}@1"}),
            ("sentiment@2", {"adapter": f"{NAME}@2"}),
            ("half of each", {"fusion": {f"{NAME}@1": 0.5, f"{NAME}@2": 0.5}}),
        ]
        writers: list[tuple[str, dict[str, Any]]] = [
            ("base", {"base": True}),
            ("critic", {"adapter": "critic"}),
            ("critic at 0.6", {"fusion": {"critic": 0.6}}),
            ("critic + sentiment@2", {"fusion": {"critic": 0.8, f"{NAME}@2": 0.2}}),
        ]
        questions = [
            serving.Question("classify", who, chosen, reviews[i]) for i in range(3) for who, chosen in classifiers
        ]
        prompts = (ASK_CRITIC, "Write a one-sentence review of a bad movie.")
        questions += [serving.Question("generate", who, chosen, p) for p in prompts for who, chosen in writers][:7]
        replies = serving.ask_all(client, questions)
        self._tell.table(
            ["who", "asked", "answer"],
            [[r.question.who, r.question.text[:34], (r.error or r.text)[:58]] for r in replies],
        )
        self.report["crowd"] = [
            {
                "who": r.question.who,
                "answer": r.text,
                "versions": r.versions,
                "seconds": round(r.seconds, 3),
                "error": r.error,
            }
            for r in replies
        ]
        first = {r.question.who: r.text for r in replies if r.question.text == ASK_CRITIC}
        self.checks["all sixteen were answered"] = len(replies) == 16 and not any(r.error for r in replies)
        self.checks["the critic does not write like the base"] = first["critic"] != first["base"]

    def _swap(self, client: Client) -> None:
        self._tell.step(f"Move the alias {ALIAS} from version 1 to 2 while requests flow")
        swap = serving.swap_under_load(client, self._registry, NAME, ALIAS, (1, 2), self._held_out[0])
        answered = sum(swap.answered.values())
        self._tell.say(
            f"{answered} requests answered, {len(swap.failed)} failed: {swap.answered.get(1, 0)} by version 1, then "
            f"{swap.answered.get(2, 0)} by version 2; {swap.stale} stale."
        )
        self._tell.say(f"{swap.old_digest[:19]}… answered before, {swap.new_digest[:19]}… answers now.")
        self.report["swap"] = {
            "answered": {str(version): count for version, count in swap.answered.items()},
            "failed": len(swap.failed),
            "stale": swap.stale,
            "old_digest": swap.old_digest,
            "new_digest": swap.new_digest,
        }
        self.checks["no request failed while the alias moved"] = not swap.failed
        self.checks["both versions answered, none stale after the move"] = (
            min(swap.answered.get(1, 0), swap.answered.get(2, 0)) > 0 and swap.stale == 0
        )
        self.checks["the new digest answers"] = swap.new_digest == self.report["versions"][f"{NAME}@2"]

    def _compare(self, client: Client) -> None:
        texts, labels, names = self._held_out
        self._tell.step(f"Compare version 1 and 2 on {len(texts)} held-out reviews, in the same batches")
        with self._tell.bar("comparing", total=2 * len(texts)) as bar:
            first, second = serving.labels_of_two(client, (f"{NAME}@1", f"{NAME}@2"), texts, bar.advance)
        with self._tell.bar("asking the untouched base", total=len(texts)) as bar:
            base = serving.labels_of_base(client, texts, names, bar.advance)
        versions = compare_paired(labels, first, second)
        against_base = compare_paired(labels, base, second)
        self._tell.table(
            ["arm", "accuracy", "95 % interval (Wilson)"],
            [
                _accuracy_row("the base alone, asked in words", against_base.first),
                _accuracy_row(f"{NAME}@1 ({recipes.FEW} reviews)", versions.first),
                _accuracy_row(f"{NAME}@2 ({recipes.MORE} reviews)", versions.second),
            ],
        )
        self._verdict(versions, texts, labels, first, second)
        self.report["comparison"] = {
            "versions": _as_json(versions),
            "against_base": _as_json(against_base),
        }
        gain = against_base.second.accuracy - against_base.first.accuracy
        self.checks["the trained adapter clearly beats the untouched base"] = (
            gain >= CLEARLY and against_base.verdict == "second is better"
        )

    def _verdict(
        self, found: PairedComparison, texts: Sequence[str], labels: Sequence[str], *answers: Sequence[str]
    ) -> None:
        self._tell.say(
            f"They disagree on {len(found.disagreements)}: only version 1 is right on {found.only_first_right}, only "
            f"version 2 on {found.only_second_right}. Some of them:"
        )
        self._tell.table(
            ["review", "truth", "version 1", "version 2"],
            [[texts[i][:60], labels[i], answers[0][i], answers[1][i]] for i in found.disagreements[:6]],
        )
        words = {
            "first is better": "version 1 is better; the alias should go back",
            "second is better": "version 2 is better; the move was right",
            "inconclusive": "inconclusive: these reviews cannot tell them apart; ask more of them",
        }
        self._tell.say(f"Exact McNemar p = {found.p_value:.2g}. Verdict: {words[found.verdict]}.")

    def _stopped(self, running: serving.RunningServer) -> None:
        self._tell.step("Stop the server")
        self._tell.say(f"SIGTERM; it drained and left with exit code {running.exit_code}.")
        self.checks["the server drained and left with exit code 0"] = running.exit_code == 0

    @cached_property
    def _held_out(self) -> tuple[list[str], list[str], tuple[str, ...]]:
        """Texts, labels and label names of the reviews that no training run of the demo saw."""
        from adapterbay.trainer import parse_config
        from adapterbay.trainer.data import Labelled, prepare

        data = prepare(parse_config(recipes.recipe(recipes.SENTIMENT, self._folder / "unused")))
        rows = [row for row in data.evaluation if isinstance(row, Labelled)]
        return [row.text for row in rows], [data.labels[row.label] for row in rows], data.labels


def _accuracy_row(name: str, arm: ArmAccuracy) -> list[str]:
    return [name, f"{arm.accuracy:.3f}", f"{arm.low:.3f} – {arm.high:.3f}"]


def _as_json(found: PairedComparison) -> dict[str, Any]:
    return {**asdict(found), "disagreements": len(found.disagreements)}
