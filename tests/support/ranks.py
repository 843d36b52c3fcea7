"""Several processes, with gloo on the CPU, that run one function each with its rank."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def together(
    size: int, work: Callable[[int, int], Any], directory: Path, dies: int | None = None
) -> list[Any]:
    """What the function returns in each process, by rank. It must be one of a module.

    Args:
        directory: empty, for what processes tell each other.
        dies: a rank that is to end without a result.
    """
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_run, args=(rank, size, work, directory)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    made = [directory / f"result-{rank}" for rank in range(size)]
    errors = [file.read_text() for file in sorted(directory.glob("error-*"))]
    assert not errors, "\n".join(errors)
    return [torch.load(file, weights_only=False) for rank, file in enumerate(made) if rank != dies]


def _run(rank: int, size: int, work: Callable[[int, int], Any], directory: Path) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what is expected to fail says so
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(work(rank, size), directory / f"result-{rank}")
    except BaseException:
        (directory / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(0)  # not waiting for ranks that have died
