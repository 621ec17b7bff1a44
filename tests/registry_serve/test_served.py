"""What plain PEFT pushes to our server is resolved and served by our engine, equal to what PEFT computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_tools import Harness, reference_logits
from peft import PeftModel
from registry_serve.tools import Hub
from tiny import TARGETS
from transformers import AutoModelForCausalLM
from zoo import make_zoo

PROMPT = (5, 9, 2, 14, 7)


@pytest.mark.slow
def test_pushed_by_them_and_served_by_us(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo", "llama")
    place = tmp_path / "hub"
    place.mkdir()
    zoo.registry.root.rename(place / "store")
    hub = Hub(place, ("--base", f"{zoo.base}={zoo.base}")).start()
    try:
        pushed = hub.python(
            f"""
            import json, torch
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModelForCausalLM
            torch.manual_seed(77)
            lora = LoraConfig(r=6, target_modules={list(TARGETS["llama"][0])!r}, task_type="CAUSAL_LM",
                              init_lora_weights=False)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained({str(zoo.base)!r}), lora)
            print(json.dumps({{"commit": model.push_to_hub("team/theirs").oid}}))
            """,
            tmp_path / "hf",
        )
        zoo.registry = type(zoo.registry).open(hub.store)
        resolved = zoo.registry.resolve("team/theirs")
        refs = {tag.name: tag.target_commit for tag in hub.api().list_repo_refs("team/theirs").tags}
        assert refs == {"v1": pushed["commit"]}
        with Harness(zoo.base, zoo.registry) as harness:
            answers = [harness.generate(name, PROMPT, most=6) for name in ("team/theirs", "a0", None, "team/theirs@1")]
            results = [answer.generated() for answer in answers]
            assert answers[0].request is not None
            assert answers[0].request.arm.parts[0].digest == resolved.digest
            served = [harness.logits[answer.request.id] for answer in answers if answer.request]
    finally:
        hub.stop()
    folder = zoo.registry.pull("team/theirs", tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(zoo.base).eval()
    bare = reference_logits(model, PROMPT, results[2].token_ids)
    theirs = PeftModel.from_pretrained(model, folder).eval()
    for place_in_batch in (0, 3):
        expected = reference_logits(theirs, PROMPT, results[place_in_batch].token_ids)
        torch.testing.assert_close(torch.stack(served[place_in_batch]), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(served[2]), bare, atol=1e-4, rtol=0)
    assert results[0].token_ids != results[2].token_ids
