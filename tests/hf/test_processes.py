"""Several processes: no rank may tune weights of its own in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zo_fused

pytestmark = pytest.mark.slow  # each starts two processes that import transformers

ROOT = Path(__file__).parents[2]
EMBEDDED = Path(zo_fused.__file__).parent / "embedded/model"


def by_torchrun(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Two processes, with gloo on the CPU."""
    (directory / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return subprocess.run(
        [*command, "script.py"], cwd=directory, env=environment, capture_output=True, text=True
    )


def test_a_trainer_refuses_to_be_one_of_several(tmp_path: Path) -> None:
    script = """
from pathlib import Path
from support.trainers import trainer
try:
    trainer(Path("run"), "mezo")
except ValueError as error:
    Path(f"refused-{__import__('os').environ['RANK']}").write_text(str(error))
"""
    done = by_torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert "there are 2 processes" in (tmp_path / f"refused-{rank}").read_text()


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
