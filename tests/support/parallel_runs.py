"""What the processes of tests/parallel do."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from support.methods import CASES
from support.models import INPUT, network, snapshot
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import zo_fused
from zo_fused.parallel import ranks

STEPS = 4
SOME = ("MeZO", "MeZO, queries, deferred", "LOZO, factored", "ZOAdam", "ForwardGrad", "HiZOO")
SHARDS = {1: [10], 2: [7, 3], 4: [4, 3, 2, 1]}  # rows of the batch, which are not equally many


def shard(rank: int, size: int) -> Tensor:
    """A rank's part of the batch."""
    return INPUT.split(SHARDS[size])[rank]


def loss_on(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    dtype = next(model.parameters()).dtype
    return lambda: model(x.to(dtype)).double().square().mean()


def of_two(rank: int, size: int) -> dict[str, Any]:
    """All that two processes do, by name: what takes long is to start them."""
    return {
        "methods": {name: weights_of(name, rank, size) for name in CASES},
        "exactly": exactly(rank, size),
        "queries": by_query(rank, size),
        "data": data_alone(rank, size),
        **{name: mishap(rank) for name, mishap in MISHAPS.items()},
    }


def of_four(rank: int, size: int) -> dict[str, Any]:
    """All that four do."""
    return {
        "methods": {name: weights_of(name, rank, size) for name in SOME},
        "exactly": exactly(rank, size),
        "both": both_kinds(rank, size),
        "joined": joined(rank, size),
    }


def weights_of(name: str, rank: int, size: int) -> list[Tensor]:
    model = network()
    opt = CASES[name](model, parallel=zo_fused.Parallel(check_every=2) if size > 1 else None)
    x = shard(rank, size)
    sign = -1 if opt.takes_rewards else 1
    loss = loss_on(model, x)
    for _ in range(STEPS):
        opt.step(lambda: sign * loss(), weight=len(x))
    opt.flush()
    return snapshot(model)


def exactly(rank: int, size: int) -> list[Tensor]:
    """Losses of single rows, summed without rounding: the order of the ranks can't matter."""
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2, queries=2)
    rows = INPUT[:8].split(8 // size)[rank]

    def loss() -> Tensor:
        each = [model(row[None]).square().mean() for row in rows]
        return torch.stack(each).double().mean()  # of a power of two

    for _ in range(STEPS):
        opt.step(loss, weight=len(rows))
    return snapshot(model)


# ---- query parallel -----------------------------------------------------------------------------

BY_QUERY: dict[str, Callable[..., Any]] = {
    "MeZO": lambda m, **kw: zo_fused.MeZO(m, lr=1e-2, queries=3, **kw),
    "one query": lambda m, **kw: zo_fused.MeZO(m, lr=1e-2, **kw),
    "one-sided, deferred": lambda m, **kw: zo_fused.MeZO(
        m, lr=1e-2, queries=4, one_sided=True, deferred=True, **kw
    ),
    "ES": lambda m, **kw: zo_fused.ES(m, lr=1e-2, population=5, **kw),
    "antithetic": lambda m, **kw: zo_fused.ES(m, lr=1e-2, population=6, antithetic=True, **kw),
    "LOZO": lambda m, **kw: zo_fused.LOZO(m, lr=1e-3, interval=7, queries=2, **kw),
    "factored": lambda m, **kw: zo_fused.LOZO(
        m, lr=1e-3, interval=7, queries=2, mode="factored", **kw
    ),
    "paired": lambda m, **kw: zo_fused.LOZO(
        m, lr=1e-3, interval=7, queries=2, mode="factored", paired=True, **kw
    ),
    "probes": lambda m, **kw: zo_fused.PGAP(
        m, lr=1e-3, rank=2, interval=7, probes=3, delta=None, **kw
    ),
    "ForwardGrad": lambda m, **kw: zo_fused.ForwardGrad(m, lr=1e-3, queries=3, **kw),
    "ZOConservative": lambda m, **kw: zo_fused.ZOConservative(m, lr=1e-2, **kw),
}


def by_query(rank: int, size: int, steps: int = 200) -> dict[str, tuple[list[Tensor], int]]:
    """The weights in bfloat16 after many steps, and how often the closure was called."""
    query = dist.group.WORLD if size > 1 else None
    parallel = zo_fused.Parallel(query=query, check_every=50) if size > 1 else None
    return {name: _with_dropout(make, parallel, rank, steps) for name, make in BY_QUERY.items()}


def _with_dropout(
    make: Callable[..., Any], parallel: Any, rank: int, steps: int
) -> tuple[list[Tensor], int]:
    base = network(torch.bfloat16)
    # paired evaluations are vmapped, where dropout would need another mode
    model = nn.Sequential(*base, nn.Dropout(0.0))
    opt = make(model, parallel=parallel)
    model[-1].p = 0.0 if opt.weights.beside.paired else 0.2
    calls = 0
    sign = -1 if opt.takes_rewards else 1
    loss = loss_on(model, INPUT)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return sign * loss()

    torch.manual_seed(0 if parallel is None else rank)  # whose dropout becomes that of rank 0
    for _ in range(steps):
        opt.step(closure)
    opt.flush()
    return snapshot(model), calls


def both_kinds(rank: int, size: int) -> list[Tensor]:
    """On a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "q"))
    parallel = zo_fused.Parallel(data=mesh["dp"], query=mesh["q"], check_every=3)
    x = shard(mesh["dp"].get_local_rank(), 2)
    model = network(torch.bfloat16)
    opt = zo_fused.MeZO(model, lr=1e-2, queries=3, parallel=parallel)
    for _ in range(20):
        opt.step(loss_on(model, x), weight=len(x))
    return snapshot(model)


def joined(rank: int, size: int) -> list[tuple[list[int], list[Tensor]]]:
    """Runs over such a mesh, each of which goes on from the log of the one before."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "q"))
    parallel = zo_fused.Parallel(data=mesh["dp"], query=mesh["q"])
    x = shard(mesh["dp"].get_local_rank(), 2)
    found = []
    with tempfile.TemporaryDirectory() as folder:  # in which others than rank 0 find nothing
        for _ in range(2):
            model = network(torch.bfloat16)
            opt = zo_fused.MeZO(model, lr=1e-2, queries=3, parallel=parallel)
            steps = [opt.join(Path(folder) / "log")]
            for _ in range(3):
                opt.step(loss_on(model, x), weight=len(x))
            opt.close_log()
            found.append(([*steps, opt.step_count], snapshot(model)))
    return found


def data_alone(rank: int, size: int) -> list[Tensor]:
    """The same with the first kind alone."""
    x = shard(rank, size)
    model = network(torch.bfloat16)
    opt = zo_fused.MeZO(model, lr=1e-2, queries=3)
    for _ in range(20):
        opt.step(loss_on(model, x), weight=len(x))
    return snapshot(model)


# ---- what goes wrong ----------------------------------------------------------------------------


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _raises(rank: int) -> Any:
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2, queries=2)
    loss, calls = loss_on(model, shard(rank, 2)), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 6:
            raise MemoryError("no room")
        return loss()

    opt.step(closure)
    before = snapshot(model)
    said = message_of(lambda: opt.step(closure))
    off = max(float((a - b).abs().max()) for a, b in zip(before, snapshot(model), strict=True))
    again = message_of(lambda: opt.step(closure))
    return said, off, opt.step_count, again, snapshot(model)


