"""A server that loads signed versions only serves what a trusted key signed, and refuses the rest by its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from serving_tools import Failure, Served, tiny_config
from signing_tools import KeyPair, make_keys
from tiny import TARGETS, make_base
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument
from adapterbay.registry.signing import sign
from adapterbay.server.cli import read_config
from adapterbay.server.engine import Engine
from adapterbay.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

BRIEF = inference_pb2.Sampling(max_tokens=3, ignore_end=True)


@dataclass(frozen=True)
class Guarded:
    """A server that trusts one key, and what is asked of it."""

    served: Served
    channel: grpc.Channel
    trusted: KeyPair
    stranger: KeyPair

    @property
    def registry(self) -> Registry:
        return self.served.zoo.registry

    def sign(self, reference: str, keys: KeyPair) -> None:
        found = self.registry.resolve(reference)
        bundle = sign(self.registry.open_snapshot(found.digest), keys.private)
        self.registry.attach_signature(found.name, found.version, bundle, key=keys.fingerprint)

    def generate(self, reference: str) -> inference_pb2.GenerateResponse:
        stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return stub.Generate(inference_pb2.GenerateRequest(adapter=reference, prompt="go", sampling=BRIEF))

    def refusal(self, reference: str) -> Failure:
        with pytest.raises(grpc.RpcError) as caught:
            self.generate(reference)
        return Failure(caught.value)

    def unload(self, reference: str) -> None:
        stub = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        stub.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(adapter=reference))


def push(zoo: Zoo, name: str, folder: Path, seed: int) -> None:
    zoo.add(name, folder / f"{name.replace('/', '-')}-{seed}", targets=TARGETS["llama"][0], rank=4, seed=seed)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    root = tmp_path_factory.mktemp("guarded")
    zoo = Zoo(make_base(root / "base", "llama"), Registry.open(root / "registry"))
    for seed in (1, 2, 3, 4):
        push(zoo, "tales", root, seed)
    trusted, stranger = make_keys(root, "trusted"), make_keys(root, "stranger")
    settings = {"require_signature": True, "trusted_keys": (str(trusted.public),)}
    with Served(zoo, **settings) as served, grpc.insecure_channel(served.address) as channel:
        made = Guarded(served, channel, trusted, stranger)
        made.sign("tales@1", trusted)
        made.sign("tales@2", stranger)
        zoo.registry.attach_signature("tales", 4, zoo.registry.snapshot("tales@1").signature or b"")
        yield made


def test_a_version_that_a_trusted_key_signed_is_served(guarded: Guarded) -> None:
    answer = guarded.generate("tales@1")
    (adapter,) = answer.provenance.adapters
    assert adapter.digest == guarded.registry.resolve("tales@1").digest
    assert answer.generation.text


@pytest.mark.parametrize(
    ("reference", "reason"),
    [("tales@3", "NOT_SIGNED"), ("tales@2", "UNKNOWN_KEY"), ("tales@4", "BAD_SIGNATURE")],
)
def test_every_other_version_is_refused_by_reason(guarded: Guarded, reference: str, reason: str) -> None:
    digest = guarded.registry.resolve(reference).digest
    for _ in range(2):  # also the second time, when it was heard of before
        failure = guarded.refusal(reference)
        assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, reason)
        assert digest in failure.message
    stub = adapters_pb2_grpc.AdapterServiceStub(guarded.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter=reference))
    assert Failure(caught.value).reason == reason
    assert digest not in guarded.served.engine.adapters.resident()


def test_a_name_that_was_served_does_not_carry_its_trust_along(guarded: Guarded) -> None:
    registry = guarded.registry
    registry.set_alias("tales", "champion", 1)
    guarded.generate("tales@champion")
    registry.set_alias("tales", "champion", 3)
    assert guarded.refusal("tales@champion").reason == "NOT_SIGNED"


def test_the_same_content_is_trusted_under_any_name(guarded: Guarded) -> None:
    folder = guarded.served.zoo.folders["tales"].parent / "tales-1"
    guarded.registry.push(folder, "copy", base=f"folder:{guarded.served.zoo.base}")
    assert guarded.registry.resolve("copy").digest == guarded.registry.resolve("tales@1").digest
    guarded.generate("copy")


def test_what_is_signed_later_is_served_then(guarded: Guarded, tmp_path: Path) -> None:
    push(guarded.served.zoo, "late", tmp_path, 11)
    assert guarded.refusal("late").reason == "NOT_SIGNED"
    guarded.sign("late", guarded.trusted)
    guarded.generate("late")


def test_every_load_asks_the_registry_again(guarded: Guarded, tmp_path: Path) -> None:
    push(guarded.served.zoo, "again", tmp_path, 12)
    guarded.sign("again", guarded.trusted)
    guarded.generate("again")
    guarded.sign("again", guarded.stranger)  # takes the place of the first signature
    guarded.served.idle()
    guarded.unload("again")
    assert guarded.refusal("again").reason == "UNKNOWN_KEY"


def test_the_base_itself_needs_no_signature(guarded: Guarded) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(guarded.channel)
    assert stub.Generate(inference_pb2.GenerateRequest(base=True, prompt="go", sampling=BRIEF))


def test_a_server_that_asks_for_none_serves_unsigned_versions(guarded: Guarded) -> None:
    zoo = guarded.served.zoo
    with Served(zoo) as served, grpc.insecure_channel(served.address) as channel:
        Guarded(served, channel, guarded.trusted, guarded.stranger).generate("tales@3")


@pytest.mark.parametrize("made", ["nothing", "private"])
def test_a_wrong_key_is_told_before_the_base_is_loaded(guarded: Guarded, tmp_path: Path, made: str) -> None:
    path = guarded.trusted.private if made == "private" else tmp_path / "nowhere.pub"
    config = tiny_config(guarded.served.zoo, base="folder:/no/base", require_signature=True, trusted_keys=(str(path),))
    with pytest.raises(InvalidArgument, match=path.name):
        Engine.create(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"require_signature": True}, "needs a trusted key"),
        ({"trusted_keys": ("release.pem.pub",)}, "change nothing without require_signature"),
    ],
)
def test_half_a_setting_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        read_config(**settings)
    assert "settings are wrong: " in caught.value.message
    assert ": :" not in caught.value.message
