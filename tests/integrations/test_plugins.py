"""axolotl and ms-swift tune the embedded model with zeroth-order steps, each in the environment
that `make test-plugins` makes for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zo_fused

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build/plugins"
EMBEDDED = Path(zo_fused.__file__).parent / "embedded/model"
STEPS = 4
TEXTS = [("a gripping film. It was", "great"), ("two dull hours. It was", "terrible")] * 8

AXOLOTL = f"""
base_model: {EMBEDDED}
plugins: [zo_fused.integrations.axolotl.ZOPlugin]
zo_method: lozo
zo_options: {{rank: 2}}
datasets: [{{path: data.jsonl, ds_type: json, type: completion}}]
dataset_prepared_path: prepared
output_dir: out
sequence_len: 32
micro_batch_size: 2
gradient_accumulation_steps: 2
max_steps: {STEPS}
save_steps: 2
logging_steps: 1
learning_rate: 1e-4
lr_scheduler: constant
optimizer: adamw_torch
bf16: false
fp16: false
tf32: false
attn_implementation: eager
special_tokens: {{pad_token: "<pad>"}}
"""
MS_SWIFT = f"""
sft --model {EMBEDDED} --model_type llama --template dummy --tuner_type full
--torch_dtype float32 --fp16 false --bf16 false --attn_impl eager --check_model false
--external_plugins zo.py --optimizer lozo2 --learning_rate 1e-4 --lr_scheduler_type constant
--dataset data.jsonl --split_dataset_ratio 0 --per_device_train_batch_size 2
--gradient_accumulation_steps 2 --max_steps {STEPS} --save_steps 2 --logging_steps 1
--report_to none --output_dir out --add_version false
"""
ROWS = {
    "axolotl": [{"text": f"{prompt} {answer}"} for prompt, answer in TEXTS],
    "ms-swift": [
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
        }
        for prompt, answer in TEXTS
    ],
}
FILES = {
    "axolotl": {"zo.yaml": AXOLOTL},
    "ms-swift": {
        "zo.py": "from zo_fused.integrations.ms_swift import register\n"
        'register("lozo2", "lozo", rank=2)\n'
    },
}
# Of the embedded model on these rows, where the answer alone counts for ms-swift: 5.2 to 8.3, and
# 15.3 to 16.5. Of an update, whose loss is the mean of its two micro-batches, not their sum.
FIRST_LOSS = {"axolotl": (4.5, 9.0), "ms-swift": (14.0, 18.0)}
COMMANDS = {
    "axolotl": ["axolotl", "train", "zo.yaml", "--launcher", "python"],
    "ms-swift": ["swift", *MS_SWIFT.split()],
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tool", COMMANDS)
def test_tool_tunes_and_its_log_gives_the_saved_weights(tool: str, tmp_path: Path) -> None:
    binaries = ENVIRONMENTS / tool / "bin"
    if not (binaries / "python").exists():
        pytest.skip(f"no environment with {tool}: `make test-plugins` makes it")
    transformers = pytest.importorskip("transformers")
    for name, text in FILES[tool].items():
        (tmp_path / name).write_text(text)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS[tool])))
    ours = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
        "PATH": os.pathsep.join([str(binaries), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    command = [str(binaries / COMMANDS[tool][0]), *COMMANDS[tool][1:]]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | ours, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    sys.stdout.write(run.stdout[-2000:])

    state = json.loads((tmp_path / f"out/checkpoint-{STEPS}/trainer_state.json").read_text())
    lowest, highest = FIRST_LOSS[tool]
    assert lowest < state["log_history"][0]["loss"] < highest
    assert all(line["grad_norm"] > 0 for line in state["log_history"] if "loss" in line)

    base = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    for steps in (2, STEPS):
        model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
        checkpoint = tmp_path / f"out/checkpoint-{steps}"
        assert zo_fused.replay(model, checkpoint / "replay.jsonl") == steps
        tuned = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        for one, two in zip(model.parameters(), tuned.parameters(), strict=True):
            assert torch.equal(one, two)
        pairs = zip(base.parameters(), tuned.parameters(), strict=True)
        assert not any(torch.equal(one, two) for one, two in pairs)