def _raises_on_gpus(rank: int) -> Any:
    """As on GPUs, where nobody waits for what the others have to say: it is read a step later."""
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2)
    loss, calls = loss_on(model, shard(rank, 2)), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls > 4:
            raise MemoryError("no room")
        return loss()

    with patch.object(ranks, "on_host", lambda device: False):
        said = [message_of(lambda: opt.step(closure)) for _ in range(3)]
        before = snapshot(model)
        if rank == 0:
            said.append(message_of(lambda: opt.step(closure)))
    return said, before, snapshot(model)


def _not_a_number(rank: int) -> Any:
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2)
    loss = loss_on(model, shard(rank, 2))
    opt.step(lambda: loss() * (float("nan") if rank else 1.0))
    opt.step(loss)
    return opt.skipped_steps, opt.step_count, snapshot(model)


def _bad_weight(rank: int) -> Any:
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2)
    loss = loss_on(model, shard(rank, 2))
    opt.step(loss)
    said = message_of(lambda: opt.step(loss, weight=-1 if rank else 3))
    opt.step(loss)
    return said, opt.step_count, snapshot(model)


def _no_examples(rank: int) -> Any:
    """The mean of nothing is NaN, and counts for nothing."""
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2)
    x = INPUT[: 0 if rank else 10]
    opt.step(loss_on(model, x), weight=len(x))
    return opt.skipped_steps, snapshot(model)


def _drift(rank: int) -> Any:
    """Each to itself, and then together."""
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2, parallel=None)
    opt.step(loss_on(model, shard(rank, 2)))
    return message_of(lambda: zo_fused.MeZO(model).step(loss_on(model, INPUT)))


