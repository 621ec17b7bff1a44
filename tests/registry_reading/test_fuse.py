"""`fuse` against PEFT's `add_weighted_adapter` called by hand, and against dense sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fuse_tools import Bench, deltas, logits
from safetensors.torch import load_file, save_file
from tiny import load_reference, make_adapter, peft_model

from adapterbay.registry.errors import BaseMismatch, InvalidArgument, NoEffect, NotFound, TaskMismatch
from adapterbay.registry.fusing import METHODS, FusionSettings

ARCHITECTURES = ("llama", "gpt2")
WEIGHTS = (0.7, -0.4)


def settings_of(method: str) -> FusionSettings:
    return FusionSettings(
        method,
        density=0.4 if FusionSettings(method).prunes else None,
        seed=11 if FusionSettings(method).drops_at_random else None,
        rank=5 if FusionSettings(method).decomposes else None,
        majority_sign="frequency" if method == "dare_ties" else None,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pair", ARCHITECTURES, indirect=True)
def test_every_method_is_what_peft_does_by_hand(pair: Bench, method: str) -> None:
    settings = settings_of(method)
    hand = pair.by_hand(WEIGHTS, settings)
    receipt = pair.fuse([f"a@1:{WEIGHTS[0]}", f"b:{WEIGHTS[1]}"], settings)
    ours = peft_model(pair.base, pair.pulled(receipt))
    expected, found = deltas(hand, "fused"), deltas(ours, "default")
    assert expected.keys() == found.keys()
    exact = not settings.decomposes  # a full and a reduced SVD round differently
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
    plain = logits(load_reference(pair.base))
    torch.testing.assert_close(logits(ours), logits(hand), rtol=0, atol=1e-12 if exact else 2e-5)
    assert (logits(ours) - plain).abs().max() > 1e-3  # it does something
    assert not torch.equal(expected[next(iter(expected))], torch.zeros(()))


@pytest.mark.parametrize("pair", ARCHITECTURES, indirect=True)
def test_cat_is_the_weighted_sum(pair: Bench) -> None:
    receipt = pair.fuse(["a:0.7", "b:-0.4"], FusionSettings("cat"))
    assert receipt.manifest.rank == 8
    ours = deltas(peft_model(pair.base, pair.pulled(receipt)), "default")
    parts = [deltas(peft_model(pair.base, pair.folders[name]), "default") for name in "ab"]
    assert ours.keys() == parts[0].keys() | parts[1].keys()
    for name, delta in ours.items():
        expected = sum(
            (weight * part[name] for weight, part in zip(WEIGHTS, parts, strict=True) if name in part),
            torch.zeros_like(delta),
        )
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


def test_rslora_is_not_scaled_twice(bench: Bench) -> None:
    """PEFT keeps use_rslora of the first adapter, whose scaling alpha / √rank is then not 1."""
    bench.add("a", targets=["q_proj"], settings={"use_rslora": True})
    bench.add("b", targets=["q_proj"], rank=8)
    receipt = bench.fuse(["a:1", "b:0.5"], FusionSettings("cat"))
    assert receipt.manifest.peft_config["use_rslora"] is False
    ours = deltas(peft_model(bench.base, bench.pulled(receipt)), "default")
    parts = [deltas(peft_model(bench.base, bench.folders[name]), "default") for name in "ab"]
    hand = deltas(bench.by_hand([1.0, 0.5], FusionSettings("cat")), "fused")
    for name, delta in ours.items():
        torch.testing.assert_close(delta, parts[0][name] + 0.5 * parts[1][name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(hand[name], delta * 12**0.5, rtol=1e-5, atol=1e-6)  # if this fails, PEFT was mended


def test_layers_of_all_parts_stay(bench: Bench) -> None:
    """PEFT would look for the second adapter's layers where the first one has its own."""
    bench.add("a", targets=["q_proj"], settings={"layers_to_transform": [0]})
    bench.add("b", targets=r".*\.1\..*\.(q_proj|v_proj)")
    receipt = bench.fuse(["a:1", "b:1"], FusionSettings("linear"))
    assert receipt.manifest.peft_config["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    tensors = load_file(bench.pulled(receipt) / "adapter_model.safetensors")
    assert len(tensors) == 6
    assert all(tensor.any() for tensor in tensors.values())
    bench.folders["b"] = make_adapter(
        bench.base, bench.root / "c", targets=["q_proj"], rank=4, settings={"layers_to_transform": [1]}
    )
    hand = deltas(bench.by_hand([1.0, 1.0], FusionSettings("linear")), "fused")
    assert [name for name in hand if ".layers.1." in name] == []  # if this fails, PEFT was mended


def test_ranks_of_single_modules(bench: Bench) -> None:
    shared = {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"q_proj": 1}}
    bench.add("a", targets=["q_proj", "v_proj"], settings=shared)
    bench.add("b", targets=["q_proj", "v_proj"], settings=shared)
    receipt = bench.fuse(["a:1", "b:1"], FusionSettings("linear"))
    config = receipt.manifest.peft_config
    assert (config["r"], set(config["rank_pattern"].values())) == (6, {4})
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["target_modules"] == ["q_proj", "v_proj"]  # in the parents' own words
    parts = [load_file(bench.folders[name] / "adapter_model.safetensors") for name in "ab"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    ours = load_file(bench.pulled(receipt) / "adapter_model.safetensors")
    torch.testing.assert_close(ours[key], (1 / 4) ** 0.5 * (parts[0][key] + parts[1][key]))
    model = deltas(peft_model(bench.base, bench.root / "pulled-1"), "default")
    for name, delta in model.items():
        stem = name if name.startswith("base_model") else f"base_model.{name}"
        torch.testing.assert_close(delta, ours[f"{stem}.lora_B.weight"] @ ours[f"{stem}.lora_A.weight"])
    bench.add("c", targets=["q_proj", "v_proj"], settings={"rank_pattern": {"q_proj": 6}})
    with pytest.raises(InvalidArgument, match=r"needs equal ranks, but model\.layers\.0\.\S+ has 4 and 6"):
        bench.fuse(["a:1", "c:1"], FusionSettings("linear"))
    assert bench.fuse(["a:1", "c:1"], FusionSettings("cat")).manifest.rank == 12


def test_half_precision_parts(pair: Bench) -> None:
    """PEFT computes in float32 whatever the files hold, and so is the result stored."""
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float16)):
        file = pair.folders[name] / "adapter_model.safetensors"
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
        pair.registry.push(pair.folders[name], name, base=f"folder:{pair.base}")
    hand = deltas(pair.by_hand(WEIGHTS, FusionSettings("cat")), "fused")
    receipt = pair.fuse([f"a@2:{WEIGHTS[0]}", f"b@2:{WEIGHTS[1]}"], FusionSettings("cat"))
    folder = pair.pulled(receipt)
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    for name, delta in deltas(peft_model(pair.base, folder), "default").items():
        assert torch.equal(delta, hand[name])


