"""Serving, measured: ours, PEFT, transformers and the installed peers side by side in one run; see bench/README.md.

    python bench/serving.py [--only NAME …] [--rounds N] [--quantize NAME …] [--json FILE] [--plot FILE]

Each system runs in a process of its own, its rounds interleaved with the others'; figures are medians over the rounds.
Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from suite import calls, classify, field, popularity, quantize
from suite.measure import Bench, Report, Settings, say
from suite.plot import draw
from suite.process import SystemFailed
from suite.report import environment, show, write

SUITES: dict[str, tuple[Callable[[Bench], None], str]] = {
    "field": (field.run, "base, one adapter and mixed 16, with every peer"),
    "adapters": (field.adapters_sweep, "16 rows over 0 to 16 adapters"),
    "punica": (popularity.run_punica, "distinct, uniform, skewed, identical; batch 32, rank 16"),
    "slora": (popularity.run_slora, "S-LoRA's trace over --registered adapters"),
    "registered": (popularity.run_registered, "--large adapters registered against 16, Zipf 1.5"),
    "thrash": (popularity.run_thrash, "48 requests over 16 adapters in turn, 8 device slots against 16"),
    "cold": (calls.run_cold, "first token of a cold adapter against a warm one"),
    "swap": (calls.run_swap, "what moving an alias costs"),
    "grpc": (calls.run_grpc, "gRPC's share of a call"),
    "start": (calls.run_start, "start and restart of the server"),
    "classify": (classify.run, "MiniLM, 16 adapters, 128 tokens, batch 32"),
    "quantize": (quantize.run, "speed, perplexity and accuracy for each --quantize"),
}
PASSED = (
    "tokens", "registered", "scale", "rate", "duration", "cv", "alpha", "large", "windows", "train_samples",
    "eval_samples", "trials", "peers",
)  # fmt: skip
"""Options that are `Settings` as they are."""
PEERS = ("transformers", "peft", "vllm-cpu", "llama-cpp")


def parse() -> argparse.Namespace:
    """The command line."""
    listed = "\n".join(f"  {name:<12}{about}" for name, (_, about) in SUITES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nsuites:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--quantize", nargs="+", help="for the suite quantize; default: all that the base can be")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="who is measured beside us")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="ServerConfig of our engines")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of the field's and Punica's requests")
    parser.add_argument("--registered", type=int, nargs="+", default=[5, 100, 1000, 2000], help="S-LoRA's n")
    parser.add_argument("--scale", type=float, default=0.125, help="scales S-LoRA's lengths U[8,512)")
    parser.add_argument("--rate", type=float, default=6.0, help="S-LoRA's requests per second")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds over which they arrive")
    parser.add_argument("--cv", type=float, default=1.0, help="coefficient of variation of their arrivals")
    parser.add_argument("--alpha", type=float, default=1.0, help="S-LoRA's power law; 1 is uniform")
    parser.add_argument("--large", type=int, default=1000, help="adapters of the suite registered")
    parser.add_argument("--trials", type=int, default=40, help="single calls of the suites swap and grpc")
    parser.add_argument("--windows", type=int, default=64, help="texts of 128 tokens for perplexity")
    parser.add_argument("--train-samples", type=int, default=800, help="reviews that train the demo's classifier")
    parser.add_argument("--eval-samples", type=int, default=240, help="held-out reviews that it labels")
    parser.add_argument("--work", type=Path, help="keeps adapters and logs here, to be used again; else they go")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--replot", type=Path, metavar="JSON", help="measures nothing: --plot from an earlier --json")
    return parser.parse_args()


def engine_settings(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE as ServerConfig reads it."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise SystemExit(f"--set takes KEY=VALUE, not {pair!r}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def quantizations(wanted: list[str] | None) -> list[str]:
    """What --quantize says, or all that the engine knows."""
    if wanted:
        return wanted
    from adapterbay.base.load import QUANTIZATIONS

    return [name for name in QUANTIZATIONS if name != "auto"]


def main() -> int:
    """Runs what is asked for; prints, writes, draws."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the systems' processes end, too
    if options.replot is not None:
        earlier = json.loads(options.replot.read_text())
        return int(not drawn(options.plot or options.replot.with_suffix(".png"), earlier["results"], earlier))
    report, circumstances = Report(), environment()
    kept = nullcontext(options.work) if options.work else tempfile.TemporaryDirectory(prefix="adapterbay-bench-")
    with kept as work:
        settings = Settings(
            work=Path(work).absolute(),
            rounds=1 if options.quick else options.rounds,
            quantize=quantizations(options.quantize) if "quantize" in options.only else [],
            engine=engine_settings(options.set),
            **{key: getattr(options, key) for key in PASSED},
        )
        bench = Bench(settings, report)
        try:
            for name in options.only:
                say(f"suite {name}")
                try:
                    SUITES[name][0](bench)
                except SystemFailed as failure:
                    report.failures[name] = str(failure)
                    say(f"FAILED {name}: {str(failure).splitlines()[0]}")
                if options.json:  # after each suite, so that a long run that breaks off has not been for nothing
                    write(options.json, report, circumstances)
        finally:
            bench.rest()
    show(report)
    if options.plot:
        drawn(options.plot, report.as_json()["results"], circumstances)
    return 1 if report.failures else 0


def drawn(path: Path, results: list[dict[str, Any]], circumstances: dict[str, Any]) -> bool:
    """Draws the picture, or says why there is none."""
    try:
        draw(path, results, title(circumstances))
    except ValueError as error:
        say(f"no picture: {error}")
        return False
    return True


def title(circumstances: dict[str, Any]) -> str:
    """What stands over the picture."""
    machine = circumstances["machine"]
    commit, plus, changes = str(circumstances["commit"] or "no commit").partition("+")
    found = f"{commit[:12]}{plus}{changes}"
    return f"SmolLM2-135M on {machine['cpu']}, {machine['cores']} cores; {found}, {circumstances['date'][:10]}"


if __name__ == "__main__":
    sys.exit(main())
