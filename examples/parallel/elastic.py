"""A run that survives its workers: when one dies, torchrun starts all of them again, as many as
there are then, and they come back to the present step by the replay log, without a checkpoint:

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # docs/scaling.md says why
torchrun --nproc-per-node=2 --max-restarts=3 examples/parallel/elastic.py
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn

import zo_fused

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--log", default="replay.jsonl", help="on a disk that rank 0 always finds")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group()  # nccl on GPUs, gloo on CPUs
rank, size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the base weights, the same on all ranks and in all attempts
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(device)
x = torch.randn(64, 8)
y = x.square().sum(1, keepdim=True)

opt = zo_fused.ZOAdam(model, lr=1e-3, eps=1e-3)
start = time.perf_counter()
made = opt.join(options.log)  # nothing at the start of a run
if made and rank == 0:
    print(f"{size} ranks made {made} steps in {time.perf_counter() - start:.2f} s", flush=True)

# What a step does must follow from its number: which examples, a learning rate, dropout masks.
while opt.step_count < options.steps:
    step = opt.step_count
    torch.manual_seed(1000 * step + rank)
    batch = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:20]
    mine = batch[rank::size]  # of the global batch, whoever is there
    inputs, targets = x[mine].to(device), y[mine].to(device)
    loss = opt.step(
        lambda i=inputs, t=targets: nn.functional.mse_loss(model(i), t), weight=len(mine)
    )
    if rank == 0 and step % 50 == 0:
        print(f"step {step}, {size} ranks: loss {loss.item():.4f}", flush=True)
torch.save(model.state_dict(), f"weights-{rank}.pt")
dist.destroy_process_group()