def test_a_rank_above_what_a_layer_has(bench: Bench) -> None:
    """A 32 × 16 layer has 16 singular vectors: its entry says so, and plain PEFT loads it."""
    bench.add("a", targets=["k_proj", "q_proj"])
    bench.add("b", targets=["k_proj", "q_proj"])
    receipt = bench.fuse(["a:1", "b:1"], FusionSettings("svd", rank=20))
    assert receipt.manifest.peft_config["rank_pattern"] == {
        rf"model\.layers\.{layer}\.self_attn\.k_proj": 16 for layer in (0, 1)
    }
    cat = bench.fuse(["a:1", "b:1"], FusionSettings("cat"))
    torch.testing.assert_close(bench.logits(receipt), bench.logits(cat), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bench", ["gpt2", "bert"], indirect=True)
def test_heads_are_averaged_as_the_server_does(bench: Bench) -> None:
    from adapterbay.server.adapters.forms import ServingForm
    from adapterbay.server.heads import Head, HeadLayer, HeadPooling
    from adapterbay.server.pooling import blend_heads

    labels = ("bad", "good")
    targets = ["c_attn"] if "gpt2" in str(bench.base) else ["query"]
    for name in "ab":
        bench.add(name, targets=targets, task="SEQ_CLS", labels=labels)
    receipt = bench.fuse(["a:3", "b:-1"], FusionSettings("linear"))
    assert receipt.manifest.labels == labels
    assert receipt.manifest.task == "sequence-classification"
    files = [bench.folders["a"], bench.folders["b"], bench.pulled(receipt)]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in files]
    (weight_key,) = (key for key in tensors[0] if key.endswith(("score.weight", "classifier.weight")))
    bias_key = weight_key.replace("weight", "bias")
    heads = [Head((HeadLayer(part[weight_key], part.get(bias_key)),), labels, HeadPooling.LAST) for part in tensors[:2]]
    forms = [ServingForm("", receipt.manifest, head=head) for head in heads]
    blended = blend_heads(forms, [3.0, -1.0]).layers[0]
    torch.testing.assert_close(tensors[2][weight_key], blended.weight)
    assert (blended.bias is None) == (bias_key not in tensors[2])
    if blended.bias is not None:
        torch.testing.assert_close(tensors[2][bias_key], blended.bias)
    # Plain PEFT takes it: the head of the pulled folder answers.
    model = peft_model(bench.base, files[2], "SEQ_CLS", num_labels=2)
    head = model.base_model.model.get_submodule(weight_key.split(".")[-2]).modules_to_save["default"]
    torch.testing.assert_close(head.weight, blended.weight)


