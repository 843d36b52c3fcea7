"""Several processes: no rank may tune weights of its own in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.torchrun import ROOT, by_torchrun
from support.trainers import trainer, weights

import zo_fused

pytestmark = pytest.mark.slow  # each starts two processes that import transformers

EMBEDDED = Path(zo_fused.__file__).parent / "embedded/model"


@pytest.mark.parametrize("zo", ["mezo", ("lozo", {"deferred": True, "interval": 2})], ids=str)
def test_a_trainer_on_two_processes_takes_the_steps_of_one(zo: Any, tmp_path: Path) -> None:
    """Whose updates have two micro-batches, those of the two. Labels differ in number."""
    script = f"""
import torch, torch.distributed as dist
from pathlib import Path
from support.torchrun import ROOT, by_torchrun
from support.trainers import trainer, weights
made = trainer(Path("run"), {zo!r}, save_strategy="steps", save_steps=2, eval_strategy="steps",
               eval_steps=3)
made.train()
made.zeroth_order_optimizer.flush()
assert type(made.model_wrapped).__name__ == "LlamaForCausalLM"  # nothing sums gradients
torch.save([weights(made.model), made.state.log_history], f"rank-{{dist.get_rank()}}")
again = trainer(Path("run"), {zo!r})
again.train(resume_from_checkpoint="run/checkpoint-4")
again.zeroth_order_optimizer.flush()
assert all(torch.equal(w, weights(again.model)[k]) for k, w in weights(made.model).items())
"""
    done = by_torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr
    (one, logs), (other, _) = (
        torch.load(tmp_path / f"rank-{rank}", weights_only=False) for rank in range(2)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    alone = trainer(tmp_path / "alone", zo, gradient_accumulation_steps=2)
    start = {name: w.clone() for name, w in weights(alone.model).items()}
    alone.train()
    alone.zeroth_order_optimizer.flush()
    theirs = weights(alone.model)
    moved = max(float((theirs[name] - start[name]).abs().max()) for name in one)
    off = max(float((theirs[name] - one[name]).abs().max()) for name in one)
    assert moved > 0
    assert off < 2e-3 * moved + 1e-6  # the sum over tokens is rounded elsewhere
    losses = [
        [line["loss"] for line in log if "loss" in line] for log in (logs, alone.state.log_history)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_command_refuses_to_be_one_of_several(tmp_path: Path) -> None:
    script = """
import sys
from zo_fused.cli.main import main
sys.exit(main(["finetune", "--steps", "2", "--output", "run"]))
"""
    done = by_torchrun(script, tmp_path)
    assert done.returncode != 0
    assert "there are 2 processes, and this command runs in one" in done.stderr + done.stdout


def test_the_recipe_for_accelerate_keeps_weights_equal(tmp_path: Path) -> None:
    """Each of its ranks has other batches. The loss of a step is the mean over both."""
    recipe = (ROOT / "examples/recipes/accelerate_loop.py").read_text()
    bold = recipe.replace("lr=1e-6", "lr=3e-5").replace('"facebook/opt-125m"', f'"{EMBEDDED}"')
    bold = bold.replace("] * 8", '] * 2 + ["all in all, a film. It was great"] * 4')
    check = """
from support.trainers import weights
weights = weights(accelerator.unwrap_model(model))
torch.save([weights, batch["input_ids"]], f"rank-{accelerator.process_index}")
assert accelerator.num_processes == 2
"""
    done = by_torchrun(bold + check, tmp_path)
    assert done.returncode == 0, done.stderr
    import torch
    from transformers import AutoModelForCausalLM

    (one, its), (other, others) = (torch.load(tmp_path / f"rank-{rank}") for rank in range(2))
    assert not torch.equal(its, others)
    assert all(torch.equal(one[name], other[name]) for name in one)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED).state_dict()
    assert not all(torch.equal(one[name], base[name]) for name in one)
