"""What several processes cost a step beside the forward passes: the collective, the comparison of
weights, and sweeps along perturbations that another rank evaluates.

Processes with gloo on this machine, a thread each. Closures return a number at once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import zo_fused
from bench import machine
from bench.models import DTYPES, OPT, opt_parameters
from bench.page import publish, table
from zo_fused.parallel.agreement import checksum

SIZE = 2


class Counted:
    """Bytes that a rank puts into collectives."""

    def __init__(self) -> None:
        self.bytes = 0
        reduce = dist.all_reduce

        def counting(numbers: torch.Tensor, *args: Any, **others: Any) -> Any:
            self.bytes += numbers.numel() * numbers.element_size()
            return reduce(numbers, *args, **others)

        dist.all_reduce = counting


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median of a call, after two to warm up."""
    found = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def work(rank: int, model: str, dtype: str, repeats: int, directory: str) -> None:
    """In each process."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    counted, rows = Counted(), []
    options: dict[str, Any] = {
        "each alone": None,
        "data": zo_fused.Parallel(check_every=10**9),
        "query": zo_fused.Parallel(query=dist.group.WORLD, check_every=10**9),
    }
    params = opt_parameters(model, DTYPES[dtype])
    for queries in (1, 4):
        taken: dict[str, list[float]] = {name: [] for name in options}
        ways = {
            name: zo_fused.MeZO(params.items(), lr=0.0, queries=queries, parallel=parallel)
            for name, parallel in options.items()
        }
        told = {}
        for _ in range(repeats + 1):  # in turns; the first one warms up
            for name, opt in ways.items():
                dist.barrier()
                counted.bytes = 0
                start = time.perf_counter()
                opt.step(lambda: 1.0)
                taken[name].append(time.perf_counter() - start)
                told[name] = counted.bytes
        for name, times in taken.items():
            row = {"queries": queries, "ranks": name, "bytes": told[name]}
            rows.append(row | {"ms": 1e3 * statistics.median(times[1:])})
    checked = seconds(lambda: [checksum(p) for p in params.values()], repeats)
    numbers = torch.zeros(8, dtype=torch.float64)
    collective = seconds(lambda: dist.all_reduce(numbers), 200)
    if rank == 0:
        torch.save((rows, checked, collective), f"{directory}/found")
    dist.barrier()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="opt-125m", choices=list(OPT))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the page to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        given = (options.model, options.dtype, options.repeats, directory)
        mp.spawn(work, given, nprocs=SIZE)
        rows, checked, collective = torch.load(f"{directory}/found")
    facts = machine.facts("cpu")
    names = {"queries": "queries", "ranks": "parallel", "bytes": "bytes a step", "ms": "ms a step"}
    publish(
        [
            f"# A step of MeZO on {SIZE} processes without its forward passes, {options.model}",
            "",
            f"{facts['device']}, a thread a process, gloo, torch {facts['torch']}, commit "
            f"{facts['commit']}, {facts['date']}. {options.dtype}; medians of {options.repeats}, "
            'in turns. "query": one batch, each rank evaluates half of the perturbations.',
            "",
            *table(rows, names),
            "",
            f"One all-reduce of 64 bytes alone: {1e3 * collective:.2g} ms. The checksums of all "
            f"weights: {1e3 * checked:.3g} ms, every 500 steps by default. The rest is sweeps.",
        ],
        options.out,
    )


if __name__ == "__main__":
    main()
