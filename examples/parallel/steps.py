"""Steps that several processes take together, without anything but PyTorch:

torchrun --nproc-per-node=2 examples/parallel/steps.py          # data parallel
torchrun --nproc-per-node=4 examples/parallel/steps.py --query 2  # two batches, each on two ranks
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import zo_fused

parser = argparse.ArgumentParser()
parser.add_argument("--query", type=int, default=1, help="ranks that share a batch")
query = parser.parse_args().query

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group()  # nccl on GPUs, gloo on CPUs
shape = (dist.get_world_size() // query, query)
mesh = init_device_mesh(device, shape, mesh_dim_names=("dp", "q"))
shard, shards = mesh["dp"].get_local_rank(), shape[0]

torch.manual_seed(0)  # the same weights on all ranks
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(device)
x = torch.randn(64, 8)
y = x.square().sum(1, keepdim=True)

parallel = zo_fused.Parallel(data=mesh["dp"], query=mesh["q"])
opt = zo_fused.MeZO(model, lr=1e-3, eps=1e-3, queries=4, parallel=parallel)
if dist.get_rank() == 0:
    opt.start_log("replay.jsonl")  # one log is enough: it makes the weights of every rank
for step in range(200):
    batch = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:20]
    mine = batch[shard::shards]  # perhaps not as many as others have
    inputs, targets = x[mine].to(device), y[mine].to(device)
    loss = opt.step(
        lambda i=inputs, t=targets: nn.functional.mse_loss(model(i), t), weight=len(mine)
    )
    if dist.get_rank() == 0 and step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}")  # the same on all ranks
torch.save(model.state_dict(), f"weights-{dist.get_rank()}.pt")
dist.destroy_process_group()
