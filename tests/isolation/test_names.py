"""A name means what was pushed last, at once and without a restart, and never what was cached for it before.

The reports behind it: vllm 30931, 42125 and 38606, llama.cpp 26207 and 19153, sglang 24638, tgi 2860.
"""

from __future__ import annotations

import pytest
from isolation.interface import EngineUnderTest, Failed
from isolation.reference import LOGIT_TOLERANCE, Alone, Folders, needs, same, until
from safetensors.torch import load_file, save_file

PROMPT = "The same long beginning for everybody, so that it is worth caching: once upon a time there was a sea, "
TOKENS = 10


def test_a_name_pushed_again_answers_anew_although_its_prompt_is_cached(
    engine: EngineUnderTest, folders: Folders, alone: Alone
) -> None:
    old, new = (alone.generates(PROMPT, folders.generator(number), TOKENS) for number in (0, 1))
    assert old.tokens != new.tokens
    engine.push("again", folders.generator(0))
    for _ in range(2):  # the second time from the cache, where there is one
        same(engine.generate(PROMPT, "again", TOKENS).wait(), old)
    engine.push("again", folders.generator(1))
    for _ in range(2):
        same(engine.generate(PROMPT, "again", TOKENS).wait(), new)


def test_a_row_keeps_the_weights_that_it_began_with(engine: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    engine.push("moving", folders.generator(2))
    running = engine.generate(PROMPT, "moving", 40)
    until(lambda: running.tokens_so_far() >= 2)
    engine.push("moving", folders.generator(3))
    later = [engine.generate(PROMPT, "moving", TOKENS) for _ in range(3)]
    same(running.wait(), alone.generates(PROMPT, folders.generator(2), 40))
    for job in later:
        same(job.wait(), alone.generates(PROMPT, folders.generator(3), TOKENS))


def test_a_head_pushed_again_labels_anew(engine: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    needs(engine, "classify")
    for number, labels in ((20, 2), (21, 2), (22, 3)):
        engine.push("judge", folders.classifier(number, labels))
        want = alone.classifies(PROMPT, folders.classifier(number, labels), labels)
        for _ in range(2):
            assert engine.classify(PROMPT, "judge") == pytest.approx(want, abs=LOGIT_TOLERANCE)


def test_a_fusion_takes_what_its_parts_mean_now(engine: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    needs(engine, "fusion")
    engine.push("stays", folders.generator(1))
    for number in (0, 2):
        engine.push("comes", folders.generator(number))
        want = alone.generates(PROMPT, {folders.generator(1): 0.6, folders.generator(number): 0.4}, TOKENS)
        for _ in range(2):
            same(engine.generate(PROMPT, {"stays": 0.6, "comes": 0.4}, TOKENS).wait(), want)


def test_an_older_version_can_still_be_asked_for(engine: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    needs(engine, "versions")
    for number in (0, 1):
        engine.push("kept", folders.generator(number))
    jobs = [(number, engine.generate(PROMPT, f"kept@{number + 1}", TOKENS)) for number in (0, 1, 0, 1)]
    for number, job in jobs:
        same(job.wait(), alone.generates(PROMPT, folders.generator(number), TOKENS))


def test_an_alias_that_moves_takes_its_requests_with_it(
    engine: EngineUnderTest, folders: Folders, alone: Alone
) -> None:
    """Forth and back, with the prompt cached under both."""
    needs(engine, "alias", "versions")
    engine.push("turning", folders.generator(0), alias="champion")
    engine.push("turning", folders.generator(1))
    for version in (1, 2, 1, 2):
        engine.move_alias("turning", "champion", version)
        same(
            engine.generate(PROMPT, "turning@champion", TOKENS).wait(),
            alone.generates(PROMPT, folders.generator(version - 1), TOKENS),
        )


def test_a_new_name_needs_no_restart(engine: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    with pytest.raises(Failed, match="unheard"):
        engine.generate(PROMPT, "unheard", TOKENS).wait()
    engine.push("unheard", folders.generator(3))
    same(engine.generate(PROMPT, "unheard", TOKENS).wait(), alone.generates(PROMPT, folders.generator(3), TOKENS))


def test_one_content_under_two_names_and_two_contents_under_one(
    engine: EngineUnderTest, folders: Folders, alone: Alone
) -> None:
    """The twins share what they are; what becomes of one is no matter of the other."""
    engine.push("twin-a", folders.generator(0))
    engine.push("twin-b", folders.generator(0))
    want = alone.generates(PROMPT, folders.generator(0), TOKENS)
    for name in ("twin-a", "twin-b"):
        same(engine.generate(PROMPT, name, TOKENS).wait(), want)
    engine.push("twin-b", folders.generator(1))
    same(engine.generate(PROMPT, "twin-a", TOKENS).wait(), want)
    same(engine.generate(PROMPT, "twin-b", TOKENS).wait(), alone.generates(PROMPT, folders.generator(1), TOKENS))


@pytest.mark.parametrize("why", ["zero", "misnamed"])
def test_an_adapter_without_effect_is_refused_by_name(
    why: str, engine: EngineUnderTest, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Never silently the base (vllm 55193, 34186, 34591, 41754, peft 2118): every B is zero, as a fresh LoRA's is, or
    the tensors are for layers that this base does not have."""
    folder = tmp_path_factory.mktemp("idle") / "idle"
    folder.mkdir()
    for file in folders.generator(0).iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folders.generator(0) / "adapter_model.safetensors")
    if why == "zero":
        weights = {key: value * (0 if "lora_B" in key else 1) for key, value in weights.items()}
    else:
        weights = {key.replace(".layers.", ".blocks."): value for key, value in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")

    def serve() -> None:
        engine.push(why, folder)
        engine.generate(PROMPT, why, TOKENS).wait()

    with pytest.raises(Failed, match=r"(?i)chang|effect|zero|no delta|no layer|blocks"):
        serve()
