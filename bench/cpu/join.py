"""How long ranks take to come to the present step of a run by its log, and what is sent for that.

Two processes with gloo on this machine, a thread each. Rank 0 makes a run alone, with a closure
that returns a number at once; then both begin anew and join it.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import zo_fused
from bench import machine
from bench.models import DTYPES, OPT, opt_parameters
from bench.page import publish, table

SIZE = 2
METHODS: dict[str, Any] = {
    "MeZO": zo_fused.MeZO,
    "MeZO, deferred": lambda p, **o: zo_fused.MeZO(p, deferred=True, **o),
    "LOZO": lambda p, **o: zo_fused.LOZO(p, rank=2, **o),
    "ZOAdam": zo_fused.ZOAdam,
}


def copy_of(params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}


def work(rank: int, model: str, dtype: str, counts: list[int], directory: str) -> None:
    """In each process."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    base, rows = opt_parameters(model, DTYPES[dtype]), []
    options: dict[str, Any] = {"lr": 1e-6, "parallel": zo_fused.Parallel(timeout=3600)}
    for name, make in METHODS.items():
        for steps in counts:
            log = Path(directory) / f"{name}-{steps}"
            row: dict[str, Any] = {"method": name, "steps": steps}
            ends = []
            if rank == 0:
                params = copy_of(base)
                opt = make(params.items(), **(options | {"parallel": None}))
                opt.join(log)
                losses, start = random.Random(0), time.perf_counter()
                for _ in range(steps):
                    opt.step(losses.random)
                row |= {"run": time.perf_counter() - start, "kb": os.path.getsize(log) / 1e3}
                opt.close_log()
                opt.flush()
                ends.append(params)
            dist.barrier()
            params = copy_of(base)
            opt = make(params.items(), **options)
            start = time.perf_counter()
            assert opt.join(log) == steps
            row["join"] = time.perf_counter() - start
            opt.flush()
            for other in ends:
                assert all(torch.equal(params[n], p) for n, p in other.items())
            rows.append(row)
            dist.barrier()
    if rank == 0:
        torch.save(rows, f"{directory}/found")
    dist.barrier()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="opt-tiny", choices=list(OPT))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--out", type=Path, help="also write the page to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (options.model, options.dtype, options.steps, directory), nprocs=SIZE)
        rows = torch.load(f"{directory}/found")
    facts, load = machine.facts("cpu"), os.getloadavg()[1]
    names = {
        "method": "method",
        "steps": "steps",
        "kb": "bytes that are sent, kB",
        "join": "s to join",
        "run": "s of the run, without forward passes",
    }
    publish(
        [
            f"# Joining a run by its log, {options.model}",
            "",
            f"{facts['device']}, {SIZE} processes, a thread each, gloo, torch {facts['torch']}, "
            f"commit {facts['commit']}, {facts['date']}; the load of the machine at the end was "
            f"{load:.0f}. {options.dtype}. Each line once; rank 0's weights were compared with "
            "those of the run: equal.",
            "",
            *table(rows, names),
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
