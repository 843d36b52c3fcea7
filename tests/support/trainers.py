"""A tiny causal model, its data, and trainers of both."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import causal_model
from torch import Tensor, nn
from transformers import TrainingArguments, default_data_collator

from zo_fused.hf import ZOTrainer

LENGTH = 12


@cache
def _model() -> Any:
    return causal_model("llama")


def model() -> Any:
    """The same weights every time."""
    return copy.deepcopy(_model())


def data(count: int = 12) -> list[dict[str, Tensor]]:
    """Sequences of random tokens; of the labels, no two have the same number."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        tokens = torch.randint(5, 128, (LENGTH,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + number % 8] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


class Recording:
    """A collator that keeps the batches."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def __call__(self, examples: list[Any]) -> Any:
        self.batches.append(default_data_collator(examples))
        return dict(self.batches[-1])


def arguments(output: Path, **others: Any) -> TrainingArguments:
    """Six steps with two examples each, on the CPU, silent."""
    usual: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(output), **usual | others)


def trainer(output: Path, zo: Any = None, kind: Any = ZOTrainer, **others: Any) -> Any:
    """A trainer that is ready; arguments of it that it knows, others of `arguments`."""
    own: dict[str, Any] = {"model": model(), "train_dataset": data(), "eval_dataset": data(4)}
    names = ("model", "train_dataset", "eval_dataset", "compute_metrics", "callbacks")
    names += (
        "optimizers",
        "optimizer_cls_and_kwargs",
        "compute_loss_func",
        "data_collator",
        "model_init",
    )
    own |= {name: others.pop(name) for name in names if name in others}
    if zo is not None:
        own["zo"] = zo
    return kind(args=arguments(output, **others), **own)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies, at theta."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit, and of the same names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
