"""TRL's trainers with zeroth-order steps: the counters of TRL tell of one evaluation a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import trainers
from support.tiny_models import opt_tokenizer
from support.trainers import equal, weights

import zo_fused
from zo_fused.hf import zeroth_order

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers, about each other

trl = pytest.importorskip("trl", reason="needs the extra trl")
datasets = pytest.importorskip("datasets")

DEFERRED = ("lozo", {"deferred": True, "eps": 1e-2, "interval": 4})
SENTENCES = [f"{'very ' * (number % 5)}fine film" for number in range(12)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return opt_tokenizer([*SENTENCES, "It was great"] * 9, 280)


def sft(output: Path, tokenizer: Any, kind: Any = trl.SFTTrainer, **others: Any) -> Any:
    """Six steps with two examples each."""
    examples = [{"prompt": f"{text} It was", "completion": " great"} for text in SENTENCES]
    own = {name: others.pop(name) for name in ("zo", "model", "peft_config") if name in others}
    usual: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 2, "bf16": False}
    usual |= {"learning_rate": 1e-3, "use_cpu": True, "logging_steps": 1, "disable_tqdm": True}
    usual |= {"dataloader_pin_memory": False, "save_strategy": "no"}
    dataset = datasets.Dataset.from_list(examples)
    return kind(
        args=trl.SFTConfig(str(output), **usual | others),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        **{"model": trainers.causal_model("llama", vocab_size=280), **own},
    )


def counted(run: Any) -> list[Any]:
    return [entry["num_tokens"] for entry in run.state.log_history if "num_tokens" in entry]


@pytest.mark.parametrize("parts", [1, 2])
def test_tokens_are_counted_once(parts: int, tmp_path: Path, tokenizer: Any) -> None:
    from zo_fused.hf import ZOSFTTrainer

    options = {"gradient_accumulation_steps": parts}
    first_order = sft(tmp_path, tokenizer, **options)
    zo = ("mezo", {"queries": 2, "eps": 1e-2})
    made = sft(tmp_path, tokenizer, ZOSFTTrainer, zo=zo, **options)
    for run in (first_order, made):
        run.train()
    assert counted(made) == counted(first_order)
    assert len(set(counted(made))) == 6
    for entry in made.state.log_history[:6]:
        assert {"loss", "grad_norm", "mean_token_accuracy", "entropy"} <= entry.keys()
        assert not any(name.startswith("eval_") for name in entry)  # it stays in train mode


@pytest.mark.parametrize("mode", ["deferred", "factored"])
def test_a_resumed_run_has_the_same_bits(mode: str, tmp_path: Path, tokenizer: Any) -> None:
    """Turned by `zeroth_order`, with the gradient checkpointing that TRL has on."""
    zo = (DEFERRED[0], {"eps": 1e-2, "interval": 4, "deferred": mode == "deferred"})
    zo[1]["mode"] = "factored" if mode == "factored" else "inplace"
    often = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
    runs = []
    for name, before in (("whole", None), ("resumed", str(tmp_path / "whole/checkpoint-3"))):
        made = zeroth_order(sft(tmp_path / name, tokenizer, **often), zo)
        assert type(made).__name__ == "ZOSFTTrainer"
        base = weights(made.model)
        made.train(resume_from_checkpoint=before)
        runs.append(weights(made.model))
    assert equal(*runs)
    assert not equal(base, runs[0])
    replayed = trainers.causal_model("llama", vocab_size=280)
    zo_fused.replay(replayed, tmp_path / "resumed/replay.jsonl")
    assert equal(weights(replayed), runs[0])


def test_adapters_by_trl(tmp_path: Path, tokenizer: Any) -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    made = zeroth_order(sft(tmp_path, tokenizer, peft_config=config), DEFERRED)
    before = weights(made.model)
    made.train()
    after = weights(made.model)
    moved = {name for name in before if not bool((before[name] == after[name]).all())}
    assert moved == {name for name in before if "lora_" in name}


def test_preferences(tmp_path: Path, tokenizer: Any) -> None:
    """DPO: its loss is a function of the batch, too."""
    rows = [{"prompt": text, "chosen": " great", "rejected": " bad"} for text in SENTENCES]
    args = trl.DPOConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    runs = []
    for zo in (None, DEFERRED):
        model, reference = (trainers.causal_model("llama", vocab_size=280) for _ in range(2))
        dataset = datasets.Dataset.from_list(rows)
        made = trl.DPOTrainer(
            model, reference, args=args, train_dataset=dataset, processing_class=tokenizer
        )
        if zo:
            zeroth_order(made, zo)
        made.train()
        runs.append(made)
    assert counted(runs[0]) == counted(runs[1])
    assert len(counted(runs[0])) == 3


def test_what_generates_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """On policy the loss of GRPO is the same whatever the weights: its gradient is not."""
    args = trl.GRPOConfig(
        str(tmp_path), bf16=False, use_cpu=True, per_device_train_batch_size=4, num_generations=4
    )
    made = trl.GRPOTrainer(
        trainers.causal_model("llama", vocab_size=280),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in SENTENCES]),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="can't be turned"):
        zeroth_order(made, "mezo")
    assert type(made) is trl.GRPOTrainer
