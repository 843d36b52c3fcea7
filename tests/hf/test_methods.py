"""Every method of the command line in a `ZOTrainer`, with its log."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import trainers
from support.quantized import Int8Linear
from support.trainers import LENGTH, equal, trainer, weights
from torch import Tensor, nn

import zo_fused
from zo_fused.methods.table import recipes

OPTIONS: dict[str, dict[str, Any]] = {"qzo": {"eps": 1e-4}, "forward-grad": {}}


class Quantized(nn.Module):
    """A layer whose scales can be tuned, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Int8Linear(nn.Linear(LENGTH, 4))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(input_ids / 128).square().mean()}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of forward-mode derivatives
@pytest.mark.parametrize("name", recipes())
def test_every_method_trains_and_is_replayed(name: str, tmp_path: Path) -> None:
    model = Quantized() if name == "qzo" else trainers.model()
    if name == "forward-grad":
        model.set_attn_implementation("eager")
    base = copy.deepcopy(model)
    zo = (name, OPTIONS.get(name, {"eps": 1e-2}))
    rate = 1e-6 if name == "qzo" else 1e-3
    made = trainer(tmp_path, zo, model=model, max_steps=3, learning_rate=rate, report_to="none")
    made.train()
    assert made.zeroth_order_optimizer.step_count == 3
    assert all("skipped_steps" not in entry for entry in made.state.log_history)
    assert not equal(weights(model), weights(base))
    zo_fused.replay(base, tmp_path / "replay.jsonl")
    assert equal(weights(model), weights(base))


def test_scales_decay(tmp_path: Path) -> None:
    """They are the weights there are, whatever their names."""
    made = trainer(tmp_path, ("qzo", {"eps": 1e-4}), model=Quantized(), weight_decay=0.1)
    groups = made.create_optimizer().param_groups
    assert [(group["weight_decay"], group["param_names"]) for group in groups] == [
        (0.1, ["layer.scales"])
    ]