def test_what_does_not_go_together_is_refused(bench: Bench, bases: dict[str, Path]) -> None:
    bench.add("a", targets=["q_proj"])
    bench.add("b", targets=["q_proj"], rank=8)
    bench.add("yes-no", targets=["q_proj"], task="SEQ_CLS", labels=["no", "yes"])
    bench.add("no-yes", targets=["q_proj"], task="SEQ_CLS", labels=["yes", "no"])
    other = Bench(bases["gpt2"], bench.registry, bench.root / "other")
    other.add("c", targets=["c_attn"])
    fingerprints = {bench.registry.snapshot(name).manifest.base_fingerprint for name in "ac"}
    with pytest.raises(BaseMismatch, match="only adapters of one base") as mismatch:
        bench.fuse(["a:1", "c:1"], FusionSettings())
    assert all(fingerprint in mismatch.value.message for fingerprint in fingerprints)
    with pytest.raises(BaseMismatch, match="Pass --base"):
        bench.fuse(["a:1", "b:1"], FusionSettings(), base=f"folder:{bases['gpt2']}")
    with pytest.raises(TaskMismatch, match="one task"):
        bench.fuse(["a:1", "yes-no:1"], FusionSettings())
    with pytest.raises(TaskMismatch, match="different labels"):
        bench.fuse(["yes-no:1", "no-yes:1"], FusionSettings())
    with pytest.raises(InvalidArgument, match="a@1 has 4, b@1 has 8: use cat or svd"):
        bench.fuse(["a:1", "b:1"], FusionSettings("ties"))
    with pytest.raises(InvalidArgument, match="two versions or more"):
        bench.fuse(["a:1"], FusionSettings())
    with pytest.raises(InvalidArgument, match="same content as a@1"):
        bench.fuse(["a:1", "b:1", "a@1:2"], FusionSettings())
    with pytest.raises(NotFound):
        bench.fuse(["a:1", "nobody:1"], FusionSettings())
    with pytest.raises(NotFound):
        bench.registry.versions("out")
    bench.add("yes-no-2", targets=["q_proj"], task="SEQ_CLS", labels=["no", "yes"])
    with pytest.raises(TaskMismatch, match="add up to -1"):
        bench.fuse(["yes-no:1", "yes-no-2:-2"], FusionSettings())


def test_parts_that_cancel_out_have_no_effect(bench: Bench) -> None:
    bench.add("a", targets=["q_proj"])
    folder = make_adapter(bench.base, bench.root / "again", targets=["q_proj"], rank=4, seed=0)
    (folder / "training.json").write_text("{}")  # the same weights in another version
    bench.registry.push(folder, "b", base=f"folder:{bench.base}")
    with pytest.raises(NoEffect):
        bench.fuse(["a:1", "b:-1"], FusionSettings("linear"))
    with pytest.raises(NoEffect):
        bench.fuse(["a:1", "b:1"], FusionSettings("ties", density=1e-6))


def test_what_is_recorded(pair: Bench) -> None:
    parents = tuple(pair.registry.resolve(name).digest for name in "ab")
    receipt = pair.fuse(["a:0.7", "b:0.3"], FusionSettings("dare_ties"), aliases=["champion"])
    assert receipt.aliases == ("champion",)
    assert receipt.manifest.parents == parents
    training = receipt.manifest.training
    assert training is not None
    assert training["fusion"] == {
        "method": "dare_ties",
        "parents": list(parents),
        "weights": [0.7, 0.3],
        "density": 0.5,
        "seed": 0,
    }
    assert training["parents"] == list(parents)
    assert training["base"]["fingerprint"] == receipt.manifest.base_fingerprint
    assert receipt.manifest.library_versions["peft"]
    assert "a@1" not in receipt.manifest.to_bytes().decode()  # no names: the digest is of the content


def test_the_shortest_trained_length_counts(bench: Bench) -> None:
    bench.add("a", targets=["q_proj"], training={"max_length": 96})
    bench.add("b", targets=["q_proj"], training={"max_length": 64})
    training = bench.fuse(["a:1", "b:1"], FusionSettings()).manifest.training
    assert training is not None
    assert training["max_length"] == 64


@pytest.mark.parametrize("method", ["cat", "svd", "dare_linear"])
def test_the_same_fusion_has_the_same_digest(pair: Bench, method: str) -> None:
    state = torch.get_rng_state()
    first = pair.fuse(["a:0.7", "b:0.3"], FusionSettings(method))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    again = pair.fuse(["a:0.7", "b:0.3"], FusionSettings(method), out="elsewhere")
    assert again.digest == first.digest
    if method == "dare_linear":
        assert pair.fuse(["a:0.7", "b:0.3"], FusionSettings(method, seed=1)).digest != first.digest
