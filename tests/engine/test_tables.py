"""Methods other than LoRA on the input embedding, against PEFT alone: OFT turns its rows, HiRA scales them by a product
of factors, TinyLoRA adds one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_zoo
import pytest
import torch
from engine_tools import Harness, reference_logits
from tiny import load_reference, make_base

from adapterbay.registry import Registry
from adapterbay.registry.errors import UnsupportedMethod
from adapterbay.registry.fusing import FusionSettings
from adapterbay.server.adapters.device import device_bytes
from adapterbay.server.adapters.forms import LowRank, ServingForm, TableForm
from adapterbay.server.convert.effect import has_effect

METHODS = ("oft", "hira", "tinylora")
ARCHITECTURES = ("llama", "gemma3")  # gemma3 multiplies its rows
PROMPT = [7, 10, 20, 30, 9, 50]
ATOL = 2e-5


class Bench:
    """A base, one adapter of each method on its embedding alone, and PEFT's models of them."""

    def __init__(self, root: Path, architecture: str) -> None:
        self.base = make_base(root / "base", architecture, layers=2)
        self.registry = Registry.open(root / "registry")
        self.models: dict[str, Any] = {}
        for method in METHODS:
            folder = peft_zoo.make(self.base, root / method, method, settings={"target_modules": ["embed_tokens"]})
            self.registry.push(folder, method, base=f"folder:{self.base}")
            self.models[method] = peft_zoo.load(self.base, folder, method)
        self.plain = load_reference(self.base)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def harness(bench: Bench) -> Iterator[Harness]:
    with Harness(bench.base, bench.registry) as made:
        yield made


def test_logits_are_those_of_peft_in_a_mixed_batch(bench: Bench, harness: Harness) -> None:
    before = next(iter(harness.engine._model.sites.tables.values())).weight.clone()
    harness.load(*METHODS)
    answers = {method: harness.generate(method, PROMPT, 4) for method in METHODS}
    alone = harness.generate(None, PROMPT, 4)
    for method, answer in answers.items():
        tokens = answer.generated().token_ids
        assert answer.request is not None
        got = torch.stack(harness.logits[answer.request.id])
        torch.testing.assert_close(got, reference_logits(bench.models[method], PROMPT, tokens), rtol=0, atol=ATOL)
        assert float((got - reference_logits(bench.plain, PROMPT, tokens)).abs().max()) > 100 * ATOL, method
    alone.wait()
    table = next(iter(harness.engine._model.sites.tables.values()))
    assert torch.equal(table.weight, before)
    for method in METHODS:
        harness.engine.adapters.unload(harness.arm(method).parts[0].digest).result(20)
    harness.engine._loop.post(lambda: None)
    harness.generate(None, PROMPT, 1).wait()
    assert not table._own


def test_a_weighted_sum_is_that_of_the_rows(bench: Bench, harness: Harness) -> None:
    """W + Σ w (W' - W) of the rows that PEFT computes, put into the plain base."""
    weights = {"oft": 0.5, "hira": 0.25, "tinylora": -0.5}
    table = bench.plain.get_input_embeddings()
    ids = torch.arange(table.weight.shape[0])
    factor = float(getattr(table, "scalar_embed_scale", 1.0))
    with torch.no_grad():
        rows = table(ids)
        fused = rows.clone()
        for method, weight in weights.items():
            fused += weight * (bench.models[method].get_input_embeddings()(ids) - rows)
        saved, table.weight.data = table.weight.data, fused / factor
        if bench.plain.config.tie_word_embeddings:
            bench.plain.lm_head.weight = torch.nn.Parameter(saved)
        answer = harness.generate(weights, PROMPT, 4)
        tokens = answer.generated().token_ids
        assert answer.request is not None
        got = torch.stack(harness.logits[answer.request.id])
        try:
            torch.testing.assert_close(got, reference_logits(bench.plain, PROMPT, tokens), rtol=0, atol=ATOL)
        finally:
            table.weight.data = saved


def test_what_is_no_low_rank_delta_takes_no_other_fusion(harness: Harness) -> None:
    settings = FusionSettings(method="ties", density=0.5)
    for method in ("oft", "hira"):
        with pytest.raises(UnsupportedMethod, match="more than low-rank deltas"):
            harness.generate(harness.fused({"tinylora": 0.5, method: 0.5}, settings), PROMPT, 1).wait()


def test_what_was_saved_before_it_was_trained_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", layers=1)
    sites = Harness(base, Registry.open(tmp_path / "registry")).engine._model.sites
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    still = (
        TableForm(rotation=torch.eye(4).expand(2, 4, 4)),
        TableForm(gain=LowRank(one, zero, 1.0)),
        TableForm(low_rank=LowRank(one, one, 0.0)),
    )
    moved = (TableForm(rotation=-torch.eye(4).expand(2, 4, 4)), TableForm(gain=LowRank(one, one, 1.0)))
    for tables, expected in ((still, False), (moved, True)):
        for table in tables:
            form = ServingForm("sha256:0", None, tables={"embed_tokens": table})  # type: ignore[arg-type]
            assert has_effect(form, sites) is expected


def test_bytes_and_the_table_on_bfloat16(bench: Bench) -> None:
    """Factors are kept in the base's dtype, rotations in float32; a base in bfloat16 stays in bfloat16."""
    with Harness(bench.base, bench.registry, dtype="bfloat16") as harness:
        harness.load(*METHODS)
        sites = harness.engine._model.sites
        table = next(iter(sites.tables.values()))
        assert table.weight.dtype is torch.bfloat16
        vocabulary, hidden = table.weight.shape
        for method in METHODS:
            form = harness.engine.adapters.memory.form(harness.arm(method).parts[0].digest)
            assert form is not None
            own = next(iter(form.tables.values()))
            factors = own.low_rank or own.gain
            wide = 0 if own.rotation is None else own.rotation.nbytes
            narrow = 0 if factors is None else 2 * factors.rank * (vocabulary + hidden)
            assert device_bytes(form, sites) == wide + narrow > 0
            answer = harness.generate(method, PROMPT, 1)
            (token,) = answer.generated().token_ids
            assert answer.request is not None
            got = harness.logits[answer.request.id][0]
            expected = reference_logits(bench.models[method], PROMPT, [token])[0]
            assert float((got - expected).abs().max()) < 0.05 * float(expected.abs().max())
