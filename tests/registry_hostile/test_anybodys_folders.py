"""Folders that other people's tools wrote are pushed as they are: what is found in them is said, and nothing is asked
that can be found. The folders are made by transformers' Trainer and by PEFT themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_tools import look, refused
from registry_tools import Draft, Tiny

from adapterbay.registry import Registry, locate
from adapterbay.registry.errors import InvalidArgument, UnsupportedMethod

DraftOf = Callable[[Tiny], Draft]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def train(base: Path, out: Path, *, task: str, falling: bool = False) -> Any:
    """Four steps of a real Trainer with two checkpoints, evaluated at both; the best is loaded at the end."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers import Trainer, TrainingArguments  # isort: skip

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [
        dict(tokenizer("x" * (number + 1), padding="max_length", max_length=16, truncation=True)) for number in range(8)
    ]
    values = iter([0.9, 0.4, 0.9] if falling else [0.4, 0.9, 0.9])
    if task == "SEQ_CLS":
        labels = {0: "bad", 1: "so-so", 2: "good"}
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, id2label=labels)
        rows = [row | {"labels": number % 3} for number, row in enumerate(rows)]
        targets = ["query", "value"]
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
        rows = [row | {"labels": row["input_ids"]} for row in rows]
        targets = ["q_proj", "v_proj"]
    lora = LoraConfig(r=2, lora_alpha=4, task_type=task, target_modules=targets)
    trainer = Trainer(
        get_peft_model(model, lora),
        TrainingArguments(
            output_dir=str(out),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            logging_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        compute_metrics=lambda _: {"accuracy": next(values)},
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def classifier(bert: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with an adapter, its checkpoints, results and a card."""
    out = tmp_path_factory.mktemp("classifier") / "out"
    trainer = train(bert.base, out, task="SEQ_CLS", falling=True)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.create_model_card(dataset="stanfordnlp/imdb", dataset_tags="stanfordnlp/imdb", language="en", license="mit")
    return out


@pytest.fixture(scope="module")
def writer(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with checkpoints alone, as after a run that was interrupted."""
    out = tmp_path_factory.mktemp("writer") / "out"
    train(llama.base, out, task="CAUSAL_LM")
    return out


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# transformers' Trainer


def test_a_checkpoint_of_a_classifier(classifier: Path, bert: Tiny, registry: Registry) -> None:
    checkpoint = classifier / "checkpoint-2"
    assert {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
        "tokenizer.json",
    } <= (names(checkpoint))
    receipt = registry.push(checkpoint, "x")
    manifest = receipt.manifest
    assert {file.path for file in manifest.files} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert manifest.task == "sequence-classification"
    assert manifest.base_fingerprint == locate(str(bert.base)).fingerprint
    assert manifest.training == {
        "source": "trainer_state.json",
        "metrics": {"accuracy": 0.9, "eval_loss": pytest.approx(1.1, abs=0.5)},
        "steps": 2,
        "epochs": 0.5,
        "settings": {"epochs": 1, "max_steps": 4, "batch_size": 2, "learning_rate": 0.01},
    }
    said = "\n".join(receipt.findings)
    assert "metrics: accuracy 0.9, eval_loss" in said
    assert "(from trainer_state.json)" in said
    assert "trained for 2 steps, 0.5 epochs, learning rate up to 0.01 (from trainer_state.json)" in said
    assert "3 labels: 0, 1, 2 (counted; name them with --label)" in said
    assert "left out: optimizer.pt, rng_state.pth, scheduler.pt, tokenizer.json" in said
    assert manifest.library_versions.keys() == {"peft"}
    worse = registry.push(classifier / "checkpoint-4", "x").manifest
    assert worse.training is not None
    assert worse.training["metrics"]["accuracy"] == 0.4
    assert worse.training["steps"] == 4


def test_the_output_folder_of_a_classifier(classifier: Path, registry: Registry) -> None:
    """The best checkpoint was loaded at the end: its results are in eval_results.json, not at the log's end."""
    receipt = registry.push(classifier, "x")
    training = receipt.manifest.training
    assert training is not None
    assert training["source"] == "eval_results.json, trainer_state.json, README.md"
    assert training["metrics"]["accuracy"] == 0.9
    assert (training["steps"], training["best_step"]) == (4, 2)
    assert training["data"] == {"datasets": ["stanfordnlp/imdb"], "source": "hf:stanfordnlp/imdb"}
    assert (training["license"], training["language"]) == ("mit", ["en"])
    assert "data stanfordnlp/imdb; licence mit; language en (from README.md)" in receipt.findings
    assert not any("more adapters" in finding for finding in receipt.findings)
    first = registry.push(classifier / "checkpoint-2", "x").manifest.files
    assert receipt.manifest.files[1] == first[1]  # the same weights


def test_a_state_that_does_not_say_which_weights_these_are(classifier: Path, tmp_path: Path) -> None:
    unclear = tmp_path / "final"
    shutil.copytree(classifier, unclear)
    for name in ("eval_results.json", "all_results.json", "README.md"):
        (unclear / name).unlink()
    found = look(unclear)
    assert found.manifest.training is not None
    assert "metrics" not in found.manifest.training
    assert any("does not say which of its evaluations is of these weights" in finding for finding in found.findings)


def test_a_folder_of_checkpoints_names_them_and_the_best(writer: Path, registry: Registry) -> None:
    error = refused("MISSING_FILE", lambda: registry.push(writer, "x"))
    assert "checkpoint-2, checkpoint-4" in error.message
    assert "By its trainer_state.json, checkpoint-4 is the best" in error.message
    receipt = registry.push(writer / "checkpoint-4", "x")
    assert receipt.manifest.task == "causal-lm"
    assert receipt.manifest.training is not None
    assert receipt.manifest.training["metrics"]["accuracy"] == 0.9


def test_the_best_of_many_checkpoints_from_another_machine(writer: Path, tmp_path: Path, registry: Registry) -> None:
    many = tmp_path / "many"
    for step in (2, 9, 10, 100, 200, 300, 400):
        shutil.copytree(writer / "checkpoint-2", many / f"checkpoint-{step}")
    for named, best in {
        "/home/them/out/checkpoint-10": "checkpoint-10",
        "C:\\runs\\out\\checkpoint-9": "checkpoint-9",
        "out/checkpoint-7": None,  # was deleted by save_total_limit
        "../../etc": None,
        None: "checkpoint-2",  # as the checkpoints' own states say
        5: "checkpoint-2",
    }.items():
        (many / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": named}))
        error = refused("MISSING_FILE", lambda: registry.push(many, "x"))
        assert "checkpoint-2, checkpoint-9, checkpoint-10, checkpoint-100, checkpoint-200 and 2 more" in error.message
        assert (f"{best} is the best" in error.message) if best else ("is the best" not in error.message)


def test_results_without_a_state(llama: Tiny, draft: DraftOf) -> None:
    one = draft(llama)
    (one.path / "all_results.json").write_text(
        json.dumps({"epoch": 3.0, "eval_loss": 1.5, "eval_perplexity": 4.48, "train_loss": 2.0, "train_runtime": 9.1})
        .replace("}", ', "eval_samples": 100, "eval_runtime": 1.0, "total_flos": 1e12, "eval_note": "x"}')
    )  # fmt: skip
    found = look(one.path)
    assert found.manifest.training == {
        "source": "all_results.json",
        "metrics": {"eval_loss": 1.5, "perplexity": 4.48, "train_loss": 2.0},
    }


def test_a_run_without_evaluation(llama: Tiny, draft: DraftOf) -> None:
    """What TRL's SFTTrainer leaves after a plain run: training losses alone."""
    one = draft(llama)
    log = [
        {"epoch": 0.5, "grad_norm": 1.0, "learning_rate": 2e-4, "loss": 2.5, "mean_token_accuracy": 0.4, "step": 1},
        {"epoch": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "loss": 2.25, "num_tokens": 500.0, "step": 2},
        {"epoch": 1.0, "step": 2, "total_flos": 1.0, "train_loss": 2.375, "train_runtime": 3.0},
    ]
    (one.path / "trainer_state.json").write_text(json.dumps({"epoch": 1.0, "global_step": 2, "log_history": log}))
    (one.path / "README.md").write_text(
        "---\nbase_model: org/base\nlibrary_name: peft\nmodel_name: out\ntags:\n- base_model:adapter:org/base\n- sft\n"
        "- trl\nlicence: license\npipeline_tag: text-generation\n---\n\n# Model Card for out\n"
    )
    (one.path / "chat_template.jinja").write_text("{{ other }}")
    found = look(one.path)
    assert found.manifest.training == {
        "source": "trainer_state.json",
        "metrics": {"train_loss": 2.375},
        "steps": 2,
        "epochs": 1.0,
        "settings": {"learning_rate": 2e-4},
    }
    assert "the folder's chat template differs from the base's; the base's is served" in found.findings


def test_an_own_record_goes_first(classifier: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(classifier, ours)
    record = {"metrics": {"accuracy": 0.5}, "labels": ["no", "so", "yes"]}
    (ours / "training.json").write_text(json.dumps(record))
    found = look(ours)
    assert found.manifest.training == record
    assert found.manifest.labels == ("no", "so", "yes")


# Cards


@pytest.mark.parametrize(
    ("front", "record"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ("license: 'mit' # ours", {"license": "mit"}),
        ("license: other", {}),
        ("license: unknown", {}),
        ("license: [More Information Needed]", {}),
        ("language: zh", {"language": ["zh"]}),
        ("language:\n- en\n- pt-BR", {"language": ["en", "pt-BR"]}),
        ('language: [en, "fr"]', {"language": ["en", "fr"]}),
        ("datasets:\n  - squad\n  - org/data", {"data": {"datasets": ["squad", "org/data"]}}),
        ("datasets:\n- generator", {}),
        ("datasets:\n- squad\ntags:\n- en", {"data": {"datasets": ["squad"], "source": "hf:squad"}}),
        ("datasets: &a [x, *a]", {}),
        ("license: !!python/object/apply:os.system [id]", {}),
        ("language:\n  en: 1\n- fr", {}),
        ("library_name: peft\nbase_model: org/base", {}),
    ],
)
def test_the_front_matter_of_a_card(llama: Tiny, draft: DraftOf, front: str, record: dict[str, Any]) -> None:
    one = draft(llama)
    (one.path / "README.md").write_text(f"---\n{front}\n---\n# Card\nlicense: gpl\n")
    found = look(one.path).manifest.training
    assert found == ({"source": "README.md", **record} if record else None)


def test_the_card_that_peft_writes_says_nothing(llama: Tiny) -> None:
    assert "[More Information Needed]" in (llama.adapter / "README.md").read_text()
    assert look(llama.adapter).manifest.training is None


# PEFT


def test_several_adapters_in_one_folder(llama: Tiny, tmp_path: Path, registry: Registry) -> None:
    from peft import LoraConfig, PeftModel
    from tiny import load_reference

    model = PeftModel.from_pretrained(load_reference(llama.base), llama.adapter)
    for name in ("french", "german"):
        model.add_adapter(
            name, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        )
    model.save_pretrained(tmp_path / "all")
    receipt = registry.push(tmp_path / "all", "x")
    assert receipt.manifest.files[1].digest == registry.push(llama.adapter, "x").manifest.files[1].digest
    assert "more adapters in french, german: push them one by one" in receipt.findings
    assert registry.push(tmp_path / "all" / "german", "german").manifest.rank == 2
    model.save_pretrained(tmp_path / "others", selected_adapters=["french", "german"])
    error = refused("MISSING_FILE", lambda: registry.push(tmp_path / "others", "x"))
    assert "french, german" in error.message


def test_a_pickled_adapter_is_told_how_to_convert(llama: Tiny, tmp_path: Path, registry: Registry) -> None:
    from peft import PeftModel
    from tiny import load_reference

    model = PeftModel.from_pretrained(load_reference(llama.base), llama.adapter)
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").is_file()
    error = refused("PICKLE", lambda: registry.push(tmp_path / "old", "x"))
    assert "save_pretrained(NEW_FOLDER)" in error.message
    # And what it says works.
    PeftModel.from_pretrained(load_reference(llama.base), tmp_path / "old").save_pretrained(tmp_path / "new")
    assert registry.push(tmp_path / "new", "x").manifest.files[1] == registry.push(llama.adapter, "x").manifest.files[1]


def test_a_whole_model_is_no_adapter(llama: Tiny, registry: Registry) -> None:
    assert "It is a whole model" in refused("MISSING_FILE", lambda: registry.push(llama.base, "x")).message


def test_a_clone_without_git_lfs(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    one = draft(llama)
    one.weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in refused("MISSING_FILE", lambda: registry.push(one.path, "x")).message


# The fields of LoraConfig at these versions of PEFT, with the values that an ordinary adapter had (from their sources).
V02 = {"peft_type": "LORA", "base_model_name_or_path": None, "task_type": "CAUSAL_LM", "inference_mode": True, "r": 2}
V02 |= {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 4, "lora_dropout": 0.05, "fan_in_fan_out": False}
V02 |= {"merge_weights": False, "enable_lora": None, "bias": "none", "modules_to_save": None}
V04 = {key: value for key, value in V02.items() if key not in ("merge_weights", "enable_lora")}
V04 |= {"auto_mapping": None, "revision": None, "init_lora_weights": True}
V04 |= {"layers_to_transform": None, "layers_pattern": None}
V07 = V04 | {
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "loftq_config": {},
}
V10 = V07 | {"use_rslora": False, "use_dora": False, "layer_replication": None}
V13 = V10 | {"runtime_config": {"ephemeral_gpu_offload": False}}
V17 = V10 | {"exclude_modules": None, "trainable_token_indices": None, "eva_config": None, "corda_config": None}
V17 |= {"use_qalora": False, "qalora_group_size": 16, "lora_bias": False, "target_parameters": None}
MINIMAL = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


@pytest.mark.parametrize(
    "config",
    [V02, V04, V07, V10, V13, V17, MINIMAL],
    ids=["0.2", "0.4", "0.7", "0.10", "0.13", "0.17", "by hand"],
)
def test_configs_of_old_versions(llama: Tiny, draft: DraftOf, config: dict[str, Any]) -> None:
    one = draft(llama)
    written = config | {"base_model_name_or_path": str(llama.base)}
    (one.path / "adapter_config.json").write_text(json.dumps(written))
    manifest = look(one.path).manifest
    assert manifest.peft_config == written
    assert manifest.rank == 2
    assert manifest.library_versions == {}


def test_a_fused_layer_of_old_versions_is_refused(llama: Tiny, draft: DraftOf) -> None:
    one = draft(llama)
    one.edit_config(enable_lora=[True, False, True])
    with pytest.raises(UnsupportedMethod, match="enable_lora"):
        look(one.path)


def test_a_head_that_was_saved_whole(bert: Tiny, draft: DraftOf) -> None:
    one = draft(bert)
    one.edit_config(modules_to_save=["classifier", "score"], task_type=None)
    found = look(one.path)
    assert found.manifest.task == "sequence-classification"
    assert "task sequence-classification (it has a head)" in found.findings


@pytest.mark.parametrize(
    ("kind", "task"),
    [("LlamaForCausalLM", "causal-lm"), ("GPT2LMHeadModel", "causal-lm"), ("LlamaModel", None), (None, None)],
)
def test_the_task_without_a_task_type(llama: Tiny, draft: DraftOf, kind: str | None, task: str | None) -> None:
    one = draft(llama)
    mapping = {"base_model_class": kind, "parent_library": "transformers.models.llama.modeling_llama"}
    one.edit_config(task_type=None, auto_mapping=mapping if kind else None)
    if task:
        assert look(one.path).manifest.task == task
    else:
        with pytest.raises(InvalidArgument, match="--task"):
            look(one.path)
    assert look(one.path, task="causal-lm").manifest.task == "causal-lm"


def test_labels_of_a_config_beside(bert: Tiny, draft: DraftOf) -> None:
    one = draft(bert)
    (one.path / "config.json").write_text(json.dumps({"id2label": {"0": "bad", "1": "so", "2": "good"}}))
    found = look(one.path)
    assert found.manifest.labels == ("bad", "so", "good")
    assert "3 labels: bad, so, good (from config.json)" in found.findings
