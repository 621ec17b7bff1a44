"""Distances between versions against dense matrices that PEFT itself computes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tiny import make_adapter, peft_model
from typer.testing import CliRunner

from adapterbay.registry import Manifest, Registry, Snapshot
from adapterbay.registry.cli import app, reading
from adapterbay.registry.diff import VersionDiff, WeightDistance, changes, diff_versions
from adapterbay.registry.errors import Rejected

assert reading  # its commands are in `app` once it is imported

Dense = dict[str, torch.Tensor]


def dense_deltas(base: Path, adapter: Path, task: str = "CAUSAL_LM", **settings: Any) -> Dense:
    """ΔW of every module as PEFT makes it, in float64."""
    model = peft_model(base, adapter, task, **settings)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def snapshot_of(folder: Path, **facts: Any) -> Snapshot:
    """A snapshot of a folder that no registry has seen."""
    content: dict[str, Any] = {
        "files": (),
        "peft_type": "LORA",
        "peft_config": json.loads((folder / "adapter_config.json").read_text()),
        "base_reference": "hub:org/base",
        "base_fingerprint": "sha256:" + "0" * 64,
        "task": "causal-lm",
        "rank": 1,
    }
    return Snapshot(Manifest(**(content | facts)), {path.name: path for path in folder.iterdir()})


def written(folder: Path, modules: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> Path:
    """An adapter folder of given factors."""
    folder.mkdir()
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.clone()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted(modules), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def check(found: VersionDiff, left: Dense, right: Dense) -> None:
    """Every figure against the dense matrices; a module that one side lacks is zero there."""
    assert {module.module for module in found.modules} == left.keys() | right.keys()
    for module in found.modules:
        a = left.get(module.module)
        b = right.get(module.module)
        x = a if a is not None else torch.zeros_like(b)
        y = b if b is not None else torch.zeros_like(a)
        assert module.only_in == ("b" if a is None else "a" if b is None else None)
        check_one(module, x, y)
    every = sorted(left.keys() | right.keys())
    shapes = {name: (left[name] if name in left else right[name]).shape for name in every}
    whole = [
        torch.cat([side.get(name, torch.zeros(shapes[name], dtype=torch.float64)).flatten() for name in every])
        for side in (left, right)
    ]
    check_one(found.overall, *whole)


def check_one(found: WeightDistance, x: torch.Tensor, y: torch.Tensor) -> None:
    norms = x.norm().item(), y.norm().item()
    apart = (x - y).norm().item()
    assert found.norm_a == pytest.approx(norms[0], rel=1e-5)  # PEFT multiplies in float32
    assert found.norm_b == pytest.approx(norms[1], rel=1e-5)
    assert found.distance == pytest.approx(apart, rel=1e-5)
    assert found.relative == pytest.approx(apart / max(norms), rel=1e-5)
    if all(norms):
        assert found.cosine == pytest.approx((x.flatten() @ y.flatten()).item() / math.prod(norms), abs=1e-5)
    else:
        assert found.cosine is None


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": (
        "llama",
        {"targets": ["q_proj", "v_proj"], "rank": 4},
        {"targets": ["q_proj", "v_proj"], "rank": 4, "seed": 1},
    ),
    "ranks": (
        "llama",
        {"targets": ["q_proj", "down_proj"], "rank": 4, "alpha": 3},
        {"targets": ["q_proj", "v_proj"], "rank": 16, "seed": 1},
    ),
    "rslora": (
        "llama",
        {"targets": ["q_proj", "v_proj"], "rank": 4, "settings": {"use_rslora": True}},
        {"targets": ["q_proj", "v_proj"], "rank": 8, "seed": 1, "settings": {"use_rslora": True}},
    ),
    "patterns": (
        "llama",
        {
            "targets": ["q_proj", "v_proj"],
            "rank": 4,
            "settings": {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"q_proj": 5}},
        },
        {
            "targets": ["q_proj", "v_proj"],
            "rank": 4,
            "seed": 1,
            "settings": {"use_rslora": True, "alpha_pattern": {"v_proj": 40}, "rank_pattern": {"v_proj": 40}},
        },
    ),
    "conv1d": (
        "gpt2",
        {"targets": ["c_attn", "c_proj"], "rank": 4, "settings": {"fan_in_fan_out": True}},
        {"targets": ["c_attn"], "rank": 2, "seed": 1, "settings": {"fan_in_fan_out": True}},
    ),
    "negative scaling": (
        "llama",
        {"targets": ["q_proj"], "rank": 4, "alpha": 8},
        {"targets": ["q_proj"], "rank": 4, "alpha": -8},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_distances_are_those_of_dense_matrices(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    architecture, first, second = CASES[case]
    base = bases[architecture]
    folders = [
        make_adapter(base, tmp_path / side, **{"alpha": 16, **settings})
        for side, settings in (("a", first), ("b", second))
    ]
    found = diff_versions(*(snapshot_of(folder) for folder in folders))
    check(found, *(dense_deltas(base, folder) for folder in folders))
    relative = [module.relative for module in found.modules]
    assert relative == sorted(relative, reverse=True)
    assert found.heads == ()


def test_opposite_deltas(bases: dict[str, Path], tmp_path: Path) -> None:
    a, b = (
        make_adapter(bases["llama"], tmp_path / str(alpha), targets=["q_proj"], rank=4, alpha=alpha)
        for alpha in (8, -8)
    )
    found = diff_versions(snapshot_of(a), snapshot_of(b))
    assert found.overall.cosine == pytest.approx(-1.0, abs=1e-12)
    assert found.overall.relative == pytest.approx(2.0, abs=1e-12)


def test_heads_are_compared_whole(bases: dict[str, Path], tmp_path: Path, registry: Registry) -> None:
    labels = {"a": ["no", "yes"], "b": ["no", "yes"], "c": ["1", "2", "3"]}
    shots = {}
    for index, (name, words) in enumerate(labels.items()):
        folder = make_adapter(
            bases["gpt2"], tmp_path / name, targets=["c_attn"], rank=2, seed=index, task="SEQ_CLS", labels=words
        )
        registry.push(folder, name, base=f"folder:{bases['gpt2']}", labels=words)
        shots[name] = registry.snapshot(name)
    models = {
        name: peft_model(bases["gpt2"], tmp_path / name, "SEQ_CLS", num_labels=len(labels[name])) for name in labels
    }
    heads = {
        name: model.base_model.model.score.modules_to_save["default"].weight.double() for name, model in models.items()
    }
    found = diff_versions(shots["a"], shots["b"])
    (head,) = found.heads
    assert head.module == "score.weight"
    check_one(head, heads["a"], heads["b"])
    other = diff_versions(shots["a"], shots["c"])
    assert other.heads == ()
    assert other.incomparable == ("score.weight: [2, 32] and [3, 32]",)
    assert {(change.key, change.a, change.b) for change in other.facts} >= {
        ("labels.0", "no", "1"),
        ("labels.2", None, "3"),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pairs = [{"q": (torch.randn(2, 24).to(dtype), torch.randn(16, 2).to(dtype))} for _ in range(2)]
    sides = [written(tmp_path / str(index), pair) for index, pair in enumerate(pairs)]
    found = diff_versions(*(snapshot_of(side) for side in sides))
    (module,) = found.modules
    x, y = (pair["q"][1].double() @ pair["q"][0].double() for pair in pairs)
    assert module.distance == pytest.approx((x - y).norm().item(), rel=1e-13)
    assert module.cosine == pytest.approx(((x * y).sum() / (x.norm() * y.norm())).item(), abs=1e-13)


def test_the_same_weights_are_at_distance_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 300), torch.randn(200, 2)
    same = [written(tmp_path / name, {"q": (a, b)}) for name in "xy"]
    found = diff_versions(*(snapshot_of(side) for side in same))
    assert (found.overall.distance, found.overall.relative, found.overall.cosine) == (0.0, 0.0, 1.0)
    # The same delta in other factors, and with a part that adds nothing.
    halves = torch.cat([a * 0.25, torch.zeros(1, 300)]), torch.cat([b * 4, torch.randn(200, 1)], dim=1)
    other = written(tmp_path / "z", {"q": halves}, r=3, lora_alpha=3)
    found = diff_versions(snapshot_of(same[0]), snapshot_of(other))
    assert found.overall.relative < 1e-12


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9, 1e-12])
def test_small_steps_keep_their_digits(step: float, tmp_path: Path) -> None:
    """Where ‖a‖² + ‖b‖² − 2⟨a, b⟩ has no digit left, the distance is still right."""
    torch.manual_seed(1)
    a, b = torch.randn(2, 300, dtype=torch.float64), torch.randn(200, 2, dtype=torch.float64)
    moved = b + step * torch.randn(200, 2, dtype=torch.float64)
    sides = [written(tmp_path / name, {"q": (a, factor)}) for name, factor in (("x", b), ("y", moved))]
    (module,) = diff_versions(*(snapshot_of(side) for side in sides)).modules
    exact = ((moved - b) @ a).norm().item()
    assert module.distance == pytest.approx(exact, rel=max(1e-9, 1e-15 / step * 10))


def test_a_delta_is_never_made_whole(tmp_path: Path) -> None:
    """Two million by two million would be 32 TB."""
    wide = 2_000_000
    rng = np.random.default_rng(0)
    sides = []
    for name in "xy":
        a = torch.from_numpy(rng.standard_normal((1, wide), dtype=np.float32))
        sides.append(written(tmp_path / name, {"q": (a, a.t())}, r=1, lora_alpha=1))
    found = diff_versions(*(snapshot_of(side) for side in sides))
    assert found.overall.norm_a == pytest.approx(wide, rel=0.01)
    assert found.overall.cosine == pytest.approx(0.0, abs=0.01)


def test_names_with_one_part_more_are_the_same_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    factors = torch.randn(2, 8), torch.randn(8, 2)
    short = written(tmp_path / "short", {"encoder.layer.0.q": factors, "encoder.layer.1.q": factors})
    long = written(tmp_path / "long", {"bert.encoder.layer.0.q": factors, "bert.encoder.layer.1.q": factors})
    for left, right in ((short, long), (long, short)):
        found = diff_versions(snapshot_of(left), snapshot_of(right))
        assert (found.only_a, found.only_b) == ((), ())
        assert found.overall.distance == 0.0


def test_shapes_that_differ_are_not_compared(tmp_path: Path) -> None:
    a = written(
        tmp_path / "a", {"q": (torch.randn(2, 8), torch.randn(8, 2)), "v": (torch.randn(2, 8), torch.randn(8, 2))}
    )
    b = written(
        tmp_path / "b", {"q": (torch.randn(2, 9), torch.randn(8, 2)), "v": (torch.randn(2, 8), torch.randn(8, 2))}
    )
    found = diff_versions(snapshot_of(a), snapshot_of(b, base_fingerprint="sha256:" + "1" * 64))
    assert found.incomparable == ("q: [8, 8] and [8, 9]",)
    assert [module.module for module in found.modules] == ["v"]
    assert not found.same_base


def test_what_admission_would_refuse_is_refused(tmp_path: Path) -> None:
    fine = written(tmp_path / "a", {"q": (torch.randn(2, 8), torch.randn(8, 2))})
    odd = written(tmp_path / "b", {"q": (torch.randn(2, 8), torch.randn(8, 3))})
    with pytest.raises(Rejected, match="no lora_B that fits"):
        diff_versions(snapshot_of(fine), snapshot_of(odd))
    whole = written(tmp_path / "c", {"q": (torch.ones(2, 8, dtype=torch.int32), torch.ones(8, 2, dtype=torch.int32))})
    with pytest.raises(Rejected, match="dtype I32"):
        diff_versions(snapshot_of(fine), snapshot_of(whole))


def test_changes() -> None:
    a = {"r": 8, "same": 1, "names": ["b", "a"], "off": None, "deep": {"x": 1, "y": [1, 2]}, "flag": True}
    b = {"r": 16, "same": 1, "names": ["a", "b"], "deep": {"x": 2, "y": [2, 1]}, "new": "n", "flag": 1}
    assert [(change.key, change.a, change.b) for change in changes(a, b)] == [
        ("deep.x", 1, 2),
        ("deep.y", [1, 2], [2, 1]),
        ("flag", True, 1),
        ("new", None, "n"),
        ("r", 8, 16),
    ]
    assert changes({"x": {}}, {"x": None, "y": []}) == ()


def test_metrics_and_training(tmp_path: Path) -> None:
    factors = {"q": (torch.randn(2, 8), torch.randn(8, 2))}
    trained = [
        {"metrics": {"accuracy": 0.5, "loss": 2}, "seed": 0, "loss_history": [1], "settings": {"lr": 0.1}},
        {
            "metrics": {"accuracy": 0.75, "f1": 1.0, "broken": "x"},
            "seed": 1,
            "loss_history": [2],
            "settings": {"lr": 0.1},
        },
    ]
    sides = [
        snapshot_of(written(tmp_path / str(index), factors), training=record) for index, record in enumerate(trained)
    ]
    found = diff_versions(*sides)
    assert [(item.metric, item.a, item.b, item.difference) for item in found.metrics] == [
        ("accuracy", 0.5, 0.75, 0.25),
        ("f1", None, 1.0, None),
        ("loss", 2.0, None, None),
    ]
    assert [change.key for change in found.training] == ["seed"]


# The command


@pytest.fixture
def pushed(bases: dict[str, Path], tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    for index in range(2):
        folder = make_adapter(
            bases["llama"], tmp_path / str(index), targets=["q_proj", "v_proj"][: 2 - index], rank=4, seed=index
        )
        training = {
            "metrics": {"accuracy": 0.5 + index / 4},
            "settings": {"note": "[red]x[/red]\x1b[31m"},
            "seed": index,
        }
        (folder / "training.json").write_text(json.dumps(training))
        registry.push(folder, "team/x", base=f"folder:{bases['llama']}")
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", str(registry.root))
    return registry


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_the_command_says_it_for_people(pushed: Registry) -> None:
    shown = run("diff", "team/x@1", "team/x@2")
    assert "A: team/x@1" in shown
    assert "target_modules" in shown
    assert "+0.25" in shown
    assert "only in A" in shown
    assert "2 modules in both, 2 only in A, 0 only in B" in shown
    assert "\x1b" not in shown
    cut = run("diff", "team/x@1", "team/x@2", "--limit", "1")
    assert "3 more modules" in cut
    assert len(cut.splitlines()) < len(shown.splitlines())
    assert "same content" in run("diff", "team/x@1", "team/x@1")


def test_the_command_says_it_for_machines(pushed: Registry) -> None:
    output = run("diff", "team/x@1", "team/x", "--json")
    assert output.count("\n") == 1
    found = json.loads(output)
    assert found["b"]["version"] == 2
    assert found["diff"]["overall"]["module"] == "all modules"
    assert len(found["diff"]["modules"]) == 4
    expected = diff_versions(pushed.snapshot("team/x@1"), pushed.snapshot("team/x@2"))
    assert found["diff"]["overall"]["cosine"] == expected.overall.cosine


def test_a_version_that_is_not_there(pushed: Registry) -> None:
    assert "has no version 7" in run("diff", "team/x@1", "team/x@7", code=1)
