"""A run that workers may enter while it goes on, and none of the others starts again:

python examples/parallel/late.py 127.0.0.1:29555 --first  # begins, and writes replay.jsonl
python examples/parallel/late.py 127.0.0.1:29555          # any time later, on any machine

They meet in a store of torch.distributed. Who is new makes the steps of the run so far from the
base weights and the log, which the first worker sends.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn

import zo_fused

EVERY = 10  # steps after which workers look who has come

parser = argparse.ArgumentParser()
parser.add_argument("address", help="host:port of the first worker")
parser.add_argument("--first", action="store_true")
parser.add_argument("--steps", type=int, default=2000)
options = parser.parse_args()
host, port = options.address.split(":")
store = dist.TCPStore(host, int(port), is_master=options.first, wait_for_workers=False)


def meet(number: int, rank: int, size: int) -> None:
    """All workers that are there now become a world of torch.distributed."""
    if dist.is_initialized():
        dist.destroy_process_group()
    world = dist.PrefixStore(f"world-{number}", store)
    dist.init_process_group("gloo", store=world, rank=rank, world_size=size)


torch.manual_seed(0)  # the base weights
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
x = torch.randn(64, 8)
y = x.square().sum(1, keepdim=True)
opt = zo_fused.MeZO(model, lr=1e-3, eps=1e-3)

if options.first:
    rank, size, number = 0, 1, 0
    meet(number, rank, size)
    opt.start_log("replay.jsonl")
else:
    rank = store.add("came", 1)
    number, size = map(int, store.get(f"for-{rank}").split())  # waits until it is let in
    meet(number, rank, size)
    print(f"rank {rank}: {opt.join()} steps by the log", flush=True)

while opt.step_count < options.steps:
    step = opt.step_count
    if step % EVERY == 0:
        came = torch.tensor(store.add("came", 0) if rank == 0 else 0)
        dist.broadcast(came, 0)  # all must see the same number
        if came >= size:
            new, size, number = range(size, int(came) + 1), int(came) + 1, number + 1
            for other in new if rank == 0 else ():
                store.set(f"for-{other}", f"{number} {size}")
            meet(number, rank, size)
            opt.join()
            continue
    batch = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:20]
    mine = batch[rank::size]
    opt.step(lambda m=mine: nn.functional.mse_loss(model(x[m]), y[m]), weight=len(mine))
torch.save(model.state_dict(), f"weights-{rank}.pt")
dist.barrier()  # the first worker has the store
dist.destroy_process_group()