def _drift_later(rank: int) -> Any:
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2, parallel=zo_fused.Parallel(check_every=3))
    for step in range(3):
        opt.step(loss_on(model, INPUT))
        if step == 1 and rank == 1:
            with torch.no_grad():
                model[2].bias[0].add_(1e-6)
    return message_of(lambda: opt.step(loss_on(model, INPUT)))


def _flushes_alone(rank: int) -> Any:
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2, deferred=True)
    opt.step(loss_on(model, INPUT))
    if rank == 0:
        opt.state_dict()
    return message_of(lambda: opt.step(loss_on(model, INPUT)))


def _differs(**options: Any) -> Callable[[int], str]:
    def mishap(rank: int) -> str:
        model = network()
        theirs = {name: values[rank] for name, values in options.items()}
        return message_of(lambda: zo_fused.MeZO(model, **theirs).step(loss_on(model, INPUT)))

    return mishap


def _other_steps(rank: int) -> Any:
    model = network()
    opt = zo_fused.MeZO(model, lr=0.0)
    opt.step(loss_on(model, INPUT))
    if rank:
        mine = opt.state_dict()
        for group in mine["param_groups"]:
            group["step"] = 7
        opt.load_state_dict(mine)
    return message_of(lambda: opt.step(loss_on(model, INPUT)))


def _members(rank: int) -> Any:
    model = network()
    opt = zo_fused.ES(model, population=4)
    loss = loss_on(model, shard(rank, 2))
    for member in opt.members():
        with member, torch.no_grad():
            member.reward = -loss()
    opt.step(weight=SHARDS[2][rank])
    twin = network()
    other = zo_fused.ES(twin, population=4)
    theirs = loss_on(twin, shard(rank, 2))
    other.step(lambda: -theirs(), weight=SHARDS[2][rank])
    return snapshot(model), snapshot(twin)


def _given(rank: int) -> Any:
    """Losses from outside, and an estimate before its step."""
    models = [network(), network()]
    first, second = (zo_fused.MeZO(model, lr=1e-2) for model in models)
    losses = []
    for sign in (+1, -1):
        with first.perturbed(sign), torch.no_grad():
            losses.append(loss_on(models[0], shard(rank, 2))())
    first.step(loss_plus=losses[0], loss_minus=losses[1], weight=SHARDS[2][rank])
    second.estimate(loss_on(models[1], shard(rank, 2)), weight=SHARDS[2][rank])
    second.step()
    return first.projected_grad, second.projected_grad


def _hybrid(rank: int) -> str:
    model = network()
    fo = torch.optim.SGD(model[2].parameters(), lr=1e-2)
    hybrid = zo_fused.Hybrid(zo_fused.MeZO(model[0]), fo)
    return message_of(lambda: hybrid.step(loss_on(model, INPUT)))


def _members_by_query(rank: int) -> str:
    query = zo_fused.Parallel(query=dist.group.WORLD)
    return message_of(lambda: next(zo_fused.ES(network(), parallel=query).members()))


MISHAPS: dict[str, Callable[[int], Any]] = {
    "raises": _raises,
    "raises on GPUs": _raises_on_gpus,
    "not a number": _not_a_number,
    "bad weight": _bad_weight,
    "no examples": _no_examples,
    "drift": _drift,
    "drift later": _drift_later,
    "flushes alone": _flushes_alone,
    "seeds": _differs(seed=(1, 2)),
    "options": _differs(queries=(1, 2)),
    "lr": _differs(lr=(1e-3, 1e-4)),
    "other steps": _other_steps,
    "members": _members,
    "members by query": _members_by_query,
    "given": _given,
    "hybrid": _hybrid,
}


def left_alone(rank: int, size: int) -> dict[str, tuple[str, float, float]]:
    """What rank 0 sees when rank 1 hangs, and when it dies: the message, how long it takes, and how
    far weights are off."""
    return {
        "hangs": _left_alone(rank, lambda: time.sleep(5), 2.0),
        "dies": _left_alone(rank, lambda: os._exit(1), 60.0),
    }


def _left_alone(rank: int, leave: Callable[[], Any], timeout: float) -> tuple[str, float, float]:
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2, parallel=zo_fused.Parallel(timeout=timeout))
    loss = loss_on(model, INPUT)
    dist.barrier()  # on a busy machine it takes longer until all are here
    opt.step(loss)
    before = snapshot(model)
    if rank == 1:
        leave()
    start = time.perf_counter()
    said = message_of(lambda: opt.step(loss))
    seconds = time.perf_counter() - start
    off = max(float((a - b).abs().max()) for a, b in zip(before, snapshot(model), strict=True))
    return said, seconds, off
