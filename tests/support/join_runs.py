"""What the processes of tests/parallel/test_join.py do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.equality import in_memory
from support.methods import CASES
from support.models import INPUT, network, snapshot
from support.parallel_runs import loss_on, message_of, shard
from torch import Tensor, nn

import zo_fused
from zo_fused.step.optimizer import ZerothOrderOptimizer

STEPS, CUT = 7, 4  # windows have three steps
TORN = b"[[4,0.1"
# Every kind of state and of log; that all methods can be replayed, tests/replaying shows.
NAMES = (
    *("MeZO", "MeZO-M", "MeZO, queries, deferred", "ZOAdam, deferred", "HiZOO"),
    *("LOZO, factored", "LOZO-M, deferred", "LOZO of activations", "PGAP", "MEAZO", "ES"),
)


def begun(name: str, **options: Any) -> tuple[nn.Module, ZerothOrderOptimizer, Callable[[], Any]]:
    """A run's model, optimizer and step, on this rank's part of the batch."""
    model = network(torch.bfloat16)
    opt = CASES[name](model, lr=1e-2, **options)
    x = shard(dist.get_rank(), dist.get_world_size())
    sign = -1 if opt.takes_rewards else 1
    loss = loss_on(model, x)
    return model, opt, lambda: opt.step(lambda: sign * loss(), weight=len(x))


def of_two(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """All that two processes do, by name: what takes long is to start them."""
    return {
        "methods": {name: after_a_kill(name, rank, folder) for name in NAMES},
        "exactly": exactly(folder / "exactly", CUT, rank, size),
        **{name: mishap(rank, folder) for name, mishap in MISHAPS.items()},
    }


def after_a_kill(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """A run of seven steps, and one of which only rank 0 has a log, cut off in step 4, and then
    goes on in other processes: what is in memory, the log, and the bits of the end."""
    log, whole = folder / f"{name}.log", folder / f"{name}.whole"
    model, opt, step = begun(name)
    opt.join(whole if rank == 0 else "/elsewhere")  # it begins
    for number in range(STEPS):
        if number == CUT:
            there = in_memory(model)
            if rank == 0:
                log.write_bytes(whole.read_bytes() + TORN)
        step()
    again, joined, go_on = begun(name)
    made_steps = joined.join(log if rank == 0 else None)
    found = {"made": made_steps, "there": torch.equal(in_memory(again), there)}
    for _ in range(STEPS - CUT):
        go_on()
    found["end"] = torch.equal(in_memory(again), in_memory(model))
    found["weights"] = in_memory(again)
    dist.barrier()
    found["log"] = log.read_bytes() == whole.read_bytes()
    return found


def exactly(log: Path, steps: int, rank: int = 0, size: int = 1) -> tuple[int, list[Tensor]]:
    """A run up to so many steps with losses of single rows, summed without rounding: how many ranks
    there are can't matter."""
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2, queries=2, deferred=True)
    rows = INPUT[:8].split(8 // size)[rank]

    def loss() -> Tensor:
        each = [model(row[None]).square().mean() for row in rows]
        return torch.stack(each).double().mean()  # of a power of two

    made_steps = opt.join(log)
    while opt.step_count < steps:
        opt.step(loss, weight=len(rows))
    opt.close_log()
    return made_steps, snapshot(model)


# ---- what goes wrong ----------------------------------------------------------------------------


def _of_two_steps(rank: int, folder: Path, name: str) -> Path:
    """A log of two steps."""
    log = folder / f"{name}.jsonl"
    _, opt, step = begun("MeZO")
    opt.join(log)
    for _ in range(2):
        step()
    opt.close_log()
    dist.barrier()
    return log


def _tells(rank: int, folder: Path, change: Callable[[int, Any, Path], None]) -> Any:
    """What each rank says to a join after a change, and whether anything moved."""
    log = _of_two_steps(rank, folder, change.__name__)
    model, opt, _ = begun("MeZO")
    change(rank, (model, opt), log)
    dist.barrier()
    before = in_memory(model)
    said = message_of(lambda: opt.join(log))
    return said, torch.equal(in_memory(model), before), opt.step_count


def other_base(rank: int, run: Any, log: Path) -> None:
    """On one rank alone, which is not the first."""
    if rank == 1:
        with torch.no_grad():
            run[0][2].bias[0].add_(1)


def damaged(rank: int, run: Any, log: Path) -> None:
    if rank == 0:
        log.write_bytes(log.read_bytes().replace(b"[[1,", b"[[3,"))


def other_log_open(rank: int, run: Any, log: Path) -> None:
    if rank == 1:
        run[1].start_log(log.with_suffix(".own"))


def _refused(change: Callable[[int, Any, Path], None]) -> Callable[[int, Path], Any]:
    return lambda rank, folder: _tells(rank, folder, change)


def _unfinished(rank: int, folder: Path) -> Any:
    """The first rank dies in step 2, and what it still put back is in the log."""
    log, (_, opt, step) = folder / "unfinished", begun("MeZO, deferred")
    twin, _, of_twin = begun("MeZO, deferred")
    opt.join(log)
    for _ in range(2):
        step()
        of_twin()
    message_of(lambda: opt.step(lambda: 1 / 0))
    again, joined, go_on = begun("MeZO, deferred")
    opt.close_log()
    joined.join(log)
    same = torch.equal(in_memory(again), in_memory(twin))
    go_on()
    of_twin()
    return same, torch.equal(in_memory(again), in_memory(twin))


def _live(rank: int, folder: Path) -> Any:
    """Rank 1 is another process now, and rank 0 goes on; also after a step that failed, which has
    left its traces in the weights."""
    found = []
    for failed in (False, True):
        log, (model, opt, step) = folder / f"live-{failed}", begun("MeZO, deferred")
        opt.join(log)
        for _ in range(3):
            step()
        if failed:
            message_of(lambda opt=opt: opt.step(lambda: 1 / 0))
        if rank == 1:
            model, opt, step = begun("MeZO, deferred")
        made_steps = opt.join()
        there = in_memory(model)
        for _ in range(2):
            step()
        found.append((made_steps, there, in_memory(model), opt.step_count))
    return found


def _without_path(rank: int, folder: Path) -> str:
    return message_of(lambda: begun("MeZO")[1].join())


MISHAPS: dict[str, Callable[[int, Path], Any]] = {
    "other base": _refused(other_base),
    "damaged": _refused(damaged),
    "other log open": _refused(other_log_open),
    "unfinished": _unfinished,
    "live": _live,
    "without path": _without_path,
}
