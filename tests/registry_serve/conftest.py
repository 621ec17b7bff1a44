"""Tiny random bases with real PEFT adapters, and servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registry_serve.tools import Hub
from registry_tools import Tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _quiet_client() -> None:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session", autouse=True)
def _isolated(session_home: Path) -> Iterator[None]:
    """No test sees or touches the caches, the registry and the tokens of the person who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTERBAY_HOME", str(session_home))
        patch.setenv("HF_HOME", str(session_home / "hf"))
        for name in ("ADAPTERBAY_REGISTRY", "ADAPTERBAY_ACTOR", "HF_TOKEN", "HF_ENDPOINT"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """LlamaForCausalLM; LoRA of rank 4 on q_proj, v_proj and down_proj."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny-llama")
    model = LlamaForCausalLM.from_pretrained(folder / "tiny-llama")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
    )
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return Tiny(folder / "tiny-llama", folder / "adapter")


@pytest.fixture(scope="session")
def start_hub(
    tmp_path_factory: pytest.TempPathFactory, llama: Tiny, session_home: Path
) -> Iterator[Callable[..., Hub]]:
    """Starts servers that know the tiny base; all are stopped at the end."""
    started: list[Hub] = []

    def start(*options: str) -> Hub:
        hub = Hub(tmp_path_factory.mktemp("hub"), ("--base", f"tiny-llama={llama.base}", *options))
        started.append(hub)
        return hub.start()

    yield start
    for hub in started:
        if hub.process is not None and hub.process.poll() is None:
            hub.stop()


@pytest.fixture(scope="session")
def hub(start_hub: Callable[..., Hub]) -> Hub:
    """One server for the tests that only read and write their own names."""
    return start_hub()
